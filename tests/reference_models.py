"""Networks with the weights of the reference data: a recipe of seeded random numbers, described in
tests/reference/README.md.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repae_lite.method.losses import LPIPSLoss, VAELossConfig
from repae_lite.method.steps import StepConfig, TrainState, make_ema, make_optimizer
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.sit import SiT, SiTConfig
from repae_lite.networks.vae import AutoencoderKL

REFERENCE = Path(__file__).parent / "reference"


def golden() -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and numbers of set A."""
    return load_file(REFERENCE / "golden_A.safetensors"), json.loads(
        (REFERENCE / "golden_A.json").read_text()
    )


def fill(module: torch.nn.Module, offset: int) -> torch.nn.Module:
    """Gives every tensor the value that the recipe prescribes for its name and rank."""
    state = module.state_dict()
    for i, name in enumerate(sorted(state)):
        tensor = state[name]
        r = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(offset + i))
        if not tensor.is_floating_point():
            tensor.zero_()
        elif name.endswith("pos_embed"):
            continue
        elif name.endswith("running_var"):
            tensor.copy_(1 + 0.1 * r.abs())
        elif tensor.ndim > 1:
            tensor.copy_(r / tensor[0].numel() ** 0.5)
        elif name.endswith("weight"):
            tensor.copy_(1 + 0.1 * r)
        else:
            tensor.copy_(0.1 * r)
    return module


def golden_vae() -> AutoencoderKL:
    return fill(AutoencoderKL.from_preset("f8d4"), 0).eval()


def golden_sit(train_pos_embed: bool = False) -> SiT:
    config = SiTConfig(
        in_channels=4,
        input_size=8,
        patch_size=2,
        width=64,
        depth=4,
        heads=4,
        label_dropout=0.0,
        target_dims=(48,),
        alignment_depth=2,
        projector_width=128,
        train_pos_embed=train_pos_embed,
    )
    return fill(SiT(config), 20000).eval()


def golden_discriminator() -> PatchDiscriminator:
    return fill(PatchDiscriminator(), 40000).eval()


def golden_lpips(lpips_range: str) -> LPIPSLoss:
    loss = LPIPSLoss(lpips_range, pretrained_trunk=False)
    convolutions = [m for m in loss.net.net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 13
    for k, conv in enumerate(convolutions):
        r = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(9000 + k))
        conv.weight.copy_(r * (2 / conv.weight[0].numel()) ** 0.5)
        conv.bias.zero_()
    return loss


def golden_state(variant: str) -> TrainState:
    """The training state before the first of the three steps; variant "official" (with D1 and D2) or
    "corrected".
    """
    vae, sit, disc = golden_vae(), golden_sit(train_pos_embed=variant == "official"), golden_discriminator()
    return TrainState(
        vae=vae,
        sit=sit,
        ema=make_ema(sit),
        optimizers={
            "vae": make_optimizer(vae),
            "sit": make_optimizer(sit),
            "discriminator": make_optimizer(disc),
        },
        config=StepConfig(vae_loss=VAELossConfig()),
        discriminator=disc,
        perceptual=golden_lpips(variant),
    )


# Losses of the first step agree to 1e-5. After it they cannot agree as well, whoever computes them: Adam's
# first updates move every weight by lr times the *sign* of its gradient, and where a gradient is rounding
# noise the sign is too. Run in float64, this code differs from the float32 reference by 4e-5 (second step)
# and 1.1e-4 (third) of a loss, as much as its float32 runs with one and two threads differ from each other;
# gradient norms by up to 2e-3.
LOSS_TOLERANCE = (1e-5, 1e-4, 5e-4)
NORM_TOLERANCE = (1e-4, 5e-4, 4e-3)
# Means of signed terms of order one (cosines, logits): their error is relative to the terms, not to what is
# left after cancelling.
SIGNED = {"vae_align": 1.0, "sit_align": 1.0, "logits_real": 1.0, "logits_fake": 1.0, "weighted_gan": 0.1}


def assert_golden_steps(
    state: TrainState, variant: str, step: Callable[..., dict[str, float]], *, factor: float = 1.0
) -> None:
    """Three steps, called like `repae_step`, give the official losses, norms and weights; losses and norms
    within `factor` times the tolerances.
    """
    tensors, numbers = golden()
    for i, expected in enumerate(numbers[f"steps_{variant}"]):
        losses = step(
            state,
            tensors["images"][i] / 127.5 - 1,
            tensors["labels"][i],
            tensors[f"targets.{i}.0"],
            eps_posterior=tensors["posterior_eps"][i],
            t=tensors["t"][i].flatten(),
            eps=tensors["noise"][i],
        )
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = (NORM_TOLERANCE if name.startswith("grad_norm") else LOSS_TOLERANCE)[i]
            scale = SIGNED.get(name, abs(expected["vae_reg"] if name == "kl" and i else value))
            assert losses[name] == pytest.approx(value, abs=factor * tolerance * scale), f"step {i}: {name}"

    trained = {"vae": state.vae, "sit": state.sit, "ema": state.ema, "discriminator": state.discriminator}
    for model, expected in numbers[f"after_{variant}"].items():
        floats = {k: v.double() for k, v in trained[model].state_dict().items() if v.is_floating_point()}
        assert floats.keys() == expected.keys()
        for name, (total, norm) in expected.items():
            assert float(floats[name].norm()) == pytest.approx(norm, rel=1e-3), f"{model}.{name}: norm"
            # |sum of a difference| <= sqrt(n) |difference|: the bound that 1e-3 of the norm allows.
            slack = 1e-3 * norm * floats[name].numel() ** 0.5
            assert float(floats[name].sum()) == pytest.approx(total, abs=slack), f"{model}.{name}: sum"
