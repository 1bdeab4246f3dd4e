"""SiT in pieces: every process holds a part of its weights, moving average and optimiser states.

By FSDP2, torch's `fully_shard`: a block's weights are gathered when it computes and let go afterwards, and
its gradients are averaged into the pieces. Checkpoints and samples are made of whole copies, gathered for
that, so a run can go on without pieces, and on another number of processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from repae_lite.networks.sit import SiT
from repae_lite.utils.processes import process_count


class ShardedSiT:
    """Cuts a SiT, its moving average and its optimiser's states into pieces, in place.

    All processes make and use it together.

    Args:
        sit: the same in all processes.
        ema: its moving average.
        optimizer: of SiT; it goes on from the states it has.
        device: where they are.

    Raises:
        ValueError: this version of torch does not average the gradients of pieces on this device.
    """

    def __init__(self, sit: SiT, ema: SiT, optimizer: torch.optim.Optimizer, device: torch.device):
        mesh = init_device_mesh(device.type, (process_count(),))
        _check_averages(mesh)
        self.sit, self.optimizer = sit, optimizer
        before = dict(sit.named_parameters())
        for network in (sit, ema):
            for block in network.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
        piece_of = {before[name]: piece for name, piece in sit.named_parameters()}
        states = {
            piece_of[parameter]: {key: _cut(value, piece_of[parameter]) for key, value in state.items()}
            for parameter, state in optimizer.state.items()
        }
        optimizer.state.clear()
        optimizer.state.update(states)
        for group in optimizer.param_groups:
            group["params"] = [piece_of[parameter] for parameter in group["params"]]

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Inside, gradients add up in each process and are not averaged into the pieces yet."""
        self.sit.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.sit.set_requires_gradient_sync(True)

    def whole(self, network: SiT, device: torch.device) -> SiT:
        """A whole copy of SiT or its average; a process that needs none calls this, too, with "meta"."""
        with torch.device("meta"):
            copy = SiT(network.config)
        copy.requires_grad_(False).train(network.training)
        state = {name: _whole_tensor(tensor, device) for name, tensor in network.state_dict().items()}
        copy.load_state_dict(state, assign=True)
        return copy

    def whole_optimizer(self, sit: SiT) -> torch.optim.Optimizer:
        """The optimiser's states for the parameters of a whole copy, and where that is."""
        names = {piece: name for name, piece in self.sit.named_parameters()}
        copies = dict(sit.named_parameters())
        found = torch.optim.Optimizer(copies.values(), self.optimizer.defaults)
        for piece, state in self.optimizer.state.items():
            found.state[copies[names[piece]]] = {
                key: _whole_tensor(value, copies[names[piece]].device) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
        return found


def _whole_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor, put together if it is in pieces."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()).to(device, copy=True)


def _cut(value: object, like: DTensor) -> object:
    """An optimiser's state, in pieces if it is shaped as its parameter."""
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements)


def _check_averages(mesh: DeviceMesh) -> None:
    """Some versions of torch sum on some devices, which would be another step, without a word."""
    layer = nn.Linear(1, mesh.size(), bias=False, device=mesh.device_type)
    fully_shard(layer, mesh=mesh)
    layer(torch.ones(1, 1, device=mesh.device_type)).sum().backward()
    gradient = layer.weight.grad.full_tensor()
    if not torch.equal(gradient, torch.ones_like(gradient)):
        raise ValueError(
            f"torch {torch.__version__} makes the gradients of sharded weights {float(gradient[0, 0]):g} "
            f"times as large on {mesh.device_type}: take a newer one, or leave out --shard"
        )
