"""`repae preprocess`: the official layout from any folder, the same bytes however it ran, and every refusal
in a sentence.
"""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from repae_lite.commands.main import main
from repae_lite.data import journal, preprocessing
from repae_lite.data.datasets import ImageFolderDataset, ImageH5Dataset
from repae_lite.data.hdf5 import image_name
from repae_lite.data.image_files import center_crop, read_image
from repae_lite.data.preprocessing import REPORT, preprocess
from repae_lite.utils.locks import locked

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = ("jpg", "png", "webp", "gif", "bmp", "tif", "JPEG", "ppm")
COUNT = 24


def make_images(folder, count=COUNT, size=20):
    """Images of many formats, sizes and modes in three class folders, some nested."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (size + i % 5, size + i % 7, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(("RGB", "L")[i % 5 == 0])
        path = (
            folder
            / ("cat", "ant", "bee")[i % 3]
            / ("deep/er" if i % 4 == 0 else ".")
            / f"{i:03d}.{SUFFIXES[i % len(SUFFIXES)]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(preprocessing, "BATCH_BYTES", 768)  # one image of 16 × 16 pixels


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The bytes of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    preprocess(images, output, resolution=16, workers=1, step=5)
    return (output / "images.h5").read_bytes()


@pytest.fixture
def spoiled(tmp_path):
    """A folder with two unreadable images among others."""
    folder = make_images(tmp_path / "spoiled")
    (folder / "ant" / "000.jpg").write_bytes(b"plain text")
    (folder / "bee" / "zzz.png").touch()
    return folder


def refused(capsys, *arguments):
    """Runs the command, which must refuse in one sentence; returns it."""
    capsys.readouterr()
    assert main(["preprocess", *map(str, arguments)]) == 2
    err = capsys.readouterr().err.splitlines()
    sentences = [line for line in err if line.startswith("repae preprocess: ")]
    assert len(sentences) == 1 and err[-1] == sentences[0] and "Traceback" not in "".join(err)
    return sentences[0].removeprefix("repae preprocess: ")


# ---------------------------------------------------------------- what is written


def test_layout_labels_and_pixels(images, tmp_path):
    report = preprocess(images, tmp_path / "out", resolution=16, workers=1)
    sources = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.*"))
    names = [f"00000/img{i:08d}.png" for i in range(COUNT)]
    labels = [["ant", "bee", "cat"].index(source.split("/")[0]) for source in sources]
    assert json.loads((tmp_path / "out" / "images_h5.json").read_text()) == names
    with h5py.File(tmp_path / "out" / "images.h5") as file:
        assert json.loads(file["dataset.json"][()]) == {
            "labels": [[n, label] for n, label in zip(names, labels, strict=True)]
        }
        for name, source in zip(names, sources, strict=True):
            stored = file[name]
            assert (
                stored.dtype.kind == "S" and stored.shape == () and len(stored[()]) > 16 * 16 * 3
            )  # uncompressed
            found = np.asarray(Image.open(io.BytesIO(stored[()])))
            assert np.array_equal(found, np.asarray(center_crop(read_image(images / source), 16)))
    assert report == json.loads((tmp_path / "out" / REPORT).read_text())
    assert (
        report["images"] == COUNT
        and report["classes"] == [["ant", 8], ["bee", 8], ["cat", 8]]
        and report["unreadable"] == []
    )
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["images.h5", "images_h5.json", REPORT]


def test_the_two_datasets_are_equal(images, tmp_path):
    preprocess(images, tmp_path, resolution=16, workers=1)
    stored, direct = ImageH5Dataset(tmp_path / "images.h5"), ImageFolderDataset(images, 16)
    assert (
        len(stored) == len(direct) == COUNT
        and list(stored.labels) == list(direct.labels)
        and stored.num_classes == direct.num_classes == 3
    )
    for (image, label), (other, other_label) in zip(stored, direct, strict=True):
        assert image.equal(other) and label == other_label


def test_a_thousand_images_fill_a_folder():
    assert [image_name(i) for i in (0, 999, 1000, 1281166)] == [
        "00000/img00000000.png", "00000/img00000999.png", "00001/img00001000.png", "01281/img01281166.png",
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [2, 3])
def test_the_result_does_not_depend_on_the_number_of_workers(images, tmp_path, whole, workers):
    preprocess(images, tmp_path, resolution=16, workers=workers, step=5)
    assert (tmp_path / "images.h5").read_bytes() == whole


def test_a_dataset_json_gives_the_labels(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [[name, i % 5] for i, name in enumerate(names)]})
    )
    report = preprocess(folder, tmp_path / "out", resolution=16, workers=1)
    assert list(ImageH5Dataset(tmp_path / "out" / "images.h5").labels) == [
        names.index(name) % 5 for name in sorted(names)
    ]
    assert report["classes"] == [[str(label), 5 - (label == 4)] for label in range(5)]


def test_the_first_images_keep_the_labels_they_have_among_all(images, tmp_path):
    preprocess(images, tmp_path, resolution=16, workers=1, max_images=10)
    assert list(ImageH5Dataset(tmp_path / "images.h5").labels) == [0] * 8 + [1] * 2


# ---------------------------------------------------------------- unreadable images


def test_unreadable_images_are_listed_and_refused(spoiled, tmp_path, capsys):
    sentence = refused(
        capsys,
        "--imagenet-path",
        spoiled,
        "--output-path",
        tmp_path / "out",
        "--resolution",
        16,
        "--workers",
        1,
    )
    assert sentence.startswith(
        f"2 of {COUNT + 2} images cannot be read, ant/000.jpg first (not an image in a known format)"
    )
    assert "--on-error skip" in sentence and not (tmp_path / "out" / "images.h5").exists()
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert [entry["file"] for entry in report["unreadable"]] == ["ant/000.jpg", "bee/zzz.png"]
    assert {entry["reason"] for entry in report["unreadable"]} == {"not an image in a known format"}


def test_skipped_images_leave_their_number_out(spoiled, tmp_path, capsys, monkeypatch):
    arguments = [
        "preprocess",
        "--imagenet-path",
        spoiled,
        "--output-path",
        tmp_path / "out",
        "--resolution",
        16,
        "--workers",
        1,
    ]
    assert main([*map(str, arguments)]) == 2
    seen = []
    original = preprocessing.square_pngs
    monkeypatch.setattr(
        preprocessing,
        "square_pngs",
        lambda root, names, size: seen.extend(names) or original(root, names, size),
    )
    assert main([*map(str, arguments), "--on-error", "skip"]) == 0
    assert seen == ["ant/000.jpg", "bee/zzz.png"]  # tried again; the others were done
    assert "2 unreadable images left out: see" in capsys.readouterr().out
    dataset = ImageH5Dataset(tmp_path / "out" / "images.h5")
    bad = [entry["name"] for entry in json.loads((tmp_path / "out" / REPORT).read_text())["unreadable"]]
    assert len(dataset) == COUNT and len(bad) == 2
    assert sorted([*dataset.names, *bad]) == [image_name(i) for i in range(COUNT + 2)]
    with h5py.File(dataset.path) as file:
        assert not any(name in file for name in bad)


def test_repaired_images_are_taken_in(spoiled, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="2 of 26 images cannot be read"):
            preprocess(spoiled, tmp_path / "out", resolution=16, workers=1, step=5)
    for name in ("ant/000.jpg", "bee/zzz.png"):
        Image.new("RGB", (20, 20), "red").save(spoiled / name)
    report = preprocess(spoiled, tmp_path / "out", resolution=16, workers=1, step=5)
    assert report["images"] == COUNT + 2 and report["unreadable"] == []
    dataset, direct = ImageH5Dataset(tmp_path / "out" / "images.h5"), ImageFolderDataset(spoiled, 16)
    assert all(image.equal(other) for (image, _), (other, _) in zip(dataset, direct, strict=True))


def test_skipping_gives_the_same_bytes_interrupted_or_not(spoiled, tmp_path, monkeypatch):
    preprocess(spoiled, tmp_path / "a", resolution=16, workers=1, step=5, on_error="skip")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(preprocessing, "square_pngs", interrupted_at(14))
        preprocess(spoiled, tmp_path / "b", resolution=16, workers=1, step=5, on_error="skip")
    preprocess(spoiled, tmp_path / "b", resolution=16, workers=2, step=5, on_error="skip")
    assert (tmp_path / "a" / "images.h5").read_bytes() == (tmp_path / "b" / "images.h5").read_bytes()
    assert (tmp_path / "a" / REPORT).read_bytes() == (tmp_path / "b" / REPORT).read_bytes()


def test_no_readable_image_is_refused_even_when_skipping(tmp_path, capsys):
    for name in ("a/1.png", "b/2.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(b"nothing")
    arguments = (
        "--imagenet-path",
        tmp_path / "in",
        "--output-path",
        tmp_path / "out",
        "--on-error",
        "skip",
        "--workers",
        1,
    )
    assert "none of the 2 images can be read, a/1.png first" in refused(capsys, *arguments)
    assert [f.name for f in (tmp_path / "out").iterdir()] == [REPORT]


def test_images_that_a_dataset_json_lists_and_nobody_has_are_reported(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")] + ["gone.png"]
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in names]}))
    report = preprocess(folder, tmp_path / "out", resolution=16, workers=1, on_error="skip")
    assert [(entry["file"], entry["reason"]) for entry in report["unreadable"]] == [
        ("gone.png", "no such file")
    ]


# ---------------------------------------------------------------- interrupted runs


def interrupted_at(number):
    """`square_pngs` that is interrupted before image `number`."""
    original, seen = preprocessing.square_pngs, []

    def squares(root, names, size):
        results = []
        for name in names:
            if len(seen) == number:
                raise KeyboardInterrupt
            seen.append(name)
            results += original(root, [name], size)
        return results

    return squares


def test_an_interrupted_run_goes_on_without_doing_anything_twice(
    images, tmp_path, monkeypatch, capsys, whole
):
    monkeypatch.setitem(preprocess.__kwdefaults__, "step", 5)
    arguments = [
        "preprocess",
        "--imagenet-path",
        str(images),
        "--data-dir",
        str(tmp_path),
        "--resolution",
        "16",
        "--workers",
        "1",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(preprocessing, "square_pngs", interrupted_at(13))
        assert main(arguments) == 130
    assert capsys.readouterr().err.endswith("repae preprocess: interrupted\n")
    with monkeypatch.context() as patched:
        patched.setattr(
            preprocessing, "square_pngs", interrupted_at(COUNT - 10)
        )  # 10 of 13 were in whole steps
        assert main(arguments) == 0
    assert (tmp_path / "images.h5").read_bytes() == whole


CHILD = """
import sys
from repae_lite.data import preprocessing
preprocessing.BATCH_BYTES = 768
preprocessing.preprocess(sys.argv[1], sys.argv[2], resolution=16, workers=2, step=5)
"""


def test_a_killed_run_leaves_no_process_and_ends_like_any_other(tmp_path):
    images = make_images(tmp_path / "images", 150, 60)
    output, journal = tmp_path / "out", tmp_path / "out" / "images.h5.partial" / "journal.json"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, images, output],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    until = time.monotonic() + 120
    done = 0
    while done < 20 and child.poll() is None and time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            done = json.loads(journal.read_text())["state"]["done"]
    child.send_signal(signal.SIGKILL)
    text, _ = child.communicate(timeout=60)  # ends when no worker holds the pipe any more
    assert child.returncode == -signal.SIGKILL and 20 <= done < 150, text
    assert not (output / "images.h5").exists()
    preprocess(images, output, resolution=16, workers=1, step=5)
    preprocess(images, tmp_path / "whole", resolution=16, workers=1, step=5)
    assert (output / "images.h5").read_bytes() == (tmp_path / "whole" / "images.h5").read_bytes()


@pytest.mark.parametrize("moment", ["write_names", "finish"])
def test_a_run_killed_at_the_very_end_only_ends(images, tmp_path, monkeypatch, whole, moment):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            *{"write_names": (journal, moment), "finish": (journal.ResumableH5, moment)}[moment],
            interrupt,
        )
        preprocess(images, tmp_path, resolution=16, workers=1, step=5)
    assert not (tmp_path / "images.h5").exists()
    monkeypatch.setattr(preprocessing, "square_pngs", None)  # nothing is left to be cropped
    preprocess(images, tmp_path, resolution=16, workers=1, step=5)
    assert (tmp_path / "images.h5").read_bytes() == whole


def test_after_the_labels_nothing_is_tried_again(spoiled, tmp_path, monkeypatch):
    """An image that was repaired in the meantime would be one without a label."""
    preprocess(spoiled, tmp_path / "whole", resolution=16, workers=1, step=5, on_error="skip")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(journal.ResumableH5, "finish", interrupt)
        preprocess(spoiled, tmp_path / "out", resolution=16, workers=1, step=5, on_error="skip")
    for name in ("ant/000.jpg", "bee/zzz.png"):
        Image.new("RGB", (20, 20), "red").save(spoiled / name)
    report = preprocess(spoiled, tmp_path / "out", resolution=16, workers=1, step=5, on_error="skip")
    assert report["images"] == COUNT and len(report["unreadable"]) == 2
    assert (tmp_path / "out" / "images.h5").read_bytes() == (tmp_path / "whole" / "images.h5").read_bytes()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_an_unfinished_run_of_something_else_is_kept_unless_overwritten(
    images, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(preprocessing, "square_pngs", interrupted_at(13))
        preprocess(images, tmp_path, resolution=16, workers=1, step=5)
    arguments = ("--imagenet-path", images, "--output-path", tmp_path, "--resolution", 8, "--workers", 1)
    assert "holds an unfinished run with other images or options" in refused(capsys, *arguments)
    assert main([*map(str, ("preprocess", *arguments)), "--overwrite"]) == 0
    assert ImageH5Dataset(tmp_path / "images.h5")[0][0].shape == (3, 8, 8)


def test_a_damaged_unfinished_run_starts_over(images, tmp_path, monkeypatch, caplog, whole):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(preprocessing, "square_pngs", interrupted_at(13))
        preprocess(images, tmp_path, resolution=16, workers=1, step=5)
    partial = tmp_path / "images.h5.partial" / "images.h5"
    data, valid = (
        bytearray(partial.read_bytes()),
        json.loads((partial.parent / "journal.json").read_text())["size"],
    )
    end = data.rfind(b"IEND", 0, valid)  # of the last PNG that the journal knows
    data[end : end + 4] = bytes(4)
    partial.write_bytes(data)
    preprocess(images, tmp_path, resolution=16, workers=1, step=5)
    assert "is damaged" in caplog.text
    assert (tmp_path / "images.h5").read_bytes() == whole


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("arguments, message", [
    (("--resolution", 0), "the resolution in pixels is 0: give a whole number from 1 to 4096"),
    (("--workers", 0), "the number of workers is 0"),
    (("--max-images", -1), "the largest number of images is -1"),
])  # fmt: skip
def test_senseless_numbers_are_refused(images, tmp_path, capsys, arguments, message):
    assert refused(
        capsys, "--imagenet-path", images, "--output-path", tmp_path / "out", *arguments
    ).startswith(message)
    assert not (tmp_path / "out").exists()


def test_unknown_ways_to_treat_errors_are_refused(images, tmp_path):
    with pytest.raises(ValueError, match="'ignore': choose refuse or skip"):
        preprocess(images, tmp_path / "out", on_error="ignore")


def test_missing_folders_are_refused_and_folders_without_classes_taken(tmp_path, capsys):  # D8
    assert "does not exist" in refused(
        capsys, "--imagenet-path", tmp_path / "nowhere", "--output-path", tmp_path / "out"
    )
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    words = (
        f"preprocess --imagenet-path {tmp_path}/flat --output-path {tmp_path}/out --resolution 8 --workers 1"
    )
    assert main(words.split()) == 0
    assert "3 images of 8 × 8 pixels without classes" in capsys.readouterr().out
    with h5py.File(tmp_path / "out" / "images.h5") as file:
        assert json.loads(file["dataset.json"][()]) == {"labels": None}  # as the official code writes it
    dataset = ImageH5Dataset(tmp_path / "out" / "images.h5")
    assert len(dataset) == 3 and dataset.no_classes and dataset[2][0][0, 0, 0] == 2


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path, capsys):
    folder = make_images(tmp_path / "in")
    for name in ("@eaDir/1.jpg", "cat/Thumbs.db", "cat/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "empty").mkdir()
    words = [
        "preprocess",
        "--imagenet-path",
        str(folder),
        "--output-path",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert f"would hold {COUNT} images of 256 × 256 pixels in 4 classes; nothing was written" in out
    for part in ("in 4 classes, ant = 0 to empty = 3", "left out: @eaDir, Thumbs.db", "other files: .txt"):
        assert part in err
    assert "1 of the 4 classes have no images, class 3 first" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["images_h5.json", REPORT])
def test_files_of_others_are_kept_unless_overwritten(images, tmp_path, capsys, name):
    (tmp_path / name).write_text("precious")
    words = ("--imagenet-path", images, "--output-path", tmp_path, "--resolution", 8, "--workers", 1)
    assert f"{name} exists and is not of this run: move it away" in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"
    assert main([*map(str, ("preprocess", *words)), "--overwrite"]) == 0
    assert json.loads((tmp_path / name).read_text())


def test_a_refused_run_leaves_the_report_of_the_old_file(images, spoiled, tmp_path, capsys):
    words = ("--output-path", tmp_path / "out", "--resolution", 8, "--workers", 1)
    assert main([*map(str, ("preprocess", "--imagenet-path", images, *words))]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    sentence = refused(capsys, "--imagenet-path", spoiled, *words, "--overwrite")
    report = tmp_path / "out" / "images.h5.partial" / REPORT
    assert str(report) in sentence and len(json.loads(report.read_text())["unreadable"]) == 2
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()} == before


def test_files_and_folders_that_vanish_are_told(images, tmp_path, monkeypatch):
    folder = shutil.copytree(images, tmp_path / "in")
    listed = preprocessing.list_images

    def then_gone(source):
        found = listed(source)
        shutil.rmtree(folder / "ant")
        return found

    monkeypatch.setattr(preprocessing, "list_images", then_gone)
    with pytest.raises(ValueError, match=r"8 of 24 images cannot be read, ant/.* first \(no such file\)"):
        preprocess(folder, tmp_path / "out", resolution=8, workers=1)


def test_an_output_among_the_images_is_refused(images, tmp_path, capsys):
    (tmp_path / "link").symlink_to(images)
    for folder in (images, tmp_path / "link"):
        sentence = refused(capsys, "--imagenet-path", images, "--output-path", folder / "out")
        assert "lies in the image folder" in sentence and not (images / "out").exists()


def test_a_finished_result_is_kept_unless_overwritten(images, tmp_path, capsys, whole):
    (tmp_path / "images.h5").write_bytes(b"precious")
    arguments = ("--imagenet-path", images, "--output-path", tmp_path, "--resolution", 16, "--workers", 1)
    assert "images.h5 exists" in refused(capsys, *arguments)
    assert (tmp_path / "images.h5").read_bytes() == b"precious"
    assert main([*map(str, ("preprocess", *arguments)), "--overwrite"]) == 0
    assert len(ImageH5Dataset(tmp_path / "images.h5")) == COUNT


def test_two_runs_into_one_folder_are_refused(images, tmp_path, capsys):
    with locked(tmp_path / "images.h5.partial"):
        sentence = refused(
            capsys, "--imagenet-path", images, "--output-path", tmp_path, "--resolution", 16, "--workers", 1
        )
    assert sentence.startswith("another run is writing into")


def test_an_output_that_cannot_be_written_is_refused(images, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "cannot write in" in refused(
        capsys, "--imagenet-path", images, "--output-path", tmp_path / "file" / "out"
    )


def test_a_disk_that_is_too_small_is_refused_at_once(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    assert "the images need" in refused(
        capsys, "--imagenet-path", images, "--output-path", tmp_path, "--workers", 1
    )


def test_a_disk_that_fills_up_is_one_sentence_and_the_run_goes_on_later(
    images, tmp_path, capsys, monkeypatch, whole
):
    original, written = os.pwrite, []

    def full(descriptor, data, offset):
        written.append(len(data))
        if sum(written) > 12_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        patched.setitem(preprocess.__kwdefaults__, "step", 5)
        arguments = ("--imagenet-path", images, "--output-path", tmp_path, "--resolution", 16, "--workers", 1)
        assert "(No space left on device): make room" in refused(capsys, *arguments)
    monkeypatch.setattr(preprocessing, "square_pngs", interrupted_at(COUNT - 5))  # at least one step was kept
    preprocess(images, tmp_path, resolution=16, workers=1, step=5)
    assert (tmp_path / "images.h5").read_bytes() == whole


def test_a_worker_that_dies_is_one_sentence(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preprocessing, "start_worker", os.abort)
    sentence = refused(
        capsys, "--imagenet-path", images, "--output-path", tmp_path, "--resolution", 16, "--workers", 2
    )
    assert sentence.startswith("a worker process died") and "--num-workers" in sentence


def test_the_official_command_is_understood(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["preprocess", "--imagenet-path", str(images), "--num-workers", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(
        f"{Path('data') / 'images.h5'}: {COUNT} images of 256 × 256 pixels in 3 classes"
    )
    assert f"{COUNT} images in 3 classes" in captured.err  # and the bar
    assert (tmp_path / "data" / "images_h5.json").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_what_is_in_the_way_is_told_before_the_work_and_by_a_dry_run(images, tmp_path, dry):
    def refused(match, **options):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=match):
            preprocess(images, tmp_path, resolution=16, workers=1, dry_run=dry, **options)
        assert sorted(tmp_path.rglob("*")) == before

    for name in ("images_h5.json", REPORT):
        (tmp_path / name).write_text("mine")
        refused(f"{name} exists and is not of this run")
        (tmp_path / name).unlink()
    (tmp_path / "images.h5").symlink_to(tmp_path / "away")  # on a disk that is not there now
    refused("is a link to .*away, which is not there")
    (tmp_path / "images.h5").unlink()
    (tmp_path / "images.h5").mkdir()
    refused("is a folder", overwrite=True)
