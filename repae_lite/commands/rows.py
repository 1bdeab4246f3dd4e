"""Rows: what it takes to get a published number, a file each in reproduce/presets, and the commands for it.

A row is a preset with more in it: where the number was published, under which protocol, how far another run
may be from it, what it costs. `Plan` turns a row into stages, one for each notebook reproduce/01 … 06, at one
of three scales: "full" is the paper's, "mid" one consumer GPU and Imagenette, "tiny" the embedded data and
two CPU cores. A smaller scale keeps what makes the row different from the others (loss weights, projector,
path; "mid" also VAE, losses and encoder) and takes everything else from the preset of its own name.
"""

import hashlib
import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from repae_lite.commands.presets import (
    OWN_KEYS,
    Preset,
    preset_content,
    presets_dir,
    read_preset,
    typed_options,
)
from repae_lite.evaluation.protocols import PROTOCOLS
from repae_lite.evaluation.results import Expected
from repae_lite.training.config import COMMANDS, OPTIONS, flag
from repae_lite.utils.configs import first_fault
from repae_lite.utils.files import data_small_dir, read_json, write_text

SCALES = ("tiny", "mid", "full")
STAGES = (
    "01_preprocess",
    "02_train_repae",
    "03_cache_latents",
    "04_train_ldm",
    "05_generate",
    "06_evaluate",
)
CARRIED = (  # what a row is about: kept at every scale
    "vae_align_proj_coeff",
    "vae_diffusion_coeff",
    "proj_coeff",
    "projector",
    "spatial_norm",
    "path_type",
    "weighting",
    "cfg_prob",
    "bn_momentum",
    "train_pos_embed",
    "on_divergence",
)
CARRIED_TO_MID = ("vae", "vae_ckpt", "disc_pretrained_ckpt", "loss_cfg_path", "enc_type")
DATA = {"tiny": "embedded", "mid": "imagenette"}  # repae download data:NAME
CLASSES = 10  # of these two
RESOLUTION = {"tiny": 32, "mid": 128, "full": 256}
DEVICES = ("auto", "cpu", "cuda", "mps")
INPUTS = {  # what stands in a command where nothing was given: flag, and what it is
    "IMAGES": ("--images", "a folder with ImageNet's training images"),
    "VALIDATION": ("--validation", "a folder with ImageNet's 50,000 validation images"),
    "REFERENCE": ("--reference", "ADM's VIRTUAL_imagenet256_labeled.npz"),
}
RECONSTRUCTION = "reconstruction"  # in place of a protocol's name: the number is of repae reconstruct
STRICT = ConfigDict(extra="forbid")


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Cost:
    """What a run of the row takes at full scale, training alone.

    Attributes:
        gpu_hours: of one H100, or from which to which number, or "not known".
        basis: what that was computed from, or why it is not known.
    """

    gpu_hours: float | tuple[float, float] | Literal["not known"]
    basis: str


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class Row:
    """A published row.

    Attributes:
        name: stem of its file.
        title: in a few words.
        source: the tables in which it stands.
        command: "train-repae", "train-ldm", or for released weights "generate" or "reconstruct"; None if it
            is not built.
        published: what the paper and others got.
        tolerance: by metric, how far another run may be from a published value, as a share of it.
        basis: what the tolerance rests on.
        cost: of a run.
        differences: from the official run, as numbered in DIFFERENCES.md.
        starts_from: the row whose tuned VAE, or whose run, this one starts from; at full scale the released
            one is downloaded instead.
        not_built: why this code cannot run it; None if it can.
        note: what else a reader should know.
        tiny, mid: options at these scales, besides those that every row keeps.
        vae: architecture of a "reconstruct" row's VAE.
        released: what `repae download` brings for it.
    """

    name: str
    title: str
    source: str
    command: Literal["train-repae", "train-ldm", "generate", "reconstruct"] | None = None
    published: tuple[Expected, ...] = ()
    tolerance: dict[str, float] = field(default_factory=dict)
    basis: str = ""
    cost: Cost | None = None
    differences: tuple[str, ...] = ()
    starts_from: str | None = None
    not_built: str | None = None
    note: str = ""
    tiny: dict[str, Any] = field(default_factory=dict)
    mid: dict[str, Any] = field(default_factory=dict)
    vae: str | None = None
    released: tuple[str, ...] = ()

    @cached_property
    def preset(self) -> Preset | None:
        """Its training options at full scale; None for rows that do not train."""
        return read_preset(self.name) if (self.command or "").startswith("train-") else None

    @property
    def hours(self) -> str:
        """What training takes at full scale, in words."""
        if self.cost is None:
            return "no training" if self.command in ("generate", "reconstruct") else "not known"
        known = self.cost.gpu_hours
        if isinstance(known, str):
            return known
        ends = known if isinstance(known, tuple) else (known,)
        return f"{' to '.join(f'{each:,.0f}' for each in ends)} GPU-hours"

    def resolution(self, scale: str) -> int:
        """Side of the images at a scale, pixels."""
        options = self.preset.options if self.preset and scale == "full" else {}
        return options.get("resolution", RESOLUTION[scale])

    def expected(self, scale: str) -> tuple[Expected, ...]:
        """What is known of a scale, or entries without numbers: draw or reconstruct as that scale does."""
        known = tuple(entry for entry in self.published if entry.scale == scale)
        if known or scale == "full":
            return known
        kinds = {RECONSTRUCTION if e.protocol == RECONSTRUCTION else scale for e in self.published} or {scale}
        return tuple(Expected(metrics={}, source="", protocol=kind, scale=scale) for kind in sorted(kinds))


def row_names() -> list[str]:
    """Names of all rows: the presets that say where they were published."""
    return sorted(path.stem for path in presets_dir().glob("*.yaml") if _is_row(path))


def _is_row(path: Path) -> bool:
    return "\ntitle:" in path.read_text("utf-8")


def read_row(name: str) -> Row:
    """A row by its name.

    Raises:
        FileNotFoundError: no such row; the nearest names.
        ValueError: its file is not one of a row.
    """
    path = {each.stem: each for each in presets_dir().glob("*.yaml")}.get(name)
    if path is None or not _is_row(path):
        near = get_close_matches(name, row_names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise FileNotFoundError(
            f"there is no row {name!r}: {hint}`repae reproduce --list` shows all {len(row_names())}"
        )
    content = preset_content(path)
    known = {f.name for f in fields(Row)}
    values = {key: value for key, value in content.items() if key in known & OWN_KEYS | {"vae"}}
    training = str(content.get("command")).removeprefix("train-")
    if training in COMMANDS:
        for scale in {"tiny", "mid"} & values.keys():
            options = {key.replace("-", "_"): value for key, value in (values[scale] or {}).items()}
            values[scale] = typed_options(options, training, path)
    elif spare := content.keys() - values.keys() - OWN_KEYS:
        raise ValueError(f"the row {path} trains nothing, but sets {min(spare)!r}: take it out")
    try:
        return TypeAdapter(Row).validate_python(values | {"name": name})
    except ValidationError as errors:
        raise ValueError(f"the row {path} has {first_fault(errors)}") from None


# ---------------------------------------------------------------- the commands of a row


@dataclass(frozen=True)
class Command:
    """A command of `repae`.

    Attributes:
        words: the command line without "repae".
        done: exists as soon as the command has finished; it is then not run again. None: it is run every
            time, and finds out by itself what is left to do.
        parallel: whether several processes may share it.
    """

    words: tuple[str, ...]
    done: Path | None = None
    parallel: bool = False

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.done is not None and self.done.exists()


@dataclass(frozen=True)
class Stage:
    """What one notebook runs.

    Attributes:
        name: one of `STAGES`.
        commands: in their order.
        run_folder: of the training run that it starts or uses; None without one.
        preset: what it trains, for `repae check`'s arithmetic; None if it does not train.
    """

    name: str
    commands: tuple[Command, ...]
    run_folder: Path | None = None
    preset: Preset | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A row at a scale, in a folder.

    Attributes:
        row: which.
        scale: "tiny", "mid" or "full".
        folder: everything that is written lies in it, but for `data`.
        images: the folder of training images that is preprocessed, at full scale.
        validation: the folder of images that VAEs reconstruct, at full scale.
        data: where preprocessed images and latents go (default: FOLDER/data).
        reference: what samples are compared with, at full scale ADM's file.
        processes: of the commands that can share their work.
        steps: training steps instead of the row's, to try it out.
        samples: images instead of the protocol's, to try it out: the numbers are then of no protocol that has
            a name.
        seed: of training and of samples: several make a spread.
        device: "auto", "cpu", "cuda" or "mps".
        micro_batches: how many parts a process's batch is cut into instead of the row's, for the memory of a
            GPU; may change when a folder is gone on with.
    """

    row: Row
    scale: str
    folder: Path
    images: str | None = None
    validation: str | None = None
    data: Path | None = None
    reference: str | None = None
    processes: int = 1
    steps: int | None = None
    samples: int | None = None
    seed: int = 0
    device: str = "auto"
    micro_batches: int | None = None

    def __post_init__(self):
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r}: choose one of {', '.join(SCALES)}")
        if self.row.not_built:
            raise ValueError(f"the row {self.row.name} is not built: {self.row.not_built}")
        if self.scale == "full" and self.samples:
            raise ValueError("--samples is for trying a row out: it needs --scale tiny or mid")
        for name in ("processes", "steps", "samples", "micro_batches"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}: give at least 1")
        if self.device not in DEVICES:
            raise ValueError(
                f"--device is {self.device!r}: choose one of {', '.join(DEVICES)}; of several GPUs "
                "CUDA_VISIBLE_DEVICES chooses one"
            )
        if self.micro_batches and not self.trained:
            raise ValueError(
                f"--micro-batches is for training, and {self.row.name} trains nothing: leave it out"
            )
        balanced = [entry for entry, _ in self.draws if PROTOCOLS[entry.protocol].labels == "balanced"]
        if self.samples and balanced and not self.images and self.samples % CLASSES:
            raise ValueError(
                f"--samples is {self.samples}, and {CLASSES} classes are drawn equally often: give a "
                f"multiple of {CLASSES}"
            )

    @classmethod
    def open(cls, name: str, scale: str, folder: str | Path | None = None, **options: Any) -> "Plan":
        """The plan of a folder, which keeps what its numbers depend on: started anew or gone on with.

        Args:
            name: of the row.
            scale: see the class.
            folder: None for runs/reproduce/NAME-SCALE.
            options: other attributes; an empty one is left out.

        Raises:
            ValueError: the folder was begun for something else, or the row's file was edited since.
            FileNotFoundError: see `read_row`.
        """
        given = {key: value for key, value in options.items() if value not in (None, "", 0)}
        if "data" in given:
            given["data"] = Path(given["data"])
        folder = Path(folder or Path("runs") / "reproduce" / f"{name}-{scale}")
        plan = cls(row=read_row(name), scale=scale, folder=folder, **given)
        path, record = folder / "plan.json", plan.record()
        if path.is_file():
            begun = read_json(path)
            for key, now in record.items():
                if begun.get(key) == now:
                    continue
                if key == "files":
                    raise ValueError(
                        f"the presets of the row {name} are not those that {folder} was begun with: undo the "
                        "edit, or choose another --folder"
                    )
                was, now = ("unset" if value is None else repr(value) for value in (begun.get(key), now))
                raise ValueError(
                    f"{folder} was begun with {key} {was}, not {now}: go on with that, or choose another "
                    "--folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            plan.write_protocols()
            write_text(path, json.dumps(record, indent=1) + "\n")
        return plan

    def record(self) -> dict:
        """What its numbers depend on, as JSON values; `files` are the SHA-256 of its presets."""
        names = [row.name for row in self.lineage] + [self.scale] * (self.scale != "full")
        files = {}
        for name in names:
            while name:
                path = presets_dir() / f"{name}.yaml"
                files[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                name = preset_content(path, resolve=False).get("base")
        return {
            "row": self.row.name,
            "scale": self.scale,
            "steps": self.steps,
            "samples": self.samples,
            "seed": self.seed,
            "files": files,
        }

    @property
    def resolution(self) -> int:
        """Side of the images, pixels."""
        return self.row.resolution(self.scale)

    @property
    def data_dir(self) -> Path:
        """Where preprocessed images and latents are."""
        return self.data or self.folder / "data"

    def options(self, row: Row) -> dict[str, Any]:
        """The training options of a row at this scale; fields of `TrainConfig`."""
        if self.scale == "full":
            own = dict(row.preset.options)
        else:
            base = read_preset(self.scale)
            own = {
                name: value
                for name, value in base.options.items()
                if row.preset.command in OPTIONS[name].metadata["only"]
            }
            kept, carried = row.preset.options, set(CARRIED)
            if self.scale == "mid":
                carried |= set(CARRIED_TO_MID)
                own = {name: value for name, value in own.items() if name not in CARRIED_TO_MID}
                own["model"] = f"{own['model'].partition('/')[0]}/{kept['model'].partition('/')[2]}"
            own |= {name: value for name, value in kept.items() if name in carried}
            if row.preset.options.get("enc_type") == "none":
                own = {k: v for k, v in own.items() if "encoder" not in OPTIONS[k].metadata.get("needs", "")}
                own["enc_type"] = "none"
            own |= getattr(row, self.scale)
        if self.steps:
            own |= {"max_train_steps": self.steps, "checkpointing_steps": self.steps}
        if self.micro_batches:
            own["micro_batches"] = self.micro_batches
        return own | {"exp_name": row.name} | ({"seed": self.seed} if self.seed else {})

    @cached_property
    def lineage(self) -> tuple[Row, ...]:
        """The rows whose training this one needs, itself last; at full scale the released files stand in."""
        rows = [self.row]
        while self.scale != "full" and rows[0].starts_from:
            rows.insert(0, read_row(rows[0].starts_from))
        return tuple(rows)

    @cached_property
    def trained(self) -> tuple[Row, ...]:
        """Those of the lineage that train, in order."""
        return tuple(row for row in self.lineage if row.preset)

    @property
    def released(self) -> tuple[str, ...]:
        """The released sets that are downloaded first."""
        return self.lineage[0].released if self.scale != "tiny" else ()

    @property
    def source(self) -> Path | None:
        """The run that images are drawn from; None where nothing is trained and nothing released."""
        if self.trained:
            return self.folder / "exps" / self.trained[-1].name
        return Path("pretrained") / self.row.released[0] if self.row.released else None

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What has to be done, in order."""
        found = [self._preprocess()]
        found += [self._train_repae(row) for row in self.lineage if row.command == "train-repae"]
        for row in self.lineage:
            if row.command == "train-ldm":
                found += [self._cache_latents(row), self._train_ldm(row)]
        found += [self._generate(), self._evaluate()]
        return tuple(stage for stage in found if stage.commands)

    def stage(self, name: str) -> Stage:
        """A stage by its name or number.

        Raises:
            ValueError: the row has no such stage.
        """
        for stage in self.stages:
            if name.zfill(2) in (stage.name, stage.name[:2]):
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise ValueError(
            f"the row {self.row.name} has no stage {name!r} at scale {self.scale}: it has {names}"
        )

    # ---- one method a stage

    def _preprocess(self) -> Stage:
        commands, source = [], self.images
        if self.scale != "full":
            name = DATA[self.scale]
            source = source or str(self.folder / "images" / name / "train")
            words = ("download", f"data:{name}", "--output-dir", str(self.folder / "images"))
            if not self.images or self.row.command == "reconstruct":  # which needs the validation images
                commands.append(Command(words))
        commands += [Command(("download", name)) for name in self.released]
        if self.trained:
            words = ("preprocess", "--imagenet-path", source or "IMAGES", "--data-dir", str(self.data_dir))
            words += ("--resolution", str(self.resolution))
            commands.append(Command(words, done=self.data_dir / "images_h5.json"))
        return Stage(STAGES[0], tuple(commands))

    def _train(self, row: Row, **changes: Any) -> Command:
        """The training command of a row, complete, whatever was done of it before."""
        options = self.options(row) | changes
        shown = {key: value for key, value in options.items() if key not in ("exp_name", "data_dir")}
        words = [row.command, "--data-dir", str(self.data_dir), "--output-dir", str(self.folder / "exps")]
        if self.scale == "full":
            words += ["--preset", row.name]
            shown = {k: v for k, v in shown.items() if row.preset.options.get(k) != v}
        for key, value in shown.items():
            if isinstance(value, bool):
                words.append(flag(key) if value else flag(key).replace("--", "--no-", 1))
            else:
                words += [flag(key), str(value)]
        if self.device == "cpu":
            words.append("--cpu")
        words += ["--exp-name", row.name, "--resume", "latest"]
        steps = self.total_steps(row)
        done = self.folder / "exps" / row.name / "checkpoints" / f"{steps:07d}"
        return Command(tuple(words), done=done, parallel=True)

    def total_steps(self, row: Row) -> int:
        """How long a row trains at this scale."""
        return replace(row.preset, options=self.options(row)).config.max_train_steps

    def _train_repae(self, row: Row) -> Stage:
        run = self.folder / "exps" / row.name
        export = ("export-vae", "--exp-path", str(run), "--vae-name", row.name)
        export += ("--save-dir", str(self.folder / "pretrained"))
        commands = (self._train(row), Command(export, done=self._tuned(row) / f"{row.name}.pt"))
        return Stage(STAGES[1], commands, run, row.preset)

    def _tuned(self, row: Row) -> Path:
        """Where the VAE that a row tunes is exported to."""
        return self.folder / "pretrained" / row.name

    def _vae(self, row: Row) -> tuple[str, str]:
        """Architecture and weights of the VAE that a row has tuned, is trained on or reconstructs with."""
        tuned = [each for each in self.lineage if each.command == "train-repae"]
        options = self.options(row) if row.preset else {}
        name = "tiny" if self.scale == "tiny" else row.vae or options.get("vae", "f8d4")
        if tuned:
            return name, str(self._tuned(tuned[-1]) / f"{tuned[-1].name}.pt")
        released = str(Path("pretrained") / row.released[0]) if row.released else ""
        return name, "tiny" if name == "tiny" else options.get("vae_ckpt") or released

    def _cache_latents(self, row: Row) -> Stage:
        vae, weights = self._vae(row)
        words = ("cache-latents", "--vae-arch", vae, "--vae-ckpt-path", weights)
        words += ("--data-dir", str(self.data_dir), "--vae-latents-name", self._latents(row))
        words += self._device()
        done = self.data_dir / f"{self._latents(row)}_h5.json"
        return Stage(STAGES[2], (Command(words, done=done, parallel=True),))

    def _latents(self, row: Row) -> str:
        """The name of a row's latents; at full scale, rows on the same VAE share them."""
        return self.options(row).get("vae_latents_name", row.name)

    def _train_ldm(self, row: Row) -> Stage:
        command = self._train(row, vae_ckpt=self._vae(row)[1], vae_latents_name=self._latents(row))
        return Stage(STAGES[3], (command,), self.folder / "exps" / row.name, row.preset)

    def _device(self) -> tuple[str, ...]:
        return () if self.device == "auto" else ("--device", self.device)

    @cached_property
    def draws(self) -> tuple[tuple[Expected, Path], ...]:
        """What is drawn: entries of the row, each with its .npz; equal drawings once."""
        if self.row.command == "reconstruct" or self.source is None:
            return ()
        total = self.total_steps(self.trained[-1]) if self.trained else None
        found = {}
        for entry in self.row.expected(self.scale):
            step = total if self.steps or entry.step is None else entry.step
            if entry.protocol in (None, RECONSTRUCTION) or not entry.guidance or (total and step > total):
                continue
            guidance = "-".join(map(str, entry.guidance))
            name = f"{self.source.name}_{'last' if step is None else f'{step:07d}'}_cfg{guidance}.npz"
            path = self.folder / "samples" / entry.protocol / name
            found.setdefault(path, replace(entry, step=step))
        return tuple((entry, path) for path, entry in found.items())

    @cached_property
    def results(self) -> tuple[tuple[Expected, Path], ...]:
        """Every number: its entry, and the result that the last stage writes; those of `draws` come first."""
        folder = self.folder / "results"
        found = [(entry, folder / f"{entry.protocol}_{path.stem}.json") for entry, path in self.draws]
        rebuilt = [entry for entry in self.row.expected(self.scale) if entry.protocol == RECONSTRUCTION]
        return (*found, *((entry, folder / f"{RECONSTRUCTION}.json") for entry in rebuilt[:1]))

    def protocol(self, name: str) -> str:
        """A protocol's name, or the file of one with `samples` images."""
        return str(self.folder / f"{name}-{self.samples}.yaml") if self.samples else name

    def _generate(self) -> Stage:
        commands = []
        for entry, path in self.draws:
            words = ["generate", "--exp-path", str(self.source)]
            words += [] if entry.step is None else ["--train-steps", str(entry.step)]
            if not self.trained and self.row.released[1:]:  # a run on a frozen VAE has none of its own
                words += ["--vae-ckpt", str(Path("pretrained") / self.row.released[1])]
            words += ["--protocol", self.protocol(entry.protocol), "--sample-dir", str(path.parent)]
            words += ["--global-seed", str(self.seed)] if self.seed else []
            names = ("--cfg-scale", "--guidance-low", "--guidance-high")
            for name, value in zip(names, entry.guidance, strict=True):
                words += [name, str(value)]
            commands.append(Command((*words, *self._device()), done=path, parallel=True))
        return Stage(STAGES[4], tuple(commands), self.source if self.trained else None)

    def _evaluate(self) -> Stage:
        commands = []
        drawn, rebuilt = self.results[: len(self.draws)], self.results[len(self.draws) :]
        for (entry, path), (_, result) in zip(self.draws, drawn, strict=True):
            words = ("evaluate", "--samples", str(path), "--protocol", self.protocol(entry.protocol))
            reference = self.reference or {"full": "REFERENCE", "mid": str(self.data_dir)}.get(self.scale)
            words += ("--reference", reference) if reference else ()
            words += (*self._device(), "--output", str(result))
            commands.append(Command(words, done=result))
        for _, result in rebuilt:
            vae, weights = self._vae(self.row)
            words = ("reconstruct", "--vae-arch", vae, "--vae-ckpt-path", weights, "--data-dir")
            if self.scale == "tiny":
                words += (str(data_small_dir() / "eval"), "--judge", "tiny")
            else:
                images = self.folder / "images" / DATA.get(self.scale, "") / "val"
                words += (self.validation or ("VALIDATION" if self.scale == "full" else str(images)),)
                words += ("--resolution", str(self.resolution))
            words += ("--limit", str(self.samples)) if self.samples else ()
            commands.append(Command((*words, *self._device(), "--output", str(result)), done=result))
        return Stage(STAGES[5], tuple(commands), None)

    def argv(self, command: Command) -> list[str]:
        """The whole command line of one of its commands."""
        return argv(command, self.processes)

    def write_protocols(self) -> None:
        """Writes the protocols of `samples` images, if that was asked for."""
        for name in {entry.protocol for entry, _ in self.draws} if self.samples else ():
            values = asdict(PROTOCOLS[name]) | {"count": self.samples}
            lines = [f"{key}: {_yaml(value)}" for key, value in values.items() if value is not None]
            write_text(Path(self.protocol(name)), "\n".join(lines) + "\n")


def _yaml(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple | list) else str(value)


def argv(command: Command, processes: int = 1) -> list[str]:
    """The whole command line of a command, with a launcher if it is shared by several processes."""
    if processes > 1 and command.parallel:
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        return [sys.executable, "-m", *launcher, "-m", "repae_lite", *command.words]
    return [sys.executable, "-m", "repae_lite", *command.words]


def typed(command: Command, processes: int = 1) -> str:
    """The same as one would type it."""
    if processes > 1 and command.parallel:
        launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes)]
        return shlex.join([*launcher, "-m", "repae_lite", *command.words])
    return shlex.join(["repae", *command.words])
