"""What a pickle would run is named and not run, in every format and protocol; what is plain is read."""

import argparse
import collections
import io
import os
import pickle
import warnings
import zipfile

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
