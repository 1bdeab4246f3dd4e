"""What two switches of DIFFERENCES.md change at the embedded scale: D2, a position embedding that trains, and
D3, a squared pixel error.

    python reproduce/benchmarks/differences.py --steps 150

Every arm starts from the same weights as the default of its seed and sees the same batches, times and noise.
Scores are those of the scoreboard, on the evaluation split. Every number goes to
data_small/evidence/differences.json, after each seed; the differences are printed with their 95 % intervals.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from record import commit, head

from repae_lite import SmallScale
from repae_lite.evaluation.statistics import difference_interval
from repae_lite.utils.files import data_small_dir, write_text

SAMPLER_STEPS = 8
ARMS = {  # name: (the arm that it differs from, method, changes of SiT, changes of the VAE's loss)
    "repa": (None, "repa", {}, {}),
    "repa, D2": ("repa", "repa", {"train_pos_embed": True}, {}),
    "repa-e": (None, "repa-e", {}, {}),
    "repa-e, D3": ("repa-e", "repa-e", {}, {"pixel": "l2"}),
}


def run(small: SmallScale, arm: str, seed: int, steps: int) -> dict[str, float]:
    """The scores of one arm, and the seconds that its training took."""
    _, method, sit_changes, loss_changes = ARMS[arm]
    torch.manual_seed(seed)
    state = small.new_state(method, **sit_changes)
    state.config = replace(state.config, vae_loss=replace(state.config.vae_loss, **loss_changes))
    start = time.perf_counter()
    small.train(state, steps, targets=small.tokens, seed=seed, label=f"seed {seed}, {arm}")
    seconds = time.perf_counter() - start
    samples, labels = small.generate(state.ema, state.vae, steps=SAMPLER_STEPS, seed=seed)
    return small.score(samples, labels, small.reconstruct(state.vae)) | {"seconds": seconds}


def report(runs: list[dict]) -> None:
    """Prints every score's difference from the default, paired by seed."""
    for arm, (default, *_) in ARMS.items():
        for score in runs[0]["scores"][arm] if default else ():
            if score != "seconds":
                of_arm, of_default = ([entry["scores"][a][score] for entry in runs] for a in (arm, default))
                print(f"{arm} - {default}: {score} {difference_interval(of_arm, of_default, paired=True)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="training steps of each arm, batch 32 (150)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="0 to 4")
    parser.add_argument("--out", type=Path, default=data_small_dir() / "evidence" / "differences.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = SmallScale.load()
    made_by = commit()
    record = head(f"python reproduce/benchmarks/differences.py --steps {options.steps}") | {
        "seeds": options.seeds,
        "steps": options.steps,
        "sampler_steps": SAMPLER_STEPS,
        "runs": [],
    }
    for seed in options.seeds:
        scores = {arm: run(small, arm, seed, options.steps) for arm in ARMS}
        run_of_seed = {"seed": seed, "steps": options.steps, "scores": scores, "commit": made_by}
        record["runs"].append(run_of_seed)
        write_text(options.out, json.dumps(record, indent=1) + "\n")
    if len(options.seeds) > 1:
        report(record["runs"])


if __name__ == "__main__":
    main()
