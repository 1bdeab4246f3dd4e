"""Loading and saving models: safe formats only, never partially, never in silence.

Taught in `notebooks/06_drop_in_vae.ipynb`. Sources are files that ship with the project, the official code's files and run folders, our
own, diffusers' folders and repositories on the Hub (`repae_lite.model_files`). The architecture comes from the configuration that
travels with the weights, or from their shapes and the options of the run.
"""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from repae_lite import architecture
from repae_lite.diffusers_layout import diffusers_config, from_diffusers, to_diffusers, vae_fields
from repae_lite.discriminator import PatchDiscriminator
from repae_lite.files import atomic_path, data_small_dir, fill_module, save_weights, write_text
from repae_lite.layouts import DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS, STATS
from repae_lite.model_files import ModelFile, read_model, read_pickle
from repae_lite.sit import SIT_PRESETS, SiT, SiTConfig
from repae_lite.vae import VAE_PRESETS, AutoencoderKL, VAEConfig

SHIPPED = {"tiny": "vae.safetensors", "tiny-e2e": "vae_e2e.safetensors", "tiny-vae-only": "vae_only.safetensors"}


# ---------------------------------------------------------------- saving


def save_vae(path: str | Path, vae: AutoencoderKL, *, scale: Tensor, bias: Tensor) -> None:
    """Writes a VAE as safetensors, with its configuration and latent statistics (scale = 1 / std and bias = mean, each (C,))."""
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


def load_vae(source: str | Path, *, config: VAEConfig | None = None, step: int | None = None) -> AutoencoderKL:
    """Loads a VAE in eval mode.

    "tiny" ships with the project, and so does what became of it in 400 steps of chapter 05: "tiny-e2e" (REPA-E) and
    "tiny-vae-only" (the control).

    Args:
        source: one of these names; a file (safetensors, or an official .pt); an official run folder or ours, or a checkpoint in it; a
            folder with a released set; a diffusers folder; or a Hub id "owner/name[@revision]".
        config: sizes, where neither the file nor its shapes tell them.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: nothing there. ConnectionError: not in the Hub's cache, and no connection.
        ValueError: no VAE, a pickle that wants to run code, or weights that do not fit (the first three, with shapes).
    """
    found = read_model(_shipped(source), "vae", step=step)
    vae = AutoencoderKL(config or _vae_config(found))
    state = found.state
    if "diffusers" in found.header:
        state = from_diffusers(state, vae.state_dict(), len(vae.config.multipliers))
    return fill_module(vae, state, found.path)


def load_sit(source: str | Path, *, ema: bool = True, config: SiTConfig | None = None, step: int | None = None) -> SiT:
    """Loads a SiT in eval mode; sources, `step` and errors as for `load_vae`.

    Args:
        ema: of a run's two SiTs the averaged one, which samples are drawn from; a file with a single SiT holds what it holds.
        config: sizes, where neither the file nor shapes and options tell them.
    """
    found = read_model(source, "sit", ema=ema, step=step)
    return fill_module(SiT(config or _sit_config(found)), found.state, found.path)


def load_discriminator(source: str | Path, *, step: int | None = None) -> PatchDiscriminator:
    """Loads a discriminator in eval mode: a released `NAME-discriminator-ckpt.pt`, or that of a run; errors as for `load_vae`."""
    found = read_model(source, "discriminator", step=step)
    network = PatchDiscriminator(**architecture.discriminator_fields(found.state, found.path))
    return fill_module(network, found.state, found.path)


def load_latent_stats(source: str | Path, *, ema: bool = True, step: int | None = None) -> tuple[Tensor, Tensor]:
    """(scale = 1 / std, bias = mean), each (C,), of a VAE's latents.

    They are what `save_vae` or diffusers recorded, the `NAME-latents-stats.pt` beside a released `NAME.pt`, or the running
    statistics of a run's SiT (the averaged one if `ema`). Sources and errors as for `load_vae`.
    """
    found = read_model(_shipped(source), "stats", ema=ema, step=step)
    state, header, beside = found.state, found.header, found.path.with_name(found.path.stem + STATS)
    config = header.get("diffusers", {})
    if {"latents_scale", "latents_bias"} <= header.keys():
        stats = torch.tensor(header["latents_scale"]), torch.tensor(header["latents_bias"])
    elif config.get("latents_mean") and config.get("latents_std"):
        stats = 1 / torch.tensor(config["latents_std"]), torch.tensor(config["latents_mean"])
    elif "bn.running_var" in state:
        stats = state["bn.running_var"].rsqrt(), state["bn.running_mean"].clone()
    else:
        if "latents_scale" not in state and beside.is_file():
            state = read_pickle(beside)
        if not {"latents_scale", "latents_bias"} <= state.keys():
            raise ValueError(f"{found.path} records no latent statistics: put {beside.name} beside it, or give a run folder")
        stats = state["latents_scale"].flatten().clone(), state["latents_bias"].flatten().clone()
    if not (torch.isfinite(stats[0]).all() and torch.isfinite(stats[1]).all() and bool((stats[0] > 0).all())):
        raise ValueError(f"the latent statistics in {found.path} are not positive scales and finite means: compute them again")
    return stats


def _shipped(source: str | Path) -> str | Path:
    return data_small_dir() / SHIPPED[str(source)] if str(source) in SHIPPED else source


# ---------------------------------------------------------------- the architecture of what was found


def _vae_config(found: ModelFile) -> VAEConfig:
    """From the file's header; else the preset with the sizes that the shapes tell, whatever its latent channels."""
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
        f"{found.path} holds a VAE of no known size ({told}), and shapes do not tell the groups of its norms: load it from Python with "
        "load_vae(…, config=VAEConfig(…)), then keep it by save_vae"
    )


def _sit_config(found: ModelFile) -> SiTConfig:
    """From the file's header; else from the shapes, with heads and tap of the size that the run's options or the shapes name."""
    if "sit_config" in found.header:
        return _rebuild(SiTConfig, found.header["sit_config"], found.path)
    sizes, options = architecture.sit_fields(found.state, found.path), found.options
    name = options.get("model")
    if name is not None and name not in SIT_PRESETS:
        raise ValueError(f"{found.path} is of a run with the unknown model {name!r}: give config=SiTConfig(…)")
    alike = [p for p in SIT_PRESETS.values() if (p.width, p.depth) == (sizes["width"], sizes["depth"])]
    if name is None and not alike:
        raise ValueError(
            f"{found.path} holds a SiT of width {sizes['width']} and depth {sizes['depth']}, which is no known size, and shapes do not "
            "tell its heads: load it from Python with load_sit(…, config=SiTConfig(…)), then keep it by save_sit"
        )
    if options.get("num_classes") == sizes["num_classes"] + 1:
        raise ValueError(f"{found.path} was trained without label dropout, so it has no null class: such a SiT is not built here")
    preset = SIT_PRESETS[name] if name is not None else alike[0]
    told = ("in_channels", "input_size", "num_classes", "target_dims", "projector", "projector_width")
    if name is None:
        told += ("patch_size",)
    changes = {key: sizes[key] for key in told if key in sizes}
    if options.get("encoder_depth") is not None:
        changes["alignment_depth"] = int(options["encoder_depth"])
    if options.get("bn_momentum") is not None:
        changes["bn_momentum"] = float(options["bn_momentum"])
    return replace(preset, **changes)


def _rebuild(kind: type, values: dict, path: Path) -> VAEConfig | SiTConfig:
    """A configuration from its JSON."""
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"{path} has sizes that this version does not know ({', '.join(sorted(unknown))}): update repae_lite")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{path} has sizes that are not of the right kind ({error}): get the file again") from None
