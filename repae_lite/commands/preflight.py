"""What a stage of a row needs of this machine, before it starts: inputs, weights, memory, disk, cost."""

import hashlib
from dataclasses import replace
from pathlib import Path

from repae_lite.commands.machine import GIB, needs, this_machine, verdict
from repae_lite.commands.presets import Preset, read_preset
from repae_lite.commands.row_results import trained_on
from repae_lite.commands.rows import Command, Plan, Stage

INPUTS = ("--imagenet-path", "--exp-path", "--vae-ckpt-path", "--samples", "--reference")
OUTPUTS = ("--output-dir", "--save-dir", "--sample-dir", "--output")
WEIGHTS = {"vae_ckpt": "--vae-ckpt", "disc_pretrained_ckpt": "--disc-pretrained-ckpt"}
PARAMETERS = {  # what the plan writes where nothing was given
    "IMAGES": "the folder of training images, one folder per class",
    "VALIDATION": "the folder of validation images",
    "REFERENCE": "the file of statistics or images to compare with",
}


def preflight(plan: Plan, stage: Stage) -> list[str]:
    """What a stage will take, in lines.

    Args:
        plan: of the row.
        stage: that is to start.

    Raises:
        ValueError: something is missing: all that is.
    """
    left = [command for command in stage.commands if not command.finished]
    row, scale = plan.row, plan.scale
    lines = [
        f"{row.title} ({row.name}), scale {scale}: {len(left)} of {len(stage.commands)} commands of "
        f"{stage.name} are left"
    ]
    if not left:
        return lines
    missing = _missing_inputs(plan, stage, left)
    if stage.preset and left[0].words[0].startswith("train-"):
        preset = preset_of(plan, stage.run_folder.name)
        lines += _data(plan, preset, missing) + _weights(preset) + _room(plan, preset, missing)
    elif stage is plan.stages[0] and plan.trained:
        # The disk before it is filled; who trains may be another machine.
        _room(plan, preset_of(plan, plan.trained[-1].name), short := [])
        missing += [reason for reason in short if "of disk" in reason]
    if scale == "full" and row.cost:
        lines.append(f"cost of the row's training, on H100: {row.hours} ({row.cost.basis})")
    if missing:
        raise ValueError(f"{stage.name} cannot start: {'; '.join(missing)}")
    return lines


def preset_of(plan: Plan, name: str) -> Preset:
    """What a row of the plan's lineage trains at its scale."""
    row = next(row for row in plan.lineage if row.name == name)
    images = row.preset.images if plan.scale == "full" else read_preset(plan.scale).images
    return replace(row.preset, options=plan.options(row), images=images)


def _missing_inputs(plan: Plan, stage: Stage, left: list[Command]) -> list[str]:
    """Inputs that are neither there nor made by an earlier command of the stage."""
    made, found = [], []
    for command in left:
        for name in _inputs(plan, command):
            path = Path(name)
            if name in PARAMETERS:
                found.append(f"{name} is not given: {PARAMETERS[name]}")
            elif not path.exists() and not any(path.is_relative_to(place) for place in made):
                found.append(f"{path} does not exist{_maker(plan, stage, path)}")
        made += _outputs(command)
    return list(dict.fromkeys(found))


def _inputs(plan: Plan, command: Command) -> list[str]:
    """Paths that a command reads, or names of parameters in their place."""
    values, kind = dict(zip(command.words, command.words[1:], strict=False)), command.words[0]
    found = [values[flag] for flag in INPUTS if flag in values and values[flag] != "tiny"]
    if kind == "reconstruct":
        found.append(values["--data-dir"])
    elif "--data-dir" in values and kind != "preprocess":
        found.append(str(Path(values["--data-dir"]) / "images_h5.json"))
    if kind.startswith("train-"):
        options = preset_of(plan, values["--exp-name"]).options
        given = [values.get(flag, options.get(name)) for name, flag in WEIGHTS.items()]
        found += [path for path in given if "/" in str(path)]  # else a name, as "tiny"
        latents = values.get("--vae-latents-name", options.get("vae_latents_name"))
        found += [f"{values['--data-dir']}/{latents}_h5.json"] if latents else []
    return found


def _outputs(command: Command) -> list[Path]:
    """Places that a command writes to."""
    values = dict(zip(command.words, command.words[1:], strict=False))
    flags = (*OUTPUTS, "--data-dir") if command.words[0] in ("preprocess", "cache-latents") else OUTPUTS
    places = [Path(values[flag]) for flag in flags if flag in values]
    if command.words[0] == "download" and "--output-dir" not in values:
        places.append(Path("pretrained") / command.words[1])
    return places


def _maker(plan: Plan, stage: Stage, path: Path) -> str:
    """Which notebook writes a path, as an addition to a sentence."""
    others = [(other, command) for other in plan.stages if other is not stage for command in other.commands]
    makers = [other for other, command in others if command.done == path]
    makers += [other for other, command in others if any(map(path.is_relative_to, _outputs(command)))]
    return f" (notebook {makers[0].name} makes it)" if makers else ""


def _data(plan: Plan, preset: Preset, missing: list[str]) -> list[str]:
    """How many images there are; at full scale they must be as many as the row's."""
    if not (plan.data_dir / "images_h5.json").is_file():
        return []
    count = trained_on(plan)["images"]
    if plan.scale == "full" and count != preset.images:
        missing.append(
            f"{plan.data_dir} has {count:,} images, and the row's number is of {preset.images:,}: give the "
            "whole training set"
        )
    return [f"data: {plan.data_dir}, {count:,} images"]


def _weights(preset: Preset) -> list[str]:
    """The files that training starts from, with their checksums."""
    lines = []
    for name in WEIGHTS:
        path = Path(str(preset.options.get(name) or ""))
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"weights: {path}, SHA-256 {digest[:16]}")
    return lines


def _room(plan: Plan, preset: Preset, missing: list[str]) -> list[str]:
    """Device, memory and disk: what is needed at least, and what there is."""
    found, wanted = this_machine(plan.folder), needs(preset)
    there = sum(path.stat().st_size for path in plan.data_dir.glob("*.h5"))
    found["disk"]["free"] += there  # of what is needed in all
    judged = verdict(preset, found)
    missing += [reason for reason in judged["against"] if plan.device != "cpu" or "CUDA" not in reason]
    names = ", ".join(
        f"{each['name']} ({each['kind']}) {each['memory'] / GIB:.0f} GiB" for each in found["devices"]
    )
    if plan.device not in ("auto", "cpu", *(each["name"].partition(":")[0] for each in found["devices"])):
        missing.append(f"DEVICE is {plan.device}, which this machine does not have: leave it at auto")
    fetched = [line for line in judged["missing"] if "timm" in line]
    return [
        f"training: {wanted['steps']:,} steps of {wanted['batch']} images",
        f"memory: {wanted['device_memory'] / GIB:.2f} GiB for weights and optimisers, activations on top; "
        f"here: {names or 'no GPU'}",
        f"disk: {wanted['disk'] / 1e9:.2f} GB with up to {wanted['checkpoints']} checkpoint(s), "
        f"{there / 1e9:.2f} of them there; {(found['disk']['free'] - there) / 1e9:.0f} GB free",
        *fetched,
    ]
