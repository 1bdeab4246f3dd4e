"""The whole command line, one command after another as a researcher would give them, on a folder of
photographs in many formats.
"""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repae_lite.checkpoints.models import load_latent_stats, load_sit, load_vae
from repae_lite.commands.main import main
from repae_lite.data.datasets import ImageH5Dataset
from repae_lite.data.latents import CachedLatentsDataset
from repae_lite.method.sampling import sample_ode
from repae_lite.utils.pixels import to_unit_range

CLASSES = ("goldfish", "hen", "tiger cat")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Seven pictures of each of three classes, of several sizes, modes and formats."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    kinds = [
        ("RGB", "jpg"),
        ("L", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("RGB", "webp"),
        ("P", "gif"),
        ("RGB", "bmp"),
    ]
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir()
        for i, (mode, ending) in enumerate(kinds):
            width, height = rng.integers(33, 90, 2)
            ramp = np.linspace(60 * label, 60 * label + 120, width * height * 3).reshape(height, width, 3)
            image = Image.fromarray((ramp + rng.normal(0, 10, ramp.shape)).clip(0, 255).astype(np.uint8))
            image.convert(mode).save(folder / name / f"{i}.{ending}")
    return folder


def give(command: str, **places: Path) -> None:
    """Runs one command line; {name} in it stands for a place, which may have spaces."""
    assert main([word.format(**places) for word in shlex.split(command)]) == 0


def test_from_a_folder_of_pictures_to_a_sit_on_a_tuned_vae(tmp_path, pictures):
    home = {
        "pictures": pictures,
        "data": tmp_path / "data",
        "exps": tmp_path / "my exps",
        "pretrained": tmp_path / "pretrained",
    }
    give("preprocess --imagenet-path={pictures} --output-path={data} --resolution=32", **home)
    images = ImageH5Dataset(home["data"] / "images.h5")
    assert len(images) == 21 and images.num_classes == 3

    common = (
        '--max-train-steps=3 --report-to="none" --allow-tf32 --mixed-precision="no" --seed=0 '
        '--data-dir="{data}" --output-dir="{exps}" --batch-size=6 --path-type="linear" --prediction="v" '
        '--weighting="uniform" --model="tiny" --checkpointing-steps=3 '
        '--vae="tiny" --enc-type="tiny" --proj-coeff=0.5 --encoder-depth=2 --sampling-steps=0 '
    )
    give("train-repae " + common + "--vae-align-proj-coeff=1.5 --bn-momentum=0.1 --exp-name=tuned", **home)
    give(
        'export-vae --repae-ckpt "{exps}/tuned/checkpoints/0000003" --vae-name e2e-tiny '
        '--save-dir "{pretrained}"',
        **home,
    )
    released = home["pretrained"] / "e2e-tiny" / "e2e-tiny.pt"
    tuned, stats = load_vae(released), load_latent_stats(released)
    shipped = load_vae("tiny")
    assert not torch.equal(tuned.decoder.conv_out.weight, shipped.decoder.conv_out.weight)

    give(
        'cache-latents --vae-arch tiny --vae-ckpt-path "{pretrained}/e2e-tiny/e2e-tiny.pt" '
        '--data-dir "{data}" --vae-latents-name e2e-tiny --pproc-batch-size=8',
        **home,
    )
    cached = CachedLatentsDataset(home["data"] / "e2e-tiny.h5")
    x = to_unit_range(torch.stack([images[i][0] for i in range(21)]))
    torch.testing.assert_close(
        torch.stack([cached[i][0][:4] for i in range(21)]), tuned.encode(x).mean, rtol=1e-4, atol=1e-5
    )
    assert list(cached.labels) == list(images.labels)

    give(
        "train-ldm "
        + common
        + '--vae-ckpt="{pretrained}/e2e-tiny/e2e-tiny.pt" --vae-latents-name="e2e-tiny" --exp-name=fresh',
        **home,
    )
    run = home["exps"] / "fresh"
    sit = load_sit(run)
    assert sit.config.num_classes == 3
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3] and all(
        np.isfinite(record["denoising"]) for record in records
    )
    # The frozen VAE's statistics are where training started: three batches moved them by less than 1 - 0.9^3.
    after = load_latent_stats(run)
    assert ((1 / after.std - 1 / stats.std).abs() < 0.5 / stats.std).all()
    assert ((after.mean - stats.mean).abs() < 0.5 * stats.std).all()
    z = sample_ode(sit, torch.randn(3, 4, 8, 8), torch.arange(3), steps=2)
    assert tuned.decode(sit.denormalize(z)).shape == (3, 3, 32, 32)


def test_an_official_run_folder_goes_through_the_same_commands(tmp_path, pictures):
    """As the official code writes it: NNNNNNN.pt with everything in it."""
    home = {
        "pictures": pictures,
        "data": tmp_path / "data",
        "exps": tmp_path / "exps",
        "pretrained": tmp_path / "pretrained",
    }
    give("preprocess --imagenet-path={pictures} --output-path={data} --resolution=32 --max-images=12", **home)
    give(
        "train-repae --vae tiny --data-dir {data} --max-train-steps 2 --batch-size 4 --sampling-steps 0 "
        "--checkpointing-steps 2 --checkpoint-format official --output-dir {exps} --exp-name official",
        **home,
    )
    file = home["exps"] / "official" / "checkpoints" / "0000002.pt"
    assert file.is_file() and not file.with_suffix("").exists()
    give(
        "export-vae --repae-ckpt {exps}/official/checkpoints/0000002.pt --vae-name again --save-dir "
        "{pretrained}",
        **home,
    )
    give(
        "cache-latents --vae-ckpt-path {pretrained}/again --data-dir {data} --vae-latents-name again", **home
    )
    assert len(CachedLatentsDataset(home["data"] / "again.h5")) == 12
    give(
        "train-repae --vae tiny --data-dir {data} --max-train-steps 3 --batch-size 4 --sampling-steps 0 "
        "--output-dir {exps} --exp-name on --resume {exps}/official/checkpoints/0000002.pt",
        **home,
    )
    assert (home["exps"] / "on" / "checkpoints" / "0000003").is_dir()
