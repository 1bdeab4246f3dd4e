"""One training step of REPA-E: three updates, and the rule which loss reaches which network.

REPA-E section 3.3 and the official training script; taught in `notebooks/04_stop_gradient.ipynb` and
`notebooks/05_end_to_end.ipynb`. This file is the only place where gradients are routed:

| loss                       | VAE encoder | VAE decoder | SiT to tap, proj. | SiT after tap | discriminator |
|----------------------------|-------------|-------------|-------------------|---------------|---------------|
| reconstruction, perceptual | yes         | yes         | -                 | -             | -             |
| KL                         | yes         | -           | -                 | -             | -             |
| adversarial                | yes         | yes         | -                 | -             | -             |
| alignment, VAE step        | yes         | -           | passes through    | -             | -             |
| hinge                      | -           | -           | -                 | -             | yes           |
| velocity                   | **no**      | -           | yes               | yes           | -             |
| alignment, SiT step        | -           | -           | yes               | -             | -             |

The bold "no" is the stop-gradient: without it the VAE learns latents that are easy to denoise, and empty.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from repae_lite.method.interpolant import WEIGHTINGS, get_interpolant
from repae_lite.method.losses import (
    VAELossConfig,
    as_list,
    check_weights,
    hinge_discriminator_loss,
    sit_losses,
    vae_regularization_loss,
)
from repae_lite.networks.layers import full_precision, run
from repae_lite.networks.sit import SiT, check_label_count, check_times
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.devices import fused_optimizer

GRAD_NORMS = {"vae": "grad_norm_vae", "discriminator": "grad_norm_disc", "sit": "grad_norm_sit"}


@dataclass(frozen=True)
class StepConfig:
    """What a training step does; the defaults are the official REPA-E recipe.

    Attributes:
        vae_loss: the VAE's regularisation terms.
        vae_align_coeff: weight of the alignment loss that reaches the VAE through SiT; 0 is the
            control "vae-only".
        vae_diffusion_coeff: weight of the velocity loss that reaches the VAE. 0 is REPA-E's stop-gradient;
            more is the naive end-to-end training that collapses the latents, for study.
        proj_coeff: weight of the alignment loss in the SiT step; 0 makes a plain SiT.
        path: "linear" or "cosine", see `repae_lite.method.interpolant`.
        weighting: how times are drawn, "uniform" or "lognormal".
        vae_step_batch_stats: False normalises latents by running statistics in the VAE step, as the official
            code does; True by the batch's own.
        loss_precision: with mixed precision, "float32" keeps the perceptual network and the discriminator out
            of it, as the official code does; "autocast" runs them in it, which is faster and may overflow in
            float16 (D11).
        max_grad_norm: gradient clipping, separately for VAE, discriminator and SiT.
        ema_decay: of the SiT's moving average.

    Raises:
        ValueError: an unknown name, or a number that makes no sense.
    """

    vae_loss: VAELossConfig = field(default_factory=VAELossConfig)
    vae_align_coeff: float = 1.5
    vae_diffusion_coeff: float = 0.0
    proj_coeff: float = 0.5
    path: str = "linear"
    weighting: str = "uniform"
    vae_step_batch_stats: bool = False
    loss_precision: str = "float32"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self):
        get_interpolant(self.path)
        if self.weighting not in WEIGHTINGS:
            raise ValueError(
                f"unknown time weighting {self.weighting!r}: choose one of {', '.join(WEIGHTINGS)}"
            )
        if self.loss_precision not in ("float32", "autocast"):
            raise ValueError(f"unknown loss_precision {self.loss_precision!r}: choose float32 or autocast")
        check_weights(self, "vae_align_coeff", "vae_diffusion_coeff", "proj_coeff")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}: it must be more than 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: it is a share, from 0 up to (not including) 1")


@dataclass(frozen=True)
class Draws:
    """The random numbers of a step, None where the step draws them itself; a slice has those of some images.

    Attributes:
        eps_posterior: noise of the VAE's posterior (B, C, h, w).
        t: times (B,).
        eps: noise of the diffusion (B, C, h, w).
        label_drop: which labels become the null class in the SiT step, bool (B,).
    """

    eps_posterior: Tensor | None = None
    t: Tensor | None = None
    eps: Tensor | None = None
    label_drop: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "Draws":
        """The same change to all that are given."""
        return Draws(*(None if drawn is None else change(drawn) for drawn in vars(self).values()))

    def __getitem__(self, images: slice) -> "Draws":
        return self.map(lambda drawn: drawn[images])


class Mechanics:
    """How a loss becomes an update: one process, the networks' own precision.

    `repae_lite.training.parallel` has a subclass for more.

    Attributes:
        micro_batches: how many each batch is cut into, to save memory; losses and gradients are those of the
            whole batch, and so are SiT's latent statistics. (Only a discriminator's BatchNorm sees each
            micro-batch alone.)
        gradient_checkpointing: recompute the perceptual network and the discriminator in the VAE step instead
            of keeping their activations; VAE and SiT have their own switch, `set_gradient_checkpointing`.
        failed: on the device, 1.0 once a gradient was not finite, whereupon all updates are left out, and 0.0
            before; None where that is an error at once.
    """

    failed: Tensor | None = None

    def __init__(self, *, micro_batches: int = 1, gradient_checkpointing: bool = False):
        if micro_batches < 1:
            raise ValueError(f"micro_batches is {micro_batches}: use 1 for none, more to save memory")
        self.micro_batches, self.gradient_checkpointing = micro_batches, gradient_checkpointing

    def autocast(self) -> AbstractContextManager:
        """The precision of forward passes."""
        return nullcontext()

    def chunks(self, batch: int) -> list[slice]:
        """The micro-batches of a batch: slices of nearly equal size, one per image if there are fewer."""
        cuts = [batch * i // self.micro_batches for i in range(self.micro_batches + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(cuts) if a < b]

    def whole_batch(self, sit: SiT, z: Tensor) -> AbstractContextManager:
        """Inside, SiT normalises micro-batches of z (B, C, h, w) by the statistics of all of it."""
        cut = len(self.chunks(len(z))) > 1 and not sit.config.fixed_latent_stats
        return sit.bn.whole_batch(z) if cut else nullcontext()

    def micro_batch(self, name: str, *, last: bool) -> AbstractContextManager:
        """Around the forward and backward pass of a micro-batch in the update of the network of this name."""
        return nullcontext()

    def forward(self, name: str, losses_of: Callable[..., tuple], *batch) -> tuple:
        """The forward pass in the update of the network of this name: `losses_of(*batch)`."""
        return losses_of(*batch)

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Adds the gradient of one micro-batch's share of the loss, for this optimiser to apply."""
        loss.backward()

    def clip(self, module: nn.Module, max_norm: float) -> Tensor:
        """Scales gradients down to a norm; returns the one that they had."""
        return nn.utils.clip_grad_norm_(module.parameters(), max_norm)

    def update(self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
        """Clips and applies the gradients; returns their norm before clipping.

        Raises:
            FloatingPointError: the norm is not finite; weights, optimiser and moving average are then as
                before the update.
        """
        norm = self.clip(module, max_norm)
        check_norm(float(norm), module)
        optimizer.step()
        return norm


def check_norm(norm: float, network: nn.Module) -> None:
    """Refuses a network's gradient norm that is not finite.

    Raises:
        FloatingPointError: see above.
    """
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm of {type(network).__name__} is {norm}: lower the learning rate, or use "
            "bfloat16 or float32"
        )


@dataclass
class TrainState:
    """Everything a step changes, and the frozen networks it consults.

    Attributes:
        vae: any module with `encode` and `decode`.
        sit: None trains a VAE alone, by `vae_step` and `discriminator_step`.
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
    """What the VAE step hands on to the others.

    Attributes:
        losses: by name, detached, with the gradient norm before clipping.
        z: latents (B, C, h, w), without gradient: what SiT learns from, it cannot change.
        x_hat: reconstructions (B, 3, H, W), without gradient.
        draws: with the t and eps that were used.
    """

    losses: dict[str, Tensor]
    z: Tensor
    x_hat: Tensor
    draws: Draws


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
        trainable,
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        eps=1e-8,
        fused=fused_optimizer(trainable[0].device),
    )


def make_ema(sit: SiT) -> SiT:
    """A frozen copy in eval mode, to be moved by `update_ema`."""
    return deepcopy(sit).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, failed: Tensor | None = None) -> None:
    """Moves every float tensor of ema towards model, BatchNorm statistics too; integer buffers are copied.

    Both are of one class and one dtype. Of networks that FSDP has cut, both in the same way, each process
    moves its own pieces. If `failed` is 1.0 (see `Mechanics`), floats stay as they are.
    """
    pairs = list(zip(_own_pieces(ema), _own_pieces(model), strict=True))
    for mine, other in pairs:
        if not mine.is_floating_point():
            mine.copy_(other)
    averaged, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    if failed is None:
        torch._foreach_lerp_(averaged, current, 1 - decay)
    else:  # the same, as a step of SGD with weight decay 1 up the "gradient" `current`, which heeds `failed`
        torch._fused_sgd_(
            averaged,
            current,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=1 - decay,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            found_inf=failed,
        )


def _own_pieces(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


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


def _update(
    state: TrainState, name: str, losses_of: Callable[..., tuple], *batch: Tensor | list[Tensor] | Draws
) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """One update of a network: zero_grad, backward, clip, step; the rest is for micro-batches.

    Args:
        state: updated in place: this network's weights and its optimiser.
        name: of the network.
        losses_of: maps the state and a batch to the loss to follow, all losses by name, and other outputs.
        batch: what `losses_of` takes; its first entry is a tensor.

    Returns:
        The losses of the whole batch with the gradient norm before clipping, and the other outputs, joined.
    """
    mechanics, optimizer, size = state.mechanics, state.optimizers[name], len(batch[0])
    shares, pieces = [], []
    optimizer.zero_grad(set_to_none=True)
    for chunk in mechanics.chunks(size):
        share = (chunk.stop - chunk.start) / size  # 1 without micro-batches
        with mechanics.micro_batch(name, last=chunk.stop == size):
            piece = [_cut(value, chunk) for value in batch]
            with mechanics.autocast():
                loss, losses, *outputs = mechanics.forward(name, losses_of, state, *piece)
            mechanics.backward(loss * share, optimizer)
        shares.append({key: value.detach() * share for key, value in losses.items()})
        pieces.append([output if output is None else output.detach() for output in outputs])
    norm = mechanics.update(getattr(state, name), optimizer, state.config.max_grad_norm)
    whole = {key: sum(each[key] for each in shares) for key in losses}
    joined = [None if each[0] is None else torch.cat(each) for each in zip(*pieces, strict=True)]
    return whole | {GRAD_NORMS[name]: norm}, joined


def _cut(value: Tensor | list[Tensor] | Draws, chunk: slice) -> Tensor | list[Tensor] | Draws:
    return [tensor[chunk] for tensor in value] if isinstance(value, list) else value[chunk]


@contextmanager
def _loss_precision(config: StepConfig, *images: Tensor) -> Iterator[Sequence[Tensor]]:
    """The images as the loss networks see them; inside, autocast is off if they are kept out of it (D11)."""
    device = images[0].device.type
    if config.loss_precision == "autocast" or not torch.is_autocast_enabled(device):
        yield images
    else:
        with torch.autocast(device, enabled=False):
            yield [full_precision(x) for x in images]


# ---------------------------------------------------------------- the three updates


def vae_step(
    state: TrainState,
    x: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None,
    **draws: Tensor | None,
) -> VAEStepOutput:
    """Official step 1: the VAE learns to reconstruct, and to have latents whose SiT features align.

    SiT is frozen and in eval mode: gradients pass through it to z (REPA-E eq. 3 and 4). Without a SiT the VAE
    only learns to reconstruct.

    Args:
        state: updated in place: the VAE's weights and its optimiser.
        x: images (B, 3, H, W) in [-1, 1].
        labels: classes (B,).
        targets: encoder tokens (B, N, D), or one such tensor per encoder.
        draws: by keyword, see `Draws`.
    """
    drawn = Draws(**draws)
    state.vae.train()
    if state.sit is not None:
        state.sit.eval()  # running BatchNorm statistics, no label dropout
    if state.gan_active:
        state.discriminator.train()
    with frozen(state.sit, state.discriminator):  # no gradient *for* them, but gradient *through* them
        losses, (z, x_hat, t, eps) = _update(state, "vae", vae_losses, x, labels, as_list(targets), drawn)
    return VAEStepOutput(losses, z, x_hat, replace(drawn, t=t, eps=eps))  # z is detached: the stop-gradient


def vae_losses(state: TrainState, x: Tensor, labels: Tensor, targets: list[Tensor], draws: Draws) -> tuple:
    """The VAE's loss on a batch; all its terms by name; z, x_hat, and the t and eps that were used."""
    config, network = state.config, partial(run, state.mechanics)  # which may recompute activations
    posterior = state.vae.encode(x)
    z = posterior.sample(draws.eps_posterior)
    x_hat = state.vae.decode(z)
    with _loss_precision(config, x, x_hat) as (real, fake):
        losses = vae_regularization_loss(
            real,
            fake,
            posterior.kl(),
            config.vae_loss,
            perceptual=state.perceptual and partial(network, state.perceptual),
            logits_fake=network(state.discriminator, fake) if state.gan_active else None,
        )
    loss, t, eps = losses["vae_reg"], draws.t, draws.eps
    if state.sit is not None:  # only as deep as the tap; to the end only in the naive variant
        out = sit_losses(
            state.sit,
            z,
            labels,
            targets,
            t=t,
            eps=eps,
            path=config.path,
            weighting=config.weighting,
            align_only=config.vae_diffusion_coeff == 0,
            batch_stats=config.vae_step_batch_stats,
        )
        t, eps = out.t, out.eps
        if out.align_loss is not None:
            losses["vae_align"] = out.align_loss
            if config.vae_align_coeff:
                loss = loss + config.vae_align_coeff * out.align_loss
        if config.vae_diffusion_coeff:
            losses["vae_denoising"] = out.denoising_loss.mean()
            loss = loss + config.vae_diffusion_coeff * losses["vae_denoising"]
    return loss, losses | {"vae_total": loss}, z, x_hat, t, eps


def discriminator_step(state: TrainState, x: Tensor, x_hat: Tensor) -> dict[str, Tensor]:
    """Official step 2: the discriminator learns to tell images from reconstructions, both (B, 3, H, W)."""
    state.discriminator.train()
    return _update(state, "discriminator", discriminator_losses, x.detach(), x_hat.detach())[0]


def discriminator_losses(state: TrainState, x: Tensor, x_hat: Tensor) -> tuple:
    """The discriminator's loss on a batch, and what it says of both kinds of images."""
    with _loss_precision(state.config, x, x_hat) as images:
        logits_real, logits_fake = map(state.discriminator, images)
        loss = hinge_discriminator_loss(logits_real, logits_fake)
    return loss, {"disc": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}


def sit_step(
    state: TrainState,
    z: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None,
    **draws: Tensor | None,
) -> dict[str, Tensor]:
    """Official step 3: SiT learns velocity and alignment on latents without gradient, REPA-E's stop-gradient.

    Called alone, with latents of a frozen VAE, this is REPA; without targets it is a plain SiT.

    Args:
        state: updated in place: SiT's weights, BatchNorm statistics and optimiser.
        z: un-normalised latents (B, C, h, w).
        labels: classes (B,).
        targets: encoder tokens (B, N, D), one such tensor per encoder, or None.
        draws: by keyword, see `Draws`; t and eps are the ones of the VAE step.
    """
    z = z.detach()
    state.sit.train()  # BatchNorm follows the batch, labels are dropped
    with state.mechanics.whole_batch(state.sit, z):
        return _update(state, "sit", sit_step_losses, z, labels, as_list(targets), Draws(**draws))[0]


def sit_step_losses(
    state: TrainState, z: Tensor, labels: Tensor, targets: list[Tensor], draws: Draws
) -> tuple:
    """SiT's loss on a batch, and its terms by name."""
    config = state.config
    out = sit_losses(
        state.sit,
        z,
        labels,
        targets,
        t=draws.t,
        eps=draws.eps,
        path=config.path,
        weighting=config.weighting,
        label_drop=draws.label_drop,
    )
    losses = {"denoising": out.denoising_loss.mean()}
    loss = losses["denoising"]
    if out.align_loss is not None:
        losses["sit_align"] = out.align_loss
        loss = loss + config.proj_coeff * out.align_loss
    return loss, losses | {"sit_total": loss}


# ---------------------------------------------------------------- a whole step


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
        eps_posterior: noise of the VAE's posterior (B, C, h, w); drawn when None.
        t: times (B,); drawn when None.
        eps: noise of the diffusion (B, C, h, w); drawn when None.
        label_drop: which labels become the null class in the SiT step, bool (B,); drawn when None.

    Returns:
        Every loss and every gradient norm before clipping, as floats.

    Raises:
        ValueError: a batch that would train silently wrong (see `check_batch`), or a network or optimiser
            that the configuration needs is missing.
        FloatingPointError: a gradient is not finite.
    """
    _check_ready(state, targets)
    check_batch(state.sit, x, labels, targets)
    if t is not None and len(t) == len(x):  # other shapes are refused where they are used
        check_times(t, len(x), wait=True)
    return as_floats(all_updates(state, x, labels, targets, Draws(eps_posterior, t, eps, label_drop))[0])


def all_updates(
    state: TrainState, x: Tensor, labels: Tensor, targets: Tensor | Sequence[Tensor] | None, draws: Draws
) -> tuple[dict[str, Tensor], Tensor]:
    """`repae_step` unchecked and without waiting for the device; a VAE alone if the state has no SiT.

    Returns:
        The losses and gradient norms, still on the device, and the latents z (B, C, h, w).
    """
    for optimizer in state.optimizers.values():  # SiT's gradients would be held beside the VAE's activations
        optimizer.zero_grad(set_to_none=True)
    vae = vae_step(state, x, labels, targets, **vars(draws))
    losses = vae.losses
    if state.gan_active:
        losses |= discriminator_step(state, x, vae.x_hat)
    if state.sit is None:
        state.step += 1
    else:
        losses |= latent_updates(state, vae.z, labels, targets, vae.draws)
    return losses, vae.z


def latent_step(
    state: TrainState,
    z: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None,
    *,
    t: Tensor | None = None,
    eps: Tensor | None = None,
    label_drop: Tensor | None = None,
) -> dict[str, float]:
    """One step with the VAE left alone: SiT and its moving average. REPA, or a plain SiT without targets.

    Args:
        state: updated in place.
        z: latents (B, C, h, w).
        labels: classes (B,).
        targets: encoder tokens (B, N, D), one such tensor per encoder, or None.
        t: times (B,); drawn when None.
        eps: noise like z; drawn when None.
        label_drop: which labels become the null class, bool (B,); drawn when None.

    Raises:
        ValueError: latents not finite, labels out of range, targets not finite or not on SiT's grid.
    """
    if not bool(z.isfinite().all()):
        raise ValueError(
            "the latent batch contains NaN or infinity: check the VAE that made it and the cached file"
        )
    check_label_count(labels, z.shape[0], "latent")
    _check_conditions(state.sit, z.shape[0], labels, targets)
    if t is not None and len(t) == len(z):  # other shapes are refused where they are used
        check_times(t, len(z), wait=True)
    return as_floats(latent_updates(state, z, labels, targets, Draws(None, t, eps, label_drop)))


def latent_updates(
    state: TrainState, z: Tensor, labels: Tensor, targets: Tensor | Sequence[Tensor] | None, draws: Draws
) -> dict[str, Tensor]:
    """`latent_step` unchecked and without waiting for the device."""
    losses = sit_step(state, z, labels, targets, **vars(draws))
    update_ema(state.ema, state.sit, state.config.ema_decay, state.mechanics.failed)
    state.step += 1
    return losses


def as_floats(losses: dict[str, Tensor]) -> dict[str, float]:
    """Detached floats, moved from the device in one transfer."""
    values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
    return dict(zip(losses, values, strict=True))
