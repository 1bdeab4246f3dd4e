"""`repae download`: the released sets, into pretrained/NAME/, the layout that the official commands expect."""

import fnmatch
from pathlib import Path

from repae_lite.hub import Repository, download, look_up
from repae_lite.layouts import DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS, OPTIONS, is_diffusers, pick_checkpoint, pick_weights
from repae_lite.recipes import ORGANISATION, RECIPES, RELEASED

EVERYTHING_FOR = "all-for"


def expand(names: list[str]) -> list[str]:
    """The sets that a command line names: NAME[@REVISION] …, or "all-for PRESET".

    Raises:
        ValueError: an unknown name, or a preset without released sets.
    """
    if names[:1] == [EVERYTHING_FOR]:
        if len(names) != 2 or names[1] not in RECIPES:
            raise ValueError(f"{' '.join(names)!r} names no preset: give {EVERYTHING_FOR} and one of {', '.join(RECIPES)}")
        if not RECIPES[names[1]].sets:
            raise ValueError(f"{names[1]} starts from nothing released: its networks ship with the project")
        return list(RECIPES[names[1]].sets)
    for name in names:
        if name.split("@")[0] not in RELEASED:
            raise ValueError(f"unknown released set {name!r}: choose among {', '.join(RELEASED)}, or {EVERYTHING_FOR} PRESET")
    return names


def choose_files(repository: Repository, kind: str, *, include: str | None = None, step: int | None = None) -> list[str]:
    """Which files of a released set are fetched.

    Args:
        repository: as the Hub lists it.
        kind: "vae" (weights, latent statistics and discriminator, as far as they are there), "diffusers" or "run" (args.json and a
            checkpoint).
        include: a pattern as in "*400k*", that the names of weights must match; it decides where several could be meant.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: there is no such file. ValueError: several could be meant.
    """
    names, where = list(repository.sizes), f"{repository.name} on the Hub"
    if include:
        names = [name for name in names if fnmatch.fnmatch(name, include) or name == OPTIONS]
    if kind == "run":
        chosen = [pick_checkpoint(names, step, where), *(name for name in names if name == OPTIONS)]
    elif kind == "diffusers":
        chosen = [DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS] if is_diffusers(names) else []
    else:
        top = [name for name in names if "/" not in name]
        try:
            picked = [pick_weights(top, part, where) for part in ("vae", "stats", "discriminator")]
        except ValueError as error:
            raise ValueError(f"{str(error).split(':')[0]}: choose by --include PATTERN, as in --include '*400k*'") from None
        chosen = [name for name in picked if name] if picked[0] else []
    if not chosen:
        held = ", ".join(sorted(repository.sizes)[:5]) or "nothing"
        raise FileNotFoundError(
            f"{where} has no files of a {kind} set (it has {held}): see --list, or choose by --include PATTERN"
        )
    return chosen


def download_set(
    name: str, output: str | Path, *, include: str | None = None, step: int | None = None, revision: str | None = None
) -> tuple[Path, Repository, list[str]]:
    """Fetches one released set, NAME[@REVISION], into OUTPUT/NAME/; finished files that have not changed are kept.

    Returns:
        The folder, what the Hub says about the repository, and the files that were chosen.

    Raises:
        ConnectionError, ValueError, FileNotFoundError, OSError: see `repae_lite.hub.download` and `choose_files`.
    """
    name, _, pinned = name.partition("@")
    repository = look_up(f"{ORGANISATION}/{name}", pinned or revision)
    files = choose_files(repository, RELEASED[name], include=include, step=step)
    folder = Path(output) / name
    download(repository, files, folder)
    return folder, repository, files
