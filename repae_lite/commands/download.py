"""Fetch released models into pretrained/NAME/.

Fetches released sets of the REPA-E organisation from the Hugging Face Hub. Finished files are kept when the
command is given again; an interrupted transfer continues where it broke off.
"""

import argparse

from repae_lite.checkpoints.released import ORGANISATION, RELEASED
from repae_lite.commands.presets import preset_names, read_preset

EVERYTHING_FOR = "all-for"
EPILOG = f"""Released sets: {", ".join(RELEASED)}. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE of
huggingface_hub count. Without --revision the newest commit is taken and printed; NAME@COMMIT takes that very
one."""
FLAGS = {
    "what is fetched": {
        "names": {
            "nargs": "+",
            "metavar": "NAME[@REVISION]",
            "help": f"released sets, or {EVERYTHING_FOR} PRESET: what a preset of repae check starts from",
        },
        "--revision": {
            "metavar": "COMMIT",
            "help": "branch, tag or commit of all names that have none of their own",
        },
        "--include": {
            "metavar": "PATTERN",
            "help": "take files that match, as in '*400k*', where several could be meant",
        },
        "--train-steps": {
            "type": int,
            "metavar": "N",
            "help": "of a run the checkpoint at this step (default: the last)",
        },
        "--list": {"action": "store_true", "help": "only list the remote files and their sizes"},
    },
    "what is written": {
        "--output-dir": {
            "default": "pretrained",
            "metavar": "FOLDER",
            "help": "where the sets go (default: pretrained)",
        },
    },
}


def run(args: argparse.Namespace) -> None:
    """Fetches the sets one after another and says where they are."""
    from repae_lite.checkpoints.download import check_sets, download_set
    from repae_lite.checkpoints.hub import look_up

    names = _sets_for_preset(args.names) if args.names[0] == EVERYTHING_FOR else args.names
    check_sets(names, step=args.train_steps)
    if args.revision and all("@" in name for name in names):
        raise ValueError(
            f"--revision {args.revision} is of no use, since all names have their own: leave it out"
        )
    if args.list and (args.include or args.train_steps is not None):
        raise ValueError("--list shows all files, whatever --include and --train-steps: leave these out")
    for name in names:
        if args.list:
            plain, _, pinned = name.partition("@")
            repository = look_up(f"{ORGANISATION}/{plain}", pinned or args.revision)
            print(f"{repository.name}@{repository.commit}")
            for file, size in sorted(repository.sizes.items()):
                print(f"  {size / 1e6:10.1f} MB  {file}")
            continue
        folder, repository, files = download_set(
            name, args.output_dir, include=args.include, step=args.train_steps, revision=args.revision
        )
        print(f"{folder}: {', '.join(files)} (of {repository.name}@{repository.commit})")


def _sets_for_preset(words: list[str]) -> tuple[str, ...]:
    """The released sets that "all-for PRESET" means.

    Raises:
        ValueError: no such preset, or it starts from nothing released.
    """
    known = preset_names()
    if len(words) != 2 or words[1] not in known:
        raise ValueError(
            f"{' '.join(words)!r} names no preset: give {EVERYTHING_FOR} and one of {', '.join(known)}"
        )
    released = read_preset(words[1]).released
    if not released:
        raise ValueError(f"{words[1]} starts from nothing released: its networks ship with the project")
    return released
