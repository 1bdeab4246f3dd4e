"""Progress of long work: a bar on a terminal, a line a minute in a log file."""

import sys

from tqdm import tqdm

QUIET = 60  # seconds between two lines where there is no terminal


def progress_bar(total: int, done: int, *, show: bool, unit: str = "images") -> tqdm:
    """A bar over images, or over something else.

    Args:
        total: how many there are.
        done: how many of them are finished.
        show: False for none.
        unit: what is counted.
    """
    interval = 0.5 if sys.stderr.isatty() else QUIET
    return tqdm(total=total, initial=done, unit=f" {unit}", mininterval=interval, disable=not show)
