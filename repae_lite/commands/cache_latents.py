"""Encode all images by a frozen VAE into NAME.h5, for train-ldm.

Encodes every image once and writes NAME.h5 (mean and std of each posterior, float32), NAME_h5.json and
NAME-latents-stats.pt, in the official layout. After an interruption of any kind, the same command continues
where it stopped. Names and meanings of the flags are those of the official cache_latents.py.
"""

import argparse
import os
from pathlib import Path

from repae_lite.commands.shared_flags import DEVICE, VAE

EPILOG = """Space: 8 bytes per latent value, 42 GB for ImageNet at 256 pixels and f8d4, 84 GB at f16d32. Under
accelerate launch or torchrun the processes share the work. NAME.h5 keeps the VAE's fingerprint, so that
train-ldm can refuse another VAE's latents."""
FLAGS = {
    "what is encoded": {
        **VAE,
        "--data-dir": {
            "default": "data",
            "metavar": "FOLDER",
            "help": "preprocessed images, a folder of images, or shards as for training (default: data)",
        },
        "--resolution": {
            "type": int,
            "metavar": "PIXELS",
            "help": "side of the images; needed for a folder or shards (default: as they are)",
        },
    },
    "what is written": {
        "--vae-latents-name": {
            "required": True,
            "metavar": "NAME",
            "help": "NAME.h5 and the two files beside it",
        },
        "--output-dir --output-path": {
            "metavar": "FOLDER",
            "help": "where they go (default: --data-dir)",
        },
        "--overwrite": {
            "action": "store_true",
            "help": "replace a finished NAME.h5 and the two files beside it; discard an unfinished one of "
            "other images or another VAE",
        },
        "--dry-run": {
            "action": "store_true",
            "help": "only say which images would be encoded, and what left out",
        },
    },
    "how it runs": {
        "--pproc-batch-size": {
            "type": int,
            "default": 128,
            "metavar": "N",
            "help": "images at once, in each process (default: 128)",
        },
        "--num-workers": {
            "type": int,
            "metavar": "N",
            "help": "processes that read (default: 0 on a CPU, up to 8 otherwise)",
        },
        **DEVICE,
    },
}


def saves_memory(args: argparse.Namespace, error: BaseException) -> str:
    """What helps when memory runs out."""
    size = args.pproc_batch_size
    return f"give --pproc-batch-size {max(1, size // 2)}, or take a machine with more"


def run(args: argparse.Namespace) -> None:
    """Writes NAME.h5."""
    from repae_lite.checkpoints.models import load_vae
    from repae_lite.data.datasets import open_dataset
    from repae_lite.data.latents import CachedLatentsDataset, cache_latents, check_output
    from repae_lite.networks.vae import VAE_PRESETS
    from repae_lite.utils.devices import choose_device
    from repae_lite.utils.files import check_name
    from repae_lite.utils.processes import local_process_count, process_rank, together

    name, workers = args.vae_latents_name, args.num_workers
    check_name(name, "--vae-latents-name")
    if name == "images":
        raise ValueError(
            "--vae-latents-name is 'images', and images.h5 holds the images themselves: choose another name"
        )
    if args.pproc_batch_size < 1:
        raise ValueError(f"--pproc-batch-size is {args.pproc_batch_size}: give at least 1")
    if workers is not None and workers < 0:
        raise ValueError(f"--num-workers is {workers}: give at least 0, or leave it out")
    device = choose_device(args.device)
    if workers is None:
        workers = 0 if device == "cpu" else min(8, (os.cpu_count() or 1) // local_process_count())
    config = VAE_PRESETS[args.vae_arch] if args.vae_arch else None
    data = Path(args.data_dir)
    if str(data).startswith("hf:") and not args.output_dir:
        raise ValueError(f"{args.data_dir} is on the Hub: say by --output-dir where the latents go")
    path = Path(args.output_dir or (data if data.is_dir() else data.parent)) / f"{name}.h5"
    with together():
        vae = load_vae(args.vae_ckpt_path, config=config, step=args.train_steps)
        dataset = open_dataset(data, args.resolution)
        check_output(path, dataset, args.overwrite)
    first = process_rank() == 0
    if args.dry_run:
        if first:
            print(f"{path} would hold the latents of {len(dataset):,} images; nothing was written")
        return
    stats = cache_latents(
        vae,
        dataset,
        path,
        batch_size=args.pproc_batch_size,
        workers=workers,
        device=device,
        overwrite=args.overwrite,
        progress=first,
    )
    if first:
        channels, *sides = CachedLatentsDataset(path).shape
        stds = ", ".join(f"{std:.3f}" for std in stats.std[:4].tolist()) + " …" * (len(stats.std) > 4)
        shape = (channels // 2, *sides)
        print(f"{path}: {len(dataset):,} latents of shape {shape}, std per channel {stds}")
