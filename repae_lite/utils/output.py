"""Standard output and errors that may fail: a closed pipe or a full disk must not end hours of work."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class _Patient:
    """A stream that goes on where writing fails; what cannot be written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: it was closed
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a terminal without these characters
                self._stream.write(text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def finish(self) -> None:
        """Writes what is left, or drops it, so that the interpreter's end does not try again and fail."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def patient_output() -> Iterator[None]:
    """Inside, writing to standard output and errors never fails; also a decorator.

    Where one of the three standard files is closed, nothing is put in its place: the next file that a program
    opens would get its number, and with it what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    streams = [_Patient(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:
            stream.finish()
        sys.stdout, sys.stderr = before
