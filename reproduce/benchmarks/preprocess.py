"""How fast images are preprocessed, and read again: images per second, per second of processor time, and the
parts of one image.

    python reproduce/benchmarks/preprocess.py --images 2000 --workers 1 2

Makes JPEG files like ImageNet's (500 × 400 pixels, quality 90, smooth shapes with grain, 70 kB) in a
temporary folder. Processor time counts every process and is what one core achieves when nothing else runs;
the wall clock tells what this machine does now.
"""

import argparse
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from repae_lite.data.datasets import ImageFolderDataset, ImageH5Dataset
from repae_lite.data.image_files import center_crop, encode_png, read_image
from repae_lite.data.preprocessing import preprocess


def make_jpegs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Writes `count` different JPEG files in ten class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        if i < 50:  # fifty different images, copied
            coarse = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)).resize(
                size, Image.Resampling.BICUBIC
            )
            grain = np.asarray(coarse) + rng.normal(0, 6, (size[1], size[0], 1))
            jpeg = io.BytesIO()
            Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
            (folder / f"{i}.bin").write_bytes(jpeg.getvalue())
        target = folder / "images" / f"class{i % 10}" / f"{i:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / f"{i % 50}.bin").read_bytes())


def per_image(function, items) -> float:
    """Milliseconds of processor time for one call."""
    start = time.process_time()
    for item in items:
        function(item)
    return (time.process_time() - start) / len(items) * 1e3


def processor_time() -> float:
    """Seconds that this process and its finished children have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(500, 400),
        metavar=("WIDTH", "HEIGHT"),
        help="of the JPEG files, in pixels",
    )
    parser.add_argument("--resolution", type=int, default=256, help="of the squares, in pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_jpegs(folder, args.images, tuple(args.size))
        source = folder / "images"
        paths = sorted(source.rglob("*.jpg"))[:200]
        images = [read_image(path) for path in paths]
        squares = [np.asarray(center_crop(image, args.resolution)) for image in images]
        size = f"{args.size[0]} × {args.size[1]} pixels, {paths[0].stat().st_size / 1e3:.0f} kB"
        print(f"{args.images} JPEG files of {size}; {os.cpu_count()} cores")
        print(f"decode {per_image(read_image, paths):.2f} ms of processor time per image")
        print(f"crop   {per_image(lambda image: center_crop(image, args.resolution), images):.2f} ms")
        print(f"encode {per_image(encode_png, squares):.2f} ms")
        for workers in args.workers:
            start, spent = time.perf_counter(), processor_time()
            preprocess(source, folder / f"out{workers}", resolution=args.resolution, workers=workers)
            seconds, spent = time.perf_counter() - start, processor_time() - spent
            print(
                f"{workers} workers: {args.images / seconds:.0f} images/s, {args.images / spent:.0f} per "
                "second of processor time"
            )
        for dataset in (
            ImageH5Dataset(folder / f"out{args.workers[0]}" / "images.h5"),
            ImageFolderDataset(source, args.resolution),
        ):
            print(
                f"{type(dataset).__name__}: {per_image(dataset.__getitem__, range(0, args.images, 10)):.2f} "
                "ms per image"
            )


if __name__ == "__main__":
    main()
