"""Which file is meant: the names in a run's folder, in a released set and in a diffusers folder, on the disk
or on the Hub.

A run folder holds args.json and checkpoints/0400000.pt (official) or checkpoints/0400000/ (ours). A released
VAE is NAME.pt, beside it NAME-latents-stats.pt and NAME-discriminator-ckpt.pt. Not every released name is
known beforehand, so files are picked by pattern and an ambiguous choice is refused.
"""

import re
from collections.abc import Iterable

from repae_lite.utils.files import check_name

STATS, DISCRIMINATOR = "-latents-stats.pt", "-discriminator-ckpt.pt"
DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OPTIONS = "args.json"
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # endings of files with weights, the safest first
_DIFFUSERS_STEM = "diffusion_pytorch_model"  # diffusers splits large weights over several files that begin so


def check_vae_name(name: str, option: str) -> None:
    """Refuses names that a VAE's files cannot have; arguments as for `check_name`.

    Raises:
        ValueError: see `check_name`; or its files would be taken for those of another part, so that they
            could not be loaded.
    """
    check_name(name, option)
    if name.startswith(_DIFFUSERS_STEM) or f"{name}.pt".endswith((STATS, DISCRIMINATOR)):
        raise ValueError(
            f"{option} is {name!r}, whose files would be taken for another part of a VAE: give another name"
        )


def pick_weights(names: Iterable[str], part: str, where: object) -> str | None:
    """The name of a VAE's, a discriminator's or a statistics file among names without folders; None if there
    is none.

    Of one file in two formats safetensors is taken.

    Args:
        names: of the files. part: "vae", "discriminator" or "stats". where: what to call the place in errors.

    Raises:
        ValueError: several could be meant.
    """
    wanted = {"discriminator": DISCRIMINATOR, "stats": STATS}.get(part)
    found = [
        name for name in sorted(names) if name.endswith(WEIGHTS) and not name.startswith(_DIFFUSERS_STEM)
    ]
    found = [
        name
        for name in found
        if (name.endswith(wanted) if wanted else not name.endswith((STATS, DISCRIMINATOR)))
    ]
    if len({_stem(name) for name in found}) > 1:
        raise ValueError(
            f"{where} holds several files that could be meant ({', '.join(found[:4])}): name one of them"
        )
    return min(
        found, key=lambda name: [name.endswith(suffix) for suffix in WEIGHTS].index(True), default=None
    )


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these are the files of a diffusers model."""
    return {DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS} <= set(names)


def checkpoints(names: Iterable[str]) -> dict[int, str]:
    """Step -> name of the checkpoints among paths relative to a run folder, "checkpoints/0400000.pt" or
    "checkpoints/0400000".

    The Hub lists no folders: there "checkpoints/0400000/vae.safetensors" tells of one. Of one step in both
    kinds the folder is taken.
    """
    found: dict[int, str] = {}
    for name in sorted(names):
        match = re.fullmatch(r"(checkpoints/(\d+))(\.pt|/[^/]+\.safetensors)?", name)
        if match and match[3] == ".pt":
            found.setdefault(int(match[2]), name)
        elif match:
            found[int(match[2])] = match[1]
    return found


def pick_checkpoint(names: Iterable[str], step: int | None, where: object) -> str:
    """The name of a run's checkpoint at a step, the last one for None.

    Raises:
        FileNotFoundError: the run has no checkpoint, or none at this step.
    """
    found = checkpoints(names)
    if not found:
        raise FileNotFoundError(
            f"{where} has no checkpoints yet: give the folder of a run that has saved one"
        )
    if step is not None and step not in found:
        steps = ", ".join(str(known) for known in sorted(found))
        raise FileNotFoundError(f"{where} has no checkpoint at step {step}: choose one of {steps}")
    return found[max(found) if step is None else step]


def files_of(names: Iterable[str], chosen: str) -> list[str]:
    """The files that a chosen name stands for: itself, or those in the folder of this name."""
    return [name for name in names if name == chosen or name.startswith(f"{chosen}/")]


def _stem(name: str) -> str:
    return next(name.removesuffix(suffix) for suffix in WEIGHTS if name.endswith(suffix))
