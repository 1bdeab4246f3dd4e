"""One writer to a folder, and the system's refusals to write in a sentence."""

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Makes a `.partial` folder and holds it against other runs; the system releases it when this process
    ends, however it ends.

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
            print(
                f"{folder} cannot be locked ({error.strerror}): make sure that no other run writes there",
                file=sys.stderr,
            )
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
