"""The official code's .pt files: a run's checkpoint, with everything in it, or one network's state dict."""

import argparse
from pathlib import Path

from torch import Tensor

from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.state_dicts import plain_state

NETWORKS = {"sit": "model", "ema": "ema", "vae": "vae", "discriminator": "discriminator"}  # ours -> official
ALONE = ""  # the name of a network in a file of its own


def read_official(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Reads a file of `torch.save` without running code.

    Returns:
        The state dicts by our names of the networks, `ALONE` for the only one of a file; and a run's whole
        content, its options "args" as a dict.

    Raises:
        FileNotFoundError, ValueError: see `read_pickle`; ValueError too for a network that is no state dict.
    """
    content = read_pickle(path)
    if not {"model", "ema", "vae", "steps"} & content.keys():
        alone = content.get("state_dict")
        return {ALONE: plain_state(alone if isinstance(alone, dict) else content, path)}, {}
    options = content.get("args")
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    content["args"] = options if isinstance(options, dict) else {}
    states = {name: content.get(key) for name, key in NETWORKS.items()}
    held = {name: state for name, state in states.items() if isinstance(state, dict) and state}
    return {name: plain_state(state, path) for name, state in held.items()}, content
