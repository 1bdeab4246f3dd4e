"""Which file is meant: the names in a run's folder, in a released set and in a diffusers folder, on the disk or on the Hub.

A run folder holds args.json and checkpoints/0400000.pt (official) or checkpoints/0400000/ (ours). A released VAE is NAME.pt, beside it
NAME-latents-stats.pt and NAME-discriminator-ckpt.pt. Not every released name is known beforehand, so files are picked by pattern
and an ambiguous choice is refused.
"""

import re
from collections.abc import Iterable

STATS, DISCRIMINATOR = "-latents-stats.pt", "-discriminator-ckpt.pt"
DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
OPTIONS = "args.json"
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # endings of files with weights, the safest first


def pick_weights(names: Iterable[str], part: str, where: object) -> str | None:
    """The name of a VAE's, a discriminator's or a statistics file among names without folders; None if there is none.

    Of one file in two formats safetensors is taken.

    Args:
        names: of the files. part: "vae", "discriminator" or "stats". where: what to call the place in errors.

    Raises:
        ValueError: several could be meant.
    """
    wanted = {"discriminator": DISCRIMINATOR, "stats": STATS}.get(part)
    found = [name for name in sorted(names) if name.endswith(WEIGHTS) and not name.startswith("diffusion_pytorch_model")]
    found = [name for name in found if (name.endswith(wanted) if wanted else not name.endswith((STATS, DISCRIMINATOR)))]
    if len({_stem(name) for name in found}) > 1:
        raise ValueError(f"{where} holds several files that could be meant ({', '.join(found[:4])}): name one of them")
    return min(found, key=lambda name: [name.endswith(suffix) for suffix in WEIGHTS].index(True), default=None)


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these are the files of a diffusers model."""
    return {DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS} <= set(names)


def checkpoints(names: Iterable[str]) -> dict[int, str]:
    """Step -> name of the checkpoints among paths relative to a run folder, "checkpoints/0400000.pt" or "checkpoints/0400000"."""
    matches = [re.fullmatch(r"checkpoints/(\d+)(\.pt)?", name) for name in sorted(names, reverse=True)]  # a folder before its .pt
    return {int(match[1]): match[0] for match in matches if match}


def pick_checkpoint(names: Iterable[str], step: int | None, where: object) -> str:
    """The name of a run's checkpoint at a step, the last one for None.

    Raises:
        FileNotFoundError: the run has no checkpoint, or none at this step.
    """
    found = checkpoints(names)
    if not found:
        raise FileNotFoundError(f"{where} has no checkpoints yet: give the folder of a run that has saved one")
    if step is not None and step not in found:
        steps = ", ".join(str(known) for known in sorted(found))
        raise FileNotFoundError(f"{where} has no checkpoint at step {step}: choose one of {steps}")
    return found[max(found) if step is None else step]


def _stem(name: str) -> str:
    return next(name.removesuffix(suffix) for suffix in WEIGHTS if name.endswith(suffix))
