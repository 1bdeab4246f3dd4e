"""`repae reconstruct`: the numbers, their protocol and a picture, or one sentence."""

import json

import numpy as np
import pytest
from PIL import Image

from repae_lite.commands.main import main
from repae_lite.data.datasets import load_embedded
from repae_lite.evaluation.reconstruction import OF_LATENTS
from repae_lite.utils.files import data_small_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The first 20 evaluation images as files, of two classes."""
    folder = tmp_path_factory.mktemp("originals")
    for i, image in enumerate(load_embedded("eval")[0][:20]):
        path = folder / f"class {i // 10}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def give(capsys, output, data, *words):
    code = main([
        "reconstruct", "--vae-ckpt=tiny", f"--data-dir={data}", "--judge=tiny", f"--output={output}",
        "--device=cpu", *words,
    ])  # fmt: skip
    return code, capsys.readouterr()


def test_numbers_protocol_and_picture(folder, tmp_path, capsys):
    paths = [tmp_path / "deeper" / name for name in ("h5.json", "folder.json")]
    code, said = give(capsys, paths[0], data_small_dir() / "eval", "--limit=20", "--resolution=32")
    assert code == 0 and "PSNR  2" in said.out and "rFID" not in said.out  # of another judge than Inception
    assert all(
        f"\n{name}  " in said.out for name in ("spatial variance", "total variation", "effective dimensions")
    )
    assert (
        give(capsys, paths[1], folder, "--resolution=32", "--pproc-batch-size=3", "--num-workers=1")[0] == 0
    )
    one, other = (json.loads(path.read_text()) for path in paths)
    assert one == other  # the same images, read in another way
    assert one["protocol"]["hash"] in said.out and one["protocol"]["count"] == 20
    assert {k: one["latents"][k] for k in OF_LATENTS}.items() <= one["metrics"].items()
    assert one["latents"]["images"] == 20 and len(one["latents"]["power"]) == 5
    drawn = np.asarray(Image.open(paths[0].with_suffix(".png")))
    assert drawn.shape == (96, 256, 3)
    originals = load_embedded("eval")[0]
    assert (drawn[:32, 32:64] == originals[1].permute(1, 2, 0).numpy()).all()
    assert 0 < np.abs(drawn[:32].astype(int) - drawn[32:64]).mean() < 30


def test_draws_and_rounding_are_part_of_the_protocol(folder, tmp_path, capsys):
    path, hashes = tmp_path / "result.json", set()
    for words in ([], ["--sample"], ["--sample", "--seed=1"], ["--to-uint8=truncate"]):
        assert give(capsys, path, folder, "--resolution=32", *words)[0] == 0
        hashes.add(json.loads(path.read_text())["protocol"]["hash"])
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--resolution=32", "--limit=1"], "statistics need at least 2"),
        (["--resolution=32", "--limit=21"], "21 images of 20"),
        (["--resolution=16"], "tiny-evaluator judges 32"),
        ([], "give the resolution to crop them to"),
        (["--resolution=32", "--pproc-batch-size=0"], "0 images a batch"),
        (["--resolution=32", "--output=result.txt"], "ends in .json"),
        (["--resolution=32", "--data-dir=VIRTUAL_imagenet256_labeled.npz"], "give the images"),
    ],
)
def test_refusals_are_one_sentence(folder, tmp_path, capsys, words, sentence):
    code, said = give(capsys, tmp_path / "result.json", folder, *words)
    assert code == 2 and sentence in said.err and not list(tmp_path.iterdir())
