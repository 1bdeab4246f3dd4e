"""Image files of any kind become square 8-bit RGB pixels: how they are read, cropped and stored.

The crop is the one of ADM (Dhariwal & Nichol, 2105.05233) that REPA-E's preprocessing uses;
`repae_lite.data.preprocessing` runs it over a whole folder, whose images `repae_lite.data.image_lists` finds.
No PyTorch here, so that worker processes start at once.
"""

import io
import os
import signal
import struct
import threading
import warnings
import zlib
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
PNG_START = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# ---------------------------------------------------------------- reading


def read_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB, upright, see `decode_image`.

    Raises:
        OSError, ValueError and whatever Pillow raises on damaged files; see `failure`.
    """
    if not os.path.isfile(path):  # a named pipe would wait for ever
        raise FileNotFoundError("no such file")
    with open(path, "rb") as file:
        return decode_image(file)


def decode_image(file: BinaryIO) -> Image.Image:
    """The image in an open file as 8-bit RGB, upright.

    The first frame of animations; orientation as EXIF says; 16 bits scaled by 255/65535 and rounded (TIFF
    colours: their upper byte); transparency laid over white; CMYK, palettes and grey converted. Colour
    profiles are not applied. The official preprocessing differs in two points: it ignores orientation, and
    drops transparency.

    Raises:
        OSError, ValueError and whatever Pillow raises on damaged files; see `failure`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(file)
        try:
            turn = TURNS.get(image.getexif().get(ORIENTATION))
        except Exception:  # damaged EXIF data is no reason to lose the pixels
            turn = None
        rgb = _over_white(_eight_bits(image, file))
        return rgb if turn is None else rgb.transpose(turn)


def open_image(file: BinaryIO) -> Image.Image:
    """An image of any format that is taken, decoded.

    A PNG whose metadata is damaged or larger than Pillow takes is read without it: it says nothing about the
    pixels.

    Raises:
        Whatever Pillow raises on damaged files; see `failure`.
    """
    try:
        return _loaded(file)
    except Exception:  # Pillow raises many kinds
        file.seek(0)
        if file.read(len(PNG_START)) != PNG_START:
            raise
        return _loaded(_without_metadata(file))


def _loaded(file: BinaryIO) -> Image.Image:
    image = Image.open(file, formats=_formats())
    image.load()
    return image


def _without_metadata(file: BinaryIO) -> io.BytesIO:
    """The chunks of a PNG that its pixels depend on.

    Raises:
        ValueError: one of them is damaged, or the file is cut off.
    """
    file.seek(len(PNG_START))
    kept, kind = [PNG_START], b""
    while kind != b"IEND":
        head = file.read(8)
        length, kind = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"")
        needed = kind in PIXEL_CHUNKS
        if not (needed or (kind.isalpha() and kind[:1].islower())):
            raise ValueError(f"broken PNG file (chunk {kind!r})" if kind else "image file is truncated")
        if kind not in PIXEL_CHUNKS | {b"eXIf"}:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        body = file.read(length + 4)
        if len(body) < length + 4:
            raise ValueError("image file is truncated")
        whole = zlib.crc32(kind + body[:-4]) == int.from_bytes(body[-4:], "big")
        if needed and not whole:
            raise ValueError(f"broken PNG file (checksum of {kind.decode()})")
        kept += [head, body] if whole else []
    return io.BytesIO(b"".join(kept))


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

    data = torch.frombuffer(bytearray(_without_metadata(file).getbuffer()), dtype=torch.uint8)
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
    return PNG_START + b"".join(parts)


def square_pngs(root: str, names: list[str], size: int) -> list[bytes | str]:
    """For each image the PNG of its central square of size × size pixels, or the reason why there is none."""
    results = []
    for name in names:
        try:
            results.append(encode_png(np.asarray(center_crop(read_image(os.path.join(root, name)), size))))
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:  # Pillow raises many kinds on damaged files; all are reported
            results.append(failure(error))
    return results


def start_worker() -> None:
    """Set-up of a worker process: leaves interruptions to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
