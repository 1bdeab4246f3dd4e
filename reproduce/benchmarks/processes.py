"""What several processes gain, and what they lose by talking to each other.

    python reproduce/benchmarks/processes.py --processes 2 --batch-size 16 --vae tiny

N processes take steps of `repae train-repae` together, with b images each. The yardstick is N runs with b
images that go side by side and say nothing to each other. What the former are slower is communication that
the backward pass does not hide, and waiting for each other: for gradients, BatchNorm's statistics, the stop
flag. Steps per second are a long run's less a short one's, so that only steps are left; both ways take turns.
On a CPU every process has one thread. Options that are not listed go to `repae train-repae`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

WARM = 10  # steps that are not timed


def seconds(steps: int, batch: int, *, together: int = 1, beside: int = 1, more: list[str]) -> float:
    """Of a run of so many steps by `together` processes, the slowest of `beside` such runs."""
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for i in range(beside):
            start = ["torch.distributed.run", "--standalone", f"--nproc-per-node={together}", "-m"]
            train = f"repae_lite train-repae --output-dir {folder} --exp-name {i} --max-train-steps {steps}"
            train += f" --batch-size {batch * together} --checkpointing-steps 1000000 --sampling-steps 0"
            words = ["-m", *(start if together > 1 else []), *train.split(), *more]
            how = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.STDOUT}
            with open(Path(folder, f"{i}.log"), "w") as log:
                runs.append(subprocess.Popen([sys.executable, *words], stdout=log, **how))
        if any([run.wait() for run in runs]):
            said = "\n".join(log.read_text()[-2000:] for log in sorted(Path(folder).glob("*.log")))
            raise SystemExit(f"{said}\na run failed: see above")
        told = [json.loads(path.read_text()) for path in Path(folder).glob("*/manifest.json")]
    return max(about["sessions"][0]["seconds"] for about in told)


def rate(steps: int, *given, **how) -> float:
    """Steps per second."""
    return steps / (seconds(WARM + steps, *given, **how) - seconds(WARM, *given, **how))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--batch-size", type=int, default=16, help="images of each process (default: 16)")
    parser.add_argument("--steps", type=int, default=100, help="timed steps (default: 100)")
    parser.add_argument("--repeats", type=int, default=3, help="of each way (default: 3)")
    args, more = parser.parse_known_args()
    for count in args.processes:
        ways = {"alone": {}, "together": {"together": count}, "side by side": {"beside": count}}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                found[name].append(rate(args.steps, args.batch_size, more=more, **way))
        lost = [1 - a / b for a, b in zip(found["together"], found["side by side"], strict=True)]
        row = {"processes": count, "images of each": args.batch_size}
        row |= {f"{name}, steps/s": [round(value, 2) for value in values] for name, values in found.items()}
        row["communication and waiting, share of a step, median"] = round(median(lost), 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
