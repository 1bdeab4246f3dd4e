"""Files that are either whole or not there, and the small networks that ship with the project.

Weights are safetensors: reading them executes nothing.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
            path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once, parse_constant=_not_finite
        )
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: restore it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: restore it")
    return content


def _once(pairs: list[tuple[str, object]]) -> dict:
    """An object whose names are all different."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is set twice")
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
