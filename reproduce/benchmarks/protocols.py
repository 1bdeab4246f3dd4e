"""What each choice of a protocol moves, on one set of weights: labels, sampler, rounding, number of samples.

    python reproduce/benchmarks/protocols.py

One tiny SiT is trained for 3,000 steps with REPA on the frozen embedded VAE; its weights never change after
that. Five sampling seeds draw 5,000 images for each kind of labels and each sampler; smaller sets are the
first of the larger, and both roundings are of the same images. The Fréchet distance is that of protocol
`tiny`, to the 2,000 images of the evaluation split. Every number goes to data_small/evidence/protocols.json,
after each seed; the paired differences are printed with their 95 % intervals.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from record import commit, head

from repae_lite import SmallScale
from repae_lite.evaluation.evaluate import Reference, load_reference
from repae_lite.evaluation.features import load_judge
from repae_lite.evaluation.generate import Sampling, draw_images
from repae_lite.evaluation.metrics import frechet_distance, streamed_stats
from repae_lite.evaluation.statistics import difference_interval
from repae_lite.utils.files import data_small_dir, write_text

COUNTS = (500, 1000, 2000, 5000)
SAMPLERS = {"ode20": {"mode": "ode", "steps": 20}, "sde50": {"mode": "sde", "steps": 50}}
DEFAULT = "ode20 balanced round 2000"  # protocol tiny
BATCH = 250


def trained(steps: int):
    """The weights that everything is drawn from."""
    torch.manual_seed(0)
    small = SmallScale.load()
    state = small.new_state("repa")
    small.train(state, steps, targets=small.tokens, seed=0, label="training")
    return state.ema, state.vae


def distances(sit, vae, judge, reference: Reference, seed: int) -> dict[str, float]:
    """Every choice's Fréchet distance for one sampling seed."""
    found = {}
    for sampler, options in SAMPLERS.items():
        for kind in ("random", "balanced"):
            sampling = Sampling(**options, labels=kind, count=COUNTS[-1], seed=seed)
            labels, pooled = sampling.all_labels(sit.config.num_classes), {"truncate": [], "round": []}
            for start in range(0, sampling.count, BATCH):
                images = range(start, start + BATCH)
                pixels = draw_images(sit, vae, sampling, images, labels[start : start + BATCH], tuple(pooled))
                for rounding, drawn in zip(pooled, pixels, strict=True):
                    pooled[rounding].append(judge(drawn)["pooled"])
            for rounding, parts in pooled.items():
                features = torch.cat(parts)
                for count in COUNTS:
                    stats = streamed_stats(features[:count])
                    name = f"{sampler} {kind} {rounding} {count}"
                    found[name] = frechet_distance(stats, reference.stats["pooled"])
    return found


def report(runs: list[dict]) -> None:
    """Prints what one choice moves, the others as in protocol tiny, paired by seed."""
    for place, choices in enumerate((SAMPLERS, ("random", "balanced"), ("truncate", "round"), COUNTS)):
        for choice in map(str, choices):
            words = DEFAULT.split()
            if words[place] != choice:
                words[place] = choice
                pairs = [[run["frechet"][name] for run in runs] for name in (" ".join(words), DEFAULT)]
                print(f"{choice} - {DEFAULT.split()[place]}: {difference_interval(*pairs, paired=True)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps, batch 32 (3000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="0 to 4")
    parser.add_argument("--out", type=Path, default=data_small_dir() / "evidence" / "protocols.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sit, vae = trained(options.steps)
    judge = load_judge("tiny")
    reference = load_reference(data_small_dir() / "eval" / "images.h5", judge)
    record = head(f"python reproduce/benchmarks/protocols.py --steps {options.steps}") | {
        "seeds": options.seeds,
        "steps": options.steps,
        "default": DEFAULT,
        "runs": [],
    }
    for seed in options.seeds:
        start = time.perf_counter()
        run = {"seed": seed, "commit": commit(), "frechet": distances(sit, vae, judge, reference, seed)}
        record["runs"].append(run | {"seconds": round(time.perf_counter() - start, 1)})
        write_text(options.out, json.dumps(record, indent=1) + "\n")
        print(f"seed {seed}: {DEFAULT}: {run['frechet'][DEFAULT]:.3f}, {record['runs'][-1]['seconds']:.0f} s")
    if len(options.seeds) > 1:
        report(record["runs"])


if __name__ == "__main__":
    main()
