"""Runs of a few steps by command: what they write, how they resume, stop, diverge and refuse."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import STEPS, assert_same_run, run, weights
from small_states import LABELS, make_batch, make_state
from torch import nn
from torch.testing import assert_close

from repae_lite.checkpoints.models import load_latent_stats, load_sit, load_vae
from repae_lite.commands.main import main
from repae_lite.data.datasets import ImageH5Dataset
from repae_lite.data.hdf5 import write_images_h5
from repae_lite.data.latents import cache_latents
from repae_lite.method.steps import Mechanics
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.layers import set_gradient_checkpointing
from repae_lite.training import build, run_folder, run_log
from repae_lite.training import trainer as training
from repae_lite.training.config import TrainConfig
from repae_lite.training.parallel import ParallelMechanics
from repae_lite.training.run_folder import RunFolder
from repae_lite.utils.devices import compile_obstacle
from repae_lite.utils.locks import locked
from repae_lite.utils.state_dicts import read_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    """The run that nothing interrupted."""
    return run(tmp_path_factory.mktemp("whole"))


# ---------------------------------------------------------------- what a run writes


def test_the_official_command_runs_at_small_scale(tmp_path, capsys):
    discriminator = tmp_path / "disc.pt"
    torch.save(PatchDiscriminator().state_dict(), discriminator)
    command = (
        "train-repae --max-train-steps=2 --report-to=none --allow-tf32 --mixed-precision=no --seed=0 "
        "--batch-size=4 --path-type=linear "
        "--prediction=v --weighting=uniform --model=tiny --checkpointing-steps=50000 "
        "--loss-cfg-path=configs/l1_lpips_kl_gan.yaml "
        "--vae=tiny --vae-ckpt=tiny --enc-type=tiny --proj-coeff=0.5 --encoder-depth=2 "
        "--vae-align-proj-coeff=1.5 --bn-momentum=0.1 "
        "--exp-name=official --sampling-steps=2 --sample-images=3"
    )
    assert (
        main([*command.split(), f"--disc-pretrained-ckpt={discriminator}", f"--output-dir={tmp_path}"]) == 0
    )
    folder = RunFolder(tmp_path / "official")
    first, last = folder.metrics()
    assert (first["step"], last["step"]) == (1, 2)
    assert {
        "reconstruction",
        "perceptual",
        "kl",
        "weighted_gan",
        "vae_align",
        "disc",
        "denoising",
        "sit_align",
    } <= last.keys()
    assert all(np.isfinite(list(last.values())))
    networks = {path.name for path in folder.checkpoints()[2].iterdir()}
    assert networks == {
        "sit.safetensors",
        "ema.safetensors",
        "vae.safetensors",
        "discriminator.safetensors",
        "resume.pt",
    }
    args = json.loads((folder.path / "args.json").read_text())
    assert (args["command"], args["vae"], args["encoder_depth"], args["num_classes"]) == (
        "train-repae",
        "tiny",
        2,
        10,
    )
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["batch"] == {
        "images_per_step": 4,
        "batch_size": 4,
        "processes": 1,
        "images_per_process": 4,
    }
    assert manifest["sessions"][0]["ended"] == "finished" and manifest["sessions"][0]["peak_memory_gib"] > 0
    assert Image.open(folder.path / "samples" / "0000002.png").size == (3 * 32, 32)
    assert "4 on each of 1 process;" in capsys.readouterr().err
    vae = load_vae(folder.checkpoints()[2] / "vae.safetensors")
    stats = load_latent_stats(folder.checkpoints()[2] / "vae.safetensors")
    sit = read_weights(folder.checkpoints()[2] / "sit.safetensors")[0]
    assert vae.config.latent_channels == 4
    assert_close(1 / stats.std, sit["bn.running_var"].rsqrt())


def test_metrics_hold_nothing_that_differs_between_two_runs(whole, tmp_path):
    assert_same_run(whole, run(tmp_path, num_workers=2))
    assert [record["step"] for record in whole.metrics()] == list(range(1, STEPS + 1))
    assert whole.metrics()[0]["lr_sit"] == pytest.approx(1e-3 / 50)  # warm-up


def test_another_seed_is_another_run(whole, tmp_path):
    other = run(tmp_path, seed=1, max_train_steps=2)
    assert other.metrics()[1]["denoising"] != whole.metrics()[1]["denoising"]


def test_logging_less_often_changes_nothing_else(whole, tmp_path):
    seldom = run(tmp_path, logging_steps=4)
    assert seldom.metrics() == [whole.metrics()[3], whole.metrics()[5]]


def test_a_plain_sit_and_repa_leave_the_vae_alone(tmp_path):
    plain = run(tmp_path, "plain", command="ldm", enc_type="none", max_train_steps=2)
    repa = run(tmp_path, "repa", command="ldm", max_train_steps=2, sampling_steps=2, sample_images=2)
    assert "sit_align" not in plain.metrics()[0] and "sit_align" in repa.metrics()[0]
    assert plain.metrics()[0]["denoising"] == pytest.approx(repa.metrics()[0]["denoising"], rel=0.5)
    assert {path.stem for path in repa.checkpoints()[2].glob("*.safetensors")} == {"sit", "ema"}
    assert (repa.path / "samples" / "0000002.png").is_file()


def test_naive_training_lets_the_velocity_loss_into_the_vae(whole, tmp_path):
    naive = run(
        tmp_path, enc_type="none", vae_align_proj_coeff=0.0, vae_diffusion_coeff=1.0, max_train_steps=1
    )
    assert naive.metrics()[0]["vae_denoising"] > 0 and "vae_denoising" not in whole.metrics()[0]


def test_a_vae_trains_from_scratch_on_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    loss = tmp_path / "loss.yaml"
    loss.write_text("discriminator_weight: 0.1\nreconstruction_loss: l2\n")
    options = {
        "command": "vae",
        "data_dir": str(tmp_path / "images"),
        "loss_cfg_path": str(loss),
        "sampling_steps": 2,
        "sample_images": 2,
    }
    vae = run(tmp_path, "vae", **options)
    assert {path.stem for path in vae.checkpoints()[2].glob("*.safetensors")} == {"vae", "discriminator"}
    stats = load_latent_stats(vae.checkpoints()[6] / "vae.safetensors")
    assert stats.std.shape == stats.mean.shape == (4,) and bool((stats.std > 0).all())
    assert load_vae(vae.checkpoints()[6] / "vae.safetensors").config.fold == 2
    assert Image.open(vae.path / "samples" / "0000002.png").size == (4 * 32, 32)
    assert "denoising" not in vae.metrics()[0] and vae.metrics()[0]["disc"] > 0
    run(tmp_path, "again", **options, max_train_steps=2)
    assert_same_run(vae, run(tmp_path, "again", **options, resume="latest"))


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", ["safetensors", "official"])
def test_a_resumed_run_is_the_run_that_never_stopped(whole, tmp_path, kind):  # D5
    run(tmp_path, max_train_steps=3, checkpoint_format=kind)
    resumed = run(tmp_path, resume="latest", checkpoint_format="both")
    assert_same_run(whole, resumed)
    assert len(json.loads((resumed.path / "manifest.json").read_text())["sessions"]) == 2


def test_the_official_resume_step_works(whole, tmp_path):  # D4
    run(tmp_path, max_train_steps=4)
    assert_same_run(whole, run(tmp_path, resume_step=4))


def test_latest_starts_from_nothing_where_nothing_is(whole, tmp_path):
    first = run(tmp_path, resume="latest")
    assert_same_run(whole, first)
    before = first.metrics_path.read_bytes()
    assert_same_run(whole, run(tmp_path, resume="latest"))  # finished: nothing to do
    assert first.metrics_path.read_bytes() == before


def test_another_run_can_start_from_a_checkpoint(whole, tmp_path):
    other = run(tmp_path, "other", resume=str(whole.checkpoints()[4]), learning_rate=5e-4)
    assert [record["step"] for record in other.metrics()] == [5, 6]
    assert other.metrics()[0]["denoising"] == whole.metrics()[4]["denoising"]
    assert other.metrics()[1]["denoising"] != whole.metrics()[5]["denoising"]


def test_a_checkpoint_elsewhere_is_no_way_into_a_folder_that_holds_a_run(whole, tmp_path, capsys):
    folder = run(tmp_path, max_train_steps=4)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    words = ["--exp-name", "run", "--resume", str(whole.checkpoints()[2])]
    assert "already holds a run, up to step 4: go on with --resume latest, or start from" in refused(
        capsys, tmp_path, *words
    )
    words[-1] = str(folder.checkpoints()[2])
    assert "has a checkpoint of step 4, later than 2: move it away" in refused(capsys, tmp_path, *words)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_options_of_a_start_that_left_nothing_are_not_kept(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text('{"batch_size": 64}')
    for name in ("samples", "divergence"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "0000002.png").write_text("mine")
    folder = run(tmp_path, max_train_steps=2)
    for name in ("samples-1", "divergence-1"):
        assert (folder.path / name / "0000002.png").read_text() == "mine"
    assert json.loads((folder.path / "args.json").read_text())["batch_size"] == 4


def test_states_of_another_optimiser_are_refused(whole, tmp_path, capsys):
    words = [
        "--resume",
        str(whole.checkpoints()[2]),
        "--exp-name",
        "new",
        "--max-train-steps",
        "3",
        "--optimizer",
    ]
    for other in ("NAdam", "SGD"):
        assert f"holds the state of AdamW, not of {other}: give --optimizer AdamW" in refused(
            capsys, tmp_path, *words, other
        )


def test_other_weights_of_the_losses_are_noticed(tmp_path, capsys):
    recipe = tmp_path / "loss.yaml"
    recipe.write_text("reconstruction_weight: 1.0\nperceptual_weight: 1.0\nkl_weight: 1.0e-6\n")
    run(tmp_path, max_train_steps=2, loss_cfg_path=str(recipe))
    recipe.write_text(recipe.read_text().replace("reconstruction_weight: 1.0", "reconstruction_weight: 50.0"))
    with pytest.raises(
        ValueError, match=r"is of a run with other weights of the losses than .*loss\.yaml now"
    ):
        run(tmp_path, max_train_steps=4, loss_cfg_path=str(recipe), resume="latest")


def test_a_sit_of_another_vae_is_refused(whole, tmp_path):
    options = {"command": "ldm", "max_train_steps": 2, "enc_type": "none"}
    first = run(tmp_path, "first", **options)
    for source in (first.path, whole.path):  # on the VAE that ships; on what the run made of it
        with pytest.raises(ValueError, match="is of a run on another VAE than tiny-e2e"):
            run(tmp_path, "second", **options | {"vae_ckpt": "tiny-e2e", "resume": str(source)})
    with pytest.raises(ValueError, match="is of a run on another VAE than tiny"):
        run(tmp_path, "second", **options | {"resume": str(whole.path)})


def test_a_loader_process_that_dies_is_one_sentence(tmp_path, monkeypatch, capsys):
    at_step(
        monkeypatch,
        2,
        lambda _: (os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL), time.sleep(1)),
    )
    words = ["--num-workers", "1", "--max-train-steps", "60", "--sampling-steps", "0"]
    assert (
        "a loader process ended before its work (DataLoader worker (pid"
        in refused(capsys, tmp_path, *words, lines=None).splitlines()[-1]
    )
    assert not multiprocessing.active_children()


def test_a_loader_process_does_not_import_what_trains(tmp_path, monkeypatch):
    """As one that is spawned, for CUDA, would have to if it got anything of the trainer."""
    given = {}

    def loader(data, *args, worker_init_fn, **kwargs):
        given["pickled"] = pickle.dumps((data, worker_init_fn))
        return torch.utils.data.DataLoader(data, *args, worker_init_fn=worker_init_fn, **kwargs)

    monkeypatch.setattr(training, "DataLoader", loader)
    run(tmp_path, max_train_steps=1)
    code = "import pickle, sys; pickle.load(sys.stdin.buffer); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], input=given["pickled"], capture_output=True, cwd=ROOT)
    modules = set(done.stdout.decode().split())
    assert "repae_lite.data.training_data" in modules, done.stderr
    assert not modules & {"accelerate", "timm", "repae_lite.training.trainer"}


def test_a_full_disk_is_said_once_and_well(tmp_path, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def act(_):
        for module, name in ((run_folder, "_save_pickle"), (run_log, "write_text")):
            monkeypatch.setattr(module, name, lambda *_: (_ for _ in ()).throw(full))

    at_step(monkeypatch, 2, act)
    words = ["--max-train-steps", "4", "--checkpointing-steps", "2", "--sampling-steps", "0"]
    last = refused(capsys, tmp_path, *words, lines=None).splitlines()[-1]
    assert (
        "cannot write the checkpoint of step 2" in last
        and "make room, then go on with --resume latest" in last
    )


class Closed(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text=""):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def flush(self):
        self.write("")


def test_a_closed_pipe_does_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(sys, "stdout", Closed())
    words = ["--max-train-steps", "2", "--batch-size", "4", "--sampling-steps", "1", "--sample-images", "1"]
    assert main(["train-repae", "--vae", "tiny", "--output-dir", str(tmp_path), *words]) == 0
    assert list(RunFolder(tmp_path / "run").checkpoints()) == [2]


def test_what_only_reports_may_fail(tmp_path, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for module, name in ((training, "save_grid"), (run_log, "write_text")):
        monkeypatch.setattr(module, name, lambda *_: (_ for _ in ()).throw(full))
    assert list(run(tmp_path, max_train_steps=2, sampling_steps=1).checkpoints()) == [2]
    for name in ("0000001.png", "manifest.json"):
        assert f"{name} cannot be written (No space left on device): training goes on" in caplog.text


def test_extending_a_run_removes_nothing(tmp_path):
    run(tmp_path, max_train_steps=3, checkpointing_steps=1)
    assert list(run(tmp_path, max_train_steps=4, resume="latest").checkpoints()) == [1, 2, 3, 4]


def test_checkpoints_that_are_elsewhere_are_asked_for(tmp_path, capsys):
    folder = run(tmp_path, max_train_steps=2)
    before = {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    folder.checkpoints_path.rename(tmp_path / "moved")
    for more in ([], ["--resume", "latest"], ["--resume", str(tmp_path / "moved" / "0000002")]):
        text = refused(capsys, tmp_path, *more)
        assert "has saved a checkpoint of step 2, but there is none in" in text and "mount it or move" in text
    assert {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == before
    (tmp_path / "moved").rename(folder.checkpoints_path)
    assert len(run(tmp_path, resume="latest", max_train_steps=3).metrics()) == 3


def test_a_start_that_left_no_checkpoint_is_kept_beside_the_next(whole, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    for name in ("args.json", "manifest.json", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("{}]\n")
    assert_same_run(whole, run(tmp_path, resume="latest"))
    for name in ("args-1.json", "manifest-1.json", "metrics-1.jsonl"):
        assert (tmp_path / "run" / name).read_text() == "{}]\n" and f"kept as {name}" in caplog.text


def test_a_refused_run_leaves_what_it_found(tmp_path, capsys):
    mine = tmp_path / "run" / "lock" / "lock"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    refused(capsys, tmp_path, "--data-dir", "nowhere")
    assert mine.read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    refused(capsys, tmp_path, "--data-dir", "nowhere", "--exp-name", "other")
    assert os.listdir(tmp_path / "other") == ["file"]


@pytest.mark.parametrize("name", ["file", "link", "long"])
def test_an_impossible_place_is_refused(tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nothing")
    place = {"file": "file", "link": "link/deep", "long": "x" * 300}[name]
    words = {"file": "Not a directory", "link": "link is a link to nothing", "long": "File name too long"}
    assert words[name] in refused(capsys, tmp_path, "--output-dir", str(tmp_path / place))


def test_a_damaged_checkpoint_names_the_whole_one_before_it(whole, tmp_path, capsys):
    folder = run(tmp_path)
    damaged = folder.checkpoints()[6]
    (damaged / "sit.safetensors").write_bytes(b"half")
    (damaged / "vae.safetensors").unlink()
    words = ["--max-train-steps", "6", "--resume", "latest"]
    text = refused(capsys, tmp_path, *words)
    assert f"0000004 is whole: move {damaged} away, then go on with --resume latest" in text
    damaged.rename(tmp_path / "away")
    state = torch.load(folder.checkpoints()[4] / "resume.pt", weights_only=True)
    torch.save(state | {"optimizers": {}}, folder.checkpoints()[4] / "resume.pt")
    text = refused(capsys, tmp_path, *words)
    assert "0000004 is damaged: it has no optimiser states of" in text and "0000002 is whole: move" in text
    folder.checkpoints()[4].rename(tmp_path / "away too")
    assert_same_run(whole, run(tmp_path, resume="latest"))


def test_checkpoints_are_pruned(tmp_path):
    assert list(run(tmp_path, keep_last=1, milestone_steps=4).checkpoints()) == [4, 6]


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(int(sys.argv.pop(1)))
from repae_lite.commands import main
from repae_lite.training import run_folder, trainer

module = {"training": trainer, "run_folder": run_folder}[sys.argv[1]]
name, count = sys.argv[2], int(sys.argv[3])
function, calls = getattr(module, name), 0

def call(*args, **kwargs):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)

setattr(module, name, call)
sys.exit(main.main(sys.argv[4:]))
"""


@pytest.mark.parametrize(
    ("module", "name", "count", "left"),
    [
        ("training", "all_updates", 4, [2]),  # between two checkpoints
        ("run_folder", "save_sit", 4, [2]),  # in the second checkpoint, after some of its files
        ("run_folder", "sync", 5, [2]),  # when it is whole but has not its name
        ("run_folder", "sync", 6, [2, 4]),  # just after it got its name
    ],
)
def test_a_killed_run_goes_on_to_the_bit(whole, tmp_path, module, name, count, left):
    command = (
        f"train-repae --vae tiny --batch-size 4 --max-train-steps {STEPS} --checkpointing-steps 2 "
        "--sampling-steps 0 --resume latest"
    )
    arguments = [*command.split(), "--output-dir", str(tmp_path), "--exp-name", "run"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(torch.get_num_threads()), module, name, str(count), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(RunFolder(tmp_path / "run").checkpoints()) == left
    assert_same_run(whole, run(tmp_path, resume="latest"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def at_step(monkeypatch, step: int, act) -> None:
    """Calls `act(losses)` after the updates of a step."""
    updates = training.all_updates

    def call(state, *args, **kwargs):
        losses, z = updates(state, *args, **kwargs)
        if state.step == step:
            act(losses)
        return losses, z

    monkeypatch.setattr(training, "all_updates", call)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(whole, tmp_path, monkeypatch, name, code):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    at_step(monkeypatch, 3, lambda _: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == code and signal.getsignal(number) == before
    folder = RunFolder(tmp_path / "run")
    assert list(folder.checkpoints()) == [2, 3]
    assert (
        json.loads((folder.path / "manifest.json").read_text())["sessions"][0]["ended"]
        == f"stopped by {name}"
    )
    monkeypatch.undo()
    assert_same_run(whole, run(tmp_path, resume="latest"))
    assert list(folder.checkpoints()) == [2, 4, 6]


def test_the_loaders_processes_outlive_a_signal_to_the_group(whole, tmp_path, monkeypatch):
    def act(_):
        for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:
            os.kill(process.pid, signal.SIGTERM)

    at_step(monkeypatch, 3, act)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, num_workers=1)
    assert stop.value.code == 143
    monkeypatch.undo()
    assert_same_run(whole, run(tmp_path, resume="latest"))


# ---------------------------------------------------------------- cached latents


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> Path:
    """A folder with the first embedded images and their latents, "mine"."""
    folder = tmp_path_factory.mktemp("cached")
    embedded = ImageH5Dataset(ROOT / "data_small" / "train" / "images.h5")
    images = torch.stack([embedded[i][0] for i in range(40)]).numpy()
    write_images_h5(folder / "images.h5", images, np.array([embedded[i][1] for i in range(40)]))
    cache_latents(load_vae("tiny"), ImageH5Dataset(folder / "images.h5"), folder / "mine.h5")
    return folder


@pytest.mark.parametrize("encoder", ["tiny", "none"])
def test_cached_latents_give_the_run_of_the_frozen_vae(tmp_path, cached, encoder):
    options = {"command": "ldm", "max_train_steps": 2, "enc_type": encoder, "data_dir": str(cached)}
    encoded, read = (
        run(tmp_path, "encoded", **options),
        run(tmp_path, "read", vae_latents_name="mine", **options),
    )
    for one, other in zip(encoded.metrics(), read.metrics(), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_another_frozen_vae_is_noticed_on_resuming(tmp_path, capsys):
    run(tmp_path, command="ldm", max_train_steps=2, enc_type="none")
    words = ["--enc-type", "none", "--resume", "latest", "--max-train-steps", "3"]
    text = refused(
        capsys, tmp_path, *words, "--exp-name", "run", "--vae-ckpt", "tiny-e2e", command="train-ldm"
    )
    assert "is of a run on another VAE than tiny-e2e" in text


def test_going_on_from_another_folder_in_the_official_way(tmp_path):
    run(tmp_path, "first", max_train_steps=2)
    official = {"resume_step": 2, "continue_train_exp_dir": str(tmp_path / "first")}
    folder = run(tmp_path, "second", max_train_steps=3, **official)
    assert [line["step"] for line in folder.metrics()] == [3] and list(folder.checkpoints()) == [3]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--vae-ckpt", "tiny-e2e"], "was cached by another VAE (other weights)"),
        (["--resolution", "64"], "have shape (8, 8, 8) and not (8, 16, 16)"),
        (["--vae-latents-name", "yours"], "yours.h5 does not exist"),
    ],
)
def test_cached_latents_that_do_not_fit_are_refused(tmp_path, cached, capsys, words, sentence):
    words = ["--vae-latents-name", "mine", "--data-dir", str(cached), "--enc-type", "none", *words]
    assert sentence in refused(capsys, tmp_path, *words, command="train-ldm")


def test_irepa_by_its_two_switches(whole, tmp_path):
    folder = run(tmp_path, projector="conv", spatial_norm=0.6, max_train_steps=2)
    assert load_sit(folder.path).config.projector == "conv"
    normalised = run(tmp_path, "targets", spatial_norm=1.0, max_train_steps=2).metrics()[0]
    plain = whole.metrics()[0]
    assert normalised["denoising"] == plain["denoising"] and normalised["sit_align"] != pytest.approx(
        plain["sit_align"], abs=1e-3
    )


# ---------------------------------------------------------------- memory and precision


@pytest.mark.parametrize("command", ["vae", "ldm"])
def test_a_sample_grid_keeps_no_activations(tmp_path, monkeypatch, command):
    kept = []
    monkeypatch.setattr(training, "save_grid", lambda *_: kept.append(torch.is_grad_enabled()))
    run(tmp_path, command=command, max_train_steps=1, sampling_steps=1, sample_images=2)
    assert kept == [False]


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batches": 2},
        {"gradient_checkpointing": True},
        {"batch_size": 2, "gradient_accumulation_steps": 2},
    ],
)
def test_saving_memory_keeps_the_trajectory(whole, tmp_path, changes):
    saving = run(tmp_path, **changes)
    for one, other in zip(saving.metrics(), whole.metrics(), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


def test_other_parts_for_the_discriminator_are_told_of(tmp_path, caplog):  # D10
    options = {"loss_cfg_path": "configs/l1_lpips_kl_gan.yaml", "max_train_steps": 2}
    run(tmp_path, **options)
    run(tmp_path, resume="latest", **options)
    assert "BatchNorm" not in caplog.text
    run(tmp_path, resume="latest", micro_batches=2, **options)
    assert "--micro-batches is 2 from here on, and was 1" in caplog.text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(tmp_path, precision):
    straight = run(tmp_path, "straight", mixed_precision=precision, max_train_steps=3, checkpointing_steps=1)
    assert all(np.isfinite(record["sit_total"]) for record in straight.metrics())
    assert ("loss_scale_vae" in straight.metrics()[0]) == (precision == "fp16")
    run(tmp_path, "parts", mixed_precision=precision, max_train_steps=1, checkpointing_steps=1)
    parts = run(
        tmp_path,
        "parts",
        mixed_precision=precision,
        max_train_steps=3,
        checkpointing_steps=1,
        resume="latest",
    )
    assert parts.metrics() == straight.metrics()


def test_loss_precision_counts_in_mixed_precision_alone(tmp_path):
    given = {"mixed_precision": "bf16", "max_train_steps": 1}
    exact, rounded = (
        run(tmp_path, loss, loss_precision=loss, **given).metrics()[0] for loss in ("float32", "autocast")
    )
    assert exact["reconstruction"] == rounded["reconstruction"]
    assert exact["perceptual"] != rounded["perceptual"] == pytest.approx(exact["perceptual"], rel=0.05)


def test_without_a_compiler_it_trains_uncompiled(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        torch, "compile", lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler\nat all"))
    )
    run(tmp_path, compile=True, max_train_steps=1)
    said = "training goes on without --compile: RuntimeError: no compiler"
    assert said in caplog.messages


def test_the_layout_of_convolutions_does_not_matter(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build, "conv_layout", lambda *_: torch.contiguous_format)
        run(tmp_path, max_train_steps=2)
    resumed = run(tmp_path, resume="latest", max_train_steps=4)  # goes on in channels last
    for one, other in zip(resumed.metrics(), whole.metrics()[:4], strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        ({}, 4),  # the VAE's two halves, and a block of SiT, of which all are alike, frozen and training
        ({"gradient_checkpointing": True}, 4),
        ({"micro_batches": 3}, None),  # of one image, one, and two
    ],
)
def test_a_few_graphs_are_compiled_and_none_again(monkeypatch, changes, graphs):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(training, "try_compile", lambda _: None)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    state, (x, targets, draws) = make_state(), make_batch()
    state.mechanics = Mechanics(**changes)
    set_gradient_checkpointing(state.mechanics.gradient_checkpointing, state.vae, state.sit)
    training._compile(state, torch.device("cpu"))
    label_drop, before, seen = torch.zeros(len(x), dtype=torch.bool), counters["unique_graphs"], set()
    try:
        for again in (False, True, True):
            with torch._dynamo.config.patch(error_on_recompile=again):
                training.all_updates(
                    state, x, LABELS, targets, training.Draws(**draws, label_drop=label_drop)
                )
            seen.add(counters["unique_graphs"] - before)
        assert seen == {graphs} if graphs else len(seen) == 1
    finally:
        torch._dynamo.reset()


@pytest.mark.skipif(compile_obstacle(torch.device("cpu")) is not None, reason="there is no C++ compiler")
def test_a_compiled_run_is_the_run_and_compiles_nothing_after_its_first_step(tmp_path):
    """By torch's own compiler and log, as a user would see it."""
    plain = run(tmp_path, "plain", max_train_steps=3)
    words = "train-repae --vae tiny --cpu --compile --batch-size 4 --max-train-steps 3 --sampling-steps 0"
    done = subprocess.run(
        [sys.executable, "-m", "repae_lite", *words.split(), "--exp-name=run", f"--output-dir={tmp_path}"],
        env=os.environ | {"TORCH_LOGS": "recompiles", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert any((tmp_path / "compiled").rglob("*.so")), "nothing was compiled"
    first, said, later = done.stderr.partition("step 1 of 3")
    # In the first step a block is compiled twice: frozen in the VAE's update, and training.
    assert "without --compile" not in first and first.count("Recompiling") == 1
    assert said and "step 3 of 3" in later and "Recompiling" not in later
    for one, other in zip(plain.metrics(), RunFolder(tmp_path / "run").metrics(), strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-4)


# ---------------------------------------------------------------- the collapse guard


def reports(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "run" / "divergence").glob("*.json"))]


def test_a_gradient_that_is_not_finite_halts_before_it_does_harm(tmp_path, caplog):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, learning_rate=1e30, lr_warmup_steps=0, max_train_steps=20)
    assert stop.value.code == 3
    (report,) = reports(tmp_path)
    assert report["action"] == "halted" and re.search("gradient norm of .* is (nan|inf)", report["finding"])
    assert report["history"] and "collapse guard" in caplog.text


def test_a_guard_that_is_asked_a_step_later_saves_no_damage(tmp_path, monkeypatch):
    """As on a GPU: optimisers that leave out a bad update by themselves, and a host that does not wait."""
    monkeypatch.setattr(build, "fused_optimizer", lambda _: True)
    updates, runs = training.all_updates, {}
    for ahead in (False, True):
        bad = [5, 8]

        def call(state, x, *rest, bad=bad):
            if state.step + 1 in bad[:1]:
                bad.pop(0)
                x = x * float("inf")
            return updates(state, x, *rest)

        monkeypatch.setattr(training, "all_updates", call)
        monkeypatch.setattr(training, "runs_ahead", lambda _, ahead=ahead: ahead)
        options = {"max_train_steps": 8, "checkpointing_steps": 4, "logging_steps": 4}
        runs[ahead] = run(tmp_path / str(ahead), on_divergence="rollback", **options)
        first, second = reports(tmp_path / str(ahead))
        assert (first["step"], first["since"], first["last_good_checkpoint"]) == (5 + ahead, 5, 4)
        assert (second["step"], second["since"], second["last_good_checkpoint"]) == (8, 8, 4)
        assert "gradient norm of AutoencoderKL is nan: lower the learning rate" in first["finding"]
        assert [line["step"] for line in first["history"]] == [1, 2, 3, 4]
    assert runs[False].metrics() == runs[True].metrics()
    at_once, later = (weights(runs[ahead], 8) for ahead in (False, True))
    assert at_once and all(later[name].isfinite().all() for name in at_once)
    assert all(torch.equal(later[name], tensor) for name, tensor in at_once.items())


@pytest.mark.parametrize(
    ("changes", "patch", "message"),
    [
        (
            {"divergence_patience": 2},
            {"grad_norm_vae": torch.zeros(())},
            "gradient norm of vae has been 0 since step",
        ),
        ({}, {"denoising": torch.tensor(float("nan"))}, "the loss denoising is nan at step 3"),
        ({}, {"latent_variance": torch.tensor(1e-3)}, "spatial variance of the latents is 0.001 at step 3"),
    ],
)
def test_each_collapse_halts(tmp_path, monkeypatch, changes, patch, message):
    step = training.Trainer._step

    def call(self, batch):
        losses = step(self, batch)
        return losses | patch if self.state.step >= 3 else losses

    monkeypatch.setattr(training.Trainer, "_step", call)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, **changes)
    assert stop.value.code == 3
    (report,) = reports(tmp_path)
    assert message in report["finding"] and report["since"] == 3 and report["last_good_checkpoint"] == 2


def test_a_falling_loss_scale_halts(tmp_path, monkeypatch):
    scales = iter([2.0**-i for i in range(9)])
    monkeypatch.setattr(ParallelMechanics, "scales", lambda self: {"sit": torch.tensor(next(scales))})
    monkeypatch.setattr(TrainConfig, "check_precision", lambda *_: None)  # as if this were fp16
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, divergence_falls=2)
    assert stop.value.code == 3
    assert "loss scale of sit has fallen 3 times since step 2" in reports(tmp_path)[0]["finding"]


def fail_once(monkeypatch, step: int) -> None:
    failures = []

    def act(losses):
        if not failures:
            failures.append(step)
            raise FloatingPointError("the gradient norm of SiT is nan")

    at_step(monkeypatch, step, act)


def test_rolling_back_halves_the_learning_rates_and_goes_on(tmp_path, monkeypatch, whole):
    fail_once(monkeypatch, 5)
    folder = run(tmp_path, on_divergence="rollback")
    (report,) = reports(tmp_path)
    assert report["action"].startswith("rolled back to step 4")
    records = folder.metrics()
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[:4] == whole.metrics()[:4]
    for mine, theirs in zip(records[4:], whole.metrics()[4:], strict=True):
        assert mine["lr_sit"] == theirs["lr_sit"] / 2 and mine["lr_vae"] == theirs["lr_vae"] / 2
    monkeypatch.undo()
    assert_same_run(folder, run(tmp_path, on_divergence="rollback", resume="latest"))


def test_a_run_killed_when_it_has_rolled_back_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    options = {"on_divergence": "rollback", "checkpointing_steps": 4}
    with monkeypatch.context() as patch:
        fail_once(patch, 5)
        whole = run(tmp_path / "whole", **options)

    def killed(self, *given, roll_back=RunFolder.roll_back):
        roll_back(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        fail_once(patch, 5)
        patch.setattr(RunFolder, "roll_back", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **options)
    folder = run(tmp_path, resume="latest", max_train_steps=5, **options)  # which ends before the next is due
    assert not folder.rollback_path.exists()  # the checkpoint of step 5 knows
    assert_same_run(whole, run(tmp_path, resume="latest", **options))


def test_a_rollback_to_the_very_beginning_is_possible(tmp_path, monkeypatch):
    fail_once(monkeypatch, 1)
    folder = run(tmp_path, on_divergence="rollback", max_train_steps=2)
    assert reports(tmp_path)[0]["action"].startswith("rolled back to step 0")
    assert folder.metrics()[0]["lr_sit"] == pytest.approx(1e-3 / 50 / 2)


def test_rollbacks_end(tmp_path, monkeypatch):
    at_step(
        monkeypatch, 3, lambda _: (_ for _ in ()).throw(FloatingPointError("the gradient norm of SiT is nan"))
    )
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, on_divergence="rollback")
    assert stop.value.code == 3 and reports(tmp_path)[0]["rollbacks"] == 3


def test_the_guard_can_be_switched_off(tmp_path):
    folder = run(tmp_path, on_divergence="off", learning_rate=1e30, lr_warmup_steps=0, max_train_steps=5)
    assert folder.metrics()[-1]["step"] == 5 and not reports(tmp_path)


# ---------------------------------------------------------------- refusals


def refused(capsys, tmp_path: Path, *words: str, command: str = "train-repae", lines: int | None = 1) -> str:
    """The sentence with which a command is refused."""
    capsys.readouterr()
    assert (
        main(
            [
                command,
                "--vae",
                "tiny",
                "--output-dir",
                str(tmp_path),
                "--max-train-steps",
                "1",
                "--batch-size",
                "4",
                *words,
            ]
        )
        == 2
    )
    captured = capsys.readouterr()
    assert lines in (None, captured.err.count("\n")) and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch-size 7000", "a step takes 7000 images but the data has 6000"),
        ("--micro-batches 5", "4 images per process cannot be cut into 5 micro-batches"),
        ("--data-dir nowhere", "there is no image file or folder nowhere"),
        ("--resolution 64", "the tiny encoder takes 32-pixel images|have 32 × 32 pixels and not 64 × 64"),
        ("--shard", "--shard cuts SiT into a part for each process, and there is one"),
        ("--shard --on-divergence rollback", "--shard cannot roll back while it runs"),
        ("--shard --mixed-precision fp16", "--shard has no loss scale, as fp16 needs"),
        ("--num-classes 3", "the data has 10 classes but --num-classes is 3"),
        ("--model SiT-B/4", "tiny gives a token per 8x8 pixels"),
        ("--model SiT-Q/9", "unknown --model 'SiT-Q/9'"),
        ("--enc-type nobody", "unknown vision encoder 'nobody'"),
        ("--encoder-depth 99", "alignment depth 99 is outside 1 to 6"),
        ("--vae f8d4 --vae-ckpt tiny --resolution 32 --data-dir embedded", "is no f8d4 .*say --vae tiny"),
        ("--vae-ckpt nowhere.safetensors", "nowhere.safetensors"),
        ("--optimizer Magic", "unknown --optimizer 'Magic': choose one of"),
        ("--optimizer SGD --adam-beta1 0.5", "--adam-beta1 means nothing to SGD"),
        ("--disc-pretrained-ckpt x.pt", "has no adversarial loss"),
        ("--resume 7", "has no checkpoint of step 7: it has none"),
        ("--resume elsewhere", "there is no checkpoint at elsewhere"),
        ("--report-to wandb", "--report-to wandb needs the package wandb"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    text = refused(capsys, tmp_path, *words.split())
    assert re.search(message, text), text
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_files_that_are_no_data_are_refused(tmp_path, capsys):
    foreign = tmp_path / "images.h5"
    foreign.write_bytes(b"no HDF5 at all" * 100)
    assert "is not a whole HDF5 file" in refused(capsys, tmp_path, "--data-dir", str(foreign))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, tmp_path, "--data-dir", str(tmp_path / "empty"))
    bad = tmp_path / "disc.pt"
    bad.write_bytes(b"no weights")
    words = ["--loss-cfg-path", "l1_lpips_kl_gan.yaml", "--disc-pretrained-ckpt", str(bad)]
    assert "disc.pt is not a whole file of torch.save" in refused(capsys, tmp_path, *words)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_the_run_in_one_sentence(tmp_path, capsys, workers):
    for i in range(4):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (i, 0, 0)).save(path)
    (tmp_path / "images" / "a" / "2.png").write_bytes(
        b"broken"
    )  # none of the three that the fingerprint reads
    text = refused(
        capsys, tmp_path, "--data-dir", str(tmp_path / "images"), "--num-workers", str(workers), lines=None
    )
    assert (
        text.splitlines()[-1].startswith("repae train-repae: the image ")
        and "cannot be read" in text
        and "Traceback" not in text
    )
    # One that ignored the SIGTERM with which Python ends its children would be waited for for ever.
    assert not multiprocessing.active_children()


def test_a_run_is_not_overwritten_or_mixed_with_another(whole, tmp_path, capsys):
    folder = run(tmp_path, max_train_steps=2)
    before = folder.metrics_path.read_bytes(), sorted(folder.checkpoints_path.rglob("*"))
    again = ["--exp-name", "run", "--max-train-steps", "3"]
    assert "already holds a run, up to step 2: go on with --resume latest" in refused(
        capsys, tmp_path, *again
    )
    again += ["--resume", "latest"]
    assert "other options: --batch-size was 4 and is now 8 (1 in all)" in refused(
        capsys, tmp_path, *again, "--batch-size", "8"
    )
    with locked(folder.path / "lock"):
        assert "another run is writing into" in refused(capsys, tmp_path, *again)
    assert (folder.metrics_path.read_bytes(), sorted(folder.checkpoints_path.rglob("*"))) == before


def test_a_checkpoint_of_another_architecture_is_refused(whole, tmp_path, capsys):
    words = ["--resume", str(whole.checkpoints()[2]), "--exp-name", "new", "--num-classes", "12"]
    text = refused(capsys, tmp_path, *words)
    assert (
        "does not fit SiT: y_embedder.embedding_table.weight [11, 128] instead of [13, 128] (1 in all)"
        in text
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert "cannot write in" in refused(capsys, tmp_path)


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write in" in refused(capsys, tmp_path, "--output-dir", str(tmp_path / "file"))
