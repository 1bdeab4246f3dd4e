"""CPU threads beside other programs: no more than these leave cores for.

torch's threads wait for each other many times in a training step. If another program has taken the core of
one of them, all wait until it gets its turn, and two threads are many times slower than one. The chapters in
`notebooks/` therefore look before they start, and again while they train.
"""

import os
import time
from collections.abc import Iterable, Iterator

import psutil


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OtherPrograms:
    """What all other programs have used of the cores since the last look."""

    def __init__(self) -> None:
        self._read()

    def _read(self) -> None:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        self._busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        self._own, self._at = time.process_time(), time.monotonic()

    def cores(self) -> float:
        """How many cores' worth, on average since the last call or since this object was made."""
        busy, own, at = self._busy, self._own, self._at
        self._read()
        passed = max(self._at - at, 1e-3)
        return max(0.0, (self._busy - busy - (self._own - own)) / passed)


def threads_beside(others: float, wanted: int) -> int:
    """How many of the wanted threads have a core of their own while others use so many cores."""
    return max(1, min(wanted, round(core_count() - others)))


def free_threads(wanted: int, seconds: float = 0.5) -> int:
    """The number of CPU threads for torch: those wanted, or fewer if other programs use the cores just now.

    Args:
        wanted: at most so many; at least one is given.
        seconds: to look for.
    """
    if wanted <= 1:
        return 1
    others = OtherPrograms()
    time.sleep(seconds)
    return threads_beside(others.cores(), wanted)


def beside_others(items: Iterable, every: float = 1.0) -> Iterator:
    """Yields the items, and keeps torch at the threads that other programs leave cores for.

    Args:
        every: seconds from one look to the next, which happens between two items. The number of threads may
            fall and rise again, to that of the start at most; at the end it stays as it is.
    """
    import torch  # who only counts cores does without

    wanted, others, last = torch.get_num_threads(), OtherPrograms(), time.monotonic()
    for item in items:
        yield item
        if wanted > 1 and time.monotonic() - last > every:
            torch.set_num_threads(threads_beside(others.cores(), wanted))
            last = time.monotonic()
