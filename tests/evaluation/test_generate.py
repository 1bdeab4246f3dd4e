"""`repae generate`: an image follows from seed and number, however often the work is cut and resumed."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import run
from torch import nn

from repae_lite import __version__, load_sit, load_vae
from repae_lite.checkpoints.run import load_run
from repae_lite.commands.main import main
from repae_lite.data.latents import vae_fingerprint
from repae_lite.evaluation import generate as module
from repae_lite.evaluation.generate import SampleDraws, Sampling, draw_images, generate
from repae_lite.method.sampling import Guidance, sample_ode
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT, SiTConfig
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.pixels import to_uint8

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"mode": "sde", "steps": 4, "cfg_scale": 1.5, "guidance_high": 0.6, "count": 20}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a tiny run of six steps."""
    return run(tmp_path_factory.mktemp("trained"), "tiny").path


def words(trained: Path, folder: Path, *more: str) -> list[str]:
    given = "generate --device cpu --mode sde --num-steps 4 --num-fid-samples 20 --pproc-batch-size 8".split()
    return [*given, "--exp-path", str(trained), "--sample-dir", str(folder), *more]


def the_npz(folder: Path) -> np.ndarray:
    (path,) = folder.glob("*.npz")
    with np.load(path) as file:
        return file["arr_0"]


def test_draws_do_not_depend_on_how_samples_are_grouped():
    shape = (4, 8, 8)
    whole, first, rest = (SampleDraws(7, images, shape) for images in (range(6), range(2), range(2, 6)))
    assert torch.equal(whole.eps(), torch.cat([first.eps(), rest.eps()]))
    for _ in range(3):
        one, two, three = (next(draws.step_noise()) for draws in (whole, first, rest))
        assert torch.equal(one, torch.cat([two, three])) and one.dtype == torch.float64
    assert not torch.equal(SampleDraws(8, range(6), shape).eps(), SampleDraws(7, range(6), shape).eps())


def test_labels():
    many, few = (Sampling(count=count, seed=3).all_labels(10) for count in (500, 40))
    assert (
        torch.equal(many[:40], few) and len(many.unique()) == 10
    )  # smaller sets are the first of larger ones
    balanced = Sampling(count=500, labels="balanced", seed=3).all_labels(10)
    assert (balanced.bincount() == 50).all() and not torch.equal(balanced, balanced.sort().values)
    assert Sampling(count=5, labels="classes=7,2").all_labels(10).tolist() == [7, 2, 7, 2, 7]
    sit = SiTConfig(num_classes=10)
    with pytest.raises(ValueError, match="shared equally by 10 classes: ask for 20"):
        Sampling(count=17, labels="balanced").check(sit)
    with pytest.raises(ValueError, match="the SiT has the classes 0 to 9"):
        Sampling(count=17, labels="classes=10").check(sit)
    with pytest.raises(ValueError, match="needs the null class"):
        Sampling(cfg_scale=2.0).check(replace(sit, label_dropout=0.0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mode": "pf"}, "mode is 'pf'"),
        ({"solver": "heun", "mode": "sde"}, "heun solves the ODE"),
        ({"cfg_scale": 0.5}, "below 1"),
        ({"guidance_low": 0.9, "guidance_high": 0.1}, "guidance interval"),
        ({"labels": "equal-ish"}, "labels is 'equal-ish'"),
        ({"labels": "classes="}, "labels is 'classes='"),
        ({"count": 0}, "at least 1 image"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "mode": "sde"}, "takes at least 2"),
        ({"to_uint8": "floor"}, "to_uint8 is 'floor'"),
    ],
)
def test_settings_without_sense_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**changes)


def test_uint8_truncates_as_the_official_script_does():
    x = torch.tensor([-1.2, -1.0, -0.5, 0.0, 0.3333, 0.999, 1.0, 1.4])
    official = torch.clamp(255.0 * ((x + 1) / 2.0), 0, 255).to(torch.uint8)
    assert torch.equal(to_uint8(x, "truncate"), official)
    assert (
        to_uint8(torch.tensor([0.999]), "round") == 255 and to_uint8(torch.tensor([0.999]), "truncate") == 254
    )


def test_the_file_is_adms_and_says_how_it_was_made(trained, tmp_path, capsys):
    assert main(words(trained, tmp_path, "--png", "--to-uint8", "round")) == 0
    images = the_npz(tmp_path)
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    name = "tiny_0000006_cfg1.5-0.0-1.0"
    manifest = json.loads((tmp_path / f"{name}.json").read_text())
    assert manifest["sampling"]["mode"] == "sde" and manifest["sampling"]["to_uint8"] == "round"
    from PIL import Image

    folder = sorted((tmp_path / name).glob("*.png"))
    assert [path.stem for path in folder] == [f"{i:06d}" for i in range(20)]
    assert np.array_equal(np.asarray(Image.open(folder[13])), images[13])
    assert (tmp_path / f"{name}.png").is_file()
    found, sampling = load_run(trained), Sampling(**manifest["sampling"])
    labels = sampling.all_labels(10)
    (pixels,) = draw_images(found.sit, found.vae, sampling, range(8, 16), labels[8:16])
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), images[8:16])
    capsys.readouterr()
    assert main(words(trained, tmp_path, "--to-uint8", "round")) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(words(trained, tmp_path, "--to-uint8", "truncate")) == 2
    assert "was made with to_uint8 'round' and not 'truncate'" in capsys.readouterr().err


def test_an_official_run_folder_gives_the_same_images(trained, tmp_path):
    official = tmp_path / "theirs"
    (official / "checkpoints").mkdir(parents=True)
    options = argparse.Namespace(model="tiny", vae="f8d4", num_classes=10, resolution=32, enc_type="tiny")
    networks = {"model": load_sit(trained, ema=False), "ema": load_sit(trained), "vae": load_vae(trained)}
    content = {name: network.state_dict() for name, network in networks.items()}
    content |= {"opt": {}, "opt_vae": {}, "opt_disc": {}, "args": options, "steps": 4}
    torch.save(content, official / "checkpoints" / "0000004.pt")
    (official / "args.json").write_text(json.dumps(vars(options)))
    for source in (trained, official):
        for weights in ("--ema", "--no-ema"):
            assert main(words(source, tmp_path / source.name / weights, weights)) == 0
    drawn = {kind: the_npz(tmp_path / "theirs" / kind) for kind in ("--ema", "--no-ema")}
    assert not np.array_equal(drawn["--ema"], drawn["--no-ema"])
    for kind, images in drawn.items():
        assert np.array_equal(images, the_npz(tmp_path / trained.name / kind))
    manifest = json.loads((tmp_path / "theirs/--ema/theirs_0000004_cfg1.5-0.0-1.0.json").read_text())
    assert {
        "run": "theirs",
        "step": 4,
        "repae_lite": __version__,
        "enc_type": "tiny",
    }.items() <= manifest.items()


def test_given_noise_becomes_images_that_are_denormalised_and_decoded_in_batches():
    torch.manual_seed(0)
    sit, vae = SiT.from_preset("tiny", depth=2).eval(), AutoencoderKL.from_preset("tiny")
    nn.init.normal_(sit.final_layer.linear.weight, std=0.1)
    sit.set_latent_stats(LatentStats(torch.arange(4.0), torch.full((4,), 2.0)))
    eps, labels = torch.randn(5, 4, 8, 8), torch.arange(5)
    sampling = Sampling(steps=3, cfg_scale=2.0, count=5, to_uint8="round")
    (images,) = draw_images(sit, vae, sampling, range(5), labels, eps=eps, decoded=2)
    z = sample_ode(sit, eps, labels, steps=3, guidance=Guidance(2.0))
    with torch.no_grad():
        expected = to_uint8(vae.decode((2 * z + torch.arange(4.0).view(4, 1, 1)).float()))
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    assert (images.int() - expected.int()).abs().max() <= 1  # batches round a little differently


def test_another_batch_size_changes_one_level_in_ten_thousand_at_most(trained):
    found, images = load_run(trained), []
    sampling = Sampling(**SHORT, labels="balanced", to_uint8="round")
    labels = sampling.all_labels(10)
    for batch in (20, 5):
        starts = range(0, 20, batch)
        parts = [
            draw_images(found.sit, found.vae, sampling, range(at, at + batch), labels[at : at + batch])[0]
            for at in starts
        ]
        images.append(torch.cat(parts).int())
    apart = (images[0] - images[1]).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-4


def test_a_stopped_run_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    found, sampling = load_run(trained), Sampling(**SHORT)
    whole = generate(found.sit, found.vae, sampling, tmp_path / "whole", batch=8)
    drawn, real = [], draw_images

    def stopping(sit, vae, settings, images, labels):
        drawn.append(images)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return real(sit, vae, settings, images, labels)

    monkeypatch.setattr(module, "draw_images", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate(found.sit, found.vae, sampling, tmp_path / "cut", batch=8)
    cut = generate(found.sit, found.vae, sampling, tmp_path / "cut", batch=8, png=True)
    assert drawn == [range(8), range(8, 16), range(8, 16), range(16, 20)]
    assert cut.array.read_bytes() == whole.array.read_bytes()
    with pytest.raises(ValueError, match="was made with batch 8 and not 4"):
        generate(found.sit, found.vae, sampling, tmp_path / "cut", batch=4)
    cut.finish({})
    assert len(list((tmp_path / "cut").glob("*.png"))) == 20  # of the batches done without, too
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files and no manifest\.json"):
        generate(found.sit, found.vae, sampling, tmp_path / "mine", batch=8)


KILLED = """
import os, signal, sys
from repae_lite.data.samples import SampleFolder
from repae_lite.commands.main import main
real, calls = SampleFolder.write, []
def write(self, images, pixels):
    calls.append(images)
    if len(calls) == 2:
        real(self, images, 255 - pixels) if sys.argv[1] == "wrong" else None
        open(self.marks, "rb+").write(b"\\1\\0\\0") if sys.argv[1] == "wrong" else None
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, images, pixels)
SampleFolder.write = write
main(sys.argv[2:])
"""


@pytest.mark.parametrize("what", ["early", "wrong"])  # before the batch is written; when it is not marked yet
def test_kill_9_loses_at_most_a_batch(trained, tmp_path, what):
    for folder in ("cut", "whole"):
        (tmp_path / folder).mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, what, *words(trained, tmp_path / "cut")],
        cwd=ROOT, env=environment, capture_output=True, timeout=200,
    )  # fmt: skip
    assert killed.returncode == -9 and not list((tmp_path / "cut").glob("*.npz"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(words(trained, tmp_path / "cut")) == 0
        assert main(words(trained, tmp_path / "whole")) == 0
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(the_npz(tmp_path / "cut"), the_npz(tmp_path / "whole"))
    assert not [path for path in (tmp_path / "cut").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--path-type", "cosine"], "the SiT was trained on the linear path"),
        (["--num-classes", "1000"], "the SiT was trained with 10"),
        (["--vae-ckpt", "tiny"], "has a VAE of its own"),
        (["--labels", "classes=1", "--per-class-sampling"], "give one of them"),
        (["--pproc-batch-size", "0"], "at least 1"),
        (["--train-steps", "5"], "no checkpoint at step 5"),
        (["--cfg-scale", "0"], "below 1"),
        (["--num-steps", "1"], "mode sde takes at least 2"),
        (["--labels", "balanced", "--num-fid-samples", "21"], "ask for 20"),
        (["--protocol", "adm"], "unknown protocol"),
    ],
)
def test_refusals(trained, tmp_path, capsys, given, sentence):
    assert main(words(trained, tmp_path / "none", *given)) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_more_images_than_the_disk_holds_are_refused_at_once(trained, tmp_path, capsys):
    assert main(words(trained, tmp_path / "none", "--num-fid-samples", str(10**13))) == 2
    assert "the samples need" in capsys.readouterr().err


def test_png_files_are_all_there_or_refused(trained, tmp_path, capsys):
    assert main(words(trained, tmp_path, "--png")) == 0
    (npz,) = tmp_path.glob("*.npz")
    assert len(list(npz.with_suffix("").glob("*.png"))) == 20
    npz.unlink()
    assert main(words(trained, tmp_path, "--png")) == 2
    assert f"holds the finished PNG files of {npz.name}, which is gone" in capsys.readouterr().err
    assert main(words(trained, tmp_path / "plain")) == 0
    assert main(words(trained, tmp_path / "plain", "--png")) == 2
    assert "is finished, without PNG files" in capsys.readouterr().err


def test_a_run_on_a_frozen_vae_is_decoded_by_that_vae(tmp_path, capsys):
    folder = run(tmp_path, "frozen", command="ldm").path
    found = load_run(folder)
    assert vae_fingerprint(found.vae) == vae_fingerprint(load_vae("tiny"))
    assert torch.equal(found.sit.pos_embed, load_sit(folder).pos_embed) and found.step == 6
    assert main(words(folder, tmp_path / "none", "--vae-ckpt", "tiny-e2e")) == 2
    assert "latents of other statistics than those of the VAE tiny-e2e" in capsys.readouterr().err
