"""Representations: features by layer and noise level, spectra and maps, against loops and NumPy."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from repae_lite.checkpoints.models import load_latent_stats, load_vae
from repae_lite.data.datasets import load_embedded
from repae_lite.evaluation import representations
from repae_lite.evaluation.metrics import cknna, effective_dimensions, latent_structure, linear_probe
from repae_lite.evaluation.representations import (
    latent_report,
    pca_maps,
    probe_images,
    representation_table,
    sit_features,
    spectrum,
)
from repae_lite.method.interpolant import interpolate
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.networks.sit import SiT
from repae_lite.utils.pixels import to_unit_range
from repae_lite.utils.seeding import generator


@pytest.fixture(scope="module")
def images():
    images, labels = load_embedded("eval")
    chosen = torch.arange(0, 2000, 25)  # of every class
    return list(zip(images[chosen], labels[chosen].tolist(), strict=True))


@pytest.fixture(scope="module")
def probed(images):
    vae, encoder = load_vae("tiny"), VisionEncoder.from_name("tiny")
    return [probe_images(vae, encoder, images, range(first, 80, 2)) for first in (0, 1)]


@pytest.fixture(scope="module")
def sit():
    torch.manual_seed(0)
    sit = SiT.from_preset("tiny", depth=3).eval()
    for parameter in sit.parameters():  # new blocks are the identity
        torch.nn.init.normal_(parameter, std=0.1)
    sit.set_latent_stats(load_latent_stats("tiny"))
    return sit


# ---------------------------------------------------------------- features


@torch.no_grad()
def test_what_is_probed(images, probed):
    vae, encoder = load_vae("tiny"), VisionEncoder.from_name("tiny")
    x = torch.stack([image for image, _ in images[1:80:2]])
    assert_close(probed[1].z, vae.encode(to_unit_range(x)).mean, atol=1e-4, rtol=1e-4)
    assert_close(probed[1].target, encoder(x).mean(dim=1), atol=1e-4, rtol=1e-4)
    assert probed[1].labels.tolist() == [label for _, label in images[1:80:2]]
    with pytest.raises(ValueError, match="name at least one"):
        probe_images(vae, encoder, images, [])


@torch.no_grad()
def test_features_are_those_of_the_network_one_layer_at_a_time(sit, probed):
    z = probed[0].z[:20]
    found = sit_features(sit, z, 0.3, [3, 1], seed=5, first=7)
    eps = torch.stack(
        [torch.randn(4, 8, 8, generator=generator("representation", 5, 7 + i)) for i in range(20)]
    )
    t = torch.full((20,), 0.3)
    z_t, _ = interpolate(sit.normalize(z), eps, t)
    for layer in (1, 3):
        tokens = sit.features(z_t, t, torch.full((20,), 10), layer)  # 10 is the null class
        assert_close(found[layer], tokens.mean(dim=1), atol=1e-5, rtol=1e-5)
    assert not any(block._forward_hooks for block in sit.blocks)


def test_features_depend_on_the_image_alone(sit, probed):
    z = probed[0].z[:20]
    whole = sit_features(sit, z, 0.3, [2])[2]
    assert_close(sit_features(sit, z[5:], 0.3, [2], first=5)[2], whole[5:], atol=1e-5, rtol=1e-5)
    assert torch.equal(sit_features(sit, z, 0.3, [2])[2], whole)
    # Statistics of the batch would make an image's features depend on the others.
    assert_close(sit_features(sit.train(), z, 0.3, [2])[2], whole)
    sit.eval()


def test_the_table_has_every_layer_and_noise_level(sit, probed):
    train, test = probed
    rows = representation_table(sit, train, test, noise_levels=[0.1, 0.6], k=4, images=25)
    assert [(row["t"], row["layer"]) for row in rows] == [(t, n) for t in (0.1, 0.6) for n in (1, 2, 3)]
    row = rows[4]
    fitted, tested = sit_features(sit, train.z, 0.6, [2])[2], sit_features(sit, test.z, 0.6, [2], first=40)[2]
    assert row["cknna"] == pytest.approx(cknna(tested[:25], test.target[:25], 4), rel=1e-5)
    assert row["linear_probe"] == linear_probe(fitted, train.labels, tested, test.labels)
    assert rows[4:5] == representation_table(
        sit, train, test, noise_levels=[0.6], layers=[2], k=4, images=25, progress=True
    )


def test_features_refusals(sit, probed, monkeypatch):
    z = probed[0].z[:2]
    for layers in ([], [0], [1, 4]):
        with pytest.raises(ValueError, match="this SiT has blocks 1 to 3"):
            sit_features(sit, z, 0.5, layers)
    with pytest.raises(ValueError, match=r"the noise level is 1\.5"):
        sit_features(sit, z, 1.5, [1])
    with pytest.raises(ValueError, match="this SiT takes"):
        sit_features(sit, z[:, :3], 0.5, [1])
    assert not any(block._forward_hooks for block in sit.blocks)
    monkeypatch.setattr(representations, "MOST", 30)
    with pytest.raises(ValueError, match="CKNNA of 40 images takes too much memory: choose at most 30"):
        representation_table(sit, *probed)


# ---------------------------------------------------------------- latents


@pytest.mark.parametrize("shape", [(8, 8), (6, 9), (5, 5), (2, 2)])
def test_spectrum_against_loops(shape):
    z = torch.randn(3, 2, *shape, dtype=torch.float64)
    h, w = shape
    n = min(shape)
    sums, counts = np.zeros(n), np.zeros(n)
    for y in range(h):
        for x in range(w):
            f_y, f_x = (min(y, h - y) / h, min(x, w - x) / w)
            ring = math.floor(math.hypot(f_y, f_x) * n + 0.5)
            wave = np.exp(-2j * math.pi * (y * np.arange(h)[:, None] / h + x * np.arange(w)[None] / w))
            if ring <= n // 2:
                sums[ring] += (np.abs((z.numpy() * wave).sum(axis=(2, 3))) ** 2).mean() / (h * w)
                counts[ring] += 1
    frequencies, power = spectrum(z)
    assert_close(frequencies, torch.arange(n // 2 + 1, dtype=torch.float64) / n)
    np.testing.assert_allclose(power.numpy(), (sums / counts.clip(1))[: n // 2 + 1], rtol=1e-9)


def test_spectrum_of_known_signals():
    noise = 3 * torch.randn(500, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    assert_close(spectrum(noise)[1], torch.full((9,), 9.0, dtype=torch.float64), rtol=0.1, atol=0)
    columns = torch.arange(16.0).expand(1, 1, 16, 16)
    power = spectrum(5 + torch.cos(2 * math.pi * 3 * columns / 16))[1]
    assert power.argsort(descending=True)[:2].tolist() == [0, 3] and power[0] == pytest.approx(25 * 256)
    assert power[[1, 2, 4, 5, 6, 7, 8]].abs().max() < 1e-6


def test_pca_maps_against_numpys_svd():
    z = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z * torch.tensor([1.0, 5, 2, 0.1, 3, 0.5])[:, None, None] + 4
    rows = z.permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    rows = rows - rows.mean(0)
    axes = np.linalg.svd(rows, full_matrices=False)[2][:3]
    axes *= np.sign(axes[range(3), np.abs(axes).argmax(1)])[:, None]
    maps = rows @ axes.T
    expected = np.round(255 * (maps - maps.min(0)) / (maps.max(0) - maps.min(0)))
    found = pca_maps(z)
    assert found.dtype == torch.uint8 and found.shape == (4, 3, 5, 7)
    off = np.abs(found.permute(0, 2, 3, 1).reshape(-1, 3).numpy().astype(float) - expected)
    assert off.max() <= 1 and (off > 0).mean() < 0.01  # ties of rounding
    red = found[:, 0].double().flatten()
    assert np.corrcoef(red, z[:, 1].flatten())[0, 1] > 0.9  # the channel that varies most, not turned round


@pytest.mark.parametrize("channels", [1, 2])
def test_pca_maps_of_few_channels_and_of_constants(channels):
    z = torch.arange(channels * 16.0).reshape(1, channels, 4, 4)
    maps = pca_maps(z)
    assert maps[0, 0].flatten().tolist() == [17 * i for i in range(16)]
    assert (maps[0, channels:] == 0).all()
    assert (pca_maps(torch.ones(2, 4, 3, 3)) == 0).all()


def test_the_report_has_everything(probed):
    z = probed[0].z
    report = latent_report(z)
    assert latent_structure(z).items() <= report.items()
    assert report["effective_dimensions"] == effective_dimensions(z)
    assert report["power"] == spectrum(z)[1].tolist() and report["frequencies"][-1] == 0.5


@pytest.mark.parametrize("measure", [spectrum, pca_maps, latent_report])
def test_latents_that_cannot_be_measured_are_refused(measure):
    with pytest.raises(ValueError, match="not finite: the VAE has diverged"):
        measure(torch.full((2, 4, 8, 8), float("nan")))
    for shape in ((4, 8, 8), (2, 4, 1, 8)):
        with pytest.raises(ValueError, match=r"give \(B, C, h, w\)"):
            measure(torch.zeros(shape))
