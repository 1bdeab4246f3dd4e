"""`repae check`: what it says of a machine, and that its arithmetic is that of the networks."""

import json
import re
import shutil

import pytest
import torch

from repae_lite.commands import machine
from repae_lite.commands.main import main
from repae_lite.commands.presets import Preset, preset_names, read_preset
from repae_lite.utils import devices
from repae_lite.utils.files import data_small_dir


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
    assert list(printed["presets"]) == preset_names(based=False) and printed["presets"]["tiny"]["possible"]


def test_named_presets_are_shown_and_others_only_counted(found, capsys):
    assert set(found["presets"]) == set(preset_names(based=False)) < set(preset_names())
    others = len(preset_names()) - len(found["presets"])
    assert machine.report(found).endswith(
        f"  {others} others: repae check NAME shows one, repae reproduce --list the rows they are for"
    )
    assert main(["check", "--json", "repae-l-512", "sit-sdvae"]) == 0
    shown = json.loads(capsys.readouterr().out)["presets"]
    assert list(shown) == ["repae-l-512", "sit-sdvae"] and shown["sit-sdvae"]["encoder"] is None
    assert shown["repae-l-512"]["disk"] > 1_281_167 * 3 * 512**2
    assert main(["check", "repae-l-no-batchnorm"]) == 2
    assert "is not built: every SiT here begins with BatchNorm" in capsys.readouterr().err


def test_parameters_are_those_of_the_published_networks():
    count = machine.parameters(read_preset("repae-sdvae").config)
    assert 83e6 < count["vae"] < 84e6  # SD-VAE's 83.7 M
    assert 675e6 < count["sit"] < 690e6  # SiT-XL/2's 675 M and one projector
    assert 2.7e6 < count["discriminator"] < 2.8e6


def test_needs_are_counted_by_hand():
    preset = read_preset("ldm-e2e-vavae")
    count, needs = machine.parameters(preset.config), machine.needs(preset)
    assert needs["device_memory"] == 4 * (
        5 * count["sit"] + count["vae"]
    )  # weight, gradient, two moments, average; frozen VAE
    images, latents = 1_281_167 * 256 * 256 * 3, 1_281_167 * 2 * 32 * 16 * 16 * 4
    assert needs["disk"] == images + latents + 8 * 4 * 4 * count["sit"]  # 400,000 steps, one every 50,000
    tiny = read_preset("tiny")  # without images to be written and without a discriminator
    count = machine.parameters(tiny.config)
    trained = count["sit"] + count["vae"]
    assert machine.needs(tiny)["device_memory"] == 4 * (4 * trained + count["sit"])
    assert machine.needs(tiny)["disk"] == 4 * 4 * (3 * trained + count["sit"])  # 400 steps, one every 100
    without = machine.needs(read_preset("repae-l-no-gan"))
    discriminator = 16 * machine.parameters(read_preset("repae-l-sdvae").config)["discriminator"]
    assert machine.needs(read_preset("repae-l-sdvae"))["device_memory"] - without["device_memory"] == (
        discriminator
    )
    tuned = machine.needs(read_preset("repae-invae"))
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
    preset = read_preset("repae-sdvae")
    assert machine.verdict(preset, machine_with(found, memory=0))["against"] == ["there is no CUDA device"]
    large = machine.verdict(preset, machine_with(found, memory=80 * 2**30))
    assert large == {"possible": True, "against": [], "missing": ["preprocessed images (repae preprocess)"]}
    assert (
        "weights and optimisers alone need"
        in machine.verdict(preset, machine_with(found, memory=4 * 2**30))["against"][0]
    )
    assert (
        "GB of disk are needed"
        in machine.verdict(preset, machine_with(found, memory=80 * 2**30, free=10**9))["against"][0]
    )
    assert (
        "invae (repae download invae)"
        in machine.verdict(read_preset("repae-invae"), machine_with(found, memory=0))["missing"]
    )
    assert machine.verdict(read_preset("tiny"), machine_with(found, memory=0, free=10**9))["possible"]


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


def test_a_vae_alone_needs_no_sit():
    preset = Preset("vae", {"vae": "f8d4", "batch_size": 64}, released=(), images=1000)
    count, needs = machine.parameters(preset.config), machine.needs(preset)
    trained = count["vae"] + count["discriminator"]
    assert needs["command"] == "train-vae" and needs["batch"] == 64 and needs["encoder"] is None
    assert needs["device_memory"] == 4 * 4 * trained
    assert needs["disk"] == 1000 * 3 * 256 * 256 + 8 * 4 * 3 * trained
    assert needs["images"] == 1000 and needs["steps"] == 400_000


def test_without_the_embedded_data_the_rest_is_told(found, tmp_path, monkeypatch):
    monkeypatch.setenv("REPAE_DATA_SMALL", str(tmp_path / "gone"))
    without = found | {"embedded": machine._embedded()}
    sentence = "the embedded data folder .*gone does not exist: .* set REPAE_DATA_SMALL"
    assert re.search(sentence, machine.report(without))
    tiny = machine.verdict(read_preset("tiny"), without)
    assert not tiny["possible"] and re.match(sentence, tiny["against"][0])
    there = machine.verdict(read_preset("repae-sdvae"), machine_with(without, memory=80 * 2**30))
    assert there["possible"]


def test_several_encoders_and_none_are_looked_for(found):
    def missing(enc_type):
        options = {"vae": "f8d4", "enc_type": enc_type, "vae_align_proj_coeff": 0.0}
        preset = Preset("repae", options, released=(), images=1)
        return machine.verdict(preset, machine_with(found, memory=80 * 2**30))["missing"]

    assert missing("none") == ["preprocessed images (repae preprocess)"]
    assert missing("dinov2-vit-b,mae-vit-l")[1:] == ["mae-vit-l (timm fetches it at the first run)"]


# ---------------------------------------------------------------- devices


def test_a_gpu_without_code_is_not_possible_here(found, monkeypatch):
    v100 = {"get_device_name": "Tesla V100", "get_device_capability": (7, 0), "device_count": 1}
    for name, value in (v100 | {"is_available": True, "get_arch_list": ["sm_75", "sm_90"]}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    (device,) = machine._devices()
    assert "it was built for sm_75 and newer (sm_75, sm_90); " in device["obstacle"]
    there = machine_with(found, memory=0) | {"devices": [device]}
    against = machine.verdict(read_preset("repae-sdvae"), there)["against"]
    assert against == ["torch cannot use cuda:0 (Tesla V100)"]
    assert machine.verdict(read_preset("tiny"), there)["possible"]
    text = machine.report(there)
    assert (
        f"cuda:0: Tesla V100, not usable: {device['obstacle']}\n" in text and "\nno CUDA device" not in text
    )


def test_a_gpu_that_torch_does_not_see_is_told(found):
    there = machine_with(found, memory=0) | {"unusable": "torch 2.9 cannot use a Tesla T4 (too old): update"}
    assert "\nnot used: torch 2.9 cannot use a Tesla T4 (too old): update\n" in machine.report(there)
    against = machine.verdict(read_preset("repae-sdvae"), there)["against"]
    assert against == ["there is no CUDA device that torch can use"]


def test_what_a_device_lacks_is_told(found, monkeypatch):
    monkeypatch.setattr(devices, "compile_obstacle", lambda device: "no compiler")
    about = {"name": "mps", "kind": "Apple GPU", "memory": 2**34, "free": 2**34}
    there = found | {"devices": [about | machine._abilities("mps")]}
    text = machine.report(there)
    assert (
        "mps: Apple GPU, 16.0 GiB, 16.0 GiB free, no bf16, no torch.compile (no compiler); no float64" in text
    )
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in text and "\nno CUDA device: " in text
    assert "\ncpu: float32, torch.compile\n" in machine.report(
        there | {"cpu": found["cpu"] | {"compile": None}}
    )


# ---------------------------------------------------------------- damage


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the embedded data that may be damaged."""
    shutil.copytree(data_small_dir(), tmp_path / "data", ignore=shutil.ignore_patterns("logs", "evidence"))
    monkeypatch.setenv("REPAE_DATA_SMALL", str(tmp_path / "data"))
    return tmp_path / "data"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_embedded_data_is_named_with_what_restores_it(found, copy):
    assert machine.damaged_files(copy) == {} and machine._embedded() == found["embedded"]
    flip(copy / "train" / "images.h5")
    flip(copy / "vae.safetensors")
    (copy / "eval" / "images_h5.json").unlink()
    (sentence,) = machine._embedded()["missing"]
    assert (
        "is not whole: train/images.h5 (changed), eval/images_h5.json (missing), vae.safetensors (changed); "
        in (sentence)
    )
    assert f"git -C {copy} checkout -- train/images.h5 eval/images_h5.json vae.safetensors" in sentence
    without = found | {"embedded": machine._embedded()}
    assert sentence in machine.report(without)
    assert machine.verdict(read_preset("tiny"), without)["against"] == [sentence]


@pytest.mark.parametrize("content", [None, "", "nonsense", "a  b\n", "\xff\n"])
def test_checksums_themselves_may_be_damaged(copy, content):
    path = copy / machine.CHECKSUMS
    if content is None:
        path.unlink()
    else:
        path.write_text(content, encoding="latin-1")
    assert list(machine.damaged_files(copy)) == [machine.CHECKSUMS]


def test_a_folder_in_the_place_of_a_file_is_unreadable(copy):
    (copy / "vae.safetensors").unlink()
    (copy / "vae.safetensors").mkdir()
    assert machine.damaged_files(copy)["vae.safetensors"].startswith("unreadable: ")
