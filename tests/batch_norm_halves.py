"""BatchNorm's inputs, and half a batch in a process of its own.

Spawned processes import this file by its name; the tests' own names may be those of another package.
"""

import torch
import torch.distributed as dist
from torch import nn

from repae_lite.networks.layers import BatchNorm2d


def pair(affine: bool):
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(3, affine=affine), nn.BatchNorm2d(3, affine=affine)
    if affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    spread, mean = torch.tensor([[5e-3, 2.0, 2.0], [0.0, 1.0, 5.0]]).view(
        2, 1, 3, 1, 1
    )  # where eps counts too
    return ours, theirs, spread * torch.randn(8, 3, 4, 4) + mean


def normalise_half(rank: int, address: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    ours, _, x = pair(affine=True)
    mine = x[:5] if rank == 0 else x[5:]  # unequal parts
    mine = mine.clone().requires_grad_()
    y = ours(mine)
    (y.square() * y).sum().backward()  # a loss whose gradient does not vanish through the statistics
    statistics = [ours.running_mean.clone(), ours.running_var.clone(), int(ours.num_batches_tracked)]
    half = ours(mine[:, :, :2].bfloat16())
    results[rank] = [y.detach(), mine.grad, *statistics, half.detach(), ours.running_mean]
    dist.destroy_process_group()
