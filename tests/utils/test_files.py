"""Files are whole or not there; weights load completely or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from repae_lite.checkpoints.models import load_latent_stats, load_vae, save_vae
from repae_lite.commands.main import main
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.files import atomic_path, data_small_dir, read_json
from repae_lite.utils.locks import check_writable
from repae_lite.utils.state_dicts import load_weights, read_weights, save_weights


def test_a_failed_write_changes_nothing(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic_path(path) as partial:
        partial.write_text("first")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as partial:
        partial.write_text("seco")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_weights_round_trip_with_metadata(tmp_path):
    module = nn.BatchNorm1d(3)
    module.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    save_weights(tmp_path / "w.safetensors", module, {"config": {"a": [1, 2]}})
    other = load_weights(tmp_path / "w.safetensors", nn.BatchNorm1d(3))
    assert torch.equal(other.running_mean, module.running_mean) and not other.training
    assert read_weights(tmp_path / "w.safetensors")[1] == {"config": {"a": [1, 2]}}


def test_weights_that_do_not_fit_are_refused_whole(tmp_path):
    save_weights(tmp_path / "w.safetensors", nn.Linear(2, 3))
    target = nn.Linear(2, 4)
    before = target.weight.clone()
    with pytest.raises(
        ValueError, match=r"does not fit Linear: bias \[3\] instead of \[4\]; weight .*\(2 in all\)"
    ):
        load_weights(tmp_path / "w.safetensors", target)
    assert torch.equal(before, target.weight)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="do not exist: check the path"):
        read_weights(tmp_path / "none.safetensors")
    (tmp_path / "foreign.safetensors").write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read_weights(tmp_path / "foreign.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds no VAE: it lacks encoder\.conv_in\.weight"):
        load_vae(tmp_path / "other.safetensors")


def test_vae_round_trip(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset("tiny", latent_channels=6).eval()
    stats = LatentStats(-torch.arange(1.0, 7.0), torch.arange(1.0, 7.0))
    save_vae(tmp_path / "vae.safetensors", vae, stats)
    again = load_vae(tmp_path / "vae.safetensors")
    assert again.config == vae.config
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(again.decode(again.encode(x).mode()), vae.decode(vae.encode(x).mode()))
    stats = load_latent_stats(tmp_path / "vae.safetensors")
    assert stats.std.tolist() == [1, 2, 3, 4, 5, 6] and stats.mean.tolist() == [-1, -2, -3, -4, -5, -6]


def test_data_folder_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REPAE_DATA_SMALL", str(tmp_path))
    assert data_small_dir() == tmp_path
    monkeypatch.setenv("REPAE_DATA_SMALL", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="set REPAE_DATA_SMALL"):
        data_small_dir()
    assert main(["check"]) == 0  # and tells the rest
    printed = capsys.readouterr().out
    assert f"the embedded data folder {tmp_path / 'gone'} does not exist" in printed
    assert "CPU cores" in printed


def test_check_command_sees_the_embedded_data(capsys):
    assert main(["check"]) == 0
    printed = capsys.readouterr().out
    assert "embedded train split: 6000 images, 10 classes" in printed
    assert "embedded vae:" in printed


def test_equal_weights_make_equal_files(tmp_path):
    """In processes with other hash seeds, too: the order of the metadata is not left to chance."""
    script = (
        "import sys, torch; from repae_lite.utils.state_dicts import save_weights; torch.manual_seed(0); "
        "save_weights(sys.argv[1], torch.nn.Linear(3, 2), {key: [key, 'ü'] for key in 'ghijklmnop'})"
    )
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file in files:
        subprocess.run([sys.executable, "-c", script, str(file)], check=True)
    assert len({file.read_bytes() for file in files}) == 1
    state, metadata = read_weights(files[0])
    assert {name: list(tensor.shape) for name, tensor in state.items()} == {"weight": [2, 3], "bias": [2]}
    assert metadata == {key: [key, "ü"] for key in "ghijklmnop"}


def test_json_is_an_object_whose_names_are_said_once(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, {"b": null}]}', encoding="utf-8-sig")  # as some editors begin a file
    assert read_json(path) == {"a": [1, {"b": None}]}
    for content, message in (
        (b'{"a": {"b": 1, "b": 1}}', "'b' is set twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
        (b"[]", "holds a list"),
        (b"", "is not JSON"),
        ("{}".encode("utf-16"), "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as refusal:
            read_json(path)
        assert str(path) in str(refusal.value)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(content=st.text(alphabet='{}[]":,0123456789.eE-+truefalsn\\', max_size=30) | st.binary(max_size=40))
def test_any_bytes_are_a_json_object_or_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        assert isinstance(read_json(path), dict)
    except ValueError as error:
        assert str(path) in str(error)


def test_a_disk_that_removes_nothing_can_be_written(tmp_path, monkeypatch, caplog):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    check_writable(tmp_path)
    assert "cannot be removed (Operation not permitted)" in caplog.text
