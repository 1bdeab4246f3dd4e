"""Results as JSON files: read back, and printed with their protocol beside the numbers."""

import platform
from collections.abc import Sequence
from dataclasses import field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked_dataclass

from repae_lite import __version__
from repae_lite.evaluation.protocols import DINO, GUIDANCE, PROTOCOLS, hash_of
from repae_lite.utils.files import read_json

SCHEMA = 1  # of a result
Scale = Literal["tiny", "mid", "full"]
SHOWN = {
    "frechet": "FID",
    "spatial_frechet": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "kernel_distance": "KID",
    DINO: "FD-DINOv2",
    "reconstruction_frechet": "rFID",
    "reconstruction_spatial_frechet": "rsFID",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "spatial_variance": "spatial variance",
    "total_variation": "total variation",
}


@checked_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Expected:
    """A number that somebody got.

    Attributes:
        metrics: as `repae evaluate` or `repae reconstruct` names them.
        source: table of the paper or README, or "recorded here" with seeds and date.
        protocol: its name, or "reconstruction"; None where the source does not say it.
        step: of the checkpoint; None for the last.
        guidance: scale, low, high; None where the source does not say them.
        scale: at which it was got.
        tolerance: by metric, how far another run may be from it, as a share of it; those of its row if empty.
        note: what a reader should know, as "class-balanced labels".
    """

    metrics: dict[str, float]
    source: str
    protocol: str | None = "adm-sde250-random"
    step: int | None = None
    guidance: tuple[float, float, float] | None = (1.0, 0.0, 1.0)
    scale: Scale = "full"
    tolerance: dict[str, float] = field(default_factory=dict)
    note: str = ""


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


def table(results: dict[str, dict], published: Sequence[Expected] = ()) -> str:
    """Results of one protocol as lines of text, the protocol below.

    Fréchet distances of other judges than Inception are not called FID.

    Args:
        results: by name.
        published: what others got: numbers that the first result may be compared with become rows, the
            others a line each.
    """
    one = next(iter(results.values()))
    protocol, inception = one["protocol"], one["protocol"].get("judge") == "inception"
    titles = [SHOWN.get(name, name) if inception else name for name in one["metrics"]]
    rows = [["", *titles]]
    rows += [[name, *(f"{value:.4g}" for value in r["metrics"].values())] for name, r in results.items()]
    beside, apart = published_beside(one, published)
    for entry in beside:
        cells = [f"{entry.metrics[name]:.4g}" if name in entry.metrics else "" for name in one["metrics"]]
        rows.append([f"published ({entry.source})", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = list(dict.fromkeys(r["note"] for r in results.values() if "note" in r))
    return "\n".join([*lines, protocol_line(protocol), *notes, *apart])


def published_beside(result: dict, published: Sequence[Expected]) -> tuple[list[Expected], list[str]]:
    """The published numbers that a result may be compared with, and why not with the others.

    Protocol, guidance, step and the kind of reference must be the same. Which metrics a protocol lists does
    not matter, nor do ends of the interval where there is no guidance.

    Args:
        result: of `repae evaluate`.
        published: what others got; numbers whose protocol is none of `PROTOCOLS` are compared with nothing.

    Returns:
        Those of `published`; and a line for each of the others.
    """
    beside, apart = [], []
    for entry in published:
        if not (fields := _apart(result, entry)):
            beside.append(entry)
            continue
        values = ", ".join(f"{SHOWN.get(name, name)} {value:.4g}" for name, value in entry.metrics.items())
        guidance = _guidance(*entry.guidance) if entry.guidance else "guidance unknown"
        step = "the last step" if entry.step is None else f"step {entry.step:,}"
        apart.append(
            f"{entry.source}: {values} under {entry.protocol or 'an unknown protocol'}, {guidance}, {step}: "
            f"not comparable, differs in {', '.join(fields)}"
        )
    return beside, apart


def _apart(result: dict, entry: Expected) -> list[str]:
    """What a result and a published number differ in."""
    if entry.protocol not in PROTOCOLS:
        return ["protocol"]
    protocol, wanted = result["protocol"], PROTOCOLS[entry.protocol].record()
    free = {"hash", "metrics", "reference", *GUIDANCE}
    fields = [name for name in wanted if name not in free and protocol.get(name) != wanted[name]]
    found = {
        "guidance": (
            _guidance(*(float(protocol[name]) for name in GUIDANCE)),
            entry.guidance and _guidance(*entry.guidance),
        ),
        "step": ((result["samples"]["manifest"] or {}).get("step"), entry.step),
    }
    if wanted["judge"] == "inception":  # ADM's evaluator, and so its reference file
        found["reference"] = result.get("reference_kind"), "training set"
    return fields + [name for name, (ours, theirs) in found.items() if ours != theirs]


def protocol_line(protocol: dict) -> str:
    """A protocol's record in one line."""
    if protocol.get("kind") == "reconstruction":
        return _reconstruction_line(protocol)
    if protocol.get("kind") == "representations":
        return _representations_line(protocol)
    guidance = _guidance(*(protocol[name] for name in GUIDANCE))
    sampler = "SDE" if protocol["mode"] == "sde" else f"ODE ({protocol['solver']})"
    dino = ""
    if "dinov2" in protocol:
        dino = (
            f"; FD-DINOv2 by {protocol['dinov2']} {protocol['dinov2_weights']} against "
            f"{protocol['dinov2_reference_images']:,} images"
        )
    return (
        f"protocol {protocol['name']} ({protocol['hash']}): {protocol['count']:,} images, {sampler}, "
        f"{protocol['steps']} steps, {guidance}, labels {protocol['labels']}, {protocol['to_uint8']}; judge "
        f"{protocol['judge']} {protocol['judge_weights']}, reference {protocol['reference']}{dino}"
    )


def _guidance(scale: float, low: float, high: float) -> str:
    return f"guidance {scale}" + (f" on [{low}, {high}]" if scale > 1 else "")


def _reconstruction_line(protocol: dict) -> str:
    """The protocol of a reconstruction's result in one line."""
    p = protocol
    seed = "" if p["seed"] is None else f" (seed {p['seed']})"
    return (
        f"protocol {p['name']} ({p['hash']}): {p['count']:,} images of {p['side']} pixels against themselves "
        f"({p['reference']}), posterior {p['posterior']}{seed}, {p['to_uint8']}; judge {p['judge']} "
        f"{p['judge_weights']}, perceptual distance: {p['perceptual']}"
    )


def _representations_line(protocol: dict) -> str:
    """The protocol of a result of `repae probe` in one line."""
    p = protocol
    layers, times = (", ".join(map(str, p[name])) for name in ("layers", "noise_levels"))
    return (
        f"protocol {p['name']} ({p['hash']}): CKNNA of {p['images']:,} images with {p['encoder']} "
        f"{p['encoder_weights']}, {p['k']} neighbours; probe fitted to {p['fitted_images']:,} images and "
        f"tested on {p['tested_images']:,} others ({p['reference']}); layers {layers}; t {times}; seed "
        f"{p['seed']}"
    )
