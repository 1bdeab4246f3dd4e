"""Options of the training commands: every official flag, one place of validation, nothing ignored."""

import argparse

import pytest

from repae_lite.commands.main import main
from repae_lite.method.losses import VAELossConfig
from repae_lite.training.config import (
    COMMANDS,
    TINY,
    TrainConfig,
    add_training_command,
    config_of,
    differences,
    flag,
    options,
    presets_dir,
    values,
)
from repae_lite.training.option_files import read_loss_config

OFFICIAL = {  # the flags of the official README's training commands
    "repae": "--max-train-steps=400000 --report-to=none --allow-tf32 --mixed-precision=fp16 --seed=0 --data-dir=data --output-dir=exps "
    "--batch-size=256 --path-type=linear --prediction=v --weighting=uniform --model=SiT-XL/2 "
    "--checkpointing-steps=50000 "
    "--loss-cfg-path=configs/l1_lpips_kl_gan.yaml --vae=f8d4 --vae-ckpt=pretrained/sdvae/sdvae-f8d4.pt "
    "--disc-pretrained-ckpt=pretrained/sdvae/disc.pt --enc-type=dinov2-vit-b --proj-coeff=0.5 "
    "--encoder-depth=8 "
    "--vae-align-proj-coeff=1.5 --bn-momentum=0.1 --exp-name=sit-xl --resume-step=0",
    "ldm": "--max-train-steps=4000000 --report-to=none --allow-tf32 --mixed-precision=fp16 --seed=0 --data-dir=data --batch-size=256 "
    "--path-type=linear --prediction=v --weighting=uniform --model=SiT-XL/1 --checkpointing-steps=50000 "
    "--vae=f16d32 "
    "--vae-ckpt=pretrained/e2e-vavae/e2e-vavae-400k.pt --vae-latents-name=e2e-vavae --learning-rate=1e-4 "
    "--enc-type=dinov2-vit-b "
    "--proj-coeff=0.5 --encoder-depth=8 --output-dir=exps --exp-name=sit-xl-ldm",
}


def parse(command: str, *words: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_training_command(parser.add_subparsers(), command)
    return config_of(parser.parse_args([f"train-{command}", *words]))


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
    for option in options():
        assert (flag(option.name) + " " in text) == (command in option.metadata["only"]), option.name
    assert "exit codes" in text and "143" in text and "the collapse guard:" in text


def test_tiny_changes_defaults_and_explicit_options_win():
    config = parse("repae", "--vae", "tiny", "--batch-size", "8")
    assert (config.model, config.enc_type, config.resolution, config.batch_size) == ("tiny", "tiny", 32, 8)
    assert config.data_dir == "embedded" and config.vae_ckpt == "tiny"
    assert parse("vae", "--vae", "tiny").vae_ckpt == "none"
    assert set(TINY) <= {option.name for option in options()}


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
        ("command: train-ldm", "is for repae train-ldm"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML"),
    ],
)
def test_presets_that_do_not_fit_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.build("repae", preset=str(path))


@pytest.mark.parametrize("path", sorted(presets_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_valid_and_names_its_run(path):
    command = next(
        line.split("train-")[1] for line in path.read_text().splitlines() if line.startswith("command:")
    )
    config = TrainConfig.build(
        command, preset=path.stem, **{} if "vae-ckpt:" in path.read_text() else {"vae_ckpt": "none"}
    )
    assert config.exp_name == path.stem
    if config.vae != "tiny":  # what claims to be the official run has its two slips as well
        assert config.train_pos_embed and config.lpips_range == (
            "official" if command == "repae" else "corrected"
        )


def test_unknown_presets_are_named():
    with pytest.raises(FileNotFoundError, match="there is no preset 'nowhere'"):
        TrainConfig.build("repae", preset="nowhere")


OFFICIAL_LOSSES = """# names and values of the official configs/l1_lpips_kl_gan.yaml
model: {vq_model: {quantize_mode: vae}}
losses: {discriminator_start: 0, discriminator_factor: 1.0, discriminator_weight: 0.1, quantizer_weight: 1.0,
  perceptual_loss: "lpips", perceptual_weight: 1.0, reconstruction_loss: "l1", reconstruction_weight: 1.0,
  lecam_regularization_weight: 0.0, kl_weight: 1e-6, logvar_init: 0.0}
"""


def test_loss_configuration(tmp_path):
    assert read_loss_config("configs/l1_lpips_kl_gan.yaml") == {}  # the defaults are that recipe
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
        "perceptual_loss: vgg": "only 'lpips'",
    }
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_loss_config(str(path))
    with pytest.raises(FileNotFoundError, match="loss configuration"):
        read_loss_config(str(tmp_path / "other.yaml"))
