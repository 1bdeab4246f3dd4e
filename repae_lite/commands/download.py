"""Fetch released models into pretrained/NAME/, and data sets as class folders.

Fetches released sets of the REPA-E organisation from the Hugging Face Hub. Finished files are kept when the
command is given again; an interrupted transfer continues where it broke off. `data:NAME` writes a data set to
NAME/train and NAME/val, one folder of images to a class.
"""

import argparse

from repae_lite.checkpoints.released import ORGANISATION, RELEASED
from repae_lite.commands.presets import preset_names, read_preset
from repae_lite.data.public_data import DATA_SETS, PREFIX, check_data_set, fetch_data_set

EVERYTHING_FOR = "all-for"
DATA = "; ".join(
    f"{PREFIX}{name}: {each.about} (licence: {each.licence})" for name, each in DATA_SETS.items()
)
EPILOG = f"""Released sets: {", ".join(RELEASED)}. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE of
huggingface_hub count. Without --revision the newest commit is taken and printed; NAME@COMMIT takes that very
one. Data sets: {DATA}."""
FLAGS = {
    "what is fetched": {
        "names": {
            "nargs": "+",
            "metavar": "NAME[@REVISION]",
            "help": f"released sets, data sets as {PREFIX}NAME, or {EVERYTHING_FOR} PRESET: what a preset of "
            "repae check starts from",
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
            "metavar": "FOLDER",
            "help": f"where they go (default: pretrained, and images for {PREFIX}NAME)",
        },
    },
}


def run(args: argparse.Namespace) -> None:
    """Fetches the sets one after another and says where they are."""
    from repae_lite.checkpoints.download import check_sets, download_set
    from repae_lite.checkpoints.hub import look_up

    names = _sets_for_preset(args.names) if args.names[0] == EVERYTHING_FOR else args.names
    data = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    names = [name for name in names if not name.startswith(PREFIX)]
    if data:
        _check_data(data, args)
    check_sets(names, step=args.train_steps)
    if args.revision and names and all("@" in name for name in names):
        raise ValueError(
            f"--revision {args.revision} is of no use, since all names have their own: leave it out"
        )
    if args.list and (args.include or args.train_steps is not None):
        raise ValueError("--list shows all files, whatever --include and --train-steps: leave these out")
    for name in data:
        folder, chosen = fetch_data_set(name, args.output_dir or "images"), DATA_SETS[name]
        counts = ", ".join(f"{count:,} in {split}" for split, count in chosen.images.items())
        print(f"{folder}: {counts} ({chosen.about}; licence: {chosen.licence})")
    for name in names:
        if args.list:
            plain, _, pinned = name.partition("@")
            repository = look_up(f"{ORGANISATION}/{plain}", pinned or args.revision)
            print(f"{repository.name}@{repository.commit}")
            for file, size in sorted(repository.sizes.items()):
                print(f"  {size / 1e6:10.1f} MB  {file}")
            continue
        folder, repository, files = download_set(
            name,
            args.output_dir or "pretrained",
            include=args.include,
            step=args.train_steps,
            revision=args.revision,
        )
        print(f"{folder}: {', '.join(files)} (of {repository.name}@{repository.commit})")


def _check_data(names: list[str], args: argparse.Namespace) -> None:
    """Refuses unknown data sets, and flags that data sets do not have.

    Raises:
        ValueError: one of these.
    """
    for name in names:
        check_data_set(name)
    for option in ("revision", "include", "train_steps", "list"):
        if (value := getattr(args, option)) is not None and value is not False:
            raise ValueError(
                f"--{option.replace('_', '-')} is for released sets, and {PREFIX}{names[0]} is none: fetch "
                "it by a command of its own"
            )


def _sets_for_preset(words: list[str]) -> tuple[str, ...]:
    """The released sets that "all-for PRESET" means; a preset or a row.

    Raises:
        ValueError: no such preset, or it starts from nothing released.
    """
    from repae_lite.commands.rows import read_row, row_names

    known = preset_names()
    if len(words) == 2 and words[1] in set(row_names()) - set(known):  # of released weights alone
        row = read_row(words[1])
        if row.not_built:
            raise ValueError(f"the row {row.name} is not built: {row.not_built}")
        return row.released
    if len(words) != 2 or words[1] not in known:
        raise ValueError(
            f"{' '.join(words)!r} names no preset: give {EVERYTHING_FOR} and one of {', '.join(known)}"
        )
    released = read_preset(words[1]).released
    if not released:
        raise ValueError(f"{words[1]} starts from nothing released: its networks ship with the project")
    return released
