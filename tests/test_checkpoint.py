"""Saved VAEs come back the same, and diffusers reads what is exported for it."""

import json

import pytest
import torch

from repae_lite.checkpoint import SHIPPED, export_diffusers, load_latent_stats, load_vae, save_vae
from repae_lite.vae import AutoencoderKL, VAEConfig

SMALL = {
    "attention at the bottom": VAEConfig(width=16, multipliers=(1, 2), blocks=1, groups=4),
    "attention in levels": VAEConfig(latent_channels=6, width=8, multipliers=(1, 1, 2), blocks=2, groups=4, attention_levels=(1, 2)),
    "no attention": VAEConfig(width=8, multipliers=(1, 3), blocks=1, groups=4, mid_attention=False),
}


def random_vae(config):
    """A VAE with seeded random weights, away from their initial zeros and ones."""
    torch.manual_seed(0)
    vae = AutoencoderKL(config).eval()
    for p in vae.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return vae


def test_a_saved_vae_comes_back_the_same(tmp_path):
    vae, scale, bias = random_vae(SMALL["attention at the bottom"]), torch.rand(4) + 0.5, torch.randn(4)
    save_vae(tmp_path / "vae.safetensors", vae, scale=scale, bias=bias)
    loaded = load_vae(tmp_path / "vae.safetensors")
    assert loaded.config == vae.config and not loaded.training
    for (name, a), b in zip(vae.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(load_latent_stats(tmp_path / "vae.safetensors"), (scale, bias), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_vaes_load_with_their_statistics(name):
    vae = load_vae(name)
    scale, bias = load_latent_stats(name)
    assert vae.config.latent_channels == len(scale) == len(bias) and bool((scale > 0).all())


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_diffusers_loads_an_export_and_reconstructs_the_same(tmp_path, config):
    diffusers = pytest.importorskip("diffusers")
    vae = random_vae(config)
    channels = config.latent_channels
    scale, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    folder = export_diffusers(tmp_path / "exported", vae, scale=scale, bias=bias)
    theirs, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        ours, posterior = vae.encode(x), theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, ours.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.std, ours.std, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.decode(ours.mean).sample, vae.decode(ours.mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(theirs.config.latents_std), 1 / scale)
    torch.testing.assert_close(torch.tensor(theirs.config.latents_mean), bias)


def test_export_writes_two_files_and_replaces_them(tmp_path):
    vae = random_vae(SMALL["no attention"])
    for _ in range(2):
        export_diffusers(tmp_path, vae, scale=torch.ones(4), bias=torch.zeros(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text())["block_out_channels"] == [8, 24]


def test_a_folding_vae_is_not_exported(tmp_path):
    with pytest.raises(ValueError, match=r"folds 2x2 pixels .* which diffusers cannot"):
        export_diffusers(tmp_path / "folded", AutoencoderKL.from_preset("tiny"), scale=torch.ones(4), bias=torch.zeros(4))
    assert not (tmp_path / "folded").exists()
