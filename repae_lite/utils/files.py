"""Files that are either whole or not there, and the small networks that ship with the project.

Weights are safetensors: reading them executes nothing.
"""

import errno
import itertools
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)
# What a disk says that cannot sync a file or folder, or may not: shared folders, FUSE, CIFS.
_NO_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM
}  # fmt: skip


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, and puts the file in its place when it is finished.

    On any failure nothing changes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        remove(partial)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Puts a file, or a folder's list of names, on the disk, as far as the disk can.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def remove(path: Path) -> None:
    """Removes a file or a folder if it is there; of what cannot be removed it warns."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)  # the rest of a folder
        logger.warning(f"{path} cannot be removed ({error.strerror or error}): it goes on taking space")


def free_name(path: Path) -> Path:
    """The first of NAME-1.SUFFIX, NAME-2.SUFFIX … that does not exist."""
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def set_aside(path: Path, why: str) -> None:
    """Gives a file or folder that is in the way another name, and says so."""
    kept = free_name(path)
    os.rename(path, kept)
    logger.warning(f"{path} {why}: kept as {kept.name}")


def data_small_dir() -> Path:
    """The folder of the embedded dataset and networks: `data_small` beside the package, or $REPAE_DATA_SMALL.

    Raises:
        FileNotFoundError: it is not there.
    """
    named = os.environ.get("REPAE_DATA_SMALL")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "data_small"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the embedded data folder {folder} does not exist: work in a checkout of the repository (pip "
            "install -e .) or set REPAE_DATA_SMALL to its data_small folder"
        )
    return folder


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something else; a name that is set twice, a number that is not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: check the path")
    try:
        content = json.loads(
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=once, parse_constant=_not_finite
        )
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: restore it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: restore it")
    return content


class SetTwice(ValueError):
    """A name, its only argument, is set twice in an object of JSON."""

    def __str__(self) -> str:
        return f"{self.args[0]!r} is set twice"


def once(pairs: list[tuple[str, object]]) -> dict:
    """An object whose names are all different, for `json.loads(…, object_pairs_hook=once)`.

    Raises:
        SetTwice: they are not.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise SetTwice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _not_finite(word: str) -> None:
    raise ValueError(f"{word} is no number")


def check_name(name: str, option: str) -> None:
    """Refuses a name that is more than the name of a file.

    Args:
        name: to check.
        option: what to call it in the error.

    Raises:
        ValueError: it is empty, leads into another folder, or cannot be printed.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError(f"{option} is {name!r}: give a name without folders and unprintable characters")
