"""Train a SiT on a frozen VAE: REPA, or a plain SiT with --enc-type none."""

from repae_lite.commands.train_flags import EXIT_CODES, train, train_flags

EPILOG, FLAGS, run = EXIT_CODES, train_flags("ldm"), train
