"""`--cache-targets`: tokens are written once, whatever interrupts, train as live ones do, or are refused."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_runs import config_in, run
from torch import nn

from repae_lite.checkpoints.models import load_vae
from repae_lite.commands.main import main
from repae_lite.data import targets as module
from repae_lite.data.datasets import ImageH5Dataset, load_embedded
from repae_lite.data.hdf5 import write_images_h5
from repae_lite.data.latents import CachedLatentsDataset, cache_latents
from repae_lite.data.targets import cache_targets
from repae_lite.data.training_data import TrainingData
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.utils import locks

COUNT = 12


class Means(nn.Module):
    """Another encoder: 4 tokens of width 6, after a factor that is its only weight."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.seen = nn.Parameter(torch.tensor(factor)), []

    def forward(self, x):
        self.seen.append(len(x))
        pooled = nn.functional.adaptive_avg_pool2d(x, (4, 2)).flatten(2) * self.factor  # (B, 3, 8)
        return pooled.reshape(-1, 4, 6)


def means(factor=1.0):
    return VisionEncoder(Means(factor), name="means", embed_dim=6, grid_size=2, resolution=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the first embedded images."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = load_embedded("train")
    write_images_h5(folder / "images.h5", images[:COUNT].numpy(), labels[:COUNT].numpy())
    return folder


@pytest.fixture
def images(data):
    return ImageH5Dataset(data / "images.h5")


def test_the_tokens_of_several_encoders_are_written_once(tmp_path, images):
    encoders, path = [VisionEncoder.from_name("tiny"), means()], tmp_path / "new" / "tokens.safetensors"
    cached = cache_targets(encoders, images, path, batch_size=5)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    batch = torch.stack([images[i][0] for i in range(COUNT)])
    for kept in (cached, pickle.loads(pickle.dumps(cached)), cache_targets(encoders, images, path)):
        for i, expected in enumerate(encoder(batch) for encoder in encoders):
            found = torch.stack([kept[index][i] for index in range(COUNT)])
            assert found.dtype == torch.float16
            torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-5)
    assert encoders[1].network.seen == [1, 5, 5, 2, 1, COUNT, COUNT, COUNT]  # a look at one, and once all
    with safe_open(path, "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {
            "00 tiny": [COUNT, 16, 128],
            "01 means": [COUNT, 4, 6],
        }


@pytest.mark.parametrize("batches", range(7))
def test_an_interrupted_file_goes_on_from_its_journal(tmp_path, images, batches, monkeypatch):
    whole = tmp_path / "whole"
    cache_targets([means(), means(2.0)], images, whole, batch_size=2, step=4)

    path, encoders, add, left = tmp_path / "tokens", [means(), means(2.0)], module._Unfinished.add, [batches]

    def killed(self, rows, step):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, rows, step)

    monkeypatch.setattr(module._Unfinished, "add", killed)
    if batches < 6:
        with pytest.raises(KeyboardInterrupt):
            cache_targets(encoders, images, path, batch_size=2, step=4)
    else:  # between the last batch and the end
        monkeypatch.setattr(module._Unfinished, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache_targets(encoders, images, path, batch_size=2, step=4)
    assert not path.exists()
    monkeypatch.undo()
    safe = 4 * (batches // 2)
    if safe:  # what the journal does not know of may be anything
        with open(tmp_path / "tokens.partial" / "tokens", "rb+") as file:
            file.seek(whole.stat().st_size - 2 * 24 * (COUNT - safe))
            file.write(b"\1" * 2 * 24 * (COUNT - safe))
    encoders[0].network.seen.clear()
    cache_targets(encoders, images, path, batch_size=2, step=4)
    assert sum(encoders[0].network.seen) == 1 + COUNT - safe
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokens", "whole"]


def test_a_file_that_was_finished_and_went_is_written_again(tmp_path, images, monkeypatch):
    path = tmp_path / "tokens"

    def killed(one, other, replace=os.replace):
        replace(one, other)
        if other == path:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_targets([means()], images, path, step=4)
    whole = path.read_bytes()
    path.unlink()
    cache_targets([means()], images, path, step=4)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["tokens"]


WORK = """
import sys, torch.distributed as dist
from test_cached_targets import ImageH5Dataset, cache_targets, means
store, rank, images, path = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
cached = cache_targets([means(), means(2.0)], ImageH5Dataset(images), path, batch_size=2)
print(cached[11][1].sum().item())
dist.destroy_process_group()
"""


def test_two_processes_write_the_file_of_one(tmp_path, data, images):
    one = cache_targets([means(), means(2.0)], images, tmp_path / "one", batch_size=2)
    tests = Path(__file__).resolve().parent
    places = os.pathsep.join(map(str, (tests, tests.parent, *sys.path)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, tmp_path / "store", str(rank), data / "images.h5", tmp_path / "two"],
            env=os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [float(total) for total in told] == [one[11][1].sum().item()] * 2
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()


@pytest.fixture
def encoded(monkeypatch):
    """How many images each call of an encoder gets."""
    calls, forward = [], VisionEncoder.forward
    monkeypatch.setattr(VisionEncoder, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    return calls


@pytest.mark.parametrize(
    ("command", "latents", "workers"), [("repae", False, 0), ("ldm", False, 0), ("ldm", True, 1)]
)
def test_cached_targets_train_as_live_ones(tmp_path, data, images, encoded, command, latents, workers):
    options = {"command": command, "data_dir": str(data), "max_train_steps": 2, "batch_size": 2}
    if latents:
        cache_latents(load_vae("tiny"), images, data / "latents.h5", overwrite=True)
        options["vae_latents_name"] = "latents"
    live = run(tmp_path, "live", **options).metrics()
    assert encoded == [2, 2]
    encoded.clear()
    file = str(tmp_path / "tokens")
    cached = run(tmp_path, "cached", cache_targets=file, num_workers=workers, **options).metrics()
    assert encoded == [1] + [2] * (COUNT // 2)  # a look at one, and once all
    for mine, other in zip(cached, live, strict=True):
        assert mine.keys() == other.keys()
        losses = [key for key in mine if "align" in key or key == "denoising"]
        assert len(losses) >= 2
        for key in losses:
            assert mine[key] == pytest.approx(other[key], rel=2e-3, abs=1e-5), key


def test_images_are_not_read_where_latents_and_tokens_stand_for_them(tmp_path, data, images):
    cache_latents(load_vae("tiny"), images, tmp_path / "latents.h5")
    both = TrainingData(images, CachedLatentsDataset(tmp_path / "latents.h5"))
    alone, before = TrainingData(images, None), both.fingerprint
    both.targets = alone.targets = cache_targets([means()], images, tmp_path / "tokens")
    assert both[3].keys() == {"latent", "label", "target 0"} and both.fingerprint == before
    assert alone[3].keys() == {"image", "label", "target 0"}
    assert both[3]["label"] == alone[3]["label"] == images[3][1]


# ---------------------------------------------------------------- what is refused


def test_tokens_of_something_else_are_refused(tmp_path, images):
    path = tmp_path / "tokens"
    cache_targets([means()], images, path)
    before = path.read_bytes()
    for encoders in ([means(2.0)], [means(), means()], [VisionEncoder.from_name("tiny")]):
        with pytest.raises(ValueError, match=r"tokens holds the tokens of other encoders \(means, 32 pixels"):
            cache_targets(encoders, images, path)
    pixels = np.stack([images[i][0].numpy() for i in range(COUNT)])
    pixels[-1] = 0
    write_images_h5(tmp_path / "images.h5", pixels, images.labels)
    with pytest.raises(ValueError, match=r"of other images \(12, [0-9a-f]{16}\) than this run has \(12, "):
        cache_targets([means()], ImageH5Dataset(tmp_path / "images.h5"), path)
    assert path.read_bytes() == before


def test_an_unfinished_file_of_something_else_is_refused(tmp_path, images, monkeypatch):
    path = tmp_path / "tokens"
    monkeypatch.setattr(module._Unfinished, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache_targets([means()], images, path, step=4)
    with pytest.raises(ValueError, match=r"tokens\.partial holds unfinished tokens of other encoders or im"):
        cache_targets([means(2.0)], images, path)


def test_what_is_no_cache_is_refused(tmp_path, images):
    path = tmp_path / "tokens"
    cache_targets([means()], images, path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-2], whole + b"\0", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no whole file of cached targets"):
            cache_targets([means()], images, path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"tokens of other encoders \(it does not say\) than this run has"):
        cache_targets([means()], images, path)
    with pytest.raises(OSError, match=r"cannot be read \(.*: give --cache-targets a file on a disk that all"):
        cache_targets([means()], images, tmp_path)


def test_a_disk_that_is_too_small_is_refused_with_the_need(tmp_path, images, monkeypatch):
    monkeypatch.setattr(locks, "free_space", lambda folder: 1e8)
    monkeypatch.setattr(module, "_about", lambda *_: {})

    class Million(torch.utils.data.Dataset):
        def __len__(self):
            return 1_281_167

        def __getitem__(self, index):
            return images[0]

    base = VisionEncoder(
        nn.Unflatten(1, (256, 768)), name="dinov2-vit-b", embed_dim=768, grid_size=16, resolution=256
    )
    base.forward = lambda x: torch.zeros(len(x), 256, 768)
    with pytest.raises(
        OSError,
        match=r"the encoders' tokens, 393 kB an image, need 503\.8 GB more in .*, where 0\.1 GB are free",
    ):
        cache_targets([base], Million(), tmp_path / "tokens")


def test_tokens_beyond_float16_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match=r"the tokens of image 0 do not fit float16: leave --cache-targets"):
        cache_targets([means(1e9)], images, tmp_path / "tokens")


def test_the_options_are_refused_where_they_mean_nothing(tmp_path, data, capsys):
    with pytest.raises(ValueError, match=r"--cache-targets means nothing since --enc-type none has no targ"):
        config_in(tmp_path, command="ldm", enc_type="none", cache_targets="tokens")
    with pytest.raises(ValueError, match="--cache-targets means nothing to train-vae"):
        config_in(tmp_path, command="vae", cache_targets="tokens")
    options = ["--vae", "tiny", "--data-dir", str(data), "--output-dir", str(tmp_path), "--exp-name", "run"]
    options += ["--batch-size", "2", "--sampling-steps", "0", "--checkpointing-steps", "1"]
    tokens = ["--cache-targets", str(tmp_path / "tokens")]
    assert main(["train-ldm", *options, *tokens, "--max-train-steps", "1"]) == 0
    assert main(["train-ldm", *options, "--max-train-steps", "2", "--resume", "latest"]) == 2
    assert "--cache-targets was True and is now False" in capsys.readouterr().err
    moved = ["--cache-targets", str((tmp_path / "tokens").rename(tmp_path / "moved"))]
    assert main(["train-ldm", *options, *moved, "--max-train-steps", "2", "--resume", "latest"]) == 0
