"""A run's VAE as others want it: official files, safetensors, diffusers and a model card, in one folder.

The command is `repae export-vae`; taught in `notebooks/06_drop_in_vae.ipynb`.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from repae_lite import __version__
from repae_lite.checkpoints import hub
from repae_lite.checkpoints.diffusers_layout import to_diffusers_config
from repae_lite.checkpoints.find import (
    DIFFUSERS,
    DIFFUSERS_STEM,
    DISCRIMINATOR,
    OPTIONS,
    ModelFile,
    read_model,
)
from repae_lite.checkpoints.models import (
    export_diffusers,
    load_discriminator,
    load_latent_stats,
    load_vae,
    save_vae,
)
from repae_lite.data.latents import STATS, save_stats, vae_fingerprint
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.files import atomic_path, check_name, write_text
from repae_lite.utils.locks import writing

_PLACES = ("dir", "path", "ckpt")  # in names of options that are places on someone's machine


def export_vae(
    source: str | Path,
    name: str,
    save_dir: str | Path,
    *,
    step: int | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> dict:
    """Writes a run's VAE into SAVE_DIR/NAME/, in every layout, with a model card.

    The files are NAME.pt, NAME-latents-stats.pt, NAME-discriminator-ckpt.pt, NAME.safetensors, the two of a
    diffusers model, and README.md. Latents are normalised by the running statistics of the run's SiT, as the
    official export does. Everything is read and made before the first file is written or removed, and NAME.pt
    is there only when all the others are.

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
    weights, safe = f"{name}.pt", f"{name}.safetensors"
    stats_file, adversary = name + STATS, name + DISCRIMINATOR
    check_name(name, "--vae-name")
    if name.startswith(DIFFUSERS_STEM) or weights.endswith((STATS, DISCRIMINATOR)):
        raise ValueError(
            f"--vae-name is {name!r}, whose files would be taken for another part of a VAE: give another name"
        )
    folder = Path(save_dir) / name
    if (folder / "checkpoints").exists() or (folder / OPTIONS).exists():
        raise ValueError(f"{folder} holds a run: choose another --vae-name, or another --save-dir")
    possible = (weights, stats_file, safe, adversary, *DIFFUSERS, "README.md")
    there = [folder / file for file in possible if (folder / file).exists()]
    if there and not overwrite:
        raise ValueError(f"{there[0]} exists: choose another --vae-name, or replace it with --overwrite")
    vae, found = load_vae(source, step=step), read_model(source, "vae", step=step)
    stats = load_latent_stats(source, ema=ema, step=step)
    if len(stats.mean) != vae.config.latent_channels:
        raise ValueError(
            f"{source} has statistics of {len(stats.mean)} channels for a VAE of "
            f"{vae.config.latent_channels}: give its own run"
        )
    left_out, files = {}, [weights, stats_file, safe, "README.md"]
    try:
        discriminator = load_discriminator(source, step=step)
        files.append(adversary)
    except (ValueError, FileNotFoundError) as error:
        left_out["the discriminator"] = str(error)
    try:
        to_diffusers_config(vae.config, stats)
        files += DIFFUSERS
    except ValueError as error:
        left_out["the diffusers folder"] = str(error)
    diffusers = "the diffusers folder" not in left_out
    card = model_card(name, vae, stats, found, diffusers=diffusers)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in there:  # NAME.pt first: it must never lie beside parts of another export
            file.unlink()
        save_vae(folder / safe, vae, stats)
        save_stats(folder / stats_file, stats)
        if adversary in files:
            _save_state(folder / adversary, discriminator)
        if diffusers:
            export_diffusers(folder, vae, stats)
        write_text(folder / "README.md", card)
        _save_state(folder / weights, vae)  # last of all
    return {"folder": str(folder), "files": sorted(files), "left_out": left_out}


def model_card(
    name: str, vae: AutoencoderKL, stats: LatentStats, found: ModelFile, *, diffusers: bool
) -> str:
    """README.md of an exported VAE: what it is, of which run, its losses, and how to load it.

    Args:
        name: of the files.
        vae: for its sizes.
        stats: of its latents.
        found: the file it was read from, which leads to its run's options and metrics.
        diffusers: whether a diffusers folder was written.
    """
    c, metrics = vae.config, _last_metrics(found.path)
    rows = enumerate(zip(stats.mean.tolist(), stats.std.tolist(), strict=True))
    channels = [(i, f"{mean:.4f}", f"{std:.4f}") for i, (mean, std) in rows]
    shown = [(key, _shown(key, value)) for key, value in sorted(found.options.items()) if value is not None]
    return "\n".join([
        "---",
        *(["library_name: diffusers"] if diffusers else []),
        "tags:\n- vae\n- repa-e\n---\n",
        f"# {name}\n",
        f"A VAE of latent diffusion, {c.downsampling}-fold reduction, {c.latent_channels} latent channels, "
        f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M parameters. Exported by repae_lite "
        f"{__version__}; the method is REPA-E (https://arxiv.org/abs/2504.10483).\n",
        f"Fingerprint of the weights: `{vae_fingerprint(vae)[:16]}`.\n",
        _HOW_TO_LOAD.format(name=name),
        *([_WITH_DIFFUSERS] if diffusers else []),
        f"`{name}.pt`, `{name}{STATS}` and, if there is one, `{name}{DISCRIMINATOR}` are the same in the "
        "official code's layout.\n",
        "## Latent statistics\n",
        _table("channel", "mean", "std", rows=channels),
        f"## Where it comes from\n\nCheckpoint `{'/'.join(found.path.parts[-2:])}`.\n",
        *([_table("option of the run", "value", rows=shown)] if shown else []),
        "## Last measured\n",
        *(["On training batches, so no measure of quality.\n", _table("what", "value", rows=metrics.items())]
          if metrics else ["The run kept no metrics.\n"]),
    ])  # fmt: skip


_HOW_TO_LOAD = """\
## How to load it

```python
from repae_lite import load_latent_stats, load_vae

vae, stats = load_vae("{name}.safetensors"), load_latent_stats("{name}.safetensors")
z = vae.encode(x).sample()  # x in [-1, 1]
normalised = stats.normalize(z)  # (z - mean) / std, per channel
```
"""
_WITH_DIFFUSERS = """\
```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("this repository or folder")
mean, std = vae.config.latents_mean, vae.config.latents_std  # one number per channel
```
"""


def push(folder: str | Path, files: list[str], repository: str, *, private: bool = False) -> str:
    """Uploads the files of an export, and nothing else of its folder, and returns the repository's address.

    Raises:
        ValueError, ConnectionError: see `repae_lite.checkpoints.hub.upload`.
    """
    return hub.upload(Path(folder), files, repository, private=private)


def _save_state(path: Path, module: nn.Module) -> None:
    with atomic_path(path) as partial:
        torch.save({name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}, partial)


def _table(*titles: str, rows: Iterable[tuple]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _last_metrics(checkpoint: Path) -> dict:
    """The last line of the run's metrics.jsonl up to the checkpoint's step; empty without one.

    A killed run may leave a cut line.
    """
    names = (checkpoint.stem, checkpoint.parent.name)
    last = next((int(name) for name in names if name.isdecimal()), float("inf"))
    for path in (folder / "metrics.jsonl" for folder in checkpoint.parents[1:3]):
        for line in reversed(path.read_bytes().splitlines() if path.is_file() else []):
            with suppress(ValueError, RecursionError, LookupError, TypeError):
                entry = json.loads(line)
                if entry["step"] <= last:
                    return entry
    return {}


def _shown(key: str, value: object) -> str:
    """An option's value, fit for a table; of a path only the end: the rest is about someone's machine."""
    if (
        isinstance(value, str)
        and "/" in value
        and (value[0] in "/~." or any(word in key for word in _PLACES))
    ):
        value = Path(value).name
    return str(value).replace("|", r"\|")
