"""Results as JSON files: read back, and printed with their protocol beside the numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repae_lite.evaluation.protocols import DINO, GUIDANCE, METRICS, PROTOCOLS, hash_of
from repae_lite.utils.files import read_json
from repae_lite.utils.yaml_files import converted

SCHEMA = 1  # of a result
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
}


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


def table(results: dict[str, dict], published: Sequence[dict] = ()) -> str:
    """Results of one protocol as lines of text, the protocol below.

    Fréchet distances of other judges than Inception are not called FID.

    Args:
        results: by name.
        published: see `read_published`; those that the first result may be compared with become rows, the
            others a line each.
    """
    one = next(iter(results.values()))
    protocol, inception = one["protocol"], one["protocol"]["judge"] == "inception"
    titles = [SHOWN.get(name, name) if inception else name for name in one["metrics"]]
    rows = [["", *titles]]
    rows += [[name, *(f"{value:.4g}" for value in r["metrics"].values())] for name, r in results.items()]
    beside, apart = published_beside(one, published)
    for entry in beside:
        cells = [
            f"{entry['metrics'][name]:.4g}" if name in entry["metrics"] else "" for name in one["metrics"]
        ]
        rows.append([f"published ({entry['source']})", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = list(dict.fromkeys(r["note"] for r in results.values() if "note" in r))
    return "\n".join([*lines, protocol_line(protocol), *notes, *apart])


def read_published(entries: Any, where: str) -> tuple[dict, ...]:
    """Published numbers as `read_yaml` gives them, checked.

    Args:
        entries: a list of sections with `source`, `protocol` (a name), `step`, `metrics` (values by name) and
            perhaps `guidance` (scale, low and high; none otherwise).
        where: the file, to call it in errors.

    Returns:
        The same with numbers as numbers, guidance filled in.

    Raises:
        ValueError: something else.
    """
    needed = {"source", "protocol", "step", "metrics"}
    if not isinstance(entries, list):
        raise ValueError(f"published in {where} is {entries!r}: give a list of sections")
    found = []
    for number, entry in enumerate(entries, start=1):
        what = f"entry {number} of published in {where}"
        if not isinstance(entry, dict) or not needed <= entry.keys() <= {*needed, "guidance"}:
            raise ValueError(
                f"{what} is {entry!r}: give source, protocol, step, metrics and perhaps guidance"
            )
        metrics, guidance = entry["metrics"], entry.get("guidance", ["1", "0", "1"])
        if entry["protocol"] not in PROTOCOLS:
            raise ValueError(
                f"{what} has the protocol {entry['protocol']!r}: choose one of {', '.join(PROTOCOLS)}"
            )
        if not isinstance(metrics, dict) or not metrics or not metrics.keys() <= {*METRICS, DINO}:
            raise ValueError(f"{what} has the metrics {metrics!r}: give values of {', '.join(METRICS)}")
        if not isinstance(guidance, list) or len(guidance) != 3:
            raise ValueError(f"{what} has the guidance {guidance!r}: give [scale, low, high]")
        values = {name: converted(value, float, f"{name} of {what}") for name, value in metrics.items()}
        checked = {
            "source": converted(entry["source"], str, f"source of {what}"),
            "step": converted(entry["step"], int, f"step of {what}"),
            "guidance": [converted(one, float, f"guidance of {what}") for one in guidance],
        }
        found.append(checked | {"protocol": entry["protocol"], "metrics": values})
    return tuple(found)


def published_beside(result: dict, published: Sequence[dict]) -> tuple[list[dict], list[str]]:
    """The published numbers that a result may be compared with, and why not with the others.

    Protocol, guidance, step and the kind of reference must be the same. Which metrics a protocol lists does
    not matter, nor do ends of the interval where there is no guidance.

    Args:
        result: of `repae evaluate`.
        published: see `read_published`.

    Returns:
        Those of `published`; and a line for each of the others.
    """
    beside, apart = [], []
    for entry in published:
        if not (fields := _apart(result, entry)):
            beside.append(entry)
            continue
        values = ", ".join(f"{SHOWN[name]} {value:.4g}" for name, value in entry["metrics"].items())
        apart.append(
            f"{entry['source']}: {values} under {entry['protocol']}, {_guidance(*entry['guidance'])}, step "
            f"{entry['step']:,}: not comparable, differs in {', '.join(fields)}"
        )
    return beside, apart


def _apart(result: dict, entry: dict) -> list[str]:
    """What a result and a published number differ in."""
    protocol, wanted = result["protocol"], PROTOCOLS[entry["protocol"]].record()
    free = {"hash", "metrics", "reference", *GUIDANCE}
    fields = [name for name in wanted if name not in free and protocol.get(name) != wanted[name]]
    found = {
        "guidance": (_guidance(*(float(protocol[x]) for x in GUIDANCE)), _guidance(*entry["guidance"])),
        "step": ((result["samples"]["manifest"] or {}).get("step"), entry["step"]),
    }
    if wanted["judge"] == "inception":  # ADM's evaluator, and so its reference file
        found["reference"] = result.get("reference_kind"), "training set"
    return fields + [name for name, (ours, theirs) in found.items() if ours != theirs]


def protocol_line(protocol: dict) -> str:
    """A protocol's record in one line."""
    if protocol.get("kind") == "reconstruction":
        return _reconstruction_line(protocol)
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
