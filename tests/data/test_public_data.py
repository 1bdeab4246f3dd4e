"""`repae download data:NAME`: class folders that are whole or not there; archives come from this machine."""

import hashlib
import io
import tarfile
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from repae_lite.commands.main import main
from repae_lite.data import public_data
from repae_lite.data.datasets import ImageFolderDataset
from repae_lite.data.hdf5 import write_images_h5
from repae_lite.data.image_lists import list_images
from repae_lite.data.public_data import DATA_SETS, fetch_data_set

CLASSES = ("n01440764", "n02102040", "n02979186")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Ten embedded images for training and ten to evaluate."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 3, 8, 8), dtype=np.uint8)
    for split in ("train", "eval"):
        write_images_h5(tmp_path / "small" / split / "images.h5", pixels[:10], np.arange(10)[::-1])
    monkeypatch.setenv("REPAE_DATA_SMALL", str(tmp_path / "small"))
    monkeypatch.setitem(
        DATA_SETS, "embedded", replace(DATA_SETS["embedded"], images={"train": 10, "val": 10})
    )
    return pixels


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive in Imagenette's place: four images, and members that want out of the folder."""
    path = tmp_path / "server" / "imagenette2-160.tgz"
    path.parent.mkdir()
    jpeg = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(jpeg, "JPEG")
    with tarfile.open(path, "w:gz") as tar:
        names = [f"imagenette2-160/train/{name}/{name}_{i}.JPEG" for i, name in enumerate(CLASSES)]
        names += [f"imagenette2-160/val/{CLASSES[0]}/ILSVRC2012_val_00000009.JPEG"]
        for name in (
            *names,
            "../../out.JPEG",
            "imagenette2-160/train/../../../out.JPEG",
            "a/train/b/.x.JPEG",
        ):
            member = tarfile.TarInfo(name)
            member.size = len(jpeg.getvalue())
            tar.addfile(member, io.BytesIO(jpeg.getvalue()))
        link = tarfile.TarInfo(f"imagenette2-160/train/{CLASSES[0]}/link.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    handler = partial(QuietHandler, directory=str(path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{path.name}"
        monkeypatch.setitem(DATA_SETS, "imagenette", replace(DATA_SETS["imagenette"], url=url))
        trust(monkeypatch, path)
        yield path
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def trust(monkeypatch, path):
    """Takes an archive for Imagenette's."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    changes = {"md5": md5, "images": {"train": 3, "val": 1}}
    monkeypatch.setitem(DATA_SETS, "imagenette", replace(DATA_SETS["imagenette"], **changes))


def refused(capsys, *words):
    capsys.readouterr()
    assert main(["download", *map(str, words)]) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("repae download: ")
    return last.removeprefix("repae download: ")


def test_embedded_images_keep_pixels_and_labels(small, tmp_path, capsys):
    assert main(["download", "data:embedded", "--output-dir", str(tmp_path / "images")]) == 0
    assert "10 in train, 10 in val" in capsys.readouterr().out
    folder = tmp_path / "images" / "embedded"
    found = list_images(folder / "train")
    assert found.class_names[0] == "0_fish" and found.labels == list(range(10)) and not found.left_out
    pixels = ImageFolderDataset(folder / "train", 8)
    assert all((pixels[i][0].numpy() == small[9 - i]).all() for i in range(10))
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["embedded"]


def test_the_real_embedded_images_have_the_labels_of_the_embedded_data():
    classes = [path.split("/")[1] for path, _ in islice(public_data._embedded(), 30)]
    assert [int(name[0]) for name in classes] == list(range(10)) * 3  # see data_small/DATA.md


def test_a_folder_is_kept_or_finished_never_half(small, tmp_path, monkeypatch, capsys):
    half = tmp_path / ".embedded.partial" / "embedded" / "train" / "0_fish"
    half.mkdir(parents=True)  # of a run that was killed
    (half / "stale.png").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(public_data, "_embedded", lambda: iter([("train/0_fish/a.png", b"png")]))
        with pytest.raises(ValueError, match="holds 1 images instead of 10"):
            fetch_data_set("embedded", tmp_path)
    assert not (tmp_path / "embedded").exists()
    folder = fetch_data_set("embedded", tmp_path)
    assert len(list(folder.rglob("*.png"))) == 20 and not list(folder.rglob("stale*"))
    first = next(folder.rglob("*.png"))
    before = first.stat().st_mtime_ns
    assert fetch_data_set("embedded", tmp_path) == folder and first.stat().st_mtime_ns == before
    first.unlink()
    sentence = refused(capsys, "data:embedded", "--output-dir", tmp_path)
    assert "holds 9 images instead of 10: remove" in sentence


def test_imagenette_is_unpacked_and_nothing_else(archive, tmp_path, capsys):
    assert main(["download", "data:imagenette", "--output-dir", str(tmp_path / "a" / "b")]) == 0
    assert "ImageNet's terms" in capsys.readouterr().out
    folder = tmp_path / "a" / "b" / "imagenette"
    found = list_images(folder / "train")
    assert tuple(found.class_names) == CLASSES and found.labels == [0, 1, 2]
    assert sorted(path.name for path in folder.rglob("*") if path.is_file())[0].startswith("ILSVRC2012_val")
    assert not list(tmp_path.rglob("out.JPEG")) and not list(tmp_path.rglob("link.JPEG"))
    archive.unlink()  # it is there: no server is asked
    assert fetch_data_set("imagenette", folder.parent) == folder


def test_what_is_no_whole_archive_is_refused_in_a_sentence(archive, tmp_path, monkeypatch, capsys):
    whole, folder = archive.read_bytes(), tmp_path / "images"
    words = ("data:imagenette", "--output-dir", folder)
    archive.write_bytes(whole[:-200])  # of another checksum
    assert "is not the file with the MD5" in refused(capsys, *words)
    trust(monkeypatch, archive)  # its checksum fits
    assert "no whole archive of imagenette" in refused(capsys, *words)
    (folder / ".imagenette.partial" / archive.name).write_bytes(whole[:99])  # of a transfer that broke off
    archive.write_bytes(whole)
    trust(monkeypatch, archive)
    assert main(["download", *map(str, words)]) == 0


def test_without_a_network_the_sentence_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    gone = replace(DATA_SETS["imagenette"], url="http://127.0.0.1:9/imagenette2-160.tgz")
    monkeypatch.setitem(DATA_SETS, "imagenette", gone)
    sentence = refused(capsys, "data:imagenette", "--output-dir", tmp_path)
    assert "broke off" in sentence and f"put it at {tmp_path / '.imagenette.partial'}" in sentence


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["data:embeded"], "unknown data set data:embeded: choose among data:embedded, data:imagenette"),
        (["data:embedded@main"], "unknown data set data:embedded@main"),
        (["data:embedded", "--list"], "--list is for released sets, and data:embedded is none"),
        (["data:embedded", "sdvae", "--revision", "v1"], "--revision is for released sets"),
        (["data:embedded", "--train-steps", "0"], "--train-steps is for released sets"),
        (["data:embedded", "nothing"], "unknown released set 'nothing'"),
    ],
)
def test_what_does_not_apply_is_refused_before_anything_is_fetched(words, sentence, tmp_path, capsys):
    assert sentence in refused(capsys, *words, "--output-dir", tmp_path)
    assert not list(tmp_path.iterdir())
