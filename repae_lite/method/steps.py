"""One training step of REPA-E: three updates, and the rule which loss reaches which network.

REPA-E section 3.3 and the official training script; taught in `notebooks/04_stop_gradient.ipynb` and
`notebooks/05_end_to_end.ipynb`. This file is the only place where gradients are routed:

| loss                        | VAE encoder | VAE decoder | SiT to the tap, projector | SiT after the tap | discriminator |
|-----------------------------|-------------|-------------|---------------------------|-------------------|---------------|
| reconstruction, perceptual  | yes         | yes         | -                         | -                 | -             |
| KL                          | yes         | -           | -                         | -                 | -             |
| adversarial                 | yes         | yes         | -                         | -                 | -             |
| alignment, VAE step         | yes         | -           | passes through, unchanged | -                 | -             |
| hinge                       | -           | -           | -                         | -                 | yes           |
| velocity                    | **no**      | -           | yes                       | yes               | -             |
| alignment, SiT step         | -           | -           | yes                       | -                 | -             |

The one bold "no" is the stop-gradient: with it lifted, the VAE learns latents that are easy to denoise and
empty.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from repae_lite.method.interpolant import WEIGHTINGS, get_path
from repae_lite.method.losses import VAELossConfig, hinge_discriminator_loss, vae_regularization_loss
from repae_lite.networks.layers import recompute
from repae_lite.networks.sit import SiT, as_list, check_label_count
from repae_lite.networks.vae import AutoencoderKL


@dataclass(frozen=True)
class StepConfig:
    """What a training step does; the defaults are the official REPA-E recipe.

    Attributes:
        vae_loss: the VAE's regularisation terms.
        vae_align_coeff: weight of the alignment loss that reaches the VAE through SiT; 0 makes the `vae-only`
            control.
        vae_diffusion_coeff: weight of the velocity loss that reaches the VAE. 0 is REPA-E's stop-gradient;
            more is the naive end-to-end training that collapses the latents, for study.
        proj_coeff: weight of the alignment loss in the SiT step; 0 makes a plain SiT.
        path, weighting: see `repae_lite.method.interpolant`.
        vae_step_batch_stats: False normalises latents by running statistics in the VAE step, as the official
            code does; True by the batch's own.
        max_grad_norm: gradient clipping, separately for VAE, discriminator and SiT.
        ema_decay: of the SiT's moving average.
    """

    vae_loss: VAELossConfig = field(default_factory=VAELossConfig)
    vae_align_coeff: float = 1.5
    vae_diffusion_coeff: float = 0.0
    proj_coeff: float = 0.5
    path: str = "linear"
    weighting: str = "uniform"
    vae_step_batch_stats: bool = False
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self):
        get_path(self.path)
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"unknown time weighting {self.weighting!r}: choose one of {', '.join(WEIGHTINGS)}"
            )


class Mechanics:
    """How a loss becomes an update: on one process, in the networks' own precision.
    `repae_lite.training.trainer` brings another.

    Attributes:
        micro_batches: parts into which each batch is cut, for memory's sake; losses and gradients are those
            of the whole batch, and so are SiT's latent statistics. (Only a discriminator's BatchNorm sees
            each part alone.)
        gradient_checkpointing: recompute the perceptual network and the discriminator in the VAE step instead
            of keeping their activations; VAE and SiT have a switch of their own
            (`repae_lite.networks.layers.set_gradient_checkpointing`).
    """

    def __init__(self, *, micro_batches: int = 1, gradient_checkpointing: bool = False):
        if micro_batches < 1:
            raise ValueError(f"micro_batches is {micro_batches}: use 1 for none, more to save memory")
        self.micro_batches, self.gradient_checkpointing = micro_batches, gradient_checkpointing

    def autocast(self) -> AbstractContextManager:
        """The precision of forward passes."""
        return nullcontext()

    def parts(self, batch: int) -> list[slice]:
        """Where to cut a batch: `micro_batches` slices of nearly equal size, or one per image if there are
        fewer.
        """
        cuts = [batch * i // self.micro_batches for i in range(self.micro_batches + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(cuts) if a < b]

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Adds the gradient of one part's share of the loss, for this optimiser to apply."""
        loss.backward()

    def update(self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Clips and applies the gradients; returns their norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; weights, optimiser and moving average are then as
                before the update.
        """
        norm = nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], max_norm)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"the gradient norm of {type(module).__name__} is {float(norm)}: lower the learning rate, or "
                "use bfloat16 or float32"
            )
        optimizer.step()
        return norm


@dataclass
class TrainState:
    """Everything a step changes, and the frozen networks it consults.

    Attributes:
        vae, sit: the two models; `vae` may be any module with `encode` and `decode`. Without a sit,
            `vae_step` and `discriminator_step` train a VAE alone.
        ema: moving average of sit (`make_ema`).
        optimizers: by name: "sit", and where they train "vae" and "discriminator".
        config: see `StepConfig`.
        discriminator: None trains without the adversarial term.
        perceptual: frozen perceptual distance, see `repae_lite.method.losses`.
        step: number of finished steps.
        mechanics: how losses become updates.
    """

    vae: AutoencoderKL
    sit: SiT | None
    ema: SiT | None
    optimizers: dict[str, torch.optim.Optimizer]
    config: StepConfig = field(default_factory=StepConfig)
    discriminator: nn.Module | None = None
    perceptual: nn.Module | None = None
    step: int = 0
    mechanics: Mechanics = field(default_factory=Mechanics)

    @property
    def gan_active(self) -> bool:
        """Whether this step has an adversarial term and a discriminator update."""
        return self.discriminator is not None and self.config.vae_loss.gan_active(self.step)


@dataclass
class VAEStepOutput:
    """What the VAE step hands on: images, and everything the SiT step must reuse."""

    z: Tensor
    x_hat: Tensor
    t: Tensor | None
    eps: Tensor | None
    losses: dict[str, Tensor]


def make_optimizer(
    parameters: nn.Module,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW as in the official run, over the parameters that train (fused on a GPU)."""
    trainable = [p for p in parameters.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"every parameter of this {type(parameters).__name__} is frozen: leave its optimiser out, or "
            "unfreeze it"
        )
    return torch.optim.AdamW(
        trainable, lr=lr, betas=betas, weight_decay=weight_decay, eps=1e-8, fused=trainable[0].is_cuda or None
    )


def make_ema(sit: SiT) -> SiT:
    """A frozen copy in eval mode, to be moved by `update_ema`."""
    return deepcopy(sit).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves every float tensor of ema towards model, BatchNorm statistics too; integer buffers are copied."""
    source = model.state_dict()
    averaged, current = [], []
    for name, tensor in ema.state_dict().items():
        if tensor.is_floating_point():
            averaged.append(tensor)
            current.append(source[name].to(tensor.dtype))
        else:
            tensor.copy_(source[name])
    torch._foreach_lerp_(averaged, current, 1 - decay)


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Switches parameter gradients off inside; gradients still flow *through* the modules to their inputs.

    Afterwards exactly those parameters train that trained before (the official code switches all on:
    DIFFERENCES.md, D2).
    """
    parameters = [
        p for module in modules if module is not None for p in module.parameters() if p.requires_grad
    ]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def check_batch(sit: SiT, x: Tensor, labels: Tensor, targets: Tensor | Sequence[Tensor] | None) -> None:
    """Refuses what would train silently wrong.

    Raises:
        ValueError: images not float in [-1, 1] or not finite, labels out of range, targets not finite or not
            on SiT's grid.
    """
    if x.ndim != 4 or x.shape[0] == 0:
        raise ValueError(
            f"images have shape {tuple(x.shape)}: give a batch (B, 3, H, W) with at least one image"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"images have dtype {x.dtype}: convert uint8 pixels with repae_lite.to_unit_range first"
        )
    check_label_count(labels, x.shape[0], "image")
    largest = float(x.detach().abs().max())
    if not largest < float("inf"):
        raise ValueError(
            f"the image batch contains {'NaN' if largest != largest else 'infinity'}: look for broken files "
            "in the data"
        )
    if largest > 1 + 1e-3:
        raise ValueError(
            f"images reach {largest:.4g} in magnitude but must lie in [-1, 1]: use repae_lite.to_unit_range "
            "on uint8 pixels"
        )
    _check_conditions(sit, x.shape[0], labels, targets)


def _check_conditions(
    sit: SiT, batch: int, labels: Tensor, targets: Tensor | Sequence[Tensor] | None
) -> None:
    sit.check_labels(labels, allow_null=False)
    if targets := as_list(targets):
        sit.check_targets(batch, targets)
    for i, target in enumerate(targets):
        if not bool(target.isfinite().all()):
            raise ValueError(f"targets[{i}] contain NaN or infinity: check the vision encoder and its input")


def _check_ready(state: TrainState, targets: Tensor | Sequence[Tensor] | None) -> None:
    """Refuses a state whose configuration asks for what is not there."""
    config = state.config
    if config.vae_loss.gan_active(state.step) and state.discriminator is None:
        raise ValueError(
            f"gan_weight is {config.vae_loss.gan_weight} but there is no discriminator: pass one or set the "
            "weight to 0"
        )
    if config.vae_align_coeff and not as_list(targets):
        raise ValueError(
            f"vae_align_coeff is {config.vae_align_coeff} but there are no targets: pass encoder tokens or "
            "set it to 0"
        )
    needed = ["vae", "sit", *(["discriminator"] if state.gan_active else [])]
    if missing := [name for name in needed if name not in state.optimizers]:
        raise ValueError(
            f"the training state has no optimizer for {missing[0]}: add one with make_optimizer, or use "
            "latent_step"
        )


def vae_step(
    state: TrainState,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None,
    *,
    eps_posterior: Tensor | None = None,
    t: Tensor | None = None,
    eps: Tensor | None = None,
) -> VAEStepOutput:
    """Official step 1: the VAE learns to reconstruct, and to have latents whose SiT features align (REPA-E
    eq. 3 and 4).

    SiT is frozen and in eval mode: no label dropout, running BatchNorm statistics, gradients pass through it
    to z. Without a SiT only 1a is done.

    Args:
        state: updated in place: the VAE's weights and its optimiser.
        x: images (B, 3, H, W) in [-1, 1].
        labels: classes (B,).
        targets: encoder tokens (B, N, D), or one such tensor per encoder.
        eps_posterior, eps: noise (B, C, h, w); t: times (B,). Drawn when None.
    """
    config, mechanics, targets, optimizer = (
        state.config,
        state.mechanics,
        as_list(targets),
        state.optimizers["vae"],
    )
    state.vae.train()
    if state.sit is not None:
        state.sit.eval()
    optimizer.zero_grad(set_to_none=True)
    parts = []
    for part in mechanics.parts(len(x)):
        with frozen(state.sit, state.discriminator):
            with mechanics.autocast():
                # 1a. Reconstruct.
                posterior = state.vae.encode(x[part])
                z = posterior.sample(_cut(eps_posterior, part))
                x_hat = state.vae.decode(z)
                losses = _reconstruction_losses(state, x[part], x_hat, posterior.kl())
                # 1b. Align: through the frozen SiT, only as deep as the tap (and to the end only in the naive
                # variant).
                out = state.sit and state.sit.loss_forward(
                    z,
                    labels[part],
                    [target[part] for target in targets],
                    t=_cut(t, part),
                    eps=_cut(eps, part),
                    path=config.path,
                    weighting=config.weighting,
                    align_only=config.vae_diffusion_coeff == 0,
                    batch_stats=config.vae_step_batch_stats,
                )
            total = losses["vae_reg"]
            if out and out.align_loss is not None:
                losses["vae_align"] = out.align_loss
                if config.vae_align_coeff:
                    total = total + config.vae_align_coeff * out.align_loss
            if out and config.vae_diffusion_coeff:
                losses["vae_denoising"] = out.denoising_loss.mean()
                total = total + config.vae_diffusion_coeff * losses["vae_denoising"]
            losses["vae_total"] = total
            mechanics.backward(total * (len(z) / len(x)), optimizer)
        used_t, used_eps = (out.t, out.eps) if out else (None, None)
        parts.append(
            VAEStepOutput(
                z.detach(), x_hat.detach(), used_t, used_eps, {k: v.detach() for k, v in losses.items()}
            )
        )
    norm = mechanics.update(state.vae, optimizer, config.max_grad_norm)
    whole = {name: _joined([getattr(part, name) for part in parts]) for name in ("z", "x_hat", "t", "eps")}
    losses = _averaged([part.losses for part in parts], [len(part.z) for part in parts])
    return VAEStepOutput(**whole, losses=losses | {"grad_norm_vae": norm})


def _reconstruction_losses(state: TrainState, x: Tensor, x_hat: Tensor, kl: Tensor) -> dict[str, Tensor]:
    """The VAE's regularisation terms, recomputing the networks behind them in the backward pass if asked to."""
    perceptual, discriminator = state.perceptual, state.discriminator
    if state.mechanics.gradient_checkpointing:
        perceptual = perceptual and partial(recompute, perceptual)
    logits_fake = None
    if state.gan_active:
        discriminator.train()
        logits_fake = (
            recompute(discriminator, x_hat)
            if state.mechanics.gradient_checkpointing
            else discriminator(x_hat)
        )
    return vae_regularization_loss(
        x, x_hat, kl, state.config.vae_loss, perceptual=perceptual, logits_fake=logits_fake
    )


def discriminator_step(state: TrainState, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
    """Official step 2: the discriminator learns to tell images x from reconstructions x_hat, both (B, 3, H,
    W).
    """
    optimizer = state.optimizers["discriminator"]
    state.discriminator.train()
    optimizer.zero_grad(set_to_none=True)
    parts, sizes = [], []
    for part in state.mechanics.parts(len(x)):
        with state.mechanics.autocast():
            logits_real, logits_fake = (
                state.discriminator(x[part].detach()),
                state.discriminator(x_hat[part].detach()),
            )
            loss = hinge_discriminator_loss(logits_real, logits_fake)
        sizes.append(len(logits_real))
        state.mechanics.backward(loss * (sizes[-1] / len(x)), optimizer)
        parts.append(
            {
                "disc": loss.detach(),
                "logits_real": logits_real.detach().mean(),
                "logits_fake": logits_fake.detach().mean(),
            }
        )
    norm = state.mechanics.update(state.discriminator, optimizer, state.config.max_grad_norm)
    return _averaged(parts, sizes) | {"grad_norm_disc": norm}


def sit_step(
    state: TrainState,
    z: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None,
    *,
    t: Tensor | None = None,
    eps: Tensor | None = None,
    label_drop: Tensor | None = None,
) -> dict[str, Tensor]:
    """Official step 3: SiT learns velocity and alignment on latents that carry no gradient (REPA-E's
    stop-gradient).

    Called alone, with latents of a frozen VAE, this is REPA; without targets it is a plain SiT.

    Args:
        state: updated in place: SiT's weights, BatchNorm statistics and optimiser.
        z: un-normalised latents (B, C, h, w).
        labels: classes (B,).
        targets: encoder tokens (B, N, D), one such tensor per encoder, or None.
        t, eps: times (B,) and noise like z: the ones of the VAE step. Drawn when None.
        label_drop: which labels become the null class (B,); drawn when None.
    """
    config, mechanics, targets, z = state.config, state.mechanics, as_list(targets), z.detach()
    optimizer = state.optimizers["sit"]
    state.sit.train()
    optimizer.zero_grad(set_to_none=True)
    cuts, parts = mechanics.parts(len(z)), []
    with (
        state.sit.bn.whole_batch(z)
        if len(cuts) > 1 and not state.sit.config.fixed_latent_stats
        else nullcontext()
    ):
        for part in cuts:
            with mechanics.autocast():
                out = state.sit.loss_forward(
                    z[part],
                    labels[part],
                    [target[part] for target in targets],
                    t=_cut(t, part),
                    eps=_cut(eps, part),
                    path=config.path,
                    weighting=config.weighting,
                    label_drop=_cut(label_drop, part),
                )
            losses = {"denoising": out.denoising_loss.mean()}
            total = losses["denoising"]
            if out.align_loss is not None:
                losses["sit_align"] = out.align_loss
                total = total + config.proj_coeff * out.align_loss
            losses["sit_total"] = total
            mechanics.backward(total * (len(out.t) / len(z)), optimizer)
            parts.append({name: value.detach() for name, value in losses.items()})
    norm = mechanics.update(state.sit, optimizer, config.max_grad_norm)
    return _averaged(parts, [part.stop - part.start for part in cuts]) | {"grad_norm_sit": norm}


def repae_step(
    state: TrainState,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None,
    *,
    eps_posterior: Tensor | None = None,
    t: Tensor | None = None,
    eps: Tensor | None = None,
    label_drop: Tensor | None = None,
) -> dict[str, float]:
    """One REPA-E training step: VAE, discriminator, SiT, moving average, in this order.

    Args:
        state: updated in place.
        x: images (B, 3, H, W) in [-1, 1].
        labels: classes (B,).
        targets: encoder tokens of the clean images (B, N, D), or one such tensor per encoder.
        eps_posterior, eps: noise (B, C, h, w); t: times (B,); label_drop: bool (B,). Drawn when None.

    Returns:
        Every loss and every gradient norm before clipping, as floats.

    Raises:
        ValueError: a batch that would train silently wrong (see `check_batch`), or a part that the
            configuration needs is missing.
        FloatingPointError: a gradient is not finite.
    """
    _check_ready(state, targets)
    check_batch(state.sit, x, labels, targets)
    draws = {"eps_posterior": eps_posterior, "t": t, "eps": eps, "label_drop": label_drop}
    return as_floats(all_updates(state, x, labels, targets, **draws)[0])


def all_updates(
    state: TrainState,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None,
    *,
    eps_posterior: Tensor | None = None,
    t: Tensor | None = None,
    eps: Tensor | None = None,
    label_drop: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """`repae_step` without its checks, for who checks once and reads losses when needed; a VAE alone if the
    state has no SiT.

    Returns:
        The losses and gradient norms, still on the device, and the latents z (B, C, h, w).
    """
    vae_out = vae_step(state, x, labels, targets, eps_posterior=eps_posterior, t=t, eps=eps)
    losses = dict(vae_out.losses)
    if state.gan_active:
        losses |= discriminator_step(state, x, vae_out.x_hat)
    if state.sit is not None:
        losses |= sit_step(
            state, vae_out.z, labels, targets, t=vae_out.t, eps=vae_out.eps, label_drop=label_drop
        )
        update_ema(state.ema, state.sit, state.config.ema_decay)
    state.step += 1
    return losses, vae_out.z


def latent_step(
    state: TrainState,
    z: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None,
    **draws: Tensor | None,
) -> dict[str, float]:
    """One step with the VAE left alone: SiT and its moving average, on latents z (B, C, h, w). REPA, or a
    plain SiT without targets.

    Keyword draws are those of `sit_step`.

    Raises:
        ValueError: latents not finite, labels out of range, targets not finite or not on SiT's grid.
    """
    if not bool(z.isfinite().all()):
        raise ValueError(
            "the latent batch contains NaN or infinity: check the VAE that made it and the cached file"
        )
    check_label_count(labels, z.shape[0], "latent")
    _check_conditions(state.sit, z.shape[0], labels, targets)
    losses = sit_step(state, z, labels, targets, **draws)
    update_ema(state.ema, state.sit, state.config.ema_decay)
    state.step += 1
    return as_floats(losses)


def as_floats(losses: dict[str, Tensor]) -> dict[str, float]:
    """Detached floats, moved from the device in one transfer."""
    values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
    return dict(zip(losses, values, strict=True))


def _cut(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    return None if tensors[0] is None else torch.cat(tensors)


def _averaged(parts: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """Losses of the whole batch from those of its parts."""
    return {
        name: sum(losses[name] * (n / sum(sizes)) for losses, n in zip(parts, sizes, strict=True))
        for name in parts[0]
    }
