"""The VAE as diffusers' `AutoencoderKL` writes it: its configuration and its names for the weights, both
ways, without diffusers.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

_NAMES = (  # in this order
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
_OLD_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}  # of diffusers' attention before 0.17
_FIXED = {  # what our network cannot do otherwise, and diffusers' default
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True,
}  # fmt: skip


def diffusers_config(config: Any, scale: Tensor, bias: Tensor) -> dict:
    """The config.json of a VAE.

    Args:
        config: a `VAEConfig`. scale, bias: 1 / std and mean of the latents, each (C,).

    Raises:
        ValueError: the VAE folds pixels into channels, which diffusers' class cannot express.
    """
    fold = config.fold
    if fold != 1:
        raise ValueError(
            f"this VAE folds {fold}x{fold} pixels into channels (fold={fold}), which diffusers cannot: use "
            "fold=1"
        )
    attention = [i in config.attention_levels for i in range(len(config.multipliers))]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.32.0",
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention],
        "up_block_types": [
            "AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in reversed(attention)
        ],
        "block_out_channels": [config.width * m for m in config.multipliers],
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": 1.0,
        "latents_mean": bias.flatten().tolist(),
        "latents_std": (1 / scale).flatten().tolist(),
    }


def vae_fields(config: dict, where: object) -> dict:
    """The fields of a `VAEConfig` that a config.json describes.

    Args:
        config: its content. where: what to call it in errors.

    Raises:
        ValueError: another class, or options that our network does not have.
    """
    if config.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"{where} is a diffusers {config.get('_class_name')}: give the folder of an AutoencoderKL"
        )
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise ValueError(f"{where} has a configuration without {', '.join(missing)}: restore its config.json")
    sizes, lists = _NEEDED[3:], ((_NEEDED[0], str), (_NEEDED[1], str), (_NEEDED[2], int))
    odd = [key for key in sizes if type(config[key]) is not int or config[key] < 1]
    odd += [
        key
        for key, kind in lists
        if not isinstance(config[key], list) or {type(entry) for entry in config[key]} != {kind}
    ]
    if not odd and min(config["block_out_channels"]) < 1:
        odd = ["block_out_channels"]
    if odd:
        raise ValueError(
            f"{where} has a configuration with {odd[0]}={config[odd[0]]!r}: restore its config.json"
        )
    wrong = [f"{key}={config[key]!r}" for key, value in _FIXED.items() if config.get(key, value) != value]
    down, up = config["down_block_types"], config["up_block_types"]
    attention = tuple(i for i, kind in enumerate(down) if kind == "AttnDownEncoderBlock2D")
    mirrored = tuple(i for i, kind in enumerate(reversed(up)) if kind == "AttnUpDecoderBlock2D")
    if attention != mirrored or set(down + up) - set(_BLOCKS):
        wrong.append(f"blocks {down}, {up}")
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        wrong.append(f"block_out_channels={widths}")
    if wrong:
        raise ValueError(f"{where} describes a VAE that is not built here: {'; '.join(wrong)}")
    return {
        "latent_channels": config["latent_channels"],
        "width": widths[0],
        "multipliers": tuple(width // widths[0] for width in widths),
        "blocks": config["layers_per_block"],
        "attention_levels": attention,
        "groups": config["norm_num_groups"],
        "mid_attention": config.get("mid_block_add_attention", True),
    }


_NEEDED = (
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_num_groups",
)
_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def to_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Our state dict in diffusers' names; attention's 1x1 convolutions become linear layers."""
    return {
        _name(name, levels): tensor[:, :, 0, 0] if _attention(name, tensor) else tensor
        for name, tensor in state.items()
    }


def from_diffusers(state: dict[str, Tensor], names: Iterable[str], levels: int) -> dict[str, Tensor]:
    """A diffusers state dict in our names; whatever has none keeps diffusers', so that nothing is dropped in
    silence.
    """
    ours = {_name(name, levels): name for name in names}
    converted = {}
    for name, tensor in state.items():
        for old, new in _OLD_NAMES.items():
            name = name.replace(f".{old}.", f".{new}.") if ".attentions." in name else name
        mine = ours.get(name, name)
        linear = ".attn" in mine and mine.endswith(".weight") and tensor.ndim == 2
        converted[mine] = tensor[:, :, None, None] if linear else tensor
    return converted


def _attention(name: str, tensor: Tensor) -> bool:
    return ".attn" in name and tensor.ndim == 4


def _name(name: str, levels: int) -> str:
    """The name in diffusers of a weight of ours; its decoder counts levels from the bottom."""
    name = re.sub(r"\.up\.(\d+)\.", lambda level: f".up_blocks.{levels - 1 - int(level[1])}.", name)
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
