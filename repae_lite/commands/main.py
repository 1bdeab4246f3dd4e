"""The command line, `repae <command>`; also `python -m repae_lite <command>`.

A command is one file in this folder and one row of `COMMANDS`. `repae --help` shows the first line of the
file's docstring, `repae <command> --help` all of it, and `EPILOG` if there is one. `FLAGS` holds the flags
under their headings, each with the arguments of `argparse.ArgumentParser.add_argument`; `run(args)` does
the work and prints what came of it. Slow imports belong inside `run`: `--help` is then instant, and so are
worker processes, which import this file again.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from repae_lite import __version__
from repae_lite.utils.output import patient_output

COMMANDS = (  # "cache-latents" is cache_latents.py
    "check",
    "preprocess",
    "download",
    "cache-latents",
    "export-vae",
    "train-repae",
    "train-ldm",
    "train-vae",
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has `command`, its name, and `run`, its function."""
    about = "REPA-E at any scale: see notebooks/00_map.ipynb."
    parser = argparse.ArgumentParser(prog="repae", description=about)
    parser.add_argument("--version", action="version", version=f"repae_lite {__version__}")
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
        row.set_defaults(run=module.run)
        for heading, flags in module.FLAGS.items():
            group = row.add_argument_group(heading)
            for spellings, arguments in flags.items():
                group.add_argument(*spellings.split(), **arguments)
    return parser


@patient_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; user mistakes become one sentence on stderr and exit code 2."""
    args = make_parser().parse_args(argv)
    with _messages_on_stderr():
        try:
            args.run(args)
        except (ValueError, OSError) as error:
            print(f"repae {args.command}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"repae {args.command}: interrupted", file=sys.stderr)
            return 130
    return 0


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Shows what the library logs, as plain sentences."""
    logger, handler = logging.getLogger("repae_lite"), logging.StreamHandler()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
