"""What a data set of a million entries keeps in memory, and what it need not look for at every start.

A list of a million names is a million objects, which every loader process would get copies of: a process that
is spawned at once, a forked one as it counts references. An array is one.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from repae_lite.utils.files import atomic_path


class Names(Sequence):
    """Names in one array, made strings as they are asked for.

    Args:
        joined: uint8, the bytes of each name and a zero.
    """

    def __init__(self, joined: np.ndarray):
        self._joined, self._ends = joined, np.flatnonzero(joined == 0)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """These names, none of which has a zero byte."""
        return cls(join(names))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start = self._ends[index - 1] + 1 if index else 0
        return _text(self._joined[start : self._ends[index]])

    def __iter__(self) -> Iterator[str]:
        return iter(_text(self._joined).split("\0")[:-1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


def join(names: Iterable[str]) -> np.ndarray:
    """The array that `Names` takes."""
    text = "".join(f"{name}\0" for name in names)
    return np.frombuffer(text.encode(errors="surrogateescape"), np.uint8)


def _text(data: np.ndarray) -> str:
    return data.tobytes().decode(errors="surrogateescape")


def kept_index(
    kind: str, files: Sequence[Path], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays that follow from files: made once, and kept in HF_HOME/assets until one of the files changes.

    Args:
        kind: what they are, with everything else that they depend on.
        files: what they are made of; another place, size or time of change is a change.
        make: makes them, and may raise what it likes.
    """
    found = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([kind, found]).encode()).hexdigest()[:32]
    kept = Path(constants.HF_ASSETS_CACHE, "repae_lite", "data", "index", f"{key}.npz")
    with suppress(Exception), np.load(kept, allow_pickle=False) as file:  # not there, or damaged in any way
        return dict(file)
    arrays = make()
    # On a disk that cannot be written, they are made at every start.
    with suppress(OSError), atomic_path(kept) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)
    return arrays
