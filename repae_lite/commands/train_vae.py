"""Train a VAE, and its discriminator, on any images."""

from repae_lite.commands.train_flags import EXIT_CODES, train, train_flags

EPILOG, FLAGS, run = EXIT_CODES, train_flags("vae"), train
