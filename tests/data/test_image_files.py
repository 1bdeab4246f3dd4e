"""Image files: every kind is read as it looks, the crop is ADM's, and labels are numbered or refused, never
guessed.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from repae_lite.data.image_files import (
    center_crop,
    encode_png,
    failure,
    read_image,
    square_pngs,
)
from repae_lite.data.image_lists import list_images, parse_labels


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


# ---------------------------------------------------------------- folders and labels


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_class_folders_are_numbered_in_sorted_order(tmp_path):
    touch(
        tmp_path,
        "n02/b.JPEG",
        "n02/a.png",
        "n01/deep/er/c.webp",
        "n10/d.tiff",
        "n01/x.jpg",
        "n02/notes.txt",
        "README",
    )
    touch(tmp_path, "n01/.DS_Store", ".cache/x.png", "__MACOSX/n02/._b.jpg")
    found = list_images(tmp_path)
    assert found.names == ["n01/deep/er/c.webp", "n01/x.jpg", "n02/a.png", "n02/b.JPEG", "n10/d.tiff"]
    assert (
        found.labels == [0, 0, 1, 1, 2]
        and found.class_names == ["n01", "n02", "n10"]
        and found.num_classes == 3
    )
    assert found.ignored == {".txt": 1, "without suffix": 1} and found.root == tmp_path


def test_the_training_split_of_a_data_set_is_entered(tmp_path):
    touch(tmp_path, "train/n01/a.png", "train/n02/b.png", "val/n01/c.png", "LOC_synset_mapping.txt")
    assert list_images(tmp_path).root == tmp_path / "train"
    assert list_images(tmp_path).names == list_images(tmp_path / "train").names == ["n01/a.png", "n02/b.png"]


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, "train/a.png", "bus/b.png")
    assert list_images(tmp_path).class_names == ["bus", "train"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "images/b/1.png", "elsewhere/2.png")
    (tmp_path / "images" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "b" / "up").symlink_to(tmp_path / "images")
    assert list_images(tmp_path / "images").names == ["a/2.png", "b/1.png"]


def write_labels(folder, labels):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_a_dataset_json_decides(tmp_path):
    touch(tmp_path, "x/b.png", "x/a.png", "c.png")
    write_labels(tmp_path, [["x\\b.png", 7], ["x/a.png", 0], ["./c.png", 3], ["gone.png", 1]])
    found = list_images(tmp_path)
    assert found.names == ["c.png", "gone.png", "x/a.png", "x/b.png"] and found.labels == [3, 1, 0, 7]
    assert found.missing == ["gone.png"] and found.num_classes == 8 and found.class_names == []


def test_a_dataset_json_without_labels_leaves_it_to_the_folders(tmp_path):
    touch(tmp_path, "x/b.png", "y/a.png")
    write_labels(tmp_path, None)
    assert list_images(tmp_path).class_names == ["x", "y"]


@pytest.mark.parametrize("names, message", [
    ([], "holds no images: looked in all"),
    (["a.txt", "b/c.md"], "holds no images"),
    (["a.png", "b.png"], "2 images .* lie in one folder, so they have no classes"),  # D8
    (["only/a.png", "only/b.png"], "2 images .* lie in one folder, so they have no classes"),
    (["a.png", "x/b.png", "y/c.png"], r"1 images lie beside the class folders .*, a\.png first"),
    (["x/b.png", "y/c.png", "z/notes.txt"], r"the class folder z .* holds no images"),
])  # fmt: skip
def test_folders_without_clear_classes_are_refused(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path)


def test_missing_folders_and_files_are_told_apart(tmp_path):
    touch(tmp_path, "file")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a file"):
        list_images(tmp_path / "file")


def test_images_without_labels_are_refused(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    write_labels(tmp_path, [["a.png", 0]])
    with pytest.raises(ValueError, match=r"dataset\.json has no label for 2 images, b\.png first"):
        list_images(tmp_path)


@pytest.mark.parametrize("text, message", [
    ("not json", "cannot be read"),
    ("[]", "cannot be read"),
    ('{"labels": [["a.png"]]}', "cannot be read"),
    ('{"labels": 3}', "cannot be read"),
    ('{"labels": [["a.png", -1]]}', r"'a\.png' the label -1"),
    ('{"labels": [["a.png", 0.5]]}', r"'a\.png' the label 0\.5"),
    ('{"labels": [["a.png", true]]}', "the label True"),
    ('{"labels": [["a.png", [0, 1]]]}', "whole numbers from 0 up"),
    ('{"labels": [[5, 1]]}', "gives 5 the label 1"),
    ('{"labels": [["a.png", 0], ["a.png", 1]]}', "1 names twice"),
])  # fmt: skip
def test_labels_that_cannot_be_meant_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_labels(text, "dataset.json")


def test_labels_may_be_a_mapping():
    assert parse_labels(b'{"labels": {"a.png": 1}}', "it") == [("a.png", 1)]
