"""Loading and saving models: safe formats only, never partially, never in silence.

Taught in `notebooks/06_drop_in_vae.ipynb`. Sources are files that ship with the project, the official code's
files and run folders, our own, diffusers' folders and repositories on the Hub
(`repae_lite.checkpoints.find`). The architecture comes from what travels with the weights
(`repae_lite.checkpoints.infer`).
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from repae_lite.checkpoints.diffusers_layout import from_diffusers, to_diffusers, to_diffusers_config
from repae_lite.checkpoints.find import DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS, ModelFile, read_model
from repae_lite.checkpoints.infer import discriminator_fields, sit_config, vae_config
from repae_lite.data.latents import STATS, official_stats
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT, SiTConfig
from repae_lite.networks.vae import AutoencoderKL, VAEConfig
from repae_lite.utils.errors import first_line
from repae_lite.utils.files import write_text
from repae_lite.utils.state_dicts import build_module, fill_module, save_state, save_weights

# ---------------------------------------------------------------- saving


def save_vae(path: str | Path, vae: AutoencoderKL, stats: LatentStats) -> None:
    """Writes a VAE as safetensors; its configuration and latent statistics travel in the header."""
    header = {name: value.flatten().tolist() for name, value in official_stats(stats).items()}
    save_weights(path, vae, {"vae_config": asdict(vae.config), **header})


def save_sit(path: str | Path, sit: SiT) -> None:
    """Writes a SiT as safetensors, with its configuration."""
    save_weights(path, sit, {"sit_config": asdict(sit.config)})


def export_diffusers(folder: str | Path, vae: AutoencoderKL, stats: LatentStats) -> Path:
    """Writes a VAE as a folder that `diffusers.AutoencoderKL.from_pretrained` loads, without diffusers.

    The statistics go into its configuration as `latents_mean` and `latents_std`, one number per channel, and
    `scaling_factor` is 1: normalise latents by the former.

    Args:
        folder: made if missing; files of the same names in it are replaced.
        vae: any size without folding.
        stats: of its latents.

    Returns:
        The folder.

    Raises:
        ValueError: the VAE folds pixels into channels, which diffusers' class cannot express.
    """
    folder, config = Path(folder), to_diffusers_config(vae.config, stats)
    state = to_diffusers(vae.state_dict(), levels=len(vae.config.multipliers))
    save_state(folder / DIFFUSERS_WEIGHTS, state, {"format": "pt"})
    write_text(folder / DIFFUSERS_CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


# ---------------------------------------------------------------- loading


def load_vae(
    source: str | Path, *, config: VAEConfig | None = None, step: int | None = None
) -> AutoencoderKL:
    """Loads a VAE in eval mode.

    "tiny" ships with the project, and so does what became of it: in 400 steps of chapter 05 "tiny-e2e"
    (REPA-E) and "tiny-vae-only" (the control), in 20,000 steps of REPA-E "tiny-e2e-20k".

    Args:
        source: one of these names; a file (safetensors, an official .pt, or a training checkpoint of VA-VAE
            or latent diffusion, of which what is not the VAE is left aside); an official run folder or ours,
            or a checkpoint in it; a folder with a released set; a diffusers folder; or a Hub id
            "owner/name[@revision]".
        config: sizes, where neither the file nor its shapes tell them.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: nothing there, or a run without a VAE of its own.
        ConnectionError: not in the Hub's cache, and no connection.
        OSError: a file that the system does not let us read.
        ValueError: no VAE, a pickle that wants to run code, or weights that do not fit: the first three, with
            their shapes.
    """
    return build_vae(read_model(source, "vae", step=step), config)


def build_vae(found: ModelFile, config: VAEConfig | None = None) -> AutoencoderKL:
    """The VAE of a file that `read_model` has read; see `load_vae`."""
    config, state = config or vae_config(found), found.state
    if "_class_name" in found.header:
        state = from_diffusers(state, levels=len(config.multipliers))
    return build_module(AutoencoderKL, config, state, found.path)


def load_sit(
    source: str | Path, *, ema: bool = True, config: SiTConfig | None = None, step: int | None = None
) -> SiT:
    """Loads a SiT in eval mode; sources, `step` and errors as for `load_vae`.

    Two ship with the project, averaged and trained for 20,000 steps: "tiny" with REPA on the VAE of that
    name, and "tiny-e2e-20k" with REPA-E, together with its VAE.

    Args:
        ema: of a run's two SiTs the averaged one, which samples are drawn from; a file with a single SiT
            holds what it holds. (A file alone does not tell the alignment depth: REPA's choice for its size
            is taken. Only aligning further needs it.)
        config: sizes, where neither the file nor shapes and options tell them.
    """
    found = read_model(source, "sit", ema=ema, step=step)
    return build_module(SiT, config or sit_config(found), found.state, found.path)


def load_discriminator(source: str | Path, *, step: int | None = None) -> PatchDiscriminator:
    """Loads a discriminator in eval mode: a released `NAME-discriminator-ckpt.pt`, or that of a run.

    Sources and errors as for `load_vae`.
    """
    found = read_model(source, "discriminator", step=step)
    network = PatchDiscriminator(**discriminator_fields(found.state, found.path))
    return fill_module(network, found.state, found.path)


def load_latent_stats(source: str | Path, *, ema: bool = True, step: int | None = None) -> LatentStats:
    """Mean and standard deviation of a VAE's latents.

    They are what `save_vae` or diffusers recorded, the `NAME-latents-stats.pt` beside a released `NAME.pt`,
    or the running statistics of a run's SiT (the averaged one if `ema`). For sources and errors see
    `load_vae`.
    """
    found = read_model(source, "stats", ema=ema, step=step)
    record = {name: value for name, value in (found.header | found.state).items() if value is not None}
    if not {"latents_scale", "latents_std", "bn.running_var"} & record.keys():
        beside = found.path.with_name(found.path.stem + STATS)
        if not beside.is_file():
            raise ValueError(
                f"{found.path} records no latent statistics: put {beside.name} beside it, or give a run "
                "folder"
            )
        return load_latent_stats(beside)
    vector = partial(torch.as_tensor, dtype=torch.float32)
    try:
        if "latents_scale" in record:
            stats = LatentStats(vector(record["latents_bias"]), 1 / vector(record["latents_scale"]))
        elif "latents_std" in record:
            stats = LatentStats(vector(record["latents_mean"]), vector(record["latents_std"]))
        else:
            stats = LatentStats.from_moments(record["bn.running_mean"], record["bn.running_var"])
        return stats.check()
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the latent statistics in {found.path} cannot be used ({first_line(error)}): compute them again"
        ) from None
