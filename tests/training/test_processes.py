"""Two processes with half a batch each make the run of one process with all of it, under `accelerate launch`,
on CPUs.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import config_in, weights
from torch.testing import assert_close

from repae_lite.checkpoints.models import load_sit
from repae_lite.commands.main import main
from repae_lite.data.hdf5 import write_images_h5
from repae_lite.data.latents import CachedLatentsDataset
from repae_lite.training.run_folder import RunFolder
from repae_lite.training.trainer import train

ROOT = Path(__file__).resolve().parents[2]
# Not --cpu: without MPI that starts one process, however many are asked for.
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch",
    "--multi_gpu",
    "--num_processes",
    "2",
]
LAUNCH += [
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]
ELASTIC = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With plain SGD a weight's difference is a gradient's; Adam would blow up rounding where a gradient is nearly
# zero.
OPTIONS = {
    "optimizer": "SGD",
    "learning_rate": 0.1,
    "vae_learning_rate": 0.01,
    "disc_learning_rate": 0.01,
    "lr_warmup_steps": 0,
}
OPTIONS |= {
    "loss_cfg_path": "l1_lpips_kl_gan.yaml",
    "train_pos_embed": True,
    "max_train_steps": 3,
    "checkpointing_steps": 3,
}


def launch(folder: Path, **options) -> list[str]:
    """A command for two processes."""
    words = "train-repae --cpu --vae tiny --batch-size 4 --sampling-steps 0 --exp-name two".split() + [
        "--output-dir",
        str(folder),
    ]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return [*LAUNCH, "-m", "repae_lite", *words]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_two_processes_cache_the_latents_of_one(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (21, 3, 32, 32), dtype=np.uint8)
    write_images_h5(tmp_path / "images.h5", images, np.arange(21) % 3)
    words = "cache-latents --vae-arch=tiny --vae-ckpt-path=tiny --pproc-batch-size=4 --device=cpu".split()
    words.append(f"--data-dir={tmp_path}")
    assert main([*words, "--vae-latents-name=one"]) == 0
    done = subprocess.run(
        [*LAUNCH, "-m", "repae_lite", *words, "--vae-latents-name=two"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("21 latents of shape") == 1
    one, two = (CachedLatentsDataset(tmp_path / f"{name}.h5") for name in ("one", "two"))
    assert (
        one.names == two.names and list(one.labels) == list(two.labels) and one.fingerprint == two.fingerprint
    )
    for i in range(21):
        assert_close(one[i][0], two[i][0], rtol=0, atol=1e-5)
    stats = [torch.load(tmp_path / f"{name}-latents-stats.pt", weights_only=True) for name in ("one", "two")]
    for key in ("latents_scale", "latents_bias"):
        assert_close(stats[0][key], stats[1][key])


def test_two_processes_draw_the_images_of_one(tmp_path):
    train(config_in(tmp_path, "run", max_train_steps=1))
    words = "generate --device=cpu --num-fid-samples=21 --pproc-batch-size=4 --mode=sde --num-steps=3".split()
    words += [f"--exp-path={tmp_path / 'run'}"]
    for name, start in (("one", [sys.executable]), ("two", LAUNCH)):
        done = subprocess.run(
            [*start, "-m", "repae_lite", *words, f"--sample-dir={tmp_path / name}"],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("21 images of 32 × 32 pixels") == 1
    one, two = (next((tmp_path / name).glob("*.npz")) for name in ("one", "two"))
    with np.load(one) as first, np.load(two) as second:
        assert np.array_equal(first["arr_0"], second["arr_0"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[RunFolder, RunFolder]:
    """The same run by one process and by two."""
    folder = tmp_path_factory.mktemp("pair")
    done = subprocess.run(
        launch(folder, **OPTIONS), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 on each of 2 processes" in done.stderr
    train(config_in(folder, "one", cpu=True, **OPTIONS))
    return RunFolder(folder / "one"), RunFolder(folder / "two")


def test_losses_agree(pair):
    one, two = (folder.metrics() for folder in pair)
    assert len(one) == len(two) == 3
    for step, (mine, theirs) in enumerate(zip(one, two, strict=True), start=1):
        assert mine == pytest.approx(theirs, rel=1e-5 if step == 1 else 1e-4, abs=1e-6)


def test_weights_and_statistics_agree(pair):
    one, two = (weights(folder, 3) for folder in pair)
    assert one.keys() == two.keys()
    statistics = 0
    for name, tensor in one.items():
        if tensor.is_floating_point():
            assert_close(
                tensor, two[name], rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert torch.equal(tensor, two[name]), name
        statistics += name.endswith("running_var")
    assert statistics == 2 + 3  # SiT, its average, and three layers of the discriminator
    assert {"sit.pos_embed", "discriminator.main.0.weight", "vae.encoder.conv_in.weight"} <= one.keys()


@pytest.mark.timeout(1800)
def test_a_run_goes_on_with_another_number_of_processes_and_with_sit_in_pieces(pair, tmp_path):
    options = OPTIONS | {"max_train_steps": 4, "resume": "latest"}
    one, two = pair
    start = {"one": one, "from two": two, "pieces/two": two, "from one/two": one}
    for name, folder in start.items():
        shutil.copytree(folder.path, tmp_path / name)
    train(config_in(tmp_path, "one", cpu=True, **options))
    train(config_in(tmp_path, "from two", cpu=True, **options))
    more = {"shard": True, "sampling_steps": 4, "sample_images": 2, "checkpoint_format": "both"}
    for folder, given in (("pieces", more), ("from one", {})):
        done = subprocess.run(
            launch(tmp_path / folder, **options, **given), cwd=ROOT, env=environment(), capture_output=True,
            text=True, timeout=700,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    straight, *others = (RunFolder(tmp_path / name) for name in start)
    for other in others:
        assert_agree(straight, other, 4)
    pieces = others[1]
    assert (pieces.path / "samples" / "0000004.png").is_file()
    official = load_sit(pieces.checkpoints_path / "0000004.pt").state_dict()
    for name, tensor in weights(pieces, 4).items():
        network, _, name = name.partition(".")
        assert network != "ema" or torch.equal(official[name], tensor), name
    # From pieces to whole, in one process.
    options["max_train_steps"] = 5
    train(config_in(tmp_path, "one", cpu=True, **options))
    train(config_in(pieces.path.parent, "two", cpu=True, **options))
    assert_agree(straight, pieces, 5)


def assert_agree(straight: RunFolder, other: RunFolder, step: int) -> None:
    """The step's measurements and the weights after it, to rounding."""
    assert other.metrics()[-1]["step"] == step
    assert other.metrics()[-1] == pytest.approx(straight.metrics()[-1], rel=1e-4, abs=1e-6)
    one, two = weights(straight, step), weights(other, step)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_close(tensor, two[name], rtol=1e-4, atol=4e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_a_signal_to_the_launcher_ends_in_a_checkpoint(tmp_path):
    words = launch(tmp_path, max_train_steps=1000, checkpointing_steps=1000, logging_steps=1)
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    folder = RunFolder(tmp_path / "two")
    deadline = time.monotonic() + 240
    while not folder.metrics_path.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    (step,) = folder.checkpoints()
    assert folder.metrics()[-1]["step"] == step, errors[-2000:]


KILLED = """
import os, signal, sys
from repae_lite.commands import main
from repae_lite.training import trainer

# attempt: which process is killed, in which of its steps
kills = {0: (1, 1), 1: (0, 3)}
rank, count = kills.get(int(os.environ["TORCHELASTIC_RESTART_COUNT"]), (None, 0))
updates, calls = trainer.all_updates, 0

def call(*args, **kwargs):
    global calls
    calls += 1
    if os.environ["RANK"] == str(rank) and calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return updates(*args, **kwargs)

trainer.all_updates = call
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.timeout(1800)
def test_a_launcher_restarts_killed_processes_and_the_run_goes_on_to_the_bit(pair, tmp_path):
    """One is killed before there is a checkpoint; in the second attempt the other one, after two."""
    (tmp_path / "killed.py").write_text(KILLED)
    words = launch(tmp_path, **OPTIONS | {"checkpointing_steps": 1}, resume="latest")[len(LAUNCH) + 2 :]
    elastic = [*ELASTIC, "--max-restarts", "2", str(tmp_path / "killed.py")]
    done = subprocess.run(
        [*elastic, *words],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder, straight = RunFolder(tmp_path / "two"), pair[1]
    assert [session["from_step"] for session in folder.sessions()] == [0, 0, 2]
    assert folder.metrics_path.read_bytes() == straight.metrics_path.read_bytes()
    resumed, expected = weights(folder, 3), weights(straight, 3)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


@pytest.mark.parametrize("damaged", [False, True])
def test_a_refusal_is_said_once_and_ends_both(tmp_path, damaged):
    train(config_in(tmp_path, "two", max_train_steps=1))
    if damaged:
        (tmp_path / "two" / "checkpoints" / "0000001" / "resume.pt").write_bytes(b"half")
    done = subprocess.run(
        launch(tmp_path, max_train_steps=2, **({"resume": "latest"} if damaged else {})),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    sentence = "is not a whole file" if damaged else "already holds a run"
    assert done.returncode != 0 and done.stderr.count(sentence) == 1
    assert "gloo" not in done.stderr.lower() and "Connection" not in done.stderr
