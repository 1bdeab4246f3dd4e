"""A run's folder: checkpoints whole or not there, metrics to the byte, every refusal a sentence."""

import argparse
import errno
import json
import os
import pickle

import pytest
import torch
from torch import nn

from repae_lite.networks.latent_stats import LatentStats
from repae_lite.training import run_folder
from repae_lite.training.run_folder import (
    RunFolder,
    fill,
    fill_optimizer,
    find_checkpoint,
    named_state,
    newest,
    read_checkpoint,
)

STATS = LatentStats(torch.zeros(4), torch.ones(4))


class OfficialLoss(nn.Module):
    """What the official optimiser of the discriminator holds, in its order: a number of its own, then its
    modules' parameters.
    """

    def __init__(self, discriminator: nn.Module):
        super().__init__()
        self.discriminator = discriminator
        self.perceptual_loss = nn.ParameterList([torch.ones(1)] * 31).requires_grad_(False)
        self.logvar = nn.Parameter(torch.ones(()), requires_grad=False)


class Net(nn.Module):
    """Two layers, a buffer, and a parameter that does not train."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        self.first, self.bn, self.second = nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 1)

    def forward(self, x):
        return self.second(self.bn(self.first(x)))


def trained(width: int = 3, steps: int = 2):
    torch.manual_seed(0)
    net = Net(width)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 2)).square().mean().backward()
        optimizer.step()
    return net, optimizer


def save(folder: RunFolder, step: int, kind: str = "safetensors", steps: int = 2):
    net, optimizer = trained(steps=steps)
    groups = {"discriminator": {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}}
    extras = {"args": {"model": "x"}, "groups": groups, "data": "abc"}
    folder.save(step, {"discriminator": net}, {"discriminator": optimizer}, STATS, extras, kind=kind)
    return net, optimizer


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", ["safetensors", "official", "both"])
def test_a_checkpoint_comes_back(folder, kind):
    net, optimizer = save(folder, 5, kind)
    names = {"safetensors": ["0000005"], "official": ["0000005.pt"], "both": ["0000005", "0000005.pt"]}[kind]
    assert sorted(os.listdir(folder.checkpoints_path)) == names
    found = read_checkpoint(folder.checkpoints()[5])
    assert found.step == 5 and found.extras["data"] == "abc"
    other, second = trained(steps=0)
    fill({"discriminator": other}, found)
    fill_optimizer(second, other, found.optimizers["discriminator"], found.path)
    for (name, a), b in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, state in named_state(optimizer, net).items():
        for key, value in state.items():
            assert torch.equal(value, named_state(second, other)[name][key]), (name, key)
    assert other.training


def test_the_official_file_has_the_official_layout(folder):
    net, optimizer = save(folder, 5, "official")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(folder.checkpoints()[5], weights_only=True)
    assert content["steps"] == 5 and content["args"] == argparse.Namespace(model="x")
    everything = torch.optim.AdamW(
        OfficialLoss(net).parameters()
    )  # the official optimiser holds frozen parameters too
    everything.load_state_dict(content["opt_disc"])
    assert torch.equal(
        everything.state[net.second.weight]["exp_avg"], optimizer.state[net.second.weight]["exp_avg"]
    )
    assert net.fixed not in everything.state


def test_an_official_file_is_read_with_its_wrappers_and_frozen_states(folder, tmp_path):
    net, _ = trained()
    everything = torch.optim.AdamW(OfficialLoss(net).parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    everything.step()
    state = {f"module._orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}
    path = tmp_path / "0000009.pt"
    torch.save(
        {
            "discriminator": state,
            "opt_disc": everything.state_dict(),
            "steps": 9,
            "args": argparse.Namespace(),
        },
        path,
    )
    found = read_checkpoint(path)
    assert found.step == 9 and found.extras == {}
    other, optimizer = trained(steps=0)
    fill({"discriminator": other}, found)
    fill_optimizer(optimizer, other, found.optimizers["discriminator"], path)
    assert torch.equal(
        optimizer.state[other.first.bias]["exp_avg"], everything.state[net.first.bias]["exp_avg"]
    )
    assert torch.equal(other.first.weight, net.first.weight)


def test_only_whole_checkpoints_count_and_leftovers_go(folder):
    save(folder, 5)
    for name in (".0000007.partial", "0000009.txt", "notes"):
        (folder.checkpoints_path / name).mkdir()
    (folder.checkpoints_path / ".0000008.pt.12.partial").write_bytes(b"half")
    assert list(folder.checkpoints()) == [5]
    folder.remove_leftovers()
    assert sorted(os.listdir(folder.checkpoints_path)) == ["0000005", "0000009.txt", "notes"]


@pytest.mark.parametrize("kind", ["safetensors", "official"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("unexpected pos 704 vs 598")])
def test_a_full_disk_leaves_the_last_checkpoint(folder, monkeypatch, kind, error):
    save(folder, 5, kind)
    monkeypatch.setattr(run_folder.torch, "save", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(
        OSError, match=r"of step 6 .*No space left.* needs about .* GB; the one of step 5 is whole"
    ):
        save(folder, 6, kind)
    monkeypatch.undo()
    assert list(folder.checkpoints()) == [5] and read_checkpoint(folder.checkpoints()[5]).step == 5
    assert not list(folder.checkpoints_path.glob(".*"))


@pytest.mark.parametrize(
    ("keep_last", "milestone_steps", "left"),
    [(None, 0, [10, 20, 30, 33]), (2, 0, [30, 33]), (1, 20, [20, 33]), (9, 0, [10, 13, 20, 30, 33])],
)
def test_pruning(folder, keep_last, milestone_steps, left):
    for step in (10, 13, 20, 30, 33):  # 13 and 33 after signals
        save(folder, step)
    folder.prune(keep_last=keep_last, milestone_steps=milestone_steps, checkpointing_steps=10)
    assert list(folder.checkpoints()) == left


def test_finding_a_checkpoint(folder, tmp_path):
    assert find_checkpoint("latest", folder) is None
    save(folder, 5)
    save(folder, 10)
    assert find_checkpoint("latest", folder).name == find_checkpoint("10", folder).name == "0000010"
    assert find_checkpoint(str(folder.path), RunFolder(tmp_path / "new")).name == "0000010"
    assert find_checkpoint(str(folder.checkpoints()[5]), RunFolder(tmp_path / "new")).name == "0000005"
    with pytest.raises(ValueError, match="no checkpoint of step 7: it has 5, 10"):
        find_checkpoint("7", folder)
    with pytest.raises(ValueError, match="step 10, later than 5"):
        find_checkpoint("5", folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        find_checkpoint(str(tmp_path / "nowhere"), folder)
    assert newest([0, 5, 10], before=10) == 5 and newest([5], before=5) is None


def test_another_architecture_is_named_with_three_mismatches(folder):
    save(folder, 5)
    wide, _ = trained(width=7, steps=0)
    before = wide.first.weight.clone()
    with pytest.raises(
        ValueError, match=r"does not fit Net: bn.bias \[3\] instead of \[7\]; .*; .* \(\d in all\)"
    ):
        fill({"discriminator": wide}, read_checkpoint(folder.checkpoints()[5]))
    assert torch.equal(wide.first.weight, before)
    with pytest.raises(ValueError, match="has no sit: it is of another kind of training"):
        fill({"sit": wide}, read_checkpoint(folder.checkpoints()[5]))


def test_optimiser_states_that_do_not_fit_are_refused():
    net, optimizer = trained()
    states = named_state(optimizer, net)
    other, second = trained(steps=0)
    with pytest.raises(ValueError, match=r"no optimiser state of first.bias"):
        fill_optimizer(second, other, {k: v for k, v in states.items() if k != "first.bias"}, None)
    wide, third = trained(width=7, steps=0)
    with pytest.raises(ValueError, match=r"another shape for first.weight: \[3, 2\] instead of \[7, 2\]"):
        fill_optimizer(third, wide, states, None)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_nothing_that_could_run_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "0000001.pt"
    torch.save({"steps": 1, "x": Evil()}, path)
    with pytest.raises(ValueError, match=r"wants to run \w+\.system when it is read: refused"):
        read_checkpoint(path)
    for content in (b"", b"no zip", pickle.dumps({"steps": 1})[:-3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a whole file of torch\.save"):
            read_checkpoint(path)
    for protocol in range(6):  # the newer ones give a name in another way
        path.write_bytes(pickle.dumps({"steps": 1, "x": Evil()}, protocol))
        with pytest.raises(ValueError, match=r"wants to run \w+\.system when it is read: refused"):
            read_checkpoint(path)
    torch.save({"steps": 1}, path, pickle_protocol=4)
    with pytest.raises(
        ValueError, match="is a pickle of protocol 4, which PyTorch's reader of weights refuses"
    ):
        read_checkpoint(path)
    assert not (tmp_path / "evil").exists()
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="it has no steps"):
        read_checkpoint(path)


# ---------------------------------------------------------------- metrics, rollback


def test_metrics_come_back_to_the_bit(folder):
    numbers = [0.1, 1 / 3, 1e-45, 123456789.123456789]
    for step, number in enumerate(numbers, start=1):
        folder.log({"step": step, "x": number})
    folder.log({"step": 5, "x": float("nan"), "y": float("inf")})
    assert [record["x"] for record in folder.metrics()] == [*numbers, None]
    assert "NaN" not in folder.metrics_path.read_text()


@pytest.mark.parametrize("tail", ["", '{"step": 4, "x"', '{"step": 4, "x": 1.0}', "garbage\n", "[1]\n"])
def test_metrics_are_cut_after_a_step_and_where_a_line_is_torn(folder, tail):
    for step in (1, 2, 3):
        folder.log({"step": step})
    whole = folder.metrics_path.read_bytes()
    with open(folder.metrics_path, "a") as file:
        file.write(tail)
    folder.cut_metrics(3)
    assert folder.metrics_path.read_bytes() == whole
    folder.cut_metrics(1)
    assert [record["step"] for record in folder.metrics()] == [1]


def test_rolling_back_keeps_what_it_takes_away(folder):
    for step in (2, 4, 6):
        save(folder, step)
        folder.log({"step": step})
    folder.roll_back(2)
    assert list(folder.checkpoints()) == [2] and [record["step"] for record in folder.metrics()] == [2]
    assert sorted(os.listdir(folder.path / "divergence" / "evidence")) == ["0000004", "0000006"]
    report = folder.report(6, {"finding": "x", "history": [{"norm": float("inf")}]})
    assert json.loads(report.read_text()) == {"finding": "x", "history": [{"norm": None}]}
