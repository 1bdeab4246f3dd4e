"""The weights of the VAE's losses, from a YAML file in the official layout.

The official l1_lpips_kl_gan.yaml is built in, so that official commands run without it, and so is the same
without the adversarial term (the paper's Table 6). Taught in `notebooks/01_vae.ipynb`.
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from repae_lite.method.losses import VAELossConfig
from repae_lite.training.config import NO_GAN, OFFICIAL_LOSS
from repae_lite.utils.yaml_files import converted, read_yaml

WITHOUT_GAN = {"gan_weight": 0.0}
BUILT_IN = {OFFICIAL_LOSS: {}, NO_GAN: WITHOUT_GAN}

OFFICIAL_NAMES = {  # of the fields of `VAELossConfig`
    "reconstruction_loss": "pixel",
    "reconstruction_weight": "pixel_weight",
    "perceptual_weight": "perceptual_weight",
    "kl_weight": "kl_weight",
    "discriminator_weight": "gan_weight",
    "discriminator_start": "gan_start",
}
FIXED = {  # what the recipe has and this code does not vary: any other value is refused
    "perceptual_loss": "lpips",
    "quantize_mode": "vae",
    "quantizer_weight": 1.0,  # of a term that a VAE does not have
    "discriminator_factor": 1.0,
    "lecam_regularization_weight": 0.0,
    "logvar_init": 0.0,
}


def is_built_in(path: str) -> bool:
    """Whether a path means a built-in recipe and no file; official commands say configs/NAME.yaml."""
    name = Path(path)
    return name.name in BUILT_IN and str(name.parent) in (".", "configs") and not name.exists()


def read_loss_config(path: str) -> dict[str, Any]:
    """Fields of `repae_lite.VAELossConfig` from a loss configuration.

    The official recipe, l1_lpips_kl_gan.yaml or configs/l1_lpips_kl_gan.yaml where there is no such file, and
    l1_lpips_kl.yaml or "tiny", the same without the adversarial term, are built in. Sections, as in `losses:
    {kl_weight: 1e-6}`, are looked through.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, or a value that this code does not have.
    """
    if path == "tiny":
        return dict(WITHOUT_GAN)
    if is_built_in(path):
        return dict(BUILT_IN[Path(path).name])
    found, kinds = {}, {field.name: field.type for field in fields(VAELossConfig)}
    seen = set()
    for key, value in _leaves(read_yaml(Path(path), "loss configuration")):
        if key in seen:
            raise ValueError(f"{path} sets {key!r} in two sections: take one out")
        seen.add(key)
        if key in OFFICIAL_NAMES:
            name = OFFICIAL_NAMES[key]
            found[name] = converted(value, kinds[name], f"{key} in {path}")
            if kinds[name] is not str and not 0 <= found[name] < math.inf:
                raise ValueError(f"{key} in {path} is {value}: it must be 0 or more")
        elif key not in FIXED:
            known = ", ".join((*OFFICIAL_NAMES, *FIXED))
            raise ValueError(
                f"{path} sets {key!r}, which is not an option of the VAE's loss: known are {known}"
            )
        elif converted(value, type(FIXED[key]), f"{key} in {path}") != FIXED[key]:
            raise ValueError(f"{key} in {path} is {value!r}: only {FIXED[key]!r} is built here")
    return found


def _leaves(content: dict) -> list[tuple[str, Any]]:
    found = []
    for key, value in content.items():
        found += _leaves(value) if isinstance(value, dict) else [(key, value)]
    return found
