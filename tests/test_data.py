"""Images: the shipped dataset is what its maker makes, and every unreadable file is refused in a sentence."""

import hashlib
import importlib.util
import json
import pickle
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from repae_lite.data import CLASS_NAMES, ImageH5Dataset, load_embedded, to_uint8, to_unit_range, write_images_h5

FOLDER = Path(__file__).resolve().parent.parent / "data_small"
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


def test_everything_embedded_is_at_most_20_megabytes():
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 20e6


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
    assert sorted(f.name for f in tmp_path.iterdir()) == ["images.h5", "images_h5.json"]  # no temporary file stays


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


def test_spawned_workers_read_the_same_images(small, tmp_path):
    images, labels = small
    write_images_h5(tmp_path / "images.h5", images, labels)
    dataset = ImageH5Dataset(tmp_path / "images.h5")
    dataset[0]  # opens the file, which must not travel
    assert pickle.loads(pickle.dumps(dataset))._file is None
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="spawn")
    got_images, got_labels = zip(*loader, strict=True)
    assert np.array_equal(torch.cat(got_images).numpy(), images)
    assert torch.cat(got_labels).tolist() == labels.tolist()


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


@pytest.mark.parametrize("content, message", [(None, "no dataset.json"), ({"labels": None}, "has no labels")])
def test_missing_labels_are_refused_at_once(small, tmp_path, content, message):  # D8
    path = tmp_path / "images.h5"
    write_images_h5(path, *small)
    with h5py.File(path, "r+") as file:
        del file["dataset.json"]
        if content:
            file["dataset.json"] = np.bytes_(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        ImageH5Dataset(path)


def test_missing_and_unreadable_images(small, tmp_path):
    path = tmp_path / "images.h5"
    write_images_h5(path, *small)
    with h5py.File(path, "r+") as file:
        del file["00000/img00000003.png"]
        file["00000/img00000003.png"] = np.bytes_(b"not a PNG")
    dataset = ImageH5Dataset(path)
    with pytest.raises(ValueError, match=r"img00000003\.png .* cannot be decoded"):
        dataset[3]
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["dataset.json"] = np.bytes_(json.dumps({"labels": [["00000/img00000000.png", 0]]}))
    with pytest.raises(ValueError, match="lacks 1 images"):
        ImageH5Dataset(tmp_path / "other.h5")


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
