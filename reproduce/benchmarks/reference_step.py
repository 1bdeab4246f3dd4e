"""One training step in the official order, written plainly: `repae bench --against reference` runs it.

It trains the project's own networks, but shares nothing with `repae_lite.method.steps` beyond their state. It
computes what the official code computes, and in the same way: it passes the golden steps
(tests/test_reference_step.py). Each way that costs time and changes nothing but rounding is a field of
`Official`, so that its cost can be measured alone. D-numbers are those of DIFFERENCES.md.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repae_lite.method.interpolant import interpolate
from repae_lite.method.steps import GRAD_NORMS, Draws, TrainState, as_floats
from repae_lite.networks.layers import Linear, set_gradient_checkpointing


@dataclass(frozen=True)
class Official:
    """Which of the official code's ways are taken; False is the faster way to the same numbers.

    Attributes:
        per_image_alignment: cosines with the encoder's tokens image by image, in a Python loop.
        contiguous: VAE, LPIPS and discriminator in PyTorch's usual layout instead of channels last.
        ema_by_parameter: the moving average by two operations for each parameter instead of one for all.
        host_reads: each metric is read from the device by itself, instead of all at once.
        float32_losses: in mixed precision, LPIPS and discriminator stay out of autocast (D11).
        loss_calls: the discriminator's update runs it on the reconstructions again, although the VAE's has
            just done so, and its gradients go on to the pixels of the images. (LPIPS is called once a step
            in either way.)
        final_layer: the alignment pass goes on from the tap to the final layer, whose output nobody reads.
        plain_linear: SiT's linear layers as PyTorch computes them, where a CPU has a faster way.
        memory_given_back: on a CPU, the memory of freed tensors goes back to the system. That is a process's
            way, so the benchmark gives this step one of its own.
    """

    per_image_alignment: bool = True
    contiguous: bool = True
    ema_by_parameter: bool = True
    host_reads: bool = True
    float32_losses: bool = True
    loss_calls: bool = True
    final_layer: bool = True
    plain_linear: bool = True
    memory_given_back: bool = True

    @classmethod
    def only(cls, *names: str) -> "Official":
        """These ways are the official ones, the others the faster ones."""
        return cls(**{field.name: field.name in names for field in fields(cls)})


WAYS = tuple(field.name for field in fields(Official))


class ReferenceStep:
    """Trains a state by calls; the networks keep the layout that `official` asks for.

    Args:
        state: networks, optimisers and weights of the losses; its mechanics are not used.
        official: see `Official`.
        dtype: of autocast; None for full precision. With float16 all optimisers share a loss scale.
        compile: compile VAE, SiT, LPIPS and discriminator, each as a whole.
    """

    def __init__(
        self,
        state: TrainState,
        official: Official | None = None,
        *,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ):
        self.state, self.official, self.dtype = state, official or Official(), dtype
        self.device = state.sit.pos_embed.device.type
        self.scaler = torch.amp.GradScaler(self.device) if dtype == torch.float16 else None
        self.layout = torch.contiguous_format if self.official.contiguous else torch.channels_last
        self.sit_trains = [p for p in state.sit.parameters() if p.requires_grad]
        self.losses = [m for m in (state.perceptual, state.discriminator) if m is not None]
        for module in (state.vae, *self.losses):
            module.to(memory_format=self.layout)
        set_gradient_checkpointing(False, state.vae, state.sit)  # the official code has none
        if compile:
            for module in (state.vae.encoder, state.vae.decoder, *self.losses):
                module.compile()
        self.run_sit = torch.compile(_run_sit) if compile else _run_sit

    def __call__(
        self, x: Tensor, labels: Tensor, targets: Sequence[Tensor], draws: Draws
    ) -> dict[str, float]:
        """Updates VAE, discriminator, SiT and moving average.

        Args:
            x: images (B, 3, H, W) in [-1, 1].
            labels: classes (B,).
            targets: encoder tokens (B, N, D), one such tensor per encoder.
            draws: the step's random numbers, all of them; without `label_drop` no label is dropped.

        Returns:
            Losses and gradient norms before clipping, named as by `repae_step`.
        """
        state, config = self.state, self.state.config
        x, adversarial = x.contiguous(memory_format=self.layout), state.gan_active
        metrics: dict[str, Tensor] = {}

        # 1. The VAE learns; SiT is frozen and in eval mode.
        state.vae.train()
        state.sit.eval()
        for p in self.sit_trains:
            p.requires_grad_(False)
        with self.autocast(), self.linear_layers():
            posterior = state.vae.encode(x)
            z = posterior.sample(draws.eps_posterior)
            x_hat = state.vae.decode(z)
            with self.loss_precision():
                terms, judged = self.generator_terms(x, x_hat, posterior.kl())
            align, _ = self.sit_losses(z, labels, targets, draws, align_only=True)
            loss = terms["vae_reg"] + config.vae_align_coeff * align
        metrics |= terms | {"vae_align": align, "vae_total": loss}
        metrics[GRAD_NORMS["vae"]] = self.update("vae", loss)

        # 2. The discriminator learns to tell images from reconstructions.
        if adversarial:
            with self.autocast(), self.loss_precision():
                real = x.detach().requires_grad_(self.official.loss_calls)
                if self.official.loss_calls:
                    logits_real = state.discriminator(real)
                    logits_fake = state.discriminator(self.as_loss_input(x_hat.detach()))
                else:
                    logits_fake, logits_real = judged, state.discriminator(real)
                loss = 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
            metrics |= {"disc": loss, "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
            metrics[GRAD_NORMS["discriminator"]] = self.update("discriminator", loss)

        # 3. SiT learns, on latents that carry no gradient, with the same times and noise.
        state.sit.train()
        for p in self.sit_trains:
            p.requires_grad_(True)
        with self.autocast(), self.linear_layers():
            align, denoising = self.sit_losses(z.detach(), labels, targets, draws, align_only=False)
            loss = denoising + config.proj_coeff * align
        metrics |= {"denoising": denoising, "sit_align": align, "sit_total": loss}
        metrics[GRAD_NORMS["sit"]] = self.update("sit", loss)

        # 4. The moving average follows.
        self.update_ema(config.ema_decay)
        state.step += 1
        if self.official.host_reads:
            return {name: value.detach().item() for name, value in metrics.items()}
        return as_floats(metrics)

    def autocast(self) -> AbstractContextManager:
        """The precision of forward passes."""
        return torch.autocast(self.device, self.dtype) if self.dtype else nullcontext()

    def linear_layers(self) -> AbstractContextManager:
        """How SiT's linear layers are computed."""
        return patch.object(Linear, "by_convolution", not self.official.plain_linear)

    def loss_precision(self) -> AbstractContextManager:
        """The precision of LPIPS and discriminator."""
        if not self.dtype or not self.official.float32_losses:
            return nullcontext()
        return torch.autocast(self.device, enabled=False)

    def as_loss_input(self, x: Tensor) -> Tensor:
        """Images as the loss networks see them."""
        x = x.float() if self.official.float32_losses else x
        return x.contiguous(memory_format=self.layout)

    def generator_terms(
        self, x: Tensor, x_hat: Tensor, kl: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The weighted terms that keep a VAE a VAE, with their sum; and the reconstructions' logits, if the
        discriminator's update is to use them again.
        """
        state, config, judged = self.state, self.state.config.vae_loss, None
        real, fake = self.as_loss_input(x), self.as_loss_input(x_hat)
        pixel = F.l1_loss(fake, real) if config.pixel == "l1" else F.mse_loss(fake, real)
        terms = {"reconstruction": config.pixel_weight * pixel}
        if state.perceptual is not None:
            terms["perceptual"] = config.perceptual_weight * state.perceptual(real, fake).mean()
        terms["kl"] = config.kl_weight * kl.mean()
        if state.gan_active and self.official.loss_calls:
            state.discriminator.train().requires_grad_(False)
            terms["weighted_gan"] = -config.gan_weight * state.discriminator(fake).mean()
            state.discriminator.requires_grad_(True)
        elif state.gan_active:
            leaf = fake.detach().requires_grad_()
            judged = state.discriminator.train()(leaf)  # its graph serves both updates
            gan = -config.gan_weight * judged.mean()
            (slope,) = torch.autograd.grad(gan, leaf, retain_graph=True)
            through = (slope * fake).sum()  # whose gradient is the loss's, and whose value does not matter
            terms["weighted_gan"] = gan.detach() + through - through.detach()
        return terms | {"vae_reg": sum(terms.values())}, judged

    def sit_losses(
        self, z: Tensor, labels: Tensor, targets: Sequence[Tensor], draws: Draws, *, align_only: bool
    ) -> tuple[Tensor, Tensor | None]:
        """SiT's alignment loss, and its velocity loss unless it is for the VAE."""
        sit = self.state.sit
        z_t, v = interpolate(sit.normalize(z), draws.eps, draws.t, self.state.config.path)
        if sit.training and draws.label_drop is not None:
            labels = torch.where(draws.label_drop, sit.null_class, labels)
        last = self.official.final_layer or not align_only
        v_hat, projected = self.run_sit(sit, z_t, draws.t, labels, align_only, last)
        cosines = _cosines_by_image if self.official.per_image_alignment else _cosines
        align = -sum(cosines(*pair) for pair in zip(projected, targets, strict=True)) / len(targets)
        return align, None if align_only else (v_hat - v).square().mean()

    def update(self, name: str, loss: Tensor) -> Tensor:
        """Backward pass, clipping, step; returns the gradients' norm before clipping."""
        optimizer = self.state.optimizers[name]
        parameters = getattr(self.state, name).parameters()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        if self.scaler:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.state.config.max_grad_norm)
        if self.scaler:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Float tensors move towards SiT's, BatchNorm's statistics too; integers are copied."""
        source, averaged, current = self.state.sit.state_dict(), [], []
        for name, tensor in self.state.ema.state_dict().items():
            if not tensor.is_floating_point():
                tensor.copy_(source[name])
            elif self.official.ema_by_parameter:
                tensor.mul_(decay).add_(source[name], alpha=1 - decay)
            else:
                averaged.append(tensor)
                current.append(source[name])
        if averaged:
            torch._foreach_lerp_(averaged, current, 1 - decay)


def _run_sit(
    sit: nn.Module, z_t: Tensor, t: Tensor, labels: Tensor, align_only: bool, last: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Velocities (B, C, h, w), if the final layer is run, and the projected features at the tap (B, N, D)."""
    h = sit.x_embedder(z_t) + sit.pos_embed
    condition = sit.t_embedder(t) + sit.y_embedder(labels)
    for depth, block in enumerate(sit.blocks, start=1):
        h = block(h, condition)
        if depth == sit.config.alignment_depth:
            projected = [projector(h) for projector in sit.projectors]
            if align_only:
                break
    return sit._unpatchify(sit.final_layer(h, condition)) if last else None, projected


def _cosines(h_proj: Tensor, target: Tensor) -> Tensor:
    """Mean cosine similarity of tokens (B, N, D)."""
    return (F.normalize(h_proj, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean()


def _cosines_by_image(h_proj: Tensor, target: Tensor) -> Tensor:
    """The same, as the official code computes it."""
    total = 0.0
    for h_j, target_j in zip(h_proj, target, strict=True):
        total = total + (F.normalize(h_j, dim=-1) * F.normalize(target_j, dim=-1)).sum(-1).mean()
    return total / len(h_proj)
