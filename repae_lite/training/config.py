"""Every option of the training commands, said once: its name, default, meaning, and which commands take it.

`TrainConfig` is what `repae_lite.training.trainer.train` reads; the flags of `repae train-repae`, `train-ldm`
and `train-vae` are made from its fields, so a flag cannot exist without being honoured. Names and meanings of
the official scripts are kept. No PyTorch here: `--help` is instant, and so are the loader's worker processes.
"""

import argparse
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from repae_lite.training.option_files import OFFICIAL_LOSS, converted, read_yaml

COMMANDS = {
    "repae": "tune a VAE and a SiT together (REPA-E), with the official flags",
    "ldm": "train a SiT on a frozen VAE: REPA, or a plain SiT with --enc-type none",
    "vae": "train a VAE, and its discriminator, on any images",
}
GROUPS = {
    "run": "the run and its folder, OUTPUT_DIR/EXP_NAME",
    "data": "data",
    "vae": "the VAE",
    "sit": "the SiT",
    "method": "the method",
    "optimisation": "optimisation",
    "machine": "precision, memory and speed",
    "log": "what is shown while it runs",
    "checkpoint": "checkpoints and resuming",
    "guard": "the collapse guard",
}
FORMATS = ("safetensors", "official", "both")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
NONE = "none"

EXIT_CODES = """exit codes: 0 finished; 2 a mistake in the command, the data or the disk, told in one sentence; 3 halted by the
collapse guard; 143 stopped by SIGTERM or SIGUSR1 and 130 by Ctrl-C, in both cases after the running step and with a checkpoint: the
same command with --resume latest goes on, on a CPU to the bit, as if nothing had happened. A killed run (SIGKILL, power) goes on from
its last checkpoint in the same way."""


def _option(
    default: Any, text: str, group: str, *, only: str = "repae ldm vae", free: bool = False, **more
) -> Any:
    """A field with its flag. `only`: the commands that take it; `free`: it may change when a run is resumed."""
    return field(
        default=default, metadata={"help": text, "group": group, "only": only.split(), "free": free, **more}
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run; `build` fills in what depends on others. None means "not said".

    Raises:
        ValueError: an option is out of range, or not for this command.
    """

    command: str
    exp_name: str = _option("run", "name of the run's folder", "run", free=True)
    output_dir: str = _option("exps", "where run folders are", "run", free=True)
    seed: int = _option(0, "of the initial weights, the order of images and every draw", "run")

    data_dir: str = _option(
        "data", "images.h5 or its folder (repae preprocess), or a folder of images; with --vae tiny the embedded images", "data",
        free=True,
    )  # fmt: skip
    resolution: int = _option(256, "side of the images, pixels; an image folder is cropped to it", "data")
    num_classes: int | None = _option(
        None, "classes (default: as many as the data has)", "data", only="repae ldm"
    )
    vae_latents_name: str | None = _option(
        None, "train on DATA_DIR/NAME.h5, written by repae cache-latents, instead of encoding images", "data", only="ldm",
        metavar="NAME",
    )  # fmt: skip
    num_workers: int = _option(
        4, "loader processes per training process; the result does not depend on it", "data", free=True
    )

    vae: str = _option(
        "f8d4", "architecture; tiny is the embedded small scale, with its own defaults for all of this", "vae",
        choices=("f8d4", "f16d32", "tiny"),
    )  # fmt: skip
    vae_ckpt: str | None = _option(
        None,
        "its weights: a file that repae_lite.load_vae reads, or none to start from scratch",
        "vae",
        free=True,
    )
    disc_pretrained_ckpt: str | None = _option(
        None,
        "the discriminator's first weights (default: from scratch)",
        "vae",
        only="repae vae",
        metavar="FILE",
        free=True,
    )
    loss_cfg_path: str = _option(
        OFFICIAL_LOSS,
        f"YAML with the weights of the VAE's losses; {OFFICIAL_LOSS} is built in",
        "vae",
        only="repae vae",
        metavar="FILE",
    )
    perceptual: str = _option(
        "lpips", "perceptual network: lpips (downloads VGG-16 once) or tiny (ships with the project)", "vae", only="repae vae",
        choices=("lpips", "tiny"),
    )  # fmt: skip
    lpips_range: str = _option(
        "corrected", "official lets LPIPS see [-3, 1] as the released run did, corrected [-1, 1] (D1)", "vae", only="repae vae",
        choices=("corrected", "official"),
    )  # fmt: skip

    model: str = _option("SiT-XL/2", "SiT-{S,B,L,XL}/{1,2,4,8}, or tiny", "sit", only="repae ldm")
    encoder_depth: int | None = _option(
        None,
        "the features after this many blocks are aligned (default: REPA's choice, 8 for XL and L, 4 for B)",
        "sit",
        only="repae ldm",
    )
    projector: str = _option(
        "mlp", "from SiT features to encoder tokens: mlp, or iREPA's conv, a 3x3 convolution", "sit", only="repae ldm",
        choices=("mlp", "conv"),
    )  # fmt: skip
    cfg_prob: float = _option(0.1, "share of labels dropped, for guidance", "sit", only="repae ldm")
    bn_momentum: float = _option(
        0.1,
        "weight of a new batch in the running latent statistics (those of a frozen VAE stay as they are)",
        "sit",
        only="repae",
    )
    train_pos_embed: bool = _option(
        False, "let the position embedding train, as the official run does (D2)", "sit", only="repae ldm"
    )
    qk_norm: bool = _option(
        False, "official flag, not built", "sit", only="repae ldm",
        refusal="no released SiT normalises queries and keys, and none here can: leave it out",
    )  # fmt: skip
    fused_attn: bool = _option(
        True, "PyTorch's fused attention, always", "sit", only="repae ldm",
        refusal="attention is PyTorch's fused one, which falls back by itself where there is none: leave it out",
    )  # fmt: skip

    enc_type: str = _option(
        "dinov2-vit-b",
        "vision encoder to align with; several as a,b; none for a plain SiT",
        "method",
        only="repae ldm",
    )
    enc_weights: str = _option(
        "pretrained",
        "its weights: pretrained (downloaded once), a file for each encoder as a,b, or random",
        "method",
        only="repae ldm",
    )
    proj_coeff: float = _option(
        0.5, "weight of the alignment loss in the SiT step", "method", only="repae ldm"
    )
    spatial_norm: float | None = _option(
        None, "iREPA: subtract this share of the mean over an image's tokens from its targets and divide by their spread, 0.6 in its "
        "code (default: targets as they are)", "method", only="repae ldm", metavar="GAMMA",
    )  # fmt: skip
    vae_align_proj_coeff: float = _option(
        1.5, "weight of the alignment loss that reaches the VAE", "method", only="repae"
    )
    vae_diffusion_coeff: float = _option(
        0.0,
        "weight of the velocity loss let into the VAE: more than 0 is naive end-to-end training, for study",
        "method",
        only="repae",
    )
    path_type: str = _option(
        "linear", "the path from data to noise", "method", only="repae ldm", choices=("linear", "cosine")
    )
    prediction: str = _option("v", "what SiT predicts: velocity", "method", only="repae ldm", choices=("v",))
    weighting: str = _option(
        "uniform", "how times are drawn", "method", only="repae ldm", choices=("uniform", "lognormal")
    )

    max_train_steps: int = _option(400_000, "optimiser steps", "optimisation", free=True)
    epochs: int | None = _option(
        None, "stop after so many passes over the data, if that is earlier", "optimisation", free=True
    )
    batch_size: int = _option(
        256, "images per step over ALL processes (the official meaning)", "optimisation"
    )
    gradient_accumulation_steps: int = _option(1, "a step uses so many batches", "optimisation")
    learning_rate: float = _option(1e-4, "of the SiT", "optimisation", only="repae ldm")
    vae_learning_rate: float = _option(1e-4, "of the VAE", "optimisation", only="repae vae")
    disc_learning_rate: float = _option(1e-4, "of the discriminator", "optimisation", only="repae vae")
    lr_warmup_steps: int = _option(0, "steps over which learning rates rise from 0", "optimisation")
    optimizer: str = _option("AdamW", "a class of torch.optim", "optimisation")
    adam_beta1: float = _option(0.9, "first beta of Adam's family", "optimisation")
    adam_beta2: float = _option(0.999, "second beta of Adam's family", "optimisation")
    adam_weight_decay: float = _option(0.0, "weight decay", "optimisation")
    adam_epsilon: float = _option(1e-8, "epsilon of Adam's family", "optimisation")
    max_grad_norm: float = _option(
        1.0, "gradients are clipped to this norm, each network apart", "optimisation"
    )
    ema_decay: float = _option(0.9999, "of the SiT's moving average", "optimisation", only="repae ldm")

    mixed_precision: str = _option(
        "auto", "auto is bf16 on a GPU that has it and no elsewhere; fp16 is the official run's", "machine",
        choices=("auto", "no", "fp16", "bf16"),
    )  # fmt: skip
    loss_precision: str = _option(
        "float32", "of LPIPS and discriminator in mixed precision: float32, as officially, or autocast, faster (D11)", "machine",
        only="repae vae", choices=("float32", "autocast"),
    )  # fmt: skip
    allow_tf32: bool = _option(False, "TF32 for float32 products on NVIDIA GPUs", "machine")
    cpu: bool = _option(False, "use no GPU", "machine")
    compile: bool = _option(
        False,
        "torch.compile for SiT blocks and VAE; left out, with a sentence, where it does not work",
        "machine",
    )
    gradient_checkpointing: bool = _option(
        False, "recompute activations: less memory, about a third more time", "machine", free=True
    )
    micro_batches: int = _option(
        1, "cut every process's batch in so many parts: less memory, the same step", "machine", free=True
    )

    report_to: str = _option(
        "none",
        "tracker, through accelerate; metrics.jsonl is always written",
        "log",
        choices=TRACKERS,
        free=True,
    )
    logging_dir: str = _option(
        "logs", "folder of tensorboard's and wandb's files, in OUTPUT_DIR (trackio has its own: TRACKIO_DIR)", "log", free=True,
    )  # fmt: skip
    wandb_history_path: str | None = _option(
        None, "official flag, not built", "log", free=True,
        refusal="old curves are not sent again: metrics.jsonl keeps all of them",
    )  # fmt: skip
    logging_steps: int = _option(10, "steps between two lines of metrics.jsonl", "log", free=True)
    sampling_steps: int = _option(10_000, "steps between two sample grids, 0 for none", "log", free=True)
    sample_images: int = _option(16, "images of a grid", "log", free=True)

    checkpointing_steps: int = _option(50_000, "steps between two checkpoints", "checkpoint", free=True)
    keep_last: int | None = _option(
        None,
        "remove checkpoints but the last N and the milestones (default: keep all)",
        "checkpoint",
        free=True,
        metavar="N",
    )
    milestone_steps: int = _option(
        0, "checkpoints at multiples of this are never removed, 0 for no milestones", "checkpoint", free=True
    )
    checkpoint_format: str = _option(
        "safetensors", "safetensors (a folder), official (NNNNNNN.pt as the official code writes it), or both", "checkpoint",
        choices=FORMATS, free=True,
    )  # fmt: skip
    resume: str | None = _option(
        None, "latest (starts from nothing if there is no checkpoint), a step, or the path of another run's checkpoint", "checkpoint",
        free=True, metavar="latest|STEP|PATH",
    )  # fmt: skip
    resume_step: int = _option(
        0, "the official spelling of --resume STEP; 0 is none", "checkpoint", free=True
    )
    continue_train_exp_dir: str | None = _option(
        None,
        "the run folder in which --resume-step counts (default: this run's)",
        "checkpoint",
        free=True,
        metavar="FOLDER",
    )

    on_divergence: str = _option(
        "halt", "what a collapse does: halt; rollback to the last good checkpoint with half the learning rates and loss scales, three "
        "times at most; off. Reports are kept in divergence/", "guard", choices=("halt", "rollback", "off"),
        free=True,
    )  # fmt: skip
    divergence_patience: int = _option(50, "steps that a gradient norm may stay at zero", "guard", free=True)
    divergence_falls: int = _option(
        10, "times that an fp16 loss scale may fall without having risen", "guard", free=True
    )
    divergence_variance: float = _option(
        0.05,
        "share of their first spatial variance that latents must keep; 0 for no limit",
        "guard",
        only="repae vae",
        free=True,
    )

    def __post_init__(self):
        if self.command not in COMMANDS:
            raise ValueError(
                f"unknown training command {self.command!r}: choose one of {', '.join(COMMANDS)}"
            )
        for option in options():
            value = getattr(self, option.name)
            choices = option.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{flag(option.name)} is {value!r}: choose one of {', '.join(choices)}")
            if self.command not in option.metadata["only"] and value != option.default:
                raise ValueError(f"{flag(option.name)} means nothing to train-{self.command}: leave it out")
            if "refusal" in option.metadata and value != option.default:
                raise ValueError(f"{flag(option.name)} is {value!r}: {option.metadata['refusal']}")
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        positive = (
            "resolution num_classes encoder_depth max_train_steps epochs batch_size "
            "gradient_accumulation_steps micro_batches "
            "logging_steps sample_images checkpointing_steps keep_last divergence_patience divergence_falls "
            "learning_rate vae_learning_rate disc_learning_rate adam_epsilon max_grad_norm"
        )
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{flag(name)} is {value}: it must be more than 0")
        not_negative = (
            "seed num_workers proj_coeff vae_align_proj_coeff vae_diffusion_coeff lr_warmup_steps "
            "adam_weight_decay sampling_steps "
            "milestone_steps resume_step"
        )
        for name in not_negative.split():
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}: it must be 0 or more")
        for name in ("cfg_prob", "adam_beta1", "adam_beta2", "ema_decay", "divergence_variance"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{flag(name)} is {getattr(self, name)}: it is a share, from 0 up to (not including) 1"
                )
        if self.spatial_norm is not None and not 0 <= self.spatial_norm <= 1:
            raise ValueError(f"--spatial-norm is {self.spatial_norm}: it is a share, from 0 to 1")
        if not 0 < self.bn_momentum <= 1:
            raise ValueError(f"--bn-momentum is {self.bn_momentum}: it is a share, above 0 and at most 1")
        if not self.exp_name or self.exp_name in (".", "..") or {"/", "\\"} & set(self.exp_name):
            raise ValueError(
                f"--exp-name is {self.exp_name!r}: give the name of a folder, and its place with --output-dir"
            )

    def _check_combinations(self) -> None:
        if self.resume and self.resume_step:
            raise ValueError(
                f"--resume {self.resume} and --resume-step {self.resume_step} were both given: leave one out"
            )
        if self.continue_train_exp_dir and not self.resume_step:
            raise ValueError(
                f"--continue-train-exp-dir {self.continue_train_exp_dir} needs the step in it: give "
                "--resume-step N"
            )
        if self.command == "vae":
            return
        if not self.encoders and (self.spatial_norm is not None or self.projector != "mlp"):
            raise ValueError(
                "--enc-type none has no targets and no projector: leave --spatial-norm and --projector out"
            )
        if not self.encoders and (self.vae_align_proj_coeff if self.command == "repae" else 0):
            raise ValueError(
                "--enc-type none leaves nothing to align with, but --vae-align-proj-coeff is "
                f"{self.vae_align_proj_coeff}: set it to 0"
            )
        if self.command == "ldm" and self.vae_ckpt == NONE:
            raise ValueError("train-ldm needs a trained VAE, which stays as it is: give --vae-ckpt FILE")

    @classmethod
    def build(cls, command: str, **given) -> "TrainConfig":
        """A config of the options given, the defaults of their scale, and those of their preset (`preset=NAME
        or FILE`).

        Raises:
            ValueError, FileNotFoundError: also for a preset that is not there or names other options.
        """
        preset = read_preset(given.pop("preset", None), command)
        given = preset | given
        tiny = given.get("vae") == "tiny"
        defaults = (
            {name: value for name, value in TINY.items() if command in _fields()[name].metadata["only"]}
            if tiny
            else {}
        )
        if command == "vae":
            defaults["vae_ckpt"] = NONE
        config = cls(command=command, **defaults | given)
        if config.vae_ckpt is None:
            raise ValueError(
                "say where the VAE's weights are: --vae-ckpt "
                f"FILE{', or none to start from scratch' if command == 'repae' else ''}"
            )
        return config

    @property
    def encoders(self) -> str | None:
        """Names of the vision encoders, or None for a plain SiT."""
        return None if self.command == "vae" or self.enc_type == NONE else self.enc_type

    @property
    def images_per_step(self) -> int:
        """Images of an optimiser step, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.exp_name

    @property
    def resume_from(self) -> str | None:
        """ "latest", a step or a path; None for a new run."""
        if self.continue_train_exp_dir:
            path = Path(self.continue_train_exp_dir) / "checkpoints" / f"{self.resume_step:07d}"
            return str(path if path.is_dir() else path.with_suffix(".pt"))
        return self.resume or (str(self.resume_step) if self.resume_step else None)

    def fixed(self) -> dict[str, Any]:
        """The options that a resumed run must have in common with its beginning: those that its numbers
        depend on.
        """
        return {
            o.name: getattr(self, o.name)
            for o in options()
            if not o.metadata["free"] and self.command in o.metadata["only"]
        } | {"command": f"train-{self.command}"}


# What the embedded scale has instead; explicit flags win. No adversarial term: it cost 2 dB on 32-pixel
# icons.
TINY = {
    "data_dir": "embedded",
    "resolution": 32,
    "num_workers": 0,
    "vae_ckpt": "tiny",
    "loss_cfg_path": "tiny",
    "perceptual": "tiny",
    "model": "tiny",
    "enc_type": "tiny",
    "max_train_steps": 400,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "vae_learning_rate": 2e-4,
    "lr_warmup_steps": 50,
    "ema_decay": 0.98,
    "logging_steps": 1,
    "sampling_steps": 200,
    "checkpointing_steps": 100,
}


def options() -> list:
    """The fields of `TrainConfig` that are flags."""
    return [f for f in fields(TrainConfig) if f.metadata]


def _fields() -> dict:
    return {f.name: f for f in options()}


def flag(name: str) -> str:
    """How a field is spelt on the command line."""
    return "--" + name.replace("_", "-")


def differences(stored: dict, config: TrainConfig) -> list[str]:
    """Sentences on options of a stored run (args.json) that would change its course."""
    return [
        f"{flag(name)} was {stored[name]!r} and is now {value!r}"
        for name, value in config.fixed().items()
        if name in stored and stored[name] != (list(value) if isinstance(value, tuple) else value)
    ]


# ---------------------------------------------------------------- the command line


def add_training_command(commands: argparse._SubParsersAction, command: str) -> argparse.ArgumentParser:
    """Adds `train-<command>` with its flags; the parsed namespace has `train_command` and the options that
    were given.
    """
    parser = commands.add_parser(
        f"train-{command}",
        help=COMMANDS[command],
        description=COMMANDS[command][0].upper() + COMMANDS[command][1:] + ".",
        epilog=EXIT_CODES,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.set_defaults(train_command=command)
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    groups["run"].add_argument(
        "--preset",
        metavar="NAME",
        help="options from reproduce/presets/NAME.yaml or a file like it; explicit flags win",
    )
    for option in options():
        if command in option.metadata["only"]:
            groups[option.metadata["group"]].add_argument(flag(option.name), **_arguments(option, command))
    return parser


def _arguments(option, command: str) -> dict[str, Any]:
    """What argparse wants to know of an option."""
    default, text, meta = option.default, option.metadata["help"], option.metadata
    if command == "vae" and option.name == "vae_ckpt":
        default = NONE
    if default is not None and default is not False:
        tiny = f"; tiny: {TINY[option.name]:g}" if isinstance(TINY.get(option.name), float | int) else ""
        text = (
            f"{text} (default: {default:g}{tiny})"
            if isinstance(default, float)
            else f"{text} (default: {default}{tiny})"
        )
    kind = _kind(option)
    more: dict[str, Any] = {"help": text.replace("%", "%%")}
    if kind is bool:
        more["action"] = argparse.BooleanOptionalAction
    else:
        more["type"] = kind
        if meta.get("choices"):
            more["choices"] = meta["choices"]
        else:
            more["metavar"] = meta.get("metavar", {int: "N", float: "X", str: "NAME"}[kind])
    return more


def _kind(option) -> type:
    """The type of an option's value; `int | None` is int."""
    kinds = option.type.__args__ if hasattr(option.type, "__args__") else (option.type,)
    return next(kind for kind in kinds if kind is not type(None))


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The config of a parsed command line. Errors as in `TrainConfig.build`."""
    given = {name: value for name, value in vars(args).items() if name == "preset" or name in _fields()}
    return TrainConfig.build(args.train_command, **given)


# ---------------------------------------------------------------- files with options


def presets_dir() -> Path:
    """Where presets are: reproduce/presets beside the package."""
    return Path(__file__).resolve().parents[2] / "reproduce" / "presets"


def read_preset(name: str | None, command: str) -> dict[str, Any]:
    """The options of a preset, for this command; empty for None.

    Raises:
        ValueError: it is for another command, or names an option that the command does not have, or a value
            of another type.
        FileNotFoundError: no such preset.
    """
    if name is None:
        return {}
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else presets_dir() / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in presets_dir().glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"there is no preset {name!r} ({path}): known are {known}")
    content = {
        str(key).lstrip("-").replace("-", "_"): value for key, value in read_yaml(path, "preset").items()
    }
    wanted = str(content.pop("command", f"train-{command}"))
    if wanted != f"train-{command}":
        raise ValueError(f"the preset {name} is for repae {wanted}, not for train-{command}")
    for key, value in content.items():
        if key not in _fields() or command not in _fields()[key].metadata["only"]:
            raise ValueError(
                f"the preset {path} sets {key!r}, which train-{command} does not have: take it out"
            )
        content[key] = converted(value, _kind(_fields()[key]), f"{key} in the preset {path}")
    return content


def values(config: TrainConfig) -> dict[str, Any]:
    """The options by name, as args.json holds them; the names are the official ones."""
    return {"command": f"train-{config.command}"} | {
        option.name: getattr(config, option.name) for option in options()
    }
