"""Installed from a wheel, outside of any checkout: every public name, the presets, and `repae check`."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import repae_lite
from repae_lite.commands.presets import preset_names

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, os, sys
from pathlib import Path
import repae_lite
from repae_lite.commands.main import main
from repae_lite.commands.presets import preset_names, read_preset
from repae_lite.training.run_log import commit

target, names, data = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
assert Path(repae_lite.__file__).is_relative_to(target), repae_lite.__file__
for name in repae_lite.__all__:
    assert getattr(repae_lite, name) is not None
assert preset_names() == names and read_preset("repae-invae").released == ("invae",)
assert commit() is None
print("without the embedded data")
assert main(["check"]) == 0
os.environ["REPAE_DATA_SMALL"] = data
print("with the embedded data")
assert main(["check"]) == 0
"""


def pip(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a wheel was installed that was built of what belongs in it, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("repae_lite", "reproduce/presets"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
    pip("install", "--no-deps", "--no-index", "--target", folder / "target", *folder.glob("*.whl"))
    return folder / "target"


def test_an_installed_wheel_works_from_any_folder(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    environment.pop("REPAE_DATA_SMALL", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(installed), ",".join(preset_names()), str(ROOT / "data_small")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    without, _, complete = done.stdout.partition("with the embedded data\n")
    assert "or set REPAE_DATA_SMALL to its data_small folder" in without
    assert "repae-sdvae: train-repae, SiT-XL/2 on f8d4" in without
    assert "embedded train split: 6000 images, 10 classes" in complete


def test_the_wheel_holds_every_room_and_nothing_else(installed):
    folders = {path.name for path in (installed / "repae_lite").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {*repae_lite.ROOMS, "presets"}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {"repae_lite", *(f"repae_lite.{name}" for name in folders), "repae_lite.teaching.explorers"}
    assert set(listed) == packages
    for path in (path for ending in ("py", "js") for path in (ROOT / "repae_lite").rglob(f"*.{ending}")):
        assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert {path.name.split("-")[0] for path in installed.iterdir()} <= {"repae_lite", "bin"}
