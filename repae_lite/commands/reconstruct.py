"""Measure what a VAE keeps of images: rFID, PSNR, SSIM and LPIPS of its reconstructions.

Writes FILE.json with the numbers, their protocol and the structure of the latents (for repae compare), and
FILE.png: the first originals, their reconstructions, and the latents' first three principal components as
colours. The reference is the originals themselves, never statistics of a training set.
"""

import argparse
import json
from pathlib import Path

from repae_lite.commands.shared_flags import DEVICE, VAE

EPILOG = """No number depends on --pproc-batch-size or --num-workers: networks always see 16 images at once,
in float32, and means are float64. PSNR, SSIM and LPIPS are of 8-bit images. SSIM is scikit-image's, of values
from 0 to 255 (of values in [-1, 1] it is another number); LPIPS has the VGG-16 trunk (with AlexNet's it is
another number)."""
FLAGS = {
    "what is reconstructed": {
        **VAE,
        "--data-dir": {
            "required": True,
            "metavar": "FOLDER",
            "help": "the originals: preprocessed images, a folder of images, or shards as for training",
        },
        "--resolution": {
            "type": int,
            "metavar": "PIXELS",
            "help": "side of the images; needed for a folder or shards (default: as they are)",
        },
        "--limit": {
            "type": int,
            "metavar": "N",
            "help": "only the first N images; of a folder sorted by class, the first classes (default: all)",
        },
    },
    "how": {
        "--judge": {
            "choices": ("inception", "tiny"),
            "default": "inception",
            "help": "Inception with LPIPS, or the embedded scale's networks, for 32 pixels (default: "
            "inception)",
        },
        "--sample": {
            "action": "store_true",
            "help": "decode a draw from each posterior (default: its mean)",
        },
        "--seed": {"type": int, "default": 0, "metavar": "N", "help": "of these draws (default: 0)"},
        "--to-uint8": {
            "choices": ("truncate", "round"),
            "default": "round",
            "help": "what becomes of fractions of a grey level (default: round)",
        },
    },
    "what is written": {
        "--output": {
            "required": True,
            "metavar": "FILE.json",
            "help": "the result; the picture goes beside it",
        },
    },
    "how it runs": {
        "--inception": {
            "metavar": "FILE",
            "help": "Inception's weights (default: in torch's cache, where torch-fidelity puts them)",
        },
        "--pproc-batch-size": {
            "type": int,
            "default": 128,
            "metavar": "N",
            "help": "images that are read at once; changes no number (default: 128)",
        },
        "--num-workers": {
            "type": int,
            "metavar": "N",
            "help": "processes that read (default: 0 on a CPU, up to 8 otherwise)",
        },
        **DEVICE,
    },
}


def run(args: argparse.Namespace) -> None:
    """Measures, prints the numbers with their protocol, and writes both files."""
    import os

    from repae_lite.checkpoints.models import load_vae
    from repae_lite.evaluation.features import load_judge
    from repae_lite.evaluation.reconstruction import (
        Reconstructing,
        load_perceptual,
        open_originals,
        picture,
        reconstruct,
        result_of,
    )
    from repae_lite.evaluation.representations import latent_report, pca_maps
    from repae_lite.evaluation.results import SHOWN, protocol_line
    from repae_lite.networks.vae import VAE_PRESETS
    from repae_lite.utils.devices import choose_device
    from repae_lite.utils.files import write_text
    from repae_lite.utils.locks import writing
    from repae_lite.utils.pixels import save_grid
    from repae_lite.utils.processes import process_count

    output = Path(args.output)
    if output.suffix != ".json":
        raise ValueError(f"--output is {args.output}: give a name that ends in .json")
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
    device, workers = choose_device(args.device), args.num_workers
    if process_count() > 1:
        raise ValueError("repae reconstruct is one process's work: start it without accelerate or torchrun")
    if workers is None:
        workers = 0 if device == "cpu" else min(8, os.cpu_count() or 1)
    settings = Reconstructing(
        judge=args.judge,
        posterior="sample" if args.sample else "mode",
        seed=args.seed,
        to_uint8=args.to_uint8,
    )
    dataset = open_originals(args.data_dir, args.resolution)
    config = VAE_PRESETS[args.vae_arch] if args.vae_arch else None
    vae = load_vae(args.vae_ckpt_path, config=config, step=args.train_steps)
    judge, perceptual = load_judge(args.judge, args.inception), load_perceptual(args.judge)
    found = reconstruct(
        vae,
        dataset,
        judge,
        perceptual,
        settings,
        limit=args.limit,
        batch=args.pproc_batch_size,
        workers=workers,
        device=device,
        progress=True,
    )
    source, networks = args.vae_ckpt_path, {"judge": judge, "perceptual": perceptual}
    result = result_of(found, settings, vae=vae, source=source, **networks)
    result["latents"] = {"images": len(found.latents)} | latent_report(found.latents)
    maps = pca_maps(found.latents)[: found.pairs.shape[1]]
    with writing(output.parent):
        save_grid(output.with_suffix(".png"), picture(found.pairs, maps)[None])
        write_text(output, json.dumps(result, indent=1) + "\n")
    inception = args.judge == "inception"
    titles = {name: title for name, title in SHOWN.items() if inception or "frechet" not in name}
    for name, value in result["metrics"].items():
        print(f"{titles.get(name, name)}  {value:.6g}")
    print(f"effective dimensions  {result['latents']['effective_dimensions']:.6g}")
    print(protocol_line(result["protocol"]))
    print(f"written to {output}, with a picture in {output.stem}.png")
