"""A run's folder: options, measurements, sample grids and checkpoints that are whole or not there.

    OUTPUT_DIR/EXP_NAME/
        args.json        the options
        manifest.json    versions, hardware, batch sizes, time and memory
        metrics.jsonl    one line per logged step, the same bytes however often the run was interrupted
        samples/         0000500.png …
        divergence/      reports of the collapse guard
        checkpoints/     0000500/ with sit, ema, vae, discriminator as safetensors and resume.pt;
                         or 0000500.pt, the official file

Taught in `reproduce/`. Reading a checkpoint runs no code: weights are safetensors, the rest is loaded with
weights_only.
"""

import argparse
import errno
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from repae_lite.checkpoints.find import checkpoints_in, files_in, pick_checkpoint
from repae_lite.checkpoints.models import save_sit, save_vae
from repae_lite.checkpoints.official import NETWORKS, read_official
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.files import atomic_path, write_text
from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.state_dicts import fill_module, read_weights, save_weights

OPTIMIZERS = {"sit": "opt", "vae": "opt_vae", "discriminator": "opt_disc"}  # ours -> official
# The official optimiser of the discriminator holds all of its loss module: a frozen number first, then the
# discriminator, then the perceptual network (LPIPS on VGG-16), which is frozen too.
FROZEN = {"discriminator": (1, 26 + 5)}  # parameters before and after those that train
EVIDENCE = "evidence"  # what a rollback discards, below divergence/


@dataclass
class Checkpoint:
    """What a run goes on from.

    Attributes:
        step: finished steps.
        networks: state dicts by name: sit, ema, vae, discriminator, as far as they train.
        optimizers: by network, and in each by parameter: {"exp_avg": …, "step": …}.
        extras: the rest, plain values: options, fingerprint of the data, loss scales, the guard; empty in the
            official code's files.
        path: where it was read.
    """

    step: int
    networks: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict[str, dict]]
    extras: dict = field(default_factory=dict)
    path: Path | None = None


class RunFolder:
    """One run's files. Only the first process writes.

    Args:
        path: the folder; nothing is made before something is written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"

    # ---------------------------------------------------------------- checkpoints

    def checkpoints(self) -> dict[int, Path]:
        """The whole checkpoints by step, first to last; of two kinds of one step, the folder."""
        return {step: self.path / name for step, name in checkpoints_in(files_in(self.path)).items()}

    def remove_leftovers(self) -> None:
        """Removes what killed writes left behind."""
        for partial in self.checkpoints_path.glob(".*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def save(
        self,
        step: int,
        networks: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        latent_stats: LatentStats | None,
        extras: dict,
        *,
        kind: str = "safetensors",
    ) -> Path:
        """Writes a checkpoint: it appears under its name when it is whole and on the disk.

        Args:
            step: finished steps.
            networks: by name.
            optimizers: by the name of their network.
            latent_stats: of the VAE's latents, where it is among the networks.
            extras: plain values, with "args".
            kind: "safetensors", "official" or "both".

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
        """
        named = {name: named_state(optimizer, networks[name]) for name, optimizer in optimizers.items()}
        path = self.checkpoints_path / f"{step:07d}"
        try:
            if kind != "official":
                self._save_folder(
                    path, networks, latent_stats, {"step": step, "optimizers": named, "extras": extras}
                )
            if kind != "safetensors":
                path = self._save_official(path.with_suffix(".pt"), step, networks, named, extras)
        except OSError as error:
            self.remove_leftovers()
            size = sum(_bytes(module.state_dict()) for module in networks.values()) + sum(
                map(_bytes, named.values())
            )
            last = max(self.checkpoints(), default=None)
            kept = "there is no earlier one" if last is None else f"the one of step {last} is whole"
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(
                f"cannot write the checkpoint of step {step} in {self.checkpoints_path} ({reason}): it needs "
                f"about {size * (1 + (kind == 'both')) / 1e9:.2g} GB; {kept}; make room, then go on with "
                "--resume latest"
            ) from None
        return path

    def _save_folder(
        self, path: Path, networks: dict[str, nn.Module], latent_stats: LatentStats | None, resume: dict
    ) -> None:
        partial = path.with_name(f".{path.name}.partial")
        partial.mkdir(parents=True)
        for name, module in networks.items():
            file = partial / f"{name}.safetensors"
            if isinstance(module, AutoencoderKL):
                save_vae(file, module, latent_stats)
            elif isinstance(module, SiT):
                save_sit(file, module)
            else:
                save_weights(file, module)
        with atomic_path(partial / "resume.pt") as file:
            _save_pickle(resume, file)
        _sync(partial)
        os.rename(partial, path)
        _sync(path.parent)

    def _save_official(
        self, path: Path, step: int, networks: dict[str, nn.Module], named: dict[str, dict], extras: dict
    ) -> Path:
        content = {NETWORKS[name]: module.state_dict() for name, module in networks.items()}
        for name, states in named.items():
            keys = [key for key, _ in networks[name].named_parameters()]
            before, after = FROZEN.get(name, (0, 0))
            content[OPTIMIZERS[name]] = {
                "state": {i: states[key] for i, key in enumerate(keys, before) if key in states},
                "param_groups": [
                    {**extras["groups"][name], "params": list(range(before + len(keys) + after))}
                ],
            }
        content |= {"args": argparse.Namespace(**extras["args"]), "steps": step, "repae_lite": extras}
        with atomic_path(path) as partial:
            _save_pickle(content, partial)
        _sync(path.parent)
        return path

    def prune(self, *, keep_last: int | None, milestone_steps: int, checkpointing_steps: int) -> None:
        """Removes old checkpoints: all but the last `keep_last` and the milestones.

        With None only those between the regular steps, which a signal caused.
        """
        steps = list(self.checkpoints())
        for step in steps[: -(keep_last or 1)]:
            milestone = milestone_steps and step % milestone_steps == 0
            if not milestone and (keep_last is not None or step % checkpointing_steps):
                self._discard(step)

    def _discard(self, step: int, to: Path | None = None) -> None:
        for path in (self.checkpoints_path / f"{step:07d}", self.checkpoints_path / f"{step:07d}.pt"):
            if not path.exists():
                continue
            if to is not None:
                to.mkdir(parents=True, exist_ok=True)
                os.replace(path, to / path.name)
            elif path.is_dir():
                hidden = path.with_name(f".{path.name}.partial")  # a folder half removed must not look whole
                os.rename(path, hidden)
                shutil.rmtree(hidden)
            else:
                path.unlink()

    def roll_back(self, step: int) -> None:
        """Moves later checkpoints to divergence/ and cuts off later metrics."""
        evidence = self.path / "divergence" / EVIDENCE
        shutil.rmtree(evidence, ignore_errors=True)  # of an earlier rollback
        for later in [s for s in self.checkpoints() if s > step]:
            self._discard(later, evidence)
        self.cut_metrics(step)

    # ---------------------------------------------------------------- metrics and reports

    def log(self, record: dict) -> None:
        """Appends a line to metrics.jsonl; floats come back to the bit, those that are not finite as null."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(_line(record))

    def sync_metrics(self) -> None:
        """Puts metrics.jsonl on the disk, before a checkpoint that relies on it."""
        if self.metrics_path.exists():
            with open(self.metrics_path, "rb+") as file:
                os.fsync(file.fileno())

    def cut_metrics(self, step: int) -> None:
        """Cuts off the lines after a step, and a half-written one."""
        if not self.metrics_path.exists():
            return
        size = 0
        with open(self.metrics_path, "rb+") as file:
            for line in file:
                try:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                        break
                except (ValueError, KeyError, TypeError):
                    break
                size += len(line)
            file.truncate(size)

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in self.metrics_path.read_text(encoding="utf-8").splitlines()]

    def report(self, step: int, content: dict) -> Path:
        """Writes a report of the collapse guard."""
        path = self.path / "divergence" / f"{step:07d}.json"
        write_text(path, json.dumps(_finite(content), indent=1) + "\n")
        return path


# ---------------------------------------------------------------- reading


def find_checkpoint(source: str, folder: RunFolder) -> Path | None:
    """The checkpoint that --resume means: "latest" (None if there is none), a step, or a path.

    Raises:
        ValueError: no such step; later checkpoints, which going on from an earlier one would contradict.
        FileNotFoundError: no such path.
    """
    own = folder.checkpoints()
    if source == "latest":
        return own[max(own)] if own else None
    if source.isdigit():
        step = int(source)
        if step not in own:
            raise ValueError(
                f"{folder.path} has no checkpoint of step {step}: it has {', '.join(map(str, own)) or 'none'}"
            )
        if step != max(own):
            raise ValueError(
                f"{folder.path} has a checkpoint of step {max(own)}, later than {step}: move it away, or "
                f"start another run with --resume {own[step]} and another --exp-name"
            )
        return own[step]
    path = Path(source)
    if path.is_dir() and not (path / "resume.pt").is_file():
        path = path / pick_checkpoint(files_in(path), None, path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {source}: give latest, a step, or the path of a checkpoint or run "
            "folder"
        )
    if path.resolve().parent == folder.checkpoints_path.resolve():
        return find_checkpoint(path.stem, folder)
    if own:
        raise ValueError(
            f"{folder.path} already holds a run, up to step {max(own)}: go on with --resume latest, or start "
            f"from {source} with another --exp-name"
        )
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder, or a file in the official layout.

    Raises:
        ValueError: something else, or a pickle that would run code.
    """
    if path.is_dir():
        resume = read_pickle(path / "resume.pt")
        networks = {file.stem: read_weights(file)[0] for file in sorted(path.glob("*.safetensors"))}
        return Checkpoint(resume["step"], networks, resume["optimizers"], resume["extras"], path)
    networks, content = read_official(path)
    if "steps" not in content:
        raise ValueError(f"{path} is no checkpoint of a training run: it has no steps")
    optimizers = {
        name: _by_parameter(content[key]["state"], name, networks[name], path)
        for name, key in OPTIMIZERS.items()
        if key in content
    }
    return Checkpoint(int(content["steps"]), networks, optimizers, content.get("repae_lite", {}), path)


def _by_parameter(states: dict[int, dict], network: str, state: dict[str, Tensor], path: Path) -> dict:
    """An official optimiser's states by the names of a network's parameters.

    They are numbered in the order of the parameters, which is that of the state dict without its buffers.

    Raises:
        ValueError: a number that is no parameter's.
    """
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    names = [name for name in state if not name.endswith(buffers)]
    first = FROZEN.get(network, (0, 0))[0]
    if states and not first <= min(states) <= max(states) < first + len(names):
        held, own = f"{min(states)} to {max(states)}", f"{first} to {first + len(names) - 1}"
        raise ValueError(
            f"{path} has optimiser states of parameters {held}, but its {network} has {own}: it is damaged"
        )
    return {names[number - first]: state for number, state in states.items()}


def _save_pickle(content: dict, path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # the only way in which its writer says that the disk is full
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def fill(modules: dict[str, nn.Module], checkpoint: Checkpoint) -> None:
    """Fills networks from a checkpoint, all or none; each stays in its mode.

    Raises:
        ValueError: a network is missing or of another architecture (the first three mismatches, with shapes).
    """
    for name in modules:
        if name not in checkpoint.networks:
            raise ValueError(f"{checkpoint.path} has no {name}: it is of another kind of training")
    for name, module in modules.items():
        training = module.training
        fill_module(module, checkpoint.networks[name], f"{name} of {checkpoint.path}").train(training)


def named_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict]:
    """An optimiser's state by the names of its parameters."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}


def fill_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, states: dict[str, dict], source: Path | None
) -> None:
    """Puts a `named_state` into an optimiser; states of parameters that do not train here are left out.

    Raises:
        ValueError: a parameter that trains has no state, or one of another shape.
    """
    parameters = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    found = {}
    for name, parameter in module.named_parameters():
        if parameter not in parameters or not states:
            continue
        if name not in states:
            raise ValueError(
                f"{source} has no optimiser state of {name}, which trains here: resume with the options of "
                "its run"
            )
        for value in states[name].values():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                shapes = f"{list(value.shape)} instead of {list(parameter.shape)}"
                raise ValueError(f"{source} has an optimiser state of another shape for {name}: {shapes}")
        found[parameters[parameter]] = states[name]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": found})


def _bytes(states: dict) -> int:
    """Size of the tensors in a nested dict."""
    values = states.values()
    return sum(
        v.numel() * v.element_size() if isinstance(v, Tensor) else _bytes(v) if isinstance(v, dict) else 0
        for v in values
    )


def _line(record: dict) -> str:
    return json.dumps(_finite(record)) + "\n"


def _finite(value):
    """Plain values with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def _sync(folder: Path) -> None:
    """Puts a folder's list of names on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest(steps: Iterable[int], before: int) -> int | None:
    """The last of these steps that comes before another."""
    return max((step for step in steps if step < before), default=None)
