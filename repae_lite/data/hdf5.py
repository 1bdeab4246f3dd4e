"""The official HDF5 layout: names, bytes and labels.

`images.h5` holds PNG bytes as "00000/img00000000.png" … and the labels as "dataset.json"; `images_h5.json`
beside it lists the names.
"""

import io
import json
from collections import defaultdict
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t
from PIL import Image

from repae_lite.data.image_files import encode_png
from repae_lite.utils.files import atomic_path, write_text

# HDF5 since 1.10 can read it: without a bound the newest format of the library at hand would be written
LIBVER = "v110"


def image_name(index: int) -> str:
    """The official name of image number `index`: 1,000 to a folder."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def add_bytes(file: h5py.File, name: str, data: bytes) -> None:
    """Stores bytes as the official layout does, as one fixed-length string; faster than `create_dataset`."""
    kind = h5t.C_S1.copy()
    kind.set_size(len(data))
    kind.set_strpad(h5t.STR_NULLPAD)
    creation, linking, scalar = (
        h5p.create(h5p.DATASET_CREATE),
        h5p.create(h5p.LINK_CREATE),
        h5s.create(h5s.SCALAR),
    )
    creation.set_obj_track_times(False)  # the same content gives the same bytes
    linking.set_create_intermediate_group(True)
    h5d.create(file.id, name.encode(), kind, scalar, creation, linking).write(
        scalar, scalar, np.array(data), kind
    )


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


def missing_names(file: h5py.File, names: list[str]) -> list[str]:
    """Which names the file lacks; listing whole groups is forty times faster than looking up each name."""
    groups = defaultdict(list)
    for name in names:
        groups[name.rpartition("/")[0]].append(name)
    missing = []
    for group, members in groups.items():
        held = file.get(group or "/")
        present = set(held) if isinstance(held, h5py.Group) else ()
        missing += [name for name in members if name.rpartition("/")[2] not in present]
    return missing


def write_images_h5(
    path: str | Path, images: np.ndarray, labels: np.ndarray, *, compress: bool = True
) -> None:
    """Writes images and labels in the official layout, atomically, with the list of names beside.

    Args:
        path: an `….h5`; the names go to `…_h5.json`.
        images: pixels (N, 3, H, W) uint8.
        labels: class numbers (N,).
        compress: PNG compression; the official preprocessing stores without.

    Raises:
        ValueError: other shapes or dtypes.
    """
    path = Path(path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(labels) != len(images):
        raise ValueError(
            f"images {images.dtype} {images.shape} with {len(labels)} labels: give uint8 (N, 3, H, W) and "
            "one label each"
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
