"""A run's VAE as others want it: official files, safetensors, diffusers and a model card, in one folder.

The command is `repae export-vae`; taught in `notebooks/06_drop_in_vae.ipynb`.
"""

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

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
    build_vae,
    export_diffusers,
    load_discriminator,
    load_latent_stats,
    save_vae,
)
from repae_lite.data.latents import STATS, official_stats, vae_fingerprint
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.files import atomic_path, check_name, write_text
from repae_lite.utils.locks import writing

_MARK = "Exported by repae_lite"  # in the card, by which an export is known
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
    official export does. Every file is written beside the folder first; then all are put in their places,
    NAME.pt last. On any failure what was there is as it was.

    Args:
        source: a run folder or a checkpoint in it, official or ours.
        name: of the VAE, and so of the files.
        save_dir: where its folder goes.
        step: of the run's checkpoints; the last one for None.
        ema: statistics of the averaged SiT.
        overwrite: replace an earlier export, of which nothing is left; other files stay.

    Returns:
        `folder`, `files` [names of those that were written], `left_out` {what: why}.

    Raises:
        FileNotFoundError, ValueError: see `repae_lite.load_vae`; ValueError for a name that the files cannot
            have, for files that are in the way or of no export, and for a folder that holds a run.
        OSError: the folder cannot be written.
    """
    weights, safe = f"{name}.pt", f"{name}.safetensors"
    stats_file, adversary = name + STATS, name + DISCRIMINATOR
    check_name(name, "--vae-name")
    if not str(save_dir):
        raise ValueError("--save-dir is empty: give a folder, or . for this one")
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
    _check_ours(folder, there, safe)
    found = read_model(source, "vae", step=step)
    vae = build_vae(found)
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
    with writing(folder), _beside(folder) as staged:
        save_vae(staged / safe, vae, stats)
        _save(staged / stats_file, official_stats(stats))
        if adversary in files:
            _save(staged / adversary, discriminator.state_dict())
        if diffusers:
            export_diffusers(staged, vae, stats)
        write_text(staged / "README.md", card)
        _save(staged / weights, vae.state_dict())
        # NAME.pt goes first and comes last: it must never lie beside parts of another export
        _swap(staged, folder, sorted(files, key=weights.__eq__), [file.name for file in there])
    return {"folder": str(folder), "files": sorted(files), "left_out": left_out}


def _check_ours(folder: Path, there: list[Path], safe: str) -> None:
    """Refuses to replace a file that any folder may have and that is of no export.

    Raises:
        ValueError: there is one.
    """
    card = folder / "README.md"
    if card.is_file():
        ours = _MARK in card.read_text(encoding="utf-8", errors="replace")
    else:
        ours = (folder / safe).is_file()
    common = [file for file in there if file.name in (*DIFFUSERS, "README.md")]
    if common and not ours:
        raise ValueError(
            f"{common[0]} is of no export: choose another --vae-name or --save-dir, or move it away"
        )


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A hidden folder beside another one, which is made if need be; what is left in it goes at the end."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        staged.mkdir()
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if made:
            with suppress(OSError):  # it holds the export
                folder.rmdir()


def _swap(staged: Path, folder: Path, new: list[str], old: list[str]) -> None:
    """Moves files out of a folder and others in, all or none."""
    aside = staged / "old"
    aside.mkdir()
    moves = [(folder / name, aside / name) for name in old] + [(staged / name, folder / name) for name in new]
    done = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


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
        f"{sum(p.numel() for p in vae.parameters()) / 1e6:.1f} M parameters. {_MARK} "
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


def _save(path: Path, state: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()  # written by Python, which tells a full disk from other trouble
    torch.save({name: tensor.cpu().clone() for name, tensor in state.items()}, buffer)
    with atomic_path(path) as partial:
        partial.write_bytes(buffer.getbuffer())


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
