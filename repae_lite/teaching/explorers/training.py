"""A dashboard of run folders, also while they train, with buttons for a run started from the notebook."""

import contextlib
import fcntl
import html
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ipywidgets
import psutil

from repae_lite.teaching import run_plots
from repae_lite.teaching.explorers.parts import Board, Explorer, Progress

POLL = 5.0  # seconds between two looks at a run that is followed


def training_dashboard(
    runs: str | Path | Sequence[str | Path], command: Sequence[str] | None = None
) -> Explorer:
    """Curves, gradient norms, loss scales, latents' variance, samples and the guard's findings of runs.

    Args:
        runs: a run's folder, or several to compare; the first may not exist yet where there is a command.
        command: what trains the first run, as behind `repae`: then it can be started, paused, continued and
            stopped here. Stopped, it keeps a checkpoint; started again, it goes on from there.

    Raises:
        FileNotFoundError: a folder is not there.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    for folder in folders[1 if command else 0 :]:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no run folder {folder}: check the path")
    return _Dashboard(folders, Training(folders[0], command) if command else None).explorer


class _Dashboard:
    def __init__(self, folders: list[Path], training: "Training | None"):
        self.training, self.timer = training, None
        self.words, self.pictures = ipywidgets.HTML(), [Board() for _ in range(4)]
        above = os.path.commonpath([folder.resolve().parent for folder in folders])
        self.folders = {str(folder.resolve().relative_to(above)): folder for folder in folders}
        self.follow = ipywidgets.Checkbox(False, description="follow while it trains")
        self.quantity = ipywidgets.Dropdown(options=self._quantities(), description="compare runs by")
        run = ipywidgets.Dropdown(options=list(self.folders.items()))
        buttons = {"Look again": lambda: self.explorer.request()}
        if training:
            acts = {"Start or continue": training.start, "Pause": training.pause}
            acts |= {"Stop with a checkpoint": training.stop}
            buttons |= {name: partial(self._act, act) for name, act in acts.items()}
        controls, view = {"run": run, "quantity": self.quantity}, [self.follow, self.words, *self.pictures]
        self.explorer = Explorer(self.draw, controls, view, buttons=buttons)
        self.follow.observe(lambda _: self._tick(), names="value")

    def draw(self, progress: Progress, run: Path, quantity: str | None) -> None:
        words = [self.training.state] if self.training else []
        words += [f"the collapse guard: {finding}" for finding in findings(run)]
        figures = [run_plots.plot_losses(run), run_plots.plot_health(run), run_plots.plot_samples(run), None]
        if len(self.folders) > 1 and quantity:
            records = {name: run_plots.records(folder) for name, folder in self.folders.items()}
            figures[3] = run_plots.compare(records, quantity)
        if not any(figures):
            words.append(f"{run} has no measurements yet")
        self.words.value = "<br>".join(map(html.escape, words))
        what = (
            "losses",
            "gradient norms, latents' variance and loss scales",
            "samples",
            f"{quantity} of all",
        )
        for place, figure, name in zip(self.pictures, figures, what, strict=True):
            place.alt, place.pictures = f"{name}, {run.name}", [figure._repr_png_()] if figure else []
        if (found := self._quantities()) != self.quantity.options:
            self.quantity.options = found
            self.quantity.value = quantity if quantity in found else self.quantity.value

    def _quantities(self) -> tuple[str, ...]:
        """What the runs have measured, by now."""
        lines = (line for folder in self.folders.values() for line in run_plots.records(folder))
        return tuple(dict.fromkeys(key for line in lines for key in line if key not in ("step", "time")))

    def _act(self, act: Callable[[], None]) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            act()
        self.follow.value = True
        self.explorer.request()

    def _tick(self) -> None:
        """Looks again, and once more later, as long as one follows a run that goes on."""
        if self.timer:
            self.timer.cancel()
        if not self.follow.value or self.explorer.comm is None:  # closed
            return
        ended = self.training and self.training.process and not self.training.running
        self.explorer.request()  # also for the last time
        if ended:
            self.follow.value = False
            return
        self.timer = threading.Timer(POLL, self._tick)
        self.timer.daemon = True
        self.timer.start()


class Training:
    """One command of `repae` in a process of its own, which outlives the notebook.

    Args:
        folder: of the run.
        command: the words behind `repae`.
    """

    def __init__(self, folder: Path, command: Sequence[str]):
        self.folder, self.command, self.process = folder, list(command), None

    @property
    def running(self) -> bool:
        """Whether it runs, or is paused."""
        return self.process is not None and self.process.poll() is None

    @property
    def state(self) -> str:
        """A sentence for the reader."""
        if self.process is None:
            return "training, started elsewhere" if held(self.folder) else "not started here"
        if self.running:
            paused = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
            return "paused; its memory stays taken" if paused else "training"
        code = self.process.returncode
        if code == 0:
            return "finished"
        if code in (130, 143):
            saved = any((self.folder / "checkpoints").glob("[0-9]*"))
            return f"stopped, {'with a' if saved else 'before its first'} checkpoint"
        said = self._log.read_text(errors="replace").strip().splitlines()
        return f"ended with exit code {code}: {said[-1] if said else 'it said nothing'}"

    def start(self) -> None:
        """Starts it, lets it go on after a pause, or goes on from the last checkpoint."""
        if self.running:
            self.resume()
            return
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "repae_lite", *self.command, "--resume", "latest"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=os.name == "posix",
            )

    def pause(self) -> None:
        """Halts it, workers too, with all that it has in memory."""
        for process in self._all():
            process.suspend()

    def resume(self) -> None:
        """Lets it go on after `pause`."""
        for process in self._all():
            process.resume()

    def stop(self) -> None:
        """Asks it to save a checkpoint and end."""
        self.resume()
        if self.running:
            self.process.terminate()

    def _all(self) -> list[psutil.Process]:
        if not self.running:
            return []
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    @property
    def _log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")


def held(run: Path) -> bool:
    """Whether a process trains in a run's folder: it holds the lock, see `repae_lite.utils.locks`."""
    try:
        with open(run / "lock" / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def findings(run: Path) -> list[str]:
    """What the collapse guard found, by step."""
    found = []
    for path in sorted((run / "divergence").glob("*.json")):
        report = json.loads(path.read_text())
        found.append(f"step {int(path.stem):,}: {report['finding']}")
    return found
