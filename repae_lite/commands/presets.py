"""Presets: options of a training command under a name, each a YAML file in reproduce/presets.

A file names its `command` and gives options as the command line does (`batch-size: 256`). Three more keys
are for other commands, and training ignores them: `released`, the released sets that the run starts from,
which `repae download all-for NAME` fetches; `images`, how many images it is meant for (ImageNet's number
where it is left out), from which `repae check` computes disk space; and `published`, numbers that others
published, which `repae evaluate --preset NAME` prints beside ours, see `read_published`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repae_lite.training.config import COMMANDS, OPTIONS, TrainConfig, value_type
from repae_lite.utils.yaml_files import converted, read_yaml

IMAGENET = 1_281_167  # training images


@dataclass(frozen=True)
class Preset:
    """A way to train.

    Attributes:
        command: "repae", "ldm" or "vae".
        options: fields of `TrainConfig`.
        released: released sets that it starts from.
        images: how many images it is meant for.
        published: numbers of others, see `repae_lite.evaluation.results.read_published`.
    """

    command: str
    options: dict[str, Any]
    released: tuple[str, ...]
    images: int
    published: tuple[dict, ...] = ()

    @property
    def config(self) -> TrainConfig:
        """Its options and the defaults of their scale; where the VAE's weights are may be left open."""
        return TrainConfig.with_defaults(self.command, **self.options)


def presets_dir() -> Path:
    """Where presets are: in the installed package, or in reproduce/presets of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "presets"
    return installed if installed.is_dir() else package.parent / "reproduce" / "presets"


def preset_names() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in presets_dir().glob("*.yaml"))


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
        known = ", ".join(preset_names()) or "none"
        raise FileNotFoundError(f"there is no preset {name!r} ({path}): known are {known}")
    content = {}
    for key, value in read_yaml(path, "preset").items():
        option = key.lstrip("-").replace("-", "_")
        if option in content:
            raise ValueError(f"the preset {path} sets {option} twice, once as {key!r}: take one out")
        content[option] = value
    wanted = str(content.pop("command", f"train-{command}")).removeprefix("train-")
    if wanted not in COMMANDS:
        known = ", ".join(f"train-{each}" for each in COMMANDS)
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
    published = ()
    if "published" in content:
        from repae_lite.evaluation.results import read_published  # imports torch

        published = read_published(content.pop("published"), f"the preset {path}")
    images = converted(content.pop("images", str(IMAGENET)), int, f"images in the preset {path}")
    for key, value in content.items():
        if key not in OPTIONS or wanted not in OPTIONS[key].metadata["only"]:
            raise ValueError(
                f"the preset {path} sets {key!r}, which train-{wanted} does not have: take it out"
            )
        content[key] = converted(value, value_type(OPTIONS[key]), f"{key} in the preset {path}")
    return Preset(wanted, content, tuple(released), images, published)
