"""From SiT's features to the tokens of a vision encoder: what stands between the two sides of the alignment
loss.

Taught in `notebooks/03_repa.ipynb`. Both are thrown away after training.
"""

import math

from torch import Tensor, nn


class MLPProjector(nn.Sequential):
    """REPA's: three linear layers with SiLU between, every token by itself, (B, N, in_dim) to (B, N, out_dim)
    (arXiv 2410.06940).
    """

    def __init__(self, in_dim: int, width: int, out_dim: int):
        super().__init__(
            nn.Linear(in_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, out_dim)
        )


class ConvProjector(nn.Conv2d):
    """iREPA's: one 3×3 convolution over the square grid of tokens, (B, N, in_dim) to (B, N, out_dim) (arXiv
    2512.10794).

    It has no hidden layer: `width` is there because `MLPProjector` has one.
    """

    def __init__(self, in_dim: int, width: int, out_dim: int):
        super().__init__(in_dim, out_dim, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        side = math.isqrt(h.shape[1])
        return super().forward(h.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


PROJECTORS = {"mlp": MLPProjector, "conv": ConvProjector}
