"""One writer to a folder, enough space in it, and the system's refusals to write in a sentence."""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

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
        remedy = "choose another output folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"make room or {remedy}; finished work is kept, and the same command goes on from there"
        raise OSError(f"cannot write in {output} ({error.strerror}): {remedy}") from None


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuses at once what would fill the disk in hours.

    Args:
        folder: to write to.
        needed: bytes.
        what: the sentence's subject, as in "the images need".

    Raises:
        OSError: fewer bytes are free than needed.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{what} {needed / 1e9:.1f} GB more in {folder}, where {free / 1e9:.1f} GB are free: free space, "
            "or choose another output folder"
        )


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
        lock = open(folder / "lock", "w")
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
