"""Projectors: from SiT's features at the tap to the tokens of a vision encoder, for the alignment loss.

Taught in `notebooks/03_repa.ipynb`. After training they are not needed any more.
"""

import math

from torch import Tensor, nn

from repae_lite.networks.layers import Linear


class MLPProjector(nn.Sequential):
    """REPA's (arXiv 2410.06940): three linear layers with SiLU between, (B, N, in_dim) to (B, N, out_dim)."""

    def __init__(self, in_dim: int, width: int, out_dim: int):
        super().__init__(
            Linear(in_dim, width), nn.SiLU(), Linear(width, width), nn.SiLU(), Linear(width, out_dim)
        )


class ConvProjector(nn.Conv2d):
    """iREPA's (arXiv 2512.10794): a 3×3 convolution on the grid of tokens, (B, N, in_dim) to (B, N, out_dim).

    It has no hidden layer: `width` is there because `MLPProjector` has one.
    """

    def __init__(self, in_dim: int, width: int, out_dim: int):
        super().__init__(in_dim, out_dim, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        side = math.isqrt(h.shape[1])
        return super().forward(h.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


PROJECTORS = {"mlp": MLPProjector, "conv": ConvProjector}
