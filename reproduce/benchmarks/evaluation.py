"""What evaluation costs at the paper's size, beside the bounds that it was built for: memory and time.

    python reproduce/benchmarks/evaluation.py --threads 2

Each part in a process of its own, so that its peak of memory is its own, and with the code that `repae
generate` and `repae evaluate` run: random numbers as features, Inception with random weights. "Beyond" is the
peak less what the process held when the call began, its input included. Seconds of the wall clock tell what
this machine does now (its load stands beside them), processor seconds count every thread. The file of 50,000
images of 256 pixels needs 20 GB in the temporary folder for a while; --images takes fewer.
"""

import argparse
import cProfile
import json
import os
import platform
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

SAMPLES, REFERENCE, WIDTH, SIDE = 50_000, 10_000, 2048, 256
ROWS = (  # part, value, unit, bound
    ("statistics", "peak", "GiB", 1.5),
    ("precision_recall", "peak beyond", "GiB", 1.0),
    ("precision_recall", "wall", "s", 180.0),
    ("guidance", "evaluations, ODE of 50 steps", "", 0.85),
    ("guidance", "evaluations, SDE of 250 steps", "", 0.85),
    ("guidance", "processor time, ODE of 50 steps", "", 0.85),
    ("stream", "writing, peak beyond", "GiB", 0.25),
    ("stream", "reading, peak beyond", "GiB", 0.25),
)


def peak() -> float:
    """The most memory that this process has held, in GiB."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return found / (2**30 if sys.platform == "darwin" else 2**20)


def measured(function: Callable, *given) -> dict[str, float]:
    """Time and memory of a call."""
    held, wall, spent = peak(), time.perf_counter(), time.process_time()
    function(*given)
    found = {"wall": time.perf_counter() - wall, "processor": time.process_time() - spent}
    return found | {"peak": peak(), "peak beyond": peak() - held}


# ---------------------------------------------------------------- parts


def statistics(options: argparse.Namespace) -> dict[str, float]:
    """Mean and covariance of all features, and then the Fréchet distance."""
    import torch

    from repae_lite.evaluation.metrics import frechet_distance, streamed_stats

    features = torch.rand(SAMPLES, WIDTH)
    found = measured(streamed_stats, features)
    stats = streamed_stats(features[:REFERENCE])
    return found | {"Fréchet distance, processor": measured(frechet_distance, stats, stats)["processor"]}


def _pairs(name: str) -> dict[str, float]:
    import torch

    from repae_lite.evaluation import metrics

    return measured(getattr(metrics, name), torch.rand(SAMPLES, WIDTH), torch.rand(REFERENCE, WIDTH))


def precision_recall(options: argparse.Namespace) -> dict[str, float]:
    """Of all samples and the reference."""
    return _pairs("precision_recall")


def kernel_distance(options: argparse.Namespace) -> dict[str, float]:
    """Of all samples and the reference."""
    return _pairs("kernel_distance")


def guidance(options: argparse.Namespace) -> dict[str, float]:
    """Guidance on [0, .65] over guidance everywhere: (1 + .65) / 2 = .825 where times are evenly spaced."""
    import torch

    from repae_lite import SiT
    from repae_lite.method.sampling import Guidance, sample_ode, sample_sde

    sit, rows = SiT.from_preset("tiny").eval(), []
    sit.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    config, intervals = sit.config, {"inside": Guidance(2.5, 0.0, 0.65), "everywhere": Guidance(2.5)}

    def ratio(sample: Callable, steps: int, batch: int, repeats: int) -> tuple[float, float]:
        eps = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
        labels, spent, evaluated = torch.arange(batch) % config.num_classes, {}, {}
        for _ in range(repeats):
            for name, interval in intervals.items():
                rows.clear()
                took = measured(lambda g=interval: sample(sit, eps, labels, steps=steps, guidance=g))
                spent.setdefault(name, []).append(took["processor"])
                evaluated[name] = sum(rows)
        seconds = {name: median(values) for name, values in spent.items()}
        return evaluated["inside"] / evaluated["everywhere"], seconds["inside"] / seconds["everywhere"]

    ratio(sample_ode, 2, 32, 1)  # warms up
    evaluations, processor = ratio(sample_ode, 50, 32, 3)
    return {
        "evaluations, ODE of 50 steps": evaluations,
        "processor time, ODE of 50 steps": processor,
        "evaluations, SDE of 250 steps": ratio(sample_sde, 250, 2, 1)[0],
    }


def profile(options: argparse.Namespace) -> dict[str, float]:
    """Processor time per image of `repae evaluate`: samples as .npz, the reference as PNG files."""
    import numpy as np
    from PIL import Image

    from repae_lite.commands.main import main

    rng, count = np.random.default_rng(0), options.judged
    images = []
    for _ in range(count):  # smooth shapes with grain: PNG files of the usual size
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        images.append((np.asarray(coarse) + rng.normal(0, 3, (SIDE, SIDE, 1))).clip(0, 255).astype(np.uint8))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "png").mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / "png" / f"{number:06d}.png")
        np.savez(folder / "samples.npz", arr_0=np.stack(images))
        (folder / "random.yaml").write_text(f"judge: inception-random\ncount: {count}\n")
        words = ["evaluate", "--samples", folder / "samples.npz", "--reference", folder / "png", "--foreign"]
        words += ["--protocol", folder / "random.yaml", "--device", "cpu"]
        profiler = cProfile.Profile(time.process_time)
        with redirect_stdout(sys.stderr):
            if profiler.runcall(main, list(map(str, words))):
                raise SystemExit("repae evaluate failed")
    seconds = {}
    for (file, _, function), (*_, total, _) in pstats.Stats(profiler).stats.items():
        seconds[Path(file).name, function] = total
    decoding, reading = seconds["samples.py", "_checked"], seconds["samples.py", "batches"]
    found = {
        "network": seconds["features.py", "forward"] / (2 * count),
        "hash and contrast": seconds["features.py", "add"] / (2 * count),
        "reading .npz": (reading - decoding) / (2 * count),
        "reading PNG": decoding / count,
    }
    return {f"{what}, ms": 1e3 * value for what, value in found.items()}


def stream(options: argparse.Namespace) -> dict[str, float]:
    """The finished .npz, written in batches as `repae generate` does, and read again."""
    import numpy as np

    from repae_lite.data.samples import ImageStream, SampleFolder

    pixels = np.random.default_rng(0).integers(0, 256, (128, SIDE, SIDE, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = SampleFolder(Path(name) / "samples", count=options.images, side=SIDE, batch=len(pixels))

        def write() -> None:
            folder.open({})
            for images in folder.missing():
                folder.write(images, pixels[: len(images)])
            folder.finish({})

        def read() -> None:
            for number, batch in enumerate(ImageStream(folder.npz).batches(len(pixels))):
                if not np.array_equal(batch, pixels[: len(batch)]):
                    raise SystemExit(f"other images were read than were written, in batch {number}")

        written, size = measured(write), folder.npz.stat().st_size
        found = {"file, GB": size / 1e9} | {f"writing, {what}": value for what, value in written.items()}
        return found | {f"reading, {what}": value for what, value in measured(read).items()}


PARTS = {f.__name__: f for f in (statistics, precision_recall, kernel_distance, guidance, profile, stream)}


# ---------------------------------------------------------------- all of them


def shares(found: dict[str, dict]) -> dict[str, float]:
    """Shares of processor time of judging 50,000 samples against ADM's reference, both as .npz."""
    statistic, times = found["statistics"], (SAMPLES + REFERENCE) / 1e3
    seconds = {
        what: times * ms for what, ms in found["profile"].items() if what.endswith("ms") and "PNG" not in what
    }
    seconds["FID and sFID"] = 2 * (statistic["processor"] + statistic["Fréchet distance, processor"])
    seconds |= {name: found[name]["processor"] for name in ("precision_recall", "kernel_distance")}
    return {what.removesuffix(", ms"): value / sum(seconds.values()) for what, value in seconds.items()}


def report(found: dict[str, dict]) -> None:
    """A line for each bound, and what has none."""
    bounded = set()
    print(f"{'value':56} {'found':>8} {'bound':>8}  met")
    for part, what, unit, bound in ROWS:
        if part in found:
            value = found[part][what]
            bounded.add((part, what))
            met = "yes" if value <= bound else "NO"
            print(f"{f'{part}: {what} {unit}':56} {value:8.3f} {bound:8.3f}  {met}")
    for part, values in found.items():
        for what, value in values.items():
            if (part, what) not in bounded:
                print(f"{f'{part}: {what}':56} {value:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="of every part (default: 2)")
    parser.add_argument("--images", type=int, default=SAMPLES, help="in the file (default: 50000)")
    parser.add_argument("--judged", type=int, default=256, help="images that are profiled (default: 256)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts (default: all)")
    parser.add_argument("--folder", type=Path, help="for temporary files (default: the system's)")
    parser.add_argument("--out", type=Path, help="the numbers as JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what a process of ours is for
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options) | {"load": os.getloadavg()[0]}))
        return
    threads, found = str(options.threads), {}
    for part in options.only:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(f"{part}: {json.dumps(found[part])}", file=sys.stderr)
    if {"profile", "statistics", "precision_recall", "kernel_distance"} <= set(found):
        found["share of repae evaluate"] = shares(found)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, CPU")
    report(found)
    if options.out:
        options.out.write_text(json.dumps({"threads": options.threads, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
