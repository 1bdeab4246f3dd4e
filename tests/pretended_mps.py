"""A device without float64, and with memory of its own, for machines that have none: it stands in for MPS.

Its tensors lie in the CPU's memory and say that they are elsewhere. Whatever MPS refuses is refused: float64,
operands on two devices, generators of another device, NumPy.
"""

from contextlib import ExitStack, contextmanager
from functools import cache

import torch
import torch._dynamo  # optimisers import it, which must see torch as it is
import torch.utils._device as default_device
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

MPS, CPU = torch.device("mps"), torch.device("cpu")
NO_FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
COPYING = ("new_tensor", "__deepcopy__")  # by ways of their own
CROSSING = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")  # may read the CPU's tensors


def is_on_mps(device) -> bool:
    return device is not None and torch.device(device).type == "mps"


class Generator(torch.Generator):
    """A generator of either device."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, CPU)
        made.on_mps = is_on_mps(device)
        return made

    @property
    def device(self) -> torch.device:
        return MPS if self.on_mps else CPU


class _Storages(TorchDispatchMode):
    """Which storages are the device's; what is computed from them is, too."""

    def __init__(self):
        super().__init__()
        self.ours, self.moving = WeakIdKeyDictionary(), 0

    def holds(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.untyped_storage() in self.ours

    def adopt(self, tensor: Tensor) -> Tensor:
        if tensor.dtype in (torch.float64, torch.complex128):
            raise TypeError(NO_FLOAT64)
        self.ours[tensor.untyped_storage()] = True
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if self.moving or not any(map(self.holds, given)):
            return out
        name = func._schema.name.partition("::")[2]
        if name == "copy_" and not self.holds(given[0]):
            return out
        if name not in CROSSING and any(x.dim() and not self.holds(x) for x in given):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found mps and cpu: {name}"
            )
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.adopt(x)
        return out


class _Functions(TorchFunctionMode):
    """Devices as arguments and as attributes."""

    def __init__(self, storages: _Storages):
        super().__init__()
        self.storages, self.default = storages, None

    def move(self, tensor: Tensor, device, dtype=None, copy: bool = False) -> Tensor:
        storages, here = self.storages, MPS if self.storages.holds(tensor) else CPU
        there = here if device is None else torch.device(device)
        if there.type == here.type and not copy and dtype in (None, tensor.dtype):
            return tensor
        if there.type == "meta":
            return tensor.to("meta", dtype)
        storages.moving += 1
        try:
            out = tensor.to(dtype=dtype or tensor.dtype, copy=True)
        finally:
            storages.moving -= 1
        return storages.adopt(out) if there.type == "mps" else out

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, storages, name = dict(kwargs or {}), self.storages, getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func is Tensor.to:
            if isinstance(args[1] if len(args) > 1 else None, Tensor):
                device, dtype = (MPS if storages.holds(args[1]) else CPU), args[1].dtype
            else:
                copy = kwargs.pop("copy", False)
                device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
                return self.move(first, device, dtype, copy)
            return self.move(first, device, dtype)
        if func is Tensor.cpu:
            return self.move(first, CPU)
        if func in (Tensor.numpy, Tensor.__array__) and storages.holds(first):
            raise TypeError("can't convert mps:0 device type tensor to numpy")
        if func == Tensor.device.__get__ and storages.holds(first):
            return MPS
        constructor = func in default_device._device_constructors()
        if constructor and kwargs.get("device") is None:
            kwargs["device"] = default_device.CURRENT_DEVICE or self.default or CPU
        on_mps, g = is_on_mps(kwargs.get("device")), kwargs.get("generator")
        if constructor and g is not None and is_on_mps(g.device) != on_mps:
            raise RuntimeError(
                f"Expected a {kwargs['device']} device type for generator but found {g.device}"
            )
        if not on_mps:
            out = func(*args, **kwargs)
            return storages.adopt(out) if name in COPYING and storages.holds(first) else out
        if name in ("as_tensor", "asarray", "tensor") and first is not None:
            return self.move(first, MPS, kwargs.get("dtype"))
        return storages.adopt(func(*args, **kwargs | {"device": CPU}))


@contextmanager
def pretended_mps(monkeypatch):
    """Inside, this machine has the device "mps"."""
    storages = _Storages()
    functions = _Functions(storages)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.backends.mps, "is_available", cache(lambda: True))
    monkeypatch.setattr(torch, "set_default_device", lambda device: setattr(functions, "default", device))
    monkeypatch.setattr(
        torch,
        "get_default_device",
        lambda: torch.device(default_device.CURRENT_DEVICE or functions.default or CPU),
    )
    with ExitStack() as stack:
        stack.enter_context(storages)
        stack.enter_context(functions)
        yield storages
