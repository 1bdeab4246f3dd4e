"""Statistics over seeds: how far numbers spread, and whether two methods differ by more than that."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor


class Spread(NamedTuple):
    """Mean, sample standard deviation (NaN for one value) and number of values."""

    mean: float
    std: float
    n: int

    def __str__(self) -> str:
        spread = "" if self.n == 1 else f" ± {self.std:.2g}"
        return f"{self.mean:.3g}{spread} (n = {self.n})"


def seed_spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation (n - 1) and n of one number measured over several seeds."""
    values = _vector(values, "values", at_least=1)
    return Spread(values.mean().item(), values.std().item() if len(values) > 1 else math.nan, len(values))


class Difference(NamedTuple):
    """Mean difference a - b with its confidence interval; `excludes_zero` is False for "inside the noise"."""

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
    """Confidence interval of mean(a) - mean(b) by Student's t: may one call it a difference?

    Args:
        a: One value per seed, at least two.
        b: The same for the other arm; in the same order of seeds if paired.
        level: Coverage of the interval, in (0, 1).
        paired: True if entry i of both shares its seed (start, images, noise): t on the differences, n - 1
            degrees of freedom. False: Welch's t with unequal variances (Welch 1947).
    """
    a, b = _vector(a, "a", at_least=2), _vector(b, "b", at_least=2)
    if not 0 < level < 1:
        raise ValueError(f"level is the interval's coverage in (0, 1), got {level}: use 0.95.")
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
    values = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(values) < at_least or not values.isfinite().all():
        raise ValueError(f"{name} needs {at_least} or more finite values, got {values.tolist()}.")
    return values
