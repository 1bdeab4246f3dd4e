"""What reproduce/benchmarks/tuned_latents.py measures of latents, on made-up ones."""

import pytest
import torch


@pytest.fixture
def tuned_latents(benchmark_script):
    return benchmark_script("tuned_latents")


def test_vaes_are_found_under_the_names_that_arms_gave_them(tuned_latents, tmp_path):
    from arms import path_of

    runs = [("vae-only", 400, 3), ("align-5", 1000, 0), ("align-5, label only", 1000, 0)]
    for arm, steps, seed in runs:
        for ending in ("vae.safetensors", "sit.safetensors", "json"):
            (tmp_path / path_of(arm, steps, seed, ending).name).touch()
    found = tuned_latents.kept_vaes(tmp_path)
    assert list(found) == [(steps, arm, seed) for arm, steps, seed in runs]
    assert all(path.name.endswith(".vae.safetensors") for path in found.values())


def test_what_is_a_linear_map_can_be_read_and_what_is_noise_cannot(tuned_latents):
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(2000, 8, generator=g), torch.randn(8, 3, generator=g)
    assert tuned_latents.readable(h, h @ weight + 5, 1.0) > 0.99
    assert abs(tuned_latents.readable(h, torch.randn(2000, 3, generator=g), 1.0)) < 0.05


def test_patches_are_the_tokens_of_sit(tuned_latents):
    z = torch.arange(4 * 64.0).view(1, 4, 8, 8)
    second = tuned_latents.patches(z)[0, 1]  # to the right of the first: rows 0 and 1, columns 2 and 3
    assert sorted(second.tolist()) == sorted(z[0, :, 0:2, 2:4].flatten().tolist())


def test_the_first_control_is_compared_with_the_start_and_the_others_with_it(tuned_latents, capsys):
    runs = [
        {"arm": arm, "steps": 400, "seed": seed, "class": value + seed / 1000}
        for arm, value in (("vae-only", 0.5), ("repa-e", 0.7))
        for seed in range(3)
    ]
    tuned_latents.report([*runs, {"arm": "repa-e", "steps": 400, "seed": 9, "class": 0.0}], {"class": 0.4})
    said = capsys.readouterr().out
    assert "vae-only - tiny, 400 steps, 3 seeds" in said and "+0.101" in said
    assert "repa-e - vae-only, 400 steps, 3 seeds" in said and "+0.2 [" in said  # seed 9 has no control
