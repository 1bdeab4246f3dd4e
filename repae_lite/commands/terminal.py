"""The command line from a notebook: lines as one would type them, run in a folder, their output trimmed.

Used by `notebooks/07_full_scale.ipynb`.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from repae_lite.commands.main import main, make_parser

WIDTH = 108
UNBROKEN = {"break_long_words": False, "break_on_hyphens": False}
MODULES = {  # what starts a process without the name being on the PATH
    "repae": ("repae_lite",),
    "accelerate": ("accelerate.commands.accelerate_cli",),
    "torchrun": ("torch.distributed.run",),
}
NOISE = re.compile(r"\d+%\||^The following values were not passed|^\t`--|^To avoid this warning")


class Terminal:
    """Runs command lines in a folder.

    Args:
        folder: relative paths start here.
        threads: of each command, over its processes.
        quick: run commands inside this process, without launcher, instead of starting Python anew: for smoke
            runs.
    """

    def __init__(self, folder: str | Path, *, threads: int = 2, quick: bool = False):
        self.folder, self.threads, self.quick = Path(folder), threads, quick

    def __call__(self, line: str, *, full: str = "", show: slice = slice(None), expect: int = 0) -> None:
        """Prints a command line, runs it, and prints what it says without progress bars.

        Args:
            line: begins with repae, accelerate or torchrun.
            full: the same at full scale: only read by the command's own parser, and printed.
            show: which lines of the output are printed; the others are counted.
            expect: the exit code.

        Raises:
            ChildProcessError: another exit code, with the last lines of the output.
            ValueError: `full` is no command line that `repae` takes.
        """
        if full:
            check(full)
            print("at full scale:", typed(full), "", sep="\n")
        print("$ " + typed(line))
        code, text = self._run(shlex.split(line))
        lines = [each.rpartition("\r")[2].rstrip() for each in text.splitlines() if each.strip()]
        lines = [each for each in lines if not NOISE.search(each)]
        if code != expect:
            raise ChildProcessError(f"exit code {code} instead of {expect}: " + "\n".join(lines[-5:]))
        for each in lines[show]:
            print(textwrap.fill(each, WIDTH, subsequent_indent="    ", **UNBROKEN) or each)
        if left := len(lines) - len(lines[show]):
            print(f"[{left} more line{'s' * (left > 1)}]")

    def _run(self, words: list[str]) -> tuple[int, str]:
        if self.quick:
            said = io.StringIO()
            with (
                contextlib.chdir(self.folder),
                contextlib.redirect_stdout(said),
                contextlib.redirect_stderr(said),
            ):
                try:
                    code = main(words[_start(words) :])
                except SystemExit as end:
                    code = int(end.code or 0)
            return code, said.getvalue()
        processes = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
        threads = {"OMP_NUM_THREADS": str(max(1, self.threads // processes))}
        done = subprocess.run(
            [sys.executable, "-m", *MODULES[words[0]], *words[1:]],
            cwd=self.folder,
            env=os.environ | threads,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout


def check(line: str) -> None:
    """Refuses a command line that `repae` would not understand; runs nothing.

    Raises:
        ValueError: what its parser says.
    """
    words = shlex.split(line)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            make_parser().parse_args(words[_start(words) :])
        except SystemExit:
            raise ValueError(f"not a command line of repae: {said.getvalue().strip()}") from None


def _start(words: list[str]) -> int:
    """Where the command's name stands, behind `repae` or a launcher."""
    return 1 + (words.index("repae_lite") if "repae_lite" in words else 0)


def typed(line: str) -> str:
    """A command line as one would type it, broken where it is long."""
    lines = textwrap.wrap(" ".join(line.split()), WIDTH - 6, subsequent_indent="    ", **UNBROKEN)
    return " \\\n".join(lines)
