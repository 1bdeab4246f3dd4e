"""`repae check`: what it says of a machine, and that its arithmetic is that of the networks."""

import json
from pathlib import Path

import pytest

from repae_lite.commands import machine
from repae_lite.commands.main import main
from repae_lite.commands.presets import RECIPES

PRESETS = Path(__file__).resolve().parents[2] / "reproduce" / "presets"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return machine.survey(pretrained=tmp_path_factory.mktemp("pretrained"))


def test_the_survey_is_json_and_becomes_text(found):
    assert json.loads(json.dumps(found)) == found
    text = machine.report(found)
    assert (
        "embedded train split: 6000 images, 10 classes" in text
        and "repae-sdvae: train-repae, SiT-XL/2 on f8d4" in text
    )
    assert found["packages"]["torch"] and found["memory"]["total"] > 0 and found["disk"]["free"] > 0
    assert found["embedded"]["splits"]["eval"] == {"images": 2000, "classes": 10}


def test_the_command_prints_json(capsys):
    assert main(["check", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["presets"]) == set(RECIPES) and printed["presets"]["tiny"]["possible"]


def test_parameters_are_those_of_the_published_networks():
    count = machine.parameters(RECIPES["repae-sdvae"])
    assert 83e6 < count["vae"] < 84e6  # SD-VAE's 83.7 M
    assert 675e6 < count["sit"] < 690e6  # SiT-XL/2's 675 M and one projector
    assert 2.7e6 < count["discriminator"] < 2.8e6


def test_needs_are_counted_by_hand():
    recipe = RECIPES["ldm-e2e-vavae"]
    count, needs = machine.parameters(recipe), machine.needs(recipe)
    assert needs["device_memory"] == 4 * (
        5 * count["sit"] + count["vae"]
    )  # weight, gradient, two moments, average; frozen VAE
    images, latents = 1_281_167 * 256 * 256 * 3, 1_281_167 * 2 * 32 * 16 * 16 * 4
    assert needs["disk"] == images + latents + 3 * 4 * 4 * count["sit"]
    tuned = machine.needs(RECIPES["repae-invae"])
    assert tuned["device_memory"] > needs["device_memory"] and tuned["downloads"] == ["invae"]


def machine_with(found, *, memory, free=10**13):
    devices = (
        [{"name": "cuda:0", "kind": "a GPU", "memory": memory, "free": memory, "bf16": True}]
        if memory
        else []
    )
    cached = {"hub": "", "encoders": ["tiny", "dinov2-vit-b"], "released": [], "pretrained": ["sdvae"]}
    return found | {"devices": devices, "disk": {"folder": "", "free": free}, "cached": cached}


def test_verdicts(found):
    recipe = RECIPES["repae-sdvae"]
    assert machine.verdict(recipe, machine_with(found, memory=0))["against"] == ["there is no CUDA device"]
    large = machine.verdict(recipe, machine_with(found, memory=80 * 2**30))
    assert large == {"possible": True, "against": [], "missing": ["preprocessed images (repae preprocess)"]}
    assert (
        "weights and optimisers alone need"
        in machine.verdict(recipe, machine_with(found, memory=4 * 2**30))["against"][0]
    )
    assert (
        "GB of disk are needed"
        in machine.verdict(recipe, machine_with(found, memory=80 * 2**30, free=10**9))["against"][0]
    )
    assert (
        "invae (repae download invae)"
        in machine.verdict(RECIPES["repae-invae"], machine_with(found, memory=0))["missing"]
    )
    assert machine.verdict(RECIPES["tiny"], machine_with(found, memory=0, free=10**9))["possible"]


def test_a_gpu_shows_in_the_text(found):
    text = machine.report(machine_with(found, memory=24 * 2**30))
    assert "cuda:0: a GPU, 24.0 GiB, 24.0 GiB free, bf16" in text and "released sets here: sdvae" in text


def test_what_is_cached_is_seen(tmp_path, monkeypatch):
    from repae_lite.networks.encoder_table import ENCODERS

    spec = ENCODERS["dinov2-vit-b"]
    for repository in (f"timm/{spec.timm_name}", "REPA-E/e2e-vavae"):
        snapshot = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / "1"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").touch()
    (tmp_path / "hub" / "models--REPA-E--sdvae").mkdir()  # without files
    (tmp_path / "pretrained" / "invae").mkdir(parents=True)
    (tmp_path / "pretrained" / "invae" / "x.pt").touch()
    (tmp_path / "pretrained" / "vavae" / ".cache").mkdir(parents=True)  # of a download that fetched nothing
    monkeypatch.setattr(machine.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = machine._cached(tmp_path / "pretrained")
    assert cached["encoders"] == ["dinov2-vit-b", "tiny"]
    assert cached["released"] == ["e2e-vavae"] and cached["pretrained"] == ["invae"]


def test_encoders_are_looked_for_where_timm_puts_them(tmp_path, monkeypatch):
    """clip's weights lie in another network's repository, those of jepa have an address only; mocov3's never
    come from timm.
    """
    monkeypatch.setattr(machine.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(machine.torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    assert machine._cached(tmp_path)["encoders"] == ["tiny"]
    for name in ("vit_large_patch14_clip_224.openai", "vit_base_patch16_224.augreg2_in21k_ft_in1k"):
        snapshot = tmp_path / "hub" / f"models--timm--{name}" / "snapshots" / "1"
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").touch()
    (tmp_path / "torch" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torch" / "checkpoints" / "IN1K-vit.h.14-300e.pth.tar").touch()
    assert machine._cached(tmp_path)["encoders"] == ["clip-vit-L", "jepa-vit-h", "tiny"]


@pytest.mark.skipif(not PRESETS.is_dir(), reason="the presets of the trainer are not here")
def test_recipes_are_the_presets():
    yaml = pytest.importorskip("yaml")
    options = {
        "command": "command",
        "model": "model",
        "vae": "vae",
        "enc-type": "encoder",
        "batch-size": "batch",
    }
    options |= {"max-train-steps": "steps", "resolution": "resolution"}
    presets = {
        path.stem: yaml.safe_load(path.read_text())
        for path in PRESETS.glob("*.yaml")
        if "command" in path.read_text()
    }
    assert set(presets) == set(RECIPES)
    for name, preset in presets.items():
        for option, field in options.items():
            assert option not in preset or preset[option] == getattr(RECIPES[name], field), (
                f"{name}: {option}"
            )
