"""Pixels as stored (uint8, 0 to 255) and as networks take them (float in [-1, 1]); the embedded classes."""

import torch
from torch import Tensor

CLASS_NAMES = ("fish", "house", "tree", "mushroom", "sailboat", "flower", "cat", "car", "umbrella", "rocket")


def to_unit_range(images: Tensor) -> Tensor:
    """Pixels to the networks' range: uint8 (…) in 0 … 255 to float32 in [-1, 1].

    Raises:
        ValueError: images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"pixels have dtype {images.dtype}: give uint8 values from 0 to 255")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Network output about in [-1, 1] to pixels: clamped, rounded, uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
