"""What the command line costs at the embedded scale: `repae train-repae --vae tiny` against the plain loop of
notebook 05.

    python reproduce/benchmarks/training.py --steps 100 --repeats 3

Steps per second of both, in turns so that both see the same machine; images per second that the loader alone
delivers, against those that training takes; milliseconds of a step that the moving average and the log take.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.utils.data import DataLoader

from repae_lite.method.steps import repae_step, update_ema
from repae_lite.teaching.small_scale import SmallScale
from repae_lite.training.build import open_data
from repae_lite.training.config import TrainConfig
from repae_lite.training.run_folder import RunFolder
from repae_lite.training.trainer import train
from repae_lite.utils.pixels import to_unit_range

WARM = 10  # steps that are not timed


def plain_loop(small: SmallScale, steps: int, batch: int) -> float:
    """Steps per second of the notebook's loop, with the tokens computed beforehand."""
    state = small.new_state("repa-e", sit_lr=1e-3, vae_lr=2e-4)
    start = 0.0
    for i, index in enumerate(small.batches(count=WARM + steps, batch=batch, seed=0)):
        if i == WARM:
            start = time.perf_counter()
        repae_step(state, to_unit_range(small.images[index]), small.labels[index], small.tokens[index])
    return steps / (time.perf_counter() - start)


def command_line(steps: int, batch: int) -> float:
    """Steps per second of the trainer: a long run's time less a short one's, so that only steps are left."""
    seconds = []
    for last in (WARM, WARM + steps):
        with tempfile.TemporaryDirectory() as folder:
            never = {"sampling_steps": 0, "checkpointing_steps": 10**6}
            config = TrainConfig.build(
                "repae", vae="tiny", output_dir=folder, max_train_steps=last, batch_size=batch, **never
            )
            train(config)
            seconds.append(
                json.loads((config.folder / "manifest.json").read_text())["sessions"][0]["seconds"]
            )
    return steps / (seconds[1] - seconds[0])


def loader_alone(batch: int) -> float:
    """Images per second of the trainer's loader, in one process."""
    data = open_data(TrainConfig.build("repae", vae="tiny"))
    start = time.perf_counter()
    for _ in DataLoader(data, batch, shuffle=True):
        pass
    return len(data) / (time.perf_counter() - start)


def milliseconds(function, times: int = 50) -> float:
    """Of one call."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    args = parser.parse_args()
    small = SmallScale.load()
    found: dict[str, list[float]] = {"plain loop": [], "command line": []}
    for _ in range(args.repeats):
        found["plain loop"].append(plain_loop(small, args.steps, args.batch))
        found["command line"].append(command_line(args.steps, args.batch))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.batch} images, {args.repeats} "
        f"x {args.steps} steps"
    )
    for name, rates in found.items():
        print(f"{name:14} {mean(rates):6.2f} steps/s (spread {stdev(rates) if len(rates) > 1 else 0:.2f})")
    ratio = mean(found["command line"]) / mean(found["plain loop"])
    print(f"command line / plain loop: {ratio:.3f}")
    loaded, taken = loader_alone(args.batch), mean(found["command line"]) * args.batch
    print(
        f"loader alone {loaded:.0f} images/s, training takes {taken:.0f}: {loaded / taken:.1f} times as much"
    )
    state = small.new_state("repa-e", sit_lr=1e-3, vae_lr=2e-4)
    ema = milliseconds(lambda: update_ema(state.ema, state.sit, 0.98))
    with tempfile.TemporaryDirectory() as folder:
        log = RunFolder(Path(folder))
        line = milliseconds(lambda: log.log({"step": 1} | {f"measure_{i}": 0.123456789 for i in range(16)}))
    step = 1e3 / mean(found["command line"])
    print(
        f"moving average {ema:.1f} ms and log {line:.1f} ms of a step of {step:.0f} ms: "
        f"{(ema + line) / step:.1%}"
    )


if __name__ == "__main__":
    main()
