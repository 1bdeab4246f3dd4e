"""What a pickle would run is named and not run, in every format and protocol; what is plain is read."""

import argparse
import collections
import io
import logging
import os
import pickle
import sys
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from repae_lite.utils.pickles import read_pickle


class Wants:
    """Calls a function when it is unpickled the ordinary way."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(content, path, kind, protocol):
    if kind == "bare":
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_what_it_wants_to_run_is_named_and_not_run(tmp_path, kind, protocol):
    victim, path = tmp_path / "victim", tmp_path / "weights.pt"
    for function, argument, name in (
        (os.mkdir, str(victim), r"(posix|nt|os)\.mkdir"),
        (eval, f"__import__('os').mkdir({str(victim)!r})", r"(builtins|__builtin__)\.eval"),
        (torch.hub.load, "somebody/else", r"torch\.hub\.load"),
        (collections.namedtuple, "a", r"collections\.namedtuple"),
    ):
        saved({"model": Wants(function, argument), "tensor": torch.zeros(2)}, path, kind, protocol)
        with (
            pytest.raises(ValueError, match=rf"wants to run {name} when it is read: refused") as refusal,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")  # a sentence, and nothing else
            read_pickle(path)
        assert len(str(refusal.value).splitlines()) == 1 and not victim.exists()


def test_plain_content_is_read_whoever_wrote_it(tmp_path):
    content = {
        "args": argparse.Namespace(model="SiT-XL/2", seed=0),
        "model": collections.OrderedDict(
            a=torch.ones(2), b=torch.zeros(1, dtype=torch.bfloat16), c=torch.nn.Parameter(torch.ones(3))
        ),
        "steps": 7,
    }
    for kind in ("zip", "legacy"):
        saved(content, tmp_path / "run.pt", kind, 2)
        back = read_pickle(tmp_path / "run.pt")
        assert back["args"] == content["args"] and back["steps"] == 7
        assert all(torch.equal(back["model"][name], tensor) for name, tensor in content["model"].items())


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_plain_content_in_a_protocol_that_is_not_read_is_not_accused(tmp_path, kind):
    saved({"model": {"a": torch.ones(2)}}, tmp_path / "run.pt", kind, 4)
    try:
        assert torch.equal(read_pickle(tmp_path / "run.pt")["model"]["a"], torch.ones(2))
    except ValueError as refusal:
        assert "is a pickle of protocol 4" in str(refusal)


def test_damaged_files_are_one_sentence(tmp_path):
    path = tmp_path / "w.pt"
    stream = io.BytesIO()
    torch.save({"a": torch.ones(100)}, stream)
    for content in (
        b"",
        b"hello",
        b"\x80\x02X",
        b"\x80\x05\x8e" + b"\xff" * 8,
        stream.getvalue()[:300],
        os.urandom(1000),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.pt is not a whole file of torch\.save"):
            read_pickle(path)


def test_an_enormous_pickle_is_refused_without_being_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"0" * (1 << 27))
    with pytest.raises(ValueError, match="is not a whole file"):
        read_pickle(tmp_path / "bomb.pt")


class Options(dict):
    """Stands for a class of OmegaConf or Lightning."""

    def __reduce__(self):
        return type(self), (), {"a": 1}


def test_what_lies_beside_the_weights_is_left_aside_and_not_built(tmp_path, caplog):
    Options.__module__, Options.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = Options
    sys.modules |= {"omegaconf": types.ModuleType("omegaconf"), "omegaconf.dictconfig": module}
    try:
        content = {
            "state_dict": {"a": torch.ones(2)},
            "hyper_parameters": Options(),
            "callbacks": {Options: {}},
        }
        content |= {"counts": collections.defaultdict(int), "where": Path("/x")}
        torch.save(content, tmp_path / "run.ckpt")
    finally:
        del sys.modules["omegaconf"], sys.modules["omegaconf.dictconfig"]
    with caplog.at_level(logging.INFO):
        back = read_pickle(tmp_path / "run.ckpt")
    assert torch.equal(back["state_dict"]["a"], torch.ones(2))
    assert "omegaconf" in caplog.text and "left aside" in caplog.text


def test_nesting_without_end_is_refused(tmp_path):
    path, endless = tmp_path / "w.pt", []
    endless.append(endless)
    deep = b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 100_000 + b"a" * 99_999 + b"s."
    torch.save({"a": endless}, path)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"w\.pt holds values that lie in each other more than"):
            read_pickle(path)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in (("version", b"3"), ("data.pkl", deep), ("byteorder", b"little")):
                archive.writestr(f"archive/{name}", data)


def test_an_archive_that_unpacks_to_much_more_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 28))
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match=r"bomb\.pt is not a whole file .*unpack to"):
        read_pickle(tmp_path / "bomb.pt")


def test_numbers_that_changed_since_are_told(tmp_path, caplog):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.arange(1000.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.find(torch.arange(1000.0).numpy().tobytes()) + 100] ^= 255
    path.write_bytes(data)
    read_pickle(path)
    assert "w.pt: the checksum of" in caplog.text


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_what_was_saved_on_a_gpu_comes_to_the_cpu(tmp_path, monkeypatch, kind, device):
    with monkeypatch.context() as patched:  # this machine need not have one
        patched.setattr(torch.serialization, "location_tag", lambda _: device)
        saved({"a": torch.ones(2)}, tmp_path / "w.pt", kind, 2)
    assert device.encode() in (tmp_path / "w.pt").read_bytes()
    tensor = read_pickle(tmp_path / "w.pt")["a"]
    assert tensor.device.type == "cpu" and torch.equal(tensor, torch.ones(2))
