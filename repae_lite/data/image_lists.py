"""Which images a folder holds, and of which classes: what is taken, what is left out, and what is refused.

Folders are as people have them: with the hidden files of every system, splits, links, and the label files of
neighbouring tools. Nothing becomes a class in silence: `ImageList.summary` says what was taken and left.
"""

import json
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from repae_lite.data.image_files import SUFFIXES
from repae_lite.utils.files import SetTwice, once

LABELS = "dataset.json"
SYSTEM = frozenset(  # names of files and folders that systems make, in lower case; so are those with a dot
    "@eadir @recycle @recently-snapshot @sharebin @tmp #recycle #snapshot #synorecycle lost+found "
    "$recycle.bin recycler __macosx __pycache__ thumbs.db ehthumbs.db desktop.ini icon\r".split(" ")
) | {"system volume information", "network trash folder", "temporary items"}
TRAINING = frozenset(("train", "training"))
OTHER_SPLITS = frozenset(("val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev"))
_SIZE = re.compile(r"[-_ ]?\d+(x\d+)?(px)?$")  # or the year
IMAGENET = ("CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # where its archives put the splits
ARCHIVES = {
    ".zip": "unzip it",
    ".tar": "unpack it with tar -xf",
    ".gz": "unpack it with tar -xf",
    ".tgz": "unpack it with tar -xf",
    ".7z": "unpack it",
    ".rar": "unpack it",
    ".parquet": "write its images to files",
    ".arrow": "write its images to files",
    ".tfrecord": "write its images to files",
    ".mdb": "write its images to files",
}
NUMBERED = re.compile(r"\d{5}/img\d{8}\.\w+")  # EDM's and our own names: a thousand images to a folder
MOST_CLASSES = 100_000  # more than images and than this: a label is then an identifier, not a class


@dataclass(frozen=True)
class ImageList:
    """The images of a folder, sorted by path, and their classes.

    Attributes:
        root: the folder that the names start from.
        names: paths below root, with "/".
        labels: class number of each image; 0 for all when they have no classes.
        class_names: class folders in the order of their numbers; empty when the labels come from a
            dataset.json.
        missing: names that dataset.json lists and the folder lacks; they are among `names` too.
        ignored: number of other files by suffix.
        left_out: how many of what else was passed over: hidden and system files, splits, links.
        no_classes: why the images have no classes; empty when they have.
    """

    root: Path
    names: list[str]
    labels: list[int]
    class_names: list[str]
    missing: list[str]
    ignored: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    no_classes: str = ""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names) or max(self.labels) + 1

    def summary(self) -> list[str]:
        """What was taken and what was left, in sentences."""
        images = f"{self.root}: {len(self.names):,} image{'s' * (len(self.names) > 1)}"
        if self.no_classes:
            lines = [f"{images} without classes ({self.no_classes})"]
        elif self.class_names:
            first, last = self.class_names[0], self.class_names[-1]
            lines = [
                f"{images} in {self.num_classes:,} classes, {first} = 0 to {last} = {self.num_classes - 1}"
            ]
        else:
            lines = [f"{images} in {self.num_classes:,} classes, by {LABELS}"]
        if self.missing:
            lines.append(f"{len(self.missing):,} of them are not there, {self.missing[0]} first")
        if self.left_out:
            lines.append(f"left out: {_counted(self.left_out)}")
        if self.ignored:
            lines.append(f"other files: {_counted(self.ignored)}")
        if not self.no_classes and (empty := classes_without_images(self.labels, self.num_classes)):
            lines.append(empty)
        return lines


def _counted(counts: dict[str, int], most: int = 8) -> str:
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    parts = [f"{name} ({count:,})" if count > 1 else name for name, count in ranked[:most]]
    return ", ".join(parts) + (f" and {len(ranked) - most:,} more kinds" if len(ranked) > most else "")


def classes_without_images(labels: Sequence[int], num_classes: int) -> str:
    """A sentence about classes without images, as when labels start at 1; empty when there are none."""
    used = set(np.unique(labels).tolist())
    empty = num_classes - len(used)
    if not empty:
        return ""
    first = next(label for label in range(num_classes) if label not in used)
    return (
        f"{empty:,} of the {num_classes:,} classes have no images, class {first} first: labels start at 0, "
        "and each number up to the largest is a class"
    )


# ---------------------------------------------------------------- the list


def list_images(folder: str | Path) -> ImageList:
    """Finds the images below a folder and numbers their classes.

    Labels are those of a dataset.json in the folder, {"labels": [[path, class], …]}, or else the positions of
    the top-level folders in their sorted order (for ImageNet n01440764 is 0 and n15075141 is 999); an empty
    one keeps its number. Images in one folder, and those in the numbered folders of EDM and of our own
    layout, have no classes. A training split is entered, as are `images` of REPA's layout and the folders of
    ImageNet's archives. Hidden and system files are left out; links are followed, each folder once.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no images, images or splits beside class folders, a class folder that holds only other
            files, or a dataset.json that cannot be read or leaves images out.
    """
    root = Path(folder)
    refuse_archive(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"the image folder {root} {'is a file' if root.exists() else 'does not exist'}: check the path"
        )
    start, root = root, _enter(root)
    found = _Walk(root)
    if root != start:
        _pass_by(start, root, found.left_out)
    if not found.images:
        _refuse_no_images(root, found)
    listed = root / LABELS
    entries = parse_labels(_read(listed), listed) if listed.is_file() else []
    names, class_names, missing, no_classes = sorted(found.images), [], [], ""
    if entries:
        numbers, missing = _match(entries, names, listed)
        names = sorted(numbers)
        labels = [numbers[name] for name in names]
    else:
        labels, class_names, no_classes = _folder_labels(root, names, found)
    return ImageList(
        root, names, labels, class_names, missing, dict(found.ignored), dict(found.left_out), no_classes
    )


def refuse_archive(path: Path) -> None:
    """Refuses an archive where a folder or an HDF5 file is meant.

    Raises:
        ValueError: it is one by its name.
    """
    remedy = ARCHIVES.get(path.suffix.lower())
    if remedy and path.is_file():
        raise ValueError(f"{path} is an archive: {remedy} into a folder, and give that")


def shards_in(folder: Path) -> list[Path]:
    """The tars of a folder that holds neither images nor folders, sorted; see `repae_lite.data.shards`.

    Raises:
        ValueError: they are of several kinds, as "train" and "val".
    """
    entries = _entries(folder)
    if any(_is_image(entry.name) or entry.is_dir() for entry in entries):
        return []
    names = sorted(entry.name for entry in entries if entry.name.lower().endswith(".tar"))
    if len(kinds := {re.sub(r"\d+", "*", name) for name in names}) > 1:
        raise ValueError(
            f"{folder} holds shards of several kinds ({', '.join(sorted(kinds))}): name the ones that are "
            f"meant, as in {folder}/train-{{000..099}}.tar"
        )
    return [folder / name for name in names]


def _refuse_no_images(root: Path, found: "_Walk") -> None:
    archives = {suffix: count for suffix, count in found.ignored.items() if suffix in ARCHIVES}
    if archives:
        suffix, count = max(archives.items(), key=lambda entry: entry[1])
        raise ValueError(
            f"{root} holds no images, but {count:,} {suffix} files: unpack them, one folder per class"
        )
    also = f"; there are only {_counted(found.ignored)}" if found.ignored else ""
    also += f"; left out: {_counted(found.left_out)}" if found.left_out else ""
    raise ValueError(
        f"{root} holds no images: looked in all its folders for {', '.join(sorted(SUFFIXES))}{also}"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}): check its permissions and disk") from None


# ---------------------------------------------------------------- which files


def _hidden(name: str) -> bool:
    return name.startswith((".", "~$")) or name.endswith("~") or name.lower() in SYSTEM


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def _entries(path: str | Path) -> list[os.DirEntry]:
    """What is in a folder, but for hidden and system files."""
    return [entry for entry in _scan(path) if not _hidden(entry.name)]


def _scan(path: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(
            f"the folder {path} cannot be read ({error.strerror}): change its permissions, or remove it"
        ) from None


class _Walk:
    """All files below a folder. Links are followed after all real folders, and no folder is listed twice.

    Attributes:
        images: names of the images below the root, with "/".
        ignored: number of other files by suffix.
        left_out: what else was passed over.
        folders: number of files in each folder directly below the root.
    """

    def __init__(self, root: Path):
        self.images: list[str] = []
        self.ignored, self.left_out, self.folders = Counter(), Counter(), Counter()
        self._root, self._seen = str(root), set()
        above = os.path.realpath(root)
        self._above = {above}
        while (parent := os.path.dirname(above)) != above:
            self._above.add(above := parent)
        links = self._list("", os.path.realpath(root))
        while links:
            links = [link for name in sorted(links) for link in self._follow(name)]

    def _follow(self, name: str) -> list[str]:
        real = os.path.realpath(os.path.join(self._root, name))
        if real in self._seen or real in self._above:
            self.left_out[f"the link {name} to a folder that is listed already"] += 1
            return []
        if "/" not in name:
            self.folders[name] += 0
        return self._list(name, real)

    def _list(self, top: str, real_top: str) -> list[str]:
        """Takes the files of real folders from `top` on; returns the links to folders among them."""
        links, waiting = [], [(top, real_top)]
        while waiting:
            below, real = waiting.pop()
            if real in self._seen:
                continue
            self._seen.add(real)
            for entry in _scan(os.path.join(self._root, below)):
                name = f"{below}/{entry.name}" if below else entry.name
                folder = entry.is_dir(follow_symlinks=False)
                if _hidden(entry.name):
                    told = folder or entry.name.lower() in SYSTEM
                    self.left_out[entry.name if told else "hidden files"] += 1
                elif folder:
                    if not below:
                        self.folders[name] += 0
                    waiting.append((name, os.path.join(real, entry.name)))
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    links.append(name)
                elif entry.is_symlink() or entry.is_file():  # a broken link is told as an unreadable image
                    self._file(name)
                else:
                    self.left_out["pipes, sockets and devices"] += 1
        return links

    def _file(self, name: str) -> None:
        if "/" in name:
            self.folders[name.partition("/")[0]] += 1
        if _is_image(name):
            self.images.append(name)
        elif name != LABELS:
            self.ignored[posixpath.splitext(name)[1].lower() or "without suffix"] += 1


# ---------------------------------------------------------------- which folder


def _split(name: str) -> str:
    """A folder's name as that of a split: "train" of train2017 and Train_256x256."""
    return _SIZE.sub("", name.lower())


def _enter(root: Path, depth: int = 0) -> Path:
    """The folder that holds the classes: the root itself, its training split, or `images` of REPA's layout.

    Raises:
        ValueError: there are splits and it is not clear which one is meant.
    """
    if (root / LABELS).is_file():
        return root
    for below in IMAGENET:
        if any((root / below / name).is_dir() for name in TRAINING):
            return _enter(root / below)
    entries = _entries(root)
    folders = sorted(entry.name for entry in entries if entry.is_dir())
    if any(_is_image(entry.name) and not entry.is_dir() for entry in entries) or depth > 4:
        return root
    if "images" in folders and ((root / "images" / LABELS).is_file() or "vae-sd" in folders):
        return root / "images"
    training = [name for name in folders if _split(name) in TRAINING]
    splits = [name for name in folders if (_split(name) if training else name.lower()) in OTHER_SPLITS]
    rest = len(folders) - len(training) - len(splits)
    if not rest or any(_holds_classes(root / name) for name in training):
        if len(training) == 1:
            return root / training[0]
        if training or splits:
            names = ", ".join(training or splits)
            what = "several training splits" if training else "no training split"
            raise ValueError(f"{root} holds {what} ({names}): give the folder of the one that is meant")
    if rest and (inside := [name for name in splits if _holds_classes(root / name)]):
        raise ValueError(
            f"the folder {inside[0]} of {root} holds class folders as a split does, and lies beside "
            f"{rest} class folders: move it away, or give the folder that is meant"
        )
    if len(folders) == 1 and (inner := _enter(root / folders[0], depth + 1)) != root / folders[0]:
        return inner
    if len(folders) == 1 and (root / folders[0] / LABELS).is_file():
        return root / folders[0]
    return root


def _holds_classes(split: Path) -> bool:
    """Whether a folder is a split; a class of that name would hold images directly."""
    if (split / LABELS).is_file():
        return True
    entries = _entries(split)
    images = any(_is_image(entry.name) for entry in entries)
    return not images and any(entry.is_dir() for entry in entries)


def _pass_by(start: Path, root: Path, left_out: Counter) -> None:
    """Counts the folders beside those that lead from the start to the root."""
    way = start
    for part in root.relative_to(start).parts:
        for entry in _entries(way):
            if entry.is_dir() and entry.name != part:
                left_out[f"the folder {entry.name} beside {part}"] += 1
        way = way / part


# ---------------------------------------------------------------- which labels


def _folder_labels(root: Path, names: list[str], found: _Walk) -> tuple[list[int], list[str], str]:
    """Labels from sorted top-level folders, the folders, and why there are no classes if there are none."""
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    used = set(tops)
    if all(NUMBERED.fullmatch(name) for name in names):
        return [0] * len(names), [], "its folders only number the images"
    if len(used) == 1:
        return [0] * len(names), [], "all lie in one folder"
    if "" in used and (root / LABELS).is_file():
        return [0] * len(names), [], f"{LABELS} has no labels"
    if "" in used:
        alone = [name for name in names if "/" not in name]
        raise ValueError(
            f"{len(alone)} images lie beside the class folders of {root}, {alone[0]} first: move them into a "
            f'class folder, or away, or write {{"labels": null}} into a {LABELS} if none has a class'
        )
    others = sorted(name for name, count in found.folders.items() if count and name not in used)
    if others:
        raise ValueError(
            f"the class folder {others[0]} of {root} holds no images but other files ({len(others)} such "
            "folders): fill or remove it, since labels number the class folders in order"
        )
    class_names = sorted(found.folders)
    spellings = {_plain(name): name for name in class_names}
    if alike := [name for name in class_names if spellings[_plain(name)] != name]:
        raise ValueError(
            f"two class folders of {root} are called {alike[0]} and differ only in their Unicode form: make "
            "them one"
        )
    numbers = {name: i for i, name in enumerate(class_names)}
    return [numbers[top] for top in tops], class_names, ""


def _plain(name: str) -> str:
    """A name in the one spelling that all spellings of it share."""
    if name.isascii() and not ("\\" in name or "//" in name or "./" in name or name.endswith(("/", "/."))):
        return name
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _match(
    entries: list[tuple[str, int]], names: list[str], listed: Path
) -> tuple[dict[str, int], list[str]]:
    """The label of each image that a dataset.json lists, and those of them that are not there.

    Raises:
        ValueError: images without labels, or names that lead elsewhere.
    """
    by_spelling = {_plain(name): name for name in names}
    by_spelling |= {name: name for name in names}
    numbers = {}
    for name, label in entries:
        plain = _plain(name)
        if plain.startswith(("/", "../")):
            raise ValueError(f"{listed} lists {_short(name)}, which leads out of its folder: take it out")
        numbers[by_spelling.get(name) or by_spelling.get(plain, plain)] = label
    if unlisted := [name for name in names if name not in numbers]:
        raise ValueError(
            f"{listed} has no label for {len(unlisted)} images, {unlisted[0]} first: add them to it, or "
            "remove them"
        )
    return numbers, sorted(numbers.keys() - set(names))


def parse_labels(text: bytes | str, where: object) -> list[tuple[str, int]]:
    """The (name, class) pairs of a dataset.json, {"labels": [[name, class], …]}; none when it has no labels.

    Args:
        text: its content.
        where: what to call it in errors.

    Raises:
        ValueError: not such a file, a class that is no whole number from 0 up or far beyond the number of
            images, or a name listed twice, in whatever spelling.
    """
    try:
        entries = json.loads(text, object_pairs_hook=once).get("labels") or []
        pairs = [(name, label) for name, label in (entries.items() if isinstance(entries, dict) else entries)]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = f", it has {error.args[0]!r} twice" if isinstance(error, SetTwice) else ""
        raise ValueError(
            f'{where} cannot be read as {{"labels": [[name, class], …]}}{reason}: write it again'
        ) from None
    if all(label is None for _, label in pairs):
        return []
    most, spellings, twice = max(MOST_CLASSES, len(pairs)), set(), []
    for i, (name, label) in enumerate(pairs):
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if not isinstance(name, str) or type(label) is not int or label < 0:
            raise ValueError(
                f"{where} gives {_short(name)} the label {_short(label)}: labels are whole numbers from 0 up"
            )
        if label >= most:
            raise ValueError(
                f"{where} lists {len(pairs):,} images and gives {_short(name)} the label {_short(label)}: "
                "number the classes from 0"
            )
        plain = _plain(name)
        if plain in spellings:
            twice.append(name)
        spellings.add(plain)
        pairs[i] = (name, label)
    if twice:
        raise ValueError(
            f"{where} lists {len(twice)} names twice, {_short(twice[0])} first: list every image once, in "
            "one spelling"
        )
    return pairs


def _short(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # digits without end, or lists
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "…"
