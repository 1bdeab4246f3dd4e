"""A run's VAE as others want it: the official three files, safetensors, a diffusers folder and a model card, all in one folder.

The command is `repae export-vae`; taught in `notebooks/06_drop_in_vae.ipynb`.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from repae_lite import __version__, hub
from repae_lite.checkpoint import export_diffusers, load_discriminator, load_latent_stats, load_vae, save_vae
from repae_lite.files import atomic_path, write_text
from repae_lite.latents import save_stats, vae_fingerprint
from repae_lite.layouts import DISCRIMINATOR, STATS
from repae_lite.model_files import ModelFile, read_model
from repae_lite.vae import AutoencoderKL

_PRIVATE = ("dir", "path", "ckpt")  # options whose values are places on someone's machine: the card keeps their last part


def export_vae(
    source: str | Path, name: str, save_dir: str | Path, *, step: int | None = None, ema: bool = True, overwrite: bool = False
) -> dict:
    """Writes SAVE_DIR/NAME/ with NAME.pt, NAME-latents-stats.pt, NAME-discriminator-ckpt.pt, NAME.safetensors, the two files of a
    diffusers model and README.md, the model card.

    Latents are normalised by the running statistics of the run's SiT, as the official export does.

    Args:
        source: a run folder or a checkpoint in it, official or ours.
        name: of the VAE, and so of the files.
        save_dir: where its folder goes.
        step: of the run's checkpoints; the last one for None.
        ema: statistics of the averaged SiT.
        overwrite: replace files of an earlier export.

    Returns:
        `folder`, `files` [names], `left_out` {what: why}.

    Raises:
        FileNotFoundError, ValueError: see `repae_lite.checkpoint.load_vae`; ValueError for a name with folders in it and for an export
            that is in the way.
        OSError: the folder cannot be written.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"the VAE's name is {name!r}: give a name without folders")
    folder = Path(save_dir) / name
    if (folder / f"{name}.pt").exists() and not overwrite:
        raise ValueError(f"{folder / f'{name}.pt'} exists: choose another --vae-name, or replace it with --overwrite")
    vae = load_vae(source, step=step)
    scale, bias = load_latent_stats(source, ema=ema, step=step)
    if len(scale) != vae.config.latent_channels:
        raise ValueError(
            f"{source} has statistics of {len(scale)} channels for a VAE of {vae.config.latent_channels}: give its own run"
        )
    left_out = {}
    folder.mkdir(parents=True, exist_ok=True)
    save_vae(folder / f"{name}.safetensors", vae, scale=scale, bias=bias)
    save_stats(folder / (name + STATS), scale, bias)
    try:
        _save_state(folder / (name + DISCRIMINATOR), load_discriminator(source, step=step).state_dict())
    except (ValueError, FileNotFoundError) as error:
        left_out["the discriminator"] = str(error)
    try:
        export_diffusers(folder, vae, scale=scale, bias=bias)
    except ValueError as error:
        left_out["the diffusers folder"] = str(error)
    found = read_model(source, "vae", step=step)
    write_text(folder / "README.md", model_card(name, vae, scale, bias, found, diffusers="the diffusers folder" not in left_out))
    _save_state(folder / f"{name}.pt", vae.state_dict())  # last of all, so that it is there only when everything is
    return {"folder": str(folder), "files": sorted(entry.name for entry in folder.iterdir()), "left_out": left_out}


def model_card(name: str, vae: AutoencoderKL, scale: Tensor, bias: Tensor, found: ModelFile, *, diffusers: bool) -> str:
    """README.md of an exported VAE: what it is, of which run, its losses, and how to load it.

    Args:
        name: of the files. vae: for its sizes. scale, bias: latent statistics, each (C,).
        found: the file it was read from; the options of its run and what lies around it in its run folder are quoted.
        diffusers: whether a diffusers folder was written.
    """
    options, metrics = found.options, _last_metrics(found.path)
    c = vae.config
    library = "library_name: diffusers\n" if diffusers else ""
    lines = [
        f"---\n{library}tags:\n- vae\n- repa-e\n---\n",
        f"# {name}\n",
        f"A VAE of latent diffusion, {c.downsampling}-fold reduction, {c.latent_channels} latent channels, "
        f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M parameters. Exported by repae_lite {__version__}; the method "
        "is REPA-E (https://arxiv.org/abs/2504.10483).\n",
        f"Fingerprint of the weights: `{vae_fingerprint(vae)[:16]}`.\n",
        "## How to load it\n",
        "```python\nfrom repae_lite.checkpoint import load_latent_stats, load_vae\n\n"
        f'vae = load_vae("{name}.safetensors")\nscale, bias = load_latent_stats("{name}.safetensors")\n'
        "z = vae.encode(x).sample()  # x in [-1, 1]\nnormalised = (z - bias[:, None, None]) * scale[:, None, None]\n```\n",
    ]
    if diffusers:
        lines.append(
            '```python\nfrom diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained("this repository or folder")\n'
            "mean, std = vae.config.latents_mean, vae.config.latents_std  # one number per channel\n```\n"
        )
    lines += [
        f"`{name}.pt`, `{name}{STATS}` and, if there is one, `{name}{DISCRIMINATOR}` are the same in the official code's layout.\n",
        "## Latent statistics\n",
        "| channel | mean | std |\n|---|---|---|\n"
        + "\n".join(
            f"| {i} | {b:.4f} | {1 / s:.4f} |" for i, (s, b) in enumerate(zip(scale.tolist(), bias.tolist(), strict=True))
        )
        + "\n",
        "## Where it comes from\n",
        f"Checkpoint `{'/'.join(found.path.parts[-2:])}`.\n",
    ]
    if options:
        rows = "\n".join(f"| {key} | {_shown(key, value)} |" for key, value in sorted(options.items()) if value is not None)
        lines.append(f"| option of the run | value |\n|---|---|\n{rows}\n")
    lines.append("## Last measured\n")
    if metrics:
        rows = "\n".join(f"| {key} | {value} |" for key, value in metrics.items())
        lines.append(f"On training batches, so no measure of quality.\n\n| what | value |\n|---|---|\n{rows}\n")
    else:
        lines.append("The run kept no metrics.\n")
    return "\n".join(lines)


def push(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Uploads an exported folder, model card included, and returns the repository's address.

    Raises:
        ValueError, ConnectionError: see `repae_lite.hub.upload`; ValueError too for a name that is none.
    """
    parsed = hub.parse_hub_id(repository)
    if parsed is None or parsed[1]:
        raise ValueError(f"{repository!r} is no repository of the Hub: give OWNER/NAME")
    return hub.upload(Path(folder), repository, private=private)


def _save_state(path: Path, state: dict[str, Tensor]) -> None:
    with atomic_path(path) as partial:
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, partial)


def _last_metrics(checkpoint: Path) -> dict:
    """The last line of the run's metrics.jsonl up to the checkpoint's step; empty without one."""
    for folder in checkpoint.parents[1:3]:
        path = folder / "metrics.jsonl"
        if path.is_file():
            digits = checkpoint.stem if checkpoint.stem.isdigit() else checkpoint.parent.name
            entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
            known = [entry for entry in entries if not digits.isdigit() or entry.get("step", 0) <= int(digits)]
            return known[-1] if known else {}
    return {}


def _shown(key: str, value: object) -> str:
    """An option's value; of a path only its last part, since the rest is about someone's machine."""
    text = str(value)
    is_place = isinstance(value, str) and "/" in text and (text[0] in "/~." or any(word in key for word in _PRIVATE))
    return Path(text).name if is_place else text
