"""Frozen vision encoders: what REPA aligns with.

REPA (arXiv 2410.06940) section 3; taught in `notebooks/03_repa.ipynb`. An encoder maps uint8 images to patch tokens on the grid of
the SiT. This file holds the embedded scale's "tiny" encoder; `repae_lite.encoder_zoo` holds the others.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from repae_lite.data import CLASS_NAMES, to_unit_range
from repae_lite.encoder_zoo import ENCODERS, Preprocess, build_network, find_spec
from repae_lite.files import data_small_dir, load_weights

ENCODER_NAMES = ("tiny", *ENCODERS)


class TinyViT(nn.Module):
    """A small vision transformer with a convolutional stem: 32x32 images to 16 tokens on a 4x4 grid.

    Its heads, used in training only, name the class from the mean token, the pose from the mean token, and the parts of the drawing
    (roof, wheel, fin …) from each token: dense supervision, so that a token says what is at its place and not the label alone.

    Args:
        num_parts: part types, background included; the defaults are those of data_small/make_images.py.
        pose_dims: numbers that describe a pose.
    """

    width, grid_size = 128, 4

    def __init__(self, num_parts: int = 34, pose_dims: int = 7):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.GELU(),
            nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(),
            nn.Conv2d(64, self.width, 3, 2, 1),
        )  # fmt: skip
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.grid_size**2, self.width))
        layer = nn.TransformerEncoderLayer(
            self.width, nhead=4, dim_feedforward=384, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, num_layers=4, norm=nn.LayerNorm(self.width), enable_nested_tensor=False)
        self.class_head = nn.Linear(self.width, len(CLASS_NAMES))
        self.pose_head = nn.Linear(self.width, pose_dims)
        self.parts_head = nn.Linear(self.width, num_parts)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) in [-1, 1] to tokens (B, 16, 128), after the final norm."""
        if x.ndim != 4 or x.shape[1:] != (3, 32, 32):
            raise ValueError(f"images have shape {tuple(x.shape)}: the tiny encoder takes (B, 3, 32, 32)")
        h = self.stem(x).flatten(2).transpose(1, 2) + self.pos_embed
        return self.blocks(h)


class VisionEncoder(nn.Module):
    """A frozen encoder with its own preprocessing: uint8 images in, patch tokens out.

    Args:
        network: maps preprocessed images to tokens (B, N, D).
        name: how users call it.
        embed_dim: D. grid_size: tokens along each side. resolution: height and width of the images, in pixels.
        preprocess: maps uint8 images to what the network eats.
        stand_in: the weights are random numbers.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        embed_dim: int,
        grid_size: int,
        resolution: int,
        preprocess: Callable[[Tensor], Tensor] = to_unit_range,
        stand_in: bool = False,
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.name, self.embed_dim, self.grid_size, self.resolution = name, embed_dim, grid_size, resolution
        self.stand_in = stand_in

    @classmethod
    def from_name(cls, name: str, resolution: int | None = None, *, weights: str | Path = "pretrained") -> "VisionEncoder":
        """Loads an encoder for images of `resolution` pixels.

        Args:
            name: "tiny" for the embedded images, a row of `repae_lite.encoder_zoo.ENCODERS`, or "timm:NAME".
            resolution: 32 for tiny and 256 for all others when None; the others take any multiple of 16.
            weights: "pretrained" (downloaded by timm once), a file (safetensors, or a checkpoint of tensors), or "random": a seeded
                stand-in for tests and dry runs, which warns.

        Raises:
            ValueError: unknown name, or a resolution or weights that do not fit.
            FileNotFoundError: no such file of weights. ConnectionError: the weights are not cached and cannot be downloaded.
        """
        if "," in name:
            raise ValueError(f"{name!r} names several encoders: use load_encoders, which returns a list")
        if name == "tiny":
            return cls._tiny(resolution, weights)
        spec = find_spec(name)
        resolution = 256 if resolution is None else resolution
        network = build_network(name, spec, resolution, weights)
        stand_in = weights == "random"
        if stand_in:
            warnings.warn(f"{name} has random weights: a stand-in for tests and dry runs that knows nothing", stacklevel=2)
        return cls(
            network,
            name=name,
            embed_dim=network.vit.embed_dim,
            grid_size=network.vit.patch_embed.grid_size[0],
            resolution=resolution,
            preprocess=Preprocess(spec, resolution),
            stand_in=stand_in,
        )

    @classmethod
    def _tiny(cls, resolution: int | None, weights: str | Path) -> "VisionEncoder":
        if resolution not in (32, None):
            raise ValueError(f"the tiny encoder takes 32-pixel images, not {resolution}: use resolution=32")
        if weights != "pretrained":
            raise ValueError(f"the tiny encoder ships with its weights, not {str(weights)!r}: leave weights out")
        network = load_weights(data_small_dir() / "teacher.safetensors", TinyViT())
        return cls(network, name="tiny", embed_dim=network.width, grid_size=network.grid_size, resolution=32)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays in eval mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens (B, N, D), float32, row by row, of uint8 images (B, 3, H, W) with H = W = `resolution`.

        The network follows the caller's autocast.

        Raises:
            ValueError: images of another dtype or size.
        """
        side = self.resolution
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: {self.name} takes uint8 (B, 3, {side}, {side}) with values "
                "from 0 to 255; build it with another resolution for other sizes"
            )
        return self.network(self.preprocess(images)).float()

    def extra_repr(self) -> str:
        """Shown by print(encoder)."""
        weights = ", random weights: a stand-in" if self.stand_in else ""
        return f"{self.name}, {self.resolution} pixels, {self.grid_size}x{self.grid_size} tokens of width {self.embed_dim}{weights}"


def load_encoders(
    names: str, resolution: int | None = None, *, weights: str | Path | Sequence[str | Path] = "pretrained"
) -> list[VisionEncoder]:
    """Loads one or several encoders: "a" or "a,b". One entry of `weights` is for all, several are one for each.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: see `VisionEncoder.from_name`; ValueError too for another number of weights.
    """
    split = [name.strip() for name in names.split(",")]
    each = [weights] * len(split) if isinstance(weights, str | Path) else list(weights)
    if len(each) != len(split):
        raise ValueError(f"{len(each)} weights for {len(split)} encoders ({names}): give one for all, or one for each")
    return [VisionEncoder.from_name(name, resolution, weights=w) for name, w in zip(split, each, strict=True)]


_DOWNSAMPLING = {"f8d4": 8, "f16d32": 16, "tiny": 4}  # of the VAE presets


def check_fits(encoders: VisionEncoder | Sequence[VisionEncoder], *, downsampling: int, patch_size: int) -> None:
    """Refuses encoders whose token grid is not that of a SiT on a VAE's latents.

    Args:
        encoders: one or several.
        downsampling: image pixels per latent pixel, along each side; `vae.config.downsampling`.
        patch_size: latent pixels per token, along each side; `sit.config.patch_size`.

    Raises:
        ValueError: it names the combinations that fit.
    """
    for encoder in [encoders] if isinstance(encoders, VisionEncoder) else encoders:
        stride = encoder.resolution // encoder.grid_size  # image pixels per token
        if stride != downsampling * patch_size:
            fitting = [f"{vae} with SiT patch {stride // f}" for vae, f in _DOWNSAMPLING.items() if stride % f == 0]
            raise ValueError(
                f"{encoder.name} gives a token per {stride}x{stride} pixels, but a VAE that reduces {downsampling}x and SiT patch "
                f"{patch_size} make one per {downsampling * patch_size}x{downsampling * patch_size}: "
                f"VAE factor times patch must be {stride}, as in {', '.join(fitting)}"
            )
