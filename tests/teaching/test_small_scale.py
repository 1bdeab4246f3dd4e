"""The embedded networks do what their logs say, and the plumbing of the notebooks holds."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from pretended_mps import MPS, pretended_mps

from repae_lite.checkpoints.models import load_latent_stats, load_vae
from repae_lite.evaluation.metrics import psnr
from repae_lite.method.sampling import Guidance, sample_ode
from repae_lite.method.steps import repae_step
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.teaching import small_scale
from repae_lite.teaching.small_scale import METHODS, SmallScale, learning_rate, progress
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.pixels import to_uint8, to_unit_range


@pytest.fixture(scope="module")
def small():
    return SmallScale.load()


def log(name):
    return json.loads((data_small_dir() / "logs" / f"{name}.json").read_text())


def test_evaluator_knows_the_evaluation_images(small):
    with torch.no_grad():
        guesses = small.evaluator(to_unit_range(small.eval_images)).argmax(1)
    accuracy = float((guesses == small.eval_labels).float().mean())
    # logged on other images: 1,000 draws, standard error below 0.01
    logged = log("evaluator")["curve"][-1]["class_accuracy"]
    assert accuracy > 0.95 and accuracy == pytest.approx(logged, abs=0.03)


def test_vae_reconstructs_as_well_as_its_log_says(small):
    vae = small.new_state("repa", sit_lr=1e-3, vae_lr=1e-3).vae
    rebuilt = small.reconstruct(vae)
    measured = float(psnr(to_unit_range(rebuilt), to_unit_range(small.eval_images)).mean())
    assert measured == pytest.approx(log("vae")["curve"][-1]["psnr"], abs=0.5)
    few = dataclasses.replace(small, eval_images=small.eval_images[:250])
    assert torch.equal(few.reconstruct(vae), rebuilt[:250])  # from posterior means, so nothing is drawn
    with torch.no_grad():
        assert torch.equal(few.eval_latents(vae), vae.encode(to_unit_range(few.eval_images)).mean)


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


def test_methods_differ_in_what_trains_the_vae_and_in_the_alignment_of_sit():
    coefficients = {
        name: (config.vae_align_coeff, config.vae_diffusion_coeff, config.proj_coeff)
        for name, config in METHODS.items()
    }
    assert {name: coefficients[name] for name in ("vae-only", "repa-e", "naive")} == {
        "vae-only": (0.0, 0.0, 0.5),
        "repa-e": (1.5, 0.0, 0.5),
        "naive": (0.0, 1.0, 0.5),
    }
    assert coefficients["sit"][2] == 0 and coefficients["repa"][2] == 0.5
    assert {config.ema_decay for config in METHODS.values()} == {0.98}
    loss = small_scale.TINY_VAE_LOSS
    assert (loss.pixel, loss.kl_weight, loss.perceptual_weight, loss.gan_weight) == ("l1", 1e-6, 1.0, 0.0)


def test_a_new_state_has_its_learning_rates_a_vae_frozen_or_not_and_statistics_of_the_given_vae(small):
    few = dataclasses.replace(small, images=small.images[:500])
    vae = load_vae("tiny")
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 3  # the means: no longer the shipped VAE's
    state = few.new_state("repa-e", sit_lr=3e-3, vae_lr=4e-4, vae=vae)
    assert {name: o.param_groups[0]["lr"] for name, o in state.optimizers.items()} == {
        "sit": 3e-3,
        "vae": 4e-4,
    }
    assert state.vae is vae and all(p.requires_grad for p in vae.parameters())
    normalised = state.sit.eval().normalize(few.latents(vae)[0])
    assert (
        normalised.mean((0, 2, 3)).abs().max() < 0.01 and (normalised.std((0, 2, 3)) - 1).abs().max() < 0.01
    )
    assert not any(p.requires_grad for p in few.new_state("repa", vae=vae).vae.parameters())


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
    faithful = small.score(rebuilt, small.eval_labels, rebuilt)
    assert faithful["frechet_to_reconstructions"] == pytest.approx(0, abs=1e-3)
    assert (
        faithful["frechet"] == faithful["reconstruction_frechet"] == perfect["reconstruction_frechet"] > 0.5
    )
    assert faithful["psnr"] == perfect["psnr"] == pytest.approx(log("vae")["curve"][-1]["psnr"], abs=0.5)
    untrained = small.score(first, labels, rebuilt)
    assert untrained["frechet"] > perfect["reconstruction_frechet"]


def test_noise_comes_from_one_generator_and_all_numbers_from_batches_of_250(small):
    torch.manual_seed(0)
    state = small.new_state("repa")
    torch.nn.init.normal_(state.ema.final_layer.linear.weight, std=0.1)
    guidance = Guidance(2.0, 0.2, 0.8)
    images, labels = small.generate(state.ema, state.vae, 260, steps=2, seed=3, guidance=guidance)
    eps, expected = torch.randn(260, 4, 8, 8, generator=torch.Generator().manual_seed(3)), []
    for noise, wanted in zip(eps.split(250), (torch.arange(260) % 10).split(250), strict=True):
        z = sample_ode(state.ema, noise, wanted, steps=2, guidance=guidance)
        with torch.no_grad():
            expected.append(to_uint8(state.vae.decode(state.ema.denormalize(z))))
    assert torch.equal(images, torch.cat(expected)) and labels.tolist() == [i % 10 for i in range(260)]


@pytest.mark.parametrize("method", ["repa", "repa-e"])
def test_every_step_of_training_gets_its_images_its_tokens_and_independent_draws(small, monkeypatch, method):
    calls, state = [], small.new_state(method, sit_lr=1e-3, vae_lr=2e-4)

    def step(state, inputs, labels, tokens, **draws):
        rates = {name: o.param_groups[0]["lr"] for name, o in state.optimizers.items()}
        calls.append(draws | {"inputs": inputs, "labels": labels, "tokens": tokens, "rates": rates})
        return {}

    monkeypatch.setattr(small_scale, "latent_step", step)
    mean, std = 10 + torch.zeros(6000, 4, 8, 8), 2 + torch.zeros(6000, 4, 8, 8)
    monkeypatch.setattr(small, "latents", lambda vae: (mean, std))
    small.train(state, 3, targets=small.tokens, batch=500, seed=5, warmup=2, moving_step=step)
    for number, (call, index) in enumerate(zip(calls, small.batches(3, 500, seed=5), strict=True)):
        assert torch.equal(call["labels"], small.labels[index])
        assert torch.equal(call["tokens"], small.tokens[index])
        share = learning_rate(number, 3, 2)
        assert call["rates"] == {name: share * {"sit": 1e-3, "vae": 2e-4}[name] for name in call["rates"]}
        noise = call["eps_posterior"] if method == "repa-e" else (call["inputs"] - 10) / 2
        for draw in (noise, call["eps"]):
            assert abs(draw.mean()) < 0.02 and abs(draw.std() - 1) < 0.02
        assert abs((noise * call["eps"]).mean()) < 0.02
        assert call["t"].min() < 0.05 and call["t"].max() > 0.95
        assert 0.05 < call["label_drop"].float().mean() < 0.15
        if method == "repa-e":
            assert torch.equal(call["inputs"], to_unit_range(small.images[index]))


@pytest.mark.parametrize("method", ["sit", "repa", "repa-e"])
def test_training_repeats_and_trains_what_it_should(small, method, monkeypatch):
    monkeypatch.setattr(small_scale, "beside_others", iter)  # other threads round otherwise
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
        name: not all(map(torch.equal, getattr(state, name).parameters(), kept))
        for name, kept in before.items()
    }
    assert moved == {"vae": method == "repa-e", "sit": True}
    assert ("sit_align" in losses[0]) == (method != "sit")


def test_plain_sit_and_repa_of_one_seed_start_alike_and_see_the_same_draws(small):
    first = {}
    for method, targets in (("sit", None), ("repa", small.tokens)):
        torch.manual_seed(7)
        (losses,) = small.train(small.new_state(method), 1, batch=8, seed=5, targets=targets)
        first[method] = losses["denoising"]
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


def test_progress_in_a_notebook_ends_as_a_line_of_text(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    handle = SimpleNamespace(update=lambda html: shown.append(html.data))
    monkeypatch.setattr("IPython.get_ipython", object)
    monkeypatch.setattr(display, "display", lambda html, display_id: handle)
    assert list(progress("abc", 3, "letters")) == ["a", "b", "c"]
    assert shown == ["letters: 3 in 0 s"]


def test_everything_is_and_runs_on_the_given_device(small, monkeypatch):
    splits = {
        "train": (small.images[:32], small.labels[:32]),
        "eval": (small.eval_images[:32], small.eval_labels[:32]),
    }
    monkeypatch.setattr(small_scale, "load_embedded", splits.get)
    with pretended_mps(monkeypatch):
        there = SmallScale.load("mps")
        for name in ("images", "labels", "tokens", "eval_images", "eval_labels"):
            assert getattr(there, name).device == MPS, name
        for method in ("repa", "repa-e"):
            vae = load_vae("tiny") if method == "repa" else None
            state = there.new_state(method, vae=vae)
            networks = (there.encoder, there.perceptual, there.evaluator, state.vae, state.sit, state.ema)
            assert all(value.device == MPS for network in networks for value in network.state_dict().values())
            (losses,) = there.train(state, 1, targets=there.tokens, batch=4)
            assert losses["sit_total"] > 0
        samples, labels = there.generate(state.ema, state.vae, 4, steps=2)
        scores = there.score(samples, labels, there.reconstruct(state.vae))
        assert samples.device == labels.device == MPS and scores["frechet"] > 0
        assert there.eval_latents(state.vae).device == MPS
