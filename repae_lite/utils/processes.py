"""Am I one of several processes, and what do the others have: the collectives that this project needs."""

import os

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


def refuse_together(error: Exception | None) -> None:
    """Ends every process if the first one has an error, which it alone raises; all must call this.

    Args:
        error: of this process; None if it has none.

    Raises:
        Exception: the error, in the first process.
        SystemExit: 2, in the others.
    """
    if process_count() > 1:
        from accelerate.utils import broadcast_object_list

        if broadcast_object_list([error is not None])[0]:
            raise error if error is not None and process_rank() == 0 else SystemExit(2)
    if error is not None:
        raise error


@torch.no_grad()
def same_everywhere(*modules: nn.Module | None) -> None:
    """Gives every process the weights of the first."""
    for module in filter(None, modules):
        for tensor in module.state_dict().values():
            from_first_process(tensor)
