"""One training step on many processes: which of them has which images, draws and gradients.

Everything random in step s follows from the seed, s and an image's place in the whole batch, of which each
process has a slice. So N processes with b images make the step of one process with N * b, and a resumed run
needs no generator's state to continue as if it had never stopped. (One that goes on on another kind of
device, CPU or GPU, does so with other numbers.)
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import Sampler

from repae_lite.method.interpolant import sample_time
from repae_lite.method.steps import Draws, Mechanics, check_norm
from repae_lite.utils.seeding import generator

if TYPE_CHECKING:
    from repae_lite.training.sharding import ShardedSiT

# Every parameter that trains has a gradient in each of its network's updates, so none has to be searched for
# (which is what static_graph would save), and the only buffers, BatchNorm's, are equal anyway.
DDP = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
ALL = slice(None)
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
    share: slice = ALL,
    device: torch.device | str = "cpu",
) -> Draws:
    """The random numbers of a step for some images of a batch; `latent` is the shape (C, h, w).

    A CPU draws for the whole batch, one kind of number after the other. A GPU has a generator for each image,
    so that a process draws its share alone, and nothing has to be copied from the host.
    """

    def drawn(images: int, *place: int) -> tuple[Tensor, ...]:
        g = generator("draws", seed, step, *place, device=device)
        return (
            torch.randn(images, *latent, generator=g, device=device),
            sample_time(images, weighting=weighting, path=path, generator=g, device=device),
            torch.randn(images, *latent, generator=g, device=device),
            torch.rand(images, generator=g, device=device) < label_dropout,
        )

    if torch.device(device).type == "cpu":
        return Draws(*drawn(batch))[share]
    each = [drawn(1, place) for place in range(batch)[share]]
    return Draws(*map(torch.cat, zip(*each, strict=True)))


class Losses(nn.Module):
    """The losses in one network's update, as a forward pass that DistributedDataParallel can wrap.

    The network is the only submodule: other networks, which this update leaves alone, come with the training
    state.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, losses_of: Callable[..., tuple], *batch) -> tuple:
        """See `Mechanics.forward`."""
        return losses_of(*batch)


class ParallelMechanics(Mechanics):
    """Updates in mixed precision, with gradients averaged over processes.

    accelerate wraps the networks (`distribute`). Its mixed precision is not used: it has one loss scale for
    all optimisers, so that an overflow of one network would hold up the others, and no fp16 on a CPU. It does
    not prepare optimisers and loader either: optimisers skip updates by that one scale, and its loader deals
    out whole batches, where a process here has a share of each. `--shard` calls the FSDP2 of torch itself:
    the plugin of accelerate is for all networks that it prepares, and two of three stay whole here.

    Args:
        device: where the networks are.
        precision: "no", "fp16" or "bf16".
        optimizers: by name.
        strict: a norm that is not finite is an error; otherwise the update is left out. (fp16 always leaves
            it out and lowers its scale.) Fused optimisers, for which the host does not wait, cannot raise it:
            they leave out this update and all later ones, and `failed` tells whoever looks.
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
        for scaler in self.scalers.values():
            scaler.scale(torch.zeros((), device=device))  # which puts its scale there
        self._scaler_of = {optimizers[name]: scaler for name, scaler in self.scalers.items()}
        self.distributed: dict[str, nn.Module] = {}
        self.sharded: ShardedSiT | None = None

    def distribute(
        self, accelerator: Accelerator, networks: dict[str, nn.Module], sharded: "ShardedSiT | None" = None
    ) -> None:
        """Lets networks train together with those of the other processes; all of them must call this.

        In the networks' updates, gradients are averaged over processes while the backward pass goes on. A
        process alone keeps everything as it is.

        Args:
            accelerator: of these processes.
            networks: by name, as whole in every process.
            sharded: SiT, if it is in pieces; it is then not among the others.
        """
        self.sharded = sharded
        if accelerator.num_processes == 1:
            return
        with warnings.catch_warnings():  # accelerate does not know the option's new name
            warnings.filterwarnings("ignore", ".*broadcast_buffers.* is deprecated", FutureWarning)
            self.distributed = {
                name: accelerator.prepare_model(Losses(network)) for name, network in networks.items()
            }

    def micro_batch(self, name: str, *, last: bool) -> AbstractContextManager:
        """Gradients of a network are averaged with its last micro-batch; those before only add to them."""
        if last:
            return nullcontext()
        if name == "sit" and self.sharded:
            return self.sharded.summing()
        return self.distributed[name].no_sync() if name in self.distributed else nullcontext()

    def forward(self, name: str, losses_of: Callable[..., tuple], *batch) -> tuple:
        """`losses_of(*batch)`, by way of DistributedDataParallel if there are several processes."""
        return self.distributed[name](losses_of, *batch) if name in self.distributed else losses_of(*batch)

    def autocast(self) -> AbstractContextManager:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Adds the gradient of one micro-batch's share of the loss, scaled if it is fp16."""
        scaler = self._scaler_of.get(optimizer)
        (scaler.scale(loss) if scaler else loss).backward()

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        """Scales gradients down to a norm; returns the one that they had, in pieces or not."""
        norm = super().clip(module, max_norm)
        return norm.full_tensor() if self.sharded and module is self.sharded.sit else norm

    def update(self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Clips and applies the gradients; returns their norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; see `strict`.
        """
        scaler = self._scaler_of.get(optimizer)
        if scaler:
            scaler.unscale_(optimizer)
        norm = self.clip(module, max_norm)
        if scaler:
            scaler.step(optimizer)  # does nothing if a gradient is not finite
            scaler.update()
        elif optimizer.defaults.get("fused"):
            self._fused_step(optimizer, (~norm.isfinite()).float())
        elif self.strict:
            check_norm(float(norm), module)
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()
        return norm

    def _fused_step(self, optimizer: torch.optim.Optimizer, failed: Tensor) -> None:
        """A step that leaves weights and optimiser as they are if `failed` is 1.0 on the device."""
        if self.strict:
            self.failed = failed if self.failed is None else torch.maximum(self.failed, failed)
            failed = self.failed
        optimizer.grad_scale, optimizer.found_inf = None, failed  # what torch's GradScaler gives them, too
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    def scales(self) -> dict[str, Tensor]:
        """Loss scales by optimiser, on the device (`get_scale` would wait for it); empty without fp16."""
        return {name: scaler._get_scale_async() for name, scaler in self.scalers.items()}

    def state_dict(self) -> dict:
        """The scalers' states."""
        return {name: scaler.state_dict() for name, scaler in self.scalers.items()}

    def load_state_dict(self, state: dict, factor: float = 1.0) -> None:
        """Takes the scales of a `state_dict`, times a factor; without fp16 it has none."""
        self.failed = None
        for name, scaler in self.scalers.items():
            if name in state:
                scaler.load_state_dict(state[name] | {"scale": state[name]["scale"] * factor})
