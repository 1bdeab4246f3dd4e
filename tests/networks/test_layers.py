"""BatchNorm over the whole batch, in parts and over processes; activations recomputed instead of kept."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from batch_norm_halves import normalise_half, pair
from small_states import LABELS, make_batch, make_state
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from repae_lite.method.losses import VAELossConfig
from repae_lite.method.steps import Mechanics, latent_step, repae_step
from repae_lite.networks import layers
from repae_lite.networks.layers import BatchNorm2d, Linear, recompute, set_gradient_checkpointing
from repae_lite.networks.vae import AutoencoderKL, ResidualBlock


@pytest.mark.parametrize("affine", [False, True])
def test_on_one_process_it_is_pytorchs_to_the_bit(affine):
    ours, theirs, x = pair(affine)
    for mode in (True, True, False):
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_parts_of_a_batch_are_normalised_by_the_whole_and_tracked_once():
    ours, theirs, x = pair(affine=False)
    expected = theirs(x)
    with ours.whole_batch(x):
        parts = [ours(part) for part in x.split(3)]
    assert_close(torch.cat(parts), expected)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(a, b, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_taken_in_float32(dtype):
    ours, theirs, x = pair(affine=False)
    x = x.to(dtype)
    theirs(x.float())
    with ours.whole_batch(x):
        ours(x[:4])
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(a, b, msg=name)


def test_a_batch_that_failed_is_not_tracked():
    ours, _, x = pair(affine=False)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError), ours.whole_batch(x):
        raise RuntimeError
    assert all(torch.equal(a, before[name]) for name, a in ours.state_dict().items())
    assert_close(
        ours(x[:2]).mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5
    )  # by its own statistics again


def test_two_processes_normalise_as_one(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(normalise_half, (str(tmp_path / "rendezvous"), results), nprocs=2)
        first, second = results[0], results[1]
    _, theirs, x = pair(affine=True)
    x.requires_grad_()
    y = theirs(x)
    (y.square() * y).sum().backward()
    assert_close(torch.cat([first[0], second[0]]), y.detach())
    assert_close(torch.cat([first[1], second[1]]), x.grad, rtol=1e-4, atol=1e-5)
    for half in (first, second):
        assert_close(half[2], theirs.running_mean)
        assert_close(half[3], theirs.running_var)
        assert half[4] == 1
    x = x.detach()[:, :, :2].bfloat16()
    expected = theirs(x.float())
    assert first[5].dtype == torch.bfloat16
    assert_close(torch.cat([first[5], second[5]]).float(), expected.detach(), rtol=0.01, atol=0.01)
    assert_close(first[6], theirs.running_mean)


@pytest.mark.parametrize("shape", [(4, 16, 24), (4, 24), (24,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_a_linear_layer_by_convolution_is_the_linear_layer(monkeypatch, shape, bias, half):
    layer, x = Linear(24, 40, bias=bias), torch.randn(shape, requires_grad=True)
    results = []
    for by_convolution in (False, True):
        monkeypatch.setattr(layers, "faster_by_convolution", lambda _, by=by_convolution: by)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = layer(x)
        assert out.shape == (*shape[:-1], 40) and out.dtype == (torch.bfloat16 if half else torch.float32)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])])
    made = results[1][0].grad_fn.next_functions[0][0].name()
    assert made == "PermuteBackward0"  # it was a convolution
    for one, other in zip(*results, strict=True):
        assert_close(one, other, **({"rtol": 0.05, "atol": 0.1} if half else {"rtol": 1e-4, "atol": 1e-4}))
    layer.by_convolution = False
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_recomputing_gives_the_same_gradients_and_moves_statistics_once():
    torch.manual_seed(0)
    kept = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 3))
    redone, x = copy.deepcopy(kept), torch.randn(4, 3, 8, 8)
    kept(x).square().mean().backward()
    recompute(redone, x).square().mean().backward()
    for a, b in zip(kept.parameters(), redone.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for (name, a), b in zip(kept.state_dict().items(), redone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def three_steps(mechanics: Mechanics, *, checkpointing: bool, gan_weight: float):
    state = make_state(vae_loss=VAELossConfig(gan_weight=gan_weight))
    state.mechanics = mechanics
    set_gradient_checkpointing(checkpointing, state.vae, state.sit)
    x, targets, draws = make_batch()
    drop = torch.tensor([False, True, False, False])
    losses = [repae_step(state, x, LABELS, targets, **draws, label_drop=drop) for _ in range(2)]
    z = 2 * draws["eps_posterior"] + 1
    losses.append(latent_step(state, z, LABELS, targets, t=draws["t"], eps=draws["eps"], label_drop=drop))
    return losses, {
        name: module.state_dict()
        for name, module in (("vae", state.vae), ("sit", state.sit), ("d", state.discriminator))
    }


def test_gradient_checkpointing_changes_nothing():
    losses, weights = three_steps(Mechanics(), checkpointing=False, gan_weight=0.1)
    same, same_weights = three_steps(
        Mechanics(gradient_checkpointing=True), checkpointing=True, gan_weight=0.1
    )
    assert losses == same
    for name, state in weights.items():
        for key, a in state.items():
            assert torch.equal(a, same_weights[name][key]), (name, key)


class Kept(dict):
    """The tensors that autograd keeps, by address."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.setdefault(tensor.data_ptr(), tensor)


@pytest.mark.parametrize("half", [False, True])
def test_the_norms_of_a_vae_can_be_recomputed_alone(half):
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        vae, x = AutoencoderKL.from_preset("tiny"), torch.rand(2, 3, 32, 32)
        blocks = [module for module in vae.modules() if isinstance(module, ResidualBlock)]
        set_gradient_checkpointing(again, *blocks)
        kept = Kept()
        with torch.autocast("cpu", torch.bfloat16, enabled=half), saved_tensors_hooks(kept, lambda t: t):
            loss = vae.decode(vae.encode(x).mean).square().mean()
        loss.backward()
        found.append((sum(t.nbytes for t in kept.values()), [p.grad for p in vae.parameters()]))
    (before, expected), (after, gradients) = found
    assert after < 0.85 * before
    assert all(torch.equal(one, other) for one, other in zip(expected, gradients, strict=True))


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_micro_batches_give_the_step_of_the_whole_batch(parts):
    losses, weights = three_steps(Mechanics(), checkpointing=False, gan_weight=0.0)
    cut, cut_weights = three_steps(Mechanics(micro_batches=parts), checkpointing=False, gan_weight=0.0)
    for whole, mine in zip(losses, cut, strict=True):
        assert mine == pytest.approx(whole, rel=2e-3, abs=1e-5)
    for key, a in weights["sit"].items():
        if key.startswith("bn."):
            assert_close(cut_weights["sit"][key], a, rtol=1e-4, atol=1e-5)


def test_first_step_in_micro_batches_has_the_gradients_of_the_whole_batch():
    gradients = []
    for parts in (1, 4):
        state = make_state(vae_loss=VAELossConfig(gan_weight=0.0))
        state.mechanics = Mechanics(micro_batches=parts)
        x, targets, draws = make_batch()
        repae_step(state, x, LABELS, targets, **draws, label_drop=torch.zeros(4, dtype=torch.bool))
        gradients.append(
            [p.grad for module in (state.vae, state.sit) for p in module.parameters() if p.grad is not None]
        )
    for a, b in zip(*gradients, strict=True):  # after clipping
        assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_micro_batches_cover_the_batch_evenly():
    assert Mechanics(micro_batches=3).chunks(7) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert Mechanics(micro_batches=9).chunks(2) == [slice(0, 1), slice(1, 2)]


def test_micro_batches_below_one_are_refused():
    with pytest.raises(ValueError, match="micro_batches is 0"):
        Mechanics(micro_batches=0)
