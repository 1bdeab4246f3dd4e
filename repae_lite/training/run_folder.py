"""A run's folder: options, measurements, sample grids and checkpoints that are whole or not there.

    OUTPUT_DIR/EXP_NAME/
        args.json        the options
        manifest.json    versions, hardware, batch sizes, time and memory
        metrics.jsonl    one line per logged step, the same bytes however often the run was interrupted
        samples/         0000500.png …
        divergence/      reports of the collapse guard; what a rollback discarded
        checkpoints/     0000500/ with sit, ema, vae, discriminator as safetensors and resume.pt;
                         or 0000500.pt, the official file

A checkpoint that only a signal caused has a mark: interim.txt in its folder, or the comment of the .pt file,
which is a zip archive. It is the only one that is removed without --keep-last, once a later one is whole.

Taught in `reproduce/`. Reading a checkpoint runs no code: weights are safetensors, the rest is loaded with
weights_only.
"""

import argparse
import errno
import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from repae_lite.checkpoints.find import checkpoints_in, files_in, pick_checkpoint
from repae_lite.checkpoints.models import save_sit, save_vae
from repae_lite.checkpoints.official import NETWORKS, read_official
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.files import atomic_path, free_name, read_json, remove, set_aside, sync, write_text
from repae_lite.utils.locks import check_space, check_writable, free_space
from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.state_dicts import fill_module, read_weights, save_weights

OPTIMIZERS = {"sit": "opt", "vae": "opt_vae", "discriminator": "opt_disc"}  # ours -> official
# The official optimiser of the discriminator holds all of its loss module: a frozen number first, then the
# discriminator, then the perceptual network (LPIPS on VGG-16), which is frozen too.
FROZEN = {"discriminator": (1, 26 + 5)}  # parameters before and after those that train
EVIDENCE = "evidence"  # what a rollback discards, below divergence/
FULL = (errno.ENOSPC, errno.EDQUOT)
INTERIM = "interim.txt"
INTERIM_TEXT = "A signal caused this checkpoint: it goes once a later one is whole. Unmarked, it stays.\n"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq")  # states shaped as their parameter
logger = logging.getLogger(__name__)


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
        self.evidence_path = self.path / "divergence" / EVIDENCE
        self.rollback_path = self.path / "divergence" / "rollback"  # until the next checkpoint knows of it

    # ---------------------------------------------------------------- checkpoints

    def checkpoints(self) -> dict[int, Path]:
        """The whole checkpoints by step, first to last; of two kinds of one step, the folder."""
        return {step: self.path / name for step, name in checkpoints_in(files_in(self.path)).items()}

    def remove_leftovers(self) -> None:
        """Removes what killed writes left behind."""
        for partial in self.checkpoints_path.glob(".[0-9]*.partial"):
            remove(partial)

    def check_disk(self, size: int, *, planned: int, keep_last: int | None) -> None:
        """Refuses a disk that cannot hold what this start will write; of what may not fit later it warns.

        Args:
            size: bytes of a checkpoint.
            planned: checkpoints to come.
            keep_last: how many stay.

        Raises:
            OSError: no space for one checkpoint and those that stay beside it; files that cannot be renamed.
        """
        place = self.checkpoints_path if os.path.lexists(self.checkpoints_path) else self.path
        check_writable(place)
        count = min(planned, max(1, keep_last + 1 - len(self.checkpoints())) if keep_last else 1)
        needs = f"--keep-last {keep_last} needs" if count > 1 else "a checkpoint needs"
        check_space(place, count * size, needs)
        if not keep_last and planned * size > free_space(place):
            logger.warning(
                f"{planned} checkpoints are to come, of {size / 1e9:.2g} GB each, and {place} has "
                f"{free_space(place) / 1e9:.2g} GB free: --keep-last N would remove old ones"
            )

    def save(
        self,
        step: int,
        networks: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        latent_stats: LatentStats | None,
        extras: dict,
        *,
        kind: str = "safetensors",
        interim: bool = False,
    ) -> Path:
        """Writes a checkpoint: it appears under its name when it is whole and on the disk.

        Args:
            step: finished steps.
            networks: by name.
            optimizers: by the name of their network.
            latent_stats: of the VAE's latents, where it is among the networks.
            extras: plain values, with "args".
            kind: "safetensors", "official" or "both".
            interim: mark it as one that may go once a later one is whole.

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
        """
        named = {name: named_state(optimizer, networks[name]) for name, optimizer in optimizers.items()}
        path = self.checkpoints_path / f"{step:07d}"
        try:
            for other in self._of_step(step):
                set_aside(other, "is no whole checkpoint")
            if kind != "official":
                resume = {"step": step, "optimizers": named, "extras": extras}
                self._save_folder(path, networks, latent_stats, resume, interim)
            if kind != "safetensors":
                path = path.with_suffix(".pt")
                self._save_official(path, step, networks, named, extras, interim)
        except OSError as error:
            self.remove_leftovers()
            last = max(self.checkpoints(), default=None)
            kept = "there is no earlier one" if last is None else f"the one of step {last} is whole"
            remedy = _remedy(error)
            if error.errno in FULL:
                kept = f"it needs about {checkpoint_bytes(networks, optimizers, kind) / 1e9:.2g} GB; {kept}"
            raise OSError(
                f"cannot write the checkpoint of step {step} in {self.checkpoints_path} "
                f"({error.strerror or error}): {kept}; {remedy} go on with --resume latest"
            ) from None
        self.rollback_path.unlink(missing_ok=True)
        return path

    def _save_folder(
        self,
        path: Path,
        networks: dict[str, nn.Module],
        latent_stats: LatentStats | None,
        resume: dict,
        interim: bool,
    ) -> None:
        partial = free_name(path.with_name(f".{path.name}.partial"))
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
        if interim:
            (partial / INTERIM).write_text(INTERIM_TEXT, encoding="utf-8")
        sync(partial)
        os.rename(partial, path)
        sync(path.parent)

    def _save_official(
        self,
        path: Path,
        step: int,
        networks: dict[str, nn.Module],
        named: dict[str, dict],
        extras: dict,
        interim: bool,
    ) -> None:
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
            if interim:
                with zipfile.ZipFile(partial, "a") as archive:
                    archive.comment = INTERIM_TEXT.encode()
        sync(path.parent)

    def _of_step(self, step: int) -> list[Path]:
        """A checkpoint's folder, its official file, or both."""
        paths = (self.checkpoints_path / f"{step:07d}", self.checkpoints_path / f"{step:07d}.pt")
        return [path for path in paths if path.exists()]

    def prune(self, *, keep_last: int | None, milestone_steps: int) -> None:
        """Removes old checkpoints: all but the last `keep_last` and the milestones.

        With None only those with the mark of a signal. One that cannot be removed is left, with a warning.
        """
        for step in list(self.checkpoints())[: -(keep_last or 1)]:
            paths = self._of_step(step)
            milestone = milestone_steps and step % milestone_steps == 0
            if not milestone and (keep_last or all(map(_is_interim, paths))):
                for path in paths:
                    _discard(path)

    def roll_back(self, step: int, rollbacks: int) -> None:
        """Moves later checkpoints to divergence/ and cuts off later metrics.

        What it is about to do is written down first, so that a run killed from here on goes on as if it had
        not been: see `finish_rollback` and `rollbacks_since`.

        Args:
            step: of the checkpoint to go on from.
            rollbacks: of this run, this one included.

        Raises:
            OSError: a checkpoint cannot be moved.
        """
        write_text(self.rollback_path, json.dumps({"step": step, "rollbacks": rollbacks}) + "\n")
        if self.evidence_path.exists():
            set_aside(self.evidence_path, "is of an earlier rollback")
        self._discard_after(step)
        self.cut_metrics(step)

    def _discard_after(self, step: int) -> None:
        """Moves later checkpoints to divergence/, last to first: until all are, the newest is no good one."""
        self.evidence_path.mkdir(parents=True, exist_ok=True)
        late = [later for later in self.checkpoints() if later > step]
        for path in [path for later in reversed(late) for path in self._of_step(later)]:
            try:
                os.rename(path, self.evidence_path / path.name)
            except OSError as error:
                raise OSError(
                    f"cannot roll back: {path} cannot be moved to {self.evidence_path} ({error.strerror}): "
                    "move it, then go on with --resume latest"
                ) from None

    def _noted_rollback(self) -> dict[str, int]:
        """The last rollback, of which no checkpoint knows: its step, and the rollbacks so far; else zeros."""
        counts = {"step": _COUNT, "rollbacks": _COUNT}
        if not self.rollback_path.is_file():
            return dict.fromkeys(counts, 0)
        return _checked(read_json(self.rollback_path), counts, self.rollback_path)

    def finish_rollback(self) -> None:
        """Moves what a rollback that was killed has left; later checkpoints that know of it stay."""
        noted, last = self._noted_rollback(), max(self.checkpoints(), default=0)
        if noted["rollbacks"] and last > noted["step"]:
            with suppress(ValueError, FileNotFoundError):  # a damaged one is dealt with where it is resumed
                if read_checkpoint(self.checkpoints()[last]).extras.get("rollbacks", 0) < noted["rollbacks"]:
                    self._discard_after(noted["step"])

    def rollbacks_since(self, checkpoint: Path | None) -> int | None:
        """How often the run has rolled back, the last time to this checkpoint, which does not know of it."""
        noted = self._noted_rollback()
        own = noted["rollbacks"] and checkpoint == self.checkpoints().get(noted["step"])
        return noted["rollbacks"] if own else None

    # ---------------------------------------------------------------- metrics and reports

    def log(self, record: dict) -> None:
        """Appends a line to metrics.jsonl; floats come back to the bit, those that are not finite as null."""
        with self._history():
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(_line(record))

    def sync_metrics(self) -> None:
        """Puts metrics.jsonl on the disk, before a checkpoint that relies on it."""
        if self.metrics_path.exists():
            with self._history():
                sync(self.metrics_path)

    @contextmanager
    def _history(self) -> Iterator[None]:
        """Inside, what keeps metrics.jsonl from being written is said in a sentence."""
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write {self.metrics_path} ({error.strerror or error}): {_remedy(error)} go on with "
                "--resume latest"
            ) from None

    def cut_metrics(self, step: int) -> None:
        """Cuts off what comes after the last line up to a step: later lines, and a half-written one.

        Lines before that stay, even those that are no measurements. Where such lines are cut off, as all
        are of a file that an editor laid out anew, a copy of the file is kept.
        """
        if not self.metrics_path.exists():
            return
        size = end = odd = kept_odd = 0
        last = b"\n"
        with open(self.metrics_path, "rb+") as file:
            for line in file:
                size += len(line)
                record = _record(line)
                if record is None:
                    odd += line.endswith(b"\n")
                elif record["step"] <= step:
                    end, kept_odd, last = size, odd, line
            if odd > kept_odd:
                copy = free_name(self.metrics_path)
                shutil.copyfile(self.metrics_path, copy)
                logger.warning(
                    f"{self.metrics_path} has {odd - kept_odd} lines at its end that are no measurements: "
                    f"they are cut off, and all of it is kept as {copy.name}"
                )
            file.truncate(end)
            if not last.endswith(b"\n"):  # as an editor leaves it
                file.seek(end)
                file.write(b"\n")
        if kept_odd:
            logger.warning(f"{self.metrics_path} has {kept_odd} lines that are no measurements: they stay")

    def metrics(self) -> list[dict]:
        """The measurements in metrics.jsonl."""
        return list(filter(None, map(_record, self.metrics_path.read_bytes().splitlines())))

    def sessions(self) -> list[dict]:
        """What manifest.json tells of this run's starts; none without it.

        Raises:
            ValueError: it is something else.
        """
        path = self.path / "manifest.json"
        found = read_json(path).get("sessions") if path.exists() else []
        if not isinstance(found, list) or not all(isinstance(session, dict) for session in found):
            raise ValueError(f"{path} tells of no run: restore it")
        return found

    def lost_checkpoint(self) -> int | None:
        """The step of the last checkpoint that manifest.json tells of, where there is none at all."""
        if self.checkpoints():
            return None
        try:
            found = [session.get("checkpoint") for session in self.sessions()[-1:]]
        except (ValueError, OSError):
            return None
        return next((step for step in found if isinstance(step, int)), None)

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
    if source.isdecimal() and len(source) < 20:  # more digits are no number to Python
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
    if path.name == "checkpoints" and path.is_dir() and not checkpoints_in(files_in(path)):
        path = path.parent
    if path.is_file() and (path.suffix == ".safetensors" or path.name == "resume.pt"):
        raise ValueError(
            f"{source} is only a part of a checkpoint: give its folder, as in RUN/checkpoints/0050000"
        )
    if path.is_dir() and not any(path.glob("*.safetensors")) and not (path / "resume.pt").is_file():
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


# What a checkpoint holds beside the networks: names, and the types of their values.
_COUNT = Annotated[int, Field(ge=0)]
_STATES = dict[str, dict[str, dict[str, Any]]]  # by network, parameter and name
_RESUME = {"step": _COUNT, "optimizers": _STATES, "extras": dict[str, Any]}
_OFFICIAL = {"state": dict[int, dict[str, Any]]}
_EXTRAS = dict.fromkeys(("args", "fixed", "vae_loss"), dict[str, Any])
_EXTRAS |= {"rollbacks": _COUNT, "guard": dict[str, Any], "scalers": dict[str, dict[str, Any]]}
_GUARD = {"zero_since": dict[str, int], "scales": dict[str, float], "falling": dict[str, list[int]]}
_GUARD |= {"first_variance": float | None}
_SCALER = {"scale": Annotated[float, Field(gt=0)], "growth_factor": float, "backoff_factor": float}
_SCALER |= {"growth_interval": int, "_growth_tracker": int}


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint folder, or a file in the official layout.

    Raises:
        FileNotFoundError, ValueError: something else, or a pickle that would run code; a piece is missing or
            damaged.
    """
    if path.is_dir():
        resume = _checked(read_pickle(path / "resume.pt"), _RESUME, path / "resume.pt")
        networks = {file.stem: read_weights(file)[0] for file in sorted(path.glob("*.safetensors"))}
        step, optimizers, extras = (resume[name] for name in _RESUME)
    else:
        networks, content = read_official(path)
        if "steps" not in content:
            raise ValueError(f"{path} is no checkpoint of a training run: it has no steps")
        step = _checked(content, {"steps": _COUNT}, path)["steps"]
        extras = _checked({"repae_lite": {}} | content, {"repae_lite": dict[str, Any]}, path)["repae_lite"]
        optimizers = {
            name: _by_parameter(_checked(content[key], _OFFICIAL, path)["state"], name, networks[name], path)
            for name, key in OPTIMIZERS.items()
            if key in content and name in networks
        }
    _checked(extras, {name: kind for name, kind in _EXTRAS.items() if name in extras}, path)
    if "guard" in extras:
        _checked(extras["guard"], _GUARD, path)
    for scaler in extras.get("scalers", {}).values():
        _checked(scaler, _SCALER, path)
    return Checkpoint(step, networks, optimizers, extras, path)


def _checked(values: object, kinds: dict[str, Any], where: Path) -> dict:
    """A dict in which these names have values of these types.

    Raises:
        ValueError: one of them is missing or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is damaged: it holds a {type(values).__name__} and not a dict")
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"{where} is damaged: it has no {name}")
        try:
            TypeAdapter(kind).validate_python(values[name], strict=True)
        except ValidationError as errors:
            error = errors.errors()[0]
            place = ".".join(map(str, (name, *error["loc"])))
            raise ValueError(f"{where} is damaged: {place} is wrong ({error['msg']})") from None
    return values


@contextmanager
def with_way_out(path: Path, *, own: bool) -> Iterator[None]:
    """Inside, what is wrong with a run's checkpoint is said together with the one to go on from instead.

    Args:
        path: the checkpoint.
        own: whether it is of the run that goes on from it.

    Raises:
        ValueError: what was wrong, and the way out.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if path.parent.name != "checkpoints" or not path.stem.isdecimal():
            raise
        head, _, advice = str(error).rpartition(": ")
        # A run's own file cannot be got again.
        fault = head if head and ("again" in advice or "check the path" in advice) else str(error)
        whole = _whole_before(path)
        if whole is None:
            way = f"no earlier one in {path.parent} is whole"
            way += ": start anew with another --exp-name" if own else ""
        elif own:
            way = f"{whole} is whole: move {path} away, then go on with --resume latest"
        else:
            way = f"{whole} is whole: give --resume {whole}"
        raise ValueError(f"{fault}; {way}") from None


def _whole_before(path: Path) -> Path | None:
    """The newest whole checkpoint beside one that is not, of the same step in the other kind or earlier."""
    earlier = RunFolder(path.parents[1]).checkpoints()
    twin = [path.with_suffix(".pt")] if path.is_dir() else []
    for other in [*twin, *(earlier[step] for step in sorted(earlier, reverse=True) if step < int(path.stem))]:
        try:
            read_checkpoint(other)
        except (ValueError, OSError):
            continue
        return other
    return None


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
    with open(path, "wb") as file:  # given a path, PyTorch does not say why it could not write
        torch.save(content, file)


def fill(modules: dict[str, nn.Module], checkpoint: Checkpoint) -> None:
    """Fills networks from a checkpoint, all or none; each stays in its mode.

    Raises:
        ValueError: a network is missing or of another architecture (the first three mismatches, with shapes).
    """
    for name in modules:
        if name not in checkpoint.networks:
            raise ValueError(
                f"{checkpoint.path} has no {name}: it is of another kind of training, or incomplete"
            )
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
        ValueError: a parameter that trains has no state, or one of another shape or type.
    """
    needed = {"step", *MOMENTS[:2]} if "betas" in optimizer.defaults else set()
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
        state = states[name]
        if missing := needed - state.keys():
            raise ValueError(f"{source} is damaged: its optimiser state of {name} has no {min(missing)}")
        for key, value in state.items():
            sized = isinstance(value, Tensor) and (value.ndim or key in MOMENTS)
            if sized and value.shape != parameter.shape:
                shapes = f"{list(value.shape)} instead of {list(parameter.shape)}"
                raise ValueError(f"{source} has an optimiser state of another shape for {name}: {shapes}")
            if not _is_state(key, value):
                raise ValueError(f"{source} is damaged: its optimiser state {key} of {name} is no number")
        found[parameters[parameter]] = state
    optimizer.load_state_dict(optimizer.state_dict() | {"state": found})
    for parameter, state in optimizer.state.items():  # fused kernels want them to lie in memory alike
        for key, value in state.items():
            same = isinstance(value, Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_state(key: str, value: object) -> bool:
    """Whether an optimiser can go on from this: a tensor of real numbers, or a finite number that counts."""
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and not value.is_meta and not value.is_complex()
        return plain and (value.is_floating_point() if key in MOMENTS else bool(value.isfinite().all()))
    if key in MOMENTS:
        return key == "momentum_buffer" and value is None  # SGD without momentum
    return isinstance(value, int | float) and math.isfinite(value)


def checkpoint_bytes(
    networks: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], kind: str
) -> int:
    """About how much space a checkpoint takes; for `kind` see `RunFolder.save`."""
    tensors = [tensor for module in networks.values() for tensor in module.state_dict().values()]
    for optimizer in optimizers.values():
        moments = 2 if "betas" in optimizer.defaults else 0
        tensors += [p for group in optimizer.param_groups for p in group["params"]] * moments
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) * (1 + (kind == "both"))


def _remedy(error: OSError) -> str:
    """What to do before going on, as far as the system says why it refused."""
    return "make room, then" if error.errno in FULL else "once files can be written there again"


def _is_interim(path: Path) -> bool:
    """Whether a checkpoint has the mark of one that a signal caused."""
    if path.is_dir():
        return (path / INTERIM).is_file()
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == INTERIM_TEXT.encode()
    except (OSError, zipfile.BadZipFile):
        return False


def _discard(path: Path) -> None:
    """Removes a checkpoint, under another name: one half removed must not look whole."""
    hidden = free_name(path.with_name(f".{path.name}.partial"))
    try:
        os.rename(path, hidden)
    except OSError as error:
        logger.warning(f"{path} cannot be removed ({error.strerror}): it goes on taking space")
    else:
        remove(hidden)


def _record(line: bytes) -> dict | None:
    """A line of metrics.jsonl, or None for one that is no measurement."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _line(record: dict) -> str:
    return json.dumps(_finite(record)) + "\n"


def _finite(value):
    """Plain values with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def newest(steps: Iterable[int], before: int) -> int | None:
    """The last of these steps that comes before another."""
    return max((step for step in steps if step < before), default=None)
