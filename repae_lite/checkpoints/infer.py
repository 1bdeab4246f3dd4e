"""What the names and shapes of a state dict tell about its network: the fields of its configuration.

Heads of attention and groups of norms leave no trace in shapes; who asks must know them otherwise.
"""

from torch import Tensor

State = dict[str, Tensor]


def vae_fields(state: State, where: object) -> dict:
    """The fields of a `VAEConfig`, without `groups`.

    Args:
        state: the state dict. where: what to call it in errors.

    Raises:
        ValueError: not a VAE of this kind.
    """
    first = _shape(state, "encoder.conv_in.weight", "VAE", where, 4)
    latent = _shape(state, "post_quant_conv.weight", "VAE", where, 4)
    width, fold = first[0], round((first[1] / 3) ** 0.5)
    levels = [
        _shape(state, f"encoder.down.{i}.block.0.conv1.weight", "VAE", where)[0]
        for i in range(_count(state, "encoder.down."))
    ]
    return {
        "latent_channels": latent[0],
        "width": width,
        "multipliers": tuple(channels // width for channels in levels),
        "blocks": _count(state, "encoder.down.0.block."),
        "attention_levels": tuple(
            i for i in range(len(levels)) if f"encoder.down.{i}.attn.0.q.weight" in state
        ),
        "mid_attention": "encoder.mid.attn_1.q.weight" in state,
        "fold": fold,
    }


def sit_fields(state: State, where: object) -> dict:
    """The fields of a `SiTConfig` that shapes tell: all sizes but `heads`. A row of the label table is the
    null class's.

    Raises:
        ValueError: not a SiT.
    """
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight", "SiT", where, 4)
    tokens = _shape(state, "pos_embed", "SiT", where, 3)[1]
    rows = _shape(state, "y_embedder.embedding_table.weight", "SiT", where)[0]
    heads = range(_count(state, "projectors."))
    conv = "projectors.0.weight" in state
    last = "weight" if conv else "4.weight"
    fields = {
        "in_channels": channels,
        "input_size": round(tokens**0.5) * patch,
        "patch_size": patch,
        "width": width,
        "depth": _count(state, "blocks."),
        "num_classes": rows - 1,
        "target_dims": tuple(_shape(state, f"projectors.{i}.{last}", "SiT", where)[0] for i in heads),
        "projector": "conv" if conv else "mlp",
    }
    if heads and not conv:
        fields["projector_width"] = _shape(state, "projectors.0.0.weight", "SiT", where)[0]
    return fields


def discriminator_fields(state: State, where: object) -> dict:
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


def _shape(state: State, name: str, kind: str, where: object, dims: int | None = None) -> tuple[int, ...]:
    tensor = state.get(name)
    if tensor is None or (dims or tensor.ndim) != tensor.ndim or not tensor.numel():
        held = ", ".join(sorted(state)[:3]) or "nothing"
        raise ValueError(
            f"{where} holds no {kind}: it lacks {name} or has it in another shape (it holds {held} …)"
        )
    return tuple(tensor.shape)


def _count(state: State, prefix: str) -> int:
    """How many numbers follow a prefix: the length of a list of modules."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
