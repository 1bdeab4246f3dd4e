"""Presets: options of a training command under a name, each a YAML file in reproduce/presets.

A file names its `command` and gives options as the command line does (`batch-size: 256`); with `base`, those
of another preset and its own on top, where an option without a value is left out again. Other keys are for
other commands, and training ignores them:
`released`, the released sets that the run starts from, which `repae download all-for NAME` fetches;
`images`, how many images it is meant for (ImageNet's number where it is left out), from which `repae check`
computes disk space; and what makes it a row, see `repae_lite.commands.rows`.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from repae_lite.training.config import COMMANDS, OPTIONS, TrainConfig, value_type
from repae_lite.utils.yaml_files import converted, read_yaml

IMAGENET = 1_281_167  # training images
OWN_KEYS = {  # of rows, which are no options
    "title", "source", "command", "published", "tolerance", "basis", "cost", "differences", "starts_from",
    "not_built", "tiny", "mid", "released", "note",
}  # fmt: skip
SHARED = {"command", "released", "tolerance", "basis", "cost", "differences"}  # that rows have of their base


@dataclass(frozen=True)
class Preset:
    """A way to train.

    Attributes:
        command: "repae", "ldm" or "vae".
        options: fields of `TrainConfig`.
        released: released sets that it starts from.
        images: how many images it is meant for.
    """

    command: str
    options: dict[str, Any]
    released: tuple[str, ...]
    images: int

    @property
    def config(self) -> TrainConfig:
        """Its options and the defaults of their scale; where the VAE's weights are may be left open."""
        return TrainConfig.with_defaults(self.command, **self.options)


def presets_dir() -> Path:
    """Where presets are: in the installed package, or in reproduce/presets of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "reproduce" / "presets"


def preset_names(*, based: bool = True) -> list[str]:
    """Names of all presets that a training command takes; without `based`, of those that have no base."""
    commands, found = {f"train-{each}" for each in COMMANDS}, []
    for path in sorted(presets_dir().glob("*.yaml")):
        content = preset_content(path, resolve=False)
        if "base" in content and based:
            content = preset_content(path)
        if "base" not in content and content.get("command") in commands:
            found.append(path.stem)
    return found


def preset_content(path: Path, *, resolve: bool = True) -> dict[str, Any]:
    """What a preset's file says, names with underscores; with `resolve`, on top of its base's options.

    Raises:
        ValueError, FileNotFoundError: see `read_yaml`; an option that is set twice; no such base.
    """
    content = {}
    for key, value in read_yaml(path, "preset").items():
        option = key.lstrip("-").replace("-", "_")
        if option in content:
            raise ValueError(f"the preset {path} sets {option} twice, once as {key!r}: take one out")
        content[option] = value
    if not resolve or "base" not in content:
        return content
    base = presets_dir() / f"{content.pop('base')}.yaml"
    if not base.is_file() or "base" in (options := preset_content(base, resolve=False)):
        raise ValueError(f"the preset {path} has the base {base.stem!r}: name a preset that has none itself")
    kept = {k: v for k, v in options.items() if k in SHARED or k not in OWN_KEYS | {"exp_name"}}
    return {k: v for k, v in (kept | content).items() if v is not None or k not in kept}


def read_preset(name: str, command: str | None = None) -> Preset:
    """A preset, by its name or as a file.

    Args:
        name: of a preset, or path of a YAML file.
        command: "repae", "ldm" or "vae": what it must be for; a file without `command` is for this one.

    Raises:
        ValueError: it is for another command, names an option that the command does not have, or gives a
            value of another type.
        FileNotFoundError: no such preset.
    """
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else presets_dir() / f"{name}.yaml"
    if not path.is_file():
        known = preset_names()
        near = get_close_matches(name, known, n=3) or preset_names(based=False)
        raise FileNotFoundError(
            f"there is no preset {name!r} ({path}): known are {', '.join(near) or 'none'}"
            + f" and {len(known) - len(near)} others (repae reproduce --list)" * (len(known) > len(near))
        )
    content = preset_content(path)
    if "not_built" in content:
        raise ValueError(f"the row {name} is not built: {content['not_built']}")
    if path.parent == presets_dir():
        content.setdefault("exp_name", path.stem)
    wanted = str(content.pop("command", f"train-{command}")).removeprefix("train-")
    if wanted not in COMMANDS:
        known = ", ".join(f"train-{each}" for each in COMMANDS)
        if "title" in content:
            raise ValueError(f"the row {name} trains nothing: see repae reproduce {name} --dry-run")
        raise ValueError(
            f"the preset {path} does not say which command it is for: add command: with one of {known}"
        )
    if command not in (None, wanted):
        raise ValueError(f"the preset {name} is for repae train-{wanted}, not for train-{command}")
    released = content.pop("released", [])
    if not isinstance(released, list) or not all(isinstance(name, str) for name in released):
        raise ValueError(
            f"released in the preset {path} is {released!r}: give a list of names, as in [sdvae]"
        )
    images = converted(content.pop("images", str(IMAGENET)), int, f"images in the preset {path}")
    content = {key: value for key, value in content.items() if key not in OWN_KEYS}
    return Preset(wanted, typed_options(content, wanted, path), tuple(released), images)


def typed_options(content: dict[str, Any], command: str, path: Path) -> dict[str, Any]:
    """Options of a preset's file as `TrainConfig` has them.

    Args:
        content: names with underscores, values as `read_yaml` gives them.
        command: "repae", "ldm" or "vae".
        path: of the file, for errors.

    Raises:
        ValueError: an option that the command does not have, or a value of another type.
    """
    found = {}
    for key, value in content.items():
        if key not in OPTIONS or command not in OPTIONS[key].metadata["only"]:
            raise ValueError(
                f"the preset {path} sets {key!r}, which train-{command} does not have: take it out"
            )
        found[key] = converted(value, value_type(OPTIONS[key]), f"{key} in the preset {path}")
    return found
