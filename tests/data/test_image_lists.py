"""Folders of images: labels are numbered or refused, never guessed, and what is taken and left is said."""

import json
import os
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from repae_lite.commands.main import main
from repae_lite.data import preprocessing
from repae_lite.data.image_lists import MOST_CLASSES, list_images, parse_labels


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_class_folders_are_numbered_in_sorted_order(tmp_path):
    touch(
        tmp_path,
        "n02/b.JPEG",
        "n02/a.png",
        "n01/deep/er/c.webp",
        "n10/d.tiff",
        "n01/x.jpg",
        "n02/notes.txt",
        "README",
    )
    touch(tmp_path, "n01/.DS_Store", ".cache/x.png", "__MACOSX/n02/._b.jpg")
    found = list_images(tmp_path)
    assert found.names == ["n01/deep/er/c.webp", "n01/x.jpg", "n02/a.png", "n02/b.JPEG", "n10/d.tiff"]
    assert (
        found.labels == [0, 0, 1, 1, 2]
        and found.class_names == ["n01", "n02", "n10"]
        and found.num_classes == 3
    )
    assert found.ignored == {".txt": 1, "without suffix": 1} and found.root == tmp_path


def test_the_training_split_of_a_data_set_is_entered(tmp_path):
    touch(tmp_path, "train/n01/a.png", "train/n02/b.png", "val/n01/c.png", "LOC_synset_mapping.txt")
    assert list_images(tmp_path).root == tmp_path / "train"
    assert list_images(tmp_path).names == list_images(tmp_path / "train").names == ["n01/a.png", "n02/b.png"]


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, "train/a.png", "bus/b.png")
    assert list_images(tmp_path).class_names == ["bus", "train"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "images/b/1.png", "elsewhere/2.png")
    (tmp_path / "images" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "b" / "up").symlink_to(tmp_path / "images")
    assert list_images(tmp_path / "images").names == ["a/2.png", "b/1.png"]


def write_labels(folder, labels):
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_a_dataset_json_decides(tmp_path):
    touch(tmp_path, "x/b.png", "x/a.png", "c.png")
    write_labels(tmp_path, [["x\\b.png", 7], ["x/a.png", 0], ["./c.png", 3], ["gone.png", 1]])
    found = list_images(tmp_path)
    assert found.names == ["c.png", "gone.png", "x/a.png", "x/b.png"] and found.labels == [3, 1, 0, 7]
    assert found.missing == ["gone.png"] and found.num_classes == 8 and found.class_names == []


def test_a_dataset_json_without_labels_leaves_it_to_the_folders(tmp_path):
    touch(tmp_path, "x/b.png", "y/a.png")
    write_labels(tmp_path, None)
    assert list_images(tmp_path).class_names == ["x", "y"]


@pytest.mark.parametrize("names, message", [
    ([], "holds no images: looked in all"),
    (["a.txt", "b/c.md"], "holds no images"),
    (["a.png", "x/b.png", "y/c.png"], r"1 images lie beside the class folders .*, a\.png first"),
    (["x/b.png", "y/c.png", "z/notes.txt"], r"the class folder z .* holds no images"),
])  # fmt: skip
def test_folders_without_clear_classes_are_refused(tmp_path, names, message):  # D8
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path)


def test_missing_folders_and_files_are_told_apart(tmp_path):
    touch(tmp_path, "file")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a file"):
        list_images(tmp_path / "file")


def test_images_without_labels_are_refused(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    write_labels(tmp_path, [["a.png", 0]])
    with pytest.raises(ValueError, match=r"dataset\.json has no label for 2 images, b\.png first"):
        list_images(tmp_path)


@pytest.mark.parametrize("text, message", [
    ("not json", "cannot be read"),
    ("[]", "cannot be read"),
    ('{"labels": [["a.png"]]}', "cannot be read"),
    ('{"labels": 3}', "cannot be read"),
    ('{"labels": [["a.png", -1]]}', r"'a\.png' the label -1"),
    ('{"labels": [["a.png", 0.5]]}', r"'a\.png' the label 0\.5"),
    ('{"labels": [["a.png", true]]}', "the label True"),
    ('{"labels": [["a.png", [0, 1]]]}', "whole numbers from 0 up"),
    ('{"labels": [[5, 1]]}', "gives 5 the label 1"),
    ('{"labels": [["a.png", 0], ["a.png", 1]]}', "1 names twice"),
])  # fmt: skip
def test_labels_that_cannot_be_meant_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_labels(text, "dataset.json")


def test_labels_may_be_a_mapping():
    assert parse_labels(b'{"labels": {"a.png": 1}}', "it") == [("a.png", 1)]


@pytest.mark.parametrize("names, reason", [
    (["a.png", "b.png"], "all lie in one folder"),  # D8
    (["only/a.png", "only/b.png"], "all lie in one folder"),
    (["a.png", "b.png", "notes/c.txt"], "all lie in one folder"),
    (["one.png"], "all lie in one folder"),
    (["images/a.png", "captions/a.txt"], "all lie in one folder"),
    (["00000/img00000000.png", "00001/img00001000.png"], "its folders only number the images"),
])  # fmt: skip
def test_images_may_have_no_classes(tmp_path, names, reason):
    touch(tmp_path, *names)
    found = list_images(tmp_path)
    assert found.no_classes == reason and set(found.labels) == {0} and found.class_names == []
    assert f"without classes ({reason})" in found.summary()[0]


def test_a_dataset_json_may_say_that_images_beside_folders_have_no_classes(tmp_path):
    touch(tmp_path, "a.png", "x/b.png", "y/c.png")
    write_labels(tmp_path, None)
    assert list_images(tmp_path).no_classes == "dataset.json has no labels"


# ---------------------------------------------------------------- what is left out, and said


SYSTEM = (
    "@eaDir #recycle #snapshot .snapshot lost+found $RECYCLE.BIN .Spotlight-V100 .Trashes .ipynb_checkpoints "
    "__pycache__ __MACOSX .idea .vscode .git .thumbnails .AppleDouble"
).split() + ["System Volume Information"]


@pytest.mark.parametrize("system", SYSTEM)
def test_system_folders_are_no_classes(tmp_path, system):
    touch(tmp_path, "a/1.png", "b/2.png", f"{system}/3.png", f"a/{system}/4.png")
    found = list_images(tmp_path)
    assert found.names == ["a/1.png", "b/2.png"] and found.class_names == ["a", "b"]
    assert found.left_out == {system: 2} and f"left out: {system} (2)" in found.summary()


def test_system_files_are_no_images(tmp_path):
    names = [
        "Thumbs.db",
        "desktop.ini",
        ".DS_Store",
        "._1.png",
        "._2.png",
        "1.png~",
        "~$1.png",
        "ehthumbs.db",
    ]
    touch(tmp_path, "a/1.png", "b/2.PNG", *(f"a/{name}" for name in names))
    found = list_images(tmp_path)
    assert found.names == ["a/1.png", "b/2.PNG"] and not found.ignored
    assert found.left_out == {"Thumbs.db": 1, "desktop.ini": 1, "ehthumbs.db": 1, "hidden files": 5}


def test_what_is_no_file_is_left_out(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "folder.png").mkdir()
    (tmp_path / "b" / "loop.txt").symlink_to("loop.txt")
    found = list_images(tmp_path)
    assert found.names == ["a/1.png", "b/2.png"] and found.left_out == {"pipes, sockets and devices": 1}


@pytest.mark.parametrize("train", ["train", "Train", "training", "TRAINING"])
@pytest.mark.parametrize("other", ["val", "validation", "Test"])
def test_splits_are_no_classes(tmp_path, train, other):
    touch(tmp_path, f"{train}/n01/a.png", f"{train}/n02/b.png", f"{other}/n01/c.png", "README.md")
    found = list_images(tmp_path)
    assert found.root == tmp_path / train and found.class_names == ["n01", "n02"]
    assert found.left_out == {f"the folder {other} beside {train}": 1}


def test_flat_splits_are_no_classes(tmp_path):
    touch(tmp_path, "train/a.png", "train/b.png", "val/c.png")
    found = list_images(tmp_path)
    assert found.names == ["a.png", "b.png"] and found.no_classes


@pytest.mark.parametrize("names, message", [
    (["val/a/1.png", "test/a/2.png"], r"no training split \(test, val\): give the folder of the one"),
    (["val/1.png"], r"no training split \(val\)"),
    (["train/a/1.png", "Train/a/1.png"], r"several training splits \(Train, train\)"),
    (["cat/1.png", "dog/2.png", "val/cat/3.png", "val/dog/4.png"], "the folder val .* as a split does"),
])  # fmt: skip
def test_unclear_splits_are_refused(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path)


@pytest.mark.parametrize("start", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_the_layout_of_imagenet_is_entered(tmp_path, start):
    data = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    touch(data, "train/n01/a.JPEG", "train/n02/b.JPEG", "val/c.JPEG", "test/d.JPEG")
    touch(tmp_path / "ILSVRC", "Annotations/CLS-LOC/train/n01/a.xml", "ImageSets/CLS-LOC/val.txt")
    found = list_images(tmp_path / start)
    assert found.root == data / "train" and found.names == ["n01/a.JPEG", "n02/b.JPEG"]
    assert {"the folder test beside train", "the folder val beside train"} <= found.left_out.keys()


def test_the_layout_of_repa_is_entered(tmp_path):
    touch(tmp_path, "images/00000/img00000000.png", "vae-sd/00000/img-mean-std-00000000.npy")
    assert list_images(tmp_path).root == tmp_path / "images" and list_images(tmp_path).no_classes
    write_labels(tmp_path / "images", [["00000/img00000000.png", 3]])
    assert list_images(tmp_path).labels == [3]


def test_a_folder_in_a_folder_is_entered_for_its_splits(tmp_path):
    touch(tmp_path, "imagenet100/train/a/1.png", "imagenet100/train/b/2.png", "imagenet100/val/a/3.png")
    assert list_images(tmp_path).root == tmp_path / "imagenet100" / "train"


def test_links_list_each_folder_once(tmp_path):
    touch(tmp_path, "in/a/1.png", "in/b/2.png", "out/c/3.png", "out/deep/4.png")
    for folder in "ab":
        (tmp_path / "in" / folder / "other").symlink_to(tmp_path / "in" / "ba"[folder == "b"])
        (tmp_path / "in" / folder / "up").symlink_to(tmp_path)
    (tmp_path / "in" / "c").symlink_to(tmp_path / "out" / "c")
    (tmp_path / "in" / "d").symlink_to(tmp_path / "out" / "c")
    (tmp_path / "in" / "e").symlink_to(tmp_path / "out")
    found = list_images(tmp_path / "in")
    assert found.names == ["a/1.png", "b/2.png", "c/3.png", "e/deep/4.png"]
    assert found.class_names == ["a", "b", "c", "e"]
    assert "the link d to a folder that is listed already" in found.left_out and len(found.left_out) == 5


def test_an_empty_class_folder_keeps_its_number_and_is_told(tmp_path):
    touch(tmp_path, "a/1.png", "c/2.png")
    (tmp_path / "b").mkdir()
    found = list_images(tmp_path)
    assert found.class_names == ["a", "b", "c"] and found.labels == [0, 2]
    assert any("1 of the 3 classes have no images, class 1 first" in line for line in found.summary())


def test_labels_that_start_at_one_are_told(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    write_labels(tmp_path, [["a.png", 1], ["b.png", 2.0]])
    found = list_images(tmp_path)
    assert found.labels == [1, 2]
    assert any("1 of the 3 classes have no images, class 0 first" in line for line in found.summary())


@pytest.mark.parametrize("name, remedy", [
    ("a.zip", "unzip it"), ("a.tar", "unpack it"), ("a.tar.gz", "unpack it"),
    ("a.parquet", "write its images"),
])  # fmt: skip
def test_archives_are_told(tmp_path, name, remedy):
    touch(tmp_path, name)
    with pytest.raises(ValueError, match=rf"is an archive: {remedy}"):
        list_images(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds no images, but 1 \.\w+ files: unpack them"):
        list_images(tmp_path)


# ---------------------------------------------------------------- spellings


@pytest.mark.parametrize("spelling", ["./x/é.png", "x//é.png", "x\\é.png", "x/./é.png"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_names_are_matched_in_any_spelling(tmp_path, spelling, form, listed):
    name = unicodedata.normalize(form, "x/é.png")
    touch(tmp_path, name)
    write_labels(tmp_path, [[unicodedata.normalize(listed, spelling), 4]])
    found = list_images(tmp_path)
    assert found.names == [name] and found.labels == [4] and not found.missing


@pytest.mark.parametrize(
    "other", ["./x/é.png", "x//é.png", "x\\é.png", unicodedata.normalize("NFD", "x/é.png")]
)
def test_two_spellings_of_one_image_are_refused(other):
    with pytest.raises(ValueError, match=r"1 names twice, .* first: list every image once, in one spelling"):
        parse_labels(json.dumps({"labels": [["x/é.png", 0], [other, 1]]}), "dataset.json")


def test_two_spellings_of_one_class_are_refused(tmp_path):
    touch(tmp_path, *(unicodedata.normalize(form, f"é/{form}.png") for form in ("NFC", "NFD")), "x/1.png")
    with pytest.raises(ValueError, match=r"two class folders .* differ only in their Unicode form"):
        list_images(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_text_are_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preprocessing.logger, "disabled", True)  # pytest-xdist cannot send such names
    for name in (b"a/\xff.png", b"b\xfe/2.png"):
        path = os.path.join(os.fsencode(tmp_path / "in"), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.new("RGB", (8, 8)).save(os.fsdecode(path))
    words = (
        f"preprocess --imagenet-path {tmp_path}/in --output-path {tmp_path}/out --resolution 8 --workers 1"
    )
    assert main([*words.split(), "--dry-run"]) == 0 and main(words.split()) == 0
    assert "2 images" in capsys.readouterr().out


# ---------------------------------------------------------------- any dataset.json


@pytest.mark.parametrize("text, message", [
    ('{"labels": [["a.png", 15000000]]}', r"lists 1 images and gives 'a\.png' the label 15000000: number"),
    ('{"labels": [["a.png", 1e400]]}', "the label inf: labels are whole numbers"),
    ('{"labels": [["a.png", NaN]]}', "the label nan"),
    ('{"labels": [["a.png", ' + "9" * 5000 + "]]}", "cannot be read"),
    ('{"labels": [["a.png", ' + "9" * 3000 + "]]}", "…: number the classes from 0"),
    ('{"labels": ' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read"),
    ('{"labels": {"a.png": 1, "a.png": 2}}', r"cannot be read .*, it has 'a\.png' twice"),
    ('{"labels": null, "labels": [["a.png", 1]]}', "it has 'labels' twice"),
    ('{"labels": [["a.png", 1], ["b.png", null]]}', r"'b\.png' the label None"),
])  # fmt: skip
def test_odd_label_files_are_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_labels(text, "dataset.json")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", [
    b'{"labels": null}', b'{"labels": []}', b'{"labels": [["a.png", null], ["b.png", null]]}', b"{}",
])  # fmt: skip
def test_labels_of_neighbouring_tools_may_be_null(text):
    assert parse_labels(text, "it") == []


def test_a_byte_order_mark_and_whole_floats_are_read():
    assert parse_labels(b'\xef\xbb\xbf{"labels": [["a.png", 1.0]]}', "it") == [("a.png", 1)]


def test_more_classes_than_usual_are_taken_if_there_are_as_many_images():
    pairs = [[f"{i}.png", i] for i in range(MOST_CLASSES + 1)]
    assert len(parse_labels(json.dumps({"labels": pairs}), "it")) == MOST_CLASSES + 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(VALUES | st.fixed_dictionaries({"labels": VALUES | st.lists(st.tuples(st.text(max_size=3), VALUES))}))
def test_any_json_is_labels_or_one_sentence(value):
    try:
        pairs = parse_labels(json.dumps(value), "the file")
    except ValueError as error:
        assert str(error).startswith("the file ") and "\n" not in str(error)
    else:
        assert all(isinstance(name, str) and type(label) is int and label >= 0 for name, label in pairs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=40))
def test_any_bytes_are_labels_or_one_sentence(data):
    try:
        assert parse_labels(data, "the file") == []
    except ValueError as error:
        assert str(error).startswith("the file ") and "\n" not in str(error)


@pytest.mark.parametrize(("train", "val"), [("train2017", "val2017"), ("Train_256x256", "test-64px")])
def test_splits_with_a_size_or_a_year_are_no_classes(tmp_path, train, val):
    touch(tmp_path, f"{train}/a/1.png", f"{train}/b/1.png", f"{val}/a/1.png")
    found = list_images(tmp_path)
    assert found.root == tmp_path / train and found.class_names == ["a", "b"]
    touch(tmp_path / "classes", "test1/1.png", "test2/1.png")
    assert list_images(tmp_path / "classes").class_names == ["test1", "test2"]


@pytest.mark.parametrize("name", ["../b.png", "/etc/b.png", "a/../../b.png", "..\\b.png"])
def test_a_list_leads_to_no_file_outside_of_its_folder(tmp_path, name):
    touch(tmp_path, "in/a.png", "b.png")
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"labels": [["a.png", 0], [name, 1]]}))
    with pytest.raises(ValueError, match="leads out of its folder"):
        list_images(tmp_path / "in")
