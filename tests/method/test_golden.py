"""Agreement with the official implementation: everything in tests/reference is reproduced, to rounding."""

import json
from dataclasses import replace

import pytest
import torch
from reference_models import (
    LOSS_TOLERANCE,
    REFERENCE,
    assert_golden_steps,
    golden,
    golden_discriminator,
    golden_lpips,
    golden_sit,
    golden_state,
    golden_vae,
)
from torch.testing import assert_close

from repae_lite.method.losses import sit_losses
from repae_lite.method.sampling import Guidance, sample_ode, sample_sde
from repae_lite.method.steps import repae_step
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL

STATE_DICTS = sorted((REFERENCE / "state_dicts").glob("*.json"))


@pytest.fixture(scope="module")
def reference():
    return golden()


@pytest.fixture(scope="module")
def tensors(reference):
    return reference[0]


@pytest.fixture(scope="module")
def x(tensors):
    return tensors["images"][0] / 127.5 - 1


@pytest.fixture(scope="module")
def vae():
    return golden_vae()


@pytest.fixture()
def sit():
    return golden_sit()


def build(name: str) -> torch.nn.Module:
    """The model a state dict in tests/reference belongs to, without memory for its weights."""
    with torch.device("meta"):
        if name == "discriminator":
            return PatchDiscriminator()
        if name.startswith("vae_"):
            return AutoencoderKL.from_preset(name.removeprefix("vae_"))
        size, latents = name.split(".")
        channels, side = {"f8d4": (4, 32), "f16d32": (32, 16)}[latents]
        return SiT.from_preset(size.replace("_", "/"), in_channels=channels, input_size=side)


@pytest.mark.parametrize("path", STATE_DICTS, ids=lambda p: p.stem)
def test_golden_state_dict_loads_strictly(path):
    shapes = json.loads(path.read_text())
    integers = {name for name in shapes if name.endswith("num_batches_tracked")}
    state = {
        name: torch.zeros(shape, dtype=torch.int64 if name in integers else torch.float32, device="meta")
        for name, shape in shapes.items()
    }
    model = build(path.stem)
    model.load_state_dict(state, strict=True)
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == shapes


def test_golden_state_dicts_are_all_there():
    assert len(STATE_DICTS) == 9


def test_golden_sit_parameter_names(reference):
    assert {name: list(t.shape) for name, t in golden_sit().state_dict().items()} == reference[1]["sit_keys"]


@torch.no_grad()
def test_golden_vae(tensors, x, vae):
    posterior = vae.encode(x)
    z = posterior.sample(tensors["posterior_eps"][0])
    assert_close(posterior.mean, tensors["vae.mean"], rtol=1e-4, atol=1e-5)
    assert_close(posterior.std, tensors["vae.std"], rtol=1e-4, atol=1e-5)
    assert_close(z, tensors["vae.z"], rtol=1e-4, atol=1e-5)
    assert_close(posterior.kl(), tensors["vae.kl"], rtol=1e-4, atol=1e-4)
    assert_close(vae.decode(z), tensors["vae.recon"], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_golden_discriminator(tensors, x):
    assert_close(golden_discriminator()(x), tensors["disc.logits"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("lpips_range", ["official", "corrected"])
def test_golden_lpips(tensors, reference, x, lpips_range):
    expected = torch.tensor(reference[1][f"lpips_{lpips_range}"])
    assert_close(golden_lpips(lpips_range)(x, tensors["vae.recon"]), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_golden_sit_velocity_and_features(tensors, sit):
    noise, t, labels = tensors["noise"][0], tensors["t"][0].flatten(), tensors["labels"][0]
    assert_close(sit(noise, t, labels), tensors["sit.velocity"], rtol=1e-4, atol=1e-5)
    assert_close(
        sit(noise, t, torch.full_like(labels, 1000)), tensors["sit.velocity_null"], rtol=1e-4, atol=1e-5
    )
    assert_close(sit.features(noise, t, labels), tensors["sit.features"], rtol=1e-4, atol=1e-5)


def golden_losses(tensors, sit, z=None):
    return sit_losses(
        sit,
        tensors["vae.z"] if z is None else z,
        tensors["labels"][0],
        tensors["targets.0.0"],
        t=tensors["t"][0],
        eps=tensors["noise"][0],
    )


@torch.no_grad()
def test_golden_sit_losses_eval(tensors, sit):
    out = golden_losses(tensors, sit)
    assert_close(out.denoising_loss, tensors["sit.eval.denoising_loss"], rtol=1e-4, atol=1e-5)
    assert_close(out.align_loss, tensors["sit.eval.proj_loss"], rtol=1e-4, atol=1e-5)
    assert_close(out.v_hat, tensors["sit.eval.model_output"], rtol=1e-4, atol=1e-5)
    assert_close(out.projected[0], tensors["sit.eval.projected.0"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_golden_sit_losses_train(tensors, sit):
    out = golden_losses(tensors, sit.train())
    assert_close(out.denoising_loss, tensors["sit.train.denoising_loss"], rtol=1e-4, atol=1e-5)
    assert_close(out.align_loss, tensors["sit.train.proj_loss"], rtol=1e-4, atol=1e-5)
    assert_close(sit.bn.running_mean, tensors["sit.train.bn_mean"], rtol=1e-4, atol=1e-6)
    assert_close(sit.bn.running_var, tensors["sit.train.bn_var"], rtol=1e-4, atol=1e-6)
    stats = sit.latent_stats()
    assert_close(1 / stats.std, tensors["sit.latents_scale"], rtol=1e-4, atol=1e-6)
    assert_close(stats.mean, tensors["sit.latents_bias"], rtol=1e-4, atol=1e-6)


def test_golden_alignment_gradient_into_latents(tensors, sit):
    z = tensors["vae.z"].clone().requires_grad_()
    golden_losses(tensors, sit, z).align_loss.backward()
    expected = tensors["sit.align_grad_z"]
    assert_close(z.grad, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


SAMPLERS = {
    "euler": (sample_ode, {"solver": "euler"}),
    "euler_cfg": (sample_ode, {"solver": "euler", "guidance": Guidance(2.2, 0.1, 0.65)}),
    "heun_cfg": (sample_ode, {"solver": "heun", "guidance": Guidance(2.2, 0.1, 0.65)}),
    "sde": (sample_sde, {}),
    "sde_cfg": (sample_sde, {"guidance": Guidance(1.8, 0.0, 0.825)}),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_golden_samplers(tensors, sit, name):
    sampler, options = SAMPLERS[name]
    sit.config = replace(sit.config, label_dropout=0.1)  # guidance is refused where there was none
    torch.manual_seed(1234)
    sample = sampler(sit, tensors["noise"][0], tensors["labels"][0], steps=10, **options)
    assert sample.dtype == torch.float64
    assert_close(sample, tensors[f"sampler.{name}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_golden_three_training_steps(variant):
    assert_golden_steps(golden_state(variant), variant, repae_step)


def test_golden_variants_differ(reference):
    """The switches D1 and D2 matter: the two recorded runs are told apart by the tolerances above."""
    numbers = reference[1]
    first = {v: numbers[f"steps_{v}"][0]["perceptual"] for v in ("official", "corrected")}
    assert abs(first["official"] - first["corrected"]) > 100 * LOSS_TOLERANCE[0]
    pos_embed = {v: numbers[f"after_{v}"]["sit"]["pos_embed"][0] for v in ("official", "corrected")}
    assert abs(pos_embed["official"] - pos_embed["corrected"]) > 1e-4
    frozen = golden_sit().pos_embed.double().sum().item()
    assert pos_embed["corrected"] == pytest.approx(frozen, rel=1e-6)
