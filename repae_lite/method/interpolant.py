"""Interpolants between data and noise: the only place that says what time means.

REPA-E section 3 and SiT (arXiv 2401.08740) section 2; taught in `notebooks/02_latent_diffusion.ipynb`.

**t = 0 is clean data, t = 1 is pure noise.** An interpolant mixes both, `z_t = alpha(t) z + sigma(t) eps`,
and a velocity model predicts its time derivative, `v = alpha'(t) z + sigma'(t) eps`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from repae_lite.networks.layers import can_look_at
from repae_lite.networks.sit import check_times


@dataclass(frozen=True)
class Interpolant:
    """A path from data to noise; every field is a function of a tensor, element by element.

    Attributes:
        alpha: share of the data at times t.
        sigma: share of the noise.
        d_alpha: derivative of alpha.
        d_sigma: derivative of sigma.
        time_at: the times at which sigma / alpha has given values.
    """

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]
    time_at: Callable[[Tensor], Tensor]


_HALF_PI = math.pi / 2

WEIGHTINGS = ("uniform", "lognormal")
INTERPOLANTS = {
    "linear": Interpolant(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_sigma=torch.ones_like,
        time_at=lambda ratio: ratio / (1 + ratio),
    ),
    "cosine": Interpolant(
        alpha=lambda t: torch.cos(_HALF_PI * t),
        sigma=lambda t: torch.sin(_HALF_PI * t),
        d_alpha=lambda t: -_HALF_PI * torch.sin(_HALF_PI * t),
        d_sigma=lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
        time_at=lambda ratio: torch.atan(ratio) / _HALF_PI,
    ),
}


def get_interpolant(path: str | Interpolant) -> Interpolant:
    """Looks an interpolant up by name ("linear" or "cosine"); an `Interpolant` is returned as it is.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(path, Interpolant):
        return path
    if path not in INTERPOLANTS:
        raise ValueError(f"unknown path {path!r}: choose one of {', '.join(INTERPOLANTS)}")
    return INTERPOLANTS[path]


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """Reshapes times (B,) to (B, 1, …, 1) so that they multiply a tensor (B, …)."""
    return t.reshape(t.shape[0], *([1] * (like.ndim - 1)))


def interpolate(
    z: Tensor, eps: Tensor, t: Tensor, path: str | Interpolant = "linear"
) -> tuple[Tensor, Tensor]:
    """Noises latents and gives the velocity a model should predict there.

    Args:
        z: clean latents (B, …), normalised to about zero mean and unit variance.
        eps: standard normal noise, shaped like z.
        t: times (B,) in [0, 1].
        path: "linear" or "cosine".

    Returns:
        (z_t, v), both shaped like z.

    Raises:
        ValueError: noise of another shape or latents of another dtype, which would broadcast or be rounded;
            times that are not one per latent, or (seen on a CPU) outside [0, 1].
    """
    if eps.shape != z.shape or not z.is_floating_point():
        raise ValueError(
            f"noise of shape {tuple(eps.shape)} for latents {tuple(z.shape)} of {z.dtype}: give float "
            "latents and noise like them"
        )
    check_times(t, len(z))
    path, t = get_interpolant(path), expand_time(t, z)
    # Times stay float32 when z is half precision: only the factors are rounded.
    alpha, sigma, d_alpha, d_sigma = (
        f(t).to(z.dtype) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
    )
    return alpha * z + sigma * eps, d_alpha * z + d_sigma * eps


def score_from_velocity(v: Tensor, z_t: Tensor, t: Tensor, path: str | Interpolant = "linear") -> Tensor:
    """The score, grad log p_t(z_t) = -eps / sigma, solved from z_t and v (SiT eq. 9), for 0 < t <= 1.

    Two equations, `z_t = alpha z + sigma eps` and `v = alpha' z + sigma' eps`, in two unknowns: eliminating z
    gives eps.

    Raises:
        ValueError: shapes differ, or (seen on a CPU) a time at which there is no score.
    """
    check_times(t, len(z_t))
    if v.shape != z_t.shape or (can_look_at(t) and not bool((t > 0).all())):
        raise ValueError(
            f"velocities {tuple(v.shape)} at z_t {tuple(z_t.shape)} and times from {float(t.min()):.4g} on: "
            "give one shape, and times above 0, where there is a score"
        )
    path, t = get_interpolant(path), expand_time(t, z_t)
    ratio = path.alpha(t) / path.d_alpha(t)
    return (ratio * v - z_t) / (path.sigma(t) ** 2 - ratio * path.d_sigma(t) * path.sigma(t))


def sample_time(
    batch: int,
    *,
    weighting: str = "uniform",
    path: str | Interpolant = "linear",
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws training times (B,) in [0, 1].

    "uniform" draws t evenly. "lognormal" draws s = exp(N(0, 1)), EDM's noise-to-signal ratio, and takes the t
    at which sigma / alpha = s.

    Raises:
        ValueError: the weighting or the path is unknown, or the batch is empty.
    """
    if batch < 1:
        raise ValueError(f"a batch of {batch} has no times: give at least 1")
    if weighting == "uniform":
        return torch.rand(batch, device=device, generator=generator)
    if weighting != "lognormal":
        raise ValueError(f"unknown time weighting {weighting!r}: choose uniform or lognormal")
    return get_interpolant(path).time_at(torch.randn(batch, device=device, generator=generator).exp())
