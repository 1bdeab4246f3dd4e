"""Sampled images on disk: a file that grows by batches and survives kills, and readers of what others wrote.

The finished file is ADM's `.npz`: `arr_0`, uint8 (N, H, W, 3). Nothing here holds more than a batch in
memory: 50,000 images of 256 pixels are 9.8 GB.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from repae_lite.data.datasets import ImageH5Dataset
from repae_lite.data.image_files import read_image
from repae_lite.data.image_lists import ImageList, list_images
from repae_lite.utils.files import atomic_path, read_json, write_text
from repae_lite.utils.locks import check_space, writing

MANIFEST = "manifest.json"
CHUNK = 1 << 24  # bytes that are copied at once


class SampleFolder:
    """Samples in the making, in a folder that any number of processes write into; `finish` makes NAME.npz.

    `arr_0.npy` has room for all of them. A batch counts when its byte in `done` is 1, and that byte is
    written when the batch is on the disk: a killed run recomputes at most the batches it was working on.

    Args:
        folder: `SAMPLE_DIR/NAME`; the finished file is `NAME.npz` beside it.
        count: images in all.
        side: of an image, pixels.
        batch: images of a batch, the unit of work.
        png: write each image as `NNNNNN.png` in the folder too.
    """

    def __init__(self, folder: Path, *, count: int, side: int, batch: int, png: bool = False):
        self.folder, self.npz = folder, folder.with_name(folder.name + ".npz")
        self.count, self.side, self.batch, self.png = count, side, batch, png
        self.array, self.marks = folder / "arr_0.npy", folder / "done"

    def __len__(self) -> int:
        return -(-self.count // self.batch)

    def open(self, manifest: dict) -> None:
        """Makes the folder, or checks that it was begun with the same manifest; for the first process.

        Raises:
            ValueError: it was made with other settings; which, and their values. Or it is finished.
            OSError: it cannot be written, or the disk is too small.
        """
        path = self.folder / MANIFEST
        if path.is_file():
            check_same(read_json(path), manifest, self.folder)
            if not self.marks.is_file():
                raise ValueError(
                    f"{self.folder} holds the finished PNG files of {self.npz.name}, which is gone: put it "
                    "back, or choose another --sample-dir"
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} holds files and no {MANIFEST}: it is not of repae generate, so choose "
                "another --sample-dir"
            )
        with writing(self.folder.parent):
            self.folder.mkdir(parents=True, exist_ok=True)
            # The array and its copy in the .npz.
            check_space(self.folder, (2 + self.png) * self.count * 3 * self.side**2, "the samples need")
            shape = (self.count, self.side, self.side, 3)
            np.lib.format.open_memmap(self.array, "w+", np.uint8, shape).flush()
            self.marks.write_bytes(bytes(len(self)))
            write_text(path, json.dumps(manifest, indent=1) + "\n")

    def missing(self) -> list[range]:
        """The images of every batch that is not done yet."""
        marks = self.marks.read_bytes()
        starts = (number * self.batch for number in range(len(self)) if not marks[number])
        return [range(at, min(at + self.batch, self.count)) for at in starts]

    def write(self, images: range, pixels: np.ndarray) -> None:
        """Puts a batch (B, H, W, 3) uint8 on the disk and marks it."""
        with writing(self.folder):
            array = np.load(self.array, mmap_mode="r+")
            array[images.start : images.stop] = pixels
            array.flush()
            self._write_png(images, pixels)
            with open(self.marks, "rb+") as file:
                file.seek(images.start // self.batch)
                file.write(b"\1")
                file.flush()
                os.fsync(file.fileno())

    def _write_png(self, images: range, pixels: np.ndarray) -> None:
        for number, image in zip(images, pixels, strict=True) if self.png else ():
            Image.fromarray(image).save(self.folder / f"{number:06d}.png")

    def finish(self, manifest: dict) -> Path:
        """Writes NAME.npz and NAME.json, its manifest, and removes what only served the making."""
        with writing(self.folder.parent):
            for number in range(self.count) if self.png else ():  # those of batches done without png
                if not (self.folder / f"{number:06d}.png").is_file():
                    array = np.load(self.array, mmap_mode="r")
                    self._write_png(range(number, number + 1), array[number : number + 1])
            # The manifest first: an .npz without it could neither be judged nor continued.
            write_text(self.npz.with_suffix(".json"), json.dumps(manifest, indent=1) + "\n")
            with (
                atomic_path(self.npz) as partial,
                zipfile.ZipFile(partial, "w") as archive,
                archive.open("arr_0.npy", "w", force_zip64=True) as target,
                open(self.array, "rb") as source,
            ):
                shutil.copyfileobj(source, target, CHUNK)
            if self.png:
                self.array.unlink()
                self.marks.unlink()
            else:
                shutil.rmtree(self.folder)
        return self.npz


def check_same(old: dict, new: dict, where: Path) -> None:
    """Refuses two manifests that differ.

    Raises:
        ValueError: the first difference.
    """
    for key in dict.fromkeys([*new, *old]):
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            check_same(old[key], new[key], where)
        elif old.get(key) != new.get(key):
            raise ValueError(
                f"{where} was made with {key} {old.get(key)!r} and not {new.get(key)!r}: give the same "
                "settings, or another --sample-dir"
            )


# ---------------------------------------------------------------- reading


class ImageStream:
    """Images of one size, read in order: of an ADM `.npz`, of images.h5, or of a folder of image files.

    Args:
        source: the file or folder.

    Attributes:
        count: number of images.
        side: height and width, pixels.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file; images of several sizes, or not square; fewer than two.
    """

    def __init__(self, source: str | Path):
        self.path = Path(source)
        self.images: ImageList | None = None
        self.dataset: ImageH5Dataset | None = None
        if self.path.suffix == ".h5" or (self.path / "images.h5").is_file():
            self.dataset = ImageH5Dataset(self.path if self.path.is_file() else self.path / "images.h5")
            self.count, (height, width) = len(self.dataset), self._image(0).shape[:2]
        elif self.path.is_dir():
            self.images = list_images(self.path)
            self.count, (height, width) = len(self.images.names), self._image(0).shape[:2]
        elif self.path.is_file():
            shape = self._shape()
            self.count, height, width = shape[:3]
        else:
            raise FileNotFoundError(f"there are no images at {source}: give an .npz or a folder of images")
        if height != width:
            raise ValueError(f"the images of {source} are {height} × {width}: they must be square")
        if self.count < 2:
            raise ValueError(f"{source} holds {self.count} images: statistics need at least 2")
        self.side = height

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order: (B, H, W, 3) uint8, the last batch perhaps smaller."""
        if self.images is not None or self.dataset is not None:
            for at in range(0, self.count, size):
                yield np.stack([self._checked(i) for i in range(at, min(at + size, self.count))])
            return
        length = 3 * self.side**2
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _npy_header(file)
            for at in range(0, self.count, size):
                wanted = min(size, self.count - at)
                try:
                    data = file.read(wanted * length)
                except (zipfile.BadZipFile, EOFError, OSError) as error:
                    raise ValueError(f"{self.path} is damaged ({error}): write it again") from None
                if len(data) < wanted * length:
                    raise ValueError(
                        f"{self.path} ends after image {at + len(data) // length}: write it again"
                    )
                yield np.frombuffer(data, np.uint8).reshape(wanted, self.side, self.side, 3)

    def _image(self, index: int) -> np.ndarray:
        if self.dataset is not None:
            return self.dataset[index][0].permute(1, 2, 0).numpy()
        path = self.images.root / self.images.names[index]
        try:
            return np.asarray(read_image(path))
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise ValueError(f"{path} cannot be read as an image ({error}): restore or remove it") from None

    def _checked(self, index: int) -> np.ndarray:
        image = self._image(index)
        if image.shape != (self.side, self.side, 3):
            name = (self.images or self.dataset).names[index]
            raise ValueError(
                f"{name} in {self.path} is {image.shape[1]} × {image.shape[0]} pixels and "
                f"the first image {self.side} × {self.side}: bring all to one size"
            )
        return image

    def _shape(self) -> tuple[int, ...]:
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                shape, fortran, dtype = _npy_header(file)
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, SyntaxError) as error:
            raise ValueError(
                f"{self.path} is not a whole .npz with the images arr_0 ({error}): write it again"
            ) from None
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise ValueError(
                f"arr_0 in {self.path} is {dtype} of shape {shape}: images are uint8 (N, H, W, 3)"
            )
        return shape


def _npy_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)
