"""Which loss reaches which parameter, exactly zero where it must be zero; the three updates one by one."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from small_states import LABELS, make_batch, make_state
from torch import nn
from torch.testing import assert_close

from repae_lite.method.losses import VAELossConfig, hinge_discriminator_loss, sit_losses
from repae_lite.method.steps import (
    GRAD_NORMS,
    Draws,
    Mechanics,
    StepConfig,
    TrainState,
    check_batch,
    discriminator_step,
    frozen,
    latent_step,
    make_optimizer,
    repae_step,
    sit_step,
    update_ema,
    vae_losses,
    vae_step,
)
from repae_lite.networks.sit import SiT

GROUPS = ("vae_encoder", "vae_decoder", "sit_before_tap", "sit_after_tap", "projectors", "discriminator")


def groups_of(state: TrainState) -> dict[str, list[nn.Parameter]]:
    """Every parameter of the three models, in exactly one group; frozen ones left out."""
    tap = state.sit.config.alignment_depth
    found = {name: [] for name in GROUPS}
    for name, p in state.vae.named_parameters():
        found["vae_encoder" if name.startswith(("encoder", "quant_conv")) else "vae_decoder"].append(p)
    for name, p in state.sit.named_parameters():
        part = name.split(".")
        if part[0] == "projectors":
            found["projectors"].append(p)
        elif part[0] == "final_layer" or (part[0] == "blocks" and int(part[1]) >= tap):
            found["sit_after_tap"].append(p)
        else:
            found["sit_before_tap"].append(p)
    found["discriminator"] += list(state.discriminator.parameters())
    return {name: [p for p in ps if p.requires_grad] for name, ps in found.items()}


def losses_of(state: TrainState):
    """Each loss, computed in the graph that its step builds."""
    x, targets, draws = make_batch()
    eps_posterior, t, eps = draws["eps_posterior"], draws["t"], draws["eps"]

    def encode():
        posterior = state.vae.encode(x)
        return posterior, posterior.sample(eps_posterior)

    def vae_side(align_only=True):
        state.sit.eval()
        with frozen(state.sit, state.discriminator):
            posterior, z = encode()
            out = sit_losses(state.sit, z, LABELS, targets, t=t, eps=eps, align_only=align_only)
            return posterior, z, out

    def sit_side():
        state.sit.train()
        return sit_losses(state.sit, encode()[1].detach(), LABELS, targets, t=t, eps=eps)

    def reconstruction():
        with frozen(state.sit, state.discriminator):
            return (x - state.vae.decode(encode()[1])).abs().mean()

    def perceptual():
        return state.perceptual(x, state.vae.decode(encode()[1])).mean()

    def adversarial():
        with frozen(state.sit, state.discriminator):
            return -state.discriminator(state.vae.decode(encode()[1])).mean()

    def hinge():
        x_hat = state.vae.decode(encode()[1]).detach()
        return hinge_discriminator_loss(state.discriminator(x), state.discriminator(x_hat))

    return {
        "reconstruction": reconstruction,
        "perceptual": perceptual,
        "kl": lambda: encode()[0].kl().mean(),
        "adversarial": adversarial,
        "vae_align": lambda: vae_side()[2].align_loss,
        "hinge": hinge,
        "velocity": lambda: sit_side().denoising_loss.mean(),
        "sit_align": lambda: sit_side().align_loss,
        "naive_velocity": lambda: vae_side(align_only=False)[2].denoising_loss.mean(),
    }


ROUTES = {  # loss: the groups it reaches; all others get exactly nothing
    "reconstruction": {"vae_encoder", "vae_decoder"},
    "perceptual": {"vae_encoder", "vae_decoder"},
    "kl": {"vae_encoder"},
    "adversarial": {"vae_encoder", "vae_decoder"},
    "vae_align": {"vae_encoder"},
    "hinge": {"discriminator"},
    "velocity": {"sit_before_tap", "sit_after_tap"},
    "sit_align": {"sit_before_tap", "projectors"},
    "naive_velocity": {"vae_encoder"},
}


@pytest.mark.parametrize("loss", ROUTES)
def test_routing_of_each_loss(loss):
    state = make_state()
    losses_of(state)[loss]().backward()
    for group, parameters in groups_of(state).items():
        size = sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
        if group in ROUTES[loss]:
            # One tensor may be left out: where every hinge is active, the last bias of the discriminator gets
            # -1 + 1 = 0.
            touched = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters)
            assert touched >= len(parameters) - 1, f"{loss} should reach {group}"
            assert math.isfinite(size)
        else:
            assert size == 0.0, f"{loss} must not reach {group}"


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def snapshot(state: TrainState) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: copy.deepcopy(getattr(state, name).state_dict())
        for name in ("vae", "sit", "ema", "discriminator", "perceptual")
    }


def moved_models(before, state):
    return {name for name in before if moved(before[name], getattr(state, name))}


BN = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


def test_routing_vae_step_moves_only_the_vae_and_discriminator_statistics():
    state = make_state()
    x, targets, draws = make_batch()
    before = snapshot(state)
    vae_step(state, x, LABELS, targets, **draws)
    assert moved_models(before, state) == {"vae", "discriminator"}
    assert all(
        "running" in name or "tracked" in name for name in moved(before["discriminator"], state.discriminator)
    )
    assert all(p.grad is None for p in state.sit.parameters())
    assert all(p.grad is None for p in state.discriminator.parameters())


def test_routing_alignment_alone_moves_the_encoder_and_not_the_decoder():
    config = VAELossConfig(pixel_weight=0.0, perceptual_weight=0.0, kl_weight=0.0, gan_weight=0.0)
    state = make_state(vae_loss=config)
    x, targets, draws = make_batch()
    before = snapshot(state)
    vae_step(state, x, LABELS, targets, **draws)
    names = moved(before["vae"], state.vae)
    assert names and all(name.startswith(("encoder", "quant_conv")) for name in names)


def test_routing_discriminator_step_moves_only_the_discriminator():
    state = make_state()
    x, _, _ = make_batch()
    before = snapshot(state)
    state.discriminator.eval()
    x_hat = x.flip(3).requires_grad_()
    discriminator_step(state, x, x_hat)
    assert x_hat.grad is None and state.discriminator.training
    assert moved_models(before, state) == {"discriminator"}


def test_routing_sit_step_moves_only_sit_and_its_statistics():
    state = make_state()
    _, targets, draws = make_batch()
    before = snapshot(state)
    z = draws["eps_posterior"].clone().requires_grad_()
    sit_step(state, z, LABELS, targets, t=draws["t"], eps=draws["eps"])
    assert z.grad is None
    assert moved_models(before, state) == {"sit"}
    assert moved(before["sit"], state.sit) >= BN
    assert "pos_embed" not in moved(before["sit"], state.sit)


@pytest.mark.parametrize("train_pos_embed", [False, True])
def test_routing_position_embedding_switch(train_pos_embed):
    state = make_state(train_pos_embed)
    x, targets, draws = make_batch()
    before = snapshot(state)
    repae_step(state, x, LABELS, targets, **draws)
    assert ("pos_embed" in moved(before["sit"], state.sit)) == train_pos_embed
    assert state.sit.pos_embed.requires_grad == train_pos_embed


def test_routing_teacher_targets_get_no_gradient_and_do_not_move():
    state = make_state()
    x, targets, draws = make_batch()
    kept = [t.clone() for t in targets]
    for target in targets:
        target.requires_grad_()
    repae_step(state, x, LABELS, [t.detach() for t in targets], **draws)
    assert all(t.grad is None and torch.equal(t, k) for t, k in zip(targets, kept, strict=True))


def test_routing_vae_step_uses_running_statistics_unless_asked():
    x, targets, draws = make_batch()
    results = {}
    for batch_stats in (False, True):
        state = make_state(vae_step_batch_stats=batch_stats)
        before = copy.deepcopy(state.sit.bn.state_dict())
        results[batch_stats] = vae_step(state, x, LABELS, targets, **draws).losses["vae_align"].item()
        assert all(torch.equal(before[k], v) for k, v in state.sit.bn.state_dict().items())
    assert results[False] != results[True]


@pytest.mark.parametrize(
    ("align", "diffusion", "depends"),
    [(0.0, 0.0, False), (1.5, 0.0, True), (0.0, 1.0, True)],
    ids=["vae-only", "repa-e", "naive"],
)
def test_routing_vae_update_depends_on_sit_only_through_its_coefficients(align, diffusion, depends):
    x, targets, draws = make_batch()
    updated = []
    for change in (0.0, 0.1):
        state = make_state(vae_align_coeff=align, vae_diffusion_coeff=diffusion)
        with torch.no_grad():
            for p in state.sit.parameters():
                p.add_(change * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        vae_step(state, x, LABELS, targets, **draws)
        updated.append(torch.cat([p.detach().flatten() for p in state.vae.parameters()]))
    assert torch.equal(*updated) != depends


def test_step_reuses_time_noise_and_latents():
    """The SiT step sees the VAE step's z, t and eps: recomputed by hand from a copy."""
    state = make_state(vae_loss=VAELossConfig(gan_weight=0.0))
    reference = copy.deepcopy(state)
    x, targets, draws = make_batch()
    drop = torch.zeros(4, dtype=torch.bool)
    losses = repae_step(state, x, LABELS, targets, **draws, label_drop=drop)
    z = reference.vae.encode(x).sample(draws["eps_posterior"])
    sit = reference.sit.train()
    out = sit_losses(sit, z, LABELS, targets, t=draws["t"], eps=draws["eps"], label_drop=drop)
    assert losses["denoising"] == pytest.approx(out.denoising_loss.mean().item(), rel=1e-5)
    assert losses["sit_total"] == pytest.approx(losses["denoising"] + 0.5 * losses["sit_align"], rel=1e-5)
    assert losses["vae_total"] == pytest.approx(losses["vae_reg"] + 1.5 * losses["vae_align"], rel=1e-5)


def test_modes_labels_and_depth_of_each_step():
    """Whatever modes the networks come in; labels are dropped in the SiT step alone."""
    state = make_state()
    state.vae.eval(), state.discriminator.eval(), state.sit.train()
    seen = []
    for name, module in (
        ("encoder", state.vae.encoder),
        ("sit", state.sit),
        ("after tap", state.sit.blocks[2]),
        ("discriminator", state.discriminator),
    ):
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: seen.append(
                (name, module.training, inputs[2].tolist() if name == "sit" else None)
            )
        )
    x, targets, draws = make_batch()
    repae_step(state, x, LABELS, targets, **draws, label_drop=torch.tensor([False, True, False, True]))
    assert seen == [
        ("encoder", True, None),
        ("discriminator", True, None),
        ("sit", False, LABELS.tolist()),
        ("discriminator", True, None),
        ("discriminator", True, None),
        ("sit", True, [0, 10, 9, 10]),
        ("after tap", True, None),
    ]


def test_gradients_from_elsewhere_do_not_count():
    x, targets, draws = make_batch()
    found = []
    for stale in (False, True):
        state = make_state()
        state.mechanics = Recorded()
        if stale:
            for p in [*state.vae.parameters(), *state.sit.parameters(), *state.discriminator.parameters()]:
                p.grad = torch.ones_like(p) if p.requires_grad else None
        repae_step(state, x, LABELS, targets, **draws, label_drop=torch.zeros(4, dtype=torch.bool))
        found.append(state.mechanics.gradients)
    for module, gradients in found[0].items():
        assert all(torch.equal(gradient, found[1][module][name]) for name, gradient in gradients.items())


def test_gradients_are_clipped():
    state = make_state(max_grad_norm=1e-3)
    x, targets, draws = make_batch()
    losses = repae_step(state, x, LABELS, targets, **draws)
    for name in ("vae", "sit", "discriminator"):
        gradients = [p.grad for p in getattr(state, name).parameters() if p.grad is not None]
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        assert norm == pytest.approx(1e-3, rel=1e-2) and losses[GRAD_NORMS[name]] > 1e-2


def test_the_moving_average_follows_the_update():
    state = make_state(ema_decay=0.0)
    assert not state.ema.training and not any(p.requires_grad for p in state.ema.parameters())
    latent_step(state, torch.randn(4, 4, 8, 8), LABELS, TARGETS)
    for (name, mine), theirs in zip(
        state.ema.state_dict().items(), state.sit.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert state.step == 1 and state.sit.training


def test_fixed_latent_statistics_stay_with_micro_batches():
    state = make_state()
    state.sit.config = replace(state.sit.config, fixed_latent_stats=True)
    state.mechanics = Mechanics(micro_batches=2)
    before = copy.deepcopy(state.sit.bn.state_dict())
    latent_step(state, 2 * torch.randn(4, 4, 8, 8) + 1, LABELS, TARGETS)
    assert all(torch.equal(before[name], value) for name, value in state.sit.bn.state_dict().items())


def test_gan_start():
    x, targets, draws = make_batch()
    state = make_state(vae_loss=VAELossConfig(gan_start=1))
    before = snapshot(state)
    assert "disc" not in repae_step(state, x, LABELS, targets, **draws)
    assert "discriminator" not in moved_models(before, state)
    assert "disc" in repae_step(state, x, LABELS, targets, **draws)


def test_latent_step_leaves_the_vae_alone_and_trains_plain_sit_without_targets():
    state = make_state()
    before = snapshot(state)
    losses = latent_step(state, torch.randn(4, 4, 8, 8), LABELS, None)
    assert moved_models(before, state) == {"sit", "ema"}
    assert "sit_align" not in losses and losses["sit_total"] == losses["denoising"]
    assert all(p.grad is None for p in state.sit.projectors.parameters())


def test_ema_averages_floats_and_copies_integers():
    model = nn.BatchNorm1d(2)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_var.fill_(5.0)
        model.num_batches_tracked.fill_(7)
    update_ema(ema, model, decay=0.75)
    assert ema.weight.tolist() == [1.5, 1.5]
    assert ema.running_var.tolist() == [2.0, 2.0]
    assert int(ema.num_batches_tracked) == 7


def test_ema_that_fails_stays():
    sit, ema = (SiT.from_preset("tiny", width=8, depth=2, heads=2) for _ in range(2))
    plain, failed = copy.deepcopy(ema), copy.deepcopy(ema)
    sit.bn.running_mean.fill_(2.0)
    for average, how in ((plain, None), (ema, torch.tensor(0.0)), (failed, torch.tensor(1.0))):
        before = copy.deepcopy(average.state_dict())
        update_ema(average, sit, 0.75, how)
        assert bool(moved(before, average)) == (how != 1)
    for name, tensor in plain.state_dict().items():
        assert_close(ema.state_dict()[name], tensor)
    sit.bn.running_mean.fill_(float("nan"))
    update_ema(failed, sit, 0.75, torch.tensor(1.0))
    assert failed.bn.running_mean.isfinite().all()


def test_frozen_restores_exactly_what_trained():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="inside"), frozen(module, None):
        assert not module.weight.requires_grad
        raise RuntimeError("inside")
    assert module.weight.requires_grad and not module.bias.requires_grad


X, TARGETS, _ = make_batch()
BAD_BATCHES = {
    "uint8": (dict(x=torch.zeros(4, 3, 32, 32, dtype=torch.uint8)), r"dtype torch\.uint8: convert"),
    "range": (dict(x=X * 127.5), r"must lie in \[-1, 1\]"),
    "nan": (dict(x=torch.where(X > 0.9, float("nan"), X)), "contains NaN"),
    "infinity": (dict(x=torch.where(X > 0.9, float("inf"), X)), "contains infinity"),
    "labels too large": (dict(labels=torch.tensor([0, 1, 2, 11])), "label 11 is outside 0 to 9"),
    "labels negative": (dict(labels=torch.tensor([0, 1, -2, 3])), "label -2 is outside"),
    "labels float": (dict(labels=torch.ones(4)), "labels have dtype torch.float32"),
    "labels count": (dict(labels=torch.tensor([1])), "for 4 images: give one class number per image"),
    "labels true": (dict(labels=torch.ones(4).bool()), "labels have dtype torch.bool"),
    "t = 7": (dict(t=torch.tensor([0.1, 0.2, 7.0, 0.3])), "times reach from 0.1 to 7"),
    "targets whole": (
        dict(targets=[each.long() for each in TARGETS]),
        r"targets\[0\] have dtype torch.int64",
    ),
    "labels null": (dict(labels=torch.tensor([0, 1, 2, 10])), "label 10 is outside 0 to 9"),
    "empty": (dict(x=X[:0], labels=LABELS[:0]), "at least one image"),
    "float64": (dict(x=X.double()), r"dtype torch\.float64, the VAE torch\.float32: convert one"),
    "tokens off the grid": (
        dict(targets=[TARGETS[0][:, :9], TARGETS[1]]),
        r"targets\[0\] have shape \(4, 9, 24\).*same token grid",
    ),
    "token width": (
        dict(targets=[TARGETS[1], TARGETS[1]]),
        r"targets\[0\] have shape \(4, 16, 16\) but this SiT needs \(4, 16, 24\)",
    ),
    "one encoder of two": (dict(targets=TARGETS[0]), "1 target encoders for a SiT with 2 projectors"),
    "no targets": (dict(targets=None), "vae_align_coeff is 1.5 but there are no targets"),
    "targets nan": (dict(targets=[TARGETS[0], TARGETS[1] / 0]), r"targets\[1\] contain NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batch_is_refused_before_anything_moves(case):
    changes, message = BAD_BATCHES[case]
    state = make_state()
    before = snapshot(state)
    batch = {"x": X, "labels": LABELS, "targets": TARGETS} | changes
    with pytest.raises(ValueError, match=message) as error:
        repae_step(state, **batch)
    assert "\n" not in str(error.value)
    assert not moved_models(before, state)
    check_batch(state.sit, X, LABELS, TARGETS)  # the good one passes


BAD_LATENTS = {
    "nan": (dict(z=torch.full((4, 4, 8, 8), float("nan"))), "latent batch contains NaN or infinity"),
    "labels": (dict(labels=LABELS[:1]), "for 4 latents: give one class number per latent"),
    "targets": (
        dict(targets=[TARGETS[0] * float("inf"), TARGETS[1]]),
        r"targets\[0\] contain NaN or infinity",
    ),
    "channels": (dict(z=torch.randn(4, 32, 8, 8)), r"shape \(4, 32, 8, 8\): this SiT takes \(B, 4, 8, 8\)"),
    "size": (dict(z=torch.randn(4, 4, 16, 16)), r"shape \(4, 4, 16, 16\): this SiT takes"),
}


@pytest.mark.parametrize("case", BAD_LATENTS)
def test_bad_latents_are_refused_before_anything_moves(case):
    changes, message = BAD_LATENTS[case]
    state = make_state()
    before = snapshot(state)
    with pytest.raises(ValueError, match=message):
        latent_step(state, **({"z": torch.randn(4, 4, 8, 8), "labels": LABELS, "targets": TARGETS} | changes))
    assert not moved_models(before, state)


def test_missing_parts_are_named_before_anything_moves():
    x, targets, draws = make_batch()
    for part, message in (
        ("discriminator", "there is no discriminator"),
        ("optimizer", "no optimizer for vae"),
    ):
        state = make_state()
        if part == "discriminator":
            state.discriminator = None
        else:
            del state.optimizers["vae"]
        before = {k: copy.deepcopy(getattr(state, k).state_dict()) for k in ("vae", "sit")}
        with pytest.raises(ValueError, match=message):
            repae_step(state, x, LABELS, targets, **draws)
        assert not any(moved(before[k], getattr(state, k)) for k in before)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({"t": torch.rand(1)}, "1 times and noise"),
        ({"eps": torch.randn(1, 4, 8, 8)}, "draw one time per latent and noise like z"),
        ({"eps_posterior": torch.randn(1, 4, 8, 8)}, "posterior noise has shape"),
    ],
    ids=["t", "eps", "eps_posterior"],
)
def test_draws_that_would_broadcast_are_refused(draw, message):
    state = make_state()
    before = copy.deepcopy(state.vae.state_dict())
    with pytest.raises(ValueError, match=message):
        repae_step(state, X, LABELS, TARGETS, **draw)
    assert not moved(before, state.vae)


def test_a_gradient_that_is_not_finite_changes_no_weights():
    state = make_state()
    state.sit.final_layer.linear.bias.data.fill_(1e30)  # its square overflows
    before = snapshot(state)
    with pytest.raises(FloatingPointError, match=r"gradient norm of SiT is (nan|inf)"):
        latent_step(state, torch.randn(4, 4, 8, 8), LABELS, TARGETS)
    assert {name.split(".")[0] for name in moved(before["sit"], state.sit)} <= {"bn"}
    assert moved_models(before, state) <= {"sit"}


def test_step_configuration_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match="unknown path 'vp'"):
        StepConfig(path="vp")
    with pytest.raises(ValueError, match="unknown time weighting 'edm'"):
        StepConfig(weighting="edm")
    with pytest.raises(ValueError, match="unknown loss_precision 'float16': choose float32 or autocast"):
        StepConfig(loss_precision="float16")
    for name, value in (
        ("proj_coeff", -0.5), ("vae_align_coeff", -1.0), ("vae_diffusion_coeff", float("nan")),
        ("max_grad_norm", 0.0), ("max_grad_norm", float("nan")), ("ema_decay", 2.0), ("ema_decay", -0.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} is {value}: it "):
            StepConfig(**{name: value})
    with pytest.raises(ValueError, match="every parameter of this Linear is frozen"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_and_times_stay_in_full_precision_under_autocast(dtype):
    state = make_state()
    x, targets, draws = make_batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        posterior = state.vae.encode(x)
        z = posterior.sample(draws["eps_posterior"])
        out = sit_losses(state.sit.eval(), z, LABELS, targets, eps=draws["eps"])
    for value in (posterior.kl(), z, out.t, out.denoising_loss, out.align_loss):
        assert value.dtype == torch.float32 and value.isfinite().all()


# ---------------------------------------------------------------- mixed precision and micro-batches


class Autocast(Mechanics):
    def __init__(self, dtype: torch.dtype, **more):
        super().__init__(**more)
        self.dtype = dtype

    def autocast(self):
        return torch.autocast("cpu", self.dtype)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "inside"), [("float32", torch.float32), ("autocast", torch.bfloat16)])
def test_loss_networks_stay_out_of_mixed_precision_unless_asked(precision, inside, checkpointing):
    """D11: the perceptual network and the discriminator, in both of its steps; all else is in it."""
    state = make_state(loss_precision=precision)
    state.mechanics = Autocast(torch.bfloat16, gradient_checkpointing=checkpointing)
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen.setdefault(name, []).append((inputs[0].dtype, output.dtype))

        return hook

    state.perceptual.conv.register_forward_hook(note("perceptual"))
    state.discriminator.main[0].register_forward_hook(note("discriminator"))
    state.vae.decoder.conv_out.register_forward_hook(note("vae"))
    state.sit.x_embedder.proj.register_forward_hook(note("sit"))
    x, targets, draws = make_batch()
    out = vae_step(state, x, LABELS, targets, **draws)
    discriminator_step(state, x, out.x_hat)
    calls = (4, 4) if checkpointing else (2, 3)  # for x and x_hat; in the VAE step and twice in the other
    assert tuple(len(seen[name]) for name in ("perceptual", "discriminator")) == calls
    for name in ("perceptual", "discriminator"):
        inputs, outputs = zip(*seen[name], strict=True)
        assert set(outputs) == {inside}, name
        assert precision == "autocast" or set(inputs) == {torch.float32}, name
    assert {dtype for name in ("vae", "sit") for _, dtype in seen[name]} == {torch.bfloat16}


def test_float16_overflows_in_a_perceptual_network_only_inside_autocast():
    x, targets, draws = make_batch()
    finite = {}
    for precision in ("float32", "autocast"):
        state = make_state(loss_precision=precision)
        state.perceptual.conv.weight.data.fill_(3e4)  # 27 of them make more than 65504
        state.perceptual.conv.bias.data.fill_(6e4)
        with torch.autocast("cpu", torch.float16):
            loss, losses, *_ = vae_losses(state, x, LABELS, targets, Draws(**draws))
        finite[precision] = bool(losses["perceptual"].isfinite() and loss.isfinite())
    assert finite == {"float32": True, "autocast": False}


def test_without_mixed_precision_both_loss_precisions_are_the_same():
    x, targets, draws = make_batch()
    updated = []
    for precision in ("float32", "autocast"):
        state = make_state(loss_precision=precision)
        repae_step(state, x, LABELS, targets, **draws)
        updated.append(state.vae.state_dict() | state.discriminator.state_dict())
    assert all(torch.equal(a, updated[1][name]) for name, a in updated[0].items())


def test_draws_are_cut_together():
    draws = Draws(t=torch.arange(4.0), label_drop=torch.tensor([True, False, True, False]))
    cut = draws[1:3]
    assert cut.t.tolist() == [1, 2] and cut.label_drop.tolist() == [False, True]
    assert cut.eps is None and cut.eps_posterior is None
    assert draws.map(lambda drawn: drawn[:1]).t.tolist() == [0]


class Recorded(Mechanics):
    """Keeps the gradients that each update applies, before they are clipped."""

    def __init__(self, **more):
        super().__init__(**more)
        self.gradients = {}

    def update(self, module, optimizer, max_norm):
        self.gradients[type(module).__name__] = {
            name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
        }
        return super().update(module, optimizer, max_norm)


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_add_up_to_the_losses_and_gradients_of_the_whole_batch(micro_batches):
    """Before clipping, which would hide a missing share: every gradient is that of a mean over images."""
    x, targets, draws = make_batch()
    draws["label_drop"] = torch.tensor([False, True, False, False])
    found = []
    for count in (1, micro_batches):
        state = make_state(vae_diffusion_coeff=0.5)
        state.mechanics = Recorded(micro_batches=count)
        for (
            module
        ) in state.discriminator.modules():  # its BatchNorm sees each micro-batch alone: leave it out
            if isinstance(module, nn.BatchNorm2d):
                module.eval().train = lambda mode=True: None
        found.append((repae_step(state, x, LABELS, targets, **draws), state.mechanics.gradients))
    (losses, gradients), (cut_losses, cut_gradients) = found
    assert cut_losses == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert gradients.keys() == cut_gradients.keys() == {"AutoencoderKL", "PatchDiscriminator", "SiT"}
    for module, expected in gradients.items():
        assert expected.keys() == cut_gradients[module].keys()
        for name, gradient in expected.items():
            slack = 1e-3 * float(gradient.abs().max()) + 1e-7
            assert_close(cut_gradients[module][name], gradient, rtol=1e-3, atol=slack, msg=f"{module}.{name}")


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_what_the_vae_step_draws_is_handed_on(micro_batches):
    """Each micro-batch draws its own times and noise; the SiT step gets all of them, in order."""
    x, targets, draws = make_batch()
    found = []
    for given in ({"eps_posterior": draws["eps_posterior"]}, None):
        state = make_state(vae_loss=VAELossConfig(gan_weight=0.0))
        state.mechanics = Mechanics(micro_batches=micro_batches)
        found.append(vae_step(state, x, LABELS, targets, **given or vars(found[0].draws)))
    out, again = found
    assert not any(tensor.requires_grad for tensor in (out.z, out.x_hat, out.draws.eps))
    assert len(set(out.draws.t.tolist())) == 4 and out.draws.eps.shape == out.z.shape == (4, 4, 8, 8)
    assert torch.equal(out.z, again.z) and torch.equal(out.x_hat, again.x_hat)
    assert out.losses["vae_total"] == again.losses["vae_total"]
