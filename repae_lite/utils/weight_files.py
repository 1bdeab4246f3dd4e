"""What every reader of weights asks of a file first: that it is there, readable, and no stand-in for one."""

from pathlib import Path

from repae_lite.utils.errors import first_line

REMEDY = "get it again, or take another file"


class DamagedFile(ValueError):
    """A file of weights that is not whole.

    Attributes:
        what: the sentence without its remedy, for callers that know a better one.
    """

    def __init__(self, what: str, remedy: str):
        super().__init__(f"{what}: {remedy}")
        self.what = what


def unreadable(path: Path, error: OSError) -> OSError:
    """The sentence for a file or folder that the system does not let us read, whatever is in it."""
    kind = PermissionError if isinstance(error, PermissionError) else OSError
    remedy = "get the right to read it" if kind is PermissionError else "check the disk that it lies on"
    return kind(f"{path} cannot be read ({error.strerror or first_line(error)}): {remedy}")


def first_bytes(path: Path) -> bytes:
    """The beginning of a file of weights.

    Raises:
        FileNotFoundError: no such file.
        OSError: the system does not let us read it.
        ValueError: a folder or a device; a pointer of git-LFS or a web page in the place of the weights.
    """
    try:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: give a file of weights")
        if not path.exists():
            raise FileNotFoundError(f"the weights {path} do not exist: check the path")
        if not path.is_file():
            raise ValueError(f"{path} is no regular file: give a file of weights")
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        if error.errno is None:
            raise
        raise unreadable(path, error) from None
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a pointer of git-LFS and not the weights themselves: fetch them with git lfs pull"
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(
            f"{path} is a web page that was saved in the place of the weights: download the file itself"
        )
    return head


def is_safetensors(path: Path) -> bool:
    """Whether a file is to be read as safetensors: by its first bytes, or by its name where they say nothing.

    Raises:
        FileNotFoundError, OSError, ValueError: see `first_bytes`.
    """
    head = first_bytes(path)
    begins = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8
    return begins or (path.suffix.lower() == ".safetensors" and not head.startswith(b"PK\x03\x04"))
