"""Reading files of `torch.save` without running code, and saying what a refused one wanted to run.

PyTorch's `weights_only` reader builds tensors and plain containers; here it also builds the one class that
official checkpoints hold, `argparse.Namespace`, and nothing else.
"""

import argparse
import itertools
import pickletools
import re
import warnings
import zipfile
from pathlib import Path

import torch


def read_pickle(path: Path) -> dict:
    """The dict in a file of `torch.save`, if it holds tensors, plain values and argparse.Namespace only.

    Large files are not read but mapped: only tensors that are used are loaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds more, and which class or function it wanted; it is damaged; it is no dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} do not exist: check the path")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Of protocols and TorchScript: what fails for them is said below.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damaged and hostile files raise nearly anything
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        protocol, wanted = _survey(path)
        wanted = wanted or (named and named[1])
        if wanted:
            raise ValueError(
                f"{path} wants to run {wanted} when it is read: refused, since a file of weights needs no "
                "code; get its state dict as safetensors from whoever made it"
            ) from None
        if protocol > 2:
            raise ValueError(
                f"{path} is a pickle of protocol {protocol}, which PyTorch's reader of weights refuses: get "
                "its state dict as safetensors from whoever made it"
            ) from None
        raise ValueError(
            f"{path} is not a whole file of torch.save with tensors and plain values: get it again"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}: give a file with a state dict or a run's checkpoint"
        )
    return content


_PLAIN = re.compile(  # what files of torch.save are made of
    r"torch\.(\w+Storage|storage\.\w+|_utils\._\w+|_tensor\._\w+|nn\.parameter\.(Parameter|Buffer)|Size|device|"
    r"bool|b?float\d+\w*|u?int\d+|complex\d+|q\w*int\d+\w*)|argparse\.Namespace|_codecs\.encode|"
    r"collections\.(OrderedDict|Counter|defaultdict)|(builtins|__builtin__)\.(set|complex|bytearray)"
)
_LARGEST, _STEPS = 1 << 26, 3_000_000  # bytes and steps of a pickle that are looked through


def _survey(path: Path) -> tuple[int, str | None]:
    """The highest protocol of a file's pickles (0: none is whole), and the first foreign name in them.

    That is a class or function that is not of PyTorch's own format. Nothing is run. An old file of torch.save
    holds several pickles, one after the other, and then its numbers.
    """
    protocol, whole = 0, False
    try:
        archive = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        if archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if entry.file_size > _LARGEST:
                return 0, None
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
                if name and not _PLAIN.fullmatch(name):
                    return protocol, name
    except Exception:
        pass  # where the numbers of an old file begin, or damaged
    return protocol if whole else 0, None


def _operations(file):
    """The operations of all pickles in a file: (name, argument)."""
    while True:
        for operation, value, _ in pickletools.genops(file):
            yield operation.name, value
