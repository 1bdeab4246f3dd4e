"""State dicts as safetensors: written whole, read without running code, filled in all or not at all."""

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from repae_lite.utils.errors import first_line
from repae_lite.utils.files import atomic_path
from repae_lite.utils.weight_files import REMEDY, DamagedFile, first_bytes, unreadable

RESTORE = "restore it from the repository (git checkout data_small)"  # for what ships with the project


def save_weights(path: str | Path, module: nn.Module, metadata: dict | None = None) -> None:
    """Writes a module's state dict as safetensors; `metadata` (JSON values) travels in the header."""
    save_state(path, module.state_dict(), {key: json.dumps(value) for key, value in (metadata or {}).items()})


def save_state(path: str | Path, state: dict[str, Tensor], header: dict[str, str]) -> None:
    """Writes a state dict as safetensors, atomically."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, header)
    with atomic_path(path) as partial, open(partial, "wb") as file:
        for part in _in_order(memoryview(data)):
            file.write(part)


def _in_order(data: memoryview) -> tuple[bytes, memoryview]:
    """Header and numbers of a safetensors file, its metadata sorted.

    The library writes it in an order that changes from one process to the next, and equal weights should make
    equal files.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the numbers stay aligned
    return len(text).to_bytes(8, "little") + text, data[start:]


def read_weights(path: str | Path, *, remedy: str = REMEDY) -> tuple[dict[str, Tensor], dict]:
    """The (state dict, metadata) of a file written by `save_weights`.

    Args:
        path: the file.
        remedy: what to do if it is damaged.

    Raises:
        FileNotFoundError, OSError, ValueError: see `repae_lite.utils.weight_files.first_bytes`.
        DamagedFile: not a whole safetensors file.
    """
    path = Path(path)
    with _reading(path, remedy):
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, _values(file.metadata())
        except (OSError, RuntimeError):  # a disk that maps no files: what else it may be, reading finds too
            return load(path.read_bytes()), read_metadata(path, remedy=remedy)


def read_metadata(path: str | Path, *, remedy: str = REMEDY) -> dict:
    """The metadata alone: reads the header and no weights. Arguments and errors as `read_weights`."""
    path = Path(path)
    with _reading(path, remedy), open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size - 8:
            raise SafetensorError(f"its header of {size:,} bytes is longer than the file")
        header = json.loads(file.read(size))
        metadata = header.get("__metadata__") if isinstance(header, dict) else header
        if not isinstance(header, dict) or not isinstance(metadata, dict | None):
            raise SafetensorError("its header is no JSON object")
        return _values(metadata)


def _values(metadata: dict | None) -> dict:
    return {key: _value(text) for key, text in (metadata or {}).items()}


def _value(text: str) -> object:
    """What `save_weights` wrote is JSON; the strings of other makers stay what they are."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return text


@contextmanager
def _reading(path: Path, remedy: str) -> Iterator[None]:
    """Turns what reading a safetensors file fails with into a sentence."""
    first_bytes(path)
    try:
        yield
    except (SafetensorError, RuntimeError, ValueError) as error:
        if isinstance(error, DamagedFile):
            raise
        raise DamagedFile(f"{path} is not a whole safetensors file ({first_line(error)})", remedy) from None
    except OSError as error:
        raise unreadable(path, error) from None


_REPEATED = 1 << 26  # bytes that tensors may have beyond the numbers of a file, which they repeat
_WRAPPERS = re.compile(r"(module|_orig_mod|_fsdp_wrapped_module)\.")  # of DDP, torch.compile, FSDP


def plain_state(state: dict, source: str | Path) -> dict[str, Tensor]:
    """A state dict without the prefixes that DistributedDataParallel and torch.compile put before names.

    Raises:
        ValueError: it holds something else than names and tensors, or nothing; or one name twice.
    """
    other = [
        f"{name} ({type(value).__name__})"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, Tensor)) or value.is_nested
    ]
    if other or not state:
        raise ValueError(f"{source} is no state dict: it holds {', '.join(other[:3]) or 'nothing'}")
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = name
        while wrapper := _WRAPPERS.match(bare):
            bare = bare[wrapper.end() :]
        if tensor.layout == torch.strided and not tensor.is_meta:
            held = tensor.untyped_storage().nbytes()
            if tensor.nbytes > 8 * held + _REPEATED:
                raise ValueError(
                    f"{source} holds {name} of {tensor.nbytes:,} bytes in {held:,} bytes of numbers: {REMEDY}"
                )
        if bare in plain:
            raise ValueError(f"{source} holds {bare} twice, once as {name}: keep one of them")
        plain[bare] = tensor
    return plain


def load_weights(path: str | Path, module: nn.Module) -> nn.Module:
    """Fills a module with the weights of a file, all of them or none, and returns it in eval mode.

    Raises:
        FileNotFoundError, OSError, ValueError: see `read_weights` and `fill_module`.
    """
    return fill_module(module, read_weights(path, remedy=RESTORE)[0], path)


def fill_module(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> nn.Module:
    """Fills a module with a state dict read from `source`, all of it or nothing, and returns it in eval mode.

    Raises:
        ValueError: see `check_fits`; or numbers that are not finite.
    """
    check_fits(module, state, source)
    filled = {}
    for name, own in module.state_dict().items():
        try:
            filled[name] = tensor = state[name].to(own.dtype)
        except RuntimeError as error:  # numbers that PyTorch stores and cannot convert
            raise ValueError(
                f"{source} holds {name} as {state[name].dtype}, which cannot be converted "
                f"({first_line(error)}): save it as float32"
            ) from None
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{source} holds NaN or infinity in {name}: take an earlier checkpoint, or get the file again"
            )
    module.load_state_dict(filled)
    return module.eval()


def build_module(
    kind: type[nn.Module], config: object, state: dict[str, Tensor], source: str | Path
) -> nn.Module:
    """A network of this kind, filled with a state dict and in eval mode.

    The state dict is first held against a sketch without memory: sizes that a file names may be anything. A
    sketch of more parameters than the file has tensors is given up, and so is one that needs much more memory
    than the file has numbers (tensors may repeat theirs).

    Raises:
        ValueError: there is no network of these sizes; or see `fill_module`.
    """
    try:
        with torch.device("meta"), _at_most(2 * len(state) + 100):
            sketch = kind(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{source} has sizes of which no {kind.__name__} can be built ({first_line(error)}): {REMEDY}"
        ) from None
    check_fits(sketch, state, source)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()
    }
    needed = sum(tensor.nbytes for tensor in sketch.state_dict().values())
    if needed > 8 * sum(held.values()) + _REPEATED:
        raise ValueError(
            f"{source} has sizes of {needed:,} bytes for {sum(held.values()):,} bytes of numbers: {REMEDY}"
        )
    return fill_module(kind(config), state, source)


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Ends the making of a module that has more parameters, with a LookupError."""
    left = itertools.count(count, -1)

    def count_down(*_) -> None:
        if next(left) < 0:
            raise LookupError(f"more than {count} parameters")

    handle = register_module_parameter_registration_hook(count_down)
    try:
        yield
    finally:
        handle.remove()


def check_fits(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Refuses a state dict that is not a module's; the module may be on the meta device, without memory.

    Raises:
        ValueError: names, shapes or kinds of numbers differ: the first three.
    """
    own = module.state_dict()
    wrong = []
    for name in sorted(own.keys() | state.keys(), key=str):
        mine, given = (_shape(tensors[name]) if name in tensors else None for tensors in (own, state))
        if mine is None or given is None or mine != given:
            wrong.append(f"{name} {given or 'missing'} instead of {mine or 'nothing'}")
        elif (
            state[name].layout != torch.strided
            or state[name].is_meta
            or _kind(state[name]) != _kind(own[name])
        ):
            wrong.append(
                f"{name} of {state[name].device} {state[name].layout} {state[name].dtype} instead of "
                f"{own[name].dtype}"
            )
    if wrong:
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(wrong[:3])} ({len(wrong)} in all)"
        )


def _kind(tensor: Tensor) -> str:
    return "real" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
