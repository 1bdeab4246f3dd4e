"""Reconstructions: every number against an independent one, the same in batches of any size, or refused."""

import hashlib
import json
import logging

import lpips
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.utils.data import TensorDataset

from repae_lite.checkpoints.models import load_vae
from repae_lite.data.datasets import load_embedded
from repae_lite.evaluation.features import load_judge
from repae_lite.evaluation.reconstruction import (
    PERCEPTUAL,
    Reconstructing,
    image_chunks,
    load_perceptual,
    open_originals,
    picture,
    reconstruct,
    result_of,
)
from repae_lite.evaluation.results import protocol_line
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.pixels import to_uint8, to_unit_range
from repae_lite.utils.seeding import generator

TINY = Reconstructing(judge="tiny")


@pytest.fixture(scope="module")
def images():
    return load_embedded("eval")[0][:48]


@pytest.fixture(scope="module")
def networks():
    return load_vae("tiny"), load_judge("tiny"), load_perceptual("tiny")


class Images(TensorDataset):
    """Images of any sizes as a dataset with the label 0."""

    def __init__(self, images):
        self.images = list(images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], 0


def measured(networks, images, settings=TINY, **options):
    vae, judge, perceptual = networks
    return reconstruct(vae, Images(images), judge, perceptual, settings, **options)


@torch.no_grad()
def rebuilt(vae, images, rounding="round"):
    """Reconstructions in chunks of 16, written out."""
    chunks = [to_uint8(vae.decode(vae.encode(to_unit_range(x)).mean), rounding) for x in images.split(16)]
    return torch.cat(chunks)


def frechet(a, b):
    """Fréchet distance by the eigenvalues of the product, which is not symmetric."""
    a, b = (features.double().numpy() for features in (a, b))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.maximum(scipy.linalg.eigvals(cov_a @ cov_b).real, 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("rounding", ["round", "truncate"])
def test_every_number_against_another_program(networks, images, rounding):
    vae, judge, perceptual = networks
    found = measured(networks, images, Reconstructing(judge="tiny", to_uint8=rounding))
    y = rebuilt(vae, images, rounding)
    pairs = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(images, y, strict=True)]
    ssim = {"channel_axis": 2, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
    ssim["use_sample_covariance"] = False
    expected = {
        "reconstruction_frechet": frechet(judge(images)["pooled"], judge(y)["pooled"]),
        "psnr": np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs]),
        "ssim": np.mean([structural_similarity(a, b, **ssim) for a, b in pairs]),
        "tiny_perceptual": float(perceptual(to_unit_range(images), to_unit_range(y)).double().mean()),
    }
    assert found.metrics == pytest.approx(expected, rel=1e-6) and list(found.metrics) == list(expected)
    assert found.content == hashlib.sha256(images.permute(0, 2, 3, 1).numpy().tobytes()).hexdigest()
    assert torch.equal(found.pairs, torch.stack([images[:8], y[:8]])) and found.unchanged == 0


def test_lpips_is_that_of_its_package_on_8_bit_images(images):
    distance = load_perceptual("inception-random")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    theirs.net.load_state_dict(distance.net.net.state_dict())  # the trunk is random, the rest the package's
    x, y = to_unit_range(images[:2]), to_unit_range(images[2:4])
    with torch.no_grad():
        ours, expected = distance(x, y), theirs(x, y).flatten()
    assert torch.equal(ours, expected) and (ours > 0).all()
    again = load_perceptual("inception-random")
    assert all(torch.equal(a, b) for a, b in zip(distance.parameters(), again.parameters(), strict=True))


class Narrow(torch.nn.Module):
    """A judge's first features only, since eigenvalues of 2,048 take seconds; it keeps what it was asked."""

    name, side = "narrow", None

    def __init__(self, judge):
        super().__init__()
        self.judge, self.asked = judge, []

    def forward(self, images):
        self.asked.append((images, {kind: values[:, :12] for kind, values in self.judge(images).items()}))
        return self.asked[-1][1]


def test_the_full_scales_judge_has_spatial_features_and_lpips(networks, images):
    """The code of Inception and LPIPS, with random weights in them."""
    judge, perceptual = Narrow(load_judge("inception-random")), load_perceptual("inception-random")
    found = measured((networks[0], judge, perceptual), images[:18], Reconstructing(judge="inception-random"))
    assert list(found.metrics) == [
        "reconstruction_frechet", "reconstruction_spatial_frechet", "psnr", "ssim", "lpips_random",
    ]  # fmt: skip
    x, y = (judge.asked[at::2] for at in (0, 1))
    assert torch.equal(torch.cat([pixels for pixels, _ in x]), images[:18])
    assert torch.equal(torch.cat([pixels for pixels, _ in y]), rebuilt(networks[0], images[:18]))
    for kind, name in (("pooled", "frechet"), ("spatial", "spatial_frechet")):
        expected = frechet(*(torch.cat([features[kind] for _, features in side]) for side in (x, y)))
        assert found.metrics[f"reconstruction_{name}"] == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- nothing depends on how images are read


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 7}, {"batch": 48}, {"batch": 40, "workers": 2}])
def test_no_number_depends_on_the_batch_size(networks, images, options):
    found, other = measured(networks, images, batch=64), measured(networks, images, **options)
    assert found.metrics == other.metrics and found.content == other.content
    assert torch.equal(found.latents, other.latents)


@pytest.mark.parametrize("batch", [1, 3, 16, 17, 100])
def test_chunks_hold_all_images_in_order(batch):
    numbers = torch.arange(50, dtype=torch.uint8)
    chunks = list(image_chunks(Images(numbers[:, None, None, None].expand(50, 3, 2, 2)), batch=batch))
    assert [len(images) for images, _ in chunks] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([images for images, _ in chunks])[:, 0, 0, 0], numbers)
    assert sum(len(labels) for _, labels in chunks) == 50


def test_the_first_images_are_measured(networks, images):
    found = measured(networks, images, limit=40)
    assert found.count == 40 and found.metrics == measured(networks, images[:40]).metrics
    assert found.content == measured(networks, images[:40]).content


def test_draws_follow_from_seed_and_image(networks, images):
    vae, few = networks[0], images[:20]
    found = measured(networks, few, Reconstructing(judge="tiny", posterior="sample", seed=3))
    assert torch.equal(
        found.latents,
        measured(networks, few, Reconstructing(judge="tiny", posterior="sample", seed=3)).latents,
    )
    with torch.no_grad():
        posterior = vae.encode(to_unit_range(few[16:]))
    eps = torch.randn(4, 8, 8, generator=generator("posterior", 3, 18))
    assert torch.equal(found.latents[18], posterior.mean[2] + posterior.std[2] * eps)
    mode = measured(networks, few)
    assert torch.equal(mode.latents[16:], posterior.mean)
    other = measured(networks, few, Reconstructing(judge="tiny", posterior="sample", seed=4))
    assert len({one.metrics["psnr"] for one in (found, mode, other)}) == 3


class Rounding(torch.nn.Module):
    """A VAE that loses nothing."""

    config = load_vae("tiny").config

    def encode(self, x):
        self.x = x
        return load_vae("tiny").encode(x)

    def decode(self, z):
        return self.x.clone()


def test_images_that_come_back_to_the_bit(networks, images, caplog):
    """Their PSNR is infinite, and a mean with one of them in it would be infinite too."""
    _, judge, perceptual = networks
    perfect = measured((Rounding(), judge, perceptual), images[:20])
    assert perfect.metrics["psnr"] == float("inf") and perfect.unchanged == 20
    assert perfect.metrics["ssim"] == pytest.approx(1) and perfect.metrics["tiny_perceptual"] == 0
    assert perfect.metrics["reconstruction_frechet"] == pytest.approx(0, abs=1e-6)

    class Half(Rounding):
        def decode(self, z):
            return torch.cat([self.x[:1], 0.5 * self.x[1:]])

    with caplog.at_level(logging.WARNING):
        half = measured((Half(), judge, perceptual), images[:10])
    assert half.unchanged == 1 and "1 images came back to the bit" in caplog.text
    y = to_uint8(0.5 * to_unit_range(images[1:10]))
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(images[1:10], y, strict=True)]
    assert half.metrics["psnr"] == pytest.approx(np.mean(expected))


# ---------------------------------------------------------------- results


def test_results_carry_their_protocol(networks, images):
    vae, judge, perceptual = networks
    given = {"source": "tiny", "judge": judge, "perceptual": perceptual}
    found = measured(networks, images[:20])
    result = result_of(found, TINY, vae=vae, **given)
    assert json.loads(json.dumps(result)) == result
    assert found.metrics.items() <= result["metrics"].items()
    assert result["metrics"].keys() - found.metrics.keys() == {"spatial_variance", "total_variation"}
    protocol = result["protocol"]
    assert protocol["count"] == 20 and protocol["seed"] is None and protocol["chunk"] == 16
    assert protocol["perceptual"] == PERCEPTUAL["tiny"][1] and found.content.startswith(protocol["reference"])
    assert protocol["hash"] in protocol_line(protocol) and "mode, round" in protocol_line(protocol)

    tuned = load_vae("tiny-e2e")
    other = result_of(measured((tuned, judge, perceptual), images[:20]), TINY, vae=tuned, **given)
    assert other["protocol"] == protocol  # the VAE is what is compared
    assert other["vae"]["weights"] != result["vae"]["weights"] and other["metrics"] != result["metrics"]
    for changed in ({"to_uint8": "truncate"}, {"posterior": "sample"}, {"posterior": "sample", "seed": 1}):
        settings = Reconstructing(judge="tiny", **changed)
        assert result_of(found, settings, vae=vae, **given)["protocol"]["hash"] != protocol["hash"]
    assert result_of(found, Reconstructing(judge="tiny", seed=9), vae=vae, **given)["protocol"] == protocol
    fewer = measured(networks, images[1:21])  # other images
    assert result_of(fewer, TINY, vae=vae, **given)["protocol"]["hash"] != protocol["hash"]


def test_the_picture_has_originals_above_reconstructions(images):
    pairs, maps = torch.stack([images[:3], images[3:6]]), torch.arange(12, dtype=torch.uint8)
    drawn = picture(pairs, maps.view(3, 1, 2, 2).expand(3, 3, 2, 2))
    assert drawn.shape == (3, 96, 96)
    assert torch.equal(drawn[:, :32, 32:64], images[1]) and torch.equal(drawn[:, 32:64, 64:], images[5])
    assert drawn[0, 64, 0] == 0 and drawn[0, 95, 95] == 11


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("limit", [None, 1, 0, -3, 3])
def test_too_few_or_too_many_images_are_refused(networks, images, limit):
    with pytest.raises(ValueError, match="statistics need at least 2"):
        measured(networks, images[: 1 if limit is None else 2], limit=limit)


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_images_of_several_sizes_are_refused(networks, images, batch):
    mixed = [*images[:20], images[20][:, :30, :30]]
    with pytest.raises(ValueError, match="several sizes, 32 × 32 and 30 × 30"):
        measured(networks, mixed, batch=batch)
    with pytest.raises(ValueError, match="several sizes"):
        measured(networks, mixed, batch=batch, workers=1)


def test_images_that_do_not_fit_are_refused(networks, images):
    with pytest.raises(ValueError, match="32 × 24: they must be square"):
        measured(networks, images[:4, :, :, :24])
    with pytest.raises(ValueError, match="the images have 16 pixels, but tiny-evaluator judges 32"):
        measured(networks, images[:4, :, :16, :16])
    vae, _, perceptual = networks
    with pytest.raises(ValueError, match="31x31 is not a multiple of 4"):
        reconstruct(vae, Images(images[:4, :, :31, :31]), load_judge_of_any_size(), perceptual, TINY)
    with pytest.raises(ValueError, match="0 images a batch"):
        measured(networks, images[:4], batch=0)


def load_judge_of_any_size():
    judge = load_judge("tiny")
    judge.side = None
    return judge


@pytest.mark.parametrize("part", ["encoder.conv_out", "decoder.conv_out"])
def test_numbers_that_are_not_finite_are_refused(networks, images, part):
    vae = load_vae("tiny")
    torch.nn.init.constant_(vae.get_submodule(part).bias, float("nan"))
    with pytest.raises(ValueError, match="of the images 0 to 15 are not finite"):
        measured((vae, *networks[1:]), images[:20])


def test_settings_that_mean_nothing_are_refused():
    for wrong in ({"judge": "dino"}, {"posterior": "mean"}, {"to_uint8": "floor"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is '.*': choose "):
            Reconstructing(**wrong)


def test_statistics_of_a_training_set_are_no_originals(tmp_path):
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2))
    with pytest.raises(ValueError, match="not with statistics of a training set"):
        open_originals(path)


def test_originals_are_folders_or_hdf5(tmp_path, images):
    for i in range(3):
        (tmp_path / f"{i}").mkdir()
        Image.new("RGB", (40, 36), (i, i, i)).save(tmp_path / f"{i}" / "image.png")
    dataset = open_originals(tmp_path, 32)
    assert [dataset[i][0][0, 0, 0].item() for i in range(3)] == [0, 1, 2]
    assert dataset[0][0].shape == (3, 32, 32)
    with pytest.raises(ValueError, match="give the resolution"):
        open_originals(tmp_path)
    assert torch.equal(open_originals(data_small_dir() / "eval")[1][0], images[1])
    with pytest.raises(ValueError, match="have 32 × 32 pixels and not 16 × 16"):
        open_originals(data_small_dir() / "eval", 16)


def test_without_a_network_lpips_says_where_its_trunk_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.raises(ConnectionError, match=r"no route to host.*vgg16-397923af.pth into .*checkpoints"):
        load_perceptual("inception")
