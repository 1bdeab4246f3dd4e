"""Images: the shipped dataset is what its maker makes, and every unreadable file is refused in a sentence."""

import errno
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import h5py
import numpy as np
import pytest
import torch
from damage import bytes_changed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from repae_lite.data import datasets
from repae_lite.data.datasets import (
    ImageFolderDataset,
    ImageH5Dataset,
    load_embedded,
    open_dataset,
    read_batches,
)
from repae_lite.data.hdf5 import write_images_h5
from repae_lite.data.image_files import encode_png
from repae_lite.data.training_data import TrainingData
from repae_lite.utils.pixels import CLASS_NAMES, to_uint8, to_unit_range

FOLDER = Path(__file__).resolve().parents[2] / "data_small"
COUNTS = {"train": 6000, "eval": 2000}


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_images", FOLDER / "make_images.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_images"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_images"]


@pytest.fixture(scope="module")
def embedded():
    return {split: load_embedded(split) for split in COUNTS}


@pytest.fixture
def small():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 3, 16, 16), dtype=np.uint8), np.array([0, 1, 2, 0, 1, 2])


@pytest.fixture
def folder(small, tmp_path):
    """The small images as files in class folders; those of class c are c and c + 3."""
    for i, (image, label) in enumerate(zip(*small, strict=True)):
        path = tmp_path / "folder" / f"class {label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
    return tmp_path / "folder"


def checksums():
    lines = (FOLDER / "CHECKSUMS.sha256").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def test_shipped_files_have_their_checksums():
    for name, digest in checksums().items():
        if not name.startswith("pixels of "):
            assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("split", COUNTS)
def test_shipped_pixels_have_their_checksum(embedded, split):
    images, labels = embedded[split]
    assert images.shape == (COUNTS[split], 3, 32, 32)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [COUNTS[split] // 10] * 10
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == checksums()[f"pixels of {split}"]


@pytest.mark.parametrize("split", COUNTS)
def test_any_image_can_be_remade_alone(maker, embedded, split):
    images, labels = embedded[split]
    for index in np.random.default_rng(1).choice(COUNTS[split], 20, replace=False):
        drawing, label = maker.make_one(split, int(index))
        assert label == labels[index]
        assert np.array_equal(drawing.image.transpose(2, 0, 1), images[index].numpy())


def test_no_image_is_in_both_splits(embedded):
    seen = {image.tobytes() for image in embedded["train"][0].numpy()}
    assert not any(image.tobytes() in seen for image in embedded["eval"][0].numpy())


def test_everything_embedded_is_at_most_30_megabytes():
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 30e6


def test_maker_and_library_agree_on_the_classes(maker):
    assert tuple(maker.CLASSES) == CLASS_NAMES


def test_structure_is_not_a_function_of_the_label(maker):
    _, labels, parts, poses = maker.make_split("train", 100)
    assert parts.max() < len(maker.PART_NAMES) and poses.shape == (100, len(maker.POSE_NAMES))
    for label in range(10):
        present = {tuple(np.unique(p)) for p in parts[labels == label]}
        assert len(present) >= 3, f"all {CLASS_NAMES[label]} have the same parts"


def test_maker_refuses_unknown_labels_and_splits(maker):
    with pytest.raises(ValueError, match="10"):
        maker.draw(10, np.random.default_rng(0))
    with pytest.raises(ValueError, match="'test'"):
        maker.make_one("test", 0)


def test_unknown_split_and_missing_folder(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="unknown split 'test'"):
        load_embedded("test")
    monkeypatch.setenv("REPAE_DATA_SMALL", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="REPAE_DATA_SMALL"):
        load_embedded("eval")


def test_written_file_has_the_official_layout(small, tmp_path):
    images, labels = small
    write_images_h5(tmp_path / "images.h5", images, labels)
    names = json.loads((tmp_path / "images_h5.json").read_text())
    assert names[1] == "00000/img00000001.png" and len(names) == 6
    with h5py.File(tmp_path / "images.h5") as file:
        assert file[names[1]].dtype.kind == "S" and file[names[1]].shape == ()
        assert file[names[1]][()].startswith(b"\x89PNG")
        entries = json.loads(file["dataset.json"][()])["labels"]
    assert entries == [[name, int(label)] for name, label in zip(names, labels, strict=True)]
    dataset = ImageH5Dataset(tmp_path / "images.h5")
    assert len(dataset) == 6 and dataset.num_classes == 3
    for i, (image, label) in enumerate(dataset):
        assert np.array_equal(image.numpy(), images[i]) and label == labels[i]
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "images.h5",
        "images_h5.json",
    ]  # no temporary file stays


@pytest.mark.parametrize("kind", ["void", "uint8"])
def test_other_byte_types_are_read_too(small, tmp_path, kind):
    images, labels = small
    write_images_h5(tmp_path / "images.h5", images, labels)
    with h5py.File(tmp_path / "images.h5", "r+") as file:
        name = "00000/img00000002.png"
        data = file[name][()]
        del file[name]
        file[name] = np.void(data) if kind == "void" else np.frombuffer(data, np.uint8)
        text = file["dataset.json"][()].decode()
        del file["dataset.json"]
        file["dataset.json"] = text  # a variable-length string
    assert np.array_equal(ImageH5Dataset(tmp_path / "images.h5")[2][0].numpy(), images[2])


def test_writing_twice_gives_the_same_bytes(small, tmp_path):
    for name in ("a.h5", "b.h5"):
        write_images_h5(tmp_path / name, *small)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_spawned_workers_read_the_same_images(small, folder, tmp_path):
    images, labels = small
    write_images_h5(tmp_path / "images.h5", images, labels)
    stored, direct = ImageH5Dataset(tmp_path / "images.h5"), ImageFolderDataset(folder, 16)
    stored[0]  # opens the file, which must not travel
    assert pickle.loads(pickle.dumps(stored))._file is None
    loader = DataLoader(
        ConcatDataset([stored, direct]), batch_size=2, num_workers=2, multiprocessing_context="spawn"
    )
    got_images, got_labels = zip(*loader, strict=True)
    order = [0, 3, 1, 4, 2, 5]  # of the folder: by class
    assert np.array_equal(torch.cat(got_images).numpy(), np.concatenate([images, images[order]]))
    assert torch.cat(got_labels).tolist() == [*labels, *labels[order]]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_opens_the_file_itself(small, tmp_path):
    write_images_h5(tmp_path / "images.h5", *small)
    dataset = ImageH5Dataset(tmp_path / "images.h5")
    dataset[0]
    own, (here, there) = dataset._file, multiprocessing.Pipe()

    def read():
        image, _ = dataset[1]
        there.send((np.array_equal(image.numpy(), small[0][1]), dataset._file is own))

    child = multiprocessing.get_context("fork").Process(target=read)
    child.start()
    assert here.recv() == (True, False)
    child.join()


def test_missing_foreign_and_truncated_files(small, tmp_path):
    path = tmp_path / "images.h5"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageH5Dataset(path)
    path.write_bytes(b"not an HDF5 file")
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        ImageH5Dataset(path)
    write_images_h5(path, *small)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        ImageH5Dataset(path)


def relabelled(small, path, content):
    write_images_h5(path, *small)
    with h5py.File(path, "r+") as file:
        del file["dataset.json"]
        if content:
            file["dataset.json"] = np.bytes_(json.dumps(content))
    return path


def test_missing_labels_are_refused_at_once(small, tmp_path):  # D8
    with pytest.raises(ValueError, match=r"no dataset\.json"):
        ImageH5Dataset(relabelled(small, tmp_path / "images.h5", None))


@pytest.mark.parametrize("labels", [None, [[f"00000/img0000000{i}.png", None] for i in range(6)]])
def test_labels_that_are_null_serve_what_needs_no_classes(small, tmp_path, labels):  # D8
    dataset = ImageH5Dataset(relabelled(small, tmp_path / "images.h5", {"labels": labels}))
    assert len(dataset) == 6 and list(dataset.labels) == [0] * 6
    assert np.array_equal(dataset[3][0].numpy(), small[0][3])
    with pytest.raises(
        ValueError, match=r"images\.h5 have no classes, and only train-vae, .* do without: put"
    ):
        TrainingData(dataset, None).require_classes()


def test_one_folder_of_images_serves_what_needs_no_classes(folder, caplog):
    with caplog.at_level("INFO", logger="repae_lite"):
        dataset = ImageFolderDataset(folder / "class 1", 8)
    assert len(dataset) == 2 and "2 images without classes (all lie in one folder)" in caplog.text
    with pytest.raises(ValueError, match=r"have no classes \(all lie in one folder\), and only train-vae"):
        TrainingData(dataset, None).require_classes()


def test_classes_without_images_are_told_before_training(small, tmp_path, caplog):
    images, labels = small
    write_images_h5(tmp_path / "images.h5", images, labels + 1)
    TrainingData(ImageH5Dataset(tmp_path / "images.h5"), None).require_classes()
    assert "1 of the 4 classes have no images, class 0 first" in caplog.text


# ---------------------------------------------------------------- files that cannot be read


def test_one_image_of_another_size_is_named(small, tmp_path):
    path = tmp_path / "images.h5"
    write_images_h5(path, *small)
    with h5py.File(path, "r+") as file:
        del file["00000/img00000004.png"]
        file["00000/img00000004.png"] = np.void(encode_png(np.zeros((24, 20, 3), np.uint8)))
    dataset = open_dataset(path)
    sentence = (
        f"image 00000/img00000004.png in {path} has 24 × 20 pixels and the first one 16 × 16: preprocess all "
        "to one size"
    )
    for workers in (0, 1):
        with pytest.raises(ValueError) as caught:
            list(read_batches(DataLoader(dataset, 3, num_workers=workers)))
        assert str(caught.value) == sentence


HOLDER = "import h5py, sys; f = h5py.File(sys.argv[1], 'r+'); print(flush=True); sys.stdin.read()"


def test_a_file_that_another_program_writes_is_not_called_damaged(small, tmp_path, monkeypatch):
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING", raising=False)
    path = tmp_path / "images.h5"
    write_images_h5(path, *small)
    dataset = pickle.loads(pickle.dumps(ImageH5Dataset(path)))  # as in a loader's process: not open yet
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=PIPE, stdout=PIPE)
    try:
        holder.stdout.readline()
        for read in (lambda: ImageH5Dataset(path), lambda: dataset[0], lambda: open_dataset(tmp_path)):
            with pytest.raises(
                OSError, match=r"images\.h5 is open in another program .*HDF5_USE_FILE_LOCKING"
            ):
                read()
    finally:
        holder.communicate()


def fails(monkeypatch, number, words):
    """Opening fails by the system's error number; without a lock it works, unless None is given."""
    original = h5py.File

    def file(*arguments, **options):
        if options.get("locking") is not False:
            raise OSError(number, words) if number else OSError(words)
        return original(*arguments, **options)

    monkeypatch.setattr(h5py, "File", file)


@pytest.mark.parametrize("number, words, kind, message", [
    (errno.EACCES, "unable to open file", PermissionError, r"may not be read \(Permission denied\): change"),
    (errno.ENOENT, "unable to open file", FileNotFoundError, "does not exist any more: check whether"),
    (errno.EIO, "file read failed", OSError, r"cannot be read now \(Input/output error\): it may be whole"),
    (errno.EMFILE, "unable to open file", OSError, r"cannot be read now \(Too many open files\)"),
    (errno.EAGAIN, "unable to lock file", OSError, "is open in another program"),
    (errno.EACCES, "unable to lock file", OSError, "is open in another program"),
    (None, "file is already open for write", OSError, "is being written by another program, or"),
    (None, "file signature not found", ValueError, r"not a whole HDF5 file \(file signature not found\)"),
    (errno.EINVAL, "file seek failed", ValueError, "not a whole HDF5 file"),
])  # fmt: skip
def test_why_a_file_cannot_be_read_is_told_apart(small, tmp_path, monkeypatch, number, words, kind, message):
    write_images_h5(tmp_path / "images.h5", *small)
    fails(monkeypatch, number, words)
    with pytest.raises(kind, match=message) as caught:
        ImageH5Dataset(tmp_path / "images.h5")
    assert type(caught.value) is kind


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_disks_that_cannot_lock_are_read_without(small, tmp_path, monkeypatch, number):
    write_images_h5(tmp_path / "images.h5", *small)
    fails(monkeypatch, number, "unable to lock file")
    assert len(ImageH5Dataset(tmp_path / "images.h5")) == 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small file of images, and its bytes."""
    path = tmp_path_factory.mktemp("whole") / "images.h5"
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4), dtype=np.uint8)
    write_images_h5(path, images, np.arange(3), compress=False)
    return path, path.read_bytes(), images


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_is_one_sentence_that_names_the_file_or_does_no_harm(whole, data):
    path, content, images = whole
    changed = bytes_changed(content, data)
    end = data.draw(st.integers(0, len(content))) if data.draw(st.integers(0, 9)) == 0 else len(content)
    path.write_bytes(changed[:end])
    try:
        dataset = ImageH5Dataset(path)
        found = [dataset[i] for i in range(len(dataset))]
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:  # a label or a name may have become another; pixels have checksums
        for image, _ in found:
            assert any(np.array_equal(image.numpy(), one) for one in images)


def test_missing_and_unreadable_images(small, tmp_path):
    path = tmp_path / "images.h5"
    write_images_h5(path, *small)
    with h5py.File(path, "r+") as file:
        del file["00000/img00000003.png"]
        file["00000/img00000003.png"] = np.bytes_(b"not a PNG")
    dataset = ImageH5Dataset(path)
    with pytest.raises(
        ValueError, match=r"img00000003\.png .* cannot be decoded \(not an image in a known format\): write"
    ):
        dataset[3]
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["dataset.json"] = np.bytes_(json.dumps({"labels": [["00000/img00000000.png", 0]]}))
    with pytest.raises(ValueError, match="lacks 1 images"):
        ImageH5Dataset(tmp_path / "other.h5")


@pytest.mark.parametrize("name", ["dataset.json", "00000/img00000003.png"])
@pytest.mark.parametrize("make, kind", [
    (lambda file, name: file.create_group(name), "an HDF5 group"),
    (lambda file, name: file.create_dataset(name, data=h5py.Empty("S1")), "empty"),
])  # fmt: skip
def test_what_is_no_bytes_is_refused(small, tmp_path, name, make, kind):
    path = tmp_path / "images.h5"
    write_images_h5(path, *small)
    with h5py.File(path, "r+") as file:
        del file[name]
        make(file, name)
    with pytest.raises(
        ValueError, match=rf"{name} in .*images\.h5 is {kind} instead of bytes: write the file again"
    ):
        ImageH5Dataset(path)[3]


@pytest.mark.parametrize("labels, message", [
    ([["00000/img00000000.png", "cat"]], "whole numbers from 0 up"),
    ([["00000/img00000000.png", -1]], "whole numbers from 0 up"),
    ([["00000/img00000000.png", 0]] * 2, "1 names twice"),
    (["00000/img00000000.png"], "cannot be read"),
])  # fmt: skip
def test_labels_that_are_none_are_refused(small, tmp_path, labels, message):
    path = tmp_path / "images.h5"
    write_images_h5(path, *small)
    with h5py.File(path, "r+") as file:
        del file["dataset.json"]
        file["dataset.json"] = np.bytes_(json.dumps({"labels": labels}))
    with pytest.raises(ValueError, match=message):
        ImageH5Dataset(path)


def test_a_folder_is_cropped_as_it_is_read(small, folder):
    dataset = ImageFolderDataset(folder, 8)
    assert len(dataset) == 6 and dataset.num_classes == 3 and list(dataset.labels) == [0, 0, 1, 1, 2, 2]
    assert dataset.names[1] == "class 0/3.png"
    image, label = dataset[1]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and image.is_contiguous() and label == 0
    blocks = small[0][3].reshape(3, 8, 2, 8, 2).mean(axis=(2, 4))  # one halving
    assert np.abs(image.numpy() - blocks).max() <= 1


def test_unreadable_and_missing_files_of_a_folder(folder):
    (folder / "class 1" / "1.png").write_bytes(b"not a PNG")
    dataset = ImageFolderDataset(folder, 8)
    with pytest.raises(
        ValueError, match=r"1\.png cannot be read \(not an image in a known format\): repair or remove it"
    ):
        dataset[2]
    (folder / "dataset.json").write_text(
        json.dumps({"labels": [[name, 0] for name in [*dataset.names, "gone.png"]]})
    )
    with pytest.raises(ValueError, match=r"lacks 1 images that dataset\.json lists, gone\.png first"):
        ImageFolderDataset(folder, 8)
    with pytest.raises(ValueError, match="resolution is 0 pixels"):
        ImageFolderDataset(folder, 0)


def test_a_dataset_is_opened_by_what_lies_there(small, folder, tmp_path):
    data = tmp_path / "data"
    write_images_h5(data / "images.h5", *small)
    for path in (data, data / "images.h5"):
        assert isinstance(open_dataset(path), ImageH5Dataset) and len(open_dataset(path, 16)) == 6
    assert isinstance(open_dataset(folder, 16), ImageFolderDataset)


def test_what_cannot_be_opened_is_refused(small, folder, tmp_path):
    write_images_h5(tmp_path / "data" / "images.h5", *small)
    with pytest.raises(
        ValueError, match=r"have 16 × 16 pixels and not 32 × 32: preprocess with --resolution 32"
    ):
        open_dataset(tmp_path / "data", 32)
    with pytest.raises(ValueError, match="give the resolution to crop them to, as in --resolution 256"):
        open_dataset(folder)
    with pytest.raises(FileNotFoundError, match="there is no image file or folder"):
        open_dataset(tmp_path / "nowhere", 16)
    (tmp_path / "unfinished" / "images.h5.partial").mkdir(parents=True)
    with pytest.raises(ValueError, match="has not finished: run the same command again"):
        open_dataset(tmp_path / "unfinished", 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_dataset(tmp_path / "empty", 16)
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(ValueError, match="not a whole HDF5 file"):
        open_dataset(tmp_path / "text.h5")


def test_a_machine_in_trouble_is_not_blamed_on_an_image(folder, tmp_path, monkeypatch):
    dataset = ImageFolderDataset(folder, 8)
    for error, kind in (
        (OSError(errno.EMFILE, "Too many open files"), OSError),
        (MemoryError(), MemoryError),
    ):

        def refuse(path, error=error):
            raise error

        monkeypatch.setattr(datasets, "read_image", refuse)
        with pytest.raises(kind) as caught:
            dataset[0]
        assert "repair" not in str(caught.value)
    os.mkfifo(tmp_path / "pipe.h5")  # opening it would wait for ever
    with pytest.raises(FileNotFoundError, match=r"pipe\.h5 is no file: check the path"):
        open_dataset(tmp_path / "pipe.h5")


def test_writer_refuses_other_shapes_and_dtypes(small, tmp_path):
    images, labels = small
    for bad in (images.astype(np.float32), images.transpose(0, 2, 3, 1), images[:3]):
        with pytest.raises(ValueError, match=r"give uint8 \(N, 3, H, W\)"):
            write_images_h5(tmp_path / "images.h5", bad, labels)
    assert not list(tmp_path.iterdir())


def test_pixels_and_unit_range_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_unit_range(pixels)
    assert x.dtype == torch.float32 and x[0] == -1 and x[-1] == 1
    assert torch.equal(to_uint8(x), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"float32.*uint8"):
        to_unit_range(x)


@pytest.mark.parametrize(("shape", "dtype"), [((1 << 32,), "u1"), ((1,), "S2000000000")])
def test_chunks_that_were_never_written_take_no_memory(tmp_path, shape, dtype):
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file.create_dataset("dataset.json", shape=shape, dtype=dtype, chunks=(min(shape[0], 1 << 20),))
    with pytest.raises(ValueError, match="instead of bytes"):
        open_dataset(tmp_path)
