"""Measure what a SiT's layers hold at each noise level: alignment with a vision encoder, and a linear probe.

CKNNA asks whether layer and encoder find the same images alike; the probe, how well the class can be read off
linearly. Half of the images fit the probe, both numbers are of the other half. FILE.json has the table with
its protocol.
"""

import argparse
import json
from pathlib import Path

from repae_lite.commands.shared_flags import DEVICE, RUN

EPILOG = """Features are averaged over tokens, and SiT is given the null class. As in REPA, CKNNA has 10
neighbours; its values depend on the number of images (1,000 of the tested ones at most), and the probe's on
how many it is fitted to: compare results of one protocol only."""
NEIGHBOURS = 10
IMAGES = 2000  # a default that fits the embedded evaluation images
FLAGS = {
    "what is probed": {
        **RUN,
        "--layers": {
            "type": int,
            "nargs": "+",
            "metavar": "N",
            "help": "numbers of its blocks, from 1 (default: all)",
        },
        "--times": {
            "type": float,
            "nargs": "+",
            "default": [0.1, 0.3, 0.5, 0.7],
            "metavar": "T",
            "help": "noise levels, 0 clean, 1 noise (default: 0.1 0.3 0.5 0.7)",
        },
    },
    "what it is compared with": {
        "--enc-type": {
            "metavar": "NAME",
            "help": "the vision encoder (default: the one that the run was aligned with)",
        },
        "--enc-weights": {
            "metavar": "FILE",
            "help": "its weights: pretrained (downloaded once), a file, or random (default: the run's)",
        },
        "--data-dir": {
            "metavar": "FOLDER",
            "help": "preprocessed images, or a folder of images in class folders; never those that the run "
            "was trained on (default: the embedded evaluation images, for a run on the VAE tiny)",
        },
        "--limit": {
            "type": int,
            "metavar": "N",
            "help": "only N of them, drawn at random (default: 2000, or as many as there are)",
        },
        "--seed": {"type": int, "default": 0, "metavar": "N", "help": "of this draw and of the noise"},
    },
    "what is written": {
        "--output": {"required": True, "metavar": "FILE.json", "help": "the result"},
    },
    "how it runs": {**DEVICE},
}


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table with its protocol, and writes the result."""
    import torch

    from repae_lite.checkpoints.run import load_run
    from repae_lite.data.datasets import open_dataset
    from repae_lite.evaluation.representations import probe_images, probe_result, representation_table
    from repae_lite.evaluation.results import protocol_line
    from repae_lite.networks.encoders import VisionEncoder
    from repae_lite.networks.vae import VAE_PRESETS
    from repae_lite.utils.devices import choose_device
    from repae_lite.utils.files import data_small_dir, write_text
    from repae_lite.utils.locks import writing
    from repae_lite.utils.processes import process_count
    from repae_lite.utils.seeding import generator

    output, device = Path(args.output), choose_device(args.device)
    if process_count() > 1:
        raise ValueError("repae probe is one process's work: start it without accelerate or torchrun")
    found = load_run(args.exp_path, step=args.train_steps, ema=args.ema, vae=args.vae_ckpt)
    sit, vae = found.sit.to(device), found.vae
    depth = sit.config.depth
    if args.layers and not all(1 <= layer <= depth for layer in args.layers):
        raise ValueError(f"--layers are {args.layers}: this SiT has blocks 1 to {depth}")
    if not all(0 <= t <= 1 for t in args.times):
        raise ValueError(f"--times are {args.times}: they lie between 0 (clean) and 1 (noise)")
    name = args.enc_type or found.options.get("enc_type")
    if name in (None, "none") or "," in name:
        raise ValueError(f"CKNNA compares with one encoder, and here it is {name}: give --enc-type NAME")
    if args.data_dir is None and vae.config != VAE_PRESETS["tiny"]:
        raise ValueError("say which images are looked at: give --data-dir FOLDER")
    side = sit.config.input_size * vae.config.downsampling
    dataset = open_dataset(args.data_dir or data_small_dir() / "eval", side)
    count = min(IMAGES, len(dataset)) if args.limit is None else args.limit
    if not 2 * (NEIGHBOURS + 1) <= count <= len(dataset):
        raise ValueError(
            f"{count} images of {len(dataset)} are asked for: give at least {2 * (NEIGHBOURS + 1)}, as every "
            f"image of a half is compared with {NEIGHBOURS} others, and no more than there are"
        )
    weights = args.enc_weights or (not args.enc_type and found.options.get("enc_weights")) or "pretrained"
    encoder = VisionEncoder.from_name(name, side, weights=weights)
    order = torch.randperm(len(dataset), generator=generator("probed images", args.seed))[:count].tolist()
    # Numbers in order, as files are read faster so; each half has them of all classes.
    halves = sorted(order[: count // 2]), sorted(order[count // 2 :])
    train, test = (probe_images(vae, encoder, dataset, half, device) for half in halves)
    if len(train.labels.unique()) < 2:
        raise ValueError("all images are of one class: a probe needs several, so give them in class folders")
    path = found.options.get("path_type", "linear")
    settings = {"k": NEIGHBOURS, "images": min(1000, len(test.z)), "seed": args.seed}
    layers, times = sorted(set(args.layers or range(1, depth + 1))), sorted(set(args.times))
    given = {"layers": layers, "noise_levels": times, "path": path, "progress": True}
    rows = representation_table(sit, train, test, **given, **settings)
    result = probe_result(rows, train, test, encoder=encoder, run=found.about, path=path, **settings)
    with writing(output.parent):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, json.dumps(result, indent=1) + "\n")
    print("CKNNA and accuracy of the linear probe, by layer and noise level")
    print("layer" + "".join(f"{f't = {t:g}':>16}" for t in times))
    for layer in layers:
        cells = [f"{row['cknna']:.3f}  {row['linear_probe']:6.1%}" for row in rows if row["layer"] == layer]
        print(f"{layer:5}" + "".join(f"{cell:>16}" for cell in cells))
    print(protocol_line(result["protocol"]))
    print(f"written to {output}")
