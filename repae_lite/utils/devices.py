"""Which device this process computes on."""

import torch

from repae_lite.utils.processes import join, started_together


def choose_device(name: str | None = None) -> str:
    """The device of this process.

    Processes that `accelerate launch` or torchrun started together join here, and each gets its own device.

    Args:
        name: of the device; None takes CUDA if there is a GPU, the CPU otherwise.

    Raises:
        ValueError: this machine does not have the device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"there is no device {name!r} ({reason}): give cpu, cuda or cuda:N") from None
    if started_together():
        device = join(cpu=name == "cpu").device
        return str(device) if device.type != "cpu" else "cpu"
    return name
