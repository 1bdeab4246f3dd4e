"""Samplers on a velocity field with a known solution; agreement with the official ones is in test_golden."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from repae_lite.method.interpolant import INTERPOLANTS
from repae_lite.method.sampling import Guidance, sample_ode, sample_sde
from repae_lite.networks.sit import SiT


class GaussianVelocity(nn.Module):
    """The exact velocity when the data of class y are N(mean_y, std^2), pixel by pixel: sampling must return
    that.
    """

    def __init__(self, path="linear", std=0.5):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.path, self.std, self.null_class = INTERPOLANTS[path], std, 2
        self.config = SimpleNamespace(label_dropout=0.1)
        self.means = torch.tensor([-1.0, 2.0, 0.0], dtype=torch.float64)
        self.times = []

    def check_labels(self, labels):
        SiT.check_labels(self, labels)

    def forward(self, z_t, t, labels):
        self.times.append((round(float(t[0]), 6), len(t)))
        t = t[:, None, None, None]
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        mean = self.means[labels][:, None, None, None]
        # E[z | z_t] and E[eps | z_t] of jointly Gaussian variables
        variance = alpha**2 * self.std**2 + sigma**2
        residual = (z_t - alpha * mean) / variance
        return (
            self.path.d_alpha(t) * (mean + alpha * self.std**2 * residual)
            + self.path.d_sigma(t) * sigma * residual
        )


def noise(count=4000):
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 2


@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize(("solver", "steps"), [("euler", 200), ("heun", 50)])
def test_ode_reaches_the_data_distribution(path, solver, steps):
    eps, labels = noise()
    sample = sample_ode(GaussianVelocity(path), eps, labels, steps=steps, solver=solver, path=path)
    # The flow of a Gaussian is the affine map eps -> mean + std * eps.
    expected = torch.tensor([-1.0, 2.0])[labels][:, None, None, None] + 0.5 * eps
    assert_close(sample, expected.double(), atol=0.03, rtol=0)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_sde_reaches_the_data_distribution(path):
    eps, labels = noise()
    sample = sample_sde(
        GaussianVelocity(path), eps, labels, steps=250, path=path, generator=torch.Generator().manual_seed(1)
    )
    for label, mean in enumerate((-1.0, 2.0)):
        values = sample[labels == label]  # 8,000 numbers: standard error of the mean 0.006
        assert float(values.mean()) == pytest.approx(mean, abs=0.04)
        assert float(values.std()) == pytest.approx(0.5, abs=0.05)


def test_sde_noise_comes_from_the_generator():
    eps, labels = noise(4)
    runs = [
        sample_sde(GaussianVelocity(), eps, labels, steps=5, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_sde_noise_can_be_passed_in():
    eps, labels = noise(4)
    g = torch.Generator().manual_seed(1)
    drawn = sample_sde(GaussianVelocity(), eps, labels, steps=5, generator=torch.Generator().manual_seed(1))
    passed = torch.stack([torch.randn(eps.shape, dtype=torch.float64, generator=g) for _ in range(4)])
    assert torch.equal(drawn, sample_sde(GaussianVelocity(), eps, labels, steps=5, noise=passed))
    with pytest.raises(ValueError, match=r"5 steps need \(4, 4, 1, 2, 2\)"):
        sample_sde(GaussianVelocity(), eps, labels, steps=5, noise=passed[:1])
    with pytest.raises(ValueError, match="last_time 0 is not between 0 and 1"):
        sample_sde(GaussianVelocity(), eps, labels, steps=5, last_time=0)


def test_guidance_runs_the_doubled_batch_inside_its_interval_only():
    eps, labels = noise(4)
    model = GaussianVelocity()
    sample_ode(model, eps, labels, steps=10, guidance=Guidance(2.0, 0.25, 0.75))
    assert {t for t, batch in model.times if batch == 8} == {0.3, 0.4, 0.5, 0.6, 0.7}
    assert {t for t, batch in model.times if batch == 4} == {1.0, 0.9, 0.8, 0.2, 0.1}


def test_guidance_formula_and_scale_one_is_off():  # its null class is not 1000: D6
    eps, labels = noise(4)
    model = GaussianVelocity()
    plain = sample_ode(model, eps, labels, steps=1)
    null = sample_ode(model, eps, torch.full_like(labels, 2), steps=1)
    guided = sample_ode(model, eps, labels, steps=1, guidance=Guidance(3.0))
    assert_close(guided, null + 3 * (plain - null))
    assert torch.equal(sample_ode(model, eps, labels, steps=1, guidance=Guidance(1.0)), plain)


REFUSED = {
    "solver": (dict(solver="rk4"), "unknown solver 'rk4'"),
    "steps": (dict(steps=0), "0 sampling steps are too few"),
    "path": (dict(path="vp"), "unknown path 'vp'"),
    "labels": (dict(labels=torch.tensor([5])), "label 5 is outside 0 to 1"),
    "labels count": (dict(labels=torch.tensor([0, 1])), "for 1 samples: give one class number per sample"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ode_refuses(case):
    options, message = REFUSED[case]
    arguments = {"labels": torch.tensor([0])} | options
    with pytest.raises(ValueError, match=message):
        sample_ode(GaussianVelocity(), torch.zeros(1, 1, 2, 2), **arguments)


@pytest.mark.parametrize("sampler", [sample_ode, sample_sde])
def test_guidance_needs_a_null_class_that_was_trained(sampler):
    model = GaussianVelocity()
    model.config.label_dropout = 0.0
    eps, labels = noise(2)
    sampler(model, eps, labels, steps=2)
    with pytest.raises(
        ValueError, match=r"guidance scale 2.0 needs the null class, which this SiT never saw"
    ):
        sampler(model, eps, labels, steps=2, guidance=Guidance(2.0))


def test_other_refusals():
    with pytest.raises(ValueError, match="1 sampling steps are too few: use at least 2"):
        sample_sde(GaussianVelocity(), torch.zeros(1, 1, 2, 2), torch.tensor([0]), steps=1)
    with pytest.raises(ValueError, match=r"guidance scale 0.5 is below 1"):
        Guidance(0.5)
    with pytest.raises(ValueError, match=r"guidance scale nan"):
        Guidance(float("nan"))
    with pytest.raises(ValueError, match=r"guidance scale inf is not finite"):
        Guidance(float("inf"))
    with pytest.raises(ValueError, match=r"guidance interval \[0.7, 0.2\]"):
        Guidance(2.0, 0.7, 0.2)
