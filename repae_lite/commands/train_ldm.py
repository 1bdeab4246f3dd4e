"""Train a SiT on a frozen VAE: REPA, or a plain SiT with --enc-type none."""

from repae_lite.commands.train_flags import EXIT_CODES, memory_advice, train, train_flags

EPILOG, FLAGS, run, saves_memory = EXIT_CODES, train_flags("ldm"), train, memory_advice
