"""Options of the training commands: every official flag, one place of validation, nothing ignored."""

import math

import pytest
import torch
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st

from repae_lite.commands.main import main, make_parser
from repae_lite.commands.presets import preset_content, preset_names, presets_dir, read_preset
from repae_lite.commands.rows import row_names
from repae_lite.commands.train_flags import config_from
from repae_lite.method.losses import VAELossConfig
from repae_lite.training import config as options
from repae_lite.training.build import build
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
    "micro_batches logging_steps sample_images eval_samples checkpointing_steps keep_last "
    "divergence_patience "
    "divergence_falls": {INSIDE: (1, 10**9), OUTSIDE: (0, -1)},
    "learning_rate vae_learning_rate disc_learning_rate": {
        INSIDE: (1e-30, 1e30),
        OUTSIDE: (0.0, -1e-30, 1e31, math.inf, math.nan),
    },
    "adam_epsilon max_grad_norm": {INSIDE: (1e-30, 1e30), OUTSIDE: (0.0, -1e-30, math.inf, math.nan)},
    "seed": {INSIDE: (0, 2**64 - 1), OUTSIDE: (-1, 2**64)},
    "num_workers": {INSIDE: (0, 1024), OUTSIDE: (-1, 1025)},
    "lr_warmup_steps sampling_steps eval_every milestone_steps resume_step": {
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
            if name in ("milestone_steps", "eval_samples"):
                company |= {"keep_last": 1} if name == "milestone_steps" else {"eval_every": 1}
            for value in values_of[INSIDE]:
                assert getattr(TrainConfig(**company, **{name: value}), name) == value
            for value in values_of[OUTSIDE]:
                with pytest.raises(ValueError, match=rf"^{flag(name)} is .*: it "):
                    TrainConfig(**company, **{name: value})


TINY = {  # the embedded scale, as chapter 05 trains it
    "data_dir": "embedded", "resolution": 32, "num_workers": 0, "vae_ckpt": "tiny", "loss_cfg_path": "tiny",
    "perceptual": "tiny", "model": "tiny", "enc_type": "tiny", "max_train_steps": 400, "batch_size": 32,
    "learning_rate": 1e-3, "vae_learning_rate": 2e-4, "lr_warmup_steps": 50, "ema_decay": 0.98,
    "logging_steps": 1, "sampling_steps": 200, "eval_protocol": "tiny", "checkpointing_steps": 100,
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


# What options act on: how it is turned off, and the end of the sentence.
OFF = {
    "encoder": ({"enc_type": "none", "vae_align_proj_coeff": 0.0}, "since --enc-type none has no targets"),
    "adam": ({"optimizer": "sgd"}, "to SGD"),
    "lpips": ({"perceptual": "tiny"}, "with --perceptual tiny"),
    "tracker": ({"report_to": "trackio"}, "with --report-to trackio"),
    "evaluations": ({"eval_every": 0}, "without --eval-every"),
    "grids": ({"sampling_steps": 0}, "with --sampling-steps 0"),
    "pruning": ({"keep_last": None}, "without --keep-last, since all checkpoints are kept"),
    "guard": ({"on_divergence": "off"}, "with --on-divergence off"),
    "half": ({"mixed_precision": "no"}, r"in precision no \(--mixed-precision no\)"),
    "fp16": ({"mixed_precision": "bf16"}, "in precision bf16"),
    "discriminator": ("discriminator_weight: 0", "loss.yaml has no adversarial loss"),
    "perceptual": ("perceptual_weight: 0", "loss.yaml has no perceptual loss"),
    "losses": ("{discriminator_weight: 0, perceptual_weight: 0}", "neither a perceptual nor an adversarial"),
}
SAID = {  # some value that is not the default
    "encoder_depth": 3, "projector": "conv", "enc_weights": "random", "proj_coeff": 0.7, "spatial_norm": 0.6,
    "cache_targets": "tokens.safetensors",
    "disc_pretrained_ckpt": "d.pt", "disc_learning_rate": 2e-4, "perceptual": "tiny",
    "lpips_range": "official", "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-4,
    "loss_precision": "autocast", "logging_dir": "elsewhere", "sample_images": 3, "milestone_steps": 7,
    "divergence_patience": 3, "divergence_variance": 0.5, "divergence_falls": 3,
    "eval_protocol": "mine.yaml", "eval_samples": 40, "eval_reference": "ref.npz",
}  # fmt: skip
ON = {
    "report_to": "wandb",
    "keep_last": 1,
    "mixed_precision": "fp16",
    "eval_every": 5,
}  # what the defaults leave off
ALWAYS = """exp_name output_dir seed data_dir resolution num_classes vae_latents_name num_workers vae vae_ckpt
loss_cfg_path model cfg_prob bn_momentum train_pos_embed enc_type vae_align_proj_coeff vae_diffusion_coeff
path_type prediction weighting max_train_steps epochs batch_size gradient_accumulation_steps learning_rate
vae_learning_rate lr_warmup_steps optimizer adam_weight_decay max_grad_norm ema_decay mixed_precision
allow_tf32 cpu compile gradient_checkpointing shard micro_batches report_to logging_steps sampling_steps
eval_every checkpointing_steps keep_last checkpoint_format resume resume_step continue_train_exp_dir
on_divergence""".split()
REFUSED_ALWAYS = ["qk_norm", "fused_attn", "wandb_history_path"]


def test_every_option_has_an_effect_or_a_condition():
    """Whoever adds an option says here, or by its `needs`, when it has an effect."""
    needing = {
        name: option.metadata["needs"] for name, option in OPTIONS.items() if "needs" in option.metadata
    }
    assert needing.keys() == SAID.keys()
    assert {need for needs in needing.values() for need in needs.split()} == OFF.keys()
    assert sorted([*needing, *ALWAYS, *REFUSED_ALWAYS]) == sorted(OPTIONS)
    for name in REFUSED_ALWAYS:
        assert "refusal" in OPTIONS[name].metadata


@pytest.mark.parametrize("name", SAID)
def test_an_option_without_effect_is_refused_and_its_default_is_not(name, tmp_path):
    meta = OPTIONS[name].metadata
    command = meta["only"][0]
    TrainConfig(command=command, **ON, **{name: SAID[name]})
    for need in meta["needs"].split():
        off, sentence = OFF[need]
        message = rf"^{flag(name)} means nothing .*{sentence}.*: leave it out$"
        if isinstance(off, dict):
            TrainConfig(command=command, **ON | off)
            with pytest.raises(ValueError, match=message):
                TrainConfig(command=command, **ON | off, **{name: SAID[name]})
        else:  # known when the losses' file has been read
            path = tmp_path / "loss.yaml"
            path.write_text(off)
            given = {"vae_ckpt": "none", "mixed_precision": "fp16", "loss_cfg_path": str(path)}
            config = TrainConfig.build(command, **given, **{name: SAID[name]})
            with pytest.raises(ValueError, match=message):
                build(config, 10, torch.device("cpu"))


def test_the_precision_that_auto_means_counts():
    config = TrainConfig.build("repae", vae="tiny", divergence_falls=3)
    config.check_precision("fp16")
    with pytest.raises(ValueError, match=r"--divergence-falls means nothing in precision bf16 \(--mixed-p"):
        config.check_precision("bf16")


def test_a_preset_may_be_overruled_but_not_contradict_itself(tmp_path, caplog):
    off = ("--enc-type", "none")
    with caplog.at_level("INFO"):
        config = parse("repae", "--preset", "repae-sdvae", *off)
    assert config.encoders is None and config.encoder_depth == 8
    assert "--encoder-depth of the preset means nothing since --enc-type none" in caplog.text
    with pytest.raises(ValueError, match="--proj-coeff means nothing since --enc-type none"):
        parse("repae", "--preset", "repae-sdvae", *off, "--proj-coeff", "0.7")
    path = tmp_path / "mine.yaml"
    path.write_text("vae: tiny\nenc-type: none\nvae-align-proj-coeff: 0\nproj-coeff: 0.7\n")
    with pytest.raises(ValueError, match="--proj-coeff means nothing"):
        parse("repae", "--preset", str(path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_train_steps": 2.9}, "--max-train-steps is 2.9: it must be of type int"),
        ({"batch_size": True}, "--batch-size is True: it must be of type int"),
        ({"batch_size": "8"}, "--batch-size is '8': it must be of type int"),
        (
            {"gradient_accumulation_steps": True},
            "is True: it must be of type int",
        ),  # which equals its default
        ({"cpu": 1}, "--cpu is 1: it must be of type bool"),
        ({"enc_type": None}, "--enc-type is None: it must be of type str"),
        ({"data_dir": " "}, "--data-dir is ' ': give a name or a path"),
        ({"output_dir": ""}, "--output-dir is '': give a name or a path"),
        ({"vae_ckpt": "a\0b"}, "--vae-ckpt is 'a.x00b': give a name or a path"),
    ],
)
def test_options_in_python_have_their_types(given, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.build("repae", **{"vae": "tiny"} | given)


def test_paths_and_whole_numbers_are_taken_for_what_they_mean(tmp_path):
    config = TrainConfig.build("repae", vae="tiny", output_dir=tmp_path, proj_coeff=1)
    assert config.output_dir == str(tmp_path) and type(config.proj_coeff) is float


@pytest.mark.parametrize(
    "words",
    [
        "train-vae --vae tiny --data-dir=",
        "train-ldm --vae tiny --vae-latents-name=",
        "train-repae --vae tiny --resume=",
        "train-repae --vae tiny --resume-step 3 --continue-train-exp-dir=",
        "preprocess --imagenet-path=",
        "preprocess --imagenet-path x --output-path=",
        "cache-latents --vae-latents-name a --vae-ckpt=",
        "export-vae --exp-path=",
        "download sdvae --output-dir=",
    ],
)
def test_an_empty_value_is_not_the_current_folder(words, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert "is '', without a letter: give a value, or leave it out" in error and error.count("\n") == 1


def test_a_mistake_is_one_sentence_and_exit_code_2(capsys):
    assert main(["train-repae", "--vae", "tiny", "--batch-size", "0"]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err == "repae train-repae: --batch-size is 0: it must be more than 0\n" and not captured.out
    )


def test_loader_processes_have_a_core_each(monkeypatch):
    found = {}
    for cores, processes in ((2, 1), (16, 2), (64, 8), (8, 8), (4, 8)):
        monkeypatch.setattr(options, "core_count", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        found[cores, processes] = TrainConfig.build("repae", vae_ckpt="none").workers
    assert list(found.values()) == [2, 4, 4, 1, 1]
    assert TrainConfig.build("repae", vae_ckpt="none", num_workers=0).workers == 0
    assert TrainConfig.build("repae", vae="tiny").workers == 0


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
shard sample_images checkpointing_steps keep_last milestone_steps checkpoint_format resume resume_step
continue_train_exp_dir on_divergence divergence_patience divergence_falls divergence_variance eval_every
eval_protocol eval_samples eval_reference""".split()


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
        ("", "holds nothing"),
        ("max-train-steps: 2.9", "is '2.9': it must be of type int"),
        ("batch-size: 8\nbatch-size: 9", "line 2: 'batch-size' is set a second time"),
        ("batch-size: 8\nbatch_size: 9", "sets batch_size twice, once as 'batch_size'"),
        ("a: &a [*a]", "line 1: this list or section is used a second time by its &name"),
        ("a: &a {b: *a}", "line 1: this list or section is used a second time by its &name"),
        ("a: " + "[" * 5000, "is nested too deeply"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: the tag .*os.system is not known here"),
        ("? [a]\n: b", "line 1: give a word as a name"),
        ("vae: tiny\n---\nvae: tiny", "line 2: but found another document"),
        ("vae:\ttiny\n\tmodel: tiny", "is not YAML"),
        ('exp-name: "\\ud800"', "is no text"),
        ('exp-name: "\\UFFFFFFFF"', "is not YAML"),
        ("learning-rate: .nan", "--learning-rate is nan"),
        ("learning-rate: -.inf", "--learning-rate is -inf"),
        ("released: sdvae", "released in the preset .* is 'sdvae': give a list of names"),
        ("a: [", "is not YAML"),
    ],
)
def test_presets_that_do_not_fit_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("repae", "--preset", str(path))


def test_a_value_is_what_is_written(tmp_path):
    path = tmp_path / "mine.yaml"
    text = """command: train-vae\nmixed-precision: no\nexp-name: 007\nmax-train-steps: 1e3
batch-size: &size 8\nmicro-batches: *size\ncpu: yes\ncompile: Off
vae-learning-rate: 1e-4\ndata-dir: 2026-01-01\n"""
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        assert read_preset(str(path)).options == {
            "mixed_precision": "no", "exp_name": "007", "max_train_steps": 1000, "batch_size": 8,
            "micro_batches": 8, "cpu": True, "compile": False, "vae_learning_rate": 1e-4,
            "data_dir": "2026-01-01",
        }  # fmt: skip


def test_files_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    for content in (bytes(range(256)), "exp-name: Größe".encode("latin-1"), b"a" * 1_000_001):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not YAML|is larger than 1,000,000 bytes"):
            read_preset(str(path))


YAML = st.text(alphabet="ab:-?,[]{}&*!|>'\"%@#~<0.\\Uux \n\t\r", max_size=60) | st.text(max_size=20)


@settings(max_examples=150, deadline=None, derandomize=True)
@examples(content=YAML.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60))
def test_any_bytes_are_names_and_values_or_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    for read in (lambda: read_preset(str(path), "vae"), lambda: read_loss_config(str(path))):
        try:
            read()
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_and_names_its_run(name):
    preset = read_preset(name)
    config = TrainConfig.build(preset.command, **preset.options)
    assert config.exp_name == name and preset.config == config
    if name in row_names():  # what claims to be the official joint run has its two slips as well (D1, D2)
        joint = preset.command == "repae"
        assert config.train_pos_embed == joint
        assert config.lpips_range == ("official" if joint else "corrected")
        assert len(preset.released) == (config.vae_ckpt != "none")
        assert preset.images == 1_281_167  # ImageNet's training images
    elif config.vae == "tiny":
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
    known, others = preset_names(based=False), len(preset_names()) - len(preset_names(based=False))
    message = rf": known are {', '.join(known)} and {others} others \(repae reproduce --list\)$"
    with pytest.raises(FileNotFoundError, match="there is no preset 'nowhere' .*" + message):
        parse("repae", "--preset", "nowhere")
    with pytest.raises(FileNotFoundError, match="known are repae-sdvae, repa-sdvae, "):
        parse("repae", "--preset", "repae-sdva")


def test_a_preset_on_a_base_changes_or_leaves_out_options_and_keeps_its_basis(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: repae-sdvae\nmodel: SiT-B/2\nencoder-depth:\ndisc-pretrained-ckpt: null\n")
    mine, base = read_preset(str(path)), read_preset("repae-sdvae")
    left_out = {"exp_name", "encoder_depth", "disc_pretrained_ckpt"}
    assert mine.options == {k: v for k, v in base.options.items() if k not in left_out} | {"model": "SiT-B/2"}
    assert mine.released == base.released and mine.command == base.command
    content, of_base = preset_content(path), preset_content(presets_dir() / "repae-sdvae.yaml")
    assert all(content[key] == of_base[key] for key in ("tolerance", "basis", "cost", "differences"))
    assert not content.keys() & {"title", "source", "published", "base"}
    path.write_text("base: repae-l-sdvae\n")
    with pytest.raises(ValueError, match="has the base 'repae-l-sdvae': name a preset that has none itself"):
        read_preset(str(path))


@pytest.mark.parametrize(("name", "message"), [
    ("dit-sdvae", "the row dit-sdvae is not built: DiT's noise"),
    ("rec-sdvae", "the row rec-sdvae trains nothing: see repae reproduce rec-sdvae --dry-run"),
])  # fmt: skip
def test_rows_that_train_nothing_are_no_presets(name, message):
    with pytest.raises(ValueError, match=message):
        parse("ldm", "--preset", name)


OFFICIAL_LOSSES = """# names and values of the official configs/l1_lpips_kl_gan.yaml
model: {vq_model: {quantize_mode: vae}}
losses: {discriminator_start: 0, discriminator_factor: 1.0, discriminator_weight: 0.1, quantizer_weight: 1.0,
  perceptual_loss: "lpips", perceptual_weight: 1.0, reconstruction_loss: "l1", reconstruction_weight: 1.0,
  lecam_regularization_weight: 0.0, kl_weight: 1e-6, logvar_init: 0.0}
"""


def test_loss_configuration(tmp_path):
    assert read_loss_config("configs/l1_lpips_kl_gan.yaml") == {}  # the defaults are that recipe
    assert read_loss_config("tiny") == read_loss_config("configs/l1_lpips_kl.yaml") == {"gan_weight": 0.0}
    with pytest.raises(FileNotFoundError, match=r"nothere/l1_lpips_kl_gan.yaml does not exist"):
        read_loss_config("nothere/l1_lpips_kl_gan.yaml")
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
        "discriminator_factor: two": "must be of type float",
        "{a: {kl_weight: 1}, b: {kl_weight: 2}}": "sets 'kl_weight' in two sections",
    }
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_loss_config(str(path))
    with pytest.raises(FileNotFoundError, match="loss configuration"):
        read_loss_config(str(tmp_path / "other.yaml"))
