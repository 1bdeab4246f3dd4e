"""The VAE as diffusers' `AutoencoderKL` writes it, both ways and without diffusers: sizes and names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.vae import VAEConfig
from repae_lite.utils.configs import checked_config

_NAMES = (  # ours, diffusers'; # is a number. In this order from ours, in the reverse order to ours
    (".down.#.", ".down_blocks.#."),
    (".up.#.", ".up_blocks.#."),
    (".block.#.", ".resnets.#."),
    (".attn.#.", ".attentions.#."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    (".attentions.#.norm.", ".attentions.#.group_norm."),
    (".attentions.#.q.", ".attentions.#.to_q."),
    (".attentions.#.k.", ".attentions.#.to_k."),
    (".attentions.#.v.", ".attentions.#.to_v."),
    (".attentions.#.proj_out.", ".attentions.#.to_out.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
)
_OLD_NAMES = (  # of diffusers' attention before 0.17, and those that came after
    (".attentions.#.query.", ".attentions.#.to_q."),
    (".attentions.#.key.", ".attentions.#.to_k."),
    (".attentions.#.value.", ".attentions.#.to_v."),
    (".attentions.#.proj_attn.", ".attentions.#.to_out.0."),
)


@dataclass(frozen=True)
class DiffusersConfig:
    """What matters here of a VAE's config.json; where our network cannot vary, there is one value."""

    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...]
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...]
    block_out_channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    layers_per_block: PositiveInt
    latent_channels: PositiveInt
    norm_num_groups: PositiveInt
    mid_block_add_attention: bool = True
    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    act_fn: Literal["silu"] = "silu"
    use_quant_conv: Literal[True] = True
    use_post_quant_conv: Literal[True] = True


def to_diffusers_config(config: VAEConfig, stats: LatentStats) -> dict:
    """The config.json of a VAE and its latent statistics.

    Raises:
        ValueError: the VAE folds pixels into channels, which diffusers' class cannot express.
    """
    if config.fold != 1:
        raise ValueError(
            f"this VAE folds {config.fold}x{config.fold} pixels into channels (fold={config.fold}), which "
            "diffusers cannot: use fold=1"
        )
    prefixes = ["Attn" if i in config.attention_levels else "" for i in range(len(config.multipliers))]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.32.0",
        "down_block_types": [f"{prefix}DownEncoderBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpDecoderBlock2D" for prefix in reversed(prefixes)],
        "block_out_channels": [config.width * m for m in config.multipliers],
        "layers_per_block": config.blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.mid_attention,
        "scaling_factor": 1.0,
        "latents_mean": stats.mean.tolist(),
        "latents_std": stats.std.tolist(),
    }


def from_diffusers_config(content: dict, where: object) -> VAEConfig:
    """The sizes of the VAE that a config.json describes.

    Args:
        content: of the file.
        where: what to call it in errors.

    Raises:
        ValueError: another class, or options that our network does not have.
    """
    if content.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"{where} is a diffusers {content.get('_class_name')}: give the folder of an AutoencoderKL"
        )
    config = checked_config(DiffusersConfig, content, where, unknown="ignore")
    down, up, widths = config.down_block_types, config.up_block_types, config.block_out_channels
    attention, mirrored = (
        tuple(level for level, kind in enumerate(kinds) if kind.startswith("Attn"))
        for kinds in (down, reversed(up))
    )
    if attention != mirrored or any(width % widths[0] for width in widths):
        raise ValueError(
            f"{where} describes a VAE that is not built here: blocks {down}, {up}, "
            f"block_out_channels={widths}"
        )
    return checked_config(VAEConfig, {
        "latent_channels": config.latent_channels,
        "width": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "blocks": config.layers_per_block,
        "attention_levels": attention,
        "groups": config.norm_num_groups,
        "mid_attention": config.mid_block_add_attention,
    }, where)  # fmt: skip


def to_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Our state dict in diffusers' names; attention's 1x1 convolutions become linear layers."""
    return {
        _renamed(name, _NAMES, levels): tensor[:, :, 0, 0] if ".attn" in name and tensor.ndim == 4 else tensor
        for name, tensor in state.items()
    }


def from_diffusers(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A diffusers state dict in our names; names that are none of its own stay, so nothing gets lost."""
    back = [*_OLD_NAMES, *((theirs, ours) for ours, theirs in reversed(_NAMES))]
    named = {_renamed(name, back, levels): tensor for name, tensor in state.items()}
    return {
        name: tensor[:, :, None, None] if ".attn" in name and tensor.ndim == 2 else tensor
        for name, tensor in named.items()
    }


def _renamed(name: str, pairs: Iterable[tuple[str, str]], levels: int) -> str:
    """A name with the left of every pair replaced by its right; decoders count levels from opposite ends."""
    for old, new in pairs:
        name = re.sub(re.escape(old).replace(r"\#", r"(\d+)"), new.replace("#", r"\1"), name)
    return re.sub(r"(\.up(?:_blocks)?\.)(\d+)", lambda up: f"{up[1]}{levels - 1 - int(up[2])}", name)
