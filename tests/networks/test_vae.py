"""The autoencoder beyond its agreement with the official one (test_golden): presets, posterior, refusals."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.vae import VAE_PRESETS, AutoencoderKL, Posterior, VAEConfig


@pytest.mark.parametrize("preset", VAE_PRESETS)
def test_preset_shapes(preset):
    config = VAE_PRESETS[preset]
    with torch.device("meta"):
        vae = AutoencoderKL.from_preset(preset)
        side = 2 * config.downsampling
        posterior, z, x_hat = vae(torch.zeros(2, 3, side, side * 2))
    assert posterior.mean.shape == posterior.std.shape == z.shape == (2, config.latent_channels, 2, 4)
    assert x_hat.shape == (2, 3, side, side * 2)


def test_downsampling_factors():
    assert {name: config.downsampling for name, config in VAE_PRESETS.items()} == {
        "f8d4": 8,
        "f16d32": 16,
        "tiny": 4,
    }


def test_posterior_against_torch_distributions():
    moments = torch.randn(3, 8, 2, 2)
    posterior = Posterior(moments)
    normal = Normal(posterior.mean, posterior.std)
    assert_close(posterior.kl(), kl_divergence(normal, Normal(0.0, 1.0)).sum((1, 2, 3)))
    eps = torch.randn(3, 4, 2, 2)
    assert_close(posterior.sample(eps), posterior.mean + posterior.std * eps)
    assert torch.equal(posterior.mode(), posterior.mean)


def test_kl_of_a_sharp_posterior_survives_half_precision():
    moments = torch.cat([torch.full((1, 4, 32, 32), 5.5), torch.full((1, 4, 32, 32), -17.0)], dim=1)
    exact = Posterior(moments).kl()
    assert float(exact) > 65504  # the largest float16
    assert_close(Posterior(moments.half()).kl(), exact, rtol=1e-3, atol=0)


def test_log_variance_is_clamped():
    moments = torch.cat([torch.zeros(1, 1, 1, 2), torch.tensor([[[[1000.0, -1000.0]]]])], dim=1)
    assert_close(Posterior(moments).log_var.flatten(), torch.tensor([20.0, -30.0]))


REFUSED = {
    "uint8": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"dtype torch\.uint8: convert"),
    "grey": (torch.zeros(1, 1, 32, 32), r"shape \(1, 1, 32, 32\): give a batch"),
    "float64": (
        torch.zeros(1, 3, 32, 32, dtype=torch.float64),
        r"dtype torch\.float64, the VAE torch\.float32: convert one",
    ),
    "one image": (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\)"),
    "none": (torch.zeros(0, 3, 32, 32), r"shape \(0, 3, 32, 32\)"),
    "size": (torch.zeros(1, 3, 30, 32), "30x32 is not a multiple of 4: resize or crop"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_encode_refuses(case):
    x, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        AutoencoderKL.from_preset("tiny").encode(x)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"unknown VAE preset 'f8'.*f8d4, f16d32, tiny"):
        AutoencoderKL.from_preset("f8")
    with pytest.raises(ValueError, match=r"this VAE decodes \(B, 4, h, w\)"):
        AutoencoderKL.from_preset("tiny").decode(torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match="groups=32 does not divide 16 channels"):
        VAEConfig(width=16)
    with pytest.raises(ValueError, match=r"latents have dtype torch\.int64"):
        AutoencoderKL.from_preset("tiny").decode(torch.zeros(1, 4, 8, 8).long())
    with pytest.raises(ValueError, match=r"moments have shape \(1, 3, 2, 2\)"):
        Posterior(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"latent_channels": 0}, "latent_channels is 0: it must be at least 1"),
        ({"width": 32.5}, "width is 32.5: it must be a whole number"),
        ({"multipliers": ()}, "give at least one level"),
        ({"multipliers": [1, 2]}, r"multipliers is \[1, 2\]: give a tuple"),
        ({"multipliers": (1, 0)}, r"multipliers is \(1, 0\): it must be at least 1"),
        (
            {"attention_levels": (4,)},
            r"attention_levels \(4,\): give at least one level, and attention to none",
        ),
        ({"attention_levels": (-1,)}, r"attention_levels is \(-1,\): it must be at least 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig(**sizes)


def test_the_discriminator_says_what_it_can_see():
    discriminator = PatchDiscriminator(width=8)
    smallest = discriminator.smallest
    assert discriminator(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)
    for shape in ((1, 3, smallest - 1, smallest), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=r"this discriminator takes \(B, 3, H, W\), H and W at least 24"):
            discriminator(torch.zeros(shape))
    with pytest.raises(ValueError, match="layers 0 must be at least 1"):
        PatchDiscriminator(layers=0)
