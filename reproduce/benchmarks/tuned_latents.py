"""What the latents of tuned VAEs hold, against those of the VAE that they started from and of the control.

    python reproduce/benchmarks/tuned_latents.py      # every VAE that arms.py left in runs/arms

All is measured on the 2,000 evaluation images, of posterior means, normalised per channel as SiT sees them.
What is fitted, is fitted to the first half and measured on the second. A minute or so for ten VAEs, on one
thread. Every number goes to data_small/evidence/tuned_latents.json; the differences from the start and from
the control (`vae-only`, the same seed and length) are printed with their 95 % intervals. Runs in that file
whose VAEs are not here keep their numbers.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from arms import ARMS, RUNS, by_label, path_of
from record import commit, head
from torch import Tensor

from repae_lite import SmallScale, load_vae
from repae_lite.checkpoints.find import SHIPPED
from repae_lite.evaluation import metrics
from repae_lite.evaluation.statistics import difference_interval
from repae_lite.utils.files import data_small_dir, write_text

START, CONTROL = "tiny", "vae-only"
WHOLE, PATCH = 1000.0, 10.0  # penalties: chapter 03's for whole latents, a small one for one patch's numbers


@dataclass
class Known:
    """What is known of the evaluation images, to be found in their latents.

    Attributes:
        labels: classes (N,).
        tokens: the frozen encoder's (N, 16, 128).
        residual: what a token's class and position do not say of it, (N, 16, 128).
        parts: share of each kind of part in each of 16 patches (N, 16, 34).
        poses: place, size and turn of the object (N, 7).
        object: share of the object in each cell of the latent (N, 8, 8).
    """

    labels: Tensor
    tokens: Tensor
    residual: Tensor
    parts: Tensor
    poses: Tensor
    object: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, small: SmallScale) -> "Known":
        sys.path.append(str(data_small_dir()))
        from make_images import PART, make_split
        from train_networks import patch_coverage

        images, labels, parts, poses = map(torch.from_numpy, make_split("eval", len(small.eval_images)))
        if not torch.equal(images, small.eval_images):
            raise ValueError("the image maker no longer draws the evaluation images: restore data_small")
        tokens = small.eval_tokens
        fine, beside = patch_coverage(parts.long(), 8), [PART["background"], PART["distractor"]]
        return cls(
            labels=labels,
            tokens=tokens,
            residual=tokens - by_label(tokens, labels),
            parts=patch_coverage(parts.long()),
            poses=poses,
            object=1 - fine[..., beside].sum(-1).unflatten(1, (8, 8)),
        )


def normalised(z: Tensor) -> Tensor:
    """Latents (N, C, h, w) to mean 0 and standard deviation 1 per channel."""
    return (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)


def readable(h: Tensor, target: Tensor, penalty: float) -> float:
    """The share of the variance of unseen targets (N, D) that ridge regression on h (N, C) explains.

    The first half of the rows is fitted to. As in chapter 03, with an intercept.
    """
    half = len(h) // 2
    h = (h - h[:half].mean(0)) / h[:half].std(0).clamp(min=1e-6)
    target = target - target[:half].mean(0)
    a, b = h[:half], target[:half]
    weight = torch.linalg.solve(a.T @ a + penalty * torch.eye(a.shape[1]), a.T @ b)
    unseen = target[half:]
    return 1 - float((unseen - h[half:] @ weight).square().sum() / unseen.square().sum())


def patches(z: Tensor) -> Tensor:
    """Latents (N, C, 8, 8) as what SiT makes its 16 tokens of: (N, 16, 4 C)."""
    return torch.nn.functional.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2)


def read_out(known: Known, pooled: Tensor, whole: Tensor, local: Tensor) -> dict[str, float]:
    """What can be read off a representation linearly.

    Args:
        pooled: (N, D), for class and neighbours.
        whole: (N, D), for the residual and the pose.
        local: (N, 16, D), for the parts of each patch.
    """
    labels, half = known.labels, len(known.labels) // 2
    rest, poses = whole - by_label(whole, labels), known.poses
    poses = (poses - poses.mean(0)) / poses.std(0)
    return {
        "class": metrics.linear_probe(pooled[:half], labels[:half], pooled[half:], labels[half:], l2=0.1),
        "cknna": metrics.cknna(pooled, known.tokens.mean(1), k=10),
        "residual": readable(rest, known.residual.flatten(1), WHOLE),
        "parts": readable(whole, known.parts.flatten(1), WHOLE),
        "parts, own patch": readable(local.flatten(0, 1), known.parts.flatten(0, 1), PATCH),
        "pose": readable(whole, poses, WHOLE),
    }


def moved(z: Tensor, start: Tensor, known: Known) -> dict[str, float]:
    """Mean squared distance from the start's latents, both normalised, over cells by what they show."""
    distance, share = (z - start).square().mean(1), known.object
    where = {"object": share > 0.95, "background": share < 0.05}
    where["edge"] = ~(where["object"] | where["background"])
    return {name: float(distance[cells].mean()) for name, cells in where.items()}


def measure(z: Tensor, start: Tensor, known: Known) -> dict:
    """Everything about latents (2000, 4, 8, 8)."""
    channels = zip(z.unbind(1), start.unbind(1), strict=True)
    pairs = [torch.stack([a.flatten(), b.flatten()]) for a, b in channels]
    correlation = [float(torch.corrcoef(pair)[0, 1]) for pair in pairs]
    structure = metrics.latent_structure(z)
    z_norm = normalised(z)
    return read_out(known, z_norm.flatten(1), z_norm.flatten(1), patches(z_norm)) | {
        "effective_dimensions": metrics.effective_dimensions(z_norm),
        "channel_std": structure["channel_std"],
        "high_frequency_share": structure["high_frequency_share"],
        "correlation": correlation,
        "moved": moved(z_norm, normalised(start), known),
    }


def kept_vaes(folder: Path) -> dict[tuple[int, str, int], Path]:
    """The VAEs that arms.py left in a folder, by steps, arm and seed."""
    found = {}
    for arm in ARMS:
        name = path_of(arm, 0, 0, "").name.removesuffix("_0_0.")
        for path in folder.glob("*.vae.safetensors"):
            if numbers := re.fullmatch(rf"{re.escape(name)}_(\d+)_(\d+)\.vae\.safetensors", path.name):
                found[int(numbers[1]), arm, int(numbers[2])] = path
    return dict(sorted(found.items()))


def report(runs: list[dict], start: dict) -> None:
    """Prints every arm's differences from the control, and the control's from the start, paired by seed."""
    by_run = {(run["arm"], run["steps"], run["seed"]): run for run in runs}
    for arm, steps in dict.fromkeys((run["arm"], run["steps"]) for run in runs):
        pairs = [
            (run, start if arm == CONTROL else by_run.get((CONTROL, steps, run["seed"])))
            for run in runs
            if (run["arm"], run["steps"]) == (arm, steps)
        ]
        pairs = [pair for pair in pairs if pair[1]]
        print(f"{arm} - {START if arm == CONTROL else CONTROL}, {steps} steps, {len(pairs)} seeds")
        for key in [key for key, value in start.items() if isinstance(value, float)]:
            a, b = ([each[key] for each in side] for side in zip(*pairs, strict=True)) if pairs else ([], [])
            print(f"  {key:20} {difference_interval(a, b, paired=True) if len(a) > 1 else 'too few seeds'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of arms.py (runs/arms)")
    parser.add_argument("--out", type=Path, default=data_small_dir() / "evidence" / "tuned_latents.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = SmallScale.load()
    known, start = Known.of(small), small.eval_latents(load_vae(START))
    mean_token = known.tokens.mean(1)
    record = head("python reproduce/benchmarks/tuned_latents.py") | {
        "commit": commit(),
        "images": len(start),
        "tokens": read_out(known, mean_token, known.tokens.flatten(1), known.tokens),
        "shipped": {},
        "runs": [],
    }
    for name in SHIPPED:
        record["shipped"][name] = measure(small.eval_latents(load_vae(name)), start, known)
    done = json.loads(options.out.read_text())["runs"] if options.out.is_file() else []
    runs = {(run["steps"], run["arm"], run["seed"]): run for run in done}
    for (steps, arm, seed), path in kept_vaes(options.runs).items():
        found = measure(small.eval_latents(load_vae(path)), start, known)
        runs[steps, arm, seed] = {"arm": arm, "steps": steps, "seed": seed} | found
        print(arm, steps, seed, flush=True)
    record["runs"] = [runs[key] for key in sorted(runs)]
    write_text(options.out, json.dumps(record, indent=1) + "\n")
    report(record["runs"], record["shipped"][START])


if __name__ == "__main__":
    main()
