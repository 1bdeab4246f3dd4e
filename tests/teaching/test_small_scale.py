"""The embedded networks do what their logs say, and the plumbing of the notebooks holds."""

import json

import pytest
import torch

from repae_lite.checkpoints.models import load_latent_stats, load_vae
from repae_lite.evaluation.metrics import psnr
from repae_lite.method.steps import repae_step
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.teaching.small_scale import METHODS, SmallScale, learning_rate, progress
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.pixels import to_unit_range


@pytest.fixture(scope="module")
def small():
    return SmallScale.load()


def log(name):
    return json.loads((data_small_dir() / "logs" / f"{name}.json").read_text())


def test_evaluator_knows_the_evaluation_images(small):
    with torch.no_grad():
        guesses = small.evaluator(to_unit_range(small.eval_images)).argmax(1)
    accuracy = float((guesses == small.eval_labels).float().mean())
    logged = log("evaluator")["curve"][-1][
        "class_accuracy"
    ]  # on other images: 1,000 draws, standard error below 0.01
    assert accuracy > 0.95 and accuracy == pytest.approx(logged, abs=0.03)


def test_vae_reconstructs_as_well_as_its_log_says(small):
    vae = small.new_state("repa", sit_lr=1e-3, vae_lr=1e-3).vae
    measured = float(psnr(to_unit_range(small.reconstruct(vae)), to_unit_range(small.eval_images)).mean())
    assert measured == pytest.approx(log("vae")["curve"][-1]["psnr"], abs=0.5)


def test_latent_statistics_of_the_shipped_vae_normalise_its_latents(small):
    state = small.new_state("repa", sit_lr=1e-3, vae_lr=1e-3)
    normalised = state.sit.eval().normalize(small.eval_latents(state.vae))
    assert normalised.mean((0, 2, 3)).abs().max() < 0.1
    assert (normalised.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_teacher_and_judges_are_frozen_and_independent(small):
    for network in (small.encoder, small.evaluator, small.perceptual):
        assert not any(p.requires_grad for p in network.parameters())
    assert len({log(name)["seed"] for name in ("teacher", "perceptual", "evaluator", "vae")}) == 4
    assert small.tokens.shape == (6000, 16, 128) and not small.tokens.requires_grad


def test_routing_a_whole_step_leaves_teacher_judge_and_perceptual_network_alone(small):
    before = {
        name: [p.clone() for p in getattr(small, name).parameters()]
        for name in ("encoder", "evaluator", "perceptual")
    }
    state = small.new_state("repa-e", sit_lr=1e-3, vae_lr=1e-3)
    index = torch.arange(4)
    tokens = small.encoder(small.images[index])
    repae_step(state, to_unit_range(small.images[index]), small.labels[index], tokens)
    for name, kept in before.items():
        for p, old in zip(getattr(small, name).parameters(), kept, strict=True):
            assert p.grad is None and torch.equal(p, old), name


def test_tokens_are_those_of_the_encoder(small):
    index = torch.tensor([5, 4000])
    torch.testing.assert_close(small.encoder(small.images[index]), small.tokens[index], rtol=1e-4, atol=1e-4)


def test_batches_cover_every_epoch_and_repeat_by_seed(small):
    seen = torch.cat(list(small.batches(188, 32, seed=3)))
    assert seen[:6000].sort().values.equal(torch.arange(6000))
    assert torch.equal(seen, torch.cat(list(small.batches(188, 32, seed=3))))
    assert not torch.equal(seen, torch.cat(list(small.batches(188, 32, seed=4))))


@pytest.mark.parametrize("method", METHODS)
def test_fresh_states_of_one_seed_are_alike(small, method):
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(small.new_state(method, sit_lr=1e-3, vae_lr=1e-4))
    for a, b in zip(states[0].sit.parameters(), states[1].sit.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ("vae" in states[0].optimizers) == (method not in ("sit", "repa"))


def test_generation_repeats_and_scores_are_sane(small):
    torch.manual_seed(0)
    state = small.new_state("repa", sit_lr=1e-3, vae_lr=1e-3)
    first, labels = small.generate(state.ema, state.vae, 20, steps=2, seed=1)
    again, _ = small.generate(state.ema, state.vae, 20, steps=2, seed=1)
    assert torch.equal(first, again) and first.dtype == torch.uint8 and labels.tolist() == [*range(10)] * 2
    rebuilt = small.reconstruct(state.vae)
    perfect = small.score(small.eval_images, small.eval_labels, rebuilt)
    assert perfect["frechet"] == pytest.approx(0, abs=1e-3) and perfect["class_accuracy"] > 0.95
    assert perfect["frechet_to_reconstructions"] == pytest.approx(
        perfect["reconstruction_frechet"], rel=1e-3, abs=1e-3
    )
    untrained = small.score(first, labels, rebuilt)
    assert untrained["frechet"] > perfect["reconstruction_frechet"]


@pytest.mark.parametrize("method", ["sit", "repa", "repa-e"])
def test_training_repeats_and_trains_what_it_should(small, method):
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        state = small.new_state(method)
        before = {name: [p.clone() for p in getattr(state, name).parameters()] for name in ("vae", "sit")}
        losses = small.train(state, 3, batch=8, seed=5, targets=None if method == "sit" else small.tokens)
        runs.append((state, losses))
    assert runs[0][1] == runs[1][1] and len(losses) == 3
    for a, b in zip(runs[0][0].sit.parameters(), runs[1][0].sit.parameters(), strict=True):
        assert torch.equal(a, b)
    moved = {
        name: any(not torch.equal(p, q) for p, q in zip(getattr(state, name).parameters(), kept, strict=True))
        for name, kept in before.items()
    }
    assert moved == {"vae": method == "repa-e", "sit": True}
    assert ("sit_align" in losses[0]) == (method != "sit")


def test_plain_sit_and_repa_of_one_seed_start_alike_and_see_the_same_draws(small):
    first = {}
    for method, targets in (("sit", None), ("repa", small.tokens)):
        torch.manual_seed(7)
        first[method] = small.train(small.new_state(method), 1, batch=8, seed=5, targets=targets)[0][
            "denoising"
        ]
    assert first["sit"] == first["repa"]


def test_learning_rate_rises_stays_and_falls_to_zero():
    rates = [learning_rate(step, 400) for step in range(401)]
    assert rates[0] == 1 / 50 and rates[49] == rates[200] == 1 and rates[300] == 0.5 and rates[400] == 0


def test_statistics_of_cached_latents_are_those_of_the_shipped_vae(small):
    stats = LatentStats.from_posteriors(*small.latents(load_vae("tiny")))
    shipped = load_latent_stats("tiny")  # measured on one draw of the posterior's noise
    torch.testing.assert_close(stats.std, shipped.std, rtol=1e-3, atol=0)
    torch.testing.assert_close(stats.mean, shipped.mean, rtol=0, atol=2e-3)


def test_unknown_method_is_refused(small):
    with pytest.raises(
        ValueError, match="unknown method 'dit': choose one of sit, repa, vae-only, repa-e, naive"
    ):
        small.new_state("dit", sit_lr=1e-3, vae_lr=1e-3)


def test_progress_passes_items_through(capsys):
    assert list(progress(iter("abc"), 3, "letters")) == ["a", "b", "c"]
