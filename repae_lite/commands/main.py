"""The command line, `repae <command>`; also `python -m repae_lite <command>`.

Generation and evaluation join with their modules. `model_options` holds the commands about models,
`training_options` those that train. Commands import what they need when they run: worker processes, which
import this file again, then start at once.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from repae_lite import __version__
from repae_lite.commands.model_options import add_cache_latents, add_download, add_export_vae
from repae_lite.training.config import COMMANDS, add_training_command, config_of


def check(args: argparse.Namespace) -> None:
    """Prints what this machine has and can run: as text, or as JSON."""
    from repae_lite.commands.machine import report, survey

    found = survey(pretrained=args.pretrained)
    print(json.dumps(found, indent=1) if args.json else report(found))


def add_check(commands: argparse._SubParsersAction) -> None:
    """The options of `repae check`."""
    parser = commands.add_parser(
        "check",
        help="print versions, devices, memory, disk, cached weights, and which presets this machine can run",
        description="Prints versions, devices, memory, disk, whether the embedded data is whole, which weights are here, and what each "
        "preset needs.",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable, sizes in bytes")
    parser.add_argument(
        "--pretrained",
        default="pretrained",
        metavar="FOLDER",
        help="where released sets lie (default: pretrained)",
    )
    parser.set_defaults(run=check)


def preprocess(args: argparse.Namespace) -> None:
    """Crops a folder of images into images.h5 and says what came of it."""
    from repae_lite.data.preprocessing import REPORT, preprocess

    report = preprocess(
        args.imagenet_path,
        args.output_path,
        resolution=args.resolution,
        workers=args.num_workers,
        on_error=args.on_error,
        overwrite=args.overwrite,
        max_images=args.max_images,
        progress=True,
    )
    size = f"{report['resolution']} × {report['resolution']} pixels"
    print(
        f"{Path(args.output_path) / 'images.h5'}: {report['images']:,} images of {size} in "
        f"{len(report['classes']):,} classes"
    )
    for what, count in (
        ("unreadable images", len(report["unreadable"])),
        ("other files", sum(report["ignored_files"].values())),
    ):
        if count:
            print(f"{count:,} {what} left out: see {Path(args.output_path) / REPORT}")


def add_preprocess(commands: argparse._SubParsersAction) -> None:
    """The options of `repae preprocess`; names and meanings of the official preprocessing.py, and --on-error,
    --overwrite.
    """
    parser = commands.add_parser(
        "preprocess",
        help="crop a folder of images into images.h5, the official layout",
        description="Crops every image of a folder to its central square as ADM does (halving by box filter, bicubic rest) and writes "
        "images.h5, images_h5.json and preprocess_report.json. A run that was interrupted, however it was, "
        "goes on where it "
        "stopped when the same command is given again.",
        epilog="Pixels: EXIF orientation is applied, 16 bits are scaled to 8, transparency is laid over white, CMYK, palettes and grey "
        "become RGB, animations give their first frame; colour profiles are not applied. Space: 0.2 MB per "
        "image of 256 × 256 "
        "pixels, 252 GB for ImageNet.",
    )
    reading = parser.add_argument_group("what is read")
    reading.add_argument(
        "--imagenet-path",
        required=True,
        metavar="FOLDER",
        help="a folder with one subfolder per class (labels 0, 1, … in the order of the sorted folder names, which is ImageNet's), "
        'one with a dataset.json {"labels": [[path, class], …]}, or one with such a folder in train/',
    )
    reading.add_argument(
        "--max-images",
        type=int,
        metavar="N",
        help="only the first N images in the order of their paths (default: all)",
    )
    writing = parser.add_argument_group("what is written")
    writing.add_argument(
        "--output-path",
        "--data-dir",
        default="data",
        metavar="FOLDER",
        help="where images.h5 goes; train from it (default: data)",
    )
    writing.add_argument(
        "--resolution",
        type=int,
        default=256,
        metavar="PIXELS",
        help="side of the square images (default: 256)",
    )
    writing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a finished images.h5, and discard an unfinished one of other images or resolution",
    )
    running = parser.add_argument_group("how it runs")
    running.add_argument(
        "--num-workers",
        "--workers",
        type=int,
        metavar="N",
        help="processes; the result does not depend on it (default: one per available CPU core)",
    )
    running.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do about images that cannot be read, which preprocess_report.json lists in any case: refuse to finish, once all "
        "others are done, or finish without them (default: refuse)",
    )
    parser.set_defaults(run=preprocess)


def train(args: argparse.Namespace) -> None:
    """Trains with the options of a training command."""
    config = config_of(args)
    from repae_lite.training.trainer import train

    train(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; user mistakes become one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="repae", description="REPA-E at any scale: see notebooks/00_map.ipynb."
    )
    parser.add_argument("--version", action="version", version=f"repae_lite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add in (add_check, add_preprocess, add_download, add_cache_latents, add_export_vae):
        add(commands)
    for command in COMMANDS:
        add_training_command(commands, command).set_defaults(run=train)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"repae {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"repae {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0
