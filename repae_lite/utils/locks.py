"""One writer to a folder, enough space in it, and the system's refusals to write in a sentence."""

import errno
import fcntl
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from repae_lite.utils.files import free_name, remove, write_text

logger = logging.getLogger(__name__)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turns the system's refusals to write in a folder into a sentence.

    Raises:
        OSError: instead of one with a number.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = _dangling(Path(error.filename or output)) or error.strerror
        remedy = "choose another output folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"make room or {remedy}; finished work is kept, and the same command goes on from there"
        raise OSError(f"cannot write in {output} ({reason}): {remedy}") from None


def _dangling(path: Path) -> str | None:
    """The link to nothing on the way to a path, if there is one; the system calls it an existing file."""
    for place in [path, *path.parents]:
        if place.is_symlink() and not place.exists():
            return f"{place} is a link to {os.readlink(place)}, which does not exist"
    return None


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuses at once what would fill the disk in hours.

    Args:
        folder: to write to.
        needed: bytes.
        what: the sentence's subject, as in "the images need".

    Raises:
        OSError: fewer bytes are free than needed.
    """
    free = free_space(folder)
    if needed > free:
        raise OSError(
            f"{what} {needed / 1e9:.1f} GB more in {folder}, where {free / 1e9:.1f} GB are free: free space, "
            "or choose another output folder"
        )


def free_space(folder: Path) -> float:
    """Bytes that are free on a folder's disk; infinity where it does not tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return math.inf
    return usage.free if usage.total else math.inf


def check_writable(folder: Path) -> None:
    """Refuses a disk that lacks what files need that are whole or not there: making, replacing, renaming.

    Raises:
        OSError: it lacks one of them.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = free_name(folder / ".probe.partial")
        try:
            for _ in range(2):  # the second one over the first
                write_text(probe, "probe")
            remove(probe)
            made = free_name(probe)  # another name, where nothing can be removed
            made.mkdir()
            os.rename(made, free_name(made))
        finally:
            for left in folder.glob(".probe*.partial"):
                remove(left)


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Makes a `.partial` folder and holds it against other runs, until this process ends in whatever way.

    Processes forked from this one let go of it at once: a loader's processes outlive a killed run by seconds,
    and the next start should not have to wait for them.

    Raises:
        ValueError: another run holds it.
        OSError: it cannot be made.
    """
    with writing(folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")  # empty, unless somebody else's
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run is writing into {folder.parent}: wait until it ends, or choose another output "
                "folder"
            ) from None
        except OSError as error:
            reason = error.strerror
            logger.warning(f"{folder} cannot be locked ({reason}): make sure that no other run writes there")
        _held.add(lock)
        try:
            yield folder
        finally:
            _held.discard(lock)


_held: set[IO] = set()


def _let_go() -> None:
    while _held:
        _held.pop().close()  # of this process's copy: the lock stays with the one that took it


os.register_at_fork(after_in_child=_let_go)
