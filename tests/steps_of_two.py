"""Steps of every kind by one process, or by one of several with its share of the batch.

Under a launcher: `torchrun --nproc-per-node 2 tests/steps_of_two.py FOLDER` writes what each process has into
FOLDER/RANK.pt.
"""

import itertools
import sys
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from small_states import LABELS, make_batch, make_state
from torch import Tensor, nn

from repae_lite.method.losses import VAELossConfig
from repae_lite.method.steps import Draws, TrainState, all_updates, latent_updates, make_ema
from repae_lite.networks.layers import set_gradient_checkpointing
from repae_lite.networks.sit import SiT
from repae_lite.training import trainer
from repae_lite.training.parallel import DDP, ParallelMechanics, share_of
from repae_lite.training.run_folder import named_state
from repae_lite.training.sharding import ShardedSiT
from repae_lite.utils.processes import StopFlag, join, leave, mean_over_processes

RATES = {"sit": 0.05, "vae": 0.01, "discriminator": 0.01}
NAIVE = {"vae_align_coeff": 0.0, "vae_diffusion_coeff": 1.0}
# What is special about a state and its mechanics. Micro-batches have no discriminator here: its BatchNorm
# sees each of them alone.
KINDS = {
    "recipe": ({}, {}),
    "discriminator from step 1 on": ({"vae_loss": VAELossConfig(gan_start=1)}, {}),
    "micro-batches": ({"vae_loss": VAELossConfig(gan_weight=0.0)}, {"micro_batches": 2}),
    "recomputed activations": ({}, {"gradient_checkpointing": True}),
    "position embedding trains": ({"train_pos_embed": True}, {}),
    "no weight on alignment": ({"proj_coeff": 0.0}, {}),
    "naive": (NAIVE, {}),
    "bf16": ({}, {"precision": "bf16"}),
    "compiled": ({}, {}),
    "compiled, recomputed activations": ({}, {"gradient_checkpointing": True}),
    "fused optimisers": ({}, {}),
    "in pieces": ({}, {}),
    "in pieces, fused optimisers": ({}, {}),
    "in pieces, compiled": ({}, {}),
    "in pieces, recomputed activations": ({}, {"gradient_checkpointing": True}),
    "in pieces, naive, micro-batches": (
        NAIVE | {"vae_loss": VAELossConfig(gan_weight=0.0)},
        {"micro_batches": 2},
    ),
    "frozen VAE": ({}, {}),
    "plain SiT": ({"proj_coeff": 0.0}, {}),
}
LATENTS_ALONE = ("frozen VAE", "plain SiT")


def prepared(kind: str, accelerator: Accelerator) -> TrainState:
    changes, more = KINDS[kind]
    more = {"precision": "no"} | more
    state = make_state(**changes)
    if kind == "plain SiT":
        torch.manual_seed(0)
        state.sit = SiT(replace(state.sit.config, target_dims=()))
        nn.init.normal_(state.sit.final_layer.linear.weight)
        state.ema = make_ema(state.sit)
    networks = {name: getattr(state, name) for name in state.optimizers}
    if kind in LATENTS_ALONE:
        state.vae.requires_grad_(False)
        networks = {"sit": state.sit}
    state.optimizers = {
        name: optimizer(kind, [p for p in network.parameters() if p.requires_grad], RATES[name])
        for name, network in networks.items()
    }
    state.mechanics = ParallelMechanics(accelerator.device, optimizers=state.optimizers, **more)
    set_gradient_checkpointing(state.mechanics.gradient_checkpointing, state.vae, state.sit)
    state.mechanics.distribute(accelerator, networks)
    if "compiled" in kind:  # as the trainer does, but for the compiler
        by = partialmethod(nn.Module.compile, backend="aot_eager")
        with patch.object(nn.Module, "compile", by), patch.object(trainer, "try_compile", lambda _: None):
            trainer._compile(state, accelerator.device)
    return state


def optimizer(kind: str, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """With SGD a weight's difference is a gradient's, and nearly so with Adam and a large eps."""
    if "fused" in kind:
        return torch.optim.AdamW(parameters, rate, eps=1.0, fused=True)
    return torch.optim.SGD(parameters, rate, momentum=0.5)


def cut(state: TrainState, accelerator: Accelerator) -> None:
    """Goes on with SiT, its average and its optimiser in pieces."""
    sharded = ShardedSiT(state.sit, state.ema, state.optimizers["sit"], accelerator.device)
    whole_ones = {name: getattr(state, name) for name in state.optimizers if name != "sit"}
    state.mechanics.distribute(accelerator, whole_ones, sharded)


def numbers(state: TrainState) -> dict[str, Tensor]:
    """Weights and statistics, and SiT's moments; put together where they are in pieces."""
    networks = {"ema": state.ema} | {name: getattr(state, name) for name in state.optimizers}
    optimizer, sharded = state.optimizers["sit"], state.mechanics.sharded
    if sharded:
        device = torch.device("cpu")
        networks |= {name: sharded.whole(networks[name], device) for name in ("sit", "ema")}
        optimizer = sharded.whole_optimizer(networks["sit"])
    moments = named_state(optimizer, networks["sit"])
    return {
        f"{moment}.{name}": each[moment].clone()
        for name, each in moments.items()
        for moment in ("momentum_buffer", "exp_avg", "exp_avg_sq")
        if moment in each
    } | {
        f"{network}.{name}": tensor.clone()
        for network, module in networks.items()
        for name, tensor in module.state_dict().items()
    }


def steps(kind: str, accelerator: Accelerator, count: int = 3) -> tuple[list[dict], dict[str, Tensor]]:
    """Losses of some steps, and the weights and statistics after them."""
    state, history = prepared(kind, accelerator), []
    x, targets, draws = make_batch()
    share = share_of(len(x), accelerator.process_index, accelerator.num_processes)
    mine = Draws(**draws, label_drop=torch.tensor([True, False, False, True]))[share]
    targets = [] if kind == "plain SiT" else [target[share] for target in targets]
    for step in range(count):
        if step == 1 and "in pieces" in kind and accelerator.num_processes > 1:
            cut(state, accelerator)
        if kind in LATENTS_ALONE:
            z = mine.eps_posterior + 0.5 * mine.eps.roll(1, 2)
            losses = latent_updates(state, z, LABELS[share], targets, mine)
        else:
            losses, _ = all_updates(state, x[share], LABELS[share], targets, mine)
        means = mean_over_processes(torch.stack([value.detach().float() for value in losses.values()]))
        history.append(dict(zip(losses, means.tolist(), strict=True)))
    return history, numbers(state)


def layer(accelerator: Accelerator) -> tuple[nn.Linear, torch.optim.Optimizer, ParallelMechanics]:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    mechanics = ParallelMechanics(accelerator.device, "no", {"layer": optimizer}, strict=False)
    mechanics.distribute(accelerator, {"layer": module})
    return module, optimizer, mechanics


def overflow(accelerator: Accelerator) -> tuple[Tensor, bool]:
    """A layer's weights where one process alone had an infinite loss, and whether the norm was finite."""
    module, optimizer, mechanics = layer(accelerator)
    factor = float("inf") if accelerator.is_last_process else 1.0
    (loss,) = mechanics.forward("layer", lambda x: (factor * module(x).sum(),), torch.ones(1, 3))
    mechanics.backward(loss, optimizer)
    norm = mechanics.update(module, optimizer, 1.0)
    return module.weight.detach().clone(), bool(norm.isfinite())


def micro_batches(accelerator: Accelerator) -> list[float]:
    """A gradient after each of two micro-batches whose own gradient is the process's number plus 1."""
    module, optimizer, mechanics = layer(accelerator)
    factor, gradients = accelerator.process_index + 1, []
    for last in (False, True):
        with mechanics.micro_batch("layer", last=last):
            (loss,) = mechanics.forward("layer", lambda x: (factor * module(x).sum(),), torch.ones(1, 3))
            mechanics.backward(loss, optimizer)
        gradients.append(float(module.weight.grad[0, 0]))
    return gradients


def stop(accelerator: Accelerator) -> tuple[int, int]:
    """The step after which a request to the last process, during step 4, ends the run; how often they asked.

    By their clocks the first process takes half a second from asking to asking, the last one a whole one.
    """
    seconds = itertools.count(0, 0.5 * (accelerator.process_index + 1))
    flag, step = StopFlag(accelerator.device, clock=lambda: next(seconds)), 1
    while not flag.after_step(accelerator.is_last_process and step >= 4):
        step += 1
    return step, int(next(seconds) / 0.5 / (accelerator.process_index + 1)) - 1


def main(folder: str) -> None:
    join(cpu=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DDP])
    found = {kind: steps(kind, accelerator) for kind in KINDS}
    found |= {"overflow": overflow(accelerator), "micro_batches": micro_batches(accelerator)}
    found["stop"] = stop(accelerator)
    torch.save(found, Path(folder) / f"{accelerator.process_index}.pt")
    leave(together=True)


if __name__ == "__main__":
    main(sys.argv[1])
