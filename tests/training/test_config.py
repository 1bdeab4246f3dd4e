"""Options of the training commands: every official flag, one place of validation, nothing ignored."""

import math
from dataclasses import replace

import pytest

from repae_lite.commands.main import main, make_parser
from repae_lite.commands.presets import preset_names, presets_dir, read_preset
from repae_lite.commands.train_flags import config_from
from repae_lite.method.losses import VAELossConfig
from repae_lite.training.config import (
    COMMANDS,
    OPTIONS,
    TrainConfig,
    differences,
    flag,
    value_type,
    values,
)
from repae_lite.training.loss_config import read_loss_config

OFFICIAL = {  # the flags of the official README's training commands
    "repae": "--max-train-steps=400000 --report-to=none --allow-tf32 --mixed-precision=fp16 --seed=0 "
    "--data-dir=data --output-dir=exps --batch-size=256 --path-type=linear --prediction=v "
    "--weighting=uniform --model=SiT-XL/2 --checkpointing-steps=50000 "
    "--loss-cfg-path=configs/l1_lpips_kl_gan.yaml --vae=f8d4 "
    "--vae-ckpt=pretrained/sdvae/sdvae-f8d4.pt --disc-pretrained-ckpt=pretrained/sdvae/disc.pt "
    "--enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=8 --vae-align-proj-coeff=1.5 --bn-momentum=0.1 "
    "--exp-name=sit-xl --resume-step=0",
    "ldm": "--max-train-steps=4000000 --report-to=none --allow-tf32 --mixed-precision=fp16 --seed=0 "
    "--data-dir=data --batch-size=256 --path-type=linear --prediction=v --weighting=uniform --model=SiT-XL/1 "
    "--checkpointing-steps=50000 --vae=f16d32 --vae-ckpt=pretrained/e2e-vavae/e2e-vavae-400k.pt "
    "--vae-latents-name=e2e-vavae --learning-rate=1e-4 --enc-type=dinov2-vit-b --proj-coeff=0.5 "
    "--encoder-depth=8 --output-dir=exps --exp-name=sit-xl-ldm",
}


def parse(command: str, *words: str) -> TrainConfig:
    return config_from(make_parser().parse_args([f"train-{command}", *words]))


@pytest.mark.parametrize("command", OFFICIAL)
def test_official_commands_are_understood_and_kept(command):
    config = parse(command, *OFFICIAL[command].split())
    for word in OFFICIAL[command].split():
        name, _, value = word.removeprefix("--").partition("=")
        stored = getattr(config, name.replace("-", "_"))
        assert stored == (type(stored)(value) if value else True), word


@pytest.mark.parametrize("command", COMMANDS)
def test_help_groups_and_explains_every_flag(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([f"train-{command}", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, option in OPTIONS.items():
        assert (flag(name) + " " in text) == (command in option.metadata["only"]), name
    assert "exit codes" in text and "143" in text and "the collapse guard:" in text


def test_tiny_changes_defaults_and_explicit_options_win():
    config = parse("repae", "--vae", "tiny", "--batch-size", "8")
    assert (config.model, config.enc_type, config.resolution, config.batch_size) == ("tiny", "tiny", 32, 8)
    assert config.data_dir == "embedded" and config.vae_ckpt == "tiny"
    assert parse("vae", "--vae", "tiny").vae_ckpt == "none"


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("repae", {"batch_size": 0}, "--batch-size is 0: it must be more than 0"),
        ("repae", {"learning_rate": float("nan")}, "--learning-rate is nan"),
        ("repae", {"proj_coeff": -1.0}, "--proj-coeff is -1.0: it must be 0 or more"),
        ("repae", {"ema_decay": 1.0}, "--ema-decay is 1.0: it is a share"),
        ("repae", {"spatial_norm": 1.5}, "--spatial-norm is 1.5: it is a share"),
        ("ldm", {"enc_type": "none", "projector": "conv"}, "--enc-type none has no targets and no projector"),
        ("repae", {"projector": "linear"}, "--projector is 'linear': choose one of mlp, conv"),
        ("repae", {"qk_norm": True}, "--qk-norm is True: no released SiT"),
        ("ldm", {"fused_attn": False}, "--fused-attn is False: attention is"),
        ("ldm", {"bn_momentum": 0.2}, "--bn-momentum means nothing to train-ldm"),
        ("repae", {"wandb_history_path": "a.json"}, "--wandb-history-path is 'a.json': old curves"),
        (
            "repae",
            {"continue_train_exp_dir": "exps/a"},
            "--continue-train-exp-dir exps/a needs the step in it",
        ),
        ("repae", {"bn_momentum": 0.0}, "--bn-momentum is 0.0"),
        (
            "repae",
            {"mixed_precision": "fp8"},
            "--mixed-precision is 'fp8': choose one of auto, no, fp16, bf16",
        ),
        ("repae", {"exp_name": "a/b"}, "--exp-name is 'a/b'"),
        ("repae", {"exp_name": ".."}, "--exp-name is '..'"),
        ("repae", {"vae_latents_name": "x"}, "--vae-latents-name means nothing to train-repae"),
        ("repae", {"enc_type": "none"}, "--enc-type none leaves nothing to align with"),
        ("repae", {"resume": "latest", "resume_step": 5}, "--resume latest and --resume-step 5"),
        ("ldm", {"vae_ckpt": "none"}, "train-ldm needs a trained VAE"),
        ("ldm", {"vae_diffusion_coeff": 1.0}, "--vae-diffusion-coeff means nothing to train-ldm"),
        ("vae", {"model": "SiT-B/2"}, "--model means nothing to train-vae"),
    ],
)
def test_refusals(command, given, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        TrainConfig.build(command, **{"vae": "tiny"} | given)


INSIDE, OUTSIDE = "inside", "outside"
RANGES = {  # values at the edges, of every option that has a range
    "resolution num_classes encoder_depth max_train_steps epochs batch_size gradient_accumulation_steps "
    "micro_batches logging_steps sample_images checkpointing_steps keep_last divergence_patience "
    "divergence_falls": {INSIDE: (1, 10**9), OUTSIDE: (0, -1)},
    "learning_rate vae_learning_rate disc_learning_rate adam_epsilon max_grad_norm": {
        INSIDE: (1e-30, 1e30),
        OUTSIDE: (0.0, -1e-30, math.inf, math.nan),
    },
    "seed num_workers lr_warmup_steps sampling_steps milestone_steps resume_step": {
        INSIDE: (0, 10**9),
        OUTSIDE: (-1,),
    },
    "proj_coeff vae_align_proj_coeff vae_diffusion_coeff adam_weight_decay": {
        INSIDE: (0.0, 1e30),
        OUTSIDE: (-1e-30, math.inf, math.nan),
    },
    "cfg_prob adam_beta1 adam_beta2 ema_decay divergence_variance": {
        INSIDE: (0.0, 0.999999),
        OUTSIDE: (-1e-30, 1.0, math.nan),
    },
    "spatial_norm": {INSIDE: (0.0, 1.0), OUTSIDE: (-1e-30, 1.000001, math.nan)},
    "bn_momentum": {INSIDE: (1e-30, 1.0), OUTSIDE: (0.0, 1.000001, math.nan)},
    "exp_name": {INSIDE: ("a", "...", "a b"), OUTSIDE: ("", ".", "..", "a/b", "a\\b")},
}


def test_every_option_with_a_range_is_held_to_it():
    named = " ".join(RANGES).split()
    assert sorted(named) == sorted(name for name, option in OPTIONS.items() if "within" in option.metadata)
    numbers = {name for name, option in OPTIONS.items() if value_type(option) in (int, float)}
    assert numbers <= set(named), "every number has a range"
    for names, values_of in RANGES.items():
        for name in names.split():
            company = {"command": OPTIONS[name].metadata["only"][0]}
            if name == "milestone_steps":
                company["keep_last"] = 1
            for value in values_of[INSIDE]:
                assert getattr(TrainConfig(**company, **{name: value}), name) == value
            for value in values_of[OUTSIDE]:
                with pytest.raises(ValueError, match=rf"^{flag(name)} is .*: it "):
                    TrainConfig(**company, **{name: value})


TINY = {  # the embedded scale, as chapter 05 trains it
    "data_dir": "embedded", "resolution": 32, "num_workers": 0, "vae_ckpt": "tiny", "loss_cfg_path": "tiny",
    "perceptual": "tiny", "model": "tiny", "enc_type": "tiny", "max_train_steps": 400, "batch_size": 32,
    "learning_rate": 1e-3, "vae_learning_rate": 2e-4, "lr_warmup_steps": 50, "ema_decay": 0.98,
    "logging_steps": 1, "sampling_steps": 200, "checkpointing_steps": 100,
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_tiny_scale_changes(command):
    config, large = TrainConfig.build(command, vae="tiny"), TrainConfig(command=command)
    expected = {name: value for name, value in TINY.items() if command in OPTIONS[name].metadata["only"]}
    if command == "vae":
        expected["vae_ckpt"] = "none"
    changed = {name for name in OPTIONS if getattr(config, name) != getattr(large, name)}
    assert changed == {"vae", *expected}
    assert all(getattr(config, name) == value for name, value in expected.items())


def test_full_scale_must_say_where_the_vae_is():
    with pytest.raises(ValueError, match="--vae-ckpt FILE, or none to start from scratch"):
        TrainConfig.build("repae")


def test_a_mistake_is_one_sentence_and_exit_code_2(capsys):
    assert main(["train-repae", "--vae", "tiny", "--batch-size", "0"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err == "repae train-repae: --batch-size is 0: it must be more than 0\n" and not captured.out
    )


def test_resuming_compares_what_the_numbers_depend_on():
    before = TrainConfig.build("repae", vae="tiny")
    after = TrainConfig.build(
        "repae", vae="tiny", batch_size=8, max_train_steps=9, num_workers=2, keep_last=1
    )
    assert differences(before.fixed(), after) == ["--batch-size was 32 and is now 8"]
    assert differences(before.fixed(), before) == []
    assert values(before)["command"] == "train-repae"


FREE = """exp_name output_dir data_dir num_workers vae_ckpt disc_pretrained_ckpt max_train_steps epochs
gradient_checkpointing micro_batches report_to logging_dir wandb_history_path logging_steps sampling_steps
sample_images checkpointing_steps keep_last milestone_steps checkpoint_format resume resume_step
continue_train_exp_dir on_divergence divergence_patience divergence_falls divergence_variance""".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_only_what_the_numbers_do_not_depend_on_may_change(command):
    mine = {name for name, option in OPTIONS.items() if command in option.metadata["only"]}
    assert set(TrainConfig(command=command).fixed()) == mine - set(FREE) | {"command"}


def test_where_a_run_is_resumed_from(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "0000007").mkdir(parents=True)
    (checkpoints / "0000008.pt").touch()

    def resumed(**given):
        return TrainConfig.build("repae", vae="tiny", **given).resume_from

    assert resumed() is None and resumed(resume="latest") == "latest" and resumed(resume_step=5) == "5"
    for step, name in ((7, "0000007"), (8, "0000008.pt")):
        found = resumed(resume_step=step, continue_train_exp_dir=str(tmp_path))
        assert found == str(checkpoints / name)


# ---------------------------------------------------------------- presets and the loss configuration


def test_presets_fill_in_and_explicit_flags_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "command: train-repae\nvae: tiny\nbatch-size: 16\nlearning-rate: 1e-5\ntrain_pos_embed: true\n"
    )
    config = parse("repae", "--preset", str(path), "--batch-size", "8")
    assert (config.batch_size, config.learning_rate, config.train_pos_embed, config.model) == (
        8,
        1e-5,
        True,
        "tiny",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red", "'colour', which train-repae does not have"),
        ("vae-latents-name: x", "'vae_latents_name', which train-repae does not have"),
        ("batch-size: many", "must be of type int"),
        ("batch-size: 8.5", "must be of type int"),
        ("batch-size: true", "must be of type int"),
        ("compile: 1", "must be of type bool"),
        ("vae-ckpt:", "vae_ckpt in the preset .* is None: it must be of type str"),
        ("enc-type: [a, b]", "must be of type str"),
        ("images: many", "images in the preset .* must be of type int"),
        ("command: train-ldm", "is for repae train-ldm, not for train-repae"),
        ("command: preprocess", "does not say which command it is for"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_presets_that_do_not_fit_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("repae", "--preset", str(path))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_names_its_run(name):
    preset = read_preset(name)
    config = TrainConfig.build(preset.command, **{"vae_ckpt": "none"} | preset.options)
    assert config.exp_name == name
    assert replace(preset.config, vae_ckpt=config.vae_ckpt) == config
    if config.vae != "tiny":  # what claims to be the official joint run has its two slips as well (D1, D2)
        joint = preset.command == "repae"
        assert config.train_pos_embed == joint
        assert config.lpips_range == ("official" if joint else "corrected")
        assert len(preset.released) == 1 and preset.images == 1_281_167  # ImageNet's training images
    else:
        assert not preset.released and preset.images == 6000


def test_a_preset_without_a_command_is_for_any(tmp_path):
    path = tmp_path / "any.yaml"
    path.write_text("vae: tiny\nreleased: [sdvae, invae]\nimages: 9\n")
    preset = read_preset(str(path), "vae")
    assert (preset.command, preset.released, preset.images) == ("vae", ("sdvae", "invae"), 9)
    with pytest.raises(
        ValueError, match="does not say which command it is for: add command: with one of train-repae"
    ):
        read_preset(str(path))


def test_unknown_presets_are_named():
    known = ", ".join(sorted(path.stem for path in presets_dir().glob("*.yaml")))
    with pytest.raises(FileNotFoundError, match=f"there is no preset 'nowhere' .*: known are {known}$"):
        parse("repae", "--preset", "nowhere")


OFFICIAL_LOSSES = """# names and values of the official configs/l1_lpips_kl_gan.yaml
model: {vq_model: {quantize_mode: vae}}
losses: {discriminator_start: 0, discriminator_factor: 1.0, discriminator_weight: 0.1, quantizer_weight: 1.0,
  perceptual_loss: "lpips", perceptual_weight: 1.0, reconstruction_loss: "l1", reconstruction_weight: 1.0,
  lecam_regularization_weight: 0.0, kl_weight: 1e-6, logvar_init: 0.0}
"""


def test_loss_configuration(tmp_path):
    assert read_loss_config("configs/l1_lpips_kl_gan.yaml") == {}  # the defaults are that recipe
    assert read_loss_config("tiny") == {"gan_weight": 0.0}
    path = tmp_path / "l1_lpips_kl_gan.yaml"
    path.write_text("losses: {kl_weight: 2e-6}")
    assert read_loss_config(str(path)) == {"kl_weight": 2e-6}  # a file of that name counts
    path = tmp_path / "loss.yaml"
    path.write_text(OFFICIAL_LOSSES)
    assert VAELossConfig(**read_loss_config(str(path))) == VAELossConfig()
    path.write_text(
        "losses:\n  reconstruction_loss: l2\n  kl_weight: 1e-5\n  discriminator_weight: 0.2\n  "
        "perceptual_loss: lpips\n"
    )
    assert read_loss_config(str(path)) == {"pixel": "l2", "kl_weight": 1e-5, "gan_weight": 0.2}
    bad = {
        "klweight: 1": "'klweight'",
        "kl_weight: -1": "must be 0 or more",
        "kl_weight: .inf": "must be 0 or more",
        "discriminator_start: 0.5": "must be of type int",
        "perceptual_loss: vgg": "only 'lpips'",
    }
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_loss_config(str(path))
    with pytest.raises(FileNotFoundError, match="loss configuration"):
        read_loss_config(str(tmp_path / "other.yaml"))
