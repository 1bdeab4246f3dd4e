"""Paths, velocity, score and time, each against a computation of another kind."""

import math

import pytest
import torch
from torch.testing import assert_close

from repae_lite.method.interpolant import (
    INTERPOLANTS,
    get_interpolant,
    interpolate,
    sample_time,
    score_from_velocity,
)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_ends_are_data_and_noise(path):
    z, eps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert_close(interpolate(z, eps, torch.zeros(2), path)[0], z)
    assert_close(interpolate(z, eps, torch.ones(2), path)[0], eps)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_velocity_is_the_time_derivative(path):
    z, eps = torch.randn(2, 5, dtype=torch.float64)
    z, eps = z.expand(3, 5), eps.expand(3, 5)
    t, h = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), 1e-6
    numeric = (interpolate(z, eps, t + h, path)[0] - interpolate(z, eps, t - h, path)[0]) / (2 * h)
    assert_close(interpolate(z, eps, t, path)[1], numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_score_is_minus_noise_over_sigma(path):
    z, eps = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.05, 0.5, 0.999], dtype=torch.float64)
    z_t, v = interpolate(z, eps, t, path)
    expected = -eps / INTERPOLANTS[path].sigma(t)[:, None, None]
    assert_close(score_from_velocity(v, z_t, t, path), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", INTERPOLANTS)
def test_lognormal_time_has_a_standard_normal_log_ratio(path):
    t = sample_time(
        20000, weighting="lognormal", path=path, generator=torch.Generator().manual_seed(0)
    ).double()
    log_ratio = (INTERPOLANTS[path].sigma(t) / INTERPOLANTS[path].alpha(t)).log()
    # 20,000 draws: the mean's standard error is 0.007, the deviation's 0.005.
    assert abs(float(log_ratio.mean())) < 0.03
    assert abs(float(log_ratio.std()) - 1) < 0.03


def test_uniform_time():
    t = sample_time(20000, generator=torch.Generator().manual_seed(0))
    assert 0 <= float(t.min()) and float(t.max()) < 1
    assert abs(float(t.mean()) - 0.5) < 4 / math.sqrt(12 * 20000)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown path 'vp': choose one of linear, cosine"):
        get_interpolant("vp")
    with pytest.raises(ValueError, match="unknown time weighting 'edm'"):
        sample_time(3, weighting="edm")


Z = torch.zeros(2, 4, 3, 3)
REFUSED = {
    "t = 7": (lambda: interpolate(Z, Z, torch.tensor([0.5, 7.0])), "times reach from 0.5 to 7"),
    "t = -1": (lambda: interpolate(Z, Z, torch.tensor([0.5, -1.0])), "times reach from -1 to 0.5"),
    "one time": (lambda: interpolate(Z, Z, torch.zeros(1)), r"shape \(1,\) and dtype .* for 2 latents"),
    "one-channel noise": (lambda: interpolate(Z, Z[:, :1], torch.zeros(2)), r"noise of shape \(2, 1, 3, 3\)"),
    "whole latents": (lambda: interpolate(Z.long(), Z.long(), torch.zeros(2)), "give float latents"),
    "score at data": (lambda: score_from_velocity(Z, Z, torch.zeros(2)), "times above 0, where there is"),
    "velocity": (lambda: score_from_velocity(Z[:, :1], Z, torch.ones(2)), r"velocities \(2, 1, 3, 3\) at"),
    "no batch": (lambda: sample_time(0), "a batch of 0 has no times"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_broadcast_or_makes_no_sense_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
