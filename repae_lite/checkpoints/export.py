"""A run's VAE as others want it: the official three files, safetensors, a diffusers folder and a model card,
all in one folder.

The command is `repae export-vae`; taught in `notebooks/06_drop_in_vae.ipynb`.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from repae_lite import __version__
from repae_lite.checkpoints import hub
from repae_lite.checkpoints.diffusers_layout import diffusers_config
from repae_lite.checkpoints.find import ModelFile, read_model
from repae_lite.checkpoints.layouts import (
    DIFFUSERS_CONFIG,
    DIFFUSERS_WEIGHTS,
    DISCRIMINATOR,
    OPTIONS,
    STATS,
    check_vae_name,
)
from repae_lite.checkpoints.models import (
    export_diffusers,
    load_discriminator,
    load_latent_stats,
    load_vae,
    save_vae,
)
from repae_lite.data.latents import save_stats, vae_fingerprint
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.files import atomic_path, write_text

_PRIVATE = (
    "dir",
    "path",
    "ckpt",
)  # options whose values are places on someone's machine: the card keeps their last part


def export_vae(
    source: str | Path,
    name: str,
    save_dir: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> dict:
    """Writes SAVE_DIR/NAME/ with NAME.pt, NAME-latents-stats.pt, NAME-discriminator-ckpt.pt,
    NAME.safetensors, the two files of a diffusers model and README.md, the model card.

    Latents are normalised by the running statistics of the run's SiT, as the official export does. Everything
    is read and made before the first file is written or removed, and NAME.pt is there only when all the
    others are.

    Args:
        source: a run folder or a checkpoint in it, official or ours.
        name: of the VAE, and so of the files.
        save_dir: where its folder goes.
        step: of the run's checkpoints; the last one for None.
        ema: statistics of the averaged SiT.
        overwrite: replace an earlier export, of which nothing is left.

    Returns:
        `folder`, `files` [names of those that were written], `left_out` {what: why}.

    Raises:
        FileNotFoundError, ValueError: see `repae_lite.load_vae`; ValueError for a name that the files cannot
            have, for files that are in the way and for a folder that holds a run.
        OSError: the folder cannot be written.
    """
    check_vae_name(name, "--vae-name")
    folder = Path(save_dir) / name
    if (folder / "checkpoints").exists() or (folder / OPTIONS).exists():
        raise ValueError(f"{folder} holds a run: choose another --vae-name, or another --save-dir")
    weights, stats, safe, adversary = f"{name}.pt", name + STATS, f"{name}.safetensors", name + DISCRIMINATOR
    possible = (weights, stats, safe, adversary, DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS, "README.md")
    if not overwrite:
        for file in possible:
            if (folder / file).exists():
                raise ValueError(
                    f"{folder / file} exists: choose another --vae-name, or replace it with --overwrite"
                )
    vae = load_vae(source, step=step)
    scale, bias = load_latent_stats(source, ema=ema, step=step)
    if len(scale) != vae.config.latent_channels:
        raise ValueError(
            f"{source} has statistics of {len(scale)} channels for a VAE of {vae.config.latent_channels}: "
            "give its own run"
        )
    left_out, discriminator = {}, None
    try:
        discriminator = load_discriminator(source, step=step)
    except (ValueError, FileNotFoundError) as error:
        left_out["the discriminator"] = str(error)
    try:
        diffusers = bool(diffusers_config(vae.config, scale, bias))
    except ValueError as error:
        diffusers, left_out["the diffusers folder"] = False, str(error)
    card = model_card(name, vae, scale, bias, read_model(source, "vae", step=step), diffusers=diffusers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the folder {folder} cannot be made ({error.strerror}): choose another --vae-name or --save-dir"
        ) from None
    for file in possible:  # NAME.pt first, so that it never lies beside parts of another export
        (folder / file).unlink(missing_ok=True)
    files = [weights, stats, safe, "README.md"]
    save_vae(folder / safe, vae, scale=scale, bias=bias)
    save_stats(folder / stats, scale, bias)
    if discriminator is not None:
        _save_state(folder / adversary, discriminator.state_dict())
        files.append(adversary)
    if diffusers:
        export_diffusers(folder, vae, scale=scale, bias=bias)
        files += [DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS]
    write_text(folder / "README.md", card)
    _save_state(folder / weights, vae.state_dict())  # last of all
    return {"folder": str(folder), "files": sorted(files), "left_out": left_out}


def model_card(
    name: str, vae: AutoencoderKL, scale: Tensor, bias: Tensor, found: ModelFile, *, diffusers: bool
) -> str:
    """README.md of an exported VAE: what it is, of which run, its losses, and how to load it.

    Args:
        name: of the files. vae: for its sizes. scale, bias: latent statistics, each (C,).
        found: the file it was read from; the options of its run and what lies around it in its run folder are
            quoted.
        diffusers: whether a diffusers folder was written.
    """
    options, metrics = found.options, _last_metrics(found.path)
    c = vae.config
    library = "library_name: diffusers\n" if diffusers else ""
    lines = [
        f"---\n{library}tags:\n- vae\n- repa-e\n---\n",
        f"# {name}\n",
        f"A VAE of latent diffusion, {c.downsampling}-fold reduction, {c.latent_channels} latent channels, "
        f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M parameters. Exported by repae_lite "
        f"{__version__}; the method "
        "is REPA-E (https://arxiv.org/abs/2504.10483).\n",
        f"Fingerprint of the weights: `{vae_fingerprint(vae)[:16]}`.\n",
        "## How to load it\n",
        "```python\nfrom repae_lite import load_latent_stats, load_vae\n\n"
        f'vae = load_vae("{name}.safetensors")\nscale, bias = load_latent_stats("{name}.safetensors")\n'
        "z = vae.encode(x).sample()  # x in [-1, 1]\nnormalised = (z - bias[:, None, None]) * scale[:, None, "
        "None]\n```\n",
    ]
    if diffusers:
        lines.append(
            '```python\nfrom diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained("this repository or folder")\n'
            "mean, std = vae.config.latents_mean, vae.config.latents_std  # one number per channel\n```\n"
        )
    lines += [
        f"`{name}.pt`, `{name}{STATS}` and, if there is one, `{name}{DISCRIMINATOR}` are the same in the "
        "official code's layout.\n",
        "## Latent statistics\n",
        "| channel | mean | std |\n|---|---|---|\n"
        + "\n".join(
            f"| {i} | {b:.4f} | {1 / s:.4f} |"
            for i, (s, b) in enumerate(zip(scale.tolist(), bias.tolist(), strict=True))
        )
        + "\n",
        "## Where it comes from\n",
        f"Checkpoint `{'/'.join(found.path.parts[-2:])}`.\n",
    ]
    if options:
        rows = "\n".join(
            f"| {key} | {_shown(key, value)} |" for key, value in sorted(options.items()) if value is not None
        )
        lines.append(f"| option of the run | value |\n|---|---|\n{rows}\n")
    lines.append("## Last measured\n")
    if metrics:
        rows = "\n".join(f"| {key} | {value} |" for key, value in metrics.items())
        lines.append(
            f"On training batches, so no measure of quality.\n\n| what | value |\n|---|---|\n{rows}\n"
        )
    else:
        lines.append("The run kept no metrics.\n")
    return "\n".join(lines)


def push(folder: str | Path, files: list[str], repository: str, *, private: bool = False) -> str:
    """Uploads the files of an export, and nothing else of its folder, and returns the repository's address.

    Raises:
        ValueError, ConnectionError: see `repae_lite.checkpoints.hub.upload`; ValueError too for a name that
            is none.
    """
    hub.check_repository(repository)
    return hub.upload(Path(folder), files, repository, private=private)


def _save_state(path: Path, state: dict[str, Tensor]) -> None:
    with atomic_path(path) as partial:
        torch.save({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, partial)


def _last_metrics(checkpoint: Path) -> dict:
    """The last line of the run's metrics.jsonl up to the checkpoint's step; empty without one. A killed run
    may leave a cut line.
    """
    for folder in checkpoint.parents[1:3]:
        path = folder / "metrics.jsonl"
        if path.is_file():
            digits = checkpoint.stem if checkpoint.stem.isdecimal() else checkpoint.parent.name
            last = int(digits) if digits.isdecimal() else float("inf")
            entries = [
                _entry(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            ]
            return next((entry for entry in reversed(entries) if entry and entry["step"] <= last), {})
    return {}


def _entry(line: str) -> dict:
    """A line of metrics; empty if it is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) and type(entry.get("step")) in (int, float) else {}


def _shown(key: str, value: object) -> str:
    """An option's value, fit for a table; of a path only its last part, since the rest is about someone's
    machine.
    """
    text = str(value)
    is_place = (
        isinstance(value, str) and "/" in text and (text[0] in "/~." or any(word in key for word in _PRIVATE))
    )
    return (Path(text).name if is_place else text).replace("|", r"\|")
