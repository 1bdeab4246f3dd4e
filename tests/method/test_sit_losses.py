"""SiT's losses: labels are dropped, latents normalised, and all that needs gradients runs in one call."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from repae_lite.method.losses import sit_losses
from repae_lite.networks.sit import SiT

Z, LABELS, TARGETS = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 16, 128)
DRAWS = {"t": torch.tensor([0.2, 0.7]), "eps": torch.randn(2, 4, 8, 8)}


@pytest.fixture()
def sit():
    torch.manual_seed(0)
    model = SiT.from_preset("tiny", depth=3)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model.eval()


def labels_seen(sit: SiT, labels: torch.Tensor, **options) -> torch.Tensor:
    """The labels that reach the network."""
    seen = []
    handle = sit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    with torch.no_grad():
        sit_losses(sit, torch.zeros(len(labels), 4, 8, 8), labels, align_only=True, **options)
    handle.remove()
    return seen[0]


def test_label_dropout_only_in_training(sit):
    labels = torch.arange(1000) % 10
    assert torch.equal(labels_seen(sit, labels), labels)
    torch.manual_seed(0)
    dropped = labels_seen(sit.train(), labels) == sit.null_class
    assert 0.06 < float(dropped.float().mean()) < 0.14  # 0.1 +- 4 standard errors
    assert labels_seen(sit, torch.tensor([3, 4]), label_drop=torch.tensor([True, False])).tolist() == [10, 4]


def test_wrong_input_leaves_batchnorm_alone(sit):
    before = sit.train().bn.running_mean.clone()
    for wrong, message in (
        ({"z": torch.randn(2, 4, 16, 16) + 50}, r"this SiT takes \(B, 4, 8, 8\)"),
        ({"targets": TARGETS[:, :9]}, r"targets\[0\] have shape \(2, 9, 128\)"),
        ({"t": torch.rand(3)}, "3 times and noise"),
        ({"path": "vp"}, "unknown path 'vp'"),
    ):
        with pytest.raises(ValueError, match=message):
            sit_losses(sit, **{"z": Z + 50, "labels": LABELS, "targets": TARGETS, **DRAWS} | wrong)
    assert torch.equal(before, sit.bn.running_mean)


def test_runs_on_the_meta_device():
    with torch.device("meta"):
        model = SiT.from_preset("tiny")
        labels = torch.zeros(2, dtype=torch.int64)
        out = sit_losses(model, torch.zeros(2, 4, 8, 8), labels, torch.zeros(2, 16, 128))
    assert out.v_hat.shape == (2, 4, 8, 8) and out.align_loss.shape == ()


@pytest.mark.parametrize("drop", [torch.tensor([True]), torch.tensor([0.0, 1.0])])
def test_dropped_labels_are_one_bool_each(sit, drop):
    before = sit.train().bn.running_mean.clone()
    with pytest.raises(ValueError, match="give one bool for each of 2 labels"):
        sit_losses(sit, Z, LABELS, TARGETS, **DRAWS, label_drop=drop)
    with pytest.raises(ValueError, match=r"times reach from 0\.5 to 7"):
        sit_losses(sit, Z, LABELS, TARGETS, t=torch.tensor([0.5, 7.0]))
    assert torch.equal(sit.bn.running_mean, before)


def test_align_only_stops_at_the_tap_and_agrees(sit):
    full = sit_losses(sit, Z, LABELS, TARGETS, **DRAWS)
    calls = []
    sit.blocks[2].register_forward_hook(lambda *_: calls.append(1))  # the first after the tap
    short = sit_losses(sit, Z, LABELS, TARGETS, **DRAWS, align_only=True)
    assert short.v_hat is None and short.denoising_loss is None and not calls
    assert_close(short.align_loss, full.align_loss)
    assert_close(full.v_hat, sit(full.z_t, DRAWS["t"], LABELS))


def test_without_targets_the_projectors_do_not_run(sit):
    sit.projectors[0].register_forward_hook(lambda *_: pytest.fail("projected for nothing"))
    out = sit_losses(sit, Z, LABELS, **DRAWS)
    assert out.align_loss is None and out.projected == [] and out.v_hat is not None


def test_wrapped_for_several_processes_it_has_the_same_losses_and_gradients(sit, tmp_path):
    """DistributedDataParallel sees only what goes through one call of the module."""
    plain = copy.deepcopy(sit).train()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(sit.train())
        found = []
        for model in (plain, wrapped):
            for _ in range(2):  # the second call fails if the first left a parameter out
                out = sit_losses(model, Z, LABELS, TARGETS, **DRAWS, label_drop=torch.tensor([True, False]))
                (out.denoising_loss.mean() + 0.5 * out.align_loss).backward()
            found.append(out.denoising_loss.detach())
    finally:
        dist.destroy_process_group()
    assert torch.equal(*found) and torch.equal(plain.bn.running_mean, sit.bn.running_mean)
    for mine, theirs in zip(plain.parameters(), sit.parameters(), strict=True):
        if mine.requires_grad:
            assert_close(mine.grad, theirs.grad)
