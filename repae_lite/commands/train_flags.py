"""What train-repae, train-ldm and train-vae have in common: flags made from the fields of `TrainConfig`."""

import argparse
import os
from dataclasses import Field
from typing import Any

from repae_lite.commands.presets import read_preset
from repae_lite.training.config import NONE, OPTIONS, TrainConfig, flag, value_type
from repae_lite.utils.errors import came_through

HEADINGS = {
    "run": "the run and its folder, OUTPUT_DIR/EXP_NAME",
    "data": "data",
    "vae": "the VAE",
    "sit": "the SiT",
    "method": "the method",
    "optimisation": "optimisation",
    "machine": "precision, memory and speed",
    "log": "what is shown while it runs",
    "checkpoint": "checkpoints and resuming",
    "guard": "the collapse guard",
}
METAVARS = {int: "N", float: "X", str: "NAME"}
EXIT_CODES = """exit codes: 0 finished; 2 a mistake in the command, the data or the disk, told in one
sentence; 3 halted by the collapse guard; 143 stopped by SIGTERM or SIGUSR1 and 130 by Ctrl-C, in both cases
after the running step and with a checkpoint (several processes: all after the same step, about two seconds
later): the same command with --resume latest continues, on a CPU to the bit, as if nothing had happened. A
killed run (SIGKILL, power) continues from its last checkpoint in the same way."""


def train_flags(command: str) -> dict[str, dict[str, dict]]:
    """The flags of `train-<command>`; the parsed namespace has only those that were given."""
    preset = "options from reproduce/presets/NAME.yaml or a file like it; explicit flags win"
    flags = {heading: {} for heading in HEADINGS.values()}
    flags[HEADINGS["run"]]["--preset"] = {"metavar": "NAME", "help": preset, "default": argparse.SUPPRESS}
    for name, option in OPTIONS.items():
        if command in option.metadata["only"]:
            flags[HEADINGS[option.metadata["group"]]][flag(name)] = _arguments(option, command)
    return flags


def _arguments(option: Field, command: str) -> dict[str, Any]:
    """What argparse wants to know of an option."""
    meta, kind, text = option.metadata, value_type(option), option.metadata["help"]
    default = NONE if command == "vae" and option.name == "vae_ckpt" else option.default
    if default is not None and default is not False:
        shown = f"{default:g}" if isinstance(default, float) else default
        tiny = f"; tiny: {meta['tiny']:g}" if isinstance(meta.get("tiny"), float | int) else ""
        text = f"{text} (default: {shown}{tiny})"
    arguments = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        return arguments | {"action": argparse.BooleanOptionalAction}
    if "choices" in meta:
        return arguments | {"type": kind, "choices": meta["choices"]}
    return arguments | {"type": kind, "metavar": meta.get("metavar", METAVARS[kind])}


def config_from(args: argparse.Namespace) -> TrainConfig:
    """The config of a parsed command line: its flags, then those of its preset, then the defaults.

    Raises:
        ValueError, FileNotFoundError: see `TrainConfig.build` and `read_preset`.
    """
    command = args.command.removeprefix("train-")
    given = {name: value for name, value in vars(args).items() if name in OPTIONS}
    preset = read_preset(args.preset, command).options if "preset" in args else {}
    sources = dict.fromkeys(preset, "preset") | dict.fromkeys(given, "flag")
    return TrainConfig.build(command, sources=sources, **preset | given)


def memory_advice(args: argparse.Namespace, error: BaseException) -> str:
    """What helps when memory runs out, and what it costs or saves."""
    config = config_from(args)
    if came_through(error, "training.build"):
        classes = f", or fewer than --num-classes {config.num_classes}" if config.num_classes else ""
        return (
            f"the networks and their optimisers alone do not fit, so take a smaller --model or --vae{classes}"
        )
    if came_through(error, "training.trainer", "_sample"):
        fewer = f"fewer --sample-images than {config.sample_images}, or " * (config.sample_images > 1)
        return f"it was a sample grid, so give {fewer}--sampling-steps 0 for none"
    cuts = config.micro_batches * config.gradient_accumulation_steps
    at_once = -(-config.images_per_step // int(os.environ.get("WORLD_SIZE") or 1) // cuts)
    ways = []
    if at_once > 1:
        ways.append(
            f"--micro-batches {2 * config.micro_batches} ({-(-at_once // 2)} images at once instead of "
            f"{at_once}: about half of what grows with them; the same step, but for a "
            "discriminator's BatchNorm)"
        )
    if not config.gradient_checkpointing:
        ways.append("--gradient-checkpointing (most of the activations, for about a third more time)")
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several and config.command != "vae" and not config.shard and config.mixed_precision != "fp16":
        ways.append("--shard (a part of SiT and of its optimiser on each process)")
    if config.mixed_precision == "no" and not config.cpu:
        ways.append("--mixed-precision bf16 or fp16 (about half of the activations)")
    if config.batch_size > 1:
        ways.append(f"a smaller --batch-size than {config.batch_size} (another recipe)")
    return f"try {', '.join(ways)}" if ways else "take a machine with more, or a smaller --resolution"


def train(args: argparse.Namespace) -> None:
    """Trains with the options of a training command."""
    config = config_from(args)
    from repae_lite.training.trainer import train

    train(config)
