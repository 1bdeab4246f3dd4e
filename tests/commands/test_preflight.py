"""What is looked at before a stage of a row starts."""

import json

import pytest

from repae_lite.commands import preflight as looking
from repae_lite.commands.preflight import preflight
from repae_lite.commands.rows import Plan


def test_missing_inputs_are_all_named_with_who_makes_them(tmp_path):
    plan = Plan.open("ldm-e2e-vavae", "full", tmp_path / "row")
    with pytest.raises(ValueError, match=r"^01_preprocess cannot start: IMAGES is not given: the folder of"):
        preflight(plan, plan.stage("01"))
    with pytest.raises(ValueError) as error:
        preflight(plan, plan.stage("04"))
    text = str(error.value)
    assert "images_h5.json does not exist (notebook 01_preprocess makes it)" in text
    assert "e2e-vavae_h5.json does not exist (notebook 03_cache_latents makes it)" in text
    assert "e2e-vavae-400k.pt does not exist (notebook 01_preprocess makes it)" in text
    with pytest.raises(ValueError, match="REFERENCE is not given"):
        preflight(plan, plan.stage("06"))


def test_a_stage_that_can_start_says_what_it_takes(tmp_path):
    plan = Plan.open("repae-sdvae", "tiny", tmp_path / "row", steps=3)
    plan.data_dir.mkdir()
    (plan.data_dir / "images_h5.json").write_text(json.dumps(["a.png"] * 12))
    text = "\n".join(preflight(plan, plan.stage("02")))
    assert "2 of 2 commands of 02_train_repae are left" in text
    assert "12 images" in text and "memory: " in text and "disk: " in text
    (plan.data_dir / "images_h5.json").write_text("[")
    with pytest.raises(ValueError, match="is no list of images: remove it"):
        preflight(plan, plan.stage("02"))
    for command in plan.stage("02").commands:
        command.done.mkdir(parents=True)
    assert len(preflight(plan, plan.stage("02"))) == 1  # finished: its inputs may be gone


def test_other_data_a_small_disk_and_a_device_that_is_not_there(tmp_path, monkeypatch):
    plan = Plan.open("repae-sdvae", "full", tmp_path / "row", device="mps")
    plan.data_dir.mkdir()
    (plan.data_dir / "images_h5.json").write_text(json.dumps(["a.png"] * 12))
    found = looking.this_machine(tmp_path) | {"devices": [], "disk": {"folder": "", "free": 10**9}}
    monkeypatch.setattr(looking, "this_machine", lambda folder: found)
    with pytest.raises(ValueError) as error:
        preflight(plan, plan.stage("02"))
    for words in (
        "has 12 images, and the row's number is of 1,281,167",
        "GB of disk are needed in all, 1 are free here",
        "there is no CUDA device",
        "DEVICE is mps, which this machine does not have",
    ):
        assert words in str(error.value)
