"""Reading files of `torch.save` without running code, and saying what a refused one wanted to run.

PyTorch's `weights_only` reader builds tensors and plain containers; here it also builds the one class that
official checkpoints hold, `argparse.Namespace`. Objects of training frameworks (Lightning's callbacks,
OmegaConf's options, …) lie beside the weights in files of other projects; empty ones take their place.
"""

import argparse
import itertools
import logging
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path

import torch

from repae_lite.utils.errors import first_line
from repae_lite.utils.weight_files import REMEDY, DamagedFile, first_bytes, unreadable

logger = logging.getLogger(__name__)

NESTED = 60  # containers in each other; those of training checkpoints are about five
_LARGEST, _STEPS = 1 << 26, 3_000_000  # bytes and steps of a pickle that are looked through
_CHECKED = 1 << 30  # bytes of an archive whose checksums are looked at


def read_pickle(path: Path, *, remedy: str = REMEDY) -> dict:
    """The dict in a file of `torch.save`, if it holds tensors, plain values and argparse.Namespace only.

    Large files are not read but mapped, where the disk can: only tensors that are used are loaded. What lies
    on a GPU or another device comes to the CPU.

    Args:
        path: the file.
        remedy: what to do if it is damaged.

    Raises:
        FileNotFoundError, OSError, ValueError: see `first_bytes`.
        ValueError: it holds more, and which class or function it wanted; it is no dict, or nested too deeply.
        DamagedFile: it is not whole.
    """
    first_bytes(path)
    try:
        content = _loaded(path)
    except OSError as error:
        if error.errno is None:
            raise DamagedFile(_not_whole(path, error), remedy) from None
        raise unreadable(path, error) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged and hostile files raise nearly anything
        content = _without_bystanders(path, error, remedy)
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}: give a file with a state dict or a run's checkpoint"
        )
    _check_nesting(content, path)
    return content


def _loaded(path: Path, bystanders: tuple[type, ...] = ()) -> object:
    """What PyTorch's reader of weights makes of a file."""
    mapped = _can_be_mapped(path)
    _refuse_bytearrays(path)
    with torch.serialization.safe_globals([argparse.Namespace, *bystanders]), warnings.catch_warnings():
        # Of protocols and TorchScript: what fails for them is said elsewhere.
        warnings.simplefilter("ignore", UserWarning)
        if mapped:
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (OSError, RuntimeError):
                pass  # a disk that maps no files; if it is something else, reading it finds the same
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)


def _can_be_mapped(path: Path) -> bool:
    """Whether the numbers of an archive lie in it as they are; warns of those whose checksum is another.

    Raises:
        ValueError: it unpacks to much more than it is.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries, size = archive.infolist(), path.stat().st_size
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > 10 * size + _LARGEST:
            raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}")
        damaged = archive.testzip() if size <= _CHECKED else None
    if damaged:
        logger.warning(f"{path}: the checksum of {damaged} in it is another, so its numbers may be damaged")
    return path.suffix != ".safetensors" and all(entry.file_size == entry.compress_size for entry in entries)


def _refuse_bytearrays(path: Path) -> None:
    """Refuses a pickle that asks for a bytearray: PyTorch's reader would make one of any size.

    Raises:
        ValueError: it does.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            heads = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    else:
        with open(path, "rb") as file:
            heads = [file.read(_LARGEST)]
    if any(_BYTEARRAY.search(head) for head in heads):
        raise ValueError("GLOBAL builtins.bytearray")


def _not_whole(path: Path, error: BaseException) -> str:
    said = first_line(error)
    words = "" if said.startswith("Weights only load failed") else f" ({said})"
    return f"{path} is not a whole file of torch.save with tensors and plain values{words}"


def _without_bystanders(path: Path, error: Exception, remedy: str) -> object:
    """The content of a file that PyTorch's reader refused, if all that it wants more are known bystanders.

    Raises:
        ValueError: it wants more than these, or is of a protocol that is not read.
        DamagedFile: it is not whole.
    """
    protocol, wanted = _survey(path)
    foreign = [name for name in wanted if not _BYSTANDERS.fullmatch(name)]
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named and not wanted:
        foreign = [named[1]]
    if foreign:
        raise ValueError(
            f"{path} wants to run {foreign[0]} when it is read: refused, since a file of weights needs no "
            "code; get its state dict as safetensors from whoever made it"
        ) from None
    if wanted:
        try:
            content = _loaded(path, tuple(_bystander(name) for name in wanted))
        except Exception as second:
            error = second
        else:
            roots = sorted({name.split(".")[0] for name in wanted})
            logger.info(f"{path}: objects of {', '.join(roots)} in it are left aside")
            return content
    if protocol > 2:
        raise ValueError(
            f"{path} is a pickle of protocol {protocol}, which PyTorch's reader of weights refuses: get "
            "its state dict as safetensors from whoever made it"
        ) from None
    raise DamagedFile(_not_whole(path, error), remedy) from None


def _check_nesting(content: dict, path: Path) -> None:
    """Refuses containers that lie in each other very deeply, or in themselves: whoever walks them would fail.

    Raises:
        ValueError: they do.
    """
    level: dict[int, object] = {id(content): content}
    for _ in range(NESTED):
        inside = (value for holder in level.values() for value in _values(holder))
        level = {id(value): value for value in inside if isinstance(value, _CONTAINERS)}
        if not level:
            return
    raise ValueError(f"{path} holds values that lie in each other more than {NESTED} deep: it is refused")


_CONTAINERS = (dict, list, tuple, set, argparse.Namespace)


def _values(holder: object) -> list:
    if isinstance(holder, argparse.Namespace):
        holder = vars(holder)
    return [*holder.keys(), *holder.values()] if isinstance(holder, dict) else [*holder]


# ---------------------------------------------------------------- what a pickle names

_PLAIN = re.compile(  # what files of torch.save are made of
    r"torch\.(\w+Storage|storage\.\w+|_utils\._\w+|_tensor\._\w+|nn\.parameter\.(Parameter|Buffer)|Size|device|"
    r"bool|b?float\d+\w*|u?int\d+|complex\d+|q\w*int\d+\w*)|argparse\.Namespace|_codecs\.encode|"
    r"collections\.(OrderedDict|Counter)|(builtins|__builtin__)\.(set|complex)"
)
_BYTEARRAY = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")
_BYSTANDERS = re.compile(  # what lies beside the weights in checkpoints of training frameworks
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|omegaconf|ml_collections|easydict|numpy)"
    r"\.[\w.]+|pathlib\.\w*Path|datetime\.\w+|typing\.Any|collections\.(defaultdict|deque)|"
    r"copy_?reg\._reconstructor|(builtins|__builtin__)\.(dict|list|tuple|int|long|float|str|unicode|bool|bytes|object)"
)


class _Bystander(dict):
    """Stands in for an object of another library: takes whatever it was made of, and keeps nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        super().__init__()

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def update(self, *_, **__):
        """Nothing is kept."""

    __hash__ = object.__hash__


def _bystander(name: str) -> type[_Bystander]:
    module, _, cls = name.rpartition(".")
    module, cls = NAME_MAPPING.get((module, cls), (IMPORT_MAPPING.get(module, module), cls))  # of Python 2
    return type(cls, (_Bystander,), {"__module__": module})


def _survey(path: Path) -> tuple[int, list[str]]:
    """The highest protocol of a file's pickles (0: none is whole), and the foreign names in them.

    They are classes and functions that are not of PyTorch's own format. Nothing is run. An old file of
    torch.save holds several pickles, one after the other, and then its numbers.
    """
    protocol, whole, foreign = 0, False, []
    try:
        archive = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        if archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if entry.file_size > _LARGEST:
                return 0, []
        with archive.open(entry) if archive else open(path, "rb") as file:
            strings, memo = [], {}
            for operation, value in itertools.islice(_operations(file), _STEPS):
                name = None
                if operation == "PROTO":
                    protocol = max(protocol, value)
                elif operation in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
                    memo[len(memo) if value is None else value] = strings[-1:]
                elif operation in ("BINGET", "LONG_BINGET", "GET"):
                    strings += memo.get(value, [])
                elif operation in ("GLOBAL", "INST"):
                    name = value.replace(" ", ".")
                elif operation == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif operation == "STOP":
                    strings, memo, whole = [], {}, True
                elif isinstance(value, str):
                    strings.append(value)
                if name and not _PLAIN.fullmatch(name) and name not in foreign:
                    foreign.append(name)
    except Exception:
        pass  # where the numbers of an old file begin, or damaged
    return protocol if whole else 0, foreign


def _operations(file):
    """The operations of all pickles in a file: (name, argument)."""
    while True:
        for operation, value, _ in pickletools.genops(file):
            yield operation.name, value
