"""Flags that several commands have, with the same meaning."""

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
DEVICE = {
    "--device": {
        "metavar": "NAME",
        "help": "cpu, cuda, cuda:1, mps (default: cuda if there is one, else mps, else cpu)",
    }
}
