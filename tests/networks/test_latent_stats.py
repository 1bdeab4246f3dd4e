"""Latent statistics: to the bit through files and SiT, those of draws, and refusals."""

import pytest
import torch

from repae_lite.data.latents import official_stats
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT


def random_stats(channels=1000):
    torch.manual_seed(0)
    return LatentStats(torch.randn(channels), torch.rand(channels) * 8 + 0.01)


def test_files_and_sit_give_them_back_to_the_bit():
    stats = random_stats()
    official = official_stats(stats)
    assert official["latents_scale"].shape == (1, 1000, 1, 1)
    assert official["latents_bias"].dtype == torch.float32
    sit = SiT.from_preset("tiny", in_channels=1000, depth=2)
    sit.set_latent_stats(stats)
    for back in (
        LatentStats(stats.mean, stats.std),
        LatentStats(official["latents_bias"], 1 / official["latents_scale"]),
        sit.latent_stats(),
    ):
        assert torch.equal(back.mean, stats.mean) and torch.equal(back.std, stats.std)


def test_they_are_a_copy():
    sit = SiT.from_preset("tiny", depth=2)
    stats = sit.latent_stats()
    sit.bn.running_mean.fill_(5.0)
    assert stats.mean.tolist() == [0.0] * 4


def test_normalised_latents_come_back():
    stats, z = random_stats(4), torch.randn(3, 4, 2, 2)
    x = stats.denormalize(z)
    torch.testing.assert_close(x.mean((0, 2, 3)), z.mean((0, 2, 3)) * stats.std + stats.mean)
    torch.testing.assert_close(stats.normalize(x), z)


def test_statistics_of_posteriors_are_those_of_their_draws():
    torch.manual_seed(0)
    mean, std = torch.randn(50, 4, 3, 3) * 2 + 1, torch.rand(50, 4, 3, 3)
    stats = LatentStats.from_posteriors(mean, std)
    draws = mean + std * torch.randn(1000, *mean.shape)
    torch.testing.assert_close(stats.mean, draws.mean((0, 1, 3, 4)), rtol=0, atol=0.01)
    torch.testing.assert_close(stats.std, draws.std((0, 1, 3, 4)), rtol=0.01, atol=0)


def test_refusals():
    for mean, std in ((torch.zeros(3), torch.ones(4)), (torch.zeros(0), torch.ones(0))):
        with pytest.raises(ValueError, match="standard deviations: give one of each per channel"):
            LatentStats(mean, std)
    for mean, std in ((0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf")), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="are not finite means and positive, finite standard deviations"):
            LatentStats(torch.tensor([0.0, mean]), torch.tensor([1.0, std])).check()
        with pytest.raises(ValueError, match="are not finite means and positive, finite standard deviations"):
            LatentStats(torch.tensor([0.0, mean]), torch.tensor([1.0, std])).normalize(torch.zeros(2, 1, 1))
    stats = LatentStats(torch.zeros(4), torch.ones(4))
    for apply in (stats.normalize, stats.denormalize):  # one channel would become four
        for z in (torch.zeros(2, 1, 8, 8), torch.zeros(8)):
            with pytest.raises(ValueError, match="and the latent statistics 4 channels"):
                apply(z)
