"""Image files of any kind become square 8-bit RGB pixels: how they are found, read, cropped and stored.

The crop is the one of ADM (Dhariwal & Nichol, 2105.05233) that REPA-E's preprocessing uses;
`repae_lite.data.preprocessing` runs it over a whole folder. No PyTorch here, so that worker processes start
at once.
"""

import json
import os
import posixpath
import signal
import struct
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = "JPEG PNG WEBP GIF BMP TIFF PPM JPEG2000 AVIF".split()  # reading any of these runs no other program
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif".split()
)
MAX_PIXELS = 178_956_970  # of an image, as in Pillow: half a gigabyte
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258  # tags of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---------------------------------------------------------------- which files, which labels


@dataclass(frozen=True)
class ImageList:
    """The images of a folder, sorted by path, and their classes.

    Attributes:
        root: the folder that the names start from.
        names: paths below root, with "/".
        labels: class number of each image.
        class_names: class folders in the order of their numbers; empty when the labels come from a
            dataset.json.
        missing: names that dataset.json lists and the folder lacks; they are among `names` too.
        ignored: number of other files by suffix.
    """

    root: Path
    names: list[str]
    labels: list[int]
    class_names: list[str]
    missing: list[str]
    ignored: dict[str, int]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names) or max(self.labels) + 1


def list_images(folder: str | Path) -> ImageList:
    """Finds the images below a folder and numbers their classes.

    Labels are those of a dataset.json in the folder, {"labels": [[path, class], …]}, or else the positions of
    the top-level folders in their sorted order (for ImageNet n01440764 is 0 and n15075141 is 999). A folder
    `train` that itself holds class folders is entered. Hidden files and folders (".…", "__MACOSX") are left
    out; links are followed.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images, no classes, a class folder without images, images beside the class folders, or
            a dataset.json that cannot be read or leaves images out.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(
            f"the image folder {root} {'is a file' if root.exists() else 'does not exist'}: check the path"
        )
    if not (root / "dataset.json").is_file() and _holds_classes(root / "train"):
        root = root / "train"
    names, ignored = [], Counter()
    for name in _walk(root):
        suffix = posixpath.splitext(name)[1].lower()
        if suffix in SUFFIXES:
            names.append(name)
        elif name != "dataset.json":
            ignored[suffix or "without suffix"] += 1
    names.sort()
    if not names:
        raise ValueError(
            f"{root} holds no images: looked in all its folders for {', '.join(sorted(SUFFIXES))}"
        )
    listed = root / "dataset.json"
    entries = parse_labels(listed.read_bytes(), listed) if listed.is_file() else []
    if not entries:
        labels, class_names = _folder_labels(root, names)
        return ImageList(root, names, labels, class_names, [], dict(ignored))
    numbers = {posixpath.normpath(name.replace("\\", "/")): label for name, label in entries}
    found = set(names)
    if unlisted := [name for name in names if name not in numbers]:
        raise ValueError(
            f"{listed} has no label for {len(unlisted)} images, {unlisted[0]} first: add them to it, or "
            "remove them"
        )
    names = sorted(numbers)
    return ImageList(
        root,
        names,
        [numbers[name] for name in names],
        [],
        [name for name in names if name not in found],
        dict(ignored),
    )


def _holds_classes(train: Path) -> bool:
    """Whether `train` is a training split; a class of that name would hold images directly."""
    if not train.is_dir():
        return False
    entries = [entry for entry in train.iterdir() if not _hidden(entry.name)]
    images = any(entry.suffix.lower() in SUFFIXES for entry in entries)
    return (train / "dataset.json").is_file() or (not images and any(entry.is_dir() for entry in entries))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _walk(root: Path) -> Iterator[str]:
    """Names of all files below root, links followed but not in circles."""

    def refuse(error: OSError):
        raise ValueError(
            f"the folder {error.filename} cannot be read ({error.strerror}): change its permissions, or "
            "remove it"
        )

    for parent, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        here = os.path.realpath(parent)
        for folder in list(folders):
            path = os.path.join(parent, folder)
            circle = os.path.islink(path) and (here + os.sep).startswith(
                os.path.join(os.path.realpath(path), "")
            )
            if circle or _hidden(folder):
                folders.remove(folder)
        below = os.path.relpath(parent, root)
        for file in files:
            if not _hidden(file):
                yield file if below == os.curdir else f"{below}/{file}".replace(os.sep, "/")


def _folder_labels(root: Path, names: list[str]) -> tuple[list[int], list[str]]:
    """Labels from sorted top-level folders."""
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    class_names = sorted(set(tops))
    if len(class_names) == 1:  # the official code would silently drop all labels here
        raise ValueError(
            f"all {len(names)} images of {root} lie in one folder, so they have no classes: name a folder "
            "with one subfolder per class, or put a dataset.json into it"
        )
    if class_names[0] == "":
        alone = [name for name in names if "/" not in name]
        raise ValueError(
            f"{len(alone)} images lie beside the class folders of {root}, {alone[0]} first: move them into a "
            "class folder, or away"
        )
    folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not _hidden(entry.name))
    if empty := [name for name in folders if name not in set(class_names)]:
        raise ValueError(
            f"the class folder {empty[0]} of {root} holds no images ({len(empty)} such folders): fill or "
            "remove it, since labels number the class folders in order"
        )
    numbers = {name: i for i, name in enumerate(class_names)}
    return [numbers[top] for top in tops], class_names


def parse_labels(text: bytes | str, where: object) -> list[tuple[str, int]]:
    """The (name, class) pairs of a dataset.json, {"labels": [[name, class], …]}; none when it has no labels.

    Args:
        text: its content.
        where: what to call it in errors.

    Raises:
        ValueError: not such a file, a class that is no whole number from 0 up, or a name listed twice.
    """
    try:
        entries = json.loads(text).get("labels") or []
        pairs = [(name, label) for name, label in (entries.items() if isinstance(entries, dict) else entries)]
        names = {name for name, _ in pairs if isinstance(name, str)}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f'{where} cannot be read as {{"labels": [[name, class], …]}}: write it again'
        ) from None
    for name, label in pairs:
        if not isinstance(name, str) or type(label) is not int or label < 0:
            raise ValueError(
                f"{where} gives {name!r} the label {label!r}: labels are whole numbers from 0 up"
            )
    if len(names) != len(pairs):
        raise ValueError(f"{where} lists {len(pairs) - len(names)} names twice: list every image once")
    return pairs


# ---------------------------------------------------------------- reading


def read_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, upright.

    The first frame of animations; orientation as EXIF says; 16 bits scaled by 255/65535 and rounded (TIFF
    colours: their upper byte); transparency laid over white; CMYK, palettes and grey converted. Colour
    profiles are not applied. The official preprocessing differs in two points: it ignores orientation, and
    drops transparency.

    Raises:
        OSError, ValueError and whatever Pillow raises on damaged files; see `failure`.
    """
    if not os.path.isfile(path):  # a named pipe would wait for ever
        raise FileNotFoundError("no such file")
    with warnings.catch_warnings(), open(path, "rb") as file:
        warnings.simplefilter("ignore")
        image = Image.open(file, formats=_formats())
        image.load()
        try:
            turn = TURNS.get(image.getexif().get(ORIENTATION))
        except Exception:  # damaged EXIF data is no reason to lose the pixels
            turn = None
        rgb = _over_white(_eight_bits(image, file))
        return rgb if turn is None else rgb.transpose(turn)


def failure(error: Exception) -> str:
    """Why an image could not be read, in words that do not depend on the machine."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _eight_bits(image: Image.Image, file: BinaryIO) -> Image.Image:
    """Brings samples of more than 8 bits to 8."""
    file.seek(0)
    if image.format == "PNG" and file.read(25)[24] == 16:  # Pillow would cut colours to their upper byte
        return _png16(file, image.info.get("transparency"))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
        return Image.fromarray(_scaled(np.asarray(image), 2**bits - 1))
    if image.mode in ("I", "F"):
        raise ValueError("32-bit samples, which have no agreed range: save the image with 8 or 16 bits")
    return image


def _scaled(values: np.ndarray, largest: int) -> np.ndarray:
    return ((values.clip(0, largest).astype(np.int64) * 255 + largest // 2) // largest).astype(np.uint8)


def _png16(file: BinaryIO, transparent: int | tuple | None) -> Image.Image:
    import torch
    from torchvision.io import ImageReadMode, decode_png

    file.seek(0)
    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    values = decode_png(data, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()  # (H, W, 1 to 4) uint16
    pixels = _scaled(values, 65535)
    if transparent is not None and values.shape[2] in (1, 3):  # one colour stands for transparency
        alpha = 255 * (values != np.array(transparent)).any(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, alpha.astype(np.uint8)], axis=2)
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# ---------------------------------------------------------------- cropping and storing


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image, its side scaled to `size` pixels, as ADM's evaluation data were made.

    Halved by a box filter while the shorter side is at least twice the size, then resized by a bicubic
    filter, then cropped; of an odd number of surplus pixels, right and bottom lose one more
    (guided-diffusion, `center_crop_arr`).

    Raises:
        ValueError: so long and thin that the resized image would not fit in memory.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(f"too long and thin to be scaled to {size} pixels: {image.width} × {image.height}")
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def encode_png(pixels: np.ndarray) -> bytes:
    """Pixels (H, W, 3) uint8 as PNG without compression: fastest to read; H and W alone decide its length."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row starts with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def square_pngs(root: str, names: list[str], size: int) -> list[bytes | str]:
    """For each image the PNG of its central square of size × size pixels, or the reason why there is none."""
    results = []
    for name in names:
        try:
            results.append(encode_png(np.asarray(center_crop(read_image(os.path.join(root, name)), size))))
        except Exception as error:  # Pillow raises many kinds on damaged files; all are reported
            results.append(failure(error))
    return results


def start_worker() -> None:
    """Set-up of a worker process: leaves interruptions to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
