"""A run's folder: checkpoints whole or not there, metrics to the byte, every refusal a sentence."""

import argparse
import errno
import itertools
import json
import math
import os
import pickle
import re
import shutil
import stat
from collections import namedtuple
from pathlib import Path

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
    with_way_out,
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


def save(folder: RunFolder, step: int, kind: str = "safetensors", steps: int = 2, rollbacks: int = 0, **more):
    net, optimizer = trained(steps=steps)
    groups = {"discriminator": {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}}
    extras = {"args": {"model": "x"}, "groups": groups, "data": "abc", "rollbacks": rollbacks}
    folder.save(step, {"discriminator": net}, {"discriminator": optimizer}, STATS, extras, kind=kind, **more)
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
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (
            errno.ENOSPC,
            r"\(No space left.* needs about .* GB; the one of step 5 is whole; make room, then go on",
        ),
        (
            errno.EDQUOT,
            r"quota exceeded\): it needs about .* GB; the one of step 5 is whole; make room, then",
        ),
        (
            errno.EIO,
            r"\(Input/output error\): the one of step 5 is whole; once files can be written there again",
        ),
    ],
)
def test_a_disk_that_refuses_leaves_the_last_checkpoint(folder, monkeypatch, kind, number, words):
    save(folder, 5, kind)

    def full(_, file):
        file.write(b"half")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.torch, "save", full)
    with pytest.raises(OSError, match=f"of step 6 .*{words}.*--resume latest"):
        save(folder, 6, kind)
    monkeypatch.undo()
    assert list(folder.checkpoints()) == [5] and read_checkpoint(folder.checkpoints()[5]).step == 5
    assert not list(folder.checkpoints_path.glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is always full")
def test_the_cause_of_a_failed_write_is_known():
    with pytest.raises(OSError, match="No space left on device"):
        run_folder._save_pickle({"x": torch.zeros(300000)}, Path("/dev/full"))


@pytest.mark.parametrize("kind", ["safetensors", "official", "both"])
@pytest.mark.parametrize(
    ("keep_last", "milestone_steps", "left"),
    [(None, 0, [10, 20, 30, 33]), (2, 0, [30, 33]), (1, 20, [20, 33]), (9, 0, [10, 13, 20, 30, 33])],
)
def test_pruning(folder, kind, keep_last, milestone_steps, left):
    for step in (10, 13, 20, 30, 33):
        save(folder, step, kind, interim=step in (13, 33))  # after signals
    folder.prune(keep_last=keep_last, milestone_steps=milestone_steps)
    assert list(folder.checkpoints()) == left
    assert read_checkpoint(folder.checkpoints()[33]).step == 33


def test_what_cannot_be_removed_is_a_warning(folder, monkeypatch, caplog):
    for step in (1, 2, 3):
        save(folder, step)
    monkeypatch.setattr(os, "rename", refusing(os.rename, errno.EACCES, "0000001"))
    monkeypatch.setattr(os, "rmdir", refusing(os.rmdir, errno.ENOTEMPTY, ".0000002"))
    folder.prune(keep_last=1, milestone_steps=0)
    assert "0000001 cannot be removed (Permission denied)" in caplog.text
    assert "cannot be removed (Directory not empty)" in caplog.text
    assert list(folder.checkpoints()) == [1, 3]
    folder.remove_leftovers()
    save(folder, 2)  # what is left of the old one is not in the way
    assert list(folder.checkpoints()) == [1, 2, 3]
    monkeypatch.undo()
    folder.remove_leftovers()
    assert sorted(os.listdir(folder.checkpoints_path)) == ["0000001", "0000002", "0000003"]


def refusing(function, number: int, name: str):
    """A function of `os` that refuses paths whose last name begins so."""

    def call(path, *args, **kwargs):
        if Path(path).name.startswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return function(path, *args, **kwargs)

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM])
def test_a_disk_that_cannot_sync_folders_holds_checkpoints(folder, monkeypatch, number):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save(folder, 5, "both")
    assert read_checkpoint(folder.checkpoints()[5]).step == 5


def test_what_the_disk_lacks_is_said_before_the_first_step(folder, monkeypatch, caplog):
    save(folder, 5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9e9, 6e9, 3e9))
    folder.check_disk(2**30, planned=2, keep_last=None)
    assert not caplog.text
    folder.check_disk(2**30, planned=9, keep_last=None)
    assert "9 checkpoints are to come, of 1.1 GB each, and" in caplog.text
    folder.check_disk(2**30, planned=9, keep_last=2)  # two more beside the one that is there
    with pytest.raises(OSError, match=r"^--keep-last 4 needs 4\.3 GB more in .*, where 3\.0 GB are free"):
        folder.check_disk(2**30, planned=9, keep_last=4)
    with pytest.raises(OSError, match=r"^a checkpoint needs 4\.3 GB more"):
        folder.check_disk(2**32, planned=9, keep_last=None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))  # as some remote disks say
    folder.check_disk(2**32, planned=9, keep_last=None)
    assert os.listdir(folder.checkpoints_path) == ["0000005"]
    monkeypatch.setattr(
        os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "not permitted"))
    )
    with pytest.raises(OSError, match=r"cannot write in .*checkpoints \(not permitted\)"):
        folder.check_disk(1, planned=9, keep_last=None)
    assert os.listdir(folder.checkpoints_path) == ["0000005"]
    shutil.rmtree(folder.checkpoints_path)
    folder.checkpoints_path.symlink_to("nowhere")
    with pytest.raises(OSError, match="checkpoints is a link to nowhere, which does not exist"):
        folder.check_disk(1, planned=9, keep_last=None)


PIECES = {  # path in resume.pt -> values that are none
    ("step",): (None, -1, "5", 2.5, True),
    ("optimizers",): (None, [], {"discriminator": {"first.bias": 1}}, {3: {}}),
    ("extras",): (None, "x"),
    ("extras", "args"): (None, []),
    ("extras", "fixed"): ([],),
    ("extras", "rollbacks"): (-1, "x"),
    ("extras", "guard"): (None, {}, {"zero_since": [], "scales": {}, "falling": {}, "first_variance": None}),
    ("extras", "scalers"): (None, {"sit": {}}, {"sit": 3}),
}


@pytest.mark.parametrize(("where", "value"), [(k, v) for k, values in PIECES.items() for v in values])
def test_an_odd_piece_is_one_sentence_with_the_way_out(folder, where, value):
    save(folder, 5)
    save(folder, 10)
    file = folder.checkpoints()[10] / "resume.pt"
    content = torch.load(file, weights_only=True)
    place = content
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    torch.save(content, file)
    older = re.escape(str(folder.checkpoints()[5]))
    with (
        pytest.raises(
            ValueError, match=f"0000010.* is damaged: .*; {older} is whole: move .*0000010 away, then go on"
        ),
        with_way_out(folder.checkpoints()[10], own=True),
    ):
        read_checkpoint(folder.checkpoints()[10])


@pytest.mark.parametrize("key", ["steps", "opt_disc", "repae_lite"])
def test_odd_pieces_of_an_official_file_are_one_sentence(folder, key):
    save(folder, 5, "official")
    path = folder.checkpoints()[5]
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    for value in (None, "x", {"state": {"a": 1}}, {"state": {0: 3}}):
        if key == "repae_lite" and isinstance(value, dict):
            continue  # unknown extras are nothing to refuse
        torch.save(content | {key: value}, path)
        with pytest.raises(ValueError, match=f"{path.name}.* damaged.*; no earlier one in .* is whole"):
            with with_way_out(path, own=False):
                read_checkpoint(path)


def test_a_damaged_file_of_a_run_is_not_to_be_got_again(folder):
    save(folder, 5)
    save(folder, 10)
    newest_one = folder.checkpoints()[10]
    for name in ("discriminator.safetensors", "resume.pt"):
        (newest_one / name).write_bytes(b"half")
        with pytest.raises(
            ValueError, match=f"{name} is not a whole .*0000005 is whole: give --resume"
        ) as error:
            with with_way_out(newest_one, own=False):
                read_checkpoint(newest_one)
        assert "again" not in str(error.value)


def test_what_stands_in_the_place_of_a_checkpoint_is_set_aside(folder, caplog):
    places = [folder.checkpoints_path / name for name in ("0000005", "0000005.pt", ".mine.partial")]
    for place in places:
        place.mkdir(parents=True)
        (place / "notes.txt").write_text("mine")
    save(folder, 5, kind="both")
    folder.remove_leftovers()
    kept = sorted(path.parent.name for path in folder.checkpoints_path.glob("*/notes.txt"))
    assert kept == [".mine.partial", "0000005-1", "0000005-1.pt"] and "kept as 0000005-1" in caplog.text
    assert read_checkpoint(folder.checkpoints()[5]).step == 5 and places[1].is_file()


def test_the_way_out_names_the_fault_of_any_folder(tmp_path):
    path = tmp_path / "again" / "checkpoints" / "0000005"
    with pytest.raises(ValueError, match="another name; no earlier one"), with_way_out(path, own=True):
        raise ValueError(f"{path} is the checkpoint of step 4 under another name")


def test_a_part_of_a_checkpoint_is_not_one(folder, tmp_path):
    save(folder, 5)
    new = RunFolder(tmp_path / "new")
    assert find_checkpoint(str(folder.checkpoints_path), new) == folder.checkpoints()[5]
    for part in ("resume.pt", "discriminator.safetensors"):
        with pytest.raises(ValueError, match="only a part of a checkpoint: give its folder"):
            find_checkpoint(str(folder.checkpoints()[5] / part), new)


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


def test_moments_lie_in_memory_as_their_weights_do():
    def conv(layout):
        torch.manual_seed(0)
        net = nn.Conv2d(4, 6, 3).to(memory_format=layout)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        net(torch.ones(1, 4, 5, 5)).sum().backward()
        optimizer.step()
        return net, optimizer

    for layout, other in itertools.permutations((torch.channels_last, torch.contiguous_format)):
        (net, optimizer), (source, before) = conv(layout), conv(other)
        fill_optimizer(optimizer, net, named_state(before, source), None)
        moments, expected = optimizer.state[net.weight]["exp_avg"], before.state[source.weight]["exp_avg"]
        assert moments.stride() == net.weight.stride() != expected.stride() and torch.equal(moments, expected)
        optimizer.step()


def test_optimiser_states_that_do_not_fit_are_refused():
    net, optimizer = trained()
    states = named_state(optimizer, net)
    other, second = trained(steps=0)
    with pytest.raises(ValueError, match=r"no optimiser state of first.bias"):
        fill_optimizer(second, other, {k: v for k, v in states.items() if k != "first.bias"}, None)
    wide, third = trained(width=7, steps=0)
    with pytest.raises(ValueError, match=r"another shape for first.weight: \[3, 2\] instead of \[7, 2\]"):
        fill_optimizer(third, wide, states, None)
    good = states["first.bias"]
    for odd in ({}, {"step": "x"}, {"step": torch.tensor(math.nan)}, {"exp_avg": None}, {"exp_avg": 1.0}):
        wrong = good | odd if odd else {}
        with pytest.raises(ValueError, match=r"is damaged: its optimiser state .*of first\.bias"):
            fill_optimizer(second, other, states | {"first.bias": wrong}, None)
    assert not second.state_dict()["state"]


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


@pytest.mark.parametrize(
    "odd", [b"\0\0\0", b"[" * 100_000, b"\xff", b"[1]", b'{"step": "3"}', b'{"step": 99}', b""]
)
def test_an_odd_line_drops_nothing_after_it(folder, caplog, odd):
    lines = [b'{"step": 1}', odd, b'{"step": 2}', b'{"step": 3}']
    folder.path.mkdir()
    folder.metrics_path.write_bytes(
        b"\n".join(lines)
    )  # the last line without its end, as an editor leaves it
    folder.cut_metrics(2)
    assert folder.metrics_path.read_bytes() == b"\n".join([*lines[:3], b""])
    assert [record["step"] for record in folder.metrics() if record["step"] < 9] == [1, 2]
    folder.cut_metrics(2)
    assert folder.metrics_path.read_bytes() == b"\n".join([*lines[:3], b""])
    assert ("1 lines that are no measurements: they stay" in caplog.text) == (b"99" not in odd)
    assert not list(folder.path.glob("metrics-*"))


@pytest.mark.parametrize("text", ['{\n "step": 1\n}\n{\n "step": 2\n}', '{"step": 1}\n# a note\n'])
def test_lines_that_are_cut_off_unread_are_kept(folder, caplog, text):
    folder.path.mkdir()
    folder.metrics_path.write_text(text)
    folder.cut_metrics(2)
    assert (folder.path / "metrics-1.jsonl").read_text() == text and "kept as metrics-1.jsonl" in caplog.text
    folder.cut_metrics(2)
    assert not (folder.path / "metrics-2.jsonl").exists()


def test_a_full_disk_is_said_of_the_metrics_too(folder, monkeypatch):
    folder.log({"step": 1})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Quota exceeded")))
    with pytest.raises(
        OSError, match=r"cannot write .*metrics\.jsonl \(Quota exceeded\): make room, then go on"
    ):
        folder.sync_metrics()
    folder.metrics_path.unlink()
    folder.metrics_path.mkdir()
    with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl \(Is a directory\): once files can be"):
        folder.log({"step": 2})


def test_rolling_back_keeps_what_it_takes_away(folder):
    for step in (2, 4, 6):
        save(folder, step)
        folder.log({"step": step})
    folder.roll_back(2, 1)
    assert list(folder.checkpoints()) == [2] and [record["step"] for record in folder.metrics()] == [2]
    assert sorted(os.listdir(folder.path / "divergence" / "evidence")) == ["0000004", "0000006"]
    save(folder, 4)
    folder.roll_back(2, 2)
    assert sorted(os.listdir(folder.path / "divergence" / "evidence-1")) == ["0000004", "0000006"]
    assert os.listdir(folder.path / "divergence" / "evidence") == ["0000004"]
    report = folder.report(6, {"finding": "x", "history": [{"norm": float("inf")}]})
    assert json.loads(report.read_text()) == {"finding": "x", "history": [{"norm": None}]}


def test_a_rollback_that_is_killed_is_finished_by_the_next_start(folder, monkeypatch):
    for step in (2, 4, 6):
        save(folder, step)

    def killed(one, other, rename=os.rename):
        rename(one, other)
        if Path(one).name == "0000006":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.roll_back(2, 1)
    assert list(folder.checkpoints()) == [2, 4]  # the diverged ones go first that would be resumed first
    folder.finish_rollback()
    first = folder.checkpoints()[2]
    assert list(folder.checkpoints()) == [2] and folder.rollbacks_since(first) == 1
    assert sorted(os.listdir(folder.path / "divergence" / "evidence")) == ["0000004", "0000006"]
    noted = folder.rollback_path.read_bytes()
    save(folder, 4, rollbacks=1)
    assert not folder.rollback_path.exists() and folder.rollbacks_since(first) is None
    folder.rollback_path.write_bytes(noted)  # killed between the checkpoint and the note's end
    folder.finish_rollback()
    assert list(folder.checkpoints()) == [2, 4] and folder.rollbacks_since(folder.checkpoints()[4]) is None
