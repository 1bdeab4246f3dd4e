"""The collapse guard: notices that a run has gone wrong, how and since which step, before days are lost.

Users of half precision report gradient norms that sink to zero after 90,000 steps and NaN after 70,000; a
denoising loss let into the VAE empties the latents (REPA-E Table 10: spatial variance 17 to 0.02). Taught
in `notebooks/04_stop_gradient.ipynb`.
"""

import math
from collections import deque
from dataclasses import dataclass

HISTORY = 100  # steps that a report shows


@dataclass(frozen=True)
class Finding:
    """What went wrong, in a sentence, and the first step that shows it."""

    what: str
    since: int


class Guard:
    """Watches gradient norms, losses, loss scales and the variance of latents.

    Args:
        patience: steps that a gradient norm may stay at zero, except the discriminator's: once it wins, its
            hinge loss has no gradient.
        falls: times that a loss scale may fall without having risen in between.
        variance: smallest share of their first spatial variance that latents may keep; 0 for no limit.

    Attributes:
        history: the last steps, oldest first, for reports.
    """

    def __init__(self, *, patience: int = 50, falls: int = 10, variance: float = 0.05):
        self.patience, self.falls, self.variance = patience, falls, variance
        self.history: deque[dict] = deque(maxlen=HISTORY)
        self.zero_since: dict[str, int] = {}
        self.scales: dict[str, float] = {}
        self.falling: dict[str, list[int]] = {}  # steps at which a scale fell since it last rose
        self.first_variance: float | None = None

    def check(
        self,
        step: int,
        norms: dict[str, float],
        scales: dict[str, float],
        losses: dict[str, float] | None = None,
    ) -> Finding | None:
        """Takes note of a finished step and says what is wrong with the run, if anything is.

        Args:
            step: its number, from 1.
            norms: gradient norms before clipping, by network.
            scales: loss scales, by network; empty without fp16.
            losses: everything measured, on logged steps; with "latent_variance" where the VAE trains.
        """
        self.history.append(
            {"step": step, "grad_norm": norms, "loss_scale": scales, **({"losses": losses} if losses else {})}
        )
        checks = [self._zero(step, norms), self._falling(step, scales)]
        if losses is not None:
            checks += [self._not_finite(step, losses), self._collapsed(step, losses)]
        return next(filter(None, checks), None)

    def _zero(self, step: int, norms: dict[str, float]) -> Finding | None:
        for name, norm in norms.items():
            if norm != 0 or name == "discriminator":
                self.zero_since.pop(name, None)
                continue
            since = self.zero_since.setdefault(name, step)
            if step - since + 1 >= self.patience:
                what = f"the gradient norm of {name} has been 0 since step {since}: it no longer learns"
                return Finding(f"{what}; lower the learning rate, or use bf16", since)
        return None

    def _falling(self, step: int, scales: dict[str, float]) -> Finding | None:
        for name, scale in scales.items():
            before, self.scales[name] = self.scales.get(name, scale), scale
            falls = self.falling.setdefault(name, [])
            if scale > before:
                falls.clear()
            elif scale < before:
                falls.append(step)
            if len(falls) > self.falls:
                what = f"the loss scale of {name} has fallen {len(falls)} times since step {falls[0]}"
                return Finding(f"{what}, to {scale:g}: its fp16 gradients overflow; use bf16", falls[0])
        return None

    def _not_finite(self, step: int, losses: dict[str, float]) -> Finding | None:
        # Norms may be infinite with fp16, whose loss scale then falls; elsewhere the update refuses them.
        for name, value in losses.items():
            if not math.isfinite(value) and not name.startswith("grad_norm"):
                advice = "lower the learning rate, or use bf16 or float32"
                return Finding(f"the loss {name} is {value} at step {step}: {advice}", step)
        return None

    def _collapsed(self, step: int, losses: dict[str, float]) -> Finding | None:
        variance = losses.get("latent_variance")
        if variance is None or not self.variance:
            return None
        if self.first_variance is None:
            self.first_variance = variance
        if variance < self.variance * self.first_variance:
            return Finding(
                f"the spatial variance of the latents is {variance:.3g} at step {step}, from "
                f"{self.first_variance:.3g} at the start: they are collapsing; keep the velocity loss out of "
                "the VAE, or lower its learning rate",
                step,
            )
        return None

    def state_dict(self) -> dict:
        """What a resumed run needs to go on watching as if it had not stopped."""
        names = ("zero_since", "scales", "falling", "first_variance")
        return {
            name: value.copy() if isinstance(value := getattr(self, name), dict) else value for name in names
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a `state_dict`."""
        self.zero_since, self.scales = dict(state["zero_since"]), dict(state["scales"])
        self.falling = {name: list(steps) for name, steps in state["falling"].items()}
        self.first_variance = state["first_variance"]
        self.history.clear()
