"""The official code's .pt files: a run's checkpoint, with everything in it, or one network's state dict."""

import argparse
import logging
from pathlib import Path

from torch import Tensor

from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.state_dicts import plain_state
from repae_lite.utils.weight_files import REMEDY

logger = logging.getLogger(__name__)

NETWORKS = {"sit": "model", "ema": "ema", "vae": "vae", "discriminator": "discriminator"}  # ours -> official
ALONE = ""  # the name of a network in a file of its own


# Where training frameworks and other projects keep the weights of a checkpoint; the averaged ones come last.
_STATES = (
    "state_dict", "model_state_dict", "autoencoder", "first_stage_model", "module", "net", "weights",
    "state_dict_ema", "ema_state_dict", "model_ema",
)  # fmt: skip


def read_official(path: Path, *, remedy: str = REMEDY) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """Reads a file of `torch.save` without running code.

    Of a checkpoint of another project the weights are taken, and what is left aside is logged.

    Args:
        path: the file.
        remedy: what to do if it is damaged.

    Returns:
        The state dicts by our names of the networks, `ALONE` for the only one of a file; and a run's whole
        content, its options "args" as a dict.

    Raises:
        FileNotFoundError, OSError, ValueError: see `read_pickle`; ValueError too for a network that is no
            state dict.
    """
    content = read_pickle(path, remedy=remedy)
    if not {"model", "ema", "vae", "steps"} & content.keys():
        inner = next((key for key in _STATES if isinstance(content.get(key), dict) and content[key]), None)
        others = [str(key) for key in content if key != inner]
        if inner is not None and others:
            logger.info(f"{path}: read from its {inner}; left aside: {', '.join(sorted(others)[:12])}")
        return {ALONE: plain_state(content if inner is None else content[inner], path)}, {}
    content["args"] = _options(content.get("args"))
    states = {name: content.get(key) for name, key in NETWORKS.items()}
    held = {name: state for name, state in states.items() if isinstance(state, dict) and state}
    return {name: plain_state(state, path) for name, state in held.items()}, content


def _options(found: object) -> dict:
    """A run's options; what is no plain value or list of some is told by its type."""
    options = vars(found) if isinstance(found, argparse.Namespace) else found
    return {
        name: value if _is_plain(value) else f"<{type(value).__name__}>"
        for name, value in (options if isinstance(options, dict) else {}).items()
        if isinstance(name, str)
    }


def _is_plain(value: object) -> bool:
    scalar = str | int | float | None
    return isinstance(value, scalar) or (
        isinstance(value, list | tuple) and all(isinstance(one, scalar) for one in value)
    )
