"""Data sets that anyone can have by name, as class folders: `repae download data:NAME`.

A folder of images is finished by a rename, so one that is there is whole. Class folders sort in the order of
their labels, which is how `repae preprocess` numbers them.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from repae_lite.utils.files import data_small_dir, remove
from repae_lite.utils.locks import locked, writing

PREFIX = "data:"  # of their names on the command line


@dataclass(frozen=True)
class DataSet:
    """A data set that can be had by name.

    Attributes:
        about: what it is and how large.
        licence: under which terms.
        images: of each split.
        url, md5: of its archive; None for what ships with the project.
    """

    about: str
    licence: str
    images: dict[str, int]
    url: str | None = None
    md5: str | None = None


DATA_SETS = {
    "embedded": DataSet(
        about="the drawn icons of data_small, 32 × 32",
        licence="CC0 1.0, see data_small/DATA.md",
        images={"train": 6000, "val": 2000},
    ),
    "imagenette": DataSet(
        about="ten classes of ImageNet, shorter side 160, 99 MB to download",
        licence="ImageNet's terms of access (https://image-net.org/download): non-commercial research "
        "and education; the Apache License of its repository is of the code there alone",
        images={"train": 9469, "val": 3925},
        url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
        md5="e793b78cc4c9e9a4ccc0c1155377a412",
    ),
}


def check_data_set(name: str) -> None:
    """Refuses the name of a data set that is not known.

    Raises:
        ValueError: it is not one of `DATA_SETS`.
    """
    if name not in DATA_SETS:
        known = ", ".join(f"{PREFIX}{each}" for each in DATA_SETS)
        raise ValueError(f"unknown data set {PREFIX}{name}: choose among {known}")


def fetch_data_set(name: str, output: str | Path) -> Path:
    """Writes a data set as OUTPUT/NAME/{train,val}/CLASS/IMAGE, once.

    Args:
        name: one of `DATA_SETS`.
        output: the folder to write to.

    Returns:
        OUTPUT/NAME.

    Raises:
        ConnectionError: its archive cannot be fetched.
        ValueError: an archive with another checksum; a folder of that name with another number of images;
            another run is writing it.
        OSError: it cannot be written.
    """
    check_data_set(name)
    chosen, output = DATA_SETS[name], Path(output)
    folder = output / name
    if folder.exists():
        _check_whole(folder, chosen)
        return folder
    with locked(output / f".{name}.partial") as partial, writing(output):
        written = partial / name
        remove(written)  # of a run that was killed
        images = _embedded() if chosen.url is None else _unpacked(_archive(chosen, partial), name)
        for path, content in images:
            (written / path).parent.mkdir(parents=True, exist_ok=True)
            (written / path).write_bytes(content)
        _check_whole(written, chosen)
        os.rename(written, folder)
        remove(partial)
    return folder


def _check_whole(folder: Path, chosen: DataSet) -> None:
    for split, expected in chosen.images.items():
        found = sum(path.is_file() for path in (folder / split).glob("*/[!.]*"))
        if found != expected:
            raise ValueError(
                f"{folder / split} holds {found:,} images instead of {expected:,}: remove {folder} if "
                "nothing in it is yours, and it is written again, or choose another output folder"
            )


def _embedded() -> Iterator[tuple[str, bytes]]:
    """Paths and PNG bytes of the embedded images."""
    from repae_lite.data.hdf5 import open_h5, read_bytes
    from repae_lite.data.image_lists import LABELS, parse_labels
    from repae_lite.utils.pixels import CLASS_NAMES

    for split, source in (("train", "train"), ("val", "eval")):
        path = data_small_dir() / source / "images.h5"
        with open_h5(path) as file:
            for name, label in parse_labels(read_bytes(file, LABELS), f"{LABELS} in {path}"):
                yield f"{split}/{label}_{CLASS_NAMES[label]}/{Path(name).name}", read_bytes(file, name)


def _archive(chosen: DataSet, folder: Path) -> Path:
    """The archive of a data set, fetched if it is not there whole."""
    from torchvision.datasets.utils import check_integrity, download_url

    from repae_lite.utils.downloads import fetching

    path = folder / chosen.url.rsplit("/", 1)[1]
    with (
        fetching(chosen.url, hub=False, remedy=f"fetch it elsewhere and put it at {path}", folder=folder),
        suppress(RuntimeError),  # another checksum
    ):
        download_url(chosen.url, folder, md5=chosen.md5)
    if not check_integrity(path, chosen.md5):
        remove(path)
        raise ValueError(
            f"what came from {chosen.url} is not the file with the MD5 {chosen.md5}, or not all of it: give "
            "the same command again, or look whether your network answers in the server's place"
        )
    return path


def _unpacked(archive: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """Paths and bytes of the images in an archive; anything else in it, links too, is passed over."""
    image = re.compile(r"[\w-]+/((?:train|val)/\w+/[\w-]+\.JPEG)")
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isfile() and (found := image.fullmatch(member.name)):
                    yield found[1], tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is no whole archive of {name} ({error}): remove it") from None
