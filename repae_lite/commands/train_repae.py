"""Tune a VAE and a SiT together (REPA-E), with the official flags."""

from repae_lite.commands.train_flags import EXIT_CODES, memory_advice, train, train_flags

EPILOG, FLAGS, run, saves_memory = EXIT_CODES, train_flags("repae"), train, memory_advice
