"""`repae export-vae`: the same VAE in every layout, a card that tells its story, and refusals."""

import argparse
import errno
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from repae_lite.checkpoints import export as exporting
from repae_lite.checkpoints import hub
from repae_lite.checkpoints.models import load_discriminator, load_latent_stats, load_vae, save_vae
from repae_lite.commands.main import main
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL, VAEConfig
from repae_lite.utils.state_dicts import save_weights

PLAIN = VAEConfig(
    width=8, multipliers=(1, 2), blocks=1, groups=4
)  # without folding, so that diffusers can express it


def parts(vae):
    torch.manual_seed(0)
    sit = SiT.from_preset("tiny", in_channels=vae.config.latent_channels).eval()
    channels = vae.config.latent_channels
    sit.set_latent_stats(LatentStats(torch.randn(channels), torch.rand(channels) + 0.5))
    return sit, PatchDiscriminator(width=8, layers=2)


@pytest.fixture
def run(tmp_path):
    """A run of ours with a VAE that diffusers can express; its metrics go on after the checkpoint."""
    torch.manual_seed(0)
    vae = AutoencoderKL(PLAIN).eval()
    sit, discriminator = parts(vae)
    folder = tmp_path / "run" / "checkpoints" / "0000500"
    save_vae(folder / "vae.safetensors", vae, LatentStats(torch.zeros(4), torch.ones(4)))
    for name, module in (("sit", sit), ("ema", sit), ("discriminator", discriminator)):
        save_weights(folder / f"{name}.safetensors", module)
    (tmp_path / "run" / "args.json").write_text(
        json.dumps(
            {"model": "tiny", "batch_size": 32, "data_dir": "/somewhere/secret/data", "vae_ckpt": None}
        )
    )
    lines = [{"step": 490, "loss": 0.25}, {"step": 500, "loss": 0.125}, {"step": 510, "loss": 0.5}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run", vae, sit, discriminator


def same(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["export-vae", *map(str, arguments)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("repae export-vae: ")
    return err[0].removeprefix("repae export-vae: ")


def test_every_layout_holds_the_same_vae(run, tmp_path, capsys):
    folder, vae, sit, discriminator = run
    assert (
        main(
            [
                "export-vae",
                "--exp-path",
                str(folder),
                "--vae-name",
                "e2e",
                "--save-dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    out = tmp_path / "out" / "e2e"
    assert {entry.name for entry in out.iterdir()} == {
        "e2e.pt", "e2e-latents-stats.pt", "e2e-discriminator-ckpt.pt", "e2e.safetensors", "config.json",
        "diffusion_pytorch_model.safetensors", "README.md",
    }  # fmt: skip
    assert str(out) in capsys.readouterr().out
    plain = torch.load(out / "e2e.pt", weights_only=True)
    assert list(plain) == list(vae.state_dict()) and all(
        torch.equal(plain[key], value) for key, value in vae.state_dict().items()
    )
    stats = torch.load(out / "e2e-latents-stats.pt", weights_only=True)
    assert set(stats) == {"latents_scale", "latents_bias"} and stats["latents_bias"].shape == (1, 4, 1, 1)
    own = sit.latent_stats()  # of the SiT, not of the file vae.safetensors
    assert torch.equal(stats["latents_scale"].flatten(), 1 / own.std)
    assert torch.equal(stats["latents_bias"].flatten(), own.mean)
    for source in (out, out / "e2e.safetensors"):
        assert same(load_vae(source), vae)
    for source in (out, out / "e2e.pt", out / "e2e.safetensors"):
        found = load_latent_stats(source)
        assert torch.equal(found.std, own.std) and torch.equal(found.mean, own.mean)
    assert same(load_discriminator(out), discriminator)


def test_diffusers_reconstructs_the_same(run, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder, vae, sit, _ = run
    exporting.export_vae(folder, "e2e", tmp_path)
    theirs, x = diffusers.AutoencoderKL.from_pretrained(tmp_path / "e2e"), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).sample, vae.decode(vae.encode(x).mode()), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(theirs.config.latents_mean), sit.latent_stats().mean)


def test_the_card_tells_where_it_comes_from_but_not_where_it_was(run, tmp_path):
    exporting.export_vae(run[0], "e2e", tmp_path)
    card = (tmp_path / "e2e" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "2-fold reduction, 4 latent channels" in card
    assert (
        "| batch_size | 32 |" in card
        and "| data_dir | data |" in card
        and "secret" not in card
        and "vae_ckpt" not in card
    )
    assert (
        "| loss | 0.125 |" in card and "0.5 |" not in card.split("Last measured")[1]
    )  # of the checkpoint's step
    assert 'load_vae("e2e.safetensors")' in card and "from_pretrained" in card


def test_an_official_run_whose_vae_folds(tmp_path, capsys):
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset("tiny")
    sit, _ = parts(vae)
    path = tmp_path / "exp" / "checkpoints" / "0400000.pt"
    path.parent.mkdir(parents=True)
    content = {"model": sit.state_dict(), "ema": sit.state_dict(), "vae": vae.state_dict(), "steps": 400000}
    torch.save(content | {"args": argparse.Namespace(model="tiny", path_type="linear")}, path)
    assert (
        main(["export-vae", "--repae-ckpt", str(path), "--vae-name", "x", "--save-dir", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr().out
    assert (
        "without the discriminator: " in printed
        and "without the diffusers folder: this VAE folds 2x2 pixels" in printed
    )
    assert {entry.name for entry in (tmp_path / "x").iterdir()} == {
        "x.pt",
        "x-latents-stats.pt",
        "x.safetensors",
        "README.md",
    }
    assert same(load_vae(tmp_path / "x"), vae)
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| path_type | linear |" in card and "The run kept no metrics." in card and "diffusers" not in card


def test_mistakes_are_one_sentence(run, tmp_path, capsys):
    folder, *_ = run
    arguments = ("--exp-path", folder, "--vae-name", "e2e", "--save-dir", tmp_path)
    assert main(["export-vae", *map(str, arguments)]) == 0
    assert "e2e.pt exists: choose another --vae-name" in refused(capsys, *arguments)
    assert main(["export-vae", *map(str, arguments), "--overwrite"]) == 0
    assert "has no checkpoint at step 7: choose one of 500" in refused(
        capsys, *arguments, "--overwrite", "--train-steps", 7
    )
    assert "give a name without folders" in refused(capsys, "--exp-path", folder, "--vae-name", "a/b")
    assert "give --push-to-hub" in refused(capsys, *arguments, "--private", "--overwrite")
    checkpoint = folder / "checkpoints" / "0000500"
    assert "give --exp-path" in refused(
        capsys, "--repae-ckpt", checkpoint, "--vae-name", "b", "--train-steps", 500
    )
    (checkpoint / "vae.safetensors").unlink()
    assert "a run with a frozen VAE keeps none" in refused(
        capsys, "--repae-ckpt", checkpoint, "--vae-name", "c"
    )
    assert not (tmp_path / "c").exists()


def test_a_file_where_the_folder_should_be(run, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    sentence = refused(capsys, "--exp-path", run[0], "--vae-name", "taken", "--save-dir", tmp_path)
    assert sentence == f"cannot write in {tmp_path / 'taken'} (File exists): choose another output folder"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\nb", "a\x7f"])
def test_names_that_are_no_names(run, tmp_path, capsys, name):
    sentence = refused(capsys, "--exp-path", run[0], "--vae-name", name, "--save-dir", tmp_path / "s" / "t")
    assert ("without a letter" if not name else "give a name without folders") in sentence
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model", "diffusion_pytorch_model-2", "x-latents-stats", "x-discriminator-ckpt"],
)
def test_names_whose_files_would_be_taken_for_others(run, tmp_path, capsys, name):
    sentence = refused(capsys, "--exp-path", run[0], "--vae-name", name, "--save-dir", tmp_path)
    assert (
        f"--vae-name is {name!r}, whose files would be taken for another part" in sentence
        and not (tmp_path / name).exists()
    )


@pytest.mark.parametrize("name", ["config", "README", "x[1]"])
def test_odd_names_that_load(run, tmp_path, name):
    exporting.export_vae(run[0], name, tmp_path)
    assert same(load_vae(tmp_path / name), run[1]) and same(load_discriminator(tmp_path / name), run[3])
    assert torch.equal(load_latent_stats(tmp_path / name).std, run[2].latent_stats().std)


def test_a_run_is_no_place_for_an_export(run, tmp_path, capsys):
    folder, *_ = run
    before = sorted(folder.rglob("*"))
    for overwrite in ((), ("--overwrite",)):
        arguments = ("--exp-path", folder, "--vae-name", folder.name, "--save-dir", folder.parent, *overwrite)
        assert "run holds a run: choose another --vae-name" in refused(capsys, *arguments)
    assert sorted(folder.rglob("*")) == before


def folding(tmp_path):
    """A run whose VAE diffusers cannot express, without a discriminator."""
    torch.manual_seed(1)
    vae = AutoencoderKL.from_preset("tiny").eval()
    folder = tmp_path / "folding" / "checkpoints" / "0000001"
    save_vae(folder / "vae.safetensors", vae, LatentStats(torch.zeros(4), torch.ones(4)))
    save_weights(folder / "ema.safetensors", parts(vae)[0])
    return tmp_path / "folding", vae


def test_nothing_of_an_earlier_export_is_left(run, tmp_path, capsys):
    exporting.export_vae(run[0], "e2e", tmp_path)
    source, vae = folding(tmp_path)
    (tmp_path / "e2e" / "notes.txt").write_text("mine")
    files = exporting.export_vae(source, "e2e", tmp_path, overwrite=True)["files"]
    assert files == ["README.md", "e2e-latents-stats.pt", "e2e.pt", "e2e.safetensors"]
    assert {entry.name for entry in (tmp_path / "e2e").iterdir()} == {*files, "notes.txt"}
    assert same(load_vae(tmp_path / "e2e"), vae)
    (tmp_path / "e2e" / "e2e.pt").unlink()  # as a killed export leaves it
    sentence = refused(capsys, "--exp-path", source, "--vae-name", "e2e", "--save-dir", tmp_path)
    assert "e2e-latents-stats.pt exists: choose another --vae-name" in sentence


def contents(folder):
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.mark.parametrize("at", ["save_vae", "write_text", "rename"])
def test_an_overwrite_that_fails_leaves_the_old_export_as_it_was(run, tmp_path, monkeypatch, at):
    exporting.export_vae(run[0], "e2e", tmp_path)
    (tmp_path / "e2e" / "notes.txt").write_text("mine")
    before, (source, _) = contents(tmp_path / "e2e"), folding(tmp_path)
    beside = {entry.name for entry in tmp_path.iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replace = os.replace
    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"cannot write in .*No space left"):
        if at == "rename":
            fails = iter([True])
            patched.setattr(
                exporting.os,
                "replace",
                lambda old, new: (
                    full()
                    if Path(new) == tmp_path / "e2e" / "e2e.pt" and next(fails, False)
                    else replace(old, new)
                ),
            )
        else:
            patched.setattr(exporting, at, full)
        exporting.export_vae(source, "e2e", tmp_path, overwrite=True)
    assert contents(tmp_path / "e2e") == before
    assert {entry.name for entry in tmp_path.iterdir()} == beside


def test_a_first_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporting, "write_text", full)
    with pytest.raises(OSError, match="cannot write in"):
        exporting.export_vae(run[0], "new", tmp_path)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_what_is_of_no_export_is_not_replaced(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# my project")
    arguments = ("--exp-path", run[0], "--vae-name", "mine", "--save-dir", tmp_path, "--overwrite")
    assert "README.md is of no export: choose another --vae-name" in refused(capsys, *arguments)
    assert contents(tmp_path / "mine") == {"README.md": b"# my project"}
    assert "--save-dir is ''" in refused(capsys, "--exp-path", run[0], "--save-dir", "")


def test_what_cannot_be_read_is_noticed_before_anything_is_removed(run, tmp_path, monkeypatch):
    exporting.export_vae(run[0], "e2e", tmp_path)
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "e2e").iterdir()}

    def broken(*_, **__):
        raise ValueError("no card")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="no card"):
        patched.setattr(exporting, "model_card", broken)
        exporting.export_vae(run[0], "e2e", tmp_path, overwrite=True)
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "e2e").iterdir()} == before


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 500, "lo',
        '{"step": null, "loss": 9}',
        '{"loss": 9}',
        "[1]",
        '{"step": "500"}',
        '{"a":' * 9000,
    ],
)
def test_metrics_of_a_killed_run(run, tmp_path, line):
    with open(run[0] / "metrics.jsonl", "a") as file:
        file.write(line)
    exporting.export_vae(run[0], "e2e", tmp_path)
    assert "| loss | 0.125 |" in (tmp_path / "e2e" / "README.md").read_text()


def test_a_bar_in_an_option_does_not_break_the_table(run, tmp_path):
    (run[0] / "args.json").write_text(json.dumps({"note": "a|b", "data_dir": "/x/c|d"}))
    exporting.export_vae(run[0], "e2e", tmp_path)
    card = (tmp_path / "e2e" / "README.md").read_text()
    assert r"| note | a\|b |" in card and r"| data_dir | c\|d |" in card


def test_an_upload_gets_the_files_of_this_export_and_no_others(run, tmp_path, capsys, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, name, *, private, exist_ok):
            uploaded.update(name=name, private=private)
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
            names = [entry.name for entry in folder_path.iterdir()]
            uploaded.update(
                to=repo_id,
                files=set(filter_repo_objects(names, allow_patterns=allow_patterns)),
                message=commit_message,
            )

    monkeypatch.setattr(hub, "HfApi", Api)
    (tmp_path / "e[2]").mkdir()
    for name in ("private.json", "e2.pt"):
        (tmp_path / "e[2]" / name).touch()
    arguments = ("--exp-path", run[0], "--vae-name", "e[2]", "--save-dir", tmp_path, "--private")
    assert main(["export-vae", *map(str, arguments), "--push-to-hub", "me/e2e"]) == 0
    assert "uploaded to https://hub/me/e2e" in capsys.readouterr().out
    assert uploaded["name"] == uploaded["to"] == "me/e2e" and uploaded["private"] and uploaded["files"] == {
        "e[2].pt", "e[2]-latents-stats.pt", "e[2]-discriminator-ckpt.pt", "e[2].safetensors", "config.json",
        "diffusion_pytorch_model.safetensors", "README.md",
    }  # fmt: skip


@pytest.mark.parametrize("repository", ["nonsense", "me/e2e@v1", "a/b/c", "me/-x", "me/a--b"])
def test_a_repository_that_is_none_is_refused_before_anything_is_written(run, tmp_path, capsys, repository):
    arguments = (
        "--exp-path",
        run[0],
        "--vae-name",
        "e2e",
        "--save-dir",
        tmp_path,
        "--push-to-hub",
        repository,
    )
    assert f"{repository!r} is no repository of the Hub: give OWNER/NAME" in refused(capsys, *arguments)
    assert not (tmp_path / "e2e").exists()
