"""What a run tells while it runs: metrics.jsonl, a tracker, a progress bar; manifest.json: how it was made.

Times and memory are in the manifest and the bar only: metrics.jsonl holds nothing that differs between two
runs of one seed.
"""

import importlib.util
import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator
from tqdm import tqdm

from repae_lite import __version__
from repae_lite.training.config import TrainConfig, values
from repae_lite.training.run_folder import RunFolder
from repae_lite.utils import devices
from repae_lite.utils.files import set_aside, write_text
from repae_lite.utils.processes import together
from repae_lite.utils.progress import QUIET

logger = logging.getLogger(__name__)
SHOWN = ("sit_total", "sit_align", "vae_total", "reconstruction", "disc")  # losses on the bar
LOGINS = {
    "wandb": "log in with `wandb login`, or work without network by WANDB_MODE=offline",
    "trackio": "log in with `hf auth login` if it writes to a Space, and check TRACKIO_DIR",
    "tensorboard": "check that --logging-dir can be written",
}


def check_tracker(name: str) -> None:
    """Refuses a tracker that is not there.

    Raises:
        ValueError: it is not installed, or too new for the installed accelerate.
    """
    if name == "none":
        return
    found = map(importlib.util.find_spec, [name, "tensorboardX"] if name == "tensorboard" else [name])
    if not any(spec and spec.origin for spec in found):  # a folder named wandb, as it leaves, has no origin
        raise ValueError(
            f"--report-to {name} needs the package {name}: pip install {name}, or --report-to none"
        )
    if name not in accelerate.tracking.LOGGER_TYPE_TO_CLASS:
        raise ValueError(
            f"accelerate {accelerate.__version__} does not know {name}: pip install -U accelerate, or "
            "--report-to none"
        )


class RunLog:
    """Reports of one start of a run, from the first process; a context.

    Args:
        config: options.
        accelerator: processes and tracker.
        folder: where to write.
        parameters: numbers that train, by network.
        precision: "no", "fp16" or "bf16".
        first: finished steps at the start.
        last: finished steps at the end.

    Attributes:
        ended: why it ended, for the manifest.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        *,
        parameters: dict[str, int],
        precision: str,
        first: int,
        last: int,
    ):
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.main, self.ended, self.step, self.last = accelerator.is_main_process, None, first, last
        self.session = {"from_step": first, "started": datetime.now(UTC).isoformat(timespec="seconds")}
        self.manifest = {
            "config": values(config),
            "versions": {"repae_lite": __version__, "python": platform.python_version()}
            | {
                name: version(name)
                for name in ("torch", "torchvision", "numpy", "timm", "accelerate", "h5py")
            },
            "commit": commit(),
            "hardware": hardware(accelerator),
            "precision": precision,
            "batch": {
                "images_per_step": config.images_per_step,
                "batch_size": config.batch_size,
                "processes": accelerator.num_processes,
                "images_per_process": config.images_per_step // accelerator.num_processes,
            },
            "parameters": parameters,
        }
        self.sessions: list[dict] = []
        self.last_line = 0.0
        self.tracking = config.report_to != "none"

    @together()
    def __enter__(self) -> "RunLog":
        config, batch = self.config, self.manifest["batch"]
        if self.tracking:
            plain = {
                k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values(config).items()
            }
            # To tensorboard the project is the run's folder.
            project = config.exp_name if config.report_to == "tensorboard" else "repae_lite"
            options = _tracker_options(config, self.accelerator.logging_dir, self.main)
            try:
                self.accelerator.init_trackers(project, plain, options)
            except Exception as error:  # trackers raise kinds of their own: no login, no network, no disk
                raise ConnectionError(
                    f"--report-to {config.report_to} cannot start ({type(error).__name__}: "
                    f"{' '.join(str(error).split())}): {LOGINS[config.report_to]}, or leave it out "
                    "(metrics.jsonl is always written)"
                ) from None
        self.start = time.perf_counter()
        if self.main:
            try:
                self.sessions = self.folder.sessions()
            except (ValueError, OSError):
                set_aside(self.folder.path / "manifest.json", "tells of no run")
            self._write_manifest()
            accumulated = f" × {config.gradient_accumulation_steps} accumulated" * (
                config.gradient_accumulation_steps > 1
            )
            processes = f"{batch['processes']} process{'es' * (batch['processes'] > 1)}"
            logger.info(
                f"{self.folder.path}: a step is {batch['images_per_step']} images (--batch-size "
                f"{config.batch_size}{accumulated}), {batch['images_per_process']} on each of {processes}; "
                f"{self.accelerator.device}, precision {self.manifest['precision']}; step {self.step} of "
                f"{self.last}"
            )
        self.bar = tqdm(
            total=self.last,
            initial=self.step,
            desc=config.exp_name,
            unit="step",
            disable=None if self.main else True,
        )
        return self

    def passed(self, step: int) -> None:
        """A step was finished."""
        self.bar.update(step - self.step)
        self.step = step

    def log(self, step: int, record: dict[str, float]) -> None:
        """A step was finished, and this was measured."""
        self.passed(step)
        if self.main:
            self.folder.log({"step": step, **record})
        self._track(self.accelerator.log, record, step=step)
        shown = {name: f"{record[name]:.3f}" for name in SHOWN if name in record}
        self.bar.set_postfix(shown, refresh=False)
        now = time.perf_counter()
        if self.main and self.bar.disable and (now - self.last_line > QUIET or step == self.last):
            self.last_line = now
            losses = ", ".join(f"{name} {value}" for name, value in shown.items())
            logger.info(f"step {step} of {self.last}, {self._speed():.3g} steps/s, {losses}")

    def add(self, step: int, record: dict[str, float | str]) -> None:
        """Something more was measured after this step."""
        if self.main:
            self.folder.log({"step": step, **record})
            shown = ", ".join(
                f"{name} {value if isinstance(value, str) else f'{value:.4g}'}"
                for name, value in record.items()
            )
            logger.info(f"step {step}: {shown}")
        self._track(self.accelerator.log, record, step=step)

    def back_to(self, step: int) -> None:
        """The run was rolled back."""
        self.step = self.bar.n = step
        self.bar.refresh()

    def checkpointed(self) -> None:
        """Brings the manifest up to date."""
        if self.main:
            self._write_manifest()

    def __exit__(self, kind, error, _) -> None:
        self.bar.close()
        if self.main:
            self.ended = self.ended or (f"{kind.__name__}: {error}" if kind else "finished")
            self._write_manifest(quiet=kind is not None)  # a full disk has been told already, and better
            if kind is None:
                memory = f"{self.session['peak_memory_gib']:.2f} GiB"
                logger.info(f"{self.folder.path}: {self.ended} at step {self.step}, peak memory {memory}")
        self._track(self.accelerator.end_training)

    def _track(self, call: Callable, *args, **kwargs) -> None:
        """Tells the tracker; one that fails is left alone from then on."""
        if not self.tracking:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:  # of its own kinds
            self.tracking, kind = False, type(error).__name__
            logger.warning(
                f"{self.config.report_to} failed ({kind}: {error}): training goes on without it; "
                "metrics.jsonl has everything"
            )

    def _speed(self) -> float:
        return max(0, self.step - self.session["from_step"]) / (time.perf_counter() - self.start)

    def _write_manifest(self, *, quiet: bool = False) -> None:
        self.session |= {
            "to_step": self.step,
            "seconds": round(time.perf_counter() - self.start, 1),
            "steps_per_second": round(self._speed(), 4),
            "peak_memory_gib": round(peak_memory(self.accelerator.device), 3),
            "checkpoint": max(self.folder.checkpoints(), default=None),
            "ended": self.ended,
        }
        content = self.manifest | {"sessions": [*self.sessions, self.session]}
        path = self.folder.path / "manifest.json"
        try:
            write_text(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            if not quiet:
                logger.warning(f"{path} cannot be written ({error.strerror or error}): training goes on")


def _tracker_options(config: TrainConfig, folder: str, main: bool) -> dict:
    if config.report_to == "tensorboard":  # reads the accelerator's logging_dir itself
        return {}
    options = {"name": config.exp_name}
    if config.report_to == "wandb":
        options["dir"] = folder
        if main:
            Path(folder).mkdir(parents=True, exist_ok=True)  # it would fall back to a temporary folder
    return {config.report_to: options}


def peak_memory(device: torch.device) -> float:
    """The most so far, in GiB: of the GPU, or of this process on a CPU."""
    on_gpu = devices.peak_memory(device)
    if on_gpu is not None:
        return on_gpu / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def hardware(accelerator: Accelerator) -> dict:
    """Devices of this process's machine, without its name."""
    found = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "device": str(accelerator.device),
    }
    gpu = devices.gpu_properties(accelerator.device)
    if gpu:
        found |= {"gpu": gpu[0], "gpu_memory_gib": round(gpu[1] / 2**30, 1)}
    return found | {"processes": accelerator.num_processes, "torch_threads": torch.get_num_threads()}


def commit() -> str | None:
    """The checkout's commit, "+" if it has changes; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed, perhaps into another project's checkout
        return None
    try:
        found = [
            subprocess.run(
                ["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] + ("+" if found[1] else "")
