"""Draw images from a trained run into SAMPLE_DIR/NAME.npz, with a manifest of how.

NAME is EXP_STEP_cfgS-LOW-HIGH as the official generate.py has it; the file holds arr_0, uint8 (N, H, W, 3),
for any evaluation suite. Every image follows from the seed and its number, so that a killed run continues
where it stopped and several processes (accelerate launch, torchrun) give the images of one. Names and
meanings of the flags are those of the official script.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from repae_lite.commands.shared_flags import DEVICE, RUN

EPILOG = """Labels decide much: with balanced ones the released SiT on E2E-VA-VAE has an FID of 1.69, with
random ones 1.83 (paper, Table 9 and its first version). Space: 9.8 GB for 50,000 images of 256 pixels, twice
while the file is finished."""
CFG_SCALE = 1.5  # the official script's default; its others are those of `Sampling`
SAID = {  # field of `Sampling`: flag
    "mode": "mode",
    "steps": "num_steps",
    "cfg_scale": "cfg_scale",
    "guidance_low": "guidance_low",
    "guidance_high": "guidance_high",
    "count": "num_fid_samples",
    "seed": "global_seed",
    "to_uint8": "to_uint8",
}
FLAGS = {
    "what is sampled from": {
        **RUN,
        "--num-classes": {
            "type": int,
            "metavar": "N",
            "help": "official flag; must be what the SiT was trained with (default: that)",
        },
    },
    "how": {
        "--protocol": {
            "metavar": "NAME",
            "help": "sampler, steps, guidance, labels, number and rounding of a protocol, see repae "
            "evaluate; other flags win",
        },
        "--mode": {"choices": ("ode", "sde"), "help": "sampler (default: ode)"},
        "--num-steps": {"type": int, "metavar": "N", "help": "of the sampler (default: 50)"},
        "--heun": {
            "action": argparse.BooleanOptionalAction,
            "help": "Heun's method for the ODE (default: Euler's)",
        },
        "--path-type": {
            "choices": ("linear", "cosine"),
            "help": "the path that the SiT was trained on (default: what the run says, or linear)",
        },
        "--cfg-scale": {
            "type": float,
            "metavar": "S",
            "help": "guidance, 1 for none (default: 1.5)",
        },
        "--guidance-low": {
            "type": float,
            "metavar": "T",
            "help": "guidance acts for times from here (default: 0)",
        },
        "--guidance-high": {
            "type": float,
            "metavar": "T",
            "help": "to here (default: 1)",
        },
        "--labels --label-sampling": {
            "metavar": "KIND",
            "help": "random; balanced (also: equal): as many of each class, shuffled; or classes=3,7: "
            "these in turn (default: random)",
        },
        "--per-class-sampling": {
            "action": argparse.BooleanOptionalAction,
            "default": None,
            "help": "official spelling of --labels balanced; --no-per-class-sampling of --labels random",
        },
        "--global-seed": {"type": int, "metavar": "N", "help": "of every draw (default: 0)"},
        "--to-uint8": {
            "choices": ("truncate", "round"),
            "help": "what becomes of fractions of a grey level (default: truncate, as officially)",
        },
        "--num-fid-samples": {
            "type": int,
            "metavar": "N",
            "help": "images (default: 50000)",
        },
    },
    "what is written": {
        "--sample-dir": {
            "default": "samples",
            "metavar": "FOLDER",
            "help": "where the file goes (default: samples)",
        },
        "--png": {"action": "store_true", "help": "write a folder of PNG files as well"},
    },
    "how it runs": {
        "--pproc-batch-size": {
            "type": int,
            "default": 128,
            "metavar": "N",
            "help": "images at once, in each process (default: 128)",
        },
        "--tf32": {
            "action": argparse.BooleanOptionalAction,
            "default": True,
            "help": "TF32 for float32 products on NVIDIA GPUs, as officially (default)",
        },
        **DEVICE,
    },
}


def run(args: argparse.Namespace) -> None:
    """Writes the .npz, its manifest and a picture of the first images."""
    import numpy as np
    import torch

    from repae_lite import __version__
    from repae_lite.checkpoints.run import load_run
    from repae_lite.data.samples import check_same
    from repae_lite.evaluation.generate import Sampling, first_images, generate, manifest_of
    from repae_lite.evaluation.protocols import load_protocol
    from repae_lite.utils.devices import choose_device
    from repae_lite.utils.files import read_json
    from repae_lite.utils.pixels import save_grid
    from repae_lite.utils.processes import process_rank

    labels = _labels(args)
    if args.pproc_batch_size < 1:
        raise ValueError(f"--pproc-batch-size is {args.pproc_batch_size}: give at least 1")
    device = choose_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    found = load_run(args.exp_path, step=args.train_steps, ema=args.ema, vae=args.vae_ckpt)
    trained = found.options.get("path_type", "linear")
    if args.path_type not in (None, trained):
        raise ValueError(f"--path-type is {args.path_type}, but the SiT was trained on the {trained} path")
    classes = found.sit.config.num_classes
    if args.num_classes not in (None, classes):
        raise ValueError(f"--num-classes is {args.num_classes}, but the SiT was trained with {classes}")
    base = load_protocol(args.protocol).sampling() if args.protocol else Sampling(cfg_scale=CFG_SCALE)
    said = {name: getattr(args, flag) for name, flag in SAID.items() if getattr(args, flag) is not None}
    if args.heun is not None:
        said["solver"] = "heun" if args.heun else "euler"
    if labels is not None:
        said["labels"] = labels
    sampling = replace(base, path_type=trained, **said)
    step = "last" if found.step is None else f"{found.step:07d}"
    guidance = f"cfg{sampling.cfg_scale}-{sampling.guidance_low}-{sampling.guidance_high}"
    name = f"{found.name}_{step}_{guidance}"
    path = Path(args.sample_dir) / f"{name}.npz"
    about = found.about | {
        "device": torch.device(device).type,
        "tf32": args.tf32,
        "torch": torch.__version__,
        "repae_lite": __version__,
    }
    first = process_rank() == 0
    manifest = manifest_of(sampling, batch=args.pproc_batch_size, about=about)
    if path.exists():
        check_same(read_json(path.with_suffix(".json")), manifest, path)
        if args.png and not path.with_suffix("").is_dir():
            raise ValueError(f"{path} is finished, without PNG files: remove it, or leave out --png")
        if first:
            print(f"{path} is there already, made with the same settings")
        return
    samples = generate(
        found.sit.to(device),
        found.vae.to(device),
        sampling,
        path.with_suffix(""),
        batch=args.pproc_batch_size,
        png=args.png,
        about=about,
        progress=first,
    )
    if first:
        pixels = np.load(samples.array, mmap_mode="r")
        save_grid(path.with_suffix(".png"), first_images(pixels))
        size = samples.side
        samples.finish(manifest)
        print(f"{path}: {sampling.count:,} images of {size} × {size} pixels; the first in {path.stem}.png")


def _labels(args: argparse.Namespace) -> str | None:
    """The kind of labels that the three spellings mean; None if nothing was said."""
    labels = "balanced" if args.labels == "equal" else args.labels
    if args.per_class_sampling is None:
        return labels
    meant = "balanced" if args.per_class_sampling else "random"
    if labels not in (None, meant):
        raise ValueError(f"--labels is {labels} and --per-class-sampling means {meant}: give one of them")
    return meant
