"""Shards are the same data as a folder of their images; what is wrong with them is told in one sentence."""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile

import huggingface_hub
import numpy as np
import pytest
import torch
from damage import bytes_changed
from hub_stand_in import HubStandIn
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_runs import assert_same_run, run
from torch.utils.data import DataLoader

from repae_lite.commands.main import main
from repae_lite.data import shards as module
from repae_lite.data.datasets import ImageFolderDataset, ShardDataset, open_dataset
from repae_lite.data.shards import find_shards
from repae_lite.data.training_data import TrainingData
from repae_lite.training.build import open_data
from repae_lite.training.config import TrainConfig
from repae_lite.training.parallel import StepBatches, share_of

COUNT, SIZE = 12, 16
LABELS = [i % 3 for i in range(COUNT)]


def png(seed, size=SIZE):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path, members):
    """A tar with these members, {name: bytes}, as WebDataset's writer makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def samples(numbers, labelled=".cls"):
    """Members of these images, with their classes in the way that is asked for."""
    found = {}
    for i in numbers:
        found[f"part/{i:04d}.png"] = png(i)
        if labelled == ".cls":
            found[f"part/{i:04d}.cls"] = f"{LABELS[i]}\n".encode()
        elif labelled == ".json":
            found[f"part/{i:04d}.json"] = json.dumps({"caption": "an image", "label": LABELS[i]}).encode()
    return found


@pytest.fixture(autouse=True, scope="module")
def assets(tmp_path_factory):
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("assets")
        patched.setattr(constants, "HF_ASSETS_CACHE", str(folder))
        yield folder


@pytest.fixture
def folder(tmp_path):
    """A folder of four shards."""
    for number in range(4):
        write(tmp_path / "data" / f"train-{number:03d}.tar", samples(range(3 * number, 3 * number + 3)))
    return tmp_path / "data"


@pytest.fixture
def images(tmp_path):
    """The same images in class folders; the first five letters of a name are its number."""
    for i, label in enumerate(LABELS):
        path = tmp_path / "images" / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return ImageFolderDataset(tmp_path / "images", 8)


def test_shards_hold_what_the_images_in_a_folder_are(folder, images, caplog):
    with caplog.at_level("INFO", logger="repae_lite"):
        dataset = open_dataset(folder, 8)
    assert isinstance(dataset, ShardDataset) and len(dataset) == COUNT and dataset.num_classes == 3
    assert f"{folder}: 12 images of 3 classes in 4 shards" in caplog.text and not dataset.no_classes
    assert dataset.names[4] == "train-001.tar/part/0004.png" and list(dataset.labels) == LABELS
    expected = {name[-8:]: images[i] for i, name in enumerate(images.names)}
    for i, name in enumerate(dataset.names):
        (image, label), (other, number) = dataset[i], expected[name[-8:]]
        assert torch.equal(image, other) and label == number and image.dtype == torch.uint8
    TrainingData(dataset, None).require_classes()


@pytest.mark.parametrize("source", ["a/train-{003..001}.tar", "hf://datasets/a/b/train-{3..1}.tar"])
def test_a_range_that_runs_backwards_is_refused(source):
    with pytest.raises(ValueError, match=r"the range \{0*3\.\.0*1\} in .*train-.* is empty: put its smaller"):
        find_shards(source)


def test_a_range_a_folder_and_the_files_are_the_same_data(folder, monkeypatch):
    whole = find_shards(folder)
    assert [path.name for path in whole] == [f"train-{number:03d}.tar" for number in range(4)]
    assert find_shards(folder / "train-{000..003}.tar") == whole
    assert find_shards(f"{folder}/train-00{{0..1}}.tar") == whole[:2]
    assert find_shards(f"{folder}/train-{{0..0}}0{{1..2}}.tar") == whole[1:3]
    assert find_shards(folder / "train-003.tar") == whole[3:]
    (folder / "README.md").write_text("about the shards")
    (folder / ".git").mkdir()
    assert find_shards(folder) == whole
    by_range, by_folder = (
        TrainingData(open_dataset(folder / name, 8), None) for name in ("train-{000..003}.tar", "")
    )
    assert by_range.fingerprint == by_folder.fingerprint
    monkeypatch.chdir(folder)
    assert TrainingData(open_dataset("train-{000..003}.tar", 8), None).fingerprint == by_range.fingerprint


def test_shards_on_several_disks_are_one_data_set(folder, tmp_path):
    for number in range(4):
        other = tmp_path / f"disk{number % 2}" / f"train-{number // 2}.tar"
        other.parent.mkdir(exist_ok=True)
        shutil.move(folder / f"train-{number:03d}.tar", other)
    dataset = open_dataset(tmp_path / "disk{0..1}" / "train-{0..1}.tar", 8)
    assert len(dataset) == COUNT and dataset.names[3] == "disk0/train-1.tar/part/0006.png"


def test_resuming_and_shares_are_exact(folder):
    """Any step's images follow from the seed and the step, and processes share them."""

    def run(steps, rank=0, processes=1):
        data = TrainingData(pickle.loads(pickle.dumps(open_dataset(folder, 8))), None)
        share = share_of(4, rank, processes)
        batches = StepBatches(len(data), batch=4, share=share, seed=5, steps=steps)
        return [(batch["image"], batch["label"]) for batch in DataLoader(data, batch_sampler=batches)]

    whole, resumed = run(range(7)), run(range(4, 7))
    halves = [run(range(4, 7), rank, 2) for rank in range(2)]
    for step in range(3):
        for i in range(2):
            assert torch.equal(whole[4 + step][i], resumed[step][i])
            assert torch.equal(whole[4 + step][i], torch.cat([half[step][i] for half in halves]))
    epoch = torch.cat([image for image, _ in whole[3:6]])  # every image once
    assert len({image.numpy().tobytes() for image in epoch}) == COUNT


def test_a_run_on_shards_goes_on_to_the_bit(folder, tmp_path):
    """Three steps are an epoch; the run is stopped in the second one, and goes on with loader processes."""
    options = {"data_dir": str(folder)}
    straight = run(tmp_path, "straight", num_workers=0, **options)
    run(tmp_path, "parts", max_train_steps=4, num_workers=0, **options)
    parts = run(tmp_path, "parts", resume="latest", num_workers=2, **options)
    assert_same_run(straight, parts)
    words = (tmp_path / "damaged", {"data_dir": str(folder / "train-{000..002}.tar")})
    shutil.copytree(tmp_path / "parts", words[0] / "parts")
    with pytest.raises(ValueError, match="data"):
        run(words[0], "parts", max_train_steps=8, resume="latest", **words[1])


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize("labelled", [".cls", ".json"])
def test_classes_stand_beside_the_images(tmp_path, labelled):
    write(tmp_path / "a.tar", samples(range(COUNT), labelled))
    assert list(open_dataset(tmp_path / "a.tar", 8).labels) == LABELS


def test_images_without_classes_serve_what_needs_none(tmp_path):
    members = samples(range(3), "") | {"part/0001.json": b'{"caption": "no class"}', "part/0002.txt": b"1"}
    dataset = open_dataset(write(tmp_path / "a.tar", members), 8)
    assert list(dataset.labels) == [0, 0, 0] and len(dataset) == 3
    with pytest.raises(
        ValueError, match=r"a\.tar have no \.cls and no label .* only train-vae, .*in a \.cls"
    ):
        TrainingData(dataset, None).require_classes()


def test_members_are_matched_as_webdataset_does(tmp_path):
    """By what stands before a name's first dot; hidden files and other kinds are passed over."""
    members = {
        "./1.0/a.JPG": png(0), "./1.0/a.cls": b"1", "./1.0/a.seg.png": b"not read", "./1.0/a.txt": b"x",
        "./1.0/._a.jpg": b"of macOS", "./1.0/.DS_Store": b"", "README": b"", "./2.0/a.webp": png(1),
        "./2.0/a.json": b'{"label": 7}', "./2.0/a.cls": b"0", "meta.json": b'{"label": 3}',
    }  # fmt: skip
    dataset = open_dataset(write(tmp_path / "a.tar", members), 8)
    assert dataset.names == ["a.tar/./1.0/a.JPG", "a.tar/./2.0/a.webp"] and list(dataset.labels) == [1, 0]
    assert dataset[0][1] == 1 and dataset[1][0].shape == (3, 8, 8)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("change, message", [
    ({"part/0001.cls": b"cat"}, r"a\.tar gives 'part/0001\.png' the label 'cat': labels are whole numbers"),
    ({"part/0001.cls": b"-1"}, r"gives 'part/0001\.png' the label -1: labels are"),
    ({"part/0001.cls": b""}, r"gives 'part/0001\.png' the label '': labels are"),
    ({"part/0001.cls": b"999999999"}, r"gives 'part/0001\.png' the label 999999999: number the classes"),
    ({"part/0001.cls": b"null"}, r"1 images in .* have no class .* a\.tar/part/0001\.png first: add"),
    ({"part/more.png": png(9)}, r"1 images in .* have no class .* a\.tar/part/more\.png first: add"),
    ({"part/0001.jpg": png(9)}, r"part/0001\.jpg in .*a\.tar is the second image of its sample: write"),
    ({"part/gone.cls": b"1"}, r"part/gone\.cls in .*a\.tar has no image beside it: write"),
])  # fmt: skip
def test_classes_and_images_that_do_not_match_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(write(tmp_path / "a.tar", samples(range(3)) | change), 8)


def test_a_shard_that_lacks_classes_is_refused_beside_others(folder):
    write(folder / "train-002.tar", samples(range(6, 9), ""))
    with pytest.raises(
        ValueError, match=r"3 images in .* train-002\.tar/part/0006\.png first: add its \.cls"
    ):
        open_dataset(folder, 8)


def test_an_image_that_cannot_be_read_is_named_with_its_shard(tmp_path):
    dataset = open_dataset(write(tmp_path / "a.tar", samples(range(3)) | {"part/0001.png": b"no PNG"}), 8)
    with pytest.raises(
        ValueError, match=r"a\.tar/part/0001\.png cannot be read \(not an image .* write the shard"
    ):
        dataset[1]
    assert dataset[2][0].shape == (3, 8, 8)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"a\.tar/part/0002\.png cannot be read \(No such file"):
        dataset[2]


def damaged(data, how):
    header = data.index(b"part/0001.png")
    if how == "cut in a file":
        return data[: header + 600]
    if how == "cut after a file":
        return data[:header]
    if how == "a damaged header":
        return data[:header] + b"?" + data[header + 1 :]
    if how == "two archives in one":
        return data + data
    return {"compressed": gzip.compress(data), "empty": b"", "text": b"no tar" * 1000}[how]


@pytest.mark.parametrize(
    "how",
    [
        "cut in a file",
        "cut after a file",
        "a damaged header",
        "two archives in one",
        "compressed",
        "empty",
        "text",
    ],
)
def test_a_damaged_shard_is_refused(folder, how):
    path = folder / "train-001.tar"
    write(path, samples(range(3)))
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(
        ValueError, match=r"train-001\.tar is not a whole, uncompressed tar \(.*\): write it again"
    ):
        open_dataset(folder, 8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A shard of small images, its bytes and its pixels."""
    path = write(tmp_path_factory.mktemp("whole") / "a.tar", samples(range(2)))
    return path, path.read_bytes(), [image for image, _ in open_dataset(path, 8)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_is_one_sentence_that_names_the_shard_or_does_no_harm(whole, data):
    path, content, images = whole
    changed = bytes_changed(content, data)
    end = data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else len(content)
    path.write_bytes(changed[:end])
    try:
        found = [image for image, _ in open_dataset(path, 8)]
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert len(found) == 2 and all(map(torch.equal, found, images))


def test_what_is_no_shard_is_refused(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"the shard .*train-004\.tar does not exist: check its path, or"
    ):
        open_dataset(folder / "train-{000..999999999}.tar", 8)
    with pytest.raises(ValueError, match="give the resolution to crop them to, as in --resolution 256"):
        open_dataset(folder / "train-000.tar")
    with pytest.raises(ValueError, match=r"inner\.tar holds no images: unpack it with tar -xf"):
        open_dataset(write(tmp_path / "inner.tar", {"n01440764.tar": b"", "notes.txt": b""}), 8)
    write(folder / "val-000.tar", samples(range(3)))
    with pytest.raises(
        ValueError, match=r"several kinds \(train-\*\.tar, val-\*\.tar\): name the ones that are meant"
    ):
        open_dataset(folder, 8)
    for address in ("hf://datasets/owner/name", "hf://owner/name/train-000.tar", "hf://datasets/name/a.tar"):
        with pytest.raises(
            ValueError, match=r"names no shards: give hf://datasets/OWNER/NAME/train-\{000\.\.099\}"
        ):
            open_dataset(address, 8)


# ---------------------------------------------------------------- what is kept


def test_shards_are_looked_through_once(folder, assets, monkeypatch):
    first, looked, members = open_dataset(folder, 8), [], module._members
    monkeypatch.setattr(module, "_members", lambda shard: looked.append(shard.name) or members(shard))
    again = open_dataset(folder, 8)
    assert not looked and again.names == first.names and list(again.labels) == LABELS
    assert torch.equal(again[5][0], first[5][0])
    os.utime(write(folder / "train-000.tar", samples([11, 1, 2])), (1, 1))  # clocks of files tick slowly
    changed = open_dataset(folder, 8)
    assert len(looked) == 4 and changed.names[0] == "train-000.tar/part/0011.png"
    for index in assets.rglob("*.npz"):
        index.write_bytes(index.read_bytes()[:-40])
    assert open_dataset(folder, 8).names == changed.names and len(looked) == 8


def test_a_cache_that_cannot_be_written_is_done_without(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "file"))
    assert list(open_dataset(folder, 8).labels) == LABELS == list(open_dataset(folder, 8).labels)


def test_undecodable_names_are_kept(tmp_path):
    write(tmp_path / "a.tar", {"\udce9.png": png(0), "\udce9.cls": b"0"})
    for _ in range(2):
        assert open_dataset(tmp_path / "a.tar", 8).names == ["a.tar/\udce9.png"]


# ---------------------------------------------------------------- the Hub, and commands


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A Hub on this machine that has the shards, and an empty cache."""
    files = {f"data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    server = HubStandIn({"owner/shards": files | {"data/val-000.tar": b"another split"}})
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    for name in ("close_session", "reset_sessions"):  # a client that was made offline would stay so
        getattr(huggingface_hub, name, getattr(huggingface_hub.utils, name, lambda: None))()
    yield server
    server.close()


def test_shards_of_the_hub_are_fetched_once(hub, folder, monkeypatch):
    address = "hf://datasets/owner/shards/data/train-{000..001}.tar"
    dataset = open_dataset(address, 8)
    local = open_dataset(folder / "train-{000..001}.tar", 8)
    assert TrainingData(dataset, None).fingerprint == TrainingData(local, None).fingerprint
    assert sorted(hub.fetched()) == ["train-000.tar", "train-001.tar"]
    assert len(open_dataset(address, 8)) == 6 and len(hub.fetched()) == 2
    assert len(open_dataset("hf://datasets/owner/shards@v1/data/train-003.tar", 8)) == 3
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(open_dataset(address, 8)) == 6


def test_what_the_hub_has_not_is_refused(hub):
    with pytest.raises(
        FileNotFoundError, match=r"owner--shards.*train-004\.tar does not exist: check its path, or"
    ):
        open_dataset("hf://datasets/owner/shards/data/train-{003..004}.tar", 8)
    with pytest.raises(ValueError, match="there is no repository owner/other on the Hub"):
        open_dataset("hf://datasets/owner/other/train-000.tar", 8)
    with pytest.raises(ValueError, match="owner/shards has no revision 'v9'"):
        open_dataset("hf://datasets/owner/shards@v9/data/train-000.tar", 8)


def test_latents_of_shards_lie_beside_them(folder, capsys):
    shards = str(folder / "train-{000..003}.tar")
    words = ["cache-latents", "--vae-ckpt-path", "tiny", "--data-dir", shards, "--resolution", "32"]
    words += ["--vae-latents-name", "tiny", "--device", "cpu"]
    assert main(words) == 0 and "12 latents of shape" in capsys.readouterr().out
    assert (folder / "tiny.h5").is_file()
    config = TrainConfig.build("ldm", vae="tiny", data_dir=shards, vae_latents_name="tiny")
    item = open_data(config)[7]
    assert item["image"].shape == (3, 32, 32) and item["label"] == LABELS[7] and item["latent"].shape[0] == 8
    words[words.index(shards)] = "hf://datasets/owner/shards/train-{000..003}.tar"
    assert main(words) == 2
    assert "train-{000..003}.tar is on the Hub: say by --output-dir where" in capsys.readouterr().err
