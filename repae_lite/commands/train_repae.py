"""Tune a VAE and a SiT together (REPA-E), with the official flags."""

from repae_lite.commands.train_flags import EXIT_CODES, train, train_flags

EPILOG, FLAGS, run = EXIT_CODES, train_flags("repae"), train
