"""Time, memory and operations of a piece of work, and what the device can do at most.

Used by `repae bench`; knows nothing of what is measured.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from repae_lite.utils.progress import progress_bar

REST = "rest"  # what belongs to no part


# ---------------------------------------------------------------- time


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all it was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    warmup: int,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every repeat of each call; the calls take turns, every second round in the other order.

    Args:
        calls: by name.
        device: waited for before the clock starts and before it stops.
        repeats: timed rounds.
        warmup: rounds before, which are not timed.
        progress: show a bar, between the calls.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    rounds = warmup + repeats
    with progress_bar(rounds * len(calls), 0, show=progress, unit="calls") as bar:
        for i in range(rounds):
            for name in list(calls)[:: -1 if i % 2 else 1]:
                synchronize(device)
                start = time.perf_counter()
                calls[name]()
                synchronize(device)
                if i >= warmup:
                    found[name].append(time.perf_counter() - start)
                bar.update()
    return found


def summary(values: list[float]) -> dict[str, float | list[float]]:
    """Median and quartiles of measured values, and the values."""
    low, median, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high, "values": values}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much spans (begin, end) cover; what several cover counts once."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def device_seconds(call: Callable[[], object], device: torch.device) -> float | None:
    """For how long a GPU computes or copies during a call; None but on CUDA, and where torch's profiler may
    not look into it.
    """
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize(device)
    ranges = [e.time_range for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return covered((each.start, each.end) for each in ranges) / 1e6 if ranges else None


# ---------------------------------------------------------------- memory


def peak_resident() -> int | None:
    """The most bytes of main memory that this process has held; None where the system does not say.

    Not `resource.getrusage`: a new process begins there with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


# ---------------------------------------------------------------- operations


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operations read and write, each by itself, as if nothing were fused or cached.

    Attributes:
        total: bytes so far; views count nothing.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read, written = _tensors((args, kwargs)), _tensors(out)
        changed = [
            argument.name for argument in func._schema.arguments if argument.alias_info is not None
            and argument.alias_info.is_write
        ]  # fmt: skip
        if changed:  # in place: what is written is one of the arguments
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            written = _tensors([given.get(name) for name in changed])
        elif all(any(_same(one, other) for other in read) for one in written):
            return out
        self.total += sum(tensor.numel() * tensor.element_size() for tensor in read + written)
        return out


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


@contextmanager
def counting() -> Iterator[Callable[[], np.ndarray]]:
    """Inside, operations are counted; the function tells how much so far: [FLOPs, bytes].

    FLOPs are those of matrix products, convolutions and attention, two to a multiplication.
    """
    with FlopCounterMode(display=False) as flops, ByteCounter() as moved:
        yield lambda: np.array([flops.get_total_flops(), moved.total], dtype=np.float64)


# ---------------------------------------------------------------- parts


class Parts:
    """Splits what is spent, time or operations, among the parts of a program.

    Args:
        stamp: what has been spent so far; called at every change of parts.
        between: how much lies between two stamps.

    Attributes:
        now: the part that is running.
    """

    def __init__(self, stamp: Callable[[], object], between: Callable[[object, object], object]):
        self.between, self.stamp, self.now = between, stamp, REST
        self._stamps = [(REST, stamp())]

    def switch(self, part: str) -> None:
        """From here on another part is running."""
        self.now = part
        self._stamps.append((part, self.stamp()))

    def totals(self) -> dict[str, object]:
        """What every part spent until now, by name; the sum is what all spent."""
        self.switch(REST)
        found: dict[str, object] = {}
        for (part, begin), (_, end) in zip(self._stamps, self._stamps[1:], strict=False):
            spent = self.between(begin, end)
            found[part] = found[part] + spent if part in found else spent
        return found


def timed_parts(device: torch.device) -> Parts:
    """Parts whose seconds are measured: on CUDA those of the GPU's own clock, which nothing waits for."""
    if device.type == "cuda":

        def event() -> torch.cuda.Event:
            made = torch.cuda.Event(enable_timing=True)
            made.record(torch.cuda.current_stream(device))
            return made

        def seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1e3

        return Parts(event, seconds)

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    return Parts(clock, lambda begin, end: end - begin)


class _Mark(torch.autograd.Function):
    """The identity; its backward pass switches parts."""

    @staticmethod
    def forward(ctx, x: Tensor, parts: Parts, part: str) -> Tensor:
        ctx.parts, ctx.part = parts, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.parts.switch(ctx.part)
        return gradient, None, None


def watched(call: Callable, name: str, parts: Parts) -> Callable:
    """A function of tensors as the parts "NAME, forward" and "NAME, backward".

    The backward part ends where the inputs' gradients are known; if no input has one, whoever calls
    `backward` must switch.
    """

    def marked(tensors: object, part: str) -> object:
        def mark(x: object) -> object:
            return _Mark.apply(x, parts, part) if isinstance(x, Tensor) and x.requires_grad else x

        return torch.utils._pytree.tree_map(mark, tensors)

    def run(*args, **kwargs):
        args, before = marked(args, REST), parts.now
        parts.switch(f"{name}, forward")
        try:
            out = call(*args, **kwargs)
        finally:  # checkpointing ends what it repeats by an error
            parts.switch(before)
        return marked(out, f"{name}, backward")

    return run


# ---------------------------------------------------------------- what the device can do


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product: the best of some repeats."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = in_turns({"": lambda: a @ b}, device, repeats=10, warmup=3)[""]
    return 2 * side**3 / min(seconds)


def copy_peak(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a large tensor: the best of some repeats."""
    size = 2**26 if device.type == "cpu" else 2**30
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = in_turns({"": lambda: target.copy_(source)}, device, repeats=10, warmup=3)[""]
    return 2 * size / min(seconds)
