"""Loading and saving models: safe formats only, never partially, never in silence.

Taught in `notebooks/06_drop_in_vae.ipynb`. Sources are files that ship with the project, the official code's
files and run folders, our own, diffusers' folders and repositories on the Hub
(`repae_lite.checkpoints.find`). The architecture comes from the configuration that travels with the weights,
or from their shapes and the options of the run.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from repae_lite.checkpoints import infer as architecture
from repae_lite.checkpoints.diffusers_layout import diffusers_config, from_diffusers, to_diffusers, vae_fields
from repae_lite.checkpoints.find import ModelFile, read_model
from repae_lite.checkpoints.layouts import DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS, STATS
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.sit import SIT_PRESETS, SiT, SiTConfig
from repae_lite.networks.vae import VAE_PRESETS, AutoencoderKL, VAEConfig
from repae_lite.utils.files import atomic_path, data_small_dir, write_text
from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.state_dicts import check_fits, fill_module, save_weights

SHIPPED = {
    "tiny": "vae.safetensors",
    "tiny-e2e": "vae_e2e.safetensors",
    "tiny-vae-only": "vae_only.safetensors",
}


# ---------------------------------------------------------------- saving


def save_vae(path: str | Path, vae: AutoencoderKL, *, scale: Tensor, bias: Tensor) -> None:
    """Writes a VAE as safetensors, with its configuration and latent statistics (scale = 1 / std and bias =
    mean, each (C,)).
    """
    metadata = {
        "vae_config": asdict(vae.config),
        "latents_scale": scale.flatten().tolist(),
        "latents_bias": bias.flatten().tolist(),
    }
    save_weights(path, vae, metadata)


def save_sit(path: str | Path, sit: SiT) -> None:
    """Writes a SiT as safetensors, with its configuration."""
    save_weights(path, sit, {"sit_config": asdict(sit.config)})


def export_diffusers(folder: str | Path, vae: AutoencoderKL, *, scale: Tensor, bias: Tensor) -> Path:
    """Writes a VAE as a folder that `diffusers.AutoencoderKL.from_pretrained` loads; diffusers itself is not
    needed.

    The statistics go into its configuration as `latents_mean` and `latents_std`, one number per channel, and
    `scaling_factor` is 1: normalise latents by the former.

    Args:
        folder: made if missing; files of the same names in it are replaced.
        vae: any size without folding.
        scale, bias: 1 / std and mean of the latents, each (C,).

    Returns:
        The folder.

    Raises:
        ValueError: the VAE folds pixels into channels, which diffusers' class cannot express.
    """
    config = diffusers_config(vae.config, scale, bias)
    state = to_diffusers(vae.state_dict(), len(vae.config.multipliers))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / DIFFUSERS_WEIGHTS) as partial:
        partial.write_bytes(save(state, {"format": "pt"}))
    write_text(folder / DIFFUSERS_CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


# ---------------------------------------------------------------- loading


def load_vae(
    source: str | Path, *, config: VAEConfig | None = None, step: int | None = None
) -> AutoencoderKL:
    """Loads a VAE in eval mode.

    "tiny" ships with the project, and so does what became of it in 400 steps of chapter 05: "tiny-e2e"
    (REPA-E) and "tiny-vae-only" (the control).

    Args:
        source: one of these names; a file (safetensors, or an official .pt); an official run folder or ours,
            or a checkpoint in it; a folder with a released set; a diffusers folder; or a Hub id
            "owner/name[@revision]".
        config: sizes, where neither the file nor its shapes tell them.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: nothing there. ConnectionError: not in the Hub's cache, and no connection.
        ValueError: no VAE, a pickle that wants to run code, or weights that do not fit (the first three, with
            shapes).
    """
    found = read_model(_shipped(source), "vae", step=step)
    config = config or _vae_config(found)
    sketch, state = _sketch(AutoencoderKL, config, found.path), found.state
    if "diffusers" in found.header:
        state = from_diffusers(state, sketch.state_dict(), len(config.multipliers))
    check_fits(sketch, state, found.path)
    return fill_module(AutoencoderKL(config), state, found.path)


def load_sit(
    source: str | Path, *, ema: bool = True, config: SiTConfig | None = None, step: int | None = None
) -> SiT:
    """Loads a SiT in eval mode; sources, `step` and errors as for `load_vae`.

    Args:
        ema: of a run's two SiTs the averaged one, which samples are drawn from; a file with a single SiT
            holds what it holds. (A file alone does not tell the alignment depth: REPA's choice for its size
            is taken. Only aligning further needs it.)
        config: sizes, where neither the file nor shapes and options tell them.
    """
    found = read_model(source, "sit", ema=ema, step=step)
    config = config or _sit_config(found)
    check_fits(_sketch(SiT, config, found.path), found.state, found.path)
    return fill_module(SiT(config), found.state, found.path)


def load_discriminator(source: str | Path, *, step: int | None = None) -> PatchDiscriminator:
    """Loads a discriminator in eval mode: a released `NAME-discriminator-ckpt.pt`, or that of a run; errors
    as for `load_vae`.
    """
    found = read_model(source, "discriminator", step=step)
    network = PatchDiscriminator(**architecture.discriminator_fields(found.state, found.path))
    return fill_module(network, found.state, found.path)


def load_latent_stats(
    source: str | Path, *, ema: bool = True, step: int | None = None
) -> tuple[Tensor, Tensor]:
    """(scale = 1 / std, bias = mean), each (C,), of a VAE's latents.

    They are what `save_vae` or diffusers recorded, the `NAME-latents-stats.pt` beside a released `NAME.pt`,
    or the running statistics of a run's SiT (the averaged one if `ema`). Sources and errors as for
    `load_vae`.
    """
    found = read_model(_shipped(source), "stats", ema=ema, step=step)
    state, header, beside = found.state, found.header, found.path.with_name(found.path.stem + STATS)
    config = header.get("diffusers", {})
    if {"latents_scale", "latents_bias"} <= header.keys():
        stats = _numbers(header["latents_scale"], found.path), _numbers(header["latents_bias"], found.path)
    elif config.get("latents_mean") and config.get("latents_std"):
        stats = 1 / _numbers(config["latents_std"], found.path), _numbers(config["latents_mean"], found.path)
    elif "bn.running_var" in state:
        stats = state["bn.running_var"].rsqrt(), state["bn.running_mean"].clone()
    else:
        if "latents_scale" not in state and beside.is_file():
            state = read_pickle(beside)
        if not {"latents_scale", "latents_bias"} <= state.keys():
            raise ValueError(
                f"{found.path} records no latent statistics: put {beside.name} beside it, or give a run "
                "folder"
            )
        stats = _numbers(state["latents_scale"], beside), _numbers(state["latents_bias"], beside)
    if stats[0].shape != stats[1].shape or not stats[0].numel():
        raise ValueError(
            f"the latent statistics in {found.path} are {stats[0].numel()} scales and {stats[1].numel()} "
            "means: one of each for every "
            "channel is needed, so compute them again"
        )
    if not (torch.isfinite(stats[0]).all() and torch.isfinite(stats[1]).all() and bool((stats[0] > 0).all())):
        raise ValueError(
            f"the latent statistics in {found.path} are not positive scales and finite means: compute them "
            "again"
        )
    return stats


def _numbers(values: object, path: Path) -> Tensor:
    """Statistics as a float32 vector, whether they were recorded as (C,) or as (1, C, 1, 1)."""
    try:
        return torch.as_tensor(values, dtype=torch.float32).flatten().clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{path} records latent statistics that are no lists of numbers: compute them again"
        ) from None


def _shipped(source: str | Path) -> str | Path:
    return data_small_dir() / SHIPPED[str(source)] if str(source) in SHIPPED else source


# ---------------------------------------------------------------- the architecture of what was found


def _vae_config(found: ModelFile) -> VAEConfig:
    """From the file's header; else the preset with the sizes that the shapes tell, whatever its latent
    channels.
    """
    if "vae_config" in found.header:
        return _rebuild(VAEConfig, found.header["vae_config"], found.path)
    if "diffusers" in found.header:
        return VAEConfig(**vae_fields(found.header["diffusers"], found.path))
    sizes = architecture.vae_fields(found.state, found.path)
    channels = sizes.pop("latent_channels")
    for preset in VAE_PRESETS.values():
        if sizes == {name: getattr(preset, name) for name in sizes}:
            return replace(preset, latent_channels=channels)
    told = ", ".join(f"{name}={value}" for name, value in sizes.items())
    raise ValueError(
        f"{found.path} holds a VAE of no known size ({told}), and shapes do not tell the groups of its "
        "norms: load it from Python with "
        "load_vae(…, config=VAEConfig(…)), then keep it by save_vae"
    )


def _sit_config(found: ModelFile) -> SiTConfig:
    """From the file's header; else from the shapes, with heads and tap of the size that the run's options or
    the shapes name.
    """
    if "sit_config" in found.header:
        return _rebuild(SiTConfig, found.header["sit_config"], found.path)
    sizes, options = architecture.sit_fields(found.state, found.path), found.options
    name = options.get("model")
    if name is not None and not (isinstance(name, str) and name in SIT_PRESETS):
        raise ValueError(
            f"{found.path} is of a run with the unknown model {name!r}: give config=SiTConfig(…)"
        )
    alike = [p for p in SIT_PRESETS.values() if (p.width, p.depth) == (sizes["width"], sizes["depth"])]
    if name is None and not alike:
        raise ValueError(
            f"{found.path} holds a SiT of width {sizes['width']} and depth {sizes['depth']}, which is no "
            "known size, and shapes do not "
            "tell its heads: load it from Python with load_sit(…, config=SiTConfig(…)), then keep it by "
            "save_sit"
        )
    if options.get("num_classes") == sizes["num_classes"] + 1:
        raise ValueError(
            f"{found.path} was trained without label dropout, so it has no null class: such a SiT is not "
            "built here"
        )
    if options.get("num_classes") not in (None, sizes["num_classes"]):
        raise ValueError(
            f"{found.path} has labels for {sizes['num_classes']} classes and the null class, but its run's "
            "options say "
            f"num_classes={options['num_classes']!r}: they do not belong together"
        )
    preset = SIT_PRESETS[name] if name is not None else alike[0]
    told = ("in_channels", "input_size", "num_classes", "target_dims", "projector", "projector_width")
    if name is None:
        told += ("patch_size",)
    changes = {key: sizes[key] for key in told if key in sizes}
    for key, field, kind in (
        ("encoder_depth", "alignment_depth", int),
        ("bn_momentum", "bn_momentum", float),
    ):
        if options.get(key) is not None:
            try:
                changes[field] = kind(options[key])
            except (TypeError, ValueError, OverflowError):
                raise ValueError(
                    f"{found.path} is of a run with {key}={options[key]!r}, no number: restore its options"
                ) from None
    return _of(found.path, replace, preset, **changes)


def _rebuild(kind: type, values: dict, path: Path) -> VAEConfig | SiTConfig:
    """A configuration from its JSON."""
    known = {field.name: field.default for field in fields(kind)}
    if not isinstance(values, dict):
        raise ValueError(f"{path} has sizes that are a {type(values).__name__}: get the file again")
    if unknown := set(values) - set(known):
        raise ValueError(
            f"{path} has sizes that this version does not know ({', '.join(sorted(unknown))}): update "
            "repae_lite"
        )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for key, value in values.items():
        of = (int, float) if isinstance(known[key], float) else type(known[key])
        whole = not isinstance(value, tuple) or all(type(entry) is int for entry in value)
        if not isinstance(value, of) or (isinstance(value, bool) and of is not bool) or not whole:
            raise ValueError(
                f"{path} has sizes that are not of the right kind ({key}={value!r}): get the file again"
            )
    return _of(path, kind, **values)


def _of(path: Path, make: Callable, *args, **values):
    """What `make` makes of a file's sizes; where they are refused, the sentence names the file."""
    try:
        return make(*args, **values)
    except ValueError as error:
        raise ValueError(f"{path} has sizes that cannot be: {error}") from None


def _sketch(kind: type[nn.Module], config: VAEConfig | SiTConfig, path: Path) -> nn.Module:
    """The network without its memory, to compare shapes with: what a file says of itself may be anything.

    Raises:
        ValueError: there is no such network.
    """
    try:
        with torch.device("meta"):
            return kind(config)
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} has sizes of which no {kind.__name__} can be built ({reason}): get it again"
        ) from None
