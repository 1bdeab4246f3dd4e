"""The collapse guard says what is wrong and since when, and nothing else."""

import json

import pytest

from repae_lite.training.divergence import HISTORY, Guard

NORMS = {"vae": 0.5, "sit": 1.0}


def first_finding(guard: Guard, steps):
    """The first finding of (norms, scales, losses) per step, with its step."""
    for step, (norms, scales, losses) in enumerate(steps, start=1):
        if finding := guard.check(step, norms, scales, losses):
            return step, finding
    return None


def test_a_healthy_run_is_left_alone():
    assert (
        first_finding(Guard(), [(NORMS, {"sit": 65536.0}, {"sit_total": 1.0, "latent_variance": 1.0})] * 300)
        is None
    )


def test_gradient_norms_that_stay_at_zero():
    dead = [(NORMS, {}, None)] * 3 + [({"vae": 0.5, "sit": 0.0}, {}, None)] * 10
    step, finding = first_finding(Guard(patience=5), dead)
    assert step == 8 and finding.since == 4 and "sit has been 0 since step 4" in finding.what
    blinking = [(NORMS, {}, None), ({"vae": 0.0, "sit": 1.0}, {}, None)] * 50
    assert first_finding(Guard(patience=2), blinking) is None
    assert (
        first_finding(Guard(patience=2), [({"discriminator": 0.0}, {}, None)] * 9) is None
    )  # a won hinge loss


def test_a_loss_scale_that_keeps_falling():
    falls = [(NORMS, {"vae": 2.0**-i}, None) for i in range(9)]
    step, finding = first_finding(Guard(falls=3), falls)
    assert (
        step == 5
        and finding.since == 2
        and "loss scale of vae has fallen 4 times since step 2" in finding.what
    )
    zigzag = [(NORMS, {"vae": scale}, None) for scale in [8.0, 4.0, 2.0, 4.0] * 20]
    assert first_finding(Guard(falls=3), zigzag) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(value):
    step, finding = first_finding(Guard(), [(NORMS, {}, {"kl": 1.0}), (NORMS, {}, {"kl": value})])
    assert step == finding.since == 2 and "the loss kl" in finding.what
    assert first_finding(Guard(), [(NORMS, {}, {"grad_norm_sit": value})]) is None  # fp16 skips such a step


def test_latents_that_collapse():
    falling = [(NORMS, {}, {"latent_variance": 2.0 * 0.5**i}) for i in range(9)]
    step, finding = first_finding(Guard(variance=0.2), falling)
    assert step == 4 and "0.25 at step 4, from 2 at the start" in finding.what
    assert first_finding(Guard(variance=0), falling) is None


def test_a_resumed_guard_goes_on_as_if_it_had_not_stopped():
    steps = [({"vae": 0.0}, {"vae": 2.0**-i}, {"latent_variance": 1.0}) for i in range(20)]
    whole = Guard(patience=9, falls=99)
    found = first_finding(whole, steps)
    first, second = Guard(patience=9, falls=99), Guard(patience=9, falls=99)
    assert first_finding(first, steps[:5]) is None
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for i, (norms, scales, losses) in enumerate(steps[5:], start=6):
        if finding := second.check(i, norms, scales, losses):
            break
    assert (i, finding) == found
    assert len(whole.history) <= HISTORY and whole.history[0]["grad_norm"] == {"vae": 0.0}
