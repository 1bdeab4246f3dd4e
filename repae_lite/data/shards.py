"""WebDataset shards: images and their classes in tar files, each read where it lies, in any order.

The packages `webdataset` and `datasets` stream shards through a shuffle buffer that no checkpoint holds, so
that a resumed run would see other images. Here every tar is looked through once, and from then on an image is
its place: order, shares of processes and resuming are those of any other data. `open_dataset` takes shards.
"""

import glob
import json
import logging
import posixpath
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from huggingface_hub import constants, snapshot_download

from repae_lite.data.image_files import SUFFIXES
from repae_lite.data.image_lists import parse_labels, shards_in
from repae_lite.data.index import Names, join, kept_index
from repae_lite.utils.downloads import fetching

HUB = re.compile(r"hf:/+datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+\.tar)")  # Path makes one slash of two
logger = logging.getLogger(__name__)


def find_shards(source: str | Path) -> list[Path]:
    """The shards that are meant by a tar, a range as in `train-{000..099}.tar`, or a folder of tars; none for
    a folder of something else. Those of `hf://datasets/OWNER/NAME[@REVISION]/…` are brought into the Hub's
    cache first, all of them.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: a folder with shards of several kinds; an address on the Hub that is none; an empty range.
        ConnectionError, OSError: see `fetching`.
    """
    path = Path(source)
    if hub := HUB.fullmatch(str(source)):
        name, revision, files = hub.groups()
        wanted = [glob.escape(file) for file in _expand(files)]
        where = {"repo_type": "dataset", "revision": revision, "endpoint": constants.ENDPOINT}
        with fetching(name, revision):
            path = Path(snapshot_download(name, allow_patterns=wanted, **where), files)
    elif str(source).startswith("hf:"):
        raise ValueError(f"{source} names no shards: give hf://datasets/OWNER/NAME/train-{{000..099}}.tar")
    if path.is_dir():
        return shards_in(path)
    shards = []
    for shard in map(Path, _expand(str(path))):
        if not shard.is_file():
            raise FileNotFoundError(f"the shard {shard} does not exist: check its path, or the range")
        shards.append(shard)
    return shards


def _expand(names: str) -> Iterator[str]:
    """Each name of `a-{08..11}.tar`, with as many digits as the range begins with."""
    if not (found := re.search(r"\{(\d+)\.\.(\d+)\}", names)):
        yield names
        return
    if int(found[1]) > int(found[2]):
        raise ValueError(f"the range {found[0]} in {names} is empty: put its smaller number first")
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from _expand(f"{names[: found.start()]}{number:0{len(found[1])}}{names[found.end() :]}")


def index_shards(shards: list[Path], root: Path) -> tuple[Names, np.ndarray]:
    """Where the images of shards lie; kept in HF_HOME/assets until one of the files changes.

    Returns:
        Their names, SHARD/MEMBER below root, and int64 (N, 4): number of the shard, offset and length in
        bytes, and the class, which is -1 for all or for none.

    Raises:
        ValueError: no images; a shard that is damaged or compressed; a class that is none, that has no image,
            or that only some images have.
        OSError: a shard cannot be read.
    """

    def look() -> dict[str, np.ndarray]:
        logger.info(f"looking through {len(shards):,} shards, {shards[0]} first: once, unless they change")
        return _look_through(shards, root)

    index = kept_index(f"shards 2 {root}", shards, look)
    return Names(index["names"]), index["places"]


def _look_through(shards: list[Path], root: Path) -> dict[str, np.ndarray]:
    names, places = [], []
    for number, shard in enumerate(shards):
        images = _images(shard)
        names += [f"{shard.relative_to(root)}/{name}" for name in images]
        places.append(np.array([(number, *place) for place in images.values()], np.int64).reshape(-1, 4))
    if not len(table := np.concatenate(places)):
        raise ValueError(f"{shards[0]} holds no images: unpack it with tar -xf into a folder, and give that")
    if 0 < (bare := table[:, 3] < 0).sum() < len(table):
        raise ValueError(
            f"{bare.sum():,} images in the shards of {root} have no class and the others have, "
            f'{names[bare.argmax()]} first: add its .cls, or a "label" in its .json'
        )
    return {"names": join(names), "places": table}


def _images(shard: Path) -> dict[str, tuple[int, int, int]]:
    """Offset, length and class, or -1, of each image in a tar, by its name there."""
    samples: dict[tuple, dict] = defaultdict(dict)
    for name, *member in _members(shard):
        folder, base = posixpath.split(name)
        key, _, kind = base.partition(".")  # WebDataset's rule: the members of a sample differ after the dot
        kind = "image" if f".{kind}".lower() in SUFFIXES else kind.lower()
        if key and samples[folder, key].setdefault(kind, (name, *member)) != (name, *member):
            raise ValueError(f"{name} in {shard} is the second {kind} of its sample: write the shard again")
    if bare := [found["cls"][0] for found in samples.values() if "cls" in found and "image" not in found]:
        raise ValueError(f"{bare[0]} in {shard} has no image beside it: write the shard again")
    samples = {found["image"][0]: found for found in samples.values() if "image" in found}
    labels = [(name, _class(found)) for name, found in samples.items()]
    labels = json.dumps({"labels": [(name, label) for name, label in labels if label is not None]})
    classes = dict(parse_labels(labels, shard))
    return {name: (*found["image"][1:3], classes.get(name, -1)) for name, found in samples.items()}


def _class(sample: dict) -> object:
    """What .cls says, or "label" in .json; None if neither does."""
    text = sample.get("cls", sample.get("json", (b"{}",)))[-1]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text.decode(errors="replace")  # which is no class
    return found.get("label") if isinstance(found, dict) else found


def _members(shard: Path) -> list[tuple[str, int, int, bytes]]:
    """Name, offset, length, and the content if it may be a class, of each file in a tar."""
    members = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for one in filter(tarfile.TarInfo.isfile, tar):
                label = one.name.lower().endswith((".cls", ".json"))
                content = tar.extractfile(one).read() if label else b""
                members.append((one.name, one.offset_data, one.size, content))
            tar.fileobj.seek(tar.offset)  # tarfile takes damage for the end, which has at least 512 zeros
            if len(end := tar.fileobj.read(1 << 20)) < 512 or any(end):
                raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset:,}")
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"{shard} is not a whole, uncompressed tar ({error}): write it again") from None
    return members
