"""Progress of long work: a bar on a terminal, a line a minute in a log file."""

import sys

from tqdm import tqdm

QUIET = 60  # seconds between two lines where there is no terminal


def progress_bar(total: int, done: int, *, show: bool) -> tqdm:
    """A bar over images.

    Args:
        total: how many images there are.
        done: how many of them are finished.
        show: False for none.
    """
    interval = 0.5 if sys.stderr.isatty() else QUIET
    return tqdm(total=total, initial=done, unit=" images", mininterval=interval, disable=not show)
