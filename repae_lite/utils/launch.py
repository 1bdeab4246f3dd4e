"""Long commands from a notebook: started as processes of their own, followed, and found again.

    FOLDER/
        running.json     the process that runs now, or the last one
        logs/STAGE.log   what the commands of a stage said

A command writes to a file and not to its notebook, so it outlives a closed browser and a kernel that dies;
the same cell, run again, finds it and follows it. What runs on another machine is not seen from here: there
the run's own lock refuses a second one. Notebooks `reproduce/01_preprocess.ipynb` and later.
"""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil

from repae_lite.utils.files import read_json, write_text
from repae_lite.utils.locks import locked

POLL = 0.5  # seconds between two looks at a process
UPDATE = 5  # … two progress bars
PLOT = 60  # … two plots
LAST_WORDS = 12  # lines
TAIL = 16384  # bytes of a log in which progress is looked for
PROGRESS = re.compile(r"step (\d+) of (\d+)|(\d+)/(\d+) \[")  # of training; of tqdm
ENDS = {
    1: "a bug of this program, with its traceback in the log",
    2: "a mistake in the command, the data or the disk: mend it, then run this notebook again",
    3: "halted by the collapse guard: read its report in the run's folder, divergence/, before going on",
    130: "interrupted by Ctrl-C: run this notebook again to go on",
    137: "killed, as happens when memory runs out: run this notebook again to go on from what is finished",
    143: "stopped by SIGTERM: run this notebook again to go on",
}


class Command(Protocol):
    """See `repae_lite.commands.rows.Command`."""

    words: tuple[str, ...]
    done: Path | None
    finished: bool


class Stage(Protocol):
    """See `repae_lite.commands.rows.Stage`."""

    name: str
    commands: tuple[Command, ...]
    run_folder: Path | None


class Plan(Protocol):
    """See `repae_lite.commands.rows.Plan`."""

    folder: Path

    def argv(self, command: Command) -> list[str]:
        """The whole command line."""


@dataclass(frozen=True)
class Running:
    """A process and where its words are, as running.json has it.

    Attributes:
        stage: that it belongs to.
        words: its command line without `repae`.
        pid, created: the process, which a later one with the same number is not.
        log: what it says.
        offset: where in the log it begins, in bytes.
    """

    stage: str
    words: list[str]
    pid: int
    created: float
    log: str
    offset: int

    def process(self) -> psutil.Process | None:
        """The process, if it is still there."""
        with suppress(psutil.Error):
            process = psutil.Process(self.pid)
            # 2 s: the system's clock may have been set meanwhile
            if abs(process.create_time() - self.created) < 2 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def said(self) -> list[str]:
        """The last lines of its log; of a progress bar the last state."""
        with open(self.log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.offset, end - TAIL))
            text = file.read().decode("utf-8", "replace")
        lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
        return [line for line in lines if line.strip()]


def to_checkout() -> None:
    """Goes to the checkout's top, which paths are given from: Jupyter starts a notebook in its own folder."""
    here = Path.cwd()
    if (here / "plan.json").is_file() or (here / "presets").is_dir():
        home = [place for place in here.parents if (place / "reproduce" / "presets").is_dir()]
        os.chdir(home[0] if home else here)


def launch(stage: Stage, plan: Plan, *, plot: Callable[[], object] | None = None) -> None:
    """Runs what is left of a stage, or follows the process that is at it already.

    Args:
        stage: whose commands run one after another.
        plan: it gives the folder and the command lines.
        plot: draws a figure, or None while there is nothing to draw; shown every minute.

    Raises:
        ChildProcessError: a command failed, was killed or stopped: why, and its last words.
        ValueError: another command runs in the folder.
    """
    for command in stage.commands:
        if command.finished:
            print(f"finished before: {_name(command.words)} ({command.done})")
            continue
        print(shlex.join(["repae", *command.words]))
        try:
            _finish(stage, plan, command, plot)
        except KeyboardInterrupt:
            print(
                f"{_name(command.words)} goes on without this notebook: run this cell again to follow it; "
                "launch.stop(plan.folder) stops it"
            )
            raise


def stop(folder: Path, timeout: float = 600) -> str | None:
    """Stops the command that runs in a plan's folder, and waits for its checkpoint.

    Args:
        folder: of the plan.
        timeout: seconds to wait.

    Returns:
        the command's name; None if there is none.

    Raises:
        TimeoutError: it goes on.
    """
    running = _found(folder)
    process = running and running.process()
    if not process:
        return None
    with suppress(psutil.NoSuchProcess):
        launcher = "accelerate.commands.launch" in process.cmdline()
        # A launcher kills its processes 30 seconds after a signal of its own; they end it when they are done.
        for target in (launcher and process.children()) or [process]:
            target.terminate()
    until = time.monotonic() + timeout
    while running.process():
        if time.monotonic() > until:
            raise TimeoutError(
                f"{_name(running.words)} (process {running.pid}) still runs {timeout:g} s after SIGTERM: "
                "wait for it"
            )
        time.sleep(POLL / 5)  # its exit code is for who started it
    return _name(running.words)


# ---------------------------------------------------------------- one command


def _finish(stage: Stage, plan: Plan, command: Command, plot: Callable | None) -> None:
    """Starts a command, or finds it running, and follows it to its end."""
    with locked(plan.folder / ".starting"):
        running = _found(plan.folder)
        process = running and running.process()
        if process and running.words != list(command.words):
            raise ValueError(
                f"{plan.folder} is busy with {_name(running.words)} (notebook {running.stage}, process "
                f"{running.pid}): wait for it, or stop it by launch.stop(plan.folder)"
            )
        if process:
            print(f"it is running already, as process {running.pid}: followed from here on")
        else:
            running, process = _start(stage, plan, command)
    code = _follow(running, process, stage, plot)
    if code is None and command.done is None:  # not ours, so its end is not known: it finds out what is left
        return _finish(stage, plan, command, plot)
    if command.finished or (code == 0 and command.done is None):
        return
    raise ChildProcessError(_obituary(running, command, code))


def _found(folder: Path) -> Running | None:
    with suppress(FileNotFoundError, ValueError, TypeError):
        return Running(**read_json(Path(folder) / "running.json"))
    return None


def _start(stage: Stage, plan: Plan, command: Command) -> tuple[Running, psutil.Popen]:
    log = plan.folder / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(['repae', *command.words])}\n".encode())
        file.flush()
        process = psutil.Popen(
            plan.argv(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"},
            start_new_session=True,  # signals to the kernel's group are not for it
        )
        running = Running(
            stage.name, list(command.words), process.pid, process.create_time(), str(log), file.tell()
        )
    write_text(plan.folder / "running.json", json.dumps(asdict(running), indent=1) + "\n")
    return running, process


def _follow(running: Running, process: psutil.Process, stage: Stage, plot: Callable | None) -> int | None:
    """Shows progress until a process ends; its exit code, None if it was started by another one."""
    name, start, bar, figure = _name(running.words), time.monotonic(), _Display(), _Display()
    trains = stage.run_folder and running.words[0].startswith("train-")
    metrics = stage.run_folder / "metrics.jsonl" if trains else None
    first, drawn = None, start
    while True:
        now = time.monotonic()
        if bar.due(UPDATE):
            count, total = _progress(running, metrics)
            first = first or (now, count)
            speed = (count - first[1]) / (now - first[0]) if now > first[0] else 0
            line = _bar(name, count, total, speed, now - start)
            bar.show({"text/plain": "\n".join([line, *running.said()[-1:]])})
        if plot and metrics and now - drawn > PLOT:
            drawn = now
            if (picture := plot()) is not None:
                figure.show(picture)
        over, code = _ended(running, process)
        if not over:
            continue
        ended = "ended" if code is None else "finished" if code == 0 else f"ended with exit code {code:d}"
        line = f"{name}: {ended} after {_duration(time.monotonic() - start)}"
        bar.show({"text/plain": "\n".join([line, *running.said()[-1:]])})
        return code


def _ended(running: Running, process: psutil.Process) -> tuple[bool, int | None]:
    """Whether a process is over, and its exit code; None where only who started it can know."""
    with suppress(psutil.TimeoutExpired):
        return True, process.wait(POLL)
    if running.process():
        return False, None
    with suppress(psutil.Error):  # it ended between the two looks
        return True, process.wait(POLL)
    return True, None  # nobody waits for it


def _progress(running: Running, metrics: Path | None) -> tuple[int, int]:
    """How much is done, of how much (0: not known)."""
    found = [match for line in running.said() for match in PROGRESS.finditer(line)]
    count, total = (int(number) for number in found[-1].groups() if number) if found else (0, 0)
    if metrics and metrics.is_file():
        with open(metrics, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            steps = re.findall(rb'\{"step": (\d+),.*\}\n', file.read())
        count = max(count, int(steps[-1])) if steps else count
    return count, total


def _obituary(running: Running, command: Command, code: int | None) -> str:
    """Why a command is not finished, in words for the notebook's reader."""
    words = running.said()[-LAST_WORDS:]
    of_workers = re.findall(r"exitcode *: (-?\d+) +\(pid", "\n".join(running.said()))
    if code == 1 and of_workers:  # a launcher's own code is always 1
        code = int(of_workers[0])
    code = 128 - code if code is not None and code < 0 else code
    why = ENDS.get(code) or (
        f"killed by {_signal(code - 128)}" if code and code > 128 else "of unknown cause"
    )
    if code is None:
        why = "why is known only to the notebook that started it: run this one again to go on"
    elif code == 0:
        why = f"it ended as if finished, but there is no {command.done}"
    ended = "has ended" if code is None else f"ended with exit code {code}"
    said = textwrap.indent("\n".join(words) or "(nothing)", "    ")
    return f"{_name(running.words)} {ended}: {why}. Its last words, from {running.log}:\n{said}"


def _signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _name(words: list[str] | tuple[str, ...]) -> str:
    return f"repae {words[0]}"


# ---------------------------------------------------------------- what is shown


class _Display:
    """An output of a cell that is replaced in place."""

    def __init__(self):
        self.handle, self.content, self.last = None, None, -math.inf

    def due(self, pause: float) -> bool:
        return time.monotonic() - self.last >= pause

    def show(self, content: object) -> None:
        from IPython.display import display

        self.last = time.monotonic()
        if content == self.content:
            return
        self.content, raw = content, isinstance(content, dict)
        if self.handle:
            self.handle.update(content, raw=raw)
        else:
            self.handle = display(content, raw=raw, display_id=True)


def _bar(name: str, count: int, total: int, speed: float, seconds: float) -> str:
    """One line of text."""
    if not total:
        return f"{name}  {_duration(seconds)}"
    filled = 30 * min(count, total) // total
    line = f"{name}  {'█' * filled}{'·' * (30 - filled)}  {count:,} of {total:,}"
    if speed > 0:
        rate = f"{speed:.1f} a second" if speed >= 1 else f"{1 / speed:.1f} s each"
        line += f", {rate}, {_duration((total - count) / speed)} left"
    return line


def _duration(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
