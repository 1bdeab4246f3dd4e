"""What the number of images costs: opening a data set, memory of a loader process, time to read one image.

    python reproduce/benchmarks/loader.py --sizes 1000 10000 100000 1000000 1281167

For each size an `images.h5` of that many equal 16-pixel images is written to a temporary folder (1.2 kB an
image, 1.6 GB for ImageNet's number) and opened as training opens it: the first time, when it is looked
through, and again. Then images are read in random order, and so are batches by one loader process, whose own
memory (USS: what it shares with no other process) is taken while it reads, once forked, as on a CPU, and once
spawned, as for CUDA: there most of it is PyTorch's own code. The files are in the page cache: what is
compared is the work, not the disk.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import psutil
from huggingface_hub import constants
from torch.utils.data import DataLoader

from repae_lite.data.datasets import open_dataset
from repae_lite.data.hdf5 import LIBVER, add_bytes, image_name, labels_json
from repae_lite.data.image_files import encode_png
from repae_lite.data.training_data import TrainingData


def write(path: Path, size: int) -> None:
    """An `images.h5` of so many images of 1,000 classes."""
    png = encode_png(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    names = [image_name(i) for i in range(size)]
    with h5py.File(path, "w", libver=LIBVER) as file:
        for name in names:
            add_bytes(file, name, png)
        add_bytes(file, "dataset.json", labels_json([(name, i % 1000) for i, name in enumerate(names)]))


def opening(path: Path) -> tuple[float, TrainingData]:
    """Seconds until training could begin to read, and the data."""
    start = time.perf_counter()
    data = TrainingData(open_dataset(path), None)
    return time.perf_counter() - start, data


def milliseconds(data: TrainingData, order: list[int]) -> float:
    """Median time to read an image."""
    took = []
    for index in order:
        start = time.perf_counter()
        data[index]
        took.append(1000 * (time.perf_counter() - start))
    return median(took)


def memory(data: TrainingData, order: list[int], way: str) -> float:
    """MB that a loader process has for itself after it has read these images."""
    loader = DataLoader(data, 32, sampler=order * 2, num_workers=1, multiprocessing_context=way)
    batches = iter(loader)
    for _ in range(len(loader) // 2):  # it goes on reading while it is measured
        next(batches)
    return psutil.Process(batches._workers[0].pid).memory_full_info().uss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6, 1_281_167])
    parser.add_argument("--reads", type=int, default=2000, help="images that are read (default: 2000)")
    parser.add_argument("--repeats", type=int, default=5, help="openings after the first (default: 5)")
    args = parser.parse_args()
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path, constants.HF_ASSETS_CACHE = Path(folder, "images.h5"), folder
            write(path, size)
            order = [random.Random(i).randrange(size) for i in range(args.reads)]
            first, data = opening(path)
            found = {
                "images": size,
                "MB": round(path.stat().st_size / 1e6, 1),
                "first opening, s": round(first, 3),
                "opening again, s": round(median(opening(path)[0] for _ in range(args.repeats)), 3),
                "reading, ms/image": round(milliseconds(data, order), 4),
                **{f"{way}ed, MB": round(memory(data, order, way), 1) for way in ("fork", "spawn")},
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
