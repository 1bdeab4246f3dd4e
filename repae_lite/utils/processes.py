"""Am I one of several processes, and what do the others have: the collectives that this project needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def local_process_count() -> int:
    """How many processes work together on this machine; 1 for a process alone."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def process_count() -> int:
    """How many processes work together; 1 for a process alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def from_first_process(values: Tensor) -> Tensor:
    """The first process's values, in every process; changed in place."""
    if process_count() > 1:
        dist.broadcast(values, 0)
    return values


def sum_over_processes(values: Tensor) -> Tensor:
    """Element-wise sum of equal shapes over processes; gradients flow through it."""
    return _Sum.apply(values) if process_count() > 1 else values


class _Sum(torch.autograd.Function):
    """Sum over processes. The gradient sums too: every process's loss depends on every process's input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def mean_over_processes(values: Tensor) -> Tensor:
    """Element-wise mean of equal shapes over processes; changed in place, without gradient."""
    if process_count() > 1:
        dist.all_reduce(values)
        values /= process_count()
    return values


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process."""
    return bool(mean_over_processes(torch.tensor([float(flag)], device=device)) > 0)


@torch.no_grad()
def same_everywhere(*modules: nn.Module | None) -> None:
    """Gives every process the weights of the first."""
    for module in filter(None, modules):
        for tensor in module.state_dict().values():
            from_first_process(tensor)


@contextmanager
def together() -> Iterator[None]:
    """Inside, an error in one process ends all of them, and none waits for it; also a decorator.

    All processes must enter. It ends as a barrier does: when the last one is through.

    Raises:
        SystemExit: 2, where another process, the first that failed, says why.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = [failure is not None]
    if process_count() > 1:
        failed = [False] * process_count()
        dist.all_gather_object(failed, failure is not None)
    if any(failed):
        raise failure if failure and failed.index(True) == process_rank() else SystemExit(2)
