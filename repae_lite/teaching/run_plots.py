"""Plots of a training run, from what its folder holds; see `repae_lite.training.run_folder`.

Shown by the notebooks `reproduce/02_train_repae.ipynb` and `reproduce/04_train_ldm.ipynb`, while a run goes
on and after it.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from repae_lite.teaching.figures import Figure, curve_panels, image_rows
from repae_lite.utils.files import read_json

LOSSES = {  # panel -> name of a curve -> key in metrics.jsonl
    "SiT": {"denoising": "denoising", "alignment": "sit_align"},
    "VAE": {"reconstruction": "reconstruction", "perceptual": "perceptual", "alignment": "vae_align"},
    "discriminator": {"hinge loss": "disc"},
}
NORMS = {"SiT": "grad_norm_sit", "VAE": "grad_norm_vae", "discriminator": "grad_norm_disc"}
SPEED = re.compile(r"step (\d+) of \d+, ([\d.e+-]+) steps/s")
Curve = tuple[list[int], list[float]]  # steps, values


def plot_losses(run: Path) -> Figure | None:
    """The losses of a run; None before anything was measured."""
    measured = records(run)
    panels = {
        title: {name: curve for name, key in keys.items() if (curve := _curve(measured, key))}
        for title, keys in LOSSES.items()
    }
    panels = {title: series for title, series in panels.items() if series}
    return _panels(panels, f"{run.name}: losses", ["loss", "", ""], False) if panels else None


def plot_health(run: Path, log: Path | None = None) -> Figure | None:
    """Gradient norms before clipping, the latents' variance and the speed; None before anything was measured.

    Args:
        run: the run's folder.
        log: what the run said, which has its speed; metrics.jsonl has none.
    """
    measured = records(run)
    panels, labels = {}, []
    norms = {name: curve for name, key in NORMS.items() if (curve := _curve(measured, key))}
    if norms:
        panels["gradient norms"], labels = norms, ["norm"]
    if variance := _curve(measured, "latent_variance"):
        panels["latents"], labels = {"spatial variance": variance}, [*labels, "variance"]
    if log and log.is_file():
        found = SPEED.findall(log.read_text(encoding="utf-8", errors="replace"))
        if found:
            panels["speed"] = {"steps/s": ([int(step) for step, _ in found], [float(v) for _, v in found])}
            labels = [*labels, "steps/s"]
    scales = {
        key[11:]: _curve(measured, key)
        for key in (measured[-1] if measured else {})
        if key.startswith("loss_scale_")
    }
    if scales:
        panels["loss scales"], labels = scales, [*labels, "scale"]
    logs = [title in ("gradient norms", "loss scales") for title in panels]
    return _panels(panels, f"{run.name}: is it well?", labels, logs) if panels else None


def plot_samples(run: Path, count: int = 5) -> Figure | None:
    """The first eight samples over time, evenly spaced grids of a run; None without any."""
    grids = sorted((run / "samples").glob("*.png"))
    if not grids:
        return None
    chosen = {grids[round(i)]: None for i in np.linspace(0, len(grids) - 1, min(count, len(grids)))}
    columns = min(8, read_json(run / "args.json").get("sample_images", 8))
    rows = {}
    for path in chosen:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)  # (3, H, W)
        side = pixels.shape[2] // columns
        rows[f"step {int(path.stem):,}"] = torch.stack(pixels[:, :side].split(side, dim=2)[:columns])
    return image_rows(rows, title=f"{run.name}: the same noise over time")


def compare(measured: dict[str, list[dict]], key: str) -> Figure | None:
    """One quantity of metrics.jsonl for several runs, {name: `records`}; None where no run has it."""
    found = {name: curve for name, lines in measured.items() if (curve := _curve(lines, key))}
    return _panels({key: found}, f"{key} by run", [key], False) if found else None


def _panels(panels: dict, title: str, labels: list[str], log: bool | list[bool]) -> Figure:
    longest = max(len(steps) for series in panels.values() for steps, _ in series.values())
    smooth = max(1, longest // 50)
    return curve_panels(panels, title=title, ylabels=labels[: len(panels)], log=log, smooth=smooth)


def records(run: Path) -> list[dict]:
    """The measurements of a run, a dict for each line; one that is being written is left out."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _curve(records: list[dict], key: str) -> Curve | None:
    points = [(record["step"], record[key]) for record in records if key in record]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    return list(steps), [math.nan if value is None else value for value in values]
