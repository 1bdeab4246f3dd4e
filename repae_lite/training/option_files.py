"""Options in files: YAML, and the weights of the VAE's losses.

The official l1_lpips_kl_gan.yaml is built in, so that official commands run without it. Taught in
`notebooks/01_vae.ipynb`.
"""

import math
from pathlib import Path
from typing import Any

import yaml

OFFICIAL_LOSS = "l1_lpips_kl_gan.yaml"


def read_yaml(path: Path, what: str) -> dict:
    """A YAML file with names and values.

    Raises:
        FileNotFoundError: no such file. ValueError: something else in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the {what} {path} does not exist: check the path")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the {what} {path} is not YAML ({str(error).splitlines()[0]}): see reproduce/presets"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(
            f"the {what} {path} holds a {type(content).__name__}: give names and values, one a line"
        )
    return content


def converted(value: Any, kind: type, what: str) -> Any:
    """A YAML value as the type of its option: 1e-4 is a string to YAML, and 1 no float."""
    try:
        if kind is not bool and not isinstance(value, bool):
            return kind(value)
    except (TypeError, ValueError):
        pass
    if kind is bool and isinstance(value, bool):
        return value
    raise ValueError(f"{what} is {value!r}: it must be of type {kind.__name__}")


_LOSS_KEYS = {  # names of the loss configuration: ours, and what they say in a YAML file
    "reconstruction_loss": ("pixel", str),
    "reconstruction_weight": ("pixel_weight", float),
    "perceptual_weight": ("perceptual_weight", float),
    "kl_weight": ("kl_weight", float),
    "discriminator_weight": ("gan_weight", float),
    "discriminator_start": ("gan_start", int),
}
_LOSS_FIXED = {  # what the recipe has and this code does not vary: any other value is refused
    "perceptual_loss": "lpips",
    "quantize_mode": "vae",
    "quantizer_weight": 1.0,  # of a term that a VAE does not have
    "discriminator_factor": 1.0,
    "lecam_regularization_weight": 0.0,
    "logvar_init": 0.0,
}


def read_loss_config(path: str) -> dict[str, Any]:
    """Fields of `repae_lite.VAELossConfig` from a loss configuration.

    The official recipe, l1_lpips_kl_gan.yaml, and "tiny", the same without the adversarial term, are built
    in. Sections, as in `losses: {kl_weight: 1e-6}`, are looked through.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, or a value that this code does not have.
    """
    if path == "tiny":
        return {"gan_weight": 0.0}
    if Path(path).name == OFFICIAL_LOSS and not Path(path).exists():
        return {}
    found: dict[str, Any] = {}
    for key, value in _leaves(read_yaml(Path(path), "loss configuration")):
        if key in _LOSS_KEYS:
            name, kind = _LOSS_KEYS[key]
            found[name] = converted(value, kind, f"{key} in {path}")
            if kind is not str and not 0 <= found[name] < math.inf:
                raise ValueError(f"{key} in {path} is {value}: it must be 0 or more")
        elif key not in _LOSS_FIXED:
            known = ", ".join((*_LOSS_KEYS, *_LOSS_FIXED))
            raise ValueError(
                f"{path} sets {key!r}, which is not an option of the VAE's loss: known are {known}"
            )
        elif value != _LOSS_FIXED[key]:
            raise ValueError(f"{key} in {path} is {value!r}: only {_LOSS_FIXED[key]!r} is built here")
    return found


def _leaves(content: dict) -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        found += _leaves(value) if isinstance(value, dict) else [(str(key), value)]
    return found
