"""Images on disk and in memory: the official HDF5 layout, image folders, and the embedded dataset that stands in for ImageNet.

Taught in `notebooks/00_map.ipynb`. The layout is that of the official REPA-E preprocessing: `images.h5` holds PNG bytes as
"00000/img00000000.png" … and the labels as "dataset.json"; `images_h5.json` beside it lists the names. `open_dataset` takes whatever
a user has: such a file, its folder, or a folder of images; `repae_lite.preprocessing` makes the one from the other.
"""

import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from h5py import h5d, h5p, h5s, h5t
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repae_lite.files import atomic_path, data_small_dir, write_text
from repae_lite.image_files import center_crop, encode_png, failure, list_images, parse_labels, read_image

LIBVER = "v110"  # HDF5 since 1.10 can read it: without a bound the newest format of the library at hand would be written
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


class H5Dataset(Dataset):
    """Named bytes with labels in an HDF5 file of the official layout; `decode`, which subclasses define, makes items of them.

    The file is opened by each process at its first read, so the dataset survives fork, spawn and pickling.

    Args:
        path: the HDF5 file.

    Attributes:
        names: of the items. labels: list of int. num_classes: largest label + 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not HDF5, truncated, without "dataset.json", that being a group, without labels, or with labels of items that are not there.
    """

    noun, maker = "image", "preprocessing a folder"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file, self._process = None, None
        if not self.path.is_file():
            raise FileNotFoundError(f"the {self.noun} file {self.path} does not exist: check the path, or write it by {self.maker}")
        try:
            with h5py.File(self.path, "r") as file:
                if "dataset.json" not in file:
                    raise ValueError(
                        f"{self.path} has no dataset.json: it was not written by the official preprocessing or by ours"
                    )
                entries = parse_labels(bytes(stored(file, "dataset.json")[()]), f"dataset.json in {self.path}")
                if not entries:
                    raise ValueError(
                        f"{self.path} has no labels: preprocess a folder with one subfolder per class, or with a dataset.json"
                    )
                missing = _missing(file, [name for name, _ in entries])
        except OSError as error:
            raise ValueError(f"{self.path} is not a whole HDF5 file ({error}): write it again") from None
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} {self.noun}s that dataset.json lists, {missing[0]} first: write it again"
            )
        self.names = [name for name, _ in entries]
        self.labels = [label for _, label in entries]
        self.num_classes = max(self.labels) + 1

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.decode(self.read(self.names[index]), self.names[index]), self.labels[index]

    def read(self, name: str) -> bytes:
        """The bytes under a name, whichever way they are stored; a string's trailing zeros, which HDF5 drops, are put back.

        Raises:
            ValueError: there are none.
        """
        if self._process != os.getpid():  # an HDF5 handle must not be shared across a fork
            self._file, self._process = h5py.File(self.path, "r"), os.getpid()
        item = stored(self._file, name)
        value = item[()]
        return value.tobytes() if isinstance(value, np.ndarray) else bytes(value).ljust(item.dtype.itemsize, b"\0")

    def decode(self, data: bytes, name: str) -> Tensor:
        """The item that bytes stand for; `name` is for errors."""
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_process": None}


class ImageH5Dataset(H5Dataset):
    """Images and labels of an `images.h5` in the official layout; item i is (uint8 (3, H, W), label). See `H5Dataset`."""

    def decode(self, data: bytes, name: str) -> Tensor:
        """Pixels of an encoded image.

        Raises:
            ValueError: the bytes are none.
        """
        try:
            image = Image.open(io.BytesIO(data))
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"image {name} in {self.path} cannot be decoded ({failure(error)}): write the file again") from None
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class ImageFolderDataset(Dataset):
    """The images of a folder, cropped to squares as they are read; item i is (uint8 (3, resolution, resolution), label).

    The same labels, order and pixels as after `repae preprocess`, at the cost of decoding and cropping in every epoch. Safe to fork,
    spawn and pickle.

    Args:
        folder: with one subfolder per class, or a dataset.json; see `repae_lite.image_files.list_images`.
        resolution: side of the squares in pixels.

    Attributes:
        names: paths below `root`. labels: list of int. num_classes: number of classes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images, no classes, images without labels or labels without images; on reading, an unreadable image.
    """

    def __init__(self, folder: str | Path, resolution: int):
        if resolution < 1:
            raise ValueError(f"the resolution is {resolution} pixels: give at least 1")
        found = list_images(folder)
        if found.missing:
            raise ValueError(
                f"{found.root} lacks {len(found.missing)} images that dataset.json lists, {found.missing[0]} first: "
                "restore them, or take them out of it"
            )
        self.root, self.names, self.labels, self.num_classes = found.root, found.names, found.labels, found.num_classes
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.root / self.names[index]
        try:
            pixels = np.array(center_crop(read_image(path), self.resolution))
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise ValueError(
                f"the image {path} cannot be read ({failure(error)}): repair or remove it, or preprocess with --on-error skip"
            ) from None
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), self.labels[index]


def open_dataset(path: str | Path, resolution: int | None = None) -> ImageH5Dataset | ImageFolderDataset:
    """The dataset at a path: an HDF5 file in the official layout, a data folder with `images.h5`, or a folder of images.

    Args:
        path: the file or folder.
        resolution: side of the images in pixels: what an image folder is cropped to, and an HDF5 file must have. None takes an HDF5
            file as it is.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: see the two classes; an HDF5 file of another resolution; an unfinished one; an image folder without a resolution.
    """
    path = Path(path)
    if path.is_dir() and not (path / "images.h5").exists():
        if (path / "images.h5.partial").exists():
            raise ValueError(f"the preprocessing into {path} has not finished: run the same command again, it goes on where it was")
        if resolution is None:
            raise ValueError(f"{path} is a folder of images: give the resolution to crop them to, as in --resolution 256")
        return ImageFolderDataset(path, resolution)
    if not path.exists():
        raise FileNotFoundError(f"there is no image file or folder {path}: check the path, or write it by repae preprocess")
    dataset = ImageH5Dataset(path / "images.h5" if path.is_dir() else path)
    height, width = dataset[0][0].shape[1:]
    if resolution is not None and (height, width) != (resolution, resolution):
        raise ValueError(
            f"the images of {dataset.path} have {height} × {width} pixels and not {resolution} × {resolution}: "
            f"preprocess with --resolution {resolution}, or train at another resolution"
        )
    return dataset


def read_batches(loader: DataLoader) -> Iterator:
    """A loader's batches; an error in one of its processes comes as its sentence alone, without that process's traceback.

    When the iteration ends, in whatever way, so do the loader's processes. Left to the garbage collector, those of a failed command may
    outlive it; and if they ignore SIGTERM, with which Python ends its children, it waits for them and never returns.

    Raises:
        ValueError, OSError: of the dataset.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except (ValueError, OSError) as error:
        if loader.num_workers == 0:
            raise
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()


def image_name(index: int) -> str:
    """The official name of image number `index`: 1,000 to a folder."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def add_bytes(file: h5py.File, name: str, data: bytes) -> None:
    """Stores bytes under a name as the official layout does, as one fixed-length string, without the overhead of `create_dataset`."""
    kind = h5t.C_S1.copy()
    kind.set_size(len(data))
    kind.set_strpad(h5t.STR_NULLPAD)
    creation, linking, scalar = h5p.create(h5p.DATASET_CREATE), h5p.create(h5p.LINK_CREATE), h5s.create(h5s.SCALAR)
    creation.set_obj_track_times(False)  # the same content gives the same bytes
    linking.set_create_intermediate_group(True)
    h5d.create(file.id, name.encode(), kind, scalar, creation, linking).write(scalar, scalar, np.array(data), kind)


def stored(file: h5py.File, name: str) -> h5py.Dataset:
    """What a file holds under a name.

    Raises:
        ValueError: that is a group, or has no value.
    """
    found = file.get(name)
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        kind = "an HDF5 group" if isinstance(found, h5py.Group) else "empty"
        raise ValueError(f"{name} in {file.filename} is {kind} instead of bytes: write the file again")
    return found


def labels_json(entries: list[tuple[str, int]]) -> bytes:
    """The (name, label) pairs as the official "dataset.json"."""
    return json.dumps({"labels": entries}).encode()


def write_names(path: str | Path, names: list[str]) -> None:
    """Writes the list of names that belongs beside an HDF5 file: `….h5` has `…_h5.json`."""
    path = Path(path)
    write_text(path.with_name(path.stem + "_h5.json"), json.dumps(names))


def _missing(file: h5py.File, names: list[str]) -> list[str]:
    """Which names the file lacks; lists whole groups, which is forty times faster than looking each name up."""
    groups = defaultdict(list)
    for name in names:
        groups[name.rpartition("/")[0]].append(name)
    missing = []
    for group, members in groups.items():
        held = file.get(group or "/")
        present = set(held) if isinstance(held, h5py.Group) else ()
        missing += [name for name in members if name.rpartition("/")[2] not in present]
    return missing


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
    names = [image_name(i) for i in range(len(images))]
    with atomic_path(path) as partial, h5py.File(partial, "w", libver=LIBVER) as file:
        for name, image in zip(names, images, strict=True):
            add_bytes(file, name, (_smallest_png if compress else encode_png)(image.transpose(1, 2, 0)))
        entries = [(name, int(label)) for name, label in zip(names, labels, strict=True)]
        add_bytes(file, "dataset.json", labels_json(entries))
    write_names(path, names)


def _smallest_png(pixels: np.ndarray) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", optimize=True, compress_level=9)
    return png.getvalue()
