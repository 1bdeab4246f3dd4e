"""Results as JSON files: read back, and printed with their protocol beside the numbers."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from repae_lite import __version__
from repae_lite.evaluation.protocols import hash_of
from repae_lite.utils.files import read_json

SCHEMA = 1  # of a result
SHOWN = {
    "frechet": "FID",
    "spatial_frechet": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "kernel_distance": "KID",
    "reconstruction_frechet": "rFID",
    "reconstruction_spatial_frechet": "rsFID",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
}


def result(content: dict, *packages: str) -> dict:
    """A result's JSON values: its content between the schema, and the versions and the date.

    Args:
        content: "metrics", "protocol" with its hash, and whatever else is to be known.
        packages: that the numbers depend on besides torch.
    """
    versions = {"repae_lite": __version__, "torch": torch.__version__}
    versions |= {name: version(name) for name in packages} | {"python": platform.python_version()}
    return {"schema": SCHEMA} | content | {"versions": versions, "date": datetime.now(UTC).date().isoformat()}


def read_result(path: Path) -> dict:
    """A result of `repae evaluate`.

    Raises:
        FileNotFoundError, ValueError: nothing there, something else, or another schema.
    """
    result = read_json(path)
    if not {"schema", "metrics", "protocol"} <= result.keys() or not isinstance(result["protocol"], dict):
        raise ValueError(f"{path} is no result of repae evaluate or reconstruct: give a JSON file of theirs")
    if result["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {result['schema']} and this version reads {SCHEMA}: evaluate again"
        )
    if result["protocol"].get("hash") != hash_of(result["protocol"]):
        raise ValueError(
            f"{path} was edited: its protocol does not have the hash that it gives; evaluate again"
        )
    return result


def table(results: dict[str, dict]) -> str:
    """Results of one protocol as lines of text, the protocol below.

    Fréchet distances of other judges than Inception are not called FID.
    """
    one = next(iter(results.values()))
    protocol, inception = one["protocol"], one["protocol"]["judge"] == "inception"
    titles = [SHOWN.get(name, name) if inception else name for name in one["metrics"]]
    rows = [["", *titles]]
    rows += [[name, *(f"{value:.4g}" for value in r["metrics"].values())] for name, r in results.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, protocol_line(protocol)])


def protocol_line(protocol: dict) -> str:
    """A protocol's record in one line."""
    if protocol.get("kind") == "reconstruction":
        return _reconstruction_line(protocol)
    guidance = f"guidance {protocol['cfg_scale']}"
    if protocol["cfg_scale"] > 1:
        guidance += f" on [{protocol['guidance_low']}, {protocol['guidance_high']}]"
    sampler = "SDE" if protocol["mode"] == "sde" else f"ODE ({protocol['solver']})"
    return (
        f"protocol {protocol['name']} ({protocol['hash']}): {protocol['count']:,} images, {sampler}, "
        f"{protocol['steps']} steps, {guidance}, labels {protocol['labels']}, {protocol['to_uint8']}; judge "
        f"{protocol['judge']} {protocol['judge_weights']}, reference {protocol['reference']}"
    )


def _reconstruction_line(protocol: dict) -> str:
    """The protocol of a reconstruction's result in one line."""
    p = protocol
    seed = "" if p["seed"] is None else f" (seed {p['seed']})"
    return (
        f"protocol {p['name']} ({p['hash']}): {p['count']:,} images of {p['side']} pixels against themselves "
        f"({p['reference']}), posterior {p['posterior']}{seed}, {p['to_uint8']}; judge {p['judge']} "
        f"{p['judge_weights']}, perceptual distance: {p['perceptual']}"
    )
