"""A step's images and draws depend on the seed and the step alone, and processes share them out."""

import copy

import pytest
import torch
from pretended_mps import pretended_mps
from small_states import LABELS, make_batch, make_state
from torch import nn
from torch.utils._pytree import tree_leaves
from waiting import no_waiting

from repae_lite.method import interpolant
from repae_lite.method.interpolant import sample_time
from repae_lite.method.steps import Draws, Mechanics, TrainState, all_updates
from repae_lite.networks import sit
from repae_lite.training.parallel import ParallelMechanics, StepBatches, draw, share_of
from repae_lite.utils.processes import StopFlag, mean_over_processes
from repae_lite.utils.seeding import generator

ALL = slice(0, 4)
DRAW = {"path": "linear", "weighting": "uniform", "label_dropout": 0.5}


def batches(steps: range, share: slice = ALL, count: int = 10, seed: int = 0) -> list[list[int]]:
    return list(StepBatches(count, batch=4, share=share, seed=seed, steps=steps))


def test_every_epoch_is_a_new_permutation_without_its_rest():
    found = batches(range(6))
    epochs = [found[i] + found[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 and set(epoch) <= set(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches(range(2), seed=1) != found[:2]
    assert len(StepBatches(10, batch=4, share=ALL, seed=0, steps=range(3, 9))) == 6


@pytest.mark.parametrize("start", range(6))
def test_it_can_start_at_any_step(start):
    assert batches(range(start, 6)) == batches(range(6))[start:]


def test_processes_share_a_batch():  # D9
    whole = batches(range(5))
    first, second = (batches(range(5), share_of(4, rank, 2)) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def test_batches_that_cannot_be_shared_or_filled_are_refused():
    with pytest.raises(ValueError, match="a batch of 4 images cannot be shared evenly by 3 processes"):
        share_of(4, 0, 3)
    with pytest.raises(ValueError, match="a step takes 4 images but the data has 3"):
        batches(range(1), count=3)


def test_draws_follow_from_seed_and_step():
    one, same = (draw(3, 7, 6, (2, 4, 4), **DRAW) for _ in range(2))
    others = draw(3, 8, 6, (2, 4, 4), **DRAW), draw(4, 7, 6, (2, 4, 4), **DRAW)
    assert {name: tuple(t.shape) for name, t in vars(one).items()} == {
        "eps_posterior": (6, 2, 4, 4), "t": (6,), "eps": (6, 2, 4, 4), "label_drop": (6,)
    }  # fmt: skip
    for name, tensor in vars(one).items():
        assert torch.equal(tensor, getattr(same, name))
        assert name == "label_drop" or not any(torch.equal(tensor, getattr(other, name)) for other in others)
    assert not torch.equal(one.eps, one.eps_posterior)
    late = draw(3, 7, 6, (2, 4, 4), path="cosine", weighting="lognormal", label_dropout=0.5)
    g = generator("draws", 3, 7)
    torch.randn(6, 2, 4, 4, generator=g)
    assert torch.equal(late.t, sample_time(6, weighting="lognormal", path="cosine", generator=g))
    before = torch.get_rng_state()
    draw(0, 0, 2, (1, 2, 2), **DRAW)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gpu_draws_the_numbers_of_its_images_alone(monkeypatch):
    with pretended_mps(monkeypatch):
        whole, *shares = (
            vars(draw(3, 7, 6, (2, 4, 4), **DRAW, share=share, device="mps"))
            for share in (slice(None), slice(0, 2), slice(2, 6))
        )
        others = [vars(draw(*key, 6, (2, 4, 4), **DRAW, device="mps")) for key in ((3, 8), (4, 7))]
        for name, tensor in whole.items():
            assert tensor.device.type == "mps"
            assert torch.equal(torch.cat([share[name] for share in shares]), tensor)
            if name != "label_drop":
                assert not any(torch.equal(tensor, other[name]) for other in others)
                assert len({tuple(image.flatten().tolist()) for image in tensor}) == 6
        assert not torch.equal(whole["eps"], whole["eps_posterior"])
        many = draw(0, 0, 300, (1, 4, 4), **DRAW, device="mps")
    assert abs(many.eps.mean()) < 0.06 and abs(many.eps.std() - 1) < 0.06
    assert abs(many.t.mean() - 0.5) < 0.06 and abs(many.label_drop.float().mean() - 0.5) < 0.12


def test_draws_have_the_right_distributions():
    drawn = draw(0, 0, 4000, (1, 2, 2), **DRAW)
    assert abs(drawn.eps.mean()) < 0.03 and abs(drawn.eps.std() - 1) < 0.03
    assert abs(drawn.t.mean() - 0.5) < 0.03 and abs(drawn.label_drop.float().mean() - 0.5) < 0.03


def test_keys_give_independent_generators():
    numbers = [
        torch.rand(1, generator=generator(*key)).item()
        for key in (("a", 1), ("a", 2), ("b", 1), ("a", 12), ("a", 1, 2))
    ]
    assert len(set(numbers)) == 5


def test_one_process_is_enough():
    x = torch.tensor([1.0, 2.0])
    assert torch.equal(mean_over_processes(x.clone()), x)
    stop = StopFlag(x.device)
    assert [stop.after_step(asked) for asked in (False, True)] == [False, True] and stop.up


# ---------------------------------------------------------------- updates


def layer_and_optimizer():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    return layer, torch.optim.SGD(layer.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", ["plain", "parallel", "parallel, not strict"])
def test_an_update_clips_and_says_the_norm(kind):
    layer, optimizer = layer_and_optimizer()
    strict = {"strict": kind == "parallel"}
    mechanics = (
        Mechanics()
        if kind == "plain"
        else ParallelMechanics(torch.device("cpu"), "no", {"layer": optimizer}, **strict)
    )
    before = layer.weight.detach().clone()
    mechanics.backward(100 * layer(torch.ones(1, 3)).sum(), optimizer)
    norm = mechanics.update(layer, optimizer, 1.0)
    assert norm == pytest.approx(100 * 8**0.5, rel=1e-4)
    assert float((layer.weight.detach() - before).norm()) == pytest.approx(0.1 * (6 / 8) ** 0.5, rel=1e-3)
    assert kind == "plain" or mechanics.scales() == mechanics.state_dict() == {}


@pytest.mark.parametrize("strict", [True, False])
def test_a_gradient_that_is_not_finite_changes_no_weight(strict):
    layer, optimizer = layer_and_optimizer()
    mechanics = ParallelMechanics(torch.device("cpu"), "bf16", {"layer": optimizer}, strict=strict)
    before = layer.weight.detach().clone()
    mechanics.backward(float("inf") * layer(torch.ones(1, 3)).sum(), optimizer)
    if strict:
        with pytest.raises(FloatingPointError, match=r"gradient norm of Linear is (inf|nan)"):
            mechanics.update(layer, optimizer, 1.0)
    else:
        assert not mechanics.update(layer, optimizer, 1.0).isfinite()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_fused_optimizer_leaves_the_update_out_by_itself(kind, strict):
    layer, _ = layer_and_optimizer()
    optimizer = kind(layer.parameters(), lr=0.1, fused=True)
    mechanics = ParallelMechanics(torch.device("cpu"), "no", {"layer": optimizer}, strict=strict)

    def update(factor: float) -> bool:
        """Whether it changed anything: a weight or the optimiser's state."""
        before = copy.deepcopy((layer.state_dict(), optimizer.state_dict()["state"]))
        optimizer.zero_grad()
        mechanics.backward(factor * layer(torch.ones(1, 3)).sum(), optimizer)
        assert mechanics.update(layer, optimizer, 1.0).isfinite() == (factor == 1)
        after = layer.state_dict(), optimizer.state_dict()["state"]
        pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
        return not all(torch.equal(one, other) for one, other in pairs if isinstance(one, torch.Tensor))

    assert update(1.0) and not update(float("inf")) and not update(float("nan"))
    assert update(1.0) != strict and mechanics.failed == (1.0 if strict else None)
    mechanics.load_state_dict({})  # as after a rollback
    assert update(1.0)


def fused_state(device: torch.device, **more) -> TrainState:
    state = make_state()
    for name in state.optimizers:
        network = getattr(state, name).to(device)
        trained = [p for p in network.parameters() if p.requires_grad]
        state.optimizers[name] = torch.optim.AdamW(trained, fused=True)
    state.ema.to(device), state.perceptual.to(device)
    more = {"precision": "no"} | more
    state.mechanics = ParallelMechanics(device, optimizers=state.optimizers, **more)
    return state


def whole_step(state: TrainState) -> dict[str, torch.Tensor]:
    device, (x, targets, draws) = state.mechanics.device, make_batch()
    draws = Draws(**draws, label_drop=LABELS == 3).map(lambda drawn: drawn.to(device))
    targets, x, labels = [target.to(device) for target in targets], x.to(device), LABELS.to(device)
    with no_waiting(device):
        return all_updates(state, x, labels, targets, draws)[0]


WAYS = [{}, {"micro_batches": 2, "gradient_checkpointing": True}, {"precision": "fp16"}]


@pytest.mark.parametrize("more", WAYS)
def test_a_step_with_fused_optimizers_waits_for_nothing(monkeypatch, more):
    for module in (interpolant, sit):  # as they do on a GPU
        monkeypatch.setattr(module, "can_look_at", lambda _: False)
    state = fused_state(torch.device("cpu"), **more)
    with no_waiting(torch.device("cpu")), pytest.raises(AssertionError):
        bool(torch.ones(2).isfinite().all())
    before = copy.deepcopy(state)
    whole_step(state)
    for name in state.optimizers if more.get("precision") != "fp16" else ():  # whose first scale is too large
        old, new = (getattr(each, name).state_dict().values() for each in (before, state))
        assert not all(torch.equal(a, b) for a, b in zip(old, new, strict=True)), name


@pytest.mark.gpu
@pytest.mark.parametrize("more", [*WAYS, {"precision": "bf16"}])
def test_a_step_on_a_gpu_waits_for_nothing(more):
    state = fused_state(torch.device("cuda"), **more)
    whole_step(state), whole_step(state)
    assert state.step == 2


def test_fp16_has_a_loss_scale_for_each_optimizer():
    (layer, optimizer), (other, second) = layer_and_optimizer(), layer_and_optimizer()
    mechanics = ParallelMechanics(torch.device("cpu"), "fp16", {"a": optimizer, "b": second})
    mechanics.backward(other(torch.ones(1, 3)).sum(), second)
    assert mechanics.update(other, second, 10.0) == pytest.approx(8**0.5, rel=1e-4)  # unscaled again
    before = layer.weight.detach().clone()
    mechanics.backward(float("inf") * layer(torch.ones(1, 3)).sum(), optimizer)
    mechanics.update(layer, optimizer, 1.0)
    assert torch.equal(layer.weight, before)
    assert mechanics.scales() == {"a": 2.0**15, "b": 2.0**16}
    again = ParallelMechanics(torch.device("cpu"), "fp16", {"a": optimizer, "b": second})
    again.load_state_dict(mechanics.state_dict(), 0.5)
    assert again.scales() == {"a": 2.0**14, "b": 2.0**15}
