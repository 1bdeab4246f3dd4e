"""Crop a folder of images into images.h5, the official layout.

Crops every image to its central square as ADM does (halved by a box filter, then bicubic) and writes
images.h5, images_h5.json and preprocess_report.json. After an interruption of any kind, the same command
continues where it stopped. Names and meanings of the flags are those of the official preprocessing.py.
"""

import argparse
from pathlib import Path

EPILOG = """Pixels: EXIF orientation is applied, 16 bits are scaled to 8, transparency is laid over white,
CMYK, palettes and grey become RGB, animations give their first frame; colour profiles are not applied. Space:
0.2 MB per image of 256 × 256 pixels, 252 GB for ImageNet."""
FLAGS = {
    "what is read": {
        "--imagenet-path": {
            "required": True,
            "metavar": "FOLDER",
            "help": "a folder with one subfolder per class (labels 0, 1, … in the order of the sorted folder "
            'names, as for ImageNet), one with a dataset.json {"labels": [[path, class], …]}, one with '
            "such a folder in train/, or one of images without classes, for train-vae and cache-latents",
        },
        "--max-images": {
            "type": int,
            "metavar": "N",
            "help": "only the first N images in the order of their paths (default: all)",
        },
    },
    "what is written": {
        "--output-path --data-dir": {
            "default": "data",
            "metavar": "FOLDER",
            "help": "where images.h5 goes; train from it (default: data)",
        },
        "--resolution": {
            "type": int,
            "default": 256,
            "metavar": "PIXELS",
            "help": "side of the square images (default: 256)",
        },
        "--overwrite": {
            "action": "store_true",
            "help": "replace a finished images.h5 and what lies beside it; discard an unfinished one of "
            "other images or resolution",
        },
        "--dry-run": {
            "action": "store_true",
            "help": "only say which images and classes would be taken, and what left out",
        },
    },
    "how it runs": {
        "--num-workers --workers": {
            "type": int,
            "metavar": "N",
            "help": "processes; the result does not depend on it (default: one per available CPU core)",
        },
        "--on-error": {
            "choices": ("refuse", "skip"),
            "default": "refuse",
            "help": "what to do about images that cannot be read, which preprocess_report.json lists in any "
            "case: refuse to finish, once all others are done, or finish without them (default: refuse)",
        },
    },
}


def run(args: argparse.Namespace) -> None:
    """Writes images.h5."""
    from repae_lite.data.preprocessing import REPORT, preprocess

    report = preprocess(
        args.imagenet_path,
        args.output_path,
        resolution=args.resolution,
        workers=args.num_workers,
        on_error=args.on_error,
        overwrite=args.overwrite,
        max_images=args.max_images,
        dry_run=args.dry_run,
        progress=True,
    )
    output, size = Path(args.output_path), f"{report['resolution']} × {report['resolution']} pixels"
    classes = f"in {len(report['classes']):,} classes" if report["classes"] else "without classes"
    images = f"{report['images']:,} images of {size} {classes}"
    if args.dry_run:
        print(f"{output / 'images.h5'} would hold {images}; nothing was written")
        return
    print(f"{output / 'images.h5'}: {images}")
    unreadable, ignored = len(report["unreadable"]), sum(report["ignored_files"].values())
    for what, count in (("unreadable images", unreadable), ("other files", ignored)):
        if count:
            print(f"{count:,} {what} left out: see {output / REPORT}")
