"""From what a user names to tensors: files, run folders, released sets, diffusers folders and repositories on the Hub.

Nothing that is read here can run code: safetensors holds tensors only, and pickles pass PyTorch's `weights_only` reader, which builds
tensors and plain containers, plus the one class that official checkpoints hold, `argparse.Namespace`.
"""

import argparse
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repae_lite.files import read_weights
from repae_lite.hub import fetch, parse_hub_id
from repae_lite.layouts import (
    DIFFUSERS_CONFIG,
    DIFFUSERS_WEIGHTS,
    OPTIONS,
    WEIGHTS,
    checkpoints,
    is_diffusers,
    pick_checkpoint,
    pick_weights,
)

OUR_FILES = ("sit", "ema", "vae", "discriminator")  # of a checkpoint folder, each .safetensors


@dataclass(frozen=True)
class ModelFile:
    """A model's weights as they were found.

    Attributes:
        path: the file, or the diffusers folder.
        state: names and tensors.
        header: what travels with them: the metadata of a safetensors file, or a diffusers config.json as "diffusers".
        options: the options of the run that made them; empty outside of runs.
    """

    path: Path
    state: dict[str, Tensor]
    header: dict
    options: dict


def read_model(source: str | Path, part: str, *, ema: bool = True, step: int | None = None) -> ModelFile:
    """Finds and reads one part of what a source holds.

    Args:
        source: a file, a run folder, a folder with a released set or a diffusers VAE, or a Hub id "owner/name[@revision]".
        part: "sit", "vae", "discriminator" or "stats" (latent statistics, or what holds them: a run's SiT).
        ema: of a run's two SiTs the averaged one.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: nothing there. ConnectionError: a Hub id that is not cached, without a connection.
        ValueError: not weights, more than weights, several files that could be meant, or a run without this part.
    """
    path = find(source, part, ema=ema, step=step)
    if path.is_dir():
        return ModelFile(path, read_weights(path / DIFFUSERS_WEIGHTS)[0], {"diffusers": read_json(path / DIFFUSERS_CONFIG)}, {})
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
        raise ValueError(f"{path} has no {key} (it has {held}): {_ELSEWHERE.get(part, 'choose another file')}")
    return ModelFile(path, _tensors(content[key], path), {}, _as_dict(content.get("args")) or run_options(path))


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
        names = [f"checkpoints/{entry.name}" for entry in (path / "checkpoints").iterdir()]
        path = path / pick_checkpoint(names, step, path)
        if path.is_file():
            return path
    if any((path / f"{name}.safetensors").is_file() for name in OUR_FILES):
        name = ("ema" if ema else "sit") if part in ("sit", "stats") else part
        if part == "stats" and not any((path / f"{sit}.safetensors").is_file() for sit in ("ema", "sit")):
            name = "vae"  # a run that trained a VAE alone: the statistics are in its header
        if not (path / f"{name}.safetensors").is_file():
            raise ValueError(f"{path} has no {name}.safetensors: {_ELSEWHERE.get(part, 'choose another checkpoint')}")
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
        raise FileNotFoundError(f"{path} holds no {_NOUNS[part]}: give a file, a run folder or the folder of a released model")
    return path / picked


_NOUNS = {"sit": "SiT", "vae": "VAE", "discriminator": "discriminator", "stats": "latent statistics"}


def read_pickle(path: Path) -> dict:
    """The dict in a file of `torch.save`, refusing whatever is more than tensors, plain values and an argparse.Namespace.

    Large files are not read but mapped: only tensors that are used are loaded.

    Raises:
        FileNotFoundError: no such file. ValueError: refused, with the class or function that it wanted; damaged; not a dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the weights {path} do not exist: check the path")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # what fails for it is said below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except _REFUSALS as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        protocol, wanted = _survey(path)
        wanted = named[1] if named else wanted
        if wanted:
            raise ValueError(
                f"{path} wants to run {wanted} when it is read: refused, since a file of weights needs no code; "
                "get its state dict as safetensors from whoever made it"
            ) from None
        if protocol > 2:
            raise ValueError(
                f"{path} is a pickle of protocol {protocol}, which PyTorch's reader of weights refuses: save it again with torch.save "
                "and its default protocol, 2, or as safetensors"
            ) from None
        raise ValueError(f"{path} is not a whole file of torch.save with tensors and plain values: get it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: give a file with a state dict or a run's checkpoint")
    return content


# what the readers of damaged and of hostile files raise
_REFUSALS = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError, EOFError)
_REFUSALS += (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _survey(path: Path) -> tuple[int, str | None]:
    """A pickle's protocol and the first class or function in it that is no part of PyTorch's own format; nothing is run."""
    protocol, strings, memo = 0, [], {}
    try:
        content = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        for operation, value, _ in pickletools.genops(content):
            name = None
            if operation.name == "PROTO":
                protocol = value
            elif operation.name == "MEMOIZE":
                memo[len(memo)] = strings[-1:]
            elif operation.name in ("BINGET", "LONG_BINGET"):
                strings += memo.get(value, [])
            elif operation.name in ("GLOBAL", "INST"):
                name = value.replace(" ", ".")
            elif operation.name == "STACK_GLOBAL":
                name = ".".join(strings[-2:])
            elif isinstance(value, str):
                strings.append(value)
            if name and name != "argparse.Namespace" and name.split(".")[0] not in ("torch", "collections"):
                return protocol, name
    except (*_REFUSALS, StopIteration):
        return 0, None  # not even a pickle
    return protocol, None


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file. ValueError: something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): restore it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: restore it")
    return content


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
    hub_id = parse_hub_id(str(source)) if isinstance(source, str) and not str(source).endswith(WEIGHTS) else None
    if hub_id is None or path.parent.exists():
        raise FileNotFoundError(f"the weights {source} do not exist: check the path, or give a Hub id as in REPA-E/e2e-vavae")
    return fetch(*hub_id, lambda names: _wanted(names, part, step, source))


def _wanted(names: list[str], part: str, step: int | None, where: object) -> list[str]:
    """Which files of a repository `find` needs for a part."""
    if checkpoints(names):
        return [pick_checkpoint(names, step, where), *(name for name in names if name == OPTIONS)]
    top = [name for name in names if "/" not in name]
    picked = {pick_weights(top, part, where)} - {None}
    if not picked and part == "stats":
        picked = {pick_weights(top, "vae", where)} - {None}
    if not picked and part in ("vae", "stats") and is_diffusers(top):
        picked = {DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS}
    if not picked:
        raise FileNotFoundError(f"{where} holds no {_NOUNS[part]} on the Hub: look at its files there")
    return sorted(picked)


def _tensors(state: dict, path: Path) -> dict[str, Tensor]:
    """A state dict that is nothing but names and tensors."""
    other = [f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        raise ValueError(f"{path} is no state dict: it holds {', '.join(other[:3]) or 'nothing'}")
    return _plain(state)


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DistributedDataParallel or torch.compile leave before every name."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _as_dict(options: object) -> dict:
    return vars(options) if isinstance(options, argparse.Namespace) else options if isinstance(options, dict) else {}
