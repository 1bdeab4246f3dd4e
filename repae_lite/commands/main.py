"""The command line, `repae <command>`; also `python -m repae_lite <command>`.

A command is one file in this folder and one row of `COMMANDS`. `repae --help` shows the first line of the
file's docstring, `repae <command> --help` all of it, and `EPILOG` if there is one. `FLAGS` holds the flags
under their headings, each with the arguments of `argparse.ArgumentParser.add_argument`; `run(args)` does
the work and prints what came of it. Slow imports belong inside `run`: `--help` is then instant, and so are
worker processes, which import this file again. `saves_memory(args, error)`, if there is one, says which flags
help when memory runs out.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import NoReturn

from repae_lite import __version__
from repae_lite.utils.errors import BUG, interrupted, printable, sentence
from repae_lite.utils.output import patient_output

COMMANDS = (  # "cache-latents" is cache_latents.py
    "check",
    "preprocess",
    "download",
    "cache-latents",
    "export-vae",
    "reconstruct",
    "train-repae",
    "train-ldm",
    "train-vae",
    "generate",
    "evaluate",
    "probe",
    "compare",
    "reproduce",
    "bench",
)
DEBUG = {
    "action": "store_true",
    "default": argparse.SUPPRESS,
    "help": "show the traceback of any error, before its sentence",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has `command`, its name, and `run`, its function."""
    about = "REPA-E at any scale: see notebooks/00_map.ipynb."
    parser = _Parser(prog="repae", description=about)
    parser.add_argument("--version", action="version", version=f"repae_lite {__version__}")
    parser.add_argument("--debug", **DEBUG)
    rows = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name in COMMANDS:
        module = import_module(f"{__package__}.{name.replace('-', '_')}")
        about = (module.__doc__ or "").replace("%", "%%")
        row = rows.add_parser(
            name,
            help=about.partition("\n")[0],
            description=about,
            epilog=getattr(module, "EPILOG", None),
            allow_abbrev=False,
        )
        row.set_defaults(run=module.run, saves_memory=getattr(module, "saves_memory", None))
        row.add_argument("--debug", **DEBUG)
        for heading, flags in module.FLAGS.items():
            group = row.add_argument_group(heading)
            for spellings, arguments in flags.items():
                group.add_argument(*spellings.split(), **arguments)
    return parser


@patient_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 for success; 2 for a mistake or a fault outside of this program, told in one sentence on stderr; 1 for a
    bug, with its traceback; 130 for Ctrl-C.
    """
    args = argparse.Namespace(command="", debug=False, saves_memory=None)
    with _messages_on_stderr():
        try:
            make_parser().parse_args(argv, args)
            _refuse_empty(args)
            args.run(args)
            _leave_group(together=True)
            return 0
        except BaseException as error:
            if isinstance(error, SystemExit):
                raise
            code, text = _told(error, args)
            if not _launched() or _first_to_say(text):
                print(text, file=sys.stderr)
            return code
        finally:
            _leave_group(together=False)


def _told(error: BaseException, args: argparse.Namespace) -> tuple[int, str]:
    """The exit code of a command that ended in an error, and what to print."""
    name = f"repae {args.command}".strip()
    if interrupted(error):
        return 130, f"{name}: interrupted"
    found = sentence(error, saves_memory=args.saves_memory and partial(args.saves_memory, args))
    shown = "" if found and not args.debug else "".join(traceback.format_exception(error))
    if found:
        return 2, f"{shown}{name}: {found}"
    return 1, f"{shown}{name}: {BUG}"


def _launched() -> bool:
    """Whether a launcher may have started other processes that say the same."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _first_to_say(text: str) -> bool:
    from repae_lite.utils.processes import first_to_say

    return first_to_say(text)


def _leave_group(*, together: bool) -> None:
    """Leaves the group of processes, if the command has joined one."""
    if "torch.distributed" in sys.modules:
        from repae_lite.utils.processes import leave

        leave(together=together)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line once, however many processes have it."""

    def error(self, message: str) -> NoReturn:
        if _launched() and not _first_to_say(message):
            raise SystemExit(2)
        super().error(message)


def _refuse_empty(args: argparse.Namespace) -> None:
    """Refuses an empty value: as a path it would mean the current folder.

    Raises:
        ValueError: a flag was given one, as by a shell variable that is not set.
    """
    for name, value in vars(args).items():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and not word.strip():
                option = "a name" if isinstance(value, list) else f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} is {word!r}, without a letter: give a value, or leave it out")


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Shows what the library logs, as plain sentences."""
    logger, handler = logging.getLogger("repae_lite"), logging.StreamHandler()
    handler.format = lambda record: printable(record.getMessage())
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
