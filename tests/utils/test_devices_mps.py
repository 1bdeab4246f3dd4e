"""On a device without float64 and with memory of its own (a stand-in for MPS), everything runs."""

from functools import partial

import accelerate
import h5py
import pytest
import torch
from pretended_mps import MPS, pretended_mps
from small_runs import config_in
from torch.testing import assert_close

from repae_lite.checkpoints.models import load_vae
from repae_lite.data.datasets import ImageH5Dataset
from repae_lite.data.latents import cache_latents
from repae_lite.evaluation import metrics
from repae_lite.method.sampling import Guidance, sample_ode, sample_sde
from repae_lite.networks.sit import SiT
from repae_lite.training import build, trainer
from repae_lite.utils.devices import choose_device
from repae_lite.utils.files import data_small_dir


@pytest.fixture
def mps(monkeypatch):
    def refuse(*_):
        raise TypeError("float64 is asked for without looking whether the device has it")

    monkeypatch.setattr(torch.Tensor, "double", refuse)
    with pretended_mps(monkeypatch) as storages:
        yield storages


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_stand_in_refuses_what_mps_refuses(mps):
    x = torch.ones(2, device="mps")
    assert x.device == (x + 1).device == x.view(1, 2).device == MPS and x.cpu().device.type == "cpu"
    for refused in (
        lambda: x.to(torch.float64),
        lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
        lambda: x + torch.ones(2),
        lambda: x.numpy(),
        lambda: torch.randn(2, device="mps", generator=torch.Generator()),
    ):
        with pytest.raises((TypeError, RuntimeError)):
            refused()


def test_mps_is_taken_where_there_is_no_cuda(mps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == "mps"


def test_samplers_keep_float32_there(mps):
    torch.manual_seed(0)
    sit, eps, labels = SiT.from_preset("tiny").eval(), noise(2, 4, 8, 8), torch.tensor([1, 2])
    for p in sit.parameters():
        p.data += 0.02 * torch.randn(p.shape)  # a fresh SiT's velocity is 0
    steps, guidance = noise(2, 2, 4, 8, 8), Guidance(2.0)

    def all_ways(device):
        there, x, y = sit.to(device), eps.to(device), labels.to(device)
        g = torch.Generator(device).manual_seed(0)
        return [
            sample_ode(there, x, y, steps=2, solver="heun", guidance=guidance),
            sample_sde(there, x, y, steps=3, noise=steps, guidance=guidance),
            sample_sde(there, x, y, steps=3, noise=steps.to(device)),
            sample_sde(there, x, y, steps=3, generator=torch.Generator().manual_seed(1)),
            sample_sde(there, x, y, steps=3, generator=g),
        ]

    for wide, narrow in zip(all_ways("cpu")[:4], all_ways("mps")[:4], strict=True):
        assert wide.dtype == torch.float64 and narrow.dtype == torch.float32 and narrow.device == MPS
        assert_close(narrow.cpu(), wide.float(), atol=1e-4, rtol=1e-4)
    assert sample_sde(sit, eps.to("mps"), labels.to("mps"), steps=3).isfinite().all()


def test_metrics_are_computed_in_float64_on_the_cpu(mps):
    a, b, labels = noise(40, 5), noise(40, 5) + noise(1, 5), torch.arange(40) % 3
    z = noise(8, 4, 8, 8)

    def all_of(device):
        x, y, c = a.to(device), b.to(device), labels.to(device)
        return [
            metrics.frechet_distance(metrics.feature_stats(x), metrics.feature_stats(y)),
            metrics.cknna(x, y),
            metrics.linear_probe(x, c, y, c),
            metrics.effective_dimensions(z.to(device)),
            *metrics.latent_structure(z.to(device))["channel_std"],
        ]

    assert all_of("mps") == all_of("cpu")


def test_training_samples_and_goes_on(mps, monkeypatch, tmp_path):
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: MPS))
    monkeypatch.setattr(trainer, "SAMPLE_STEPS", 1)
    for steps, more in ((1, {}), (2, {"resume": "latest"})):
        config = config_in(tmp_path, max_train_steps=steps, sampling_steps=1, sample_images=2, **more)
        trainer.train(config)
    assert (config.folder / "samples" / "0000002.png").is_file()


def test_a_lone_vae_trains_and_has_its_statistics_taken(mps, monkeypatch, tmp_path):
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: MPS))
    few = partial(build.latent_stats, images=8)
    monkeypatch.setattr(trainer, "latent_stats", few)
    config = config_in(tmp_path, command="vae", max_train_steps=1, sampling_steps=1, sample_images=2)
    trainer.train(config)
    assert (config.folder / "samples" / "0000001.png").is_file()


def test_latents_are_those_of_the_cpu(mps, tmp_path):
    images = ImageH5Dataset(data_small_dir() / "eval" / "images.h5")
    images.names, images.labels = images.names[:6], images.labels[:6]
    found = {}
    for device in ("cpu", "mps"):
        stats = cache_latents(
            load_vae("tiny"), images, tmp_path / f"{device}.h5", batch_size=4, device=device, step=4
        )
        with h5py.File(tmp_path / f"{device}.h5") as file:
            found[device] = stats, bytes(file["00000/img-mean-std-00000005.npy"][()])
    assert found["cpu"][1] == found["mps"][1]
    assert_close(found["cpu"][0].std, found["mps"][0].std)
