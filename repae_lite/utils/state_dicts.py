"""State dicts as safetensors: written whole, read without running code, filled in all or not at all."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from repae_lite.utils.files import atomic_path


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


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The (state dict, metadata) of a file written by `save_weights`. Errors as in `read_metadata`."""
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        return state, _metadata(file)


def read_metadata(path: str | Path) -> dict:
    """The metadata alone: reads the header and none of the weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file.
    """
    with _opened(path) as file:
        return _metadata(file)


def _metadata(file: safe_open) -> dict:
    return {key: _value(text) for key, text in (file.metadata() or {}).items()}


def _value(text: str) -> object:
    """What `save_weights` wrote is JSON; the strings of other makers stay what they are."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return text


@contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights {path} do not exist: check the path, or restore the file from the repository"
        )
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): get it again, or write it with save_weights"
        ) from None


def plain_state(state: dict, source: str | Path) -> dict[str, Tensor]:
    """A state dict without the prefixes that DistributedDataParallel and torch.compile put before names.

    Raises:
        ValueError: it holds something else than names and tensors, or nothing.
    """
    other = [
        f"{name} ({type(value).__name__})"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if other or not state:
        raise ValueError(f"{source} is no state dict: it holds {', '.join(other[:3]) or 'nothing'}")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in state.items()}


def load_weights(path: str | Path, module: nn.Module) -> nn.Module:
    """Fills a module with the weights of a file, all of them or none, and returns it in eval mode.

    Raises:
        FileNotFoundError, ValueError: see `read_weights` and `fill_module`.
    """
    return fill_module(module, read_weights(path)[0], path)


def fill_module(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> nn.Module:
    """Fills a module with a state dict read from `source`, all of it or nothing, and returns it in eval mode.

    Raises:
        ValueError: see `check_fits`; or numbers that are not finite.
    """
    check_fits(module, state, source)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{source} holds NaN or infinity in {name}: take an earlier checkpoint, or get the file again"
            )
    module.load_state_dict(state)
    return module.eval()


def build_module(
    kind: type[nn.Module], config: object, state: dict[str, Tensor], source: str | Path
) -> nn.Module:
    """A network of this kind, filled with a state dict and in eval mode.

    The state dict is first held against a sketch without memory: sizes that a file names may be anything.

    Raises:
        ValueError: there is no network of these sizes; or see `fill_module`.
    """
    try:
        with torch.device("meta"):
            sketch = kind(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source} has sizes of which no {kind.__name__} can be built ({reason}): get it again"
        ) from None
    check_fits(sketch, state, source)
    return fill_module(kind(config), state, source)


def check_fits(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Refuses a state dict that is not a module's; the module may be on the meta device, without memory.

    Raises:
        ValueError: names, shapes or kinds of numbers differ: the first three.
    """
    own = module.state_dict()
    wrong = []
    for name in sorted(own.keys() | state.keys()):
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
