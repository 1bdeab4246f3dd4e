"""Pixels as stored (uint8, 0 to 255) and as networks take them (float in [-1, 1]); the embedded classes."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from repae_lite.utils.files import atomic_path

ROUNDINGS = ("round", "truncate")
CLASS_NAMES = ("fish", "house", "tree", "mushroom", "sailboat", "flower", "cat", "car", "umbrella", "rocket")


def to_unit_range(images: Tensor) -> Tensor:
    """Pixels to the networks' range: uint8 (…) in 0 … 255 to float32 in [-1, 1].

    Raises:
        ValueError: images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"pixels have dtype {images.dtype}: give uint8 values from 0 to 255")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor, rounding: str = "round") -> Tensor:
    """Network output about in [-1, 1] to pixels: clamped, uint8.

    Args:
        x: any shape.
        rounding: of fractions of a grey level: "round", or "truncate" as the official sampling script does.

    Raises:
        ValueError: another rounding.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}: choose {' or '.join(ROUNDINGS)}")
    grey = (x.float() + 1) * 127.5 if rounding == "round" else 255 * ((x.float() + 1) / 2)
    return (grey.round() if rounding == "round" else grey).clamp(0, 255).to(torch.uint8)


def save_grid(path: Path, images: Tensor) -> None:
    """Writes images (N, 3, H, W) uint8 as one PNG, eight in a row."""
    from torchvision.utils import make_grid  # 90 MB that no loader process needs

    canvas = make_grid(images, nrow=8, padding=0, pad_value=255)
    with atomic_path(path) as partial:
        Image.fromarray(canvas.permute(1, 2, 0).numpy()).save(partial, "PNG")
