"""A network's configuration from what travels with its weights: a header, its run's options, or the shapes.

Heads of attention and groups of norms leave no trace in shapes; they are those of the preset of that size.
"""

from dataclasses import asdict, replace

from torch import Tensor

from repae_lite.checkpoints.diffusers_layout import from_diffusers_config
from repae_lite.checkpoints.find import ModelFile
from repae_lite.networks.sit import SIT_PRESETS, SiTConfig
from repae_lite.networks.vae import VAE_PRESETS, VAEConfig
from repae_lite.utils.configs import checked_config


def vae_config(found: ModelFile) -> VAEConfig:
    """From the header; else the preset with the sizes that the shapes tell, whatever its latent channels.

    Raises:
        ValueError: not a VAE, or of no known size.
    """
    if "vae_config" in found.header:
        return _possible(checked_config(VAEConfig, found.header["vae_config"], found.path), found)
    if "_class_name" in found.header:
        return _possible(from_diffusers_config(found.header, found.path), found)
    sizes = vae_fields(found.state, found.path)
    channels = {"latent_channels": sizes.pop("latent_channels")}
    for preset in VAE_PRESETS.values():
        if sizes.items() <= asdict(preset).items():
            return replace(preset, **channels)
    raise ValueError(
        f"{found.path} holds a VAE of no known size ({', '.join(f'{k}={v}' for k, v in sizes.items())}), and "
        "shapes do not tell the groups of its norms: load it from Python with load_vae(…, "
        "config=VAEConfig(…)), then keep it by save_vae"
    )


def sit_config(found: ModelFile) -> SiTConfig:
    """From the header; else from the shapes and the preset that the run's options or the shapes name.

    Raises:
        ValueError: not a SiT, of no known size, or not of a run with these options.
    """
    if "sit_config" in found.header:
        return _possible(checked_config(SiTConfig, found.header["sit_config"], found.path), found)
    sizes, options, path = sit_fields(found.state, found.path), found.options, found.path
    name, classes = options.get("model"), options.get("num_classes")
    size = {"width": sizes["width"], "depth": sizes["depth"]}
    alike = (preset for preset in SIT_PRESETS.values() if size.items() <= asdict(preset).items())
    preset = next(alike, None) if name is None else SIT_PRESETS.get(str(name))
    if preset is None:
        raise ValueError(
            f"{path} holds a SiT of width {size['width']} and depth {size['depth']}, which is no known size, "
            "and shapes do not tell its heads: load it from Python with load_sit(…, config=SiTConfig(…)), "
            "then keep it by save_sit"
            if name is None
            else f"{path} is of a run with the unknown model {name!r}: give config=SiTConfig(…)"
        )
    if classes not in (None, sizes["num_classes"]):
        raise ValueError(
            f"{path} was trained without label dropout, so it has no null class: such a SiT is not built here"
            if classes == sizes["num_classes"] + 1
            else f"{path} has labels for {sizes['num_classes']} classes and the null class, but its run's "
            f"options say num_classes={classes!r}: they do not belong together"
        )
    if name is not None:  # its weights must fit the preset
        sizes |= {field: getattr(preset, field) for field in ("width", "depth", "patch_size")}
    said = {"encoder_depth": "alignment_depth", "bn_momentum": "bn_momentum"}
    sizes |= {said[name]: value for name, value in options.items() if name in said and value is not None}
    return checked_config(SiTConfig, asdict(preset) | sizes, path)


def _possible(config: VAEConfig | SiTConfig, found: ModelFile) -> VAEConfig | SiTConfig:
    """Refuses more layers than the file has tensors: merely to sketch them could take for ever."""
    layers = config.depth if isinstance(config, SiTConfig) else config.blocks
    if layers > len(found.state):
        raise ValueError(
            f"{found.path} is said to have {layers} layers, but it has {len(found.state)} tensors"
        )
    return config


def vae_fields(state: dict[str, Tensor], where: object) -> dict:
    """The fields of a `VAEConfig` that shapes tell: all but `groups`.

    Args:
        state: the state dict.
        where: what to call it in errors.

    Raises:
        ValueError: not a VAE of this kind.
    """
    width, folded, *_ = _shape(state, "encoder.conv_in.weight", "VAE", where, 4)
    levels = range(_count(state, "encoder.down."))
    channels = [_shape(state, f"encoder.down.{i}.block.0.conv1.weight", "VAE", where)[0] for i in levels]
    return {
        "latent_channels": _shape(state, "post_quant_conv.weight", "VAE", where, 4)[0],
        "width": width,
        "multipliers": tuple(count // width for count in channels),
        "blocks": _count(state, "encoder.down.0.block."),
        "attention_levels": tuple(i for i in levels if f"encoder.down.{i}.attn.0.q.weight" in state),
        "mid_attention": "encoder.mid.attn_1.q.weight" in state,
        "fold": round((folded / 3) ** 0.5),
    }


def sit_fields(state: dict[str, Tensor], where: object) -> dict:
    """The fields of a `SiTConfig` that shapes tell: all sizes but `heads`.

    A row of the label table is the null class's.

    Raises:
        ValueError: not a SiT.
    """
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight", "SiT", where, 4)
    targets, conv = range(_count(state, "projectors.")), "projectors.0.weight" in state
    last = "weight" if conv else "4.weight"
    fields = {
        "in_channels": channels,
        "input_size": round(_shape(state, "pos_embed", "SiT", where, 3)[1] ** 0.5) * patch,
        "patch_size": patch,
        "width": width,
        "depth": _count(state, "blocks."),
        "num_classes": _shape(state, "y_embedder.embedding_table.weight", "SiT", where)[0] - 1,
        "target_dims": tuple(_shape(state, f"projectors.{i}.{last}", "SiT", where)[0] for i in targets),
        "projector": "conv" if conv else "mlp",
    }
    if targets and not conv:
        fields["projector_width"] = _shape(state, "projectors.0.0.weight", "SiT", where)[0]
    return fields


def discriminator_fields(state: dict[str, Tensor], where: object) -> dict:
    """The arguments of a `PatchDiscriminator`.

    Raises:
        ValueError: not such a discriminator.
    """
    width, channels = _shape(state, "main.0.weight", "discriminator", where, 4)[:2]
    convolutions = sum(tensor.ndim == 4 for tensor in state.values())
    if convolutions < 3:
        raise ValueError(
            f"{where} holds no discriminator: it has {convolutions} convolutions, and the smallest has 3"
        )
    return {"in_channels": channels, "width": width, "layers": convolutions - 2}


def _shape(
    state: dict[str, Tensor], name: str, kind: str, where: object, dims: int | None = None
) -> tuple[int, ...]:
    tensor = state.get(name)
    if tensor is None or (dims or tensor.ndim) != tensor.ndim or not tensor.numel():
        raise ValueError(
            f"{where} holds no {kind}: it lacks {name} or has it in another shape (it holds "
            f"{', '.join(sorted(state)[:3])} …)"
        )
    return tuple(tensor.shape)


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbers follow a prefix: the length of a list of modules."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
