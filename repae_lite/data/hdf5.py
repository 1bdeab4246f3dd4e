"""The official HDF5 layout: names, bytes and labels.

`images.h5` holds PNG bytes as "00000/img00000000.png" … and the labels as "dataset.json"; `images_h5.json`
beside it lists the names.
"""

import errno
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t
from PIL import Image

from repae_lite.data.image_files import encode_png
from repae_lite.utils.files import atomic_path, write_text

UNPACKED = 1 << 26  # bytes that a small file may unpack to
CANNOT_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
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


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Tells what HDF5 says of a file that it cannot read: in use, forbidden, out of reach, or damaged.

    Raises:
        FileNotFoundError, PermissionError, OSError: the file could not be read; what it holds is not known.
        ValueError: it is damaged, or no HDF5 file.
    """
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise _told(error, path) from None


def _told(error: Exception, path: str | Path) -> Exception:
    words, number = " ".join(str(error).split()), getattr(error, "errno", None)
    if "unable to lock file" in words:
        return OSError(
            f"{path} is open in another program ({words}): wait until that ends, or, if there is "
            "none, as on disks that lock wrongly, set HDF5_USE_FILE_LOCKING=FALSE"
        )
    if "already open for write" in words:
        return OSError(
            f"{path} is being written by another program, or by one that was killed ({words}): wait until it "
            "ends, or write the file again"
        )
    if number == errno.ENOENT:
        return FileNotFoundError(f"{path} does not exist any more: check whether its disk is there")
    if number in (errno.EACCES, errno.EPERM):
        return PermissionError(f"{path} may not be read ({os.strerror(number)}): change its permissions")
    if number not in (None, errno.EINVAL, errno.EOVERFLOW):  # HDF5 seeks to where damaged bytes send it
        return OSError(f"{path} cannot be read now ({os.strerror(number)}): it may be whole all the same")
    return ValueError(f"{path} is not a whole HDF5 file ({words}): write it again")


def open_h5(path: str | Path) -> h5py.File:
    """Opens a file to be read; on disks that cannot lock, without a lock.

    Raises:
        OSError, ValueError: see `reading`.
    """
    with reading(path):
        try:
            return h5py.File(path, "r")
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                raise
            return h5py.File(path, "r", locking=False)


def read_bytes(file: h5py.File, name: str) -> bytes:
    """The bytes under a name, however they are stored; trailing zeros, which HDF5 drops, are put back.

    Raises:
        ValueError: that is a group, missing, or something else than bytes; the file is damaged.
        OSError: see `reading`.
    """
    with reading(file.filename):
        found = file.get(name)
        if isinstance(found, h5py.Dataset) and found.shape is not None:
            # Damaged bytes may ask for more memory than there is; chunks may be compressed, or never written.
            scalar, most = found.shape == (), os.path.getsize(file.filename)
            if found.nbytes <= (most if found.chunks is None else 10 * most + UNPACKED):
                kind, value = found.dtype.kind, found[()]
                if kind in "SV" and scalar:
                    return bytes(value).ljust(found.dtype.itemsize, b"\0")
                if kind == "O" and scalar and isinstance(value, bytes):
                    return value
                if found.dtype in (np.uint8, np.int8) or found.dtype == "S1":
                    return value.tobytes()
    kind = "missing"
    if isinstance(found, h5py.Dataset):
        kind = "empty" if found.shape is None else f"{found.dtype} of shape {found.shape}"
    elif found is not None:
        kind = "an HDF5 group" if isinstance(found, h5py.Group) else "an HDF5 type"
    raise ValueError(f"{name} in {file.filename} is {kind} instead of bytes: write the file again")


def item_names(file: h5py.File) -> list[str]:
    """Sorted names of all items, which lie in groups; the labels and their like lie beside the groups.

    Raises:
        OSError, ValueError: see `reading`.
    """
    with reading(file.filename):
        groups = [name for name in file if file.get(name, getclass=True) is h5py.Group]
        return sorted(f"{group}/{name}" for group in groups for name in file[group])


def labels_json(entries: list[tuple[str, int | None]]) -> bytes:
    """The (name, label) pairs as the official "dataset.json"; its labels are null when no item has one."""
    labelled = any(label is not None for _, label in entries)
    return json.dumps({"labels": entries if labelled else None}).encode()


def write_names(path: str | Path, names: list[str]) -> None:
    """Writes the list of names that belongs beside an HDF5 file: `….h5` has `…_h5.json`."""
    path = Path(path)
    write_text(path.with_name(path.stem + "_h5.json"), json.dumps(names))


def missing_names(file: h5py.File, names: list[str]) -> list[str]:
    """Which names the file lacks; listing whole groups is forty times faster than looking up each name.

    Raises:
        OSError, ValueError: see `reading`.
    """
    groups = defaultdict(list)
    for name in names:
        groups[name.rpartition("/")[0]].append(name)
    missing = []
    with reading(file.filename):
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
    with atomic_path(path) as partial, h5py.File(partial, "w", libver=LIBVER, locking=False) as file:
        for name, image in zip(names, images, strict=True):
            add_bytes(file, name, (_smallest_png if compress else encode_png)(image.transpose(1, 2, 0)))
        entries = [(name, int(label)) for name, label in zip(names, labels, strict=True)]
        add_bytes(file, "dataset.json", labels_json(entries))
    write_names(path, names)


def _smallest_png(pixels: np.ndarray) -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG", optimize=True, compress_level=9)
    return png.getvalue()
