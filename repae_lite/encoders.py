"""Frozen vision encoders: what REPA aligns with.

REPA (arXiv 2410.06940) section 3; taught in `notebooks/03_repa.ipynb`. An encoder maps uint8 images to patch tokens on the grid of
the SiT. This file holds the embedded scale's "tiny" encoder.
"""

import torch
from torch import Tensor, nn

from repae_lite.data import CLASS_NAMES, to_unit_range
from repae_lite.files import data_small_dir, load_weights


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
        embed_dim: D. grid_size: tokens along each side.
    """

    def __init__(self, network: nn.Module, *, name: str, embed_dim: int, grid_size: int):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.embed_dim, self.grid_size = name, embed_dim, grid_size

    @classmethod
    def from_name(cls, name: str, resolution: int = 32) -> "VisionEncoder":
        """Loads an encoder by name for images of `resolution` pixels: "tiny" for the embedded 32-pixel images.

        Raises:
            ValueError: unknown name, or a resolution the encoder does not take.
        """
        if name != "tiny":
            raise ValueError(f"unknown vision encoder {name!r}: this version has tiny, for the embedded images")
        if resolution != 32:
            raise ValueError(f"the tiny encoder takes 32-pixel images, not {resolution}: use resolution=32")
        network = load_weights(data_small_dir() / "teacher.safetensors", TinyViT())
        return cls(network, name="tiny", embed_dim=network.width, grid_size=network.grid_size)

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Stays in eval mode: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Patch tokens (B, N, D), float32, row by row, of uint8 images (B, 3, H, W).

        Raises:
            ValueError: images are not uint8.
        """
        return self.network(to_unit_range(images)).float()
