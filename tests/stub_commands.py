"""Stages whose command is a small script that ends as it is told, for the tests of the launcher."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

STUB = """
import json, os, signal, sys, time
from pathlib import Path

folder, how = Path(sys.argv[2]), sys.argv[3]

def stopped(*_):
    print("stopped by SIGTERM at step 2", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, stopped)
with open(folder / "starts", "a") as file:
    file.write(f"{os.getpid()}\\n")
print("exps/run: step 0 of 4", flush=True)
(folder / "run").mkdir(exist_ok=True)
with open(folder / "run" / "metrics.jsonl", "a") as file:
    for step in (1, 2):
        print(json.dumps({"step": step, "denoising": 1.0, "sit_align": -0.1}), file=file)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "launched":
    print("  exitcode  : 3 (pid: 12)")
if how in ("1", "2", "3", "launched"):
    sys.exit("diverged: the gradient norm of sit is zero" if how == "launched" else int(how))
while how == "waits" and not (folder / "go").exists():
    time.sleep(0.05)
if how != "forgets":
    (folder / "done").touch()
print("step 4 of 4, 8.5 steps/s, sit_total 0.9")
"""


@dataclass
class Stub:
    """A `Command`, without what `repae_lite.commands.rows` imports."""

    words: tuple[str, ...]
    done: Path

    @property
    def finished(self) -> bool:
        return self.done.exists()


def plan_in(folder: Path) -> SimpleNamespace:
    """A plan whose program is the stub."""
    (folder / "stub.py").write_text(STUB)
    return SimpleNamespace(
        folder=folder, argv=lambda command: [sys.executable, str(folder / "stub.py"), *command.words]
    )


def stage_in(folder: Path, how: str) -> SimpleNamespace:
    done = folder / "done"
    command = Stub(("train-repae", str(folder), how), done)
    return SimpleNamespace(name="02_train_repae", commands=(command,), run_folder=folder / "run")


def starts(folder: Path) -> list[int]:
    """The processes that have begun so far."""
    path = folder / "starts"
    return [int(line) for line in path.read_text().split()] if path.exists() else []
