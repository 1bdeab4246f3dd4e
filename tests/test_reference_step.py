"""The plain step that the benchmark compares with: it is the official one, and each of its ways changes only
rounding."""

from collections import Counter

import pytest
import torch
from reference_models import assert_golden_steps, golden_state
from small_states import LABELS, make_batch, make_state

from repae_lite.method.steps import Draws, TrainState, repae_step
from repae_lite.networks import layers


@pytest.fixture
def reference(benchmark_script):
    return benchmark_script("reference_step")


@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_the_reference_takes_the_golden_steps(reference, variant):
    state = golden_state(variant)
    step = reference.ReferenceStep(state)
    assert_golden_steps(
        state, variant, lambda _, x, labels, target, **d: step(x, labels, [target], Draws(**d))
    )


def two_steps(step, state: TrainState) -> list[dict[str, float]]:
    x, targets, draws = make_batch()
    drops = {"label_drop": torch.tensor([False, True, False, False])}
    found = [step(state, x, LABELS, targets, **draws, **drops) for _ in range(2)]
    assert state.step == 2
    return found


ONE_BY_ONE = (
    "per_image_alignment contiguous ema_by_parameter host_reads float32_losses loss_calls final_layer "
    "plain_linear memory_given_back"
)


@pytest.mark.parametrize("ways", ["", *ONE_BY_ONE.split(), ONE_BY_ONE])
def test_every_way_gives_the_losses_and_weights_of_our_step(reference, ways):
    assert reference.WAYS == tuple(ONE_BY_ONE.split())
    ours, state = make_state(), make_state()
    step = reference.ReferenceStep(state, reference.Official.only(*ways.split()))
    expected = two_steps(repae_step, ours)
    found = two_steps(lambda _, x, labels, targets, **d: step(x, labels, targets, Draws(**d)), state)
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=2e-4, abs=2e-5), name
    for name in ("vae", "sit", "ema", "discriminator"):
        for one, other in zip(
            getattr(ours, name).parameters(), getattr(state, name).parameters(), strict=True
        ):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=5e-4)  # Adam: where a gradient is noise
    trains = {name for name, p in ours.sit.named_parameters() if p.requires_grad}
    assert {name for name, p in state.sit.named_parameters() if p.requires_grad} == trains


ELSEWHERE = ("ema_by_parameter", "float32_losses", "memory_given_back")  # no number of calls shows them


def calls_of(reference, way: str, monkeypatch) -> dict[str, int]:
    """How often a step calls what the ways are about, and how many of its convolutions are contiguous."""
    state, seen = make_state(), []
    step = reference.ReferenceStep(state, reference.Official.only(*way.split()))

    def counted(owner: object, name: str):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: seen.append(name) or function(*args, **kw))

    state.discriminator.register_forward_hook(lambda *_: seen.append("discriminator"))
    state.sit.final_layer.register_forward_hook(lambda *_: seen.append("final_layer"))
    state.vae.encoder.conv_in.register_forward_hook(
        lambda conv, *_: seen.append("contiguous") if conv.weight.is_contiguous() else None
    )
    counted(torch.Tensor, "item")
    counted(reference.F, "normalize")
    counted(reference.F, "linear")
    monkeypatch.setattr(layers, "faster_by_convolution", lambda _: True)
    x, targets, draws = make_batch()
    step(x, LABELS, targets, Draws(**draws))
    monkeypatch.undo()
    return dict(Counter(seen))


def test_ways_change_what_is_computed(reference, monkeypatch):
    ways = ("", *filter(lambda way: way not in ELSEWHERE, reference.WAYS))
    counts = {way: calls_of(reference, way, monkeypatch) for way in ways}
    linear = [module for module in make_state().sit.modules() if isinstance(module, layers.Linear)]
    assert len(linear) < counts["plain_linear"].pop("linear") < 2 * len(linear)  # one pass ends at the tap
    plain = counts[""]  # on a CPU, Adam reads its step counts, too
    assert plain | {"item": 0} == {"discriminator": 2, "final_layer": 1, "item": 0, "normalize": 2 * 2 * 2}
    assert counts == {
        "": plain,
        "loss_calls": plain | {"discriminator": 3},
        "final_layer": plain | {"final_layer": 2},
        "host_reads": plain | {"item": plain["item"] + 16},
        "contiguous": plain | {"contiguous": 1},
        "per_image_alignment": plain | {"normalize": 4 * plain["normalize"]},
        "plain_linear": plain,
    }


@pytest.mark.parametrize("float32", [True, False])
def test_the_loss_networks_stay_out_of_autocast_or_not(reference, float32):
    state, dtypes = make_state(), []
    state.perceptual.conv.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    state.discriminator.main[0].register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    names = ["float32_losses"] if float32 else []
    step = reference.ReferenceStep(state, reference.Official.only(*names), dtype=torch.bfloat16)
    x, targets, draws = make_batch()
    losses = step(x, LABELS, targets, Draws(**draws))
    assert set(dtypes) == {torch.float32 if float32 else torch.bfloat16} and len(dtypes) == 4
    plain = repae_step(make_state(), x, LABELS, targets, **draws)
    assert losses["vae_reg"] == pytest.approx(plain["vae_reg"], rel=0.05)
