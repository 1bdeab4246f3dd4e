"""`repae download`: the released sets, into pretrained/NAME/, the layout that the official commands expect."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from repae_lite.checkpoints.hub import Repository, download, look_up
from repae_lite.checkpoints.layouts import (
    DIFFUSERS_CONFIG,
    DIFFUSERS_WEIGHTS,
    OPTIONS,
    checkpoints,
    files_of,
    is_diffusers,
    pick_checkpoint,
    pick_weights,
)
from repae_lite.checkpoints.released import ORGANISATION, RELEASED


def check_sets(names: Sequence[str], *, step: int | None = None) -> None:
    """Refuses names of sets that are not released.

    Args:
        names: NAME[@REVISION] of each set.
        step: of the checkpoint that is wanted, if one is.

    Raises:
        ValueError: an unknown name, or a step of a set that is no run.
    """
    for name in names:
        kind = RELEASED.get(name.split("@")[0])
        if kind is None:
            raise ValueError(
                f"unknown released set {name!r}: choose among {', '.join(RELEASED)}, or all-for PRESET"
            )
        if step is not None and kind != "run":
            raise ValueError(
                f"--train-steps is {step}, but {name} is no run and has no checkpoints to choose from: leave "
                "it out"
            )


def choose_files(
    repository: Repository, kind: str, *, include: str | None = None, step: int | None = None
) -> list[str]:
    """Which files of a released set are fetched.

    Args:
        repository: as the Hub lists it.
        kind: "vae" (weights, latent statistics and discriminator, as far as they are there), "diffusers" or
            "run" (args.json and a checkpoint).
        include: a pattern as in "*400k*", that the names of weights must match; it decides where several
            could be meant.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: there is no such file. ValueError: several could be meant.
    """
    names, where = list(repository.sizes), f"{repository.name} on the Hub"
    if include:
        names = [name for name in names if fnmatch.fnmatch(name, include) or name == OPTIONS]
    if kind == "run":
        chosen = (
            [*files_of(names, pick_checkpoint(names, step, where)), *files_of(names, OPTIONS)]
            if checkpoints(names)
            else []
        )
    elif kind == "diffusers":
        chosen = [DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS] if is_diffusers(names) else []
    else:
        top = [name for name in names if "/" not in name]
        try:
            picked = [pick_weights(top, part, where) for part in ("vae", "stats", "discriminator")]
        except ValueError as error:
            raise ValueError(
                f"{str(error).split(':')[0]}: choose by --include PATTERN, as in --include '*400k*'"
            ) from None
        chosen = [name for name in picked if name] if picked[0] else []
    if not chosen:
        held = ", ".join(sorted(repository.sizes)[:5]) or "nothing"
        matching = f" that match --include {include!r}" if include else ""
        remedy = "give another pattern" if include else "choose by --include PATTERN"
        raise FileNotFoundError(
            f"{where} has no files of a {kind} set{matching} (it has {held}): see --list, or {remedy}"
        )
    return chosen


def download_set(
    name: str,
    output: str | Path,
    *,
    include: str | None = None,
    step: int | None = None,
    revision: str | None = None,
) -> tuple[Path, Repository, list[str]]:
    """Fetches one released set, NAME[@REVISION], into OUTPUT/NAME/; finished files that have not changed are
    kept.

    Returns:
        The folder, what the Hub says about the repository, and the files that were chosen.

    Raises:
        ConnectionError, ValueError, FileNotFoundError, OSError: see `repae_lite.checkpoints.hub.download` and
            `choose_files`.
    """
    name, _, pinned = name.partition("@")
    repository = look_up(f"{ORGANISATION}/{name}", pinned or revision)
    files = choose_files(repository, RELEASED[name], include=include, step=step)
    folder = Path(output) / name
    download(repository, files, folder)
    return folder, repository, files
