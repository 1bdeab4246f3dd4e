"""Images as data sets: HDF5 files, folders, shards, and the embedded images that stand in for ImageNet.

Taught in `notebooks/00_map.ipynb`. `open_dataset` takes whatever a user has: a file in the official layout
(`repae_lite.data.hdf5`), its folder, a folder of images, or WebDataset shards (`repae_lite.data.shards`);
`repae_lite.data.preprocessing` makes the file from the folder.
"""

import errno
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from repae_lite.data.hdf5 import item_names, missing_names, open_h5, read_bytes, reading
from repae_lite.data.image_files import center_crop, decode_image, failure, open_image, read_image
from repae_lite.data.image_lists import LABELS, list_images, parse_labels, refuse_archive
from repae_lite.data.index import Names, join, kept_index
from repae_lite.data.shards import find_shards, index_shards
from repae_lite.utils.errors import of_a_worker
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.processes import process_rank

SPLITS = ("train", "eval")
LARGE = 1 << 26  # bytes of an HDF5 file whose names and labels are kept apart: smaller ones are read at once
logger = logging.getLogger(__name__)


def load_embedded(split: str) -> tuple[Tensor, Tensor]:
    """The embedded images (N, 3, 32, 32) uint8 and labels (N,) int64.

    Args:
        split: "train" (6,000 images) or "eval" (2,000). Never tune anything on "eval": results are measured
            on it.

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
    """Named bytes with labels in an HDF5 file of the official layout.

    Subclasses make items of them by `decode`. The file is opened by each process at its first read, so the
    dataset survives fork, spawn and pickling.

    Args:
        path: the HDF5 file.

    Attributes:
        names: of the items.
        labels: class numbers of the items.
        num_classes: largest label + 1.
        no_classes: why the items have no classes, all labels being 0; empty when they have.

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read now; see `repae_lite.data.hdf5.reading`.
        ValueError: it is not HDF5, damaged, without a "dataset.json", or lacks items that have labels.
    """

    noun, maker = "image", "preprocessing a folder"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file, self._process = None, None
        if not self.path.is_file():
            problem = "is no file" if self.path.exists() else "does not exist"
            raise FileNotFoundError(
                f"the {self.noun} file {self.path} {problem}: check the path, or write it by {self.maker}"
            )
        refuse_archive(self.path)
        with open_h5(self.path) as file:
            if not _has_labels(file):
                raise ValueError(
                    f"{self.path} has no dataset.json: it was not written by the official preprocessing or "
                    "by ours"
                )
            if self.path.stat().st_size < LARGE:
                index = self._index(file)
            else:
                index = kept_index(f"{LABELS} 1", [self.path], lambda: self._index(file))
        self.names, bare = Names(index["names"]), index["labels"][0] < 0
        self.labels: np.ndarray = index["labels"].clip(0)
        self.num_classes = int(self.labels.max()) + 1
        self.no_classes = f"the {self.noun}s of {self.path} have no classes" if bare else ""

    def _index(self, file: h5py.File) -> dict[str, np.ndarray]:
        """Names, as `Names` takes them, and labels, which are -1 when there are none."""
        entries = parse_labels(read_bytes(file, LABELS), f"{LABELS} in {self.path}")
        names = [name for name, _ in entries] or item_names(file)
        if missing := missing_names(file, names) if entries else []:
            raise ValueError(
                f"{self.path} lacks {len(missing)} {self.noun}s that dataset.json lists, {missing[0]} first: "
                "write it again"
            )
        if not names:
            raise ValueError(f"{self.path} holds no {self.noun}s: write it by {self.maker}")
        labels = [label for _, label in entries] or [-1] * len(names)
        return {"names": join(names), "labels": np.array(labels, np.int64)}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.names[index]
        return self.decode(self.read(name), name), int(self.labels[index])

    def read(self, name: str) -> bytes:
        """The bytes under a name.

        Raises:
            ValueError, OSError: see `repae_lite.data.hdf5.read_bytes`.
        """
        if self._process != os.getpid():  # an HDF5 handle must not be shared across a fork
            self._file, self._process = open_h5(self.path), os.getpid()
        return read_bytes(self._file, name)

    def decode(self, data: bytes, name: str) -> Tensor:
        """The item that bytes stand for; `name` is for errors."""
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_process": None}


def _has_labels(file: h5py.File) -> bool:
    with reading(file.filename):
        return LABELS in file


class ImageH5Dataset(H5Dataset):
    """Images and labels of an `images.h5`; item i is (uint8 (3, H, W), label). See `H5Dataset`.

    Attributes:
        shape: (3, H, W), the same for all.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.shape: tuple[int, ...] = ()
        self.shape = tuple(self[0][0].shape)

    def decode(self, data: bytes, name: str) -> Tensor:
        """Pixels of an encoded image.

        Raises:
            ValueError: the bytes are no image, or one of another size than the first.
        """
        try:
            image = open_image(io.BytesIO(data))
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many kinds on damaged bytes
            raise ValueError(
                f"image {name} in {self.path} cannot be decoded ({failure(error)}): write the file again"
            ) from None
        height, width, _ = pixels.shape
        if self.shape not in ((), (3, height, width)):
            raise ValueError(
                f"image {name} in {self.path} has {height} × {width} pixels and the first one "
                f"{self.shape[1]} × {self.shape[2]}: preprocess all to one size"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class CroppedDataset(Dataset):
    """Images of any size, cropped to squares as they are read; item i is (uint8 (3, H, H), label).

    Subclasses read image i, which errors call `root` / `names[i]`, and say what to do when they cannot.

    Args:
        resolution: H, side of the squares in pixels.

    Attributes:
        root: the folder that the names start from.
        names: of the images.
        labels: class numbers of the images.
        num_classes: number of classes.
        no_classes: why the images have no classes, all labels being 0; empty when they have.

    Raises:
        ValueError: the resolution; on reading, an unreadable image.
    """

    remedy = ""

    def __init__(self, resolution: int):
        if resolution < 1:
            raise ValueError(f"the resolution is {resolution} pixels: give at least 1")
        self.resolution = resolution

    def read(self, index: int) -> Image.Image:
        """Image i, whole, 8-bit RGB."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            pixels = np.array(center_crop(self.read(index), self.resolution))
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises many kinds on damaged files
            told = f"the image {self.root / self.names[index]} cannot be read"
            if getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise OSError(f"{told} now ({failure(error)}): it may be whole all the same") from None
            raise ValueError(f"{told} ({failure(error)}): {self.remedy}") from None
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), int(self.labels[index])


class ImageFolderDataset(CroppedDataset):
    """The images of a folder, see `CroppedDataset`.

    The same labels, order and pixels as after `repae preprocess`, at the cost of decoding and cropping in
    every epoch. Safe to fork, spawn and pickle.

    Args:
        folder: with one subfolder per class, or a dataset.json; see
            `repae_lite.data.image_lists.list_images`.
        resolution: side of the squares in pixels.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: what `list_images` refuses, labels without images.
    """

    remedy = "repair or remove it, or preprocess with --on-error skip"

    def __init__(self, folder: str | Path, resolution: int):
        super().__init__(resolution)
        found = list_images(folder)
        if found.missing:
            raise ValueError(
                f"{found.root} lacks {len(found.missing)} images that dataset.json lists, {found.missing[0]} "
                "first: restore them, or take them out of it"
            )
        self.root, self.names = found.root, Names.of(found.names)
        self.labels = np.array(found.labels, np.int64)
        self.num_classes = found.num_classes
        reason = found.no_classes
        self.no_classes = reason and f"the images of {found.root} have no classes ({reason})"
        if process_rank() == 0:
            for line in found.summary():
                logger.info(line)

    def read(self, index: int) -> Image.Image:
        """Image i, whole, 8-bit RGB."""
        return read_image(self.root / self.names[index])


class ShardDataset(CroppedDataset):
    """The images of WebDataset shards, see `CroppedDataset` and `repae_lite.data.shards`.

    Safe to fork, spawn and pickle: an image is read from its place by whoever wants it.

    Args:
        shards: tar files.
        resolution: side of the squares in pixels.

    Raises:
        ValueError, OSError: what `index_shards` refuses.
    """

    remedy = "write the shard again"

    def __init__(self, shards: list[Path], resolution: int):
        super().__init__(resolution)
        self.shards, self.root = shards, Path(os.path.commonpath([shard.parent for shard in shards]))
        self.names, self._places = index_shards(shards, self.root)
        self.labels = self._places[:, 3].clip(0)
        self.num_classes, bare = int(self.labels.max()) + 1, self._places[0, 3] < 0
        self.no_classes = f"the images of {shards[0]} have no .cls and no label in a .json" if bare else ""
        if process_rank() == 0:
            classes = "no" if bare else f"{self.num_classes:,}"
            logger.info(f"{self.root}: {len(self):,} images of {classes} classes in {len(shards):,} shards")

    def read(self, index: int) -> Image.Image:
        """Image i, whole, 8-bit RGB."""
        shard, offset, length, _ = self._places[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return decode_image(io.BytesIO(file.read(length)))


def open_dataset(path: str | Path, resolution: int | None = None) -> ImageH5Dataset | CroppedDataset:
    """The dataset at a path.

    Args:
        path: an HDF5 file in the official layout, a data folder with `images.h5`, a folder of images, or
            WebDataset shards (see `repae_lite.data.shards.find_shards`).
        resolution: side of the images in pixels: what folders and shards are cropped to, and an HDF5 file
            must have. None takes an HDF5 file as it is.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: see the classes; an HDF5 file of another resolution; an unfinished one; a folder or shards
            without a resolution.
        ConnectionError, OSError: shards that cannot be fetched from the Hub.
    """
    path = Path(path)
    sharded = path.suffix.lower() == ".tar" or str(path).startswith("hf:")
    if (sharded or path.is_dir()) and not (path / "images.h5").exists():
        if (path / "images.h5.partial").exists():
            raise ValueError(
                f"the preprocessing into {path} has not finished: run the same command again, it continues "
                "where it stopped"
            )
        if resolution is None:
            raise ValueError(
                f"{path} holds images of any size: give the resolution to crop them to, as in "
                "--resolution 256"
            )
        shards = find_shards(path)
        return ShardDataset(shards, resolution) if shards else ImageFolderDataset(path, resolution)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no image file or folder {path}: check the path, or write it by repae preprocess"
        )
    dataset = ImageH5Dataset(path / "images.h5" if path.is_dir() else path)
    height, width = dataset.shape[1:]
    if resolution is not None and (height, width) != (resolution, resolution):
        raise ValueError(
            f"the images of {dataset.path} have {height} × {width} pixels and not {resolution} × "
            f"{resolution}: preprocess with --resolution {resolution}, or train at another resolution"
        )
    return dataset


def read_batches(loader: DataLoader) -> Iterator:
    """A loader's batches; an error in one of its processes comes without that process's traceback.

    When the iteration ends, in whatever way, so do the loader's processes. Left to the garbage collector,
    those of a failed command may outlive it; and if they ignore SIGTERM, with which Python ends its children,
    it waits for them and never returns.

    Raises:
        ValueError, OSError: of the dataset.
    """
    iterator = iter(loader)
    try:
        yield from iterator
    except (ValueError, OSError) as error:
        if not (told := of_a_worker(error)):
            raise
        raise (ValueError if isinstance(error, ValueError) else OSError)(told[0]) from None
    finally:
        if loader.num_workers:
            iterator._shutdown_workers()
