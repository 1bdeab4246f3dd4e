"""Names in one array are the names; what is kept of a large file is what looking through it would find."""

import pickle

import h5py
import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repae_lite.data import datasets
from repae_lite.data.datasets import ImageFolderDataset, ImageH5Dataset
from repae_lite.data.hdf5 import write_images_h5
from repae_lite.data.index import Names, kept_index

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXT))
def test_names_are_a_sequence_like_any_other(texts):
    names = Names.of(texts)
    assert len(names) == len(texts) and list(names) == texts and names == texts
    assert [names[i] for i in range(-len(texts), len(texts))] == texts * 2
    assert names[1:-1] == texts[1:-1] and names[::-2] == texts[::-2]
    assert names != [*texts, "another"] and pickle.loads(pickle.dumps(names)) == names
    for outside in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            names[outside]


def test_undecodable_names_stay_what_they_are():
    assert list(Names.of(["\udce9.png", "é"])) == ["\udce9.png", "é"]


def test_a_million_names_take_no_more_than_their_bytes():
    names = Names.of(f"{i // 1000:05d}/img{i:08d}.png" for i in range(10**5))
    assert names[99_999] == "00099/img00099999.png"
    assert len(pickle.dumps(names)) < 31 * 10**5  # 22 bytes each, and 8 to find it


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A cache of the test's own, and every file is large."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr(datasets, "LARGE", 0)
    return tmp_path / "assets"


@pytest.fixture
def looked(monkeypatch):
    """The calls that look through a file."""
    calls, look = [], datasets.missing_names
    monkeypatch.setattr(datasets, "missing_names", lambda *args: calls.append(args) or look(*args))
    return calls


def test_a_large_file_is_looked_through_once(tmp_path, assets, looked):
    path, images = tmp_path / "images.h5", np.zeros((3, 3, 8, 8), np.uint8)
    write_images_h5(path, images, [0, 1, 2])
    first, again = ImageH5Dataset(path), ImageH5Dataset(path)
    assert len(looked) == 1 and len(list(assets.rglob("*.npz"))) == 1
    assert again.names == first.names and list(again.labels) == list(first.labels) == [0, 1, 2]
    assert again.num_classes == 3 and not again.no_classes and type(again[2][1]) is int
    write_images_h5(path, images[:2], [0, 4])
    changed = ImageH5Dataset(path)
    assert len(looked) == 2 and list(changed.labels) == [0, 4] and changed.num_classes == 5
    for index in assets.rglob("*.npz"):
        index.write_bytes(index.read_bytes()[:-40])
    assert list(ImageH5Dataset(path).labels) == [0, 4] and len(looked) == 3


def test_a_small_file_is_not_kept(tmp_path, assets, looked, monkeypatch):
    monkeypatch.setattr(datasets, "LARGE", 1 << 20)
    write_images_h5(tmp_path / "images.h5", np.zeros((3, 3, 8, 8), np.uint8), [0, 1, 2])
    for _ in range(2):
        assert len(ImageH5Dataset(tmp_path / "images.h5")) == 3
    assert len(looked) == 2 and not assets.exists()


def test_images_without_classes_are_kept_as_such(tmp_path, assets):
    write_images_h5(tmp_path / "images.h5", np.zeros((2, 3, 8, 8), np.uint8), [0, 0])
    with h5py.File(tmp_path / "images.h5", "r+") as file:
        del file["dataset.json"]
        file["dataset.json"] = np.void(b'{"labels": null}')
    for _ in range(2):
        dataset = ImageH5Dataset(tmp_path / "images.h5")
        assert dataset.no_classes and list(dataset.labels) == [0, 0] and dataset.num_classes == 1


def test_what_is_refused_is_not_kept(tmp_path, assets):
    (tmp_path / "file").touch()

    def refuse():
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            kept_index("test", [tmp_path / "file"], refuse)
    assert not assets.exists()


def test_kinds_are_kept_apart(tmp_path, assets):
    (tmp_path / "file").touch()
    for kind, value in (("a", 1), ("b", 2), ("a", 1)):
        found = kept_index(kind, [tmp_path / "file"], lambda value=value: {"x": np.array([value])})
        assert found["x"].tolist() == [value]
    assert len(list(assets.rglob("*.npz"))) == 2


def test_a_folder_keeps_its_names_in_one_array(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    dataset = pickle.loads(pickle.dumps(ImageFolderDataset(tmp_path, 8)))
    assert isinstance(dataset.names, Names) and dataset.names == ["a/1.png", "b/1.png"]
    assert dataset[1][1] == 1 and type(dataset[1][1]) is int
