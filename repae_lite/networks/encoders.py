"""Frozen vision encoders: what REPA aligns with.

REPA (arXiv 2410.06940) section 3; taught in `notebooks/03_repa.ipynb`. An encoder maps uint8 images to patch
tokens on the grid of the SiT. This file holds the embedded scale's "tiny" encoder;
`repae_lite.networks.encoder_table` holds the others.
"""

import importlib
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repae_lite.networks.encoder_table import ENCODERS, PIXELS_PER_TOKEN, EncoderSpec, find_spec
from repae_lite.networks.vae import VAE_PRESETS
from repae_lite.utils.downloads import failed, trouble
from repae_lite.utils.errors import first_line
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.pixels import CLASS_NAMES, to_unit_range
from repae_lite.utils.state_dicts import fill_module, load_weights, read_weights
from repae_lite.utils.weight_files import DamagedFile, is_safetensors

ENCODER_NAMES = ("tiny", *ENCODERS)


class TinyViT(nn.Module):
    """A small vision transformer with a convolutional stem: 32x32 images to 16 tokens on a 4x4 grid.

    Its heads, used in training only, name the class from the mean token, the pose from the mean token, and
    the parts of the drawing (roof, wheel, fin …) from each token: dense supervision, so that a token says
    what is at its place and not the label alone.

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
            self.width,
            nhead=4,
            dim_feedforward=384,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            layer, num_layers=4, norm=nn.LayerNorm(self.width), enable_nested_tensor=False
        )
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
        embed_dim: D.
        grid_size: tokens along each side.
        resolution: height and width of the images, in pixels.
        preprocess: maps uint8 images to the network's input.
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
    def from_name(
        cls, name: str, resolution: int | None = None, *, weights: str | Path = "pretrained"
    ) -> "VisionEncoder":
        """Loads an encoder for images of `resolution` pixels.

        Args:
            name: "tiny" for the embedded images, a row of `repae_lite.networks.encoder_table.ENCODERS`, or
                "timm:NAME".
            resolution: 32 for tiny and 256 for all others when None; the others take any multiple of 16.
            weights: "pretrained" (downloaded by timm once), a file (safetensors, or a checkpoint of tensors),
                or "random": a seeded stand-in for tests and dry runs, which warns.

        Raises:
            ValueError: unknown name, or a resolution or weights that do not fit.
            FileNotFoundError: no such file of weights.
            ConnectionError: the weights are not cached and cannot be downloaded.
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
            warnings.warn(
                f"{name} has random weights: a stand-in for tests and dry runs that knows nothing",
                stacklevel=2,
            )
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
            raise ValueError(
                f"the tiny encoder ships with its weights, not {str(weights)!r}: leave weights out"
            )
        network = load_weights(data_small_dir() / "teacher.safetensors", TinyViT())
        return cls(network, name="tiny", embed_dim=network.width, grid_size=network.grid_size, resolution=32)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays in eval mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens of images, row by row; the network follows the caller's autocast.

        Args:
            images: (B, 3, H, W) uint8, H = W = `resolution`.

        Returns:
            (B, N, D), float32.

        Raises:
            ValueError: images of another dtype or size.
        """
        side = self.resolution
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: {self.name} takes uint8 (B, 3, "
                f"{side}, {side}) with values from 0 to 255; build it with another resolution for other sizes"
            )
        return self.network(self.preprocess(images)).float()

    def extra_repr(self) -> str:
        """Shown by print(encoder)."""
        tokens = f"{self.grid_size}x{self.grid_size} tokens of width {self.embed_dim}"
        weights = ", random weights: a stand-in" if self.stand_in else ""
        return f"{self.name}, {self.resolution} pixels, {tokens}{weights}"


def load_encoders(
    names: str, resolution: int | None = None, *, weights: str | Path | Sequence[str | Path] = "pretrained"
) -> list[VisionEncoder]:
    """Loads one or several encoders.

    Args:
        names: "a" or "a,b".
        resolution: height and width of the images, in pixels; see `VisionEncoder.from_name`.
        weights: for all, or one for each.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: see `VisionEncoder.from_name`; ValueError too for
            another number of weights.
    """
    split = [name.strip() for name in names.split(",")]
    each = [weights] * len(split) if isinstance(weights, str | Path) else list(weights)
    if len(each) != len(split):
        raise ValueError(
            f"{len(each)} weights for {len(split)} encoders ({names}): give one for all, or one for each"
        )
    return [VisionEncoder.from_name(name, resolution, weights=w) for name, w in zip(split, each, strict=True)]


def check_token_grid(
    encoders: VisionEncoder | Sequence[VisionEncoder], *, downsampling: int, patch_size: int
) -> None:
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
            factors = {name: vae.downsampling for name, vae in VAE_PRESETS.items()}
            fitting = [f"{vae} with SiT patch {stride // f}" for vae, f in factors.items() if stride % f == 0]
            side = downsampling * patch_size
            raise ValueError(
                f"{encoder.name} gives a token per {stride}x{stride} pixels, but a VAE that reduces "
                f"{downsampling}x and SiT patch {patch_size} make one per {side}x{side}: VAE factor times "
                f"patch must be {stride}, as in {', '.join(fitting)}"
            )


class Preprocess(nn.Module):
    """uint8 images (B, 3, R, R) to an encoder's input: float32 (B, 3, S, S), normalised."""

    def __init__(self, spec: EncoderSpec, resolution: int):
        super().__init__()
        self.spec, self.size = spec, spec.patch_size * resolution // PIXELS_PER_TOKEN
        self.register_buffer("mean", torch.tensor(spec.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        if self.spec.resize_first:
            return (self._resize(x) - self.mean) / self.std
        return self._resize((x - self.mean) / self.std)

    def _resize(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.size:
            return x
        return F.interpolate(
            x,
            (self.size, self.size),
            mode=self.spec.interpolation,
            align_corners=False,
            antialias=self.spec.antialias,
        )


class PatchTokens(nn.Module):
    """A timm vision transformer reduced to its patch tokens: images (B, 3, S, S) to (B, N, D), row by row."""

    def __init__(self, vit: nn.Module, *, final_norm: bool):
        super().__init__()
        self.vit = vit
        if not final_norm:
            vit.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]


def build_network(
    name: str, spec: EncoderSpec, resolution: int, weights: str | Path = "pretrained"
) -> PatchTokens:
    """Builds an encoder for images of `resolution` pixels and fills it.

    Args:
        name: what to call it in errors.
        spec: its row of the table.
        resolution: a multiple of 16.
        weights: "pretrained" downloads them once; a file; or "random", the same numbers every time, which
            stand in for the real ones.

    Raises:
        ValueError: a resolution that does not fit; weights that do not fit or that timm does not have.
        FileNotFoundError: no such file.
        ConnectionError: the weights are not cached and cannot be downloaded.
        DamagedFile, OSError: what is cached is not whole, or the cache cannot be used.
    """
    if resolution < PIXELS_PER_TOKEN or resolution % PIXELS_PER_TOKEN:
        raise ValueError(
            f"resolution {resolution} is not a multiple of {PIXELS_PER_TOKEN}: {name} gives one token per "
            f"{PIXELS_PER_TOKEN}x{PIXELS_PER_TOKEN} pixels of the image"
        )
    if weights == "pretrained" and not spec.tag:
        raise ValueError(f"{name} needs weights=FILE: {spec.get}")
    arguments = {
        "img_size": spec.patch_size * resolution // PIXELS_PER_TOKEN,
        "num_classes": 0,
        **spec.timm_args,
    }
    with torch.random.fork_rng(devices=[]):  # building draws numbers; whoever calls keeps theirs
        torch.manual_seed(0)
        if weights == "pretrained":
            vit = _pretrained(name, spec, arguments)
        else:
            vit = timm.create_model(spec.model, **arguments)
    grid = resolution // PIXELS_PER_TOKEN
    if tuple(vit.patch_embed.grid_size) != (grid, grid) or vit.num_prefix_tokens != spec.prefix_tokens:
        raise ValueError(
            f"timm {timm.__version__} builds {name} with {vit.patch_embed.grid_size} patches and "
            f"{vit.num_prefix_tokens} other tokens instead of {(grid, grid)} and {spec.prefix_tokens}: use "
            "another timm version"
        )
    if weights not in ("pretrained", "random"):
        _fill(vit, Path(weights))
    return PatchTokens(vit, final_norm=spec.final_norm)


def _pretrained(name: str, spec: EncoderSpec, arguments: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(spec.timm_name, pretrained=True, **arguments)
    except Exception as error:
        if refusal := _why_not_loaded(error, name, spec):
            raise refusal from error
        raise


def _why_not_loaded(error: Exception, name: str, spec: EncoderSpec) -> OSError | ValueError | None:
    """What stopped timm: the download, a file of a cache that is not whole, or itself; None for a bug."""
    weights = timm.models.get_pretrained_cfg(spec.timm_name)
    hub = bool(weights and weights.hf_hub_id)
    source = (weights and (weights.hf_hub_id or weights.url)) or spec.timm_name
    found = trouble(error, source, hub=hub)
    if found is None:
        fetching = _came_through(error, ("huggingface_hub", "hf_xet", "timm.models._hub", "torch.hub"))
        if not fetching and not isinstance(error, RuntimeError):
            return None
        for path in _cached(source, hub):
            remedy = f"remove {path.resolve()}, and it is downloaded again"
            try:
                (read_weights if is_safetensors(path) else read_pickle)(path, remedy=remedy)
            except DamagedFile as damaged:
                return damaged
        if not fetching:
            # timm has no such weights, no huggingface_hub that it understands, or gets another network's file
            return ValueError(
                f"timm {timm.__version__} cannot load {name} ({spec.timm_name}): update timm, or pass "
                f"weights=FILE ({first_line(error)})"
            )
        found = failed(error, source)
    what = f"{name} ({spec.timm_name} of timm; {found.reason})"
    return found.becomes(f"cannot download {what}: {found.remedy}, or pass weights=FILE")


def _came_through(error: Exception, modules: tuple[str, ...]) -> bool:
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(f"{name}.".startswith(tuple(f"{module}." for module in modules)) for name in names)


def _cached(source: str, hub: bool) -> list[Path]:
    """The files with these weights that are in the cache."""
    if not hub:
        found = [str(Path(torch.hub.get_dir()) / "checkpoints" / source.rsplit("/", 1)[-1])]
    else:
        files = ("model.safetensors", "pytorch_model.bin")
        found = [huggingface_hub.try_to_load_from_cache(source, file) for file in files]
    return [Path(path) for path in found if isinstance(path, str) and Path(path).is_file()]


# ---------------------------------------------------------------- weights from a file


def _fill(vit: nn.Module, path: Path) -> None:
    """Loads a file, all of it or nothing: in timm's layout, the authors' or MoCo v3's.

    Raises:
        FileNotFoundError: no such file.
        OSError: one that the system does not let us read.
        ValueError: not weights, more than weights, or the weights of another network.
    """
    if not path.exists():
        raise FileNotFoundError(
            f'the weights {path} do not exist: give "pretrained", "random" or an existing file'
        )
    state = read_weights(path)[0] if is_safetensors(path) else read_pickle(path)
    module = importlib.import_module(type(vit).__module__)  # of timm, which knows the authors' layouts
    try:
        state = module.checkpoint_filter_fn(from_moco(state), vit)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no weights of {type(vit).__name__} that timm can convert ({first_line(error)}): "
            "give another file"
        ) from None
    own = vit.state_dict()
    state = {
        key: value
        for key, value in state.items()
        if key in own or str(key).split(".")[0] not in ("head", "head_dist")
    }
    fill_module(vit, state, path)


_MOCO_PREFIX = "module.base_encoder."
_MOCO_SLIPS = (  # misnamed in published files
    ("blocks.13.norm13.", "blocks.13.norm1."),
    ("blocks.13.mlp.fc13.", "blocks.13.mlp.fc1."),
    ("blocks.14.norm14.", "blocks.14.norm2."),
    ("blocks.14.mlp.fc14.", "blocks.14.mlp.fc2."),
)


def from_moco(state: dict) -> dict:
    """The encoder's weights of a MoCo v3 training checkpoint, in timm's names; others come back as they are.

    Momentum encoder, predictor and projection head are left out, and four misnamed layers of published files
    are named rightly.
    """
    inner = state.get("state_dict", state)
    if not any(key.startswith(_MOCO_PREFIX) for key in inner):
        return state
    converted = {}
    for key, value in inner.items():
        if key.startswith(_MOCO_PREFIX):
            key = key.removeprefix(_MOCO_PREFIX)
            for wrong, right in _MOCO_SLIPS:
                key = key.replace(wrong, right)
            if key.split(".")[0] not in ("head", "fc"):
                converted[key] = value
    return converted
