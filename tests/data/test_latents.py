"""Cached latents: the official layout, the same bytes however the run went, the statistics of all draws, and
every refusal.
"""

import errno
import io
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from damage import bytes_changed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from repae_lite.checkpoints.models import load_latent_stats, load_vae, save_vae
from repae_lite.commands.main import main
from repae_lite.data import journal, latents
from repae_lite.data.datasets import ImageFolderDataset, ImageH5Dataset
from repae_lite.data.hdf5 import add_bytes, labels_json, write_images_h5
from repae_lite.data.latents import CachedLatentsDataset, cache_latents, same_images, vae_fingerprint
from repae_lite.data.training_data import TrainingData
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.training.build import open_data
from repae_lite.training.config import TrainConfig
from repae_lite.utils.pixels import to_unit_range

COUNT, SIZE = 21, 8


def make_vae(seed=0, **changes):
    torch.manual_seed(seed)
    return AutoencoderKL.from_preset("tiny", width=8, groups=4, **changes).eval()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.h5"
    rng = np.random.default_rng(0)
    write_images_h5(path, rng.integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8), np.arange(COUNT) % 3)
    return path


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def cached(images, vae, tmp_path_factory):
    """An uninterrupted run."""
    path = tmp_path_factory.mktemp("cached") / "e2e.h5"
    stats = cache_latents(vae, ImageH5Dataset(images), path, batch_size=4, step=8)
    return path, stats


def interrupted(monkeypatch, vae, at):
    """The VAE is interrupted at its `at`-th batch."""
    calls = iter(range(1000))
    encode = AutoencoderKL.encode

    def stopping(self, x):
        if next(calls) == at:
            raise KeyboardInterrupt
        return encode(self, x)

    monkeypatch.setattr(AutoencoderKL, "encode", stopping)


def test_the_official_layout(cached, images, vae):
    path, _ = cached
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(COUNT)]
    assert json.loads((path.parent / "e2e_h5.json").read_text()) == names
    source = ImageH5Dataset(images)
    with h5py.File(path) as file, torch.no_grad():
        assert json.loads(file["dataset.json"][()]) == {
            "labels": [[name, i % 3] for i, name in enumerate(names)]
        }
        for i in (0, COUNT - 1):
            moments = np.load(io.BytesIO(file[names[i]][()]))
            posterior = vae.encode(to_unit_range(source[i][0][None]))
            assert moments.dtype == np.float32 and moments.shape == (8, 2, 2)
            np.testing.assert_allclose(
                moments, torch.cat([posterior.mean, posterior.std], 1)[0].numpy(), rtol=1e-5, atol=1e-6
            )
    assert sorted(entry.name for entry in path.parent.iterdir()) == [
        "e2e-latents-stats.pt",
        "e2e.h5",
        "e2e_h5.json",
    ]
    assert latents.latent_name(1281166) == "01281/img-mean-std-01281166.npy"


def test_the_dataset(cached, vae):
    dataset = CachedLatentsDataset(cached[0])
    assert len(dataset) == COUNT and dataset.num_classes == 3 and dataset.shape == (8, 2, 2)
    assert dataset.fingerprint == vae_fingerprint(vae)
    moments, label = dataset[5]
    assert (
        moments.dtype == torch.float32
        and moments.shape == (8, 2, 2)
        and label == 2
        and bool((moments[4:] > 0).all())
    )


def test_the_dataset_survives_spawned_workers(cached):
    dataset = CachedLatentsDataset(cached[0])
    dataset[0]  # the file is open here
    loader = DataLoader(dataset, 8, num_workers=1, multiprocessing_context="spawn")
    batches = [moments for moments, _ in loader]
    assert torch.equal(torch.cat(batches), torch.stack([dataset[i][0] for i in range(COUNT)]))


def test_statistics_are_those_of_the_draws(cached):
    path, stats = cached
    dataset = CachedLatentsDataset(path)
    mean, std = torch.stack([dataset[i][0] for i in range(COUNT)]).double().chunk(2, dim=1)
    torch.manual_seed(0)
    draws = mean + std * torch.randn(4000, *mean.shape, dtype=torch.float64)  # (draws, N, C, h, w)
    torch.testing.assert_close(stats.mean.double(), mean.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.std.double(), draws.std((0, 1, 3, 4)), rtol=0.01, atol=0)
    loaded = torch.load(path.with_name("e2e-latents-stats.pt"), weights_only=True)
    assert set(loaded) == {"latents_scale", "latents_bias"} and loaded["latents_scale"].shape == (1, 4, 1, 1)
    assert torch.equal(load_latent_stats(path.with_name("e2e-latents-stats.pt")).std, stats.std)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_an_interrupted_run_goes_on_and_ends_the_same(cached, images, vae, tmp_path, monkeypatch, at):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupted(patched, vae, at)
        cache_latents(vae, ImageH5Dataset(images), tmp_path / "e2e.h5", batch_size=4, step=8)
    assert not (tmp_path / "e2e.h5").exists()
    done = (
        json.loads((tmp_path / "e2e.h5.partial" / "journal.json").read_text())["state"]["done"]
        if at > 2
        else 0
    )
    assert done == {1: 0, 2: 0, 3: 8, 5: 16}[at]  # batch 0 is the trial; two batches are a step
    stats = cache_latents(vae, ImageH5Dataset(images), tmp_path / "e2e.h5", batch_size=4, step=8)
    assert (tmp_path / "e2e.h5").read_bytes() == cached[0].read_bytes()
    assert torch.equal(stats.mean, cached[1].mean) and torch.equal(stats.std, cached[1].std)
    assert not (tmp_path / "e2e.h5.partial").exists()


def test_a_run_interrupted_at_the_very_end_only_ends(cached, images, vae, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(journal, "write_names", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cache_latents(vae, ImageH5Dataset(images), tmp_path / "e2e.h5", batch_size=4, step=8)
    cache_latents(vae, ImageH5Dataset(images), tmp_path / "e2e.h5", batch_size=4, step=8)
    assert (tmp_path / "e2e.h5").read_bytes() == cached[0].read_bytes()


def test_files_of_the_official_code_are_read(cached, tmp_path):
    """They hold no fingerprint, and bytes may be stored as strings, whose trailing zeros HDF5 drops, or as
    arrays.
    """
    values = np.ones((2, 1, 2), np.float32)
    values[-1, -1, -1] = 0.0
    buffer = io.BytesIO()
    np.save(buffer, values)
    names = ["00000/img-mean-std-00000000.npy", "00000/img-mean-std-00000001.npy"]
    with h5py.File(tmp_path / "official.h5", "w") as file:
        add_bytes(file, names[0], buffer.getvalue())
        file.create_dataset(names[1], data=np.frombuffer(buffer.getvalue(), np.uint8))
        add_bytes(file, "dataset.json", labels_json([(name, 1) for name in names]))
    dataset = CachedLatentsDataset(tmp_path / "official.h5")
    assert dataset.fingerprint is None and dataset.shape == (2, 1, 2)
    for i in range(2):
        assert np.array_equal(dataset[i][0].numpy(), values)
    dataset.check_vae(make_vae(latent_channels=1))
    with pytest.raises(ValueError, match="1 latent channels instead of 4"):
        dataset.check_vae(make_vae())


def test_latents_of_another_vae_are_refused(cached, vae):
    dataset = CachedLatentsDataset(cached[0])
    dataset.check_vae(vae)
    with pytest.raises(ValueError, match=r"was cached by another VAE \(other weights\)"):
        dataset.check_vae(make_vae(1))


def test_damaged_latents_are_refused(cached, images, tmp_path):
    path = tmp_path / "e2e.h5"
    shutil.copy(cached[0], path)
    with h5py.File(path, "r+") as file:
        for name, values in (("1", np.zeros((8, 2, 2))), ("2", np.zeros((8, 4, 4), np.float32))):
            del file[f"00000/img-mean-std-0000000{name}.npy"]
            buffer = io.BytesIO()
            np.save(buffer, values)
            add_bytes(file, f"00000/img-mean-std-0000000{name}.npy", buffer.getvalue())
        del file["00000/img-mean-std-00000003.npy"]
        add_bytes(file, "00000/img-mean-std-00000003.npy", b"\x93NUMPY nothing")
    dataset = CachedLatentsDataset(path)
    for i, message in ((1, "is float64"), (2, r"shape \(8, 4, 4\) instead of"), (3, "cannot be decoded")):
        with pytest.raises(ValueError, match=message):
            dataset[i]
    with pytest.raises(FileNotFoundError, match=r"latent file .* write it by repae cache-latents"):
        CachedLatentsDataset(tmp_path / "none.h5")
    with pytest.raises(ValueError, match="cannot be decoded"):  # images are no latents
        CachedLatentsDataset(images)
    shutil.copy(cached[0], tmp_path / "group.h5")
    with h5py.File(tmp_path / "group.h5", "r+") as file:
        del file["vae.json"]
        file.create_group("vae.json")
    with pytest.raises(ValueError, match=r"vae\.json in .*group\.h5 is an HDF5 group instead of bytes"):
        CachedLatentsDataset(tmp_path / "group.h5")


def npy(values, header=None):
    buffer = io.BytesIO()
    np.save(buffer, values)
    data = buffer.getvalue()
    return data if header is None else data[:10] + header.encode().ljust(118)[:118] + data[128:]


@pytest.mark.parametrize("data, message", [
    (npy(np.zeros((8, 2, 2), np.float32), "{'descr': '<f4', 'shape': (8, 2, 2"), "cannot be decoded"),
    (npy(np.zeros((8, 2, 2), np.float32), "{'descr': '<f4', 'fortran_order': False, 'shape': (8, 2, 9999)}"),
     "cannot be decoded"),
    (npy(np.zeros((8, 2, 2), np.float32), '"' * 3), "cannot be decoded"),
    (npy(np.zeros((8, 2, 2), np.float32), "(" * 118), "cannot be decoded"),
    (b"PK\3\4 an archive", "cannot be decoded"),
    (npy(np.full((8, 2, 2), np.nan, np.float32)), "has values that are not finite"),
])  # fmt: skip
def test_damaged_headers_and_values_are_refused(cached, tmp_path, data, message):
    shutil.copy(cached[0], tmp_path / "e2e.h5")
    with h5py.File(tmp_path / "e2e.h5", "r+") as file:
        del file["00000/img-mean-std-00000003.npy"]
        add_bytes(file, "00000/img-mean-std-00000003.npy", data)
    dataset = CachedLatentsDataset(tmp_path / "e2e.h5")
    with pytest.raises(ValueError, match=message):
        dataset[3]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_is_one_sentence_that_names_the_file_or_does_no_harm(cached, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.h5"
    path.write_bytes(bytes_changed(cached[0].read_bytes(), data))
    try:
        dataset = CachedLatentsDataset(path)
        found = [dataset[i] for i in range(len(dataset))]
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all(len(moments) == dataset.shape[0] for moments, _ in found)


# ---------------------------------------------------------------- which images


def test_latents_of_other_images_are_refused_though_their_labels_agree(cached, images, tmp_path):
    assert len(TrainingData(ImageH5Dataset(images), CachedLatentsDataset(cached[0]))) == COUNT
    other = np.random.default_rng(1).integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
    write_images_h5(tmp_path / "images.h5", other, np.arange(COUNT) % 3)
    with pytest.raises(ValueError, match="are of other images than these, though their labels agree"):
        TrainingData(ImageH5Dataset(tmp_path / "images.h5"), CachedLatentsDataset(cached[0]))


@pytest.mark.parametrize("marks", [None, "odd", [], [[1, "a"]]])
def test_marks_of_older_files_say_nothing_and_odd_ones_refuse(images, marks):
    assert same_images(marks, ImageH5Dataset(images)) is (marks is None)


def test_images_without_classes_have_latents_without_classes(vae, tmp_path):
    for i in range(3):
        Image.new("RGB", (SIZE, SIZE), (i * 50, 0, 0)).save(tmp_path / f"{i}.png")
    dataset = ImageFolderDataset(tmp_path, SIZE)
    cache_latents(vae, dataset, tmp_path / "out" / "e2e.h5")
    found = CachedLatentsDataset(tmp_path / "out" / "e2e.h5")
    assert len(found) == 3 and found.names == [latents.latent_name(i) for i in range(3)] and found.no_classes
    with pytest.raises(ValueError, match=r"the latents of .*e2e\.h5 have no classes, and only train-vae"):
        TrainingData(None, found).require_classes()


# ---------------------------------------------------------------- the command


@pytest.fixture
def weights(vae, tmp_path):
    save_vae(tmp_path / "vae.safetensors", vae, LatentStats(torch.zeros(4), torch.ones(4)))
    return tmp_path / "vae.safetensors"


def refused(capsys, *arguments):
    """Runs the command, which must refuse in one sentence; returns it."""
    capsys.readouterr()
    assert main(["cache-latents", *map(str, arguments)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("repae cache-latents: ") and "Traceback" not in "".join(err)
    return err[-1].removeprefix("repae cache-latents: ")


def options(weights, images, output, name="e2e"):
    what = ("--vae-ckpt-path", weights, "--vae-latents-name", name, "--data-dir", images.parent)
    return (*what, "--output-dir", output, "--pproc-batch-size", 4, "--device", "cpu")


def test_the_command_by_its_official_flags(cached, weights, images, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(images.parent, data)
    arguments = [
        "cache-latents",
        "--vae-ckpt-path",
        str(weights),
        "--vae-latents-name",
        "e2e",
        "--data-dir",
        str(data),
    ]
    assert main([*arguments, "--pproc-batch-size", "4", "--device", "cpu"]) == 0
    assert f"e2e.h5: {COUNT} latents of shape (4, 2, 2)" in capsys.readouterr().out
    assert (data / "e2e.h5").exists() and (data / "e2e_h5.json").exists()
    assert CachedLatentsDataset(data / "e2e.h5").fingerprint == vae_fingerprint(load_vae(weights))
    arguments[arguments.index("e2e")], arguments[-1] = "beside", str(data / "images.h5")
    assert main(arguments) == 0 and (data / "beside.h5").exists()  # beside the file that was named


def test_what_is_in_the_way_is_kept_unless_overwritten(weights, images, tmp_path, capsys, monkeypatch):
    arguments = options(weights, images, tmp_path)
    (tmp_path / "e2e.h5").write_bytes(b"precious")
    assert (
        "e2e.h5 exists" in refused(capsys, *arguments) and (tmp_path / "e2e.h5").read_bytes() == b"precious"
    )
    assert main([*map(str, ("cache-latents", *arguments)), "--overwrite"]) == 0
    with monkeypatch.context() as patched:
        patched.setitem(cache_latents.__wrapped__.__kwdefaults__, "step", 8)
        interrupted(patched, None, 4)
        assert main([*map(str, ("cache-latents", *options(weights, images, tmp_path, "other")))]) == 130
    save_vae(weights, make_vae(5), LatentStats(torch.zeros(4), torch.ones(4)))
    assert "holds an unfinished run with other images or options" in refused(
        capsys, *options(weights, images, tmp_path, "other")
    )


@pytest.mark.parametrize("name", ["e2e_h5.json", "e2e-latents-stats.pt"])
def test_files_of_others_are_kept_unless_overwritten(weights, images, tmp_path, capsys, name):
    arguments = options(weights, images, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"precious")
    sentence = refused(capsys, *arguments)
    assert sentence.endswith(
        f"{name} exists and is not of this run: move it away, choose another name or folder, or replace it "
        "with --overwrite"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_bytes() == b"precious"
    assert main([*map(str, ("cache-latents", *arguments)), "--overwrite"]) == 0
    assert (tmp_path / "out" / name).read_bytes() != b"precious"


def test_a_refusal_of_the_first_process_ends_the_others(weights, images, tmp_path):
    """Without a launcher, which would end a process that waits for ever."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "e2e-latents-stats.pt").write_bytes(b"precious")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-m", "repae_lite", "cache-latents"]
    words += map(str, options(weights, images, tmp_path / "out"))
    processes = [
        subprocess.Popen(
            words,
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert "e2e-latents-stats.pt exists and is not of this run" in errors[0] and processes[0].returncode == 2
    assert "repae cache-latents" not in errors[1] and "Traceback" not in "".join(errors)
    assert processes[1].returncode == 2


def test_a_dry_run_writes_nothing(weights, images, tmp_path, capsys):
    words = [*map(str, ("cache-latents", *options(weights, images, tmp_path / "out"))), "--dry-run"]
    assert main(words) == 0
    assert f"would hold the latents of {COUNT} images; nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_sentence(weights, images, tmp_path, capsys):
    arguments = options(weights, images, tmp_path / "out")
    assert "does not fit AutoencoderKL" in refused(capsys, *arguments, "--vae-arch", "tiny")
    assert refused(capsys, *arguments, "--pproc-batch-size", 0) == "--pproc-batch-size is 0: give at least 1"
    assert (
        refused(capsys, *arguments, "--num-workers", -1)
        == "--num-workers is -1: give at least 0, or leave it out"
    )
    assert "have 8 × 8 pixels and not 16 × 16" in refused(capsys, *arguments, "--resolution", 16)
    assert "do not exist" in refused(capsys, *arguments, "--vae-ckpt-path", tmp_path / "none.pt")
    for name in ("a/b", "..", ".", "", "a\\b", "a\nb"):
        assert "--vae-latents-name is" in refused(capsys, *arguments, "--vae-latents-name", name)
    assert "no device" in refused(capsys, *arguments, "--device", "nonsense")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_images_that_do_not_fit_and_latents_that_are_not_finite(tmp_path, images, capsys):
    write_images_h5(tmp_path / "odd.h5", np.zeros((2, 3, 6, 6), np.uint8), np.zeros(2, int))
    with pytest.raises(ValueError, match="not a multiple of 4"):
        cache_latents(make_vae(), ImageH5Dataset(tmp_path / "odd.h5"), tmp_path / "e2e.h5")
    broken = make_vae()
    broken.quant_conv.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="latents that are not finite for image 0"):
        cache_latents(broken, ImageH5Dataset(images), tmp_path / "nan.h5", batch_size=4)


def test_the_image_whose_latents_are_not_finite_is_named(tmp_path, images, vae, monkeypatch):
    encode, calls = AutoencoderKL.encode, []

    def failing(self, x):
        posterior = encode(self, x)
        calls.append(x)
        if len(calls) == 4:  # one image to see its size, then batches of four
            posterior.mean[1] = float("inf")
        return posterior

    monkeypatch.setattr(AutoencoderKL, "encode", failing)
    with pytest.raises(ValueError, match="latents that are not finite for image 9: check its weights"):
        cache_latents(vae, ImageH5Dataset(images), tmp_path / "nan.h5", batch_size=4)


class Shades:
    """Images of one shade each."""

    names, labels = ("a", "b", "c"), (1, 2, 0)

    def __init__(self, *shades):
        self.shades = shades

    def __len__(self):
        return len(self.shades)

    def __getitem__(self, index):
        return torch.full((3, 4, 4), self.shades[index], dtype=torch.uint8), self.labels[index]


def test_unfinished_latents_are_of_the_same_images_and_vae():
    about = {"fingerprint": "abc", "downsampling": 8}
    found = latents._source_print(Shades(1, 9, 2), about)
    # As it always was, so that unfinished work goes on.
    assert found == "1b55c54dc87495e6a7f70be92dfb0892ce72b7aca2a04cba440834d79dc9b94a"
    assert latents._source_print(Shades(3, 9, 2), about) != found  # the first image
    assert latents._source_print(Shades(1, 9, 3), about) != found  # the last
    assert latents._source_print(Shades(1, 9, 2), about | {"fingerprint": "abd"}) != found


def test_a_disk_that_is_too_small_or_fills_up(images, vae, cached, tmp_path, monkeypatch):
    dataset = ImageH5Dataset(images)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="the latents need"):
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
        cache_latents(vae, dataset, tmp_path / "e2e.h5", batch_size=4, step=8)
    original, written = os.pwrite, []

    def full(descriptor, data, offset):
        written.append(len(data))
        if sum(written) > 6_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data, offset)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device"):
        patched.setattr(os, "pwrite", full)
        cache_latents(vae, dataset, tmp_path / "e2e.h5", batch_size=4, step=8)
    cache_latents(vae, dataset, tmp_path / "e2e.h5", batch_size=4, step=8)
    assert (tmp_path / "e2e.h5").read_bytes() == cached[0].read_bytes()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_cannot_be_read_ends_it_in_one_sentence(tmp_path, capsys, workers):
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(path)
    (tmp_path / "images" / "a" / "2.png").write_bytes(b"broken")
    words = [
        "cache-latents",
        "--vae-ckpt-path",
        "tiny",
        "--data-dir",
        str(tmp_path / "images"),
        "--resolution",
        "32",
    ]
    words += ["--vae-latents-name", "mine", "--output-dir", str(tmp_path), "--num-workers", workers]
    assert main(words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("repae cache-latents: the image ") and "2.png cannot be read" in error
    assert not multiprocessing.active_children() and not (tmp_path / "mine.h5").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_images_themselves_are_not_overwritten(images, vae, tmp_path, capsys, overwrite):
    for name in ("images.h5", "photos.h5"):
        shutil.copy(images, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path)
    before = images.read_bytes()
    with pytest.raises(ValueError, match=r"photos\.h5 holds the images themselves: choose another name"):
        cache_latents(
            vae, ImageH5Dataset(tmp_path / "photos.h5"), tmp_path / "link" / "photos.h5", overwrite=overwrite
        )
    words = [
        "--vae-ckpt-path",
        "tiny",
        "--data-dir",
        tmp_path,
        "--vae-latents-name",
        "images",
        *["--overwrite"] * overwrite,
    ]
    for output in ([], ["--output-dir", tmp_path / "out"]):  # elsewhere it would be taken for images
        assert refused(capsys, *words, *output) == (
            "--vae-latents-name is 'images', and images.h5 holds the images themselves: choose another name"
        )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images.h5", "link", "photos.h5"]
    assert (tmp_path / "images.h5").read_bytes() == before and (tmp_path / "photos.h5").read_bytes() == before


def test_latents_are_found_beside_an_image_file(images, tmp_path):
    shutil.copy(images, tmp_path / "images.h5")
    tiny = load_vae("tiny")
    cache_latents(tiny, ImageH5Dataset(images), tmp_path / "lt.h5")
    for data in (tmp_path, tmp_path / "images.h5"):
        config = TrainConfig.build(
            "ldm",
            vae="tiny",
            vae_ckpt="tiny",
            resolution=SIZE,
            data_dir=str(data),
            vae_latents_name="lt",
            enc_type="none",
        )
        assert len(open_data(config)) == COUNT


def test_a_dry_run_tells_of_files_in_the_way(images, tmp_path, capsys):
    (tmp_path / "l-latents-stats.pt").write_text("mine")
    flags = ("--data-dir", images, "--output-dir", tmp_path, "--vae-latents-name", "l", "--dry-run")
    assert main(["cache-latents", "--vae-ckpt", "tiny", "--device", "cpu", *map(str, flags)]) == 2
    assert "l-latents-stats.pt exists and is not of this run" in capsys.readouterr().err


def test_equal_statistics_make_equal_files(tmp_path, monkeypatch):
    stats = LatentStats(torch.zeros(4), torch.ones(4))
    for pid in (1, 22):  # the temporary name has it
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        latents.save_stats(tmp_path / f"{pid}.pt", stats)
    assert (tmp_path / "1.pt").read_bytes() == (tmp_path / "22.pt").read_bytes()


@pytest.mark.parametrize("shape", [(2, 10**6, 10**7), (2, 0, 0)])
def test_a_header_that_asks_for_more_memory_than_there_is(tmp_path, shape):
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with h5py.File(tmp_path / "l.h5", "w") as file:
        add_bytes(file, "00000/a.npy", data.getvalue() + b"1")
        add_bytes(file, "dataset.json", labels_json([("00000/a.npy", 0)]))
    with pytest.raises(ValueError, match="cache the latents again"):
        CachedLatentsDataset(tmp_path / "l.h5")
