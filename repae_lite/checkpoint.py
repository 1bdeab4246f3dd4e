"""Loading and saving models: safe formats only, never partially, never in silence.

Taught in `notebooks/06_drop_in_vae.ipynb`. A VAE travels as one safetensors file whose header holds its configuration and
latent statistics.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from repae_lite.files import atomic_path, data_small_dir, load_weights, read_metadata, save_weights, write_text
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


def export_diffusers(folder: str | Path, vae: AutoencoderKL, *, scale: Tensor, bias: Tensor) -> Path:
    """Writes a VAE as a folder that `diffusers.AutoencoderKL.from_pretrained` loads; diffusers itself is not needed.

    The statistics go into its configuration as `latents_mean` and `latents_std`, one number per channel, and `scaling_factor` is 1:
    normalise latents by the former.

    Args:
        folder: made if missing; files of the same names in it are replaced.
        vae: any size without folding.
        scale, bias: 1 / std and mean of the latents, each (C,).

    Returns:
        The folder.

    Raises:
        ValueError: the VAE folds pixels into channels, which diffusers' class cannot express.
    """
    c = vae.config
    if c.fold != 1:
        raise ValueError(f"this VAE folds {c.fold}x{c.fold} pixels into channels (fold={c.fold}), which diffusers cannot: use fold=1")
    levels = range(len(c.multipliers))
    attention = [i in c.attention_levels for i in levels]
    config = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.32.0",
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attention)],
        "block_out_channels": [c.width * m for m in c.multipliers],
        "layers_per_block": c.blocks,
        "latent_channels": c.latent_channels,
        "norm_num_groups": c.groups,
        "mid_block_add_attention": c.mid_attention,
        "scaling_factor": 1.0,
        "latents_mean": bias.flatten().tolist(),
        "latents_std": (1 / scale).flatten().tolist(),
    }
    state = {}
    for name, tensor in vae.state_dict().items():
        linear = "attn" in name and tensor.ndim == 4  # diffusers keeps attention's 1x1 convolutions as linear layers
        state[_diffusers_name(name, len(levels))] = (tensor[:, :, 0, 0] if linear else tensor).detach().cpu().contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "diffusion_pytorch_model.safetensors") as partial:
        partial.write_bytes(save(state, {"format": "pt"}))
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


_DIFFUSERS_NAMES = (  # in this order
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.(up|down)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def _diffusers_name(name: str, levels: int) -> str:
    """The name in diffusers of a weight of ours; its decoder counts levels from the bottom."""
    name = re.sub(r"\.up\.(\d+)\.", lambda level: f".up_blocks.{levels - 1 - int(level[1])}.", name)
    for pattern, replacement in _DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


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
