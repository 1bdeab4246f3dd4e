"""Statistics over seeds: how much a number varies, and whether two methods differ by more than that.

Taught in `notebooks/00_map.ipynb` and `01_vae.ipynb`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor


class Spread(NamedTuple):
    """One number over several seeds.

    Attributes:
        mean: Mean of the values.
        std: Sample standard deviation (n - 1); NaN for one value.
        n: Number of values.
    """

    mean: float
    std: float
    n: int

    def __str__(self) -> str:
        spread = "" if self.n == 1 else f" ± {self.std:.2g}"
        return f"{self.mean:.3g}{spread} (n = {self.n})"


def seed_spread(values: Sequence[float]) -> Spread:
    """The `Spread` of one number over seeds, at least one."""
    values = _vector(values, "values", at_least=1)
    return Spread(values.mean().item(), values.std().item() if len(values) > 1 else math.nan, len(values))


class Difference(NamedTuple):
    """A mean difference a - b with its confidence interval.

    Attributes:
        mean: mean(a) - mean(b).
        low: Lower end of the interval.
        high: Upper end of the interval.
        excludes_zero: True if 0 lies outside the interval: the difference is "outside the noise".
    """

    mean: float
    low: float
    high: float
    excludes_zero: bool

    def __str__(self) -> str:
        verdict = "outside the noise" if self.excludes_zero else "inside the noise"
        return f"{self.mean:+.3g} [{self.low:+.3g}, {self.high:+.3g}]: {verdict}"


def difference_interval(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, *, paired: bool = False
) -> Difference:
    """Confidence interval of mean(a) - mean(b) by Student's t: is there a difference?

    Args:
        a: One value per seed, at least two.
        b: The same for the other arm; if paired, with the seeds in the same order.
        level: Coverage of the interval, in (0, 1).
        paired: True if entry i of both has the same seed (start, images, noise): t of the differences, with
            n - 1 degrees of freedom. False: Welch's t for unequal variances (Welch 1947).

    Raises:
        ValueError: There are too few values or one is not finite, the level is not in (0, 1), or the numbers
            of paired values differ.
    """
    a, b = _vector(a, "a", at_least=2), _vector(b, "b", at_least=2)
    if not 0 < level < 1:
        raise ValueError(f"level is the interval's coverage, in (0, 1), got {level}: use 0.95.")
    if paired and len(a) != len(b):
        raise ValueError(f"paired needs equally many seeds, got {len(a)} and {len(b)}: use paired=False.")
    mean = (a.mean() - b.mean()).item()
    if paired:
        variance, freedom = (a - b).var().item() / len(a), float(len(a) - 1)
    else:
        parts = [(x.var().item() / len(x), len(x) - 1) for x in (a, b)]
        variance = sum(v for v, _ in parts)
        freedom = variance**2 / sum(v**2 / f for v, f in parts) if variance > 0 else 1.0
    half = float(stdtrit(freedom, (1 + level) / 2)) * math.sqrt(variance)
    return Difference(mean, mean - half, mean + half, bool(abs(mean) > half))


def _vector(values: Sequence[float], name: str, *, at_least: int) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten()
    if len(values) < at_least or not values.isfinite().all():
        raise ValueError(f"{name} needs {at_least} or more finite values, got {values.tolist()}.")
    return values
