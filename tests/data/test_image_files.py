"""Image files: every kind is read as it looks, whatever its metadata are, and the crop is ADM's."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from repae_lite.data.image_files import (
    center_crop,
    encode_png,
    failure,
    read_image,
    square_pngs,
)


def noise(height, width, channels=3, seed=0, dtype=np.uint8):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header, rows=b"", extra=b""):
    """A PNG from its header (width, height, bits, colour type) and filtered rows."""
    ihdr = struct.pack(">IIBBBBB", *header, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", ihdr)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def png16(values, extra=b""):
    """A PNG of 16 bits from values (H, W, C) uint16."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png((width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels]), rows, extra)


def rounded(values, largest=65535):
    return np.round(values * 255.0 / largest).astype(np.uint8)


def over_white(pixels, alpha):
    alpha = alpha[..., None] / 255.0
    return pixels * alpha + 255 * (1 - alpha)


# ---------------------------------------------------------------- the crop


def resampled(pixels, sizes, kernel, support):
    """Separable resampling with a kernel stretched over what one output pixel covers: columns, then rows."""
    for axis, size in ((1, sizes[0]), (0, sizes[1])):
        old = pixels.shape[axis]
        ratio = old / size
        stretch = max(ratio, 1.0)
        centre = (np.arange(size)[:, None] + 0.5) * ratio
        distance = (np.arange(old)[None] + 0.5 - centre) / stretch
        inside = np.abs(distance) < support
        weights = np.where(inside, kernel(distance), 0)
        weights /= weights.sum(axis=1, keepdims=True)
        pixels = np.floor(
            np.moveaxis(np.tensordot(weights, pixels.astype(float), (1, axis)), 0, axis) + 0.5
        ).clip(0, 255)
    return pixels


def box(x):
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def bicubic(x, a=-0.5):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, far)


def adm_crop(pixels, size):
    """The crop, recomputed without Pillow."""
    height, width = pixels.shape[:2]
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
        pixels = resampled(pixels, (width, height), box, 0.5 + 1e-9)
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    pixels = resampled(pixels, (width, height), bicubic, 2)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "size", [(90, 60), (60, 90), (97, 64), (128, 200), (129, 301), (16, 33), (1, 2), (32, 32), (31, 31)]
)
def test_crop_equals_an_independent_recomputation(size):
    pixels = noise(size[1], size[0], seed=size[0])
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 32)).astype(float)
    assert cropped.shape == (32, 32, 3)
    assert np.abs(cropped - adm_crop(pixels, 32)).max() <= 1  # Pillow computes in fixed point
    assert np.abs(cropped - adm_crop(pixels, 32)).mean() < 0.25


def test_square_images_of_the_right_size_stay_as_they_are():
    pixels = noise(32, 32)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 32)), pixels)


def test_long_and_thin_images_do_not_fill_the_memory():
    with pytest.raises(ValueError, match="too long and thin to be scaled to 256 pixels: 1 × 3000"):
        center_crop(Image.new("RGB", (1, 3000)), 256)


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (300, 300), (5, 9)])
def test_png_is_uncompressed_and_exact(shape):
    pixels = noise(*shape)
    data = encode_png(pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert len(data) > pixels.size and len(data) == len(encode_png(np.zeros_like(pixels)))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits_is_scaled_and_rounded(tmp_path, channels):
    values = noise(7, 9, 4, dtype=np.uint16)[..., :channels]
    values[0, :4] = np.array([0, 65535, 255, 40000])[:, None]
    (tmp_path / "a.png").write_bytes(png16(values))
    eight = rounded(values)
    expected = eight[..., :3] if channels > 2 else eight[..., :1].repeat(3, 2)
    if channels in (2, 4):
        expected = over_white(expected, eight[..., -1])
    found = np.asarray(read_image(tmp_path / "a.png")).astype(float)
    assert np.abs(found - expected).max() <= (0 if channels in (1, 3) else 1)
    assert channels > 1 or (found[0, 0, 0], found[0, 1, 0], found[0, 2, 0]) == (0, 255, 1)


def test_one_transparent_colour_in_16_bits(tmp_path):
    values = noise(3, 4, 3, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(values, chunk(b"tRNS", values[1, 2].astype(">u2").tobytes())))
    expected = rounded(values)
    expected[1, 2] = 255
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("name", ["a.tif", "a.pgm"])
def test_other_grey_files_of_16_bits(tmp_path, name):
    values = noise(6, 5, 1, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(np.asarray(read_image(tmp_path / name)), rounded(values)[..., None].repeat(3, 2))


@pytest.mark.parametrize("bits, data, expected", [
    (16, struct.pack(">HH", 65535, 257), (255, 1)), (12, bytes([0xFF, 0xF8, 0x00]), (255, 128)),
])  # fmt: skip
def test_grey_tiff_files_of_other_orders_and_depths(tmp_path, bits, data, expected):
    order, mark = (">", b"MM\0*") if bits == 16 else ("<", b"II*\0")
    tags = [
        (256, 2),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, len(data)),
    ]
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    start = 8 + len(data) + len(data) % 2
    body = (mark + struct.pack(order + "I", start) + data).ljust(start, b"\0")
    (tmp_path / "a.tif").write_bytes(body + struct.pack(order + "H", len(tags)) + entries + bytes(4))
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == list(expected)


@pytest.mark.parametrize("kind", ["RGBA.png", "LA.png", "P.png", "RGB.png", "P.gif", "RGBA.webp", "RGBA.tif"])
def test_transparency_is_laid_over_white(tmp_path, kind):
    mode, _, suffix = kind.partition(".")
    pixels, alpha = (
        noise(8, 8),
        np.array([0, 255, 0, 255] if mode in ("P", "RGB") else [0, 255, 100, 200], np.uint8).repeat(16),
    )
    alpha = alpha.reshape(8, 8)
    path, options = tmp_path / f"a.{suffix}", {}
    if mode == "RGBA":
        image = Image.fromarray(np.dstack([pixels, alpha]))
        options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    elif mode == "LA":
        pixels = pixels[..., :1].repeat(3, 2)
        image = Image.fromarray(np.dstack([pixels[..., 0], alpha]))
    elif mode == "RGB":
        pixels[alpha == 0] = (1, 2, 3)
        image, options = Image.fromarray(pixels), {"transparency": (1, 2, 3)}
    else:
        indices = noise(8, 8, 1) % 50 + 1
        indices[alpha == 0] = 0
        image = Image.fromarray(indices).convert("P")
        palette = noise(256, 1, 3, seed=3)
        image.putpalette(palette.tobytes())
        pixels, options = palette[indices, 0], {"transparency": 0}
    image.save(path, **options)
    assert np.abs(np.asarray(read_image(path)) - over_white(pixels, alpha)).max() <= 1


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    pixels = noise(8, 8)
    Image.fromarray(np.dstack([pixels, np.full((8, 8), 255, np.uint8)])).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), pixels)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_other_colours_become_rgb(tmp_path, mode):
    image = Image.fromarray(noise(2, 2)).resize((16, 16)).convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path, quality=100) if path.suffix == ".jpg" else image.save(path)
    found = read_image(path)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - np.asarray(image.convert("RGB"))).mean() < 4


def test_inverted_cmyk_of_adobe_is_not_a_negative(tmp_path):
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(
        tmp_path / "a.jpg"
    )  # no ink: white; Pillow writes it as Adobe does
    assert np.asarray(read_image(tmp_path / "a.jpg")).min() > 250


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, suffix, orientation):
    image = Image.fromarray(noise(12, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(tmp_path / f"a.{suffix}") as reference:
        expected = np.asarray(ImageOps.exif_transpose(reference))
    assert expected.shape == ((20, 12, 3) if orientation > 4 else (12, 20, 3))
    assert np.array_equal(np.asarray(read_image(tmp_path / f"a.{suffix}")), expected)


def test_damaged_exif_data_do_not_cost_the_image(tmp_path):
    Image.fromarray(noise(8, 8)).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40
    )
    assert read_image(tmp_path / "a.jpg").size == (8, 8)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(read_image(tmp_path / f"a.{suffix}")).astype(int) - [255, 0, 0]).max() <= 3


def bad_files(folder):
    """Files that cannot be read, by the reason that is expected."""
    jpeg = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(jpeg, "JPEG")
    grey = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.float32)).save(grey, "TIFF")
    contents = {
        "not an image in a known format": b"plain text",
        "truncated": jpeg.getvalue()[:1000],
        "exceeds limit of 178956970": png((20000, 20000, 8, 2)),
        "32-bit samples": grey.getvalue(),
        "broken PNG": png((4, 4, 8, 2))[:40] + b"garbage",
    }
    for number, (reason, data) in enumerate(contents.items()):
        (folder / f"bad{number}.png").write_bytes(data)
        yield f"bad{number}.png", reason
    (folder / "empty.png").touch()
    yield "empty.png", "not an image in a known format"
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    yield "pipe.png", "no such file"
    yield "absent.png", "no such file"


def test_every_bad_file_has_a_reason(tmp_path):
    bad = dict(bad_files(tmp_path))
    Image.fromarray(noise(8, 8)).save(tmp_path / "good.png")
    results = dict(zip([*bad, "good.png"], square_pngs(str(tmp_path), [*bad, "good.png"], 4), strict=True))
    assert isinstance(results.pop("good.png"), bytes)
    for name, reason in bad.items():
        if reason != "broken PNG":  # in whatever words
            assert reason in results[name], f"{name}: {results[name]}"
        assert (
            isinstance(results[name], str)
            and str(tmp_path) not in results[name]
            and "0x" not in results[name]
        )


def test_failures_are_told_without_the_machine():
    assert failure(PermissionError(13, "Permission denied", "/some/where")) == "Permission denied"
    assert failure(MemoryError()) == "MemoryError"


def test_nothing_here_needs_torch():
    code = (
        "import sys, repae_lite.data.image_files, repae_lite.commands.main; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- metadata


def whole_png(mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(noise(9, 7)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


BIG = zlib.compress(b"a" * (2 << 20))
METADATA = {
    "a large profile": chunk(b"iCCP", b"icc\0\0" + BIG),
    "a large text": chunk(b"zTXt", b"Comment\0\0" + BIG),
    "a large international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + BIG),
    "many texts": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (1 << 20))) * 80,
    "a text without an end": chunk(b"tEXt", b"x"),
    "a broken profile": chunk(b"iCCP", b"icc\0\0nonsense"),
    "a wrong checksum": chunk(b"gAMA", struct.pack(">I", 45455))[:-4] + b"oops",
    "a chunk of nobody's": chunk(b"quUx", b"?" * 100),
    "animation without frames": chunk(b"acTL", b"\0" * 3),
    "an odd size in print": chunk(b"pHYs", b"\0"),
}


@pytest.mark.parametrize("mode", ["RGB", "LA", "P"])
@pytest.mark.parametrize("metadata", METADATA)
def test_metadata_do_not_cost_the_pixels(tmp_path, metadata, mode):
    data = whole_png(mode)
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(data[:33] + METADATA[metadata] + data[33:])
    (tmp_path / "c.png").write_bytes(data[:-12] + METADATA[metadata] + data[-12:])  # after the pixels
    plain, before, after = (np.asarray(read_image(tmp_path / f"{name}.png")) for name in "abc")
    assert np.array_equal(plain, before) and np.array_equal(plain, after)


def test_metadata_do_not_cost_pixels_of_16_bits(tmp_path):
    values = noise(7, 9, 3, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png16(values, METADATA["a large text"] + METADATA["a wrong checksum"]))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), rounded(values))


@pytest.mark.parametrize("metadata", ["a large profile", "a wrong checksum"])
def test_damaged_pixels_are_refused_beside_large_metadata(tmp_path, metadata):
    data = whole_png()
    data = data[:33] + METADATA[metadata] + data[33:]
    pixels = data.index(b"IDAT")
    damaged = bytearray(data)
    damaged[pixels + 60] ^= 1
    for bad in (
        data[: pixels + 60],
        data[:-14],
        data[:40],
        bytes(damaged),
        data[:33] + b"\0" * 8 + data[33:],
    ):
        (tmp_path / "a.png").write_bytes(bad)
        assert isinstance(square_pngs(str(tmp_path), ["a.png"], 4)[0], str)


@pytest.mark.parametrize("suffix", ["jpg", "gif", "bmp", "tif", "webp"])
def test_files_cut_off_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(40, 40)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert isinstance(square_pngs(str(tmp_path), [path.name], 4)[0], str)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", ""]), st.data())
def test_any_bytes_are_an_image_or_a_reason(tmp_path_factory, kind, data):
    folder = tmp_path_factory.getbasetemp()
    if kind:
        buffer = io.BytesIO()
        Image.fromarray(noise(6, 5)).save(buffer, kind)
        content = bytearray(buffer.getvalue())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(
            content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
        )
    else:
        content = data.draw(st.binary(max_size=60))
    (folder / "any.png").write_bytes(content)
    (result,) = square_pngs(str(folder), ["any.png"], 4)
    if isinstance(result, bytes):
        assert np.asarray(Image.open(io.BytesIO(result))).shape == (4, 4, 3)
    else:
        assert result and str(folder) not in result and "0x" not in result
