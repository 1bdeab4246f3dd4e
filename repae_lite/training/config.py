"""Every option of the training commands, said once: name, default, range, meaning, the commands that take it.

`TrainConfig` is what `repae_lite.training.trainer.train` reads; the flags of `repae train-repae`, `train-ldm`
and `train-vae` are made from its fields, so a flag cannot exist without being honoured. Names and meanings of
the official scripts are kept. No PyTorch here: `--help` is instant, and so are the loader's worker processes.
Numbers such as D1 are those of DIFFERENCES.md.

**An option is honoured or refused with a reason, never ignored.** What an option acts on stands beside it, as
`needs`; where that is missing (an encoder, a discriminator, fp16, …) the option is refused, but for three
cases. A value that is its default is harmless: official commands repeat defaults. So is a preset's value
whose subject a flag turned off, as in `--preset repae-sdvae --enc-type none`: the run says so and goes on.
And what only a machine lacks is not refused (--allow-tf32, --compile): one command should run on all of them.
"""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from repae_lite.utils.cores import core_count

COMMANDS = ("repae", "ldm", "vae")
FORMATS = ("safetensors", "official", "both")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
NONE = "none"
OFFICIAL_LOSS, NO_GAN = "l1_lpips_kl_gan.yaml", "l1_lpips_kl.yaml"
logger = logging.getLogger(__name__)

# Ranges: the end of the sentence that refuses a value, and whether a value is inside.
POSITIVE = ("must be more than 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = ("must be 0 or more", lambda value: 0 <= value < math.inf)
SEED = ("must be from 0 to 2**64 - 1", lambda value: 0 <= value < 2**64)
RATE = ("must be more than 0, and at most 1e30", lambda value: 0 < value <= 1e30)  # float32 holds it
WORKERS = ("must be from 0 to 1024", lambda value: 0 <= value <= 1024)  # each is a process
SHARE = ("is a share, from 0 up to (not including) 1", lambda value: 0 <= value < 1)
SHARE_OR_ALL = ("is a share, from 0 to 1", lambda value: 0 <= value <= 1)
SHARE_OF_NEW = ("is a share, above 0 and at most 1", lambda value: 0 < value <= 1)
FOLDER_NAME = (
    "must be the name of a folder, whose place is --output-dir",
    lambda value: value not in ("", ".", "..") and not {"/", "\\"} & set(value),
)


def _option(default: Any, text: str, group: str, *, only: str = "repae ldm vae", **more) -> Any:
    """A field with its flag.

    Args:
        default: of the full scale.
        text: for `--help`.
        group: the heading under which `--help` shows it.
        only: the commands that take it.
        more: `within`, its range; `choices`; `tiny`, the embedded scale's default; `free`, True if it may
            change when a run is resumed; `metavar`; `refusal`, why only the default is built; `needs`, what
            it acts on, as `TrainConfig.refuse_idle` names it, several as "a b".
    """
    return field(default=default, metadata={"help": text, "group": group, "only": only.split(), **more})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run; `build` fills in what depends on others. None means "not said".

    Attributes:
        command: "repae", "ldm" or "vae".
        sources: "preset" or "flag" for options that came from there; in Python there is nothing to say.

    Raises:
        ValueError: an option of another type, out of range, without effect, or not for this command.
    """

    command: str
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    exp_name: str = _option("run", "name of the run's folder", "run", within=FOLDER_NAME, free=True)
    output_dir: str = _option("exps", "where run folders are", "run", free=True)
    seed: int = _option(0, "of the initial weights, the order of images and every draw", "run", within=SEED)

    data_dir: str = _option(
        "data",
        "images.h5 or its folder (repae preprocess), a folder of images, or WebDataset shards: a folder of "
        "them, 'train-{000..099}.tar', or 'hf://datasets/OWNER/NAME/train-{000..099}.tar'; with --vae tiny "
        "the embedded images",
        "data",
        tiny="embedded",
        free=True,
    )
    resolution: int = _option(
        256,
        "side of the images, pixels; folders and shards are cropped to it",
        "data",
        within=POSITIVE,
        tiny=32,
    )
    num_classes: int | None = _option(
        None, "classes (default: as many as the data has)", "data", only="repae ldm", within=POSITIVE
    )
    vae_latents_name: str | None = _option(
        None,
        "train on DATA_DIR/NAME.h5, written by repae cache-latents, instead of encoding images",
        "data",
        only="ldm",
    )
    num_workers: int | None = _option(
        None,
        "loader processes per training process; the result does not depend on it (default: 4, but no more "
        "than the cores it has)",
        "data",
        within=WORKERS,
        tiny=0,
        free=True,
    )

    vae: str = _option(
        "f8d4",
        "architecture; tiny is the embedded small scale, with its own defaults for all of this",
        "vae",
        choices=("f8d4", "f16d32", "tiny"),
    )
    vae_ckpt: str | None = _option(
        None,
        "its weights: a file that repae_lite.load_vae reads, or none to start from scratch",
        "vae",
        tiny="tiny",
        free=True,
    )
    disc_pretrained_ckpt: str | None = _option(
        None,
        "the discriminator's first weights (default: from scratch)",
        "vae",
        only="repae vae",
        metavar="FILE",
        free=True,
        needs="discriminator",
    )
    loss_cfg_path: str = _option(
        OFFICIAL_LOSS,
        f"YAML with the weights of the VAE's losses; {OFFICIAL_LOSS} is built in, and {NO_GAN}, the same "
        "without the adversarial term",
        "vae",
        only="repae vae",
        tiny="tiny",  # no adversarial term: it cost 0.6 dB of PSNR on 32-pixel icons
        metavar="FILE",
    )
    perceptual: str = _option(
        "lpips",
        "perceptual network: lpips (downloads VGG-16 once) or tiny (ships with the project)",
        "vae",
        only="repae vae",
        choices=("lpips", "tiny"),
        tiny="tiny",
        needs="perceptual",
    )
    lpips_range: str = _option(
        "corrected",
        "official lets LPIPS see [-3, 1] as the released run did, corrected [-1, 1] (D1)",
        "vae",
        only="repae vae",
        choices=("corrected", "official"),
        needs="perceptual lpips",
    )

    model: str = _option(
        "SiT-XL/2", "SiT-{S,B,L,XL}/{1,2,4,8}, or tiny", "sit", only="repae ldm", tiny="tiny"
    )
    encoder_depth: int | None = _option(
        None,
        "the features after this many blocks are aligned (default: REPA's choice, 8 for XL and L, 4 for B)",
        "sit",
        only="repae ldm",
        within=POSITIVE,
        needs="encoder",
    )
    projector: str = _option(
        "mlp",
        "from SiT features to encoder tokens: mlp, or iREPA's conv, a 3x3 convolution",
        "sit",
        only="repae ldm",
        choices=("mlp", "conv"),
        needs="encoder",
    )
    cfg_prob: float = _option(
        0.1, "share of labels dropped, for guidance", "sit", only="repae ldm", within=SHARE
    )
    bn_momentum: float = _option(
        0.1,
        "weight of a new batch in the running latent statistics (those of a frozen VAE stay as they are)",
        "sit",
        only="repae",
        within=SHARE_OF_NEW,
    )
    train_pos_embed: bool = _option(
        False, "let the position embedding train, as the official run does (D2)", "sit", only="repae ldm"
    )
    qk_norm: bool = _option(
        False,
        "official flag, not built",
        "sit",
        only="repae ldm",
        refusal="no released SiT normalises queries and keys, and none here can: leave it out",
    )
    fused_attn: bool = _option(
        True,
        "PyTorch's fused attention, always",
        "sit",
        only="repae ldm",
        refusal="attention is PyTorch's fused one, which falls back by itself where there is none: leave it "
        "out",
    )

    enc_type: str = _option(
        "dinov2-vit-b",
        "vision encoder to align with; several as a,b; none for a plain SiT",
        "method",
        only="repae ldm",
        tiny="tiny",
    )
    enc_weights: str = _option(
        "pretrained",
        "its weights: pretrained (downloaded once), a file for each encoder as a,b, or random",
        "method",
        only="repae ldm",
        needs="encoder",
    )
    proj_coeff: float = _option(
        0.5,
        "weight of the alignment loss in the SiT step",
        "method",
        only="repae ldm",
        within=NOT_NEGATIVE,
        needs="encoder",
    )
    spatial_norm: float | None = _option(
        None,
        "iREPA: subtract this share of the mean over an image's tokens from its targets and divide by their "
        "spread, 0.6 in its code (default: targets as they are)",
        "method",
        only="repae ldm",
        within=SHARE_OR_ALL,
        metavar="GAMMA",
        needs="encoder",
    )
    vae_align_proj_coeff: float = _option(
        1.5, "weight of the alignment loss that reaches the VAE", "method", only="repae", within=NOT_NEGATIVE
    )
    vae_diffusion_coeff: float = _option(
        0.0,
        "weight of the velocity loss let into the VAE: more than 0 is naive end-to-end training, for study",
        "method",
        only="repae",
        within=NOT_NEGATIVE,
    )
    path_type: str = _option(
        "linear", "the path from data to noise", "method", only="repae ldm", choices=("linear", "cosine")
    )
    prediction: str = _option("v", "what SiT predicts: velocity", "method", only="repae ldm", choices=("v",))
    weighting: str = _option(
        "uniform", "how times are drawn", "method", only="repae ldm", choices=("uniform", "lognormal")
    )

    max_train_steps: int = _option(
        400_000, "optimiser steps", "optimisation", within=POSITIVE, tiny=400, free=True
    )
    epochs: int | None = _option(
        None,
        "stop after so many passes over the data, if that is earlier",
        "optimisation",
        within=POSITIVE,
        free=True,
    )
    batch_size: int = _option(
        256,
        "images per step over ALL processes (the official meaning)",
        "optimisation",
        within=POSITIVE,
        tiny=32,
    )
    gradient_accumulation_steps: int = _option(
        1, "a step uses so many batches", "optimisation", within=POSITIVE
    )
    learning_rate: float = _option(
        1e-4, "of the SiT", "optimisation", only="repae ldm", within=RATE, tiny=1e-3
    )
    vae_learning_rate: float = _option(
        1e-4, "of the VAE", "optimisation", only="repae vae", within=RATE, tiny=2e-4
    )
    disc_learning_rate: float = _option(
        1e-4,
        "of the discriminator",
        "optimisation",
        only="repae vae",
        within=RATE,
        needs="discriminator",
    )
    lr_warmup_steps: int = _option(
        0, "steps over which learning rates rise from 0", "optimisation", within=NOT_NEGATIVE, tiny=50
    )
    optimizer: str = _option("AdamW", "AdamW, Adam, NAdam, RAdam or SGD", "optimisation")
    adam_beta1: float = _option(
        0.9,
        "first beta of Adam's family",
        "optimisation",
        within=SHARE,
        needs="adam",
    )
    adam_beta2: float = _option(
        0.999,
        "second beta of Adam's family",
        "optimisation",
        within=SHARE,
        needs="adam",
    )
    adam_weight_decay: float = _option(0.0, "weight decay", "optimisation", within=NOT_NEGATIVE)
    adam_epsilon: float = _option(
        1e-8,
        "epsilon of Adam's family",
        "optimisation",
        within=POSITIVE,
        needs="adam",
    )
    max_grad_norm: float = _option(
        1.0, "gradients are clipped to this norm, each network apart", "optimisation", within=POSITIVE
    )
    ema_decay: float = _option(
        0.9999, "of the SiT's moving average", "optimisation", only="repae ldm", within=SHARE, tiny=0.98
    )

    mixed_precision: str = _option(
        "auto",
        "auto is bf16 on a GPU that has it and no elsewhere; fp16 is the official run's",
        "machine",
        choices=("auto", "no", "fp16", "bf16"),
    )
    loss_precision: str = _option(
        "float32",
        "of LPIPS and discriminator in mixed precision: float32, as officially, or autocast, faster (D11)",
        "machine",
        only="repae vae",
        choices=("float32", "autocast"),
        needs="half losses",
    )
    allow_tf32: bool = _option(False, "TF32 for float32 products on NVIDIA GPUs", "machine")
    cpu: bool = _option(False, "use no GPU", "machine")
    compile: bool = _option(
        False,
        "torch.compile for SiT blocks and VAE; left out, with a sentence, where a short trial of it fails; "
        "TORCHINDUCTOR_CACHE_DIR, on a disk that stays, spares the next start the compiling",
        "machine",
    )
    gradient_checkpointing: bool = _option(
        False, "recompute activations: less memory, about a third more time", "machine", free=True
    )
    shard: bool = _option(
        False,
        "keep a part of SiT's weights, moving average and optimiser states on each process (FSDP2): less "
        "memory, the same step and the same checkpoints",
        "machine",
        only="repae ldm",
        free=True,
    )
    micro_batches: int = _option(
        1,
        "cut every process's batch into so many parts: less memory, the same step, but that a "
        "discriminator's BatchNorm sees each part alone (D10)",
        "machine",
        within=POSITIVE,
        free=True,
    )
    cache_targets: str | None = _option(
        None,
        "the encoders' tokens of all images, in float16: this file is written before the first step if it is "
        "not there, and read instead of running the encoders; images are never flipped or cropped at random "
        "(dinov2-vit-b, 256 pixels: 393 kB an image, 504 GB for ImageNet)",
        "machine",
        only="repae ldm",
        metavar="FILE",
        free=True,
        needs="encoder",
    )

    report_to: str = _option(
        "none",
        "tracker, through accelerate; metrics.jsonl is always written",
        "log",
        choices=TRACKERS,
        free=True,
    )
    logging_dir: str = _option(
        "logs",
        "folder of tensorboard's and wandb's files, in OUTPUT_DIR (trackio has its own: TRACKIO_DIR)",
        "log",
        free=True,
        needs="tracker",
    )
    wandb_history_path: str | None = _option(
        None,
        "official flag, not built",
        "log",
        free=True,
        refusal="old curves are not sent again: metrics.jsonl keeps all of them",
    )
    logging_steps: int = _option(
        10, "steps between two lines of metrics.jsonl", "log", within=POSITIVE, tiny=1, free=True
    )
    sampling_steps: int = _option(
        10_000,
        "steps between two sample grids, 0 for none",
        "log",
        within=NOT_NEGATIVE,
        tiny=200,
        free=True,
    )
    sample_images: int = _option(
        16,
        "images of a grid",
        "log",
        within=POSITIVE,
        free=True,
        needs="grids",
    )

    eval_every: int = _option(
        0,
        "steps between two evaluations of the averaged SiT, 0 for none; their numbers go to metrics.jsonl",
        "log",
        only="repae ldm",
        within=NOT_NEGATIVE,
        free=True,
    )
    eval_protocol: str | None = _option(
        None,
        "how, see repae evaluate; its guidance and number of samples are its own unless said otherwise",
        "log",
        only="repae ldm",
        tiny="tiny",
        free=True,
        needs="evaluations",
    )
    eval_samples: int | None = _option(
        None,
        "number of samples (default: the protocol's)",
        "log",
        only="repae ldm",
        within=POSITIVE,
        free=True,
        needs="evaluations",
    )
    eval_reference: str | None = _option(
        None,
        "what they are compared with, see repae evaluate",
        "log",
        only="repae ldm",
        metavar="FILE",
        free=True,
        needs="evaluations",
    )

    checkpointing_steps: int = _option(
        50_000, "steps between two checkpoints", "checkpoint", within=POSITIVE, tiny=100, free=True
    )
    keep_last: int | None = _option(
        None,
        "remove checkpoints but the last N and the milestones (default: keep all, but for one that only a "
        "signal caused: it goes once a later one is whole)",
        "checkpoint",
        within=POSITIVE,
        free=True,
    )
    milestone_steps: int = _option(
        0,
        "checkpoints at multiples of this are never removed, 0 for no milestones",
        "checkpoint",
        within=NOT_NEGATIVE,
        free=True,
        needs="pruning",
    )
    checkpoint_format: str = _option(
        "safetensors",
        "safetensors (a folder), official (NNNNNNN.pt as the official code writes it), or both",
        "checkpoint",
        choices=FORMATS,
        free=True,
    )
    resume: str | None = _option(
        None,
        "latest (starts from nothing if the run has saved none), a step, or the path of another run's "
        "checkpoint",
        "checkpoint",
        free=True,
        metavar="latest|STEP|PATH",
    )
    resume_step: int = _option(
        0,
        "the official spelling of --resume STEP; 0 is none",
        "checkpoint",
        within=NOT_NEGATIVE,
        free=True,
    )
    continue_train_exp_dir: str | None = _option(
        None,
        "the run folder in which --resume-step counts (default: this run's)",
        "checkpoint",
        free=True,
        metavar="FOLDER",
    )

    on_divergence: str = _option(
        "halt",
        "what a collapse does: halt; rollback to the last good checkpoint with half the learning rates and "
        "loss scales, three times at most; off. Reports are kept in divergence/",
        "guard",
        choices=("halt", "rollback", "off"),
        free=True,
    )
    divergence_patience: int = _option(
        50,
        "steps that a gradient norm may stay at zero",
        "guard",
        within=POSITIVE,
        free=True,
        needs="guard",
    )
    divergence_falls: int = _option(
        10,
        "times that an fp16 loss scale may fall without having risen",
        "guard",
        within=POSITIVE,
        free=True,
        needs="guard fp16",
    )
    divergence_variance: float = _option(
        0.05,
        "share of their first spatial variance that latents must keep; 0 for no limit",
        "guard",
        only="repae vae",
        within=SHARE,
        free=True,
        needs="guard",
    )

    def __post_init__(self):
        if self.command not in COMMANDS:
            known = ", ".join(COMMANDS)
            raise ValueError(f"unknown training command {self.command!r}: choose one of {known}")
        for name, option in OPTIONS.items():
            value, meta, kind = getattr(self, name), option.metadata, value_type(option)
            if value is None and option.default is None:
                continue
            if isinstance(value, os.PathLike) or (kind is float and type(value) is int):
                value = kind(value)
                object.__setattr__(self, name, value)
            here, choices = f"{flag(name)} is {value!r}", meta.get("choices", (value,))
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{here}: it must be of type {kind.__name__}")
            if value == option.default:
                continue
            rule, inside = meta.get("within", ("", lambda _: True))
            _refuse(
                (
                    self.command not in meta["only"],
                    f"{flag(name)} means nothing to train-{self.command}: leave it out",
                ),
                ("refusal" in meta, f"{here}: {meta.get('refusal')}"),
                (value not in choices, f"{here}: choose one of {', '.join(map(str, choices))}"),
                (not inside(value), f"{here}: it {rule}"),
                (
                    kind is str and (not value.strip() or "\0" in value),
                    f"{here}: give a name or a path, or leave it out",
                ),
            )
        self._check_combinations()
        self._check_effects()

    def _check_combinations(self) -> None:
        plain = self.command != "vae" and not self.encoders  # a SiT that aligns with nothing
        coeff = self.vae_align_proj_coeff if self.command == "repae" else 0
        _refuse(
            (
                self.resume and self.resume_step,
                f"--resume {self.resume} and --resume-step {self.resume_step} were both given: leave one out",
            ),
            (
                self.continue_train_exp_dir and not self.resume_step,
                f"--continue-train-exp-dir {self.continue_train_exp_dir} needs the step in it: give "
                "--resume-step N",
            ),
            (
                plain and coeff and not self._overruled("vae_align_proj_coeff", "enc_type"),
                f"--enc-type none leaves nothing to align with, but --vae-align-proj-coeff is {coeff}: set "
                "it to 0",
            ),
            (
                self.shard and self.on_divergence == "rollback",
                "--shard cannot roll back while it runs: give --on-divergence halt, then start from the last "
                "good checkpoint with --resume PATH and another --exp-name",
            ),
            (
                self.command == "ldm" and self.vae_ckpt == NONE,
                "train-ldm needs a trained VAE, which stays as it is: give --vae-ckpt FILE",
            ),
        )

    def _check_effects(self) -> None:
        """Refuses options without effect, as far as the options themselves tell."""
        if not self.encoders:
            why = "since --enc-type none has no targets and no projector"
            self.refuse_idle("encoder", why, by="enc_type")
        if self.optimizer.lower() == "sgd":
            self.refuse_idle("adam", "to SGD", by="optimizer")
        if self.perceptual == "tiny":
            self.refuse_idle("lpips", "with --perceptual tiny", by="perceptual")
        if self.report_to in ("none", "trackio"):
            self.refuse_idle("tracker", f"with --report-to {self.report_to}", by="report_to")
        if not self.sampling_steps:
            self.refuse_idle("grids", "with --sampling-steps 0", by="sampling_steps")
        if not self.eval_every:
            self.refuse_idle("evaluations", "without --eval-every", by="eval_every")
        if self.keep_last is None:
            self.refuse_idle("pruning", "without --keep-last, since all checkpoints are kept", by="keep_last")
        if self.on_divergence == "off":
            self.refuse_idle("guard", "with --on-divergence off", by="on_divergence")
        if self.mixed_precision != "auto":
            self.check_precision(self.mixed_precision)

    def check_precision(self, precision: str) -> None:
        """Refuses options without effect in a precision: "no", "bf16" or "fp16", never "auto".

        Raises:
            ValueError: see above.
        """
        if self.shard and precision == "fp16":
            raise ValueError("--shard has no loss scale, as fp16 needs: give --mixed-precision bf16 or no")
        why = f"in precision {precision} (--mixed-precision {self.mixed_precision})"
        if precision != "fp16":
            self.refuse_idle("fp16", why, by="mixed_precision")
        if precision == "no":
            self.refuse_idle("half", why, by="mixed_precision")

    def refuse_idle(self, need: str, why: str, *, by: str) -> None:
        """Refuses options that act on something that is not there, unless they are harmless.

        Args:
            need: what is not there, as the options' `needs` name it.
            why: the end of the sentence "--x means nothing …".
            by: the option that decided.

        Raises:
            ValueError: an option that needs it was said.
        """
        for name, option in OPTIONS.items():
            meta = option.metadata
            harmless = meta.get("tiny", option.default) if self.vae == "tiny" else option.default
            if need not in meta.get("needs", "").split() or self.command not in meta["only"]:
                continue
            if getattr(self, name) == harmless:
                continue
            if not self._overruled(name, by):
                raise ValueError(f"{flag(name)} means nothing {why}: leave it out")
            if os.environ.get("RANK", "0") == "0":
                logger.info(f"{flag(name)} of the preset means nothing {why}")

    def _overruled(self, name: str, by: str) -> bool:
        """Whether an option is a preset's and the other one a flag, which wins."""
        return self.sources.get(name) == "preset" and self.sources.get(by) == "flag"

    @classmethod
    def with_defaults(cls, command: str, **given) -> "TrainConfig":
        """A config of the options given and the defaults of their scale, perhaps without the VAE's weights.

        Raises:
            ValueError: see the class.
        """
        defaults = {"vae_ckpt": NONE} if command == "vae" else {}
        if given.get("vae") == "tiny":
            defaults = {
                name: option.metadata["tiny"]
                for name, option in OPTIONS.items()
                if "tiny" in option.metadata and command in option.metadata["only"]
            } | defaults
        return cls(command=command, **defaults | given)

    @classmethod
    def build(cls, command: str, **given) -> "TrainConfig":
        """A config that can be trained, of the options given and the defaults of their scale.

        Raises:
            ValueError: see the class; or the VAE's weights are not said.
        """
        config = cls.with_defaults(command, **given)
        if config.vae_ckpt is None:
            or_none = ", or none to start from scratch" if command == "repae" else ""
            raise ValueError(f"say where the VAE's weights are: --vae-ckpt FILE{or_none}")
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
    def workers(self) -> int:
        """Loader processes of this training process: more than its cores would get in each other's way."""
        if self.num_workers is not None:
            return self.num_workers
        return max(1, min(4, core_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

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
        """The options that a run's numbers depend on; they must not change when it is resumed.

        Of cached targets, which are rounded, only whether there are some.
        """
        cached = {} if self.command == "vae" else {"cache_targets": self.cache_targets is not None}
        return {
            name: getattr(self, name)
            for name, option in OPTIONS.items()
            if not option.metadata.get("free") and self.command in option.metadata["only"]
        } | {"command": f"train-{self.command}", **cached}


OPTIONS: dict[str, Field] = {option.name: option for option in fields(TrainConfig) if option.metadata}


def _refuse(*cases: tuple[object, str]) -> None:
    """Raises the sentence of the first case that holds."""
    for holds, sentence in cases:
        if holds:
            raise ValueError(sentence)


def flag(name: str) -> str:
    """How a field is spelt on the command line."""
    return "--" + name.replace("_", "-")


def value_type(option: Field) -> type:
    """The type of an option's value; `int | None` is int."""
    kinds = getattr(option.type, "__args__", (option.type,))
    return next(each for each in kinds if each is not type(None))


def differences(stored: dict, config: TrainConfig) -> list[str]:
    """Sentences on options of a stored run (args.json) that would change its course."""
    return [
        f"{flag(name)} was {stored[name]!r} and is now {value!r}"
        for name, value in config.fixed().items()
        if name in stored and stored[name] != (list(value) if isinstance(value, tuple) else value)
    ]


def values(config: TrainConfig) -> dict[str, Any]:
    """The options by name, as args.json holds them; the names are the official ones."""
    return {"command": f"train-{config.command}"} | {name: getattr(config, name) for name in OPTIONS}
