"""`repae download`: the released sets, into pretrained/NAME/, where the official commands look for them."""

import fnmatch
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from repae_lite.checkpoints.find import OPTIONS, choose
from repae_lite.checkpoints.hub import Repository, download, look_up
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
        include: a pattern as in "*400k*" that the names of weights must match; it decides where several
            could be meant.
        step: of a run's checkpoints; the last one for None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: several could be meant.
    """
    names, held = list(repository.sizes), ", ".join(sorted(repository.sizes)[:5]) or "nothing"
    given = {"step": step, "remedy": "choose by --include PATTERN, as in --include '*400k*', or see --list"}
    if include:
        names = [name for name in names if fnmatch.fnmatch(name, include) or name == OPTIONS]
        given["remedy"] = f"give another pattern than --include {include!r}, or see --list"
    where = f"{repository.name} on the Hub (it has {held})"
    files = choose(names, kind, where, **given)
    for extra in ("stats", "discriminator") if kind == "vae" else ():
        with suppress(FileNotFoundError):
            files += choose(names, extra, where, **given)
    return list(dict.fromkeys(files))


def download_set(
    name: str,
    output: str | Path,
    *,
    include: str | None = None,
    step: int | None = None,
    revision: str | None = None,
) -> tuple[Path, Repository, list[str]]:
    """Fetches one released set, NAME[@REVISION], into OUTPUT/NAME/; whole, unchanged files are kept.

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
