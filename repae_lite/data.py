"""Images on disk and in memory: the official HDF5 layout, and the embedded dataset that stands in for ImageNet.

Taught in `notebooks/00_map.ipynb`. The layout is that of the official REPA-E preprocessing: `images.h5` holds PNG bytes as
"00000/img00000000.png" … and the labels as "dataset.json"; `images_h5.json` beside it lists the names.
"""

import io
import json
import os
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from repae_lite.files import atomic_path, data_small_dir, write_text

CLASS_NAMES = ("fish", "house", "tree", "mushroom", "sailboat", "flower", "cat", "car", "umbrella", "rocket")
SPLITS = ("train", "eval")


def to_unit_range(images: Tensor) -> Tensor:
    """Pixels to what networks eat: uint8 (…) in 0 … 255 to float32 in [-1, 1].

    Raises:
        ValueError: images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"pixels have dtype {images.dtype}: give uint8 values from 0 to 255")
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Network output about in [-1, 1] to pixels: clamped, rounded, uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_embedded(split: str) -> tuple[Tensor, Tensor]:
    """The embedded images (N, 3, 32, 32) uint8 and labels (N,) int64; split "train" (6,000) or "eval" (2,000).

    Never tune anything on "eval": it is what results are measured on.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: the data folder is not there.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose train or eval")
    dataset = ImageH5Dataset(data_small_dir() / split / "images.h5")
    images, labels = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


class ImageH5Dataset(Dataset):
    """Images and labels of an `images.h5` in the official layout; item i is (uint8 (3, H, W), label).

    The file is opened by each process at its first read, so the dataset survives fork, spawn and pickling.

    Args:
        path: the HDF5 file.

    Attributes:
        labels: list of int. num_classes: largest label + 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not HDF5, truncated, without "dataset.json", without labels, or with labels of images that are not there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file, self._process = None, None
        if not self.path.is_file():
            raise FileNotFoundError(
                f"the image file {self.path} does not exist: check the path, or write it by preprocessing a folder"
            )
        try:
            with h5py.File(self.path, "r") as file:
                if "dataset.json" not in file:
                    raise ValueError(
                        f"{self.path} has no dataset.json: it was not written by the official preprocessing or by ours"
                    )
                try:
                    entries = json.loads(bytes(file["dataset.json"][()])).get("labels")
                except (json.JSONDecodeError, AttributeError):
                    raise ValueError(f"{self.path} has a dataset.json that cannot be read: write the file again") from None
                if not entries:
                    raise ValueError(
                        f"{self.path} has no labels: preprocess a folder with one subfolder per class, or with a dataset.json"
                    )
                missing = [name for name, _ in entries if name not in file]
        except OSError as error:
            raise ValueError(f"{self.path} is not a whole HDF5 file ({error}): write it again") from None
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} images that dataset.json lists, {missing[0]} first: write it again"
            )
        self.names = [name for name, _ in entries]
        self.labels = [int(label) for _, label in entries]
        self.num_classes = max(self.labels) + 1

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._process != os.getpid():  # an HDF5 handle must not be shared across a fork
            self._file, self._process = h5py.File(self.path, "r"), os.getpid()
        name = self.names[index]
        try:
            image = Image.open(io.BytesIO(bytes(self._file[name][()])))
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"image {name} in {self.path} cannot be decoded ({error}): write the file again") from None
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), self.labels[index]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_process": None}


def write_images_h5(path: str | Path, images: np.ndarray, labels: np.ndarray, *, compress: bool = True) -> None:
    """Writes images (N, 3, H, W) uint8 and labels (N,) in the official layout, atomically, with the list of names beside.

    Args:
        path: an `….h5`; the names go to `…_h5.json`.
        images: pixels. labels: class numbers.
        compress: PNG compression; the official preprocessing stores without.

    Raises:
        ValueError: other shapes or dtypes.
    """
    path = Path(path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(labels) != len(images):
        raise ValueError(
            f"images {images.dtype} {images.shape} with {len(labels)} labels: give uint8 (N, 3, H, W) and one label each"
        )
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    with atomic_path(path) as partial, h5py.File(partial, "w", libver="latest") as file:
        for name, image in zip(names, images, strict=True):
            png = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(png, "PNG", optimize=compress, compress_level=9 if compress else 0)
            file.create_dataset(name, data=np.bytes_(png.getvalue()), track_times=False)
        entries = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        file.create_dataset("dataset.json", data=np.bytes_(json.dumps({"labels": entries})), track_times=False)
    write_text(path.with_name(path.stem + "_h5.json"), json.dumps(names))
