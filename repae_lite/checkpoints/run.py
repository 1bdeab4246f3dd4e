"""What a run can draw images with: its SiT, the VAE that decodes, and where both come from."""

from dataclasses import dataclass
from pathlib import Path

import torch

from repae_lite.checkpoints.find import read_model, resolve
from repae_lite.checkpoints.infer import sit_config
from repae_lite.checkpoints.models import load_latent_stats, load_vae
from repae_lite.checkpoints.official import read_official
from repae_lite.data.latents import vae_fingerprint
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.state_dicts import build_module

TOLERANCE = 0.02  # of a channel's std: how far the latent statistics of a SiT and of its VAE may be apart


@dataclass(frozen=True)
class Run:
    """A trained run, ready to draw images.

    Attributes:
        sit: in eval mode.
        vae: in eval mode.
        name: of the run's folder or repository.
        step: finished steps; None for a file that does not say.
        options: of the run, such as "path_type".
        about: JSON values that identify what the images depend on.
    """

    sit: SiT
    vae: AutoencoderKL
    name: str
    step: int | None
    options: dict
    about: dict


def load_run(
    source: str | Path, *, step: int | None = None, ema: bool = True, vae: str | Path | None = None
) -> Run:
    """Loads a run's SiT and the VAE that its latents belong to.

    That is the run's own VAE where it has one, with the running statistics of the SiT; a run on a frozen VAE
    names its VAE in its options.

    Args:
        source: a run folder or a checkpoint in it, official or ours, or a Hub id.
        step: of its checkpoints; the last one for None.
        ema: the averaged SiT.
        vae: the VAE of a run that has none of its own, instead of the one that its options name.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: see `repae_lite.load_sit`; ValueError too for a VAE
            whose latents have other statistics than those that the SiT was trained on.
    """
    found = read_model(source, "sit", ema=ema, step=step)
    sit = build_module(SiT, sit_config(found), found.state, found.path)
    own = _has_vae(source, step)
    if own and vae is not None:
        raise ValueError(f"{source} has a VAE of its own, tuned together with its SiT: leave out --vae-ckpt")
    vae_source = source if own else vae or found.options.get("vae_ckpt")
    if vae_source is None:
        raise ValueError(f"{source} has no VAE and does not say on which it was trained: give --vae-ckpt")
    decoder = load_vae(vae_source, step=step if own else None)
    _check_decodes(sit, decoder, found.path, vae_source, own)
    path = found.path
    number = next((int(name) for name in (path.stem, path.parent.name) if name.isdecimal()), None)
    name = _name(source, path)
    return Run(
        sit,
        decoder,
        name,
        number,
        found.options,
        {
            "weights": "ema" if ema else "raw",
            "sit": vae_fingerprint(sit)[:16],
            "vae": vae_fingerprint(decoder)[:16],
            "run": name,
            "step": number,
            "enc_type": found.options.get("enc_type"),
        },
    )


def _has_vae(source: str | Path, step: int | None) -> bool:
    try:
        path = resolve(source, "vae", step=step)
    except FileNotFoundError:
        return False
    return path.suffix == ".safetensors" or "vae" in read_official(path)[0]


def _name(source: str | Path, path: Path) -> str:
    """The run's folder, or the repository's name."""
    for folder in path.parents[:2]:
        if folder.name == "checkpoints" and not folder.is_symlink() and "snapshots" not in folder.parts[-3:]:
            return folder.resolve().parent.name
    return Path(str(source).split("@")[0]).stem


def _check_decodes(sit: SiT, vae: AutoencoderKL, path: Path, vae_source: object, own: bool) -> None:
    channels, latents = sit.config.in_channels, vae.config.latent_channels
    if channels != latents:
        raise ValueError(
            f"{path} draws latents of {channels} channels, but the VAE {vae_source} has {latents}: give the "
            "VAE that it was trained on"
        )
    if own:
        return
    trained, stats = sit.latent_stats(), load_latent_stats(vae_source)
    apart = torch.maximum((trained.mean - stats.mean).abs(), (trained.std - stats.std).abs()) / stats.std
    if float(apart.max()) > TOLERANCE:
        raise ValueError(
            f"{path} was trained on latents of other statistics than those of the VAE {vae_source} (a "
            f"channel is {float(apart.max()):.2g} standard deviations off): give the VAE that it was "
            "trained on"
        )
