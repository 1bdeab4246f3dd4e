"""One training step on many processes: which of them has which images, draws and gradients.

Everything random in step s follows from the seed and s, for the whole batch; each process takes its slice. So
N processes with b images make the step of one process with N * b, and a resumed run needs no generator's
state to continue as if it had never stopped.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from repae_lite.method.interpolant import sample_time
from repae_lite.method.steps import Draws, Mechanics
from repae_lite.utils.processes import mean_over_processes, process_count
from repae_lite.utils.seeding import generator

BUCKET = 2**24  # numbers that are averaged over processes at once: 64 MiB
PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def share_of(total: int, rank: int, processes: int) -> slice:
    """A process's images in a batch of `total`: contiguous, as many for each.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    if total % processes:
        raise ValueError(
            f"a batch of {total} images cannot be shared evenly by {processes} processes: choose a multiple"
        )
    return slice(total // processes * rank, total // processes * (rank + 1))


class StepBatches(Sampler):
    """The indices of one process's images, a list per training step, from any step on.

    Each epoch is a permutation of its own; what does not fill a batch at its end is left out, as in the
    official run.

    Args:
        count: images in the data.
        batch: images of a step, over all processes.
        share: this process's slice of them.
        seed: of the permutations.
        steps: the steps to come.

    Attributes:
        per_epoch: steps of an epoch.

    Raises:
        ValueError: the batch is larger than the data.
    """

    def __init__(self, count: int, *, batch: int, share: slice, seed: int, steps: range):
        if count < batch:
            raise ValueError(
                f"a step takes {batch} images but the data has {count}: choose a smaller --batch-size"
            )
        self.count, self.batch, self.share, self.seed, self.steps = count, batch, share, seed, steps
        self.per_epoch = count // batch

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch, epoch, order = self.per_epoch, None, torch.empty(0)
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = torch.randperm(self.count, generator=generator("order", self.seed, epoch))
            start = step % per_epoch * self.batch
            yield order[start : start + self.batch][self.share].tolist()


def draw(
    seed: int,
    step: int,
    batch: int,
    latent: tuple[int, int, int],
    *,
    path: str,
    weighting: str,
    label_dropout: float,
) -> Draws:
    """All random numbers of a step for the whole batch, on the CPU; `latent` is the shape (C, h, w)."""
    g = generator("draws", seed, step)
    return Draws(
        eps_posterior=torch.randn(batch, *latent, generator=g),
        t=sample_time(batch, weighting=weighting, path=path, generator=g),
        eps=torch.randn(batch, *latent, generator=g),
        label_drop=torch.rand(batch, generator=g) < label_dropout,
    )


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients by their mean over processes, a bucket at a time."""
    if process_count() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    while gradients:
        bucket, size = [], 0
        while gradients and (not bucket or size + gradients[0].numel() <= BUCKET):
            bucket.append(gradients.pop(0))
            size += bucket[-1].numel()
        flat = mean_over_processes(torch.cat([g.flatten() for g in bucket]))
        for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(mean.view_as(g))


class ParallelMechanics(Mechanics):
    """Updates in mixed precision, with gradients averaged over processes.

    Gradients are averaged here, and not by DistributedDataParallel, so that SiT's and the VAE's methods stay
    plain calls. With fp16 each optimiser has its own loss scale.

    Args:
        device: where the networks are.
        precision: "no", "fp16" or "bf16".
        optimizers: by name.
        strict: a norm that is not finite raises an error; otherwise the update is left out. (fp16 always
            leaves it out and lowers its scale.)
        more: see `Mechanics`.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        optimizers: dict[str, torch.optim.Optimizer],
        *,
        strict: bool = True,
        **more,
    ):
        super().__init__(**more)
        self.device, self.dtype, self.strict = device, PRECISIONS[precision], strict
        self.scalers = {
            name: torch.amp.GradScaler(device.type) for name in optimizers if self.dtype == torch.float16
        }
        self._scaler_of = {optimizers[name]: scaler for name, scaler in self.scalers.items()}

    def autocast(self) -> AbstractContextManager:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Adds the gradient of one micro-batch's share of the loss, scaled if it is fp16."""
        scaler = self._scaler_of.get(optimizer)
        (scaler.scale(loss) if scaler else loss).backward()

    def update(self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Averages, clips and applies the gradients; returns their norm before clipping."""
        average_gradients(module.parameters())
        scaler = self._scaler_of.get(optimizer)
        if self.strict and not scaler:
            return super().update(module, optimizer, max_norm)
        if scaler:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        if scaler:
            scaler.step(optimizer)  # does nothing if a gradient is not finite
            scaler.update()
        elif norm.isfinite():
            optimizer.step()
        return norm

    def scales(self) -> dict[str, float]:
        """Loss scales by optimiser; empty without fp16."""
        return {name: scaler.get_scale() for name, scaler in self.scalers.items()}

    def state_dict(self) -> dict:
        """The scalers' states."""
        return {name: scaler.state_dict() for name, scaler in self.scalers.items()}

    def load_state_dict(self, state: dict, factor: float = 1.0) -> None:
        """Takes the scales of a `state_dict`, times a factor; without fp16 it has none."""
        for name, scaler in self.scalers.items():
            if name in state:
                scaler.load_state_dict(state[name] | {"scale": state[name]["scale"] * factor})
