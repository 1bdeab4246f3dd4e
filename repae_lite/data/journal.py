"""An HDF5 file that grows by steps; each is there whole or not at all, whenever the process is killed.

HDF5 alone cannot promise that: a file whose writer was killed is often unreadable. Here a journal says how
far the file is valid. New bytes go to the end of the file, where a later start cuts them off if the journal
does not know them. Changes of bytes that earlier steps wrote (a few kB of HDF5's own tables) wait in memory,
are recorded in the journal with the step, and only then laid over the file; laying them over twice does no
harm. As every step starts from the same bytes, killed or not, the finished file is the same to the byte.
"""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py

from repae_lite.data.hdf5 import LIBVER, add_bytes, labels_json, open_h5, reading, write_names
from repae_lite.utils.files import write_text
from repae_lite.utils.locks import writing

PAGE = 4096  # bytes; changes are kept in pieces of this size
ODD = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)  # of a journal
logger = logging.getLogger(__name__)


def fingerprint(head: str, names: Sequence[str], labels: Sequence[int], *more: bytes) -> str:
    """A name for what a file is made of; an unfinished run goes on only if this is the same.

    Args:
        head: everything but the items.
        names: of the items, in their order.
        labels: of the items.
        more: samples of their content.
    """
    digest = hashlib.sha256(head.encode())
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{label} {name}\n".encode(errors="surrogateescape"))
    for data in more:
        digest.update(data)
    return digest.hexdigest()


def check_count(file: h5py.File, state: dict) -> None:
    """Whether an unfinished file holds as many items as its journal says: `done`, but for the `unreadable`.

    Raises:
        ValueError: it does not.
    """
    with reading(file.filename):
        held = sum(len(file[name]) for name in file if isinstance(file[name], h5py.Group))
        labelled = "dataset.json" in file
    expected = state["done"] - len(state.get("unreadable", ()))
    if held != expected or labelled != state["labelled"]:
        raise ValueError(f"{held} items instead of {expected}")


def refuse_existing(path: Path, overwrite: bool, other: str) -> None:
    """Refuses to replace a finished file without being told to, and anything else in its place.

    Args:
        path: the file; a link to what is not there now counts as one.
        overwrite: whether it may be replaced.
        other: what else could be chosen, as in "output folder".

    Raises:
        ValueError: it is there.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: choose another {other}, or move it away")
    if os.path.lexists(path) and not overwrite:
        what = "exists" if path.exists() else f"is a link to {os.readlink(path)}, which is not there"
        raise ValueError(f"{path} {what}: choose another {other}, or replace it with --overwrite")


def refuse_beside(folder: Path, paths: Sequence[Path], overwrite: bool) -> None:
    """Refuses, before any work, files in the place of what a run will write beside its result.

    Args:
        folder: the `.partial` folder; if a run has begun in it, they may be its own.
        paths: of the files.
        overwrite: whether they may be replaced.

    Raises:
        ValueError: there are such files.
    """
    if not overwrite and not (folder / "journal.json").exists():
        _refuse_foreign(paths)


def _refuse_foreign(paths: Sequence[Path]) -> None:
    if found := [path for path in paths if os.path.lexists(path)]:
        raise ValueError(
            f"{found[0]} exists and is not of this run: move it away, choose another name or folder, or "
            "replace it with --overwrite"
        )


class ResumableH5:
    """The file in the making, `<output>/<name>.partial/<name>`, with its journal beside it.

    Args:
        folder: the `.partial` folder, see `locked`; its name without the suffix is the file's.
        fingerprint: of everything that the content depends on.
        state: JSON values that tell how far the work is; replaced by those of an unfinished run with this
            fingerprint.
        check: gets the file and the state of an unfinished run and raises ValueError if they do not fit.
        discard: drop an unfinished run with another fingerprint instead of refusing.

    Attributes:
        state: as of the last step.

    Raises:
        ValueError: the folder holds an unfinished run with another fingerprint.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        state: dict,
        check: Callable[[h5py.File, dict], None],
        *,
        discard: bool = False,
    ):
        self.folder, self.path, self.journal = folder, folder / folder.stem, folder / "journal.json"
        self.fingerprint, self.state, self.size = fingerprint, state, 0
        with writing(folder.parent):
            if self.journal.is_file() and self._resume(check, discard):
                return
            self.journal.unlink(missing_ok=True)
            self.path.write_bytes(b"")

    def _resume(self, check: Callable[[h5py.File, dict], None], discard: bool) -> bool:
        try:
            entry = json.loads(self.journal.read_bytes())
            other = entry["fingerprint"] != self.fingerprint
            if not other:
                if self.path.stat().st_size < entry["written"]:
                    raise ValueError("its file is too short")
                self._lay_over(entry["size"], entry["patches"])
                if entry["size"]:
                    with open_h5(self.path) as file:
                        check(file, entry["state"])
                if not self.state.keys() <= entry["state"].keys():
                    raise ValueError("its journal lacks a part")
        except (FileNotFoundError, *ODD) as error:  # that a file cannot be read now says nothing about it
            logger.warning(f"the unfinished run in {self.folder} is damaged ({error}): starting over")
            return False
        if other and not discard:
            raise ValueError(
                f"{self.folder} holds an unfinished run with other images or options: finish that one, or "
                "discard it with --overwrite"
            )
        if other:
            return False
        self.state, self.size = entry["state"], entry["size"]
        return True

    def _lay_over(self, size: int, patches: list[list]) -> None:
        with open(self.path, "rb+") as file:
            for offset, data in patches:
                file.seek(offset)
                file.write(bytes.fromhex(data))
            file.truncate(size)

    @contextmanager
    def step(self) -> Iterator["Step"]:
        """A step; whatever it adds is forgotten unless it is passed to `commit` inside."""
        step = Step(self.path, self.size)
        try:
            yield step
        finally:
            step.stop()

    def commit(self, step: "Step", **state) -> None:
        """Makes a step's additions and these changes of the state valid together.

        Raises:
            OSError: something could not be written; the step is forgotten.
        """
        with writing(self.folder.parent):
            entry = {"fingerprint": self.fingerprint, "state": self.state | state, **step.stop()}
            if step.error is not None:
                raise step.error
            write_text(self.journal, json.dumps(entry))  # from here on the step counts
            self.state, self.size = entry["state"], entry["size"]
            self._lay_over(entry["size"], entry["patches"])

    def finish_labelled(
        self,
        path: Path,
        entries: list[tuple[str, int | None]],
        *more: tuple[str, bytes],
        beside: Callable[[], None] = lambda: None,
    ) -> None:
        """Adds the labels, unless an earlier start did, writes the list of names, and finishes.

        The state must have `labelled`, False until the labels are in.

        Args:
            path: the finished file.
            entries: name and label of each item.
            more: name and bytes of what else is added.
            beside: writes what else lies beside the file.
        """
        if not self.state["labelled"]:
            with self.step() as last:
                for name, data in (("dataset.json", labels_json(entries)), *more):
                    last.add(name, data)
                self.commit(last, labelled=True)
        with writing(path.parent):
            beside()
            write_names(path, [name for name, _ in entries])
        self.finish(path)  # last of all, so that it is there only when everything is

    def finish(self, path: Path) -> None:
        """Puts the file in its place and removes the rest."""
        with writing(self.folder.parent):
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self.path, path)
        self.discard()

    def discard(self) -> None:
        """Removes the unfinished run, and its folder unless it holds something else."""
        notes = (*self.folder.glob("*.json"), *self.folder.glob(".*.json.*"))
        for path in (self.path, self.folder / "lock", *notes):
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def check_free(self, *paths: Path, overwrite: bool) -> None:
        """Refuses files in the place of what the run will write, unless this run wrote them before a kill.

        Raises:
            ValueError: there are such files.
        """
        if overwrite or self.state["labelled"]:
            return
        try:
            _refuse_foreign(paths)
        except ValueError:
            if not self.size:
                self.discard()
            raise


class Step(io.RawIOBase):
    """What a step adds; to HDF5 it looks like the file.

    HDF5 never learns of a write that failed or was interrupted, since it could not even close its file then:
    `error` keeps it.
    """

    def __init__(self, path: Path, size: int):
        self.start = self.end = size  # bytes below start are valid and stay as they are
        self.position = 0
        self.pages: dict[int, bytearray] = {}
        self.error: BaseException | None = None
        self.path, self.disk, self.hdf5, self.written = path, None, None, size

    def add(self, name: str, data: bytes) -> None:
        """Stores bytes under a name, see `repae_lite.data.hdf5.add_bytes`.

        Raises:
            OSError: the disk is full or refuses otherwise.
            ValueError: what earlier steps wrote has been damaged since.
        """
        with writing(self.path.parent.parent):
            if self.hdf5 is None:
                self.disk = open(self.path, "rb+", buffering=0)
            try:
                with reading(self.path):
                    if self.hdf5 is None:
                        self.hdf5 = h5py.File(self, "r+" if self.start else "w", libver=LIBVER)
                    add_bytes(self.hdf5, name, data)
            except ValueError as error:
                if self.error is None:
                    remedy = f"remove {self.path.parent}, and run the same command again"
                    raise ValueError(f"{str(error).rpartition(':')[0]}: {remedy}") from None
            if self.error is not None:
                raise self.error

    def stop(self) -> dict:
        """Ends the writing.

        Returns:
            What the journal records: `size`, `written` (bytes on the disk) and `patches` [[offset, hex], …].
        """
        if self.hdf5:
            self.hdf5.close()
        if self.disk and not self.disk.closed:
            try:
                os.fsync(self.disk.fileno())
            except OSError as error:
                self.error = self.error or error
            self.written = min(self.end, os.fstat(self.disk.fileno()).st_size)
            self.disk.close()
        patches = [
            [page * PAGE, bytes(data[: self.start - page * PAGE]).hex()]
            for page, data in sorted(self.pages.items())
        ]
        return {"size": self.end, "written": self.written, "patches": patches}

    # What HDF5 calls; flushing has nothing to do, since nothing waits that may be written yet.

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.end}[whence]
        return self.position

    def readinto(self, buffer: bytearray) -> int:
        view = memoryview(buffer)
        data = os.pread(self.disk.fileno(), len(view), self.position)
        view[:] = data + bytes(len(view) - len(data))
        for page, first, last in self._pages(min(len(view), self.start - self.position)):
            if page in self.pages:
                view[first - self.position : last - self.position] = self.pages[page][
                    first - page * PAGE : last - page * PAGE
                ]
        return len(view)

    def write(self, buffer: bytearray) -> int:
        view = memoryview(buffer)
        below = max(0, min(len(view), self.start - self.position))
        for page, first, last in self._pages(below):
            if page not in self.pages:
                held = os.pread(self.disk.fileno(), PAGE, page * PAGE)
                self.pages[page] = bytearray(held + bytes(PAGE - len(held)))
            self.pages[page][first - page * PAGE : last - page * PAGE] = view[
                first - self.position : last - self.position
            ]
        try:
            while below < len(view) and self.error is None:
                below += os.pwrite(self.disk.fileno(), view[below:], self.position + below)
        except BaseException as error:
            self.error = error
        self.end = max(self.end, self.position + len(view))
        return len(view)

    def truncate(self, size: int) -> int:
        self.end = size
        return size

    def _pages(self, length: int) -> Iterator[tuple[int, int, int]]:
        """The pages that `length` bytes from the position touch, and where in each they start and end."""
        end = self.position + length
        for page in range(self.position // PAGE, -(-end // PAGE)) if length > 0 else ():
            yield page, max(self.position, page * PAGE), min(end, (page + 1) * PAGE)
