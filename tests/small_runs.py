"""Training runs of six steps at the embedded scale, for the tests of several files."""

from pathlib import Path

import torch

from repae_lite.training.config import TrainConfig
from repae_lite.training.run_folder import RunFolder
from repae_lite.training.trainer import train
from repae_lite.utils.state_dicts import read_weights

STEPS = 6


def config_in(folder: Path, name: str = "run", *, command: str = "repae", **changes) -> TrainConfig:
    """A run of six steps with four images each, a checkpoint after every second one, and no samples."""
    options = {
        "vae": "tiny",
        "batch_size": 4,
        "max_train_steps": STEPS,
        "checkpointing_steps": 2,
        "sampling_steps": 0,
    }
    return TrainConfig.build(command, output_dir=str(folder), exp_name=name, **options | changes)


def run(folder: Path, name: str = "run", **changes) -> RunFolder:
    config = config_in(folder, name, **changes)
    train(config)
    return RunFolder(config.folder)


def weights(folder: RunFolder, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Every number of a checkpoint's networks."""
    found = {}
    for file in sorted((folder.checkpoints_path / f"{step:07d}").glob("*.safetensors")):
        found |= {f"{file.stem}.{name}": tensor for name, tensor in read_weights(file)[0].items()}
    return found


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    """To the bit: all measurements and the last weights."""
    assert one.metrics_path.read_bytes() == other.metrics_path.read_bytes()
    first, second = weights(one), weights(other)
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
