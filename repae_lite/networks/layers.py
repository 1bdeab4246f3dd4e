"""Layers for large training: BatchNorm over the *whole* batch, activations recomputed instead of kept,
linear layers by the faster of two libraries.

The official code normalises by `SyncBatchNorm`, which exists on GPUs only (DIFFERENCES.md, D10); this one
works wherever torch.distributed does.
Taught in `notebooks/02_latent_diffusion.ipynb` (the latents' BatchNorm).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repae_lite.utils.devices import faster_by_convolution
from repae_lite.utils.processes import process_count, sum_over_processes


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the statistics of the batch over all processes, on any device.

    On one process it computes what PyTorch's does, by the same function. On several, mean and variance are
    those of the concatenated batch, and gradients flow through them. State dicts are PyTorch's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._given: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, batch_stats: bool | None = None) -> Tensor:
        """Normalises x (B, C, h, w).

        Args:
            x: any float dtype.
            batch_stats: None follows train/eval mode. True in eval mode uses this batch's statistics and
                leaves the running ones alone; False in train mode uses the running ones.
        """
        if not (self.training if batch_stats is None else batch_stats):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if self._given is not None:
            return F.batch_norm(x, *self._given, self.weight, self.bias, False, 0.0, self.eps)
        track = self.training and not _recomputing
        if process_count() == 1:
            running = (self.running_mean, self.running_var) if self.training else (None, None)
            if track:
                self.num_batches_tracked.add_(1)
            elif self.training:  # checkpointing wants the same operations on as many tensors
                running = (self.running_mean.clone(), self.running_var.clone())
            return F.batch_norm(x, *running, self.weight, self.bias, True, self.momentum, self.eps)
        mean, var, count = self._whole_statistics(x.float())
        if track:
            self._track(mean, var, count)
        shape = (1, -1, 1, 1)
        y = (x.float() - mean.view(shape)) * (var.view(shape) + self.eps).rsqrt()
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @contextmanager
    def whole_batch(self, x: Tensor) -> Iterator[None]:
        """Inside, micro-batches of x (B, C, h, w) are normalised as if x had not been cut.

        The statistics of x, without gradient, are tracked once, at the end.
        """
        with torch.no_grad():
            mean, var, count = self._whole_statistics(x.detach().float())
        self._given = (mean, var)
        try:
            yield
            self._track(mean, var, count)
        finally:
            self._given = None

    def _whole_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance per channel, and the number of values behind them, over all processes."""
        count = x.new_full((1,), x.numel() / x.shape[1])  # new_tensor would wait for a GPU
        total = sum_over_processes(torch.cat([x.sum((0, 2, 3)), count]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = x - mean.view(1, -1, 1, 1)
        return mean, sum_over_processes(centred.square().sum((0, 2, 3))) / count, count

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)


class Linear(nn.Linear):
    """`torch.nn.Linear`; where that is faster, a convolution over one row of tokens, with the same result.

    Attributes:
        by_convolution: whether it may be, where `repae_lite.utils.devices.faster_by_convolution` says so.
    """

    by_convolution = True

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, in_features) to (…, out_features)."""
        if not self.by_convolution or not faster_by_convolution(x):
            return super().forward(x)
        row = x.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)  # (1, C, tokens, 1), channels last
        y = F.conv2d(row, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def recompute(module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Runs a module without keeping its activations; recomputing them leaves BatchNorm's statistics alone."""
    if torch.compiler.is_compiling():  # it does not support context_fn; nothing compiled here has a BatchNorm
        return checkpoint(module, *inputs, use_reentrant=False)
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _untracked()))


def run(owner: object, module: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Calls a module, recomputing it in the backward pass if owner.gradient_checkpointing says so."""
    return (
        recompute(module, *inputs)
        if owner.gradient_checkpointing and torch.is_grad_enabled()
        else module(*inputs)
    )


def set_gradient_checkpointing(on: bool, *modules: nn.Module) -> None:
    """Switches recomputation on or off wherever there is a switch: less memory, a third more time."""
    for module in modules:
        for child in module.modules():
            if hasattr(child, "gradient_checkpointing"):
                child.gradient_checkpointing = on


_recomputing = False


@contextmanager
def _untracked() -> Iterator[None]:
    """A batch seen a second time must not move the running statistics a second time."""
    global _recomputing
    before, _recomputing = _recomputing, True
    try:
        yield
    finally:
        _recomputing = before


def check_sizes(config: object, *names: str, least: int = 1) -> None:
    """Refuses a configuration's sizes that are not whole numbers, or too small.

    Raises:
        ValueError: see above.
    """
    for name in names:
        for size in value if isinstance(value := getattr(config, name), tuple) else (value,):
            if not isinstance(size, int) or isinstance(size, bool):
                raise ValueError(f"{name} is {value!r}: it must be a whole number")
            if size < least:
                raise ValueError(f"{name} is {value!r}: it must be at least {least}")


def can_look_at(tensor: Tensor) -> bool:
    """Whether checks may read a tensor's numbers: a GPU would have to be waited for, a compiler has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, all others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
