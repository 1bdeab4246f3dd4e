"""Turning noise into latents by following the learnt velocity from t = 1 to t = 0.

Deterministic samplers solve the probability-flow ODE dz = v dt; the stochastic one solves the reverse SDE
with diffusion 2t (SiT, arXiv 2401.08740, section 2; official REPA-E samplers). Taught in
`notebooks/02_latent_diffusion.ipynb`. The state is kept in float64 (float32 on a device that has no wider
type: MPS), the network runs in its own dtype. The result is normalised: `sit.denormalize(sample)` is what the
VAE decodes.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from repae_lite.method.interpolant import Interpolant, get_interpolant, score_from_velocity
from repae_lite.networks.sit import SiT, SiTConfig, check_label_count
from repae_lite.utils.devices import widest_float


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance inside a time interval (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Attributes:
        scale: 1 is off; s means unconditional + s * (conditional - unconditional).
        low: guidance acts where low <= t <= high.
        high: see low.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 1 <= self.scale < float("inf"):
            wrong = "below 1" if self.scale < 1 else "not finite"
            raise ValueError(
                f"guidance scale {self.scale} is {wrong}: use 1 for none, more for stronger guidance"
            )
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"guidance interval [{self.low}, {self.high}] is not inside [0, 1] in order: set 0 <= low <= "
                "high <= 1"
            )

    def check(self, sit: SiTConfig) -> None:
        """Refuses guidance of a SiT that was trained without the null class.

        Raises:
            ValueError: see above.
        """
        if self.scale > 1 and not sit.label_dropout:
            raise ValueError(
                f"guidance scale {self.scale} needs the null class, which this SiT never saw (its "
                "label_dropout is 0): sample without guidance, or train with --cfg-prob 0.1"
            )

    def active(self, t: float) -> bool:
        """Whether guidance acts at time t."""
        return self.scale > 1 and self.low <= t <= self.high


@torch.no_grad()
def sample_ode(
    sit: SiT,
    eps: Tensor,
    labels: Tensor,
    *,
    steps: int = 50,
    solver: str = "euler",
    guidance: Guidance | None = None,
    path: str | Interpolant = "linear",
    watch: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """Solves the probability-flow ODE from noise to latents on evenly spaced times.

    Args:
        sit: velocity model; put it in eval mode.
        eps: initial noise (B, C, h, w).
        labels: classes (B,).
        steps: solver steps; Heun evaluates the model twice in each but the last.
        solver: "euler" or "heun".
        guidance: off when None. Heun decides by the time at which a step starts, for both of its evaluations.
        path: the path the model was trained on; the ODE itself does not need it, so it is only checked.
        watch: called after each step with the new time and state (B, C, h, w); what it raises ends it all.

    Returns:
        Normalised latents (B, C, h, w), in the device's widest type.

    Raises:
        ValueError: unknown solver or path, fewer than one step, or labels out of range.
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"unknown solver {solver!r}: choose euler or heun")
    get_interpolant(path)
    guidance = guidance or Guidance()
    _check(sit, eps, labels, steps, guidance, minimum=1)
    times = _times(0, steps + 1)
    z_t = eps.to(widest_float(eps.device))
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        guided = guidance.active(t)
        d = _guided(_velocities(sit, z_t, t, labels, guided), guidance.scale)
        z_next = z_t + (t_next - t) * d
        if solver == "heun" and i < steps - 1:
            d_next = _guided(_velocities(sit, z_next, t_next, labels, guided), guidance.scale)
            z_next = z_t + (t_next - t) * 0.5 * (d + d_next)
        z_t = z_next
        if watch is not None:
            watch(t_next, z_t)
    return z_t


@torch.no_grad()
def sample_sde(
    sit: SiT,
    eps: Tensor,
    labels: Tensor,
    *,
    steps: int = 250,
    guidance: Guidance | None = None,
    path: str | Interpolant = "linear",
    noise: Tensor | Iterable[Tensor] | None = None,
    generator: torch.Generator | None = None,
    last_time: float = 0.04,
    watch: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """Solves the reverse SDE by Euler-Maruyama: noisy steps down to `last_time`, then one without noise.

    The drift is v - t * score, the diffusion 2t. Guidance mixes conditional and unconditional *drifts*.

    Args:
        sit: velocity model; put it in eval mode.
        eps: initial noise (B, C, h, w).
        labels: classes (B,).
        steps: model evaluations, the last one included; at least 2.
        guidance: off when None.
        path: the path the model was trained on; it turns velocities into scores.
        noise: the steps' noise (steps - 1, B, C, h, w), float64 for full agreement, or an iterable of the
            steps' (B, C, h, w); drawn when None.
        generator: where it is drawn from, on its own device, in float64 where there is that; the global one
            of the device of eps when None.
        last_time: where the noise-free last step starts.
        watch: as in `sample_ode`.

    Returns:
        Normalised latents (B, C, h, w), in the device's widest type.

    Raises:
        ValueError: unknown path, fewer than two steps, or labels out of range.
    """
    path, guidance = get_interpolant(path), guidance or Guidance()
    _check(sit, eps, labels, steps, guidance, minimum=2)
    if not 0 < last_time < 1:
        raise ValueError(
            f"last_time {last_time} is not between 0 and 1: the score is undefined at 0, use the default 0.04"
        )
    if isinstance(noise, Tensor) and noise.shape != (steps - 1, *eps.shape):
        raise ValueError(
            f"step noise has shape {tuple(noise.shape)}: {steps} steps need {(steps - 1, *eps.shape)}"
        )
    noise = None if noise is None else iter(noise)
    times = [*_times(last_time, steps), 0.0]
    z_t = eps.to(widest_float(eps.device))
    source = generator.device if generator is not None else z_t.device
    for t, t_next in itertools.pairwise(times):
        times_now = torch.full((len(z_t),), t, dtype=z_t.dtype, device=z_t.device)
        velocities = _velocities(sit, z_t, t, labels, guidance.active(t))
        drifts = [v - t * score_from_velocity(v, z_t, times_now, path) for v in velocities]
        d = _guided(drifts, guidance.scale)
        mean = z_t + (t_next - t) * d
        if t_next > 0:
            if noise is None:
                draw = torch.randn(z_t.shape, dtype=widest_float(source), device=source, generator=generator)
            else:
                draw = next(noise)
            mean = mean + (2 * t * (t - t_next)) ** 0.5 * draw.to(z_t)
        z_t = mean
        if watch is not None:
            watch(t_next, z_t)
    return z_t


def _check(sit: SiT, eps: Tensor, labels: Tensor, steps: int, guidance: Guidance, minimum: int) -> None:
    check_label_count(labels, eps.shape[0], "sample")
    if steps < minimum:
        raise ValueError(f"{steps} sampling steps are too few: use at least {minimum}")
    sit.check_labels(labels)
    guidance.check(sit.config)


def _times(last: float, count: int) -> list[float]:
    """Evenly spaced times from 1 to the last."""
    return torch.linspace(1, last, count, dtype=torch.float64, device="cpu").tolist()


def _velocities(sit: SiT, z_t: Tensor, t: float, labels: Tensor, guided: bool) -> list[Tensor]:
    """Velocities like z_t: [conditional], or guided [conditional, unconditional] from a doubled batch."""
    wide = z_t.dtype
    if guided:
        z_t, labels = torch.cat([z_t, z_t]), torch.cat([labels, torch.full_like(labels, sit.null_class)])
    times = torch.full(
        (len(z_t),), t, device=z_t.device, dtype=torch.promote_types(sit.pos_embed.dtype, torch.float32)
    )
    v = sit(z_t.to(sit.pos_embed.dtype), times, labels).to(wide)
    return list(v.chunk(2)) if guided else [v]


def _guided(directions: list[Tensor], scale: float) -> Tensor:
    if len(directions) == 1:
        return directions[0]
    conditional, unconditional = directions
    return unconditional + scale * (conditional - unconditional)
