"""Loading and saving models: safe formats only, never partially, never in silence.

Taught in `notebooks/06_drop_in_vae.ipynb`. A VAE travels as one safetensors file whose header holds its configuration and
latent statistics.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from repae_lite.files import data_small_dir, load_weights, read_metadata, save_weights
from repae_lite.vae import AutoencoderKL, VAEConfig

SHIPPED = {"tiny": "vae.safetensors", "tiny-e2e": "vae_e2e.safetensors", "tiny-vae-only": "vae_only.safetensors"}


def save_vae(path: str | Path, vae: AutoencoderKL, *, scale: Tensor, bias: Tensor) -> None:
    """Writes a VAE as safetensors, with its configuration and latent statistics (scale = 1 / std and bias = mean, each (C,))."""
    metadata = {
        "vae_config": asdict(vae.config),
        "latents_scale": scale.flatten().tolist(),
        "latents_bias": bias.flatten().tolist(),
    }
    save_weights(path, vae, metadata)


def load_vae(source: str | Path) -> AutoencoderKL:
    """Loads a VAE in eval mode: a file written by `save_vae`, or one that ships with the project.

    Those are "tiny", and what became of it in 400 steps of chapter 05: "tiny-e2e" (REPA-E) and "tiny-vae-only" (the control).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no VAE of this project.
    """
    path = _vae_path(source)
    return load_weights(path, AutoencoderKL(_vae_config(path)))


def load_latent_stats(source: str | Path) -> tuple[Tensor, Tensor]:
    """(scale, bias), each (C,), of a VAE that `load_vae` can load. Errors as there."""
    metadata = _vae_metadata(_vae_path(source))
    return torch.tensor(metadata["latents_scale"]), torch.tensor(metadata["latents_bias"])


def _vae_path(source: str | Path) -> Path:
    return data_small_dir() / SHIPPED[str(source)] if str(source) in SHIPPED else Path(source)


def _vae_metadata(path: Path) -> dict:
    metadata = read_metadata(path)
    if not {"vae_config", "latents_scale", "latents_bias"} <= metadata.keys():
        raise ValueError(f"{path} holds no VAE configuration: this version loads files written by repae_lite.checkpoint.save_vae")
    return metadata


def _vae_config(path: Path) -> VAEConfig:
    config = _vae_metadata(path)["vae_config"]
    return VAEConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})
