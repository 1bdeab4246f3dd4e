"""A small training state and batch with every part of the method, for the tests of several rooms."""

import torch
from torch import nn

from repae_lite.method.steps import (
    StepConfig,
    TrainState,
    make_ema,
    make_optimizer,
)
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.sit import SiT, SiTConfig
from repae_lite.networks.vae import AutoencoderKL

LABELS = torch.tensor([0, 3, 9, 1])


class Perceptual(nn.Module):
    """A frozen random convolution in place of LPIPS."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).requires_grad_(False)

    def forward(self, x, x_hat):
        return (self.conv(x) - self.conv(x_hat)).square().mean((1, 2, 3))


def make_state(train_pos_embed: bool = False, **changes) -> TrainState:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset("tiny")
    sit = SiT(
        SiTConfig(
            in_channels=4, input_size=8, width=32, depth=3, heads=2, num_classes=10, target_dims=(24, 16),
            alignment_depth=2, projector_width=32, train_pos_embed=train_pos_embed,
        )
    )  # fmt: skip
    for p in sit.parameters():  # adaLN-zero would make most gradients zero at the start
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    discriminator = PatchDiscriminator(width=8, layers=2)
    models = {"vae": vae, "sit": sit, "discriminator": discriminator}
    return TrainState(
        vae=vae,
        sit=sit,
        ema=make_ema(sit),
        optimizers={name: make_optimizer(model) for name, model in models.items()},
        config=StepConfig(**changes),
        discriminator=discriminator,
        perceptual=Perceptual(),
    )


def make_batch(size: int = 32):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(4, 3, size, size, generator=g) * 2 - 1
    targets = [torch.randn(4, 16, dim, generator=g) for dim in (24, 16)]
    draws = {
        "eps_posterior": torch.randn(4, 4, 8, 8, generator=g),
        "t": torch.rand(4, generator=g),
        "eps": torch.randn(4, 4, 8, 8, generator=g),
    }
    return x, targets, draws
