"""A dashboard of run folders, also while they train, with buttons for a run started from the notebook."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import ipywidgets
import psutil

from repae_lite.teaching import run_plots
from repae_lite.teaching.explorers.parts import Explorer, Progress, picture, stacked

POLL = 5.0  # seconds between two looks at a run that is followed


def training_dashboard(
    runs: str | Path | Sequence[str | Path], command: Sequence[str] | None = None, *, every: float = POLL
) -> Explorer:
    """Curves, gradient norms, loss scales, latents' variance, samples and the guard's findings of runs.

    Args:
        runs: a run's folder, or several to compare; the first may not exist yet where there is a command.
        command: what trains the first run, as behind `repae`: then it can be started, paused, continued and
            stopped here. Stopped, it keeps a checkpoint; started again, it goes on from there.
        every: seconds between two looks while "follow" is ticked.

    Raises:
        FileNotFoundError: a folder is not there.
    """
    folders = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    for folder in folders[1 if command else 0 :]:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no run folder {folder}: check the path")
    return _Dashboard(folders, Training(folders[0], command) if command else None, every).explorer


class _Dashboard:
    def __init__(self, folders: list[Path], training: "Training | None", every: float):
        self.training, self.every, self.timer = training, every, None
        self.words, self.pictures = ipywidgets.HTML(), [picture() for _ in range(4)]
        names = [(folder.name, folder) for folder in folders]
        self.follow = ipywidgets.Checkbox(False, description="follow while it trains")
        self.follow.observe(lambda _: self._tick(), names="value")
        look = ipywidgets.Button(description="Look again")
        look.on_click(lambda _: self.explorer.request())
        self.others = folders
        controls = {
            "run": ipywidgets.Dropdown(options=names),
            "quantity": ipywidgets.Dropdown(options=self._quantities(folders), description="compare runs by"),
        }
        view = [ipywidgets.HBox([look, self.follow]), self.words, *self.pictures]
        if training:
            acts = (training.start, training.pause, training.resume, training.stop)
            names = ("Start or continue", "Pause", "Go on after a pause", "Stop with a checkpoint")
            buttons = [ipywidgets.Button(description=n, layout={"width": "auto"}) for n in names]
            for button, act in zip(buttons, acts, strict=True):
                button.on_click(lambda _, act=act: self._act(act))
            view.insert(0, ipywidgets.HBox(buttons))
        self.explorer = Explorer(self.draw, controls, view, still=self._still)

    def draw(self, progress: Progress, run: Path, quantity: str) -> None:
        words = [self.training.state] if self.training else []
        words += [f"the collapse guard: {finding}" for finding in findings(run)]
        records = {folder.name: run_plots.records(folder) for folder in self.others}
        figures = [run_plots.plot_losses(run), run_plots.plot_health(run), run_plots.plot_samples(run), None]
        if len(self.others) > 1:
            figures[3] = run_plots.compare(records, quantity)
        if not any(figures):
            words.append(f"{run} has no measurements yet")
        self.words.value = "<br>".join(words)
        for place, figure in zip(self.pictures, figures, strict=True):
            place.pictures = [figure._repr_png_()] if figure else []

    def _still(self) -> bytes:
        return stacked([place for place in self.pictures if place.pictures] or [run_plots.empty()])

    @staticmethod
    def _quantities(folders: list[Path]) -> list[str]:
        found = {key: None for folder in folders for record in run_plots.records(folder) for key in record}
        return [key for key in found if key not in ("step", "time")] or ["denoising"]

    def _act(self, act) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            act()
        self.follow.value = True
        self.explorer.request()

    def _tick(self) -> None:
        """Looks again, and once more later, as long as one follows."""
        if self.timer:
            self.timer.cancel()
        if self.follow.value:
            self.explorer.request()
            self.timer = threading.Timer(self.every, self._tick)
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
            return "not started here"
        if self.running:
            paused = psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
            return "paused; its memory stays taken" if paused else "training"
        code = self.process.returncode
        if code == 0:
            return "finished"
        if code in (130, 143):
            return "stopped, with a checkpoint"
        said = self._log.read_text(errors="replace").strip().splitlines()
        return f"ended with exit code {code}: {said[-1] if said else 'it said nothing'}"

    def start(self) -> None:
        """Starts it, or goes on from the last checkpoint."""
        if self.running:
            self.resume()
            return
        words = [*self.command, *(["--resume", "latest"] if (self.folder / "checkpoints").is_dir() else [])]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "repae_lite", *words],
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


def findings(run: Path) -> list[str]:
    """What the collapse guard found, by step."""
    found = []
    for path in sorted((run / "divergence").glob("*.json")):
        report = json.loads(path.read_text())
        found.append(f"step {int(path.stem):,}: {report['finding']}")
    return found
