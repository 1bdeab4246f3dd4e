"""Take the VAE out of a run: official files, safetensors, diffusers, model card.

Writes SAVE_DIR/NAME/ with NAME.pt, NAME-latents-stats.pt and NAME-discriminator-ckpt.pt in the official
layout, NAME.safetensors, the two files that diffusers' AutoencoderKL.from_pretrained loads, and README.md,
a model card. Latent statistics are the running ones of the run's SiT. Names and meanings of the flags are
those of the official save_vae_weights.py.
"""

import argparse

FLAGS = {
    "what is exported": {
        "--repae-ckpt": {
            "metavar": "FILE",
            "help": "a checkpoint of a run, official (0400000.pt) or ours (its folder)",
        },
        "--exp-path": {"metavar": "FOLDER", "help": "a run folder, instead of --repae-ckpt"},
        "--train-steps": {
            "type": int,
            "metavar": "N",
            "help": "with --exp-path: the checkpoint at this step (default: the last)",
        },
        "--raw-stats": {
            "action": "store_true",
            "help": "statistics of the SiT itself and not of its average (EMA)",
        },
    },
    "what is written": {
        "--vae-name": {
            "default": "e2e-vae",
            "metavar": "NAME",
            "help": "name of the VAE, of its folder and of its files (default: e2e-vae)",
        },
        "--save-dir": {
            "default": "exps",
            "metavar": "FOLDER",
            "help": "where its folder goes (default: exps)",
        },
        "--overwrite": {"action": "store_true", "help": "replace files of an earlier export"},
    },
    "sharing": {
        "--push-to-hub": {
            "metavar": "OWNER/NAME",
            "help": "then upload these files to this repository, made if need be",
        },
        "--private": {"action": "store_true", "help": "make that repository private"},
    },
}


def run(args: argparse.Namespace) -> None:
    """Exports, says what was left out and why, and uploads if asked to."""
    from repae_lite.checkpoints.export import export_vae, push
    from repae_lite.checkpoints.hub import check_repository

    if (args.repae_ckpt is None) == (args.exp_path is None):
        raise ValueError("say what is exported: give either --repae-ckpt FILE or --exp-path FOLDER")
    if args.repae_ckpt and args.train_steps is not None:
        raise ValueError(
            "--train-steps chooses in a run folder: give --exp-path FOLDER instead of --repae-ckpt, or leave "
            "it out"
        )
    if args.private and not args.push_to_hub:
        raise ValueError(
            "--private is about a repository: give --push-to-hub OWNER/NAME as well, or leave it out"
        )
    if args.push_to_hub:
        check_repository(args.push_to_hub)
    done = export_vae(
        args.repae_ckpt or args.exp_path,
        args.vae_name,
        args.save_dir,
        step=args.train_steps,
        ema=not args.raw_stats,
        overwrite=args.overwrite,
    )
    print(f"{done['folder']}: {', '.join(done['files'])}")
    for what, why in done["left_out"].items():
        print(f"without {what}: {why}")
    if args.push_to_hub:
        print(f"uploaded to {push(done['folder'], done['files'], args.push_to_hub, private=args.private)}")
