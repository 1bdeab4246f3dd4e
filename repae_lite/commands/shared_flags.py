"""Flags that several commands have, with the same meaning."""

import argparse

VAE = {
    "--vae-ckpt-path --vae-ckpt": {
        "required": True,
        "metavar": "SOURCE",
        "help": "the VAE: an official .pt or our .safetensors; a run folder or a checkpoint in it; a "
        "folder of a released set or of diffusers; or a Hub id, as in REPA-E/e2e-vavae",
    },
    "--vae-arch": {
        "choices": ("f8d4", "f16d32", "tiny"),
        "help": "its size (default: what the file tells)",
    },
    "--train-steps": {
        "type": int,
        "metavar": "N",
        "help": "of a run folder the checkpoint at this step (default: the last)",
    },
}
RUN = {
    "--exp-path": {
        "required": True,
        "metavar": "SOURCE",
        "help": "a run folder, official or ours, or a Hub id, as in REPA-E/sit-repae-sdvae",
    },
    "--train-steps": {
        "type": int,
        "metavar": "N",
        "help": "the checkpoint at this step (default: the last)",
    },
    "--ema": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "the averaged SiT, as officially (default), or the trained one itself",
    },
    "--vae-ckpt": {
        "metavar": "SOURCE",
        "help": "of a run on a frozen VAE: that VAE (default: the one that its options name)",
    },
}
DEVICE = {
    "--device": {
        "metavar": "NAME",
        "help": "cpu, cuda, cuda:1, mps (default: cuda if there is one, else mps, else cpu)",
    }
}
