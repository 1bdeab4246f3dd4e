"""A folder of images becomes `images.h5` in the official layout: parallel, resumable, always the same bytes.

The command is `repae preprocess`. `repae_lite.data.image_files` says what happens to one image,
`repae_lite.data.journal` why a run may be killed at any moment; while it lasts, everything is in
`images.h5.partial` beside the result.
"""

import json
import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import h5py
from tqdm import tqdm

from repae_lite.data.hdf5 import image_name, read_bytes, reading
from repae_lite.data.image_files import square_pngs, start_worker
from repae_lite.data.image_lists import ImageList, list_images
from repae_lite.data.journal import ResumableH5, check_count, fingerprint, refuse_beside, refuse_existing
from repae_lite.utils.cores import core_count
from repae_lite.utils.files import read_json, write_text
from repae_lite.utils.locks import check_space, locked, writing
from repae_lite.utils.progress import progress_bar

ON_ERROR = ("refuse", "skip")
REPORT = "preprocess_report.json"
STEP = 1000  # images that a killed run has to do again at most
BATCH_BYTES = 4_000_000  # what a worker hands over at once
logger = logging.getLogger(__name__)


def preprocess(
    source: str | Path,
    output: str | Path,
    *,
    resolution: int = 256,
    workers: int | None = None,
    on_error: str = "refuse",
    overwrite: bool = False,
    max_images: int | None = None,
    dry_run: bool = False,
    progress: bool = False,
    step: int = STEP,
) -> dict:
    """Crops every image of a folder and writes `images.h5`, `images_h5.json` and `preprocess_report.json`.

    Number i of the sorted list becomes image i, whether the ones before it can be read or not. An unfinished
    run over the same list is continued, and its unreadable images are tried again. A script that calls this
    with several workers needs the usual `if __name__ == "__main__":`.

    Args:
        source: the folder; see `repae_lite.data.image_lists.list_images` for its labels.
        output: the folder to write to, made if need be.
        resolution: side of the square images in pixels.
        workers: processes; None takes one per available CPU core. The result does not depend on it.
        on_error: what unreadable images do: "refuse" the result once all others are done, or "skip" them. The
            report lists them.
        overwrite: replace a finished result, and discard an unfinished one of other images or resolution.
        max_images: take only the first so many of the sorted list.
        dry_run: only say what would be taken and left out, and return the report as if all could be read.
        progress: show a bar.
        step: images between two entries of the journal.

    Returns:
        The report: `images` (how many were written), `classes` [[name, images]] in the order of their
        numbers, `unreadable` [{file, name, reason}], `ignored_files` {suffix: how many}, `left_out` {what
        else: how many}, `source`, `resolution` (pixels).

    Raises:
        ValueError: an argument, or the folder's contents as `list_images` says; unreadable images that are to
            be refused, or no others; a finished or different result is in the way; another run writes there.
        FileNotFoundError: no such source folder.
        OSError: the output cannot be written, or a worker died.
    """
    _check(resolution, workers, on_error, max_images, step)
    output = Path(output)
    images = list_images(source)
    images = replace(images, names=images.names[:max_images], labels=images.labels[:max_images])
    if output.resolve().is_relative_to(images.root.resolve()):
        raise ValueError(
            f"the output folder {output} lies in the image folder {images.root}: choose one outside of it"
        )
    for line in images.summary():
        logger.info(line)
    result, names, report_path = (output / name for name in ("images.h5", "images_h5.json", REPORT))
    refuse_existing(result, overwrite, "output folder")
    beside = [names] if _is_ours(report_path, images) else [names, report_path]
    refuse_beside(output / "images.h5.partial", beside, overwrite)
    if dry_run:
        return _report({"done": len(images.names), "unreadable": {}}, images, resolution)
    with locked(output / "images.h5.partial") as folder:
        # JSON makes the positions of the unreadable images strings.
        state = {"done": 0, "unreadable": {}, "labelled": False}
        head = f"1 {resolution}\n" + "no classes\n" * bool(images.no_classes)
        source_print = fingerprint(head, images.names, images.labels)
        file = ResumableH5(folder, source_print, state, _check_unfinished, discard=overwrite)
        file.check_free(*[names] if file.state["done"] else beside, overwrite=overwrite)
        left = len(images.names) - file.state["done"]
        check_space(output, left * (3 * resolution + 1) * resolution, "the images need")
        _encode_all(file, images, resolution, workers or core_count(), step, progress)
        report = _report(file.state, images, resolution)
        place = folder / REPORT if result.exists() else report_path  # the old report is the old file's
        text = json.dumps(report, indent=1)
        with writing(output):
            write_text(place, text)
        if not report["images"] and place == report_path:
            file.discard()  # nothing worth keeping
        _refuse_unreadable(report, on_error, place)
        labels = [None] * len(images.labels) if images.no_classes else images.labels
        entries = [(image_name(i), labels[i]) for i in _written(file.state)]
        file.finish_labelled(result, entries, beside=lambda: write_text(report_path, text))
    return report


def _is_ours(path: Path, images: ImageList) -> bool:
    """Whether a report tells of an earlier run over the same folder, as when images were unreadable."""
    try:
        return read_json(path).get("source") == str(images.root)
    except (ValueError, OSError):
        return False


# ---------------------------------------------------------------- what is refused


def _check(resolution: int, workers: int | None, on_error: str, max_images: int | None, step: int) -> None:
    numbers = (
        ("the resolution in pixels", resolution, 4096),
        ("the number of workers", workers, 1024),
        ("the largest number of images", max_images, None),
        ("the number of images in a step", step, None),
    )
    for what, value, most in numbers:
        if value is not None and (value < 1 or (most and value > most)):
            raise ValueError(
                f"{what} is {value}: give a whole number from 1 {f'to {most}' if most else 'up'}"
            )
    if on_error not in ON_ERROR:
        raise ValueError(
            f"unknown way to treat unreadable images {on_error!r}: choose {' or '.join(ON_ERROR)}"
        )


def _check_unfinished(file: h5py.File, state: dict) -> None:
    """Whether an unfinished file holds as many images as its journal says, the last one whole.

    Raises:
        ValueError: it does not.
    """
    check_count(file, state)
    with reading(file.filename):
        group = max((name for name in file if name != "dataset.json"), default=None)
        last = f"{group}/{max(file[group])}" if group else None
    if last and not read_bytes(file, last).endswith(b"IEND\xaeB`\x82"):
        raise ValueError(f"{last} is not a whole PNG")


def _refuse_unreadable(report: dict, on_error: str, path: Path) -> None:
    """Refuses a result that is empty, or that lacks images although none may be skipped.

    Raises:
        ValueError: the report is of that kind.
    """
    if not report["unreadable"]:
        return
    count, total = len(report["unreadable"]), len(report["unreadable"]) + report["images"]
    first = "{file} first ({reason})".format(**report["unreadable"][0])
    if not report["images"]:
        raise ValueError(f"none of the {total} images can be read, {first}: see {path}")
    if on_error == "refuse":
        raise ValueError(
            f"{count} of {total} images cannot be read, {first}, all listed in {path}: repair them and run "
            "again, or leave them out with --on-error skip (the others are done and kept)"
        )


# ---------------------------------------------------------------- the work


def _encode_all(
    file: ResumableH5, images: ImageList, resolution: int, workers: int, step: int, progress: bool
) -> None:
    """Brings the file up to all images: first those that failed before, then the rest."""
    again = sorted(map(int, file.state["unreadable"]))
    rest = list(range(file.state["done"], len(images.names)))
    blocks = ([again] if again else []) + [rest[i : i + step] for i in range(0, len(rest), step)]
    if file.state["labelled"] or not blocks:
        return
    done = file.state["done"] - len(again)
    names = [images.names[i] for i in again + rest]
    results = _squares(str(images.root), names, resolution, workers)
    with closing(results), progress_bar(len(images.names), done, show=progress) as bar:
        for block in blocks:
            _encode_block(file, block, results, bar)


def _encode_block(file: ResumableH5, block: list[int], results: Iterator[bytes | str], bar: tqdm) -> None:
    """Adds the images at the positions of one step."""
    unreadable = dict(file.state["unreadable"])
    with file.step() as step:
        for i, result in zip(block, islice(results, len(block)), strict=True):
            unreadable.pop(str(i), None)
            if isinstance(result, str):
                unreadable[str(i)] = result
            else:
                step.add(image_name(i), result)
            bar.update()
        file.commit(step, done=max(file.state["done"], block[-1] + 1), unreadable=unreadable)


def _squares(root: str, names: list[str], resolution: int, workers: int) -> Iterator[bytes | str]:
    """PNG or reason for each image, in order; at most four batches per worker wait in memory.

    Raises:
        OSError: a worker died.
    """
    size = max(1, min(16, BATCH_BYTES // (3 * resolution**2)))
    batches = (names[i : i + size] for i in range(0, len(names), size))
    workers = min(workers, -(-len(names) // size))
    if workers == 1:
        for batch in batches:
            yield from square_pngs(root, batch, resolution)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    try:
        waiting = deque(
            pool.submit(square_pngs, root, batch, resolution) for batch in islice(batches, 4 * workers)
        )
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(square_pngs, root, batch, resolution) for batch in islice(batches, 1))
    except BrokenProcessPool:
        raise OSError(
            "a worker process died, perhaps for want of memory: run the same command again with fewer "
            "--num-workers, it continues where it stopped"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _written(state: dict) -> list[int]:
    """Positions of the images that are in the file."""
    return [i for i in range(state["done"]) if str(i) not in state["unreadable"]]


def _report(state: dict, images: ImageList, resolution: int) -> dict:
    written = _written(state)
    counts = Counter(images.labels[i] for i in written)
    names = images.class_names or [str(label) for label in range(images.num_classes)]
    if images.no_classes:
        names = []
    return {
        "source": str(images.root),
        "resolution": resolution,
        "images": len(written),
        "classes": [[name, counts[label]] for label, name in enumerate(names)],
        "unreadable": [
            {"file": images.names[i], "name": image_name(i), "reason": state["unreadable"][str(i)]}
            for i in sorted(map(int, state["unreadable"]))
        ],
        "ignored_files": dict(sorted(images.ignored.items())),
        "left_out": dict(sorted(images.left_out.items())),
    }
