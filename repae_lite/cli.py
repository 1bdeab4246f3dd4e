"""The command line, `repae <command>`; also `python -m repae_lite <command>`.

Full-scale training, caching, generation and evaluation join here with their modules; so far there is `check`.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version

import torch

from repae_lite import __version__
from repae_lite.data import ImageH5Dataset
from repae_lite.files import data_small_dir, read_weights


def check(_: argparse.Namespace) -> None:
    """Prints versions, devices and whether the embedded data is whole."""
    print(f"repae_lite {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "lpips", "accelerate")))
    print(f"{os.cpu_count()} CPU cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(i).total_memory / 2**30
            print(f"cuda:{i}: {torch.cuda.get_device_name(i)}, {memory:.0f} GiB")
    else:
        print("no CUDA device: the embedded scale runs on the CPU, the full-scale recipes need a GPU")
    folder = data_small_dir()
    for split in ("train", "eval"):
        dataset = ImageH5Dataset(folder / split / "images.h5")
        print(f"embedded {split} split: {len(dataset)} images, {dataset.num_classes} classes")
    for name in ("teacher", "perceptual", "evaluator", "vae"):
        state, _ = read_weights(folder / f"{name}.safetensors")
        print(f"embedded {name}: {sum(t.numel() for t in state.values()):,} numbers")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; user mistakes become one sentence on stderr and exit code 2."""
    parser = argparse.ArgumentParser(prog="repae", description="REPA-E at any scale: see notebooks/00_map.ipynb.")
    parser.add_argument("--version", action="version", version=f"repae_lite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    checking = commands.add_parser("check", help="print versions, devices and whether the embedded data is whole")
    checking.set_defaults(run=check)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"repae {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
