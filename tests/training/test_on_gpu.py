"""What training does on a GPU. Each test runs on a CPU as well, in the same way as far as that goes."""

import pytest
import torch
from reference_models import assert_golden_steps, golden_state
from small_runs import run, weights
from torch.testing import assert_close
from waiting import no_waiting

from repae_lite.method import interpolant
from repae_lite.method.steps import Draws, TrainState, all_updates, as_floats, make_optimizer
from repae_lite.networks import sit
from repae_lite.training import build
from repae_lite.training import trainer as training
from repae_lite.training.parallel import ParallelMechanics, draw
from repae_lite.utils.devices import conv_layout

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on_device(state: TrainState, device: torch.device) -> TrainState:
    """A state as `build` makes it there: layout, optimisers, mechanics."""
    modules = (state.vae, state.sit, state.ema, state.discriminator, state.perceptual)
    for module in modules:
        module.to(device)
    for module in (state.vae, state.discriminator, state.perceptual):
        module.to(memory_format=conv_layout(device))
    state.optimizers = {name: make_optimizer(getattr(state, name)) for name in state.optimizers}
    state.mechanics = ParallelMechanics(device, "no", state.optimizers)
    return state


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_golden_steps_as_the_trainer_takes_them(device, variant):
    device = torch.device(device)

    def step(state, x, labels, target, **draws):
        draws = Draws(**{name: drawn.to(device) for name, drawn in draws.items()})
        return as_floats(all_updates(state, x.to(device), labels.to(device), [target.to(device)], draws)[0])

    # Float32 of another kind of device: rounding of the same size, but not the same.
    factor = 1.0 if device.type == "cpu" else 10.0
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_golden_steps(on_device(golden_state(variant), device), variant, step, factor=factor)


@pytest.mark.parametrize("device", DEVICES)
def test_shares_of_the_draws_make_the_whole(device):
    given = {"path": "linear", "weighting": "lognormal", "label_dropout": 0.5, "device": device}
    whole, again, *shares = (
        vars(draw(3, 7, 6, (2, 4, 4), **given, share=share))
        for share in (slice(None), slice(None), slice(0, 2), slice(2, 6))
    )
    for name, drawn in whole.items():
        assert drawn.device.type == device and torch.equal(drawn, again[name])
        assert torch.equal(drawn, torch.cat([share[name] for share in shares]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path, device):
    here = {"cpu": device == "cpu", "mixed_precision": "no"}
    straight = run(tmp_path, "straight", **here)
    run(tmp_path, "parts", max_train_steps=2, **here)
    parts = run(tmp_path, "parts", resume="latest", **here)
    exact = 0.0 if device == "cpu" else 1e-3  # a GPU adds in whatever order
    for one, other in zip(straight.metrics(), parts.metrics(), strict=True):
        assert one == pytest.approx(other, rel=exact, abs=exact / 10)
    first, second = weights(straight), weights(parts)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert_close(tensor, second[name], rtol=10 * exact, atol=exact, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "no"},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16"},
        {"mixed_precision": "no", "command": "ldm", "vae_ckpt": "tiny"},
    ],
)
def test_the_steps_of_a_run_wait_for_nothing(tmp_path, monkeypatch, device, options):
    if device == "cpu":  # as on a GPU
        monkeypatch.setattr(build, "fused_optimizer", lambda _: True)
        for module in (interpolant, sit):
            monkeypatch.setattr(module, "can_look_at", lambda _: False)
    step, noted, watched = training.Trainer._step, training.Trainer._noted, []

    def call(self, batch):
        if not self.state.step:  # a first step may set something up
            return step(self, batch)
        with no_waiting(self.device):
            watched.append(step(self, batch))
        return watched[-1]

    def note(self, *losses):
        """The guard is told a step later; on a CPU that reads, without waiting for anything."""
        if self.device.type == "cuda" and self.state.step == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return noted(self, *losses)
        finally:
            if self.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training.Trainer, "_step", call)
    monkeypatch.setattr(training.Trainer, "_noted", note)
    options |= {"max_train_steps": 3, "logging_steps": 100, "checkpointing_steps": 100}
    run(tmp_path, cpu=device == "cpu", **options)
    assert len(watched) == 2 and all(loss.isfinite() for losses in watched for loss in losses.values())
