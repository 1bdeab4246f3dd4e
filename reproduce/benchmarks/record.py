"""What every record of a benchmark begins with."""

import datetime
import platform
import subprocess

import torch


def head(command: str, device: str = "cpu") -> dict:
    """When, where and by what a record was made, as JSON values.

    Args:
        command: that makes it again.
        device: that it ran on.
    """
    unit = torch.cuda.get_device_name() if device.startswith("cuda") else device.upper()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {unit}, 1 thread",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": command,
    }


def commit() -> str:
    """The commit of this checkout; empty where there is none."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip()
