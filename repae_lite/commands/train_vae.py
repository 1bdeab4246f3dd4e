"""Train a VAE, and its discriminator, on any images."""

from repae_lite.commands.train_flags import EXIT_CODES, memory_advice, train, train_flags

EPILOG, FLAGS, run, saves_memory = EXIT_CODES, train_flags("vae"), train, memory_advice
