"""From what a user names to tensors: files, run folders, released sets, diffusers folders and repositories on
the Hub.

Nothing that is read here can run code: safetensors holds tensors only, and pickles are read by
`repae_lite.utils.pickles`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from repae_lite.checkpoints.hub import fetch, parse_hub_id
from repae_lite.checkpoints.layouts import (
    DIFFUSERS_CONFIG,
    DIFFUSERS_WEIGHTS,
    OPTIONS,
    WEIGHTS,
    checkpoints,
    is_diffusers,
    pick_checkpoint,
    pick_weights,
)
from repae_lite.utils.files import read_json
from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.state_dicts import read_weights

OUR_FILES = ("sit", "ema", "vae", "discriminator")  # of a checkpoint folder, each .safetensors


@dataclass(frozen=True)
class ModelFile:
    """A model's weights as they were found.

    Attributes:
        path: the file, or the diffusers folder.
        state: names and tensors.
        header: what travels with them: the metadata of a safetensors file, or a diffusers config.json as
            "diffusers".
        options: the options of the run that made them; empty outside of runs.
    """

    path: Path
    state: dict[str, Tensor]
    header: dict
    options: dict


def read_model(source: str | Path, part: str, *, ema: bool = True, step: int | None = None) -> ModelFile:
    """Finds and reads one part of what a source holds.

    Args:
        source: a file, a run folder, a folder with a released set or a diffusers VAE, or a Hub id
            "owner/name[@revision]".
        part: "sit", "vae", "discriminator" or "stats" (latent statistics, or what holds them: a run's SiT).
        ema: of a run's two SiTs the averaged one.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: nothing there. ConnectionError: a Hub id that is not cached, without a connection.
        ValueError: not weights, more than weights, several files that could be meant, or a run without this
            part.
    """
    path = find(source, part, ema=ema, step=step)
    if path.is_dir():
        return ModelFile(
            path,
            read_weights(path / DIFFUSERS_WEIGHTS)[0],
            {"diffusers": read_json(path / DIFFUSERS_CONFIG)},
            {},
        )
    if path.suffix == ".safetensors":
        state, header = read_weights(path)
        return ModelFile(path, _plain(state), header, run_options(path))
    content = read_pickle(path)
    if not {"model", "ema", "vae"} & content.keys():
        state = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
        return ModelFile(path, _tensors(state, path), {}, {})
    key = ("ema" if ema else "model") if part in ("sit", "stats") else part
    if not isinstance(content.get(key), dict):
        held = ", ".join(sorted(name for name, value in content.items() if isinstance(value, dict)))
        raise ValueError(
            f"{path} has no {key} (it has {held}): {_ELSEWHERE.get(part, 'choose another file')}"
        )
    return ModelFile(
        path, _tensors(content[key], path), {}, _as_dict(content.get("args")) or run_options(path)
    )


_ELSEWHERE = {
    "vae": "a run with a frozen VAE keeps none, so give the VAE that it was trained on",
    "discriminator": "a run with a frozen VAE has none, and one without adversarial loss neither",
}


def find(source: str | Path, part: str, *, ema: bool = True, step: int | None = None) -> Path:
    """The file, or the diffusers folder, that `read_model` reads. Arguments and errors as there."""
    path = _local(source, part, step)
    if path.is_file():
        return path
    if (path / "checkpoints").is_dir():
        entries = (path / "checkpoints").iterdir()
        names = [f"checkpoints/{entry.name}" for entry in entries if entry.is_file() or any(entry.iterdir())]
        path = path / pick_checkpoint(names, step, path)
        if path.is_file():
            return path
    if any((path / f"{name}.safetensors").is_file() for name in OUR_FILES):
        name = ("ema" if ema else "sit") if part in ("sit", "stats") else part
        if part == "stats" and not any((path / f"{sit}.safetensors").is_file() for sit in ("ema", "sit")):
            name = "vae"  # a run that trained a VAE alone: the statistics are in its header
        if not (path / f"{name}.safetensors").is_file():
            raise ValueError(
                f"{path} has no {name}.safetensors: {_ELSEWHERE.get(part, 'choose another checkpoint')}"
            )
        return path / f"{name}.safetensors"
    names = [entry.name for entry in path.iterdir() if entry.is_file()]
    picked = pick_weights(names, part, path)
    if picked is None and part == "stats":
        if is_diffusers(names):
            return path
        picked = pick_weights(names, "vae", path)
    if picked is None and part == "vae" and is_diffusers(names):
        return path
    if picked is None:
        raise FileNotFoundError(
            f"{path} holds no {_NOUNS[part]}: give a file, a run folder or the folder of a released model"
        )
    return path / picked


_NOUNS = {"sit": "SiT", "vae": "VAE", "discriminator": "discriminator", "stats": "latent statistics"}


def run_options(path: Path) -> dict:
    """The options of the run that a checkpoint lies in, from its args.json; empty if it lies in none."""
    for folder in path.parents[:2]:
        if folder.name == "checkpoints" and (folder.parent / OPTIONS).is_file():
            return read_json(folder.parent / OPTIONS)
    return {}


def _local(source: str | Path, part: str, step: int | None) -> Path:
    """The file or folder on this machine, fetched from the Hub if need be."""
    path = Path(source)
    if path.exists():
        return path
    hub_id = (
        parse_hub_id(str(source)) if isinstance(source, str) and not str(source).endswith(WEIGHTS) else None
    )
    if hub_id is None or path.parent.exists():
        raise FileNotFoundError(
            f"the weights {source} do not exist: check the path, or give a Hub id as in REPA-E/e2e-vavae"
        )
    return fetch(*hub_id, lambda names: _wanted(names, part, step, source))


def _wanted(names: list[str], part: str, step: int | None, where: object) -> list[str]:
    """Which files of a repository `find` needs for a part."""
    if checkpoints(names):
        picked = pick_checkpoint(names, step, where)
        files = [picked] if picked.endswith(".pt") else _of_ours(names, picked, part, where)
        return [*files, *(name for name in names if name == OPTIONS)]
    top = [name for name in names if "/" not in name]
    picked = {pick_weights(top, part, where)} - {None}
    if not picked and part == "stats":
        picked = {pick_weights(top, "vae", where)} - {None}
    if not picked and part in ("vae", "stats") and is_diffusers(top):
        picked = {DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS}
    if not picked:
        raise FileNotFoundError(f"{where} holds no {_NOUNS[part]} on the Hub: look at its files there")
    return sorted(picked)


def _of_ours(names: list[str], folder: str, part: str, where: object) -> list[str]:
    """The files of our checkpoint folder that may hold a part."""
    for choice in {"sit": [("sit", "ema")], "stats": [("sit", "ema"), ("vae",)]}.get(part, [(part,)]):
        if found := [name for name in names if name in {f"{folder}/{one}.safetensors" for one in choice}]:
            return found
    raise FileNotFoundError(
        f"{where} has no {_NOUNS[part]} in {folder} on the Hub: {_ELSEWHERE.get(part, 'choose another')}"
    )


def _tensors(state: dict, path: Path) -> dict[str, Tensor]:
    """A state dict that is nothing but names and tensors."""
    other = [
        f"{name} ({type(value).__name__})"
        for name, value in state.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if other or not state:
        raise ValueError(f"{path} is no state dict: it holds {', '.join(other[:3]) or 'nothing'}")
    return _plain(state)


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DistributedDataParallel and torch.compile leave before every name, one in the
    other.
    """
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            return _plain({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def _as_dict(options: object) -> dict:
    return (
        vars(options)
        if isinstance(options, argparse.Namespace)
        else options
        if isinstance(options, dict)
        else {}
    )
