"""The notebooks reproduce/01 … 06: their form, and a row from its images to its result by papermill."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import papermill
import pytest
from PIL import Image

from repae_lite.commands import row_results
from repae_lite.commands.rows import STAGES
from repae_lite.data.datasets import load_embedded

FOLDER = Path(__file__).resolve().parents[1] / "reproduce"


def code_of(notebook) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, kind: str) -> list[str]:
    """What the cells of a copy show, of one type; "stream" is what they print."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if kind == "stream":
        return [output.text for output in found if output.output_type == "stream"]
    return [output.data[kind] for output in found if kind in output.get("data", {})]


@pytest.mark.parametrize("name", STAGES)
def test_notebooks_are_templates_of_one_form(name):
    path = FOLDER / f"{name}.ipynb"
    notebook, first = nbformat.read(path, as_version=4), nbformat.read(FOLDER / f"{STAGES[0]}.ipynb", 4)
    nbformat.validate(notebook)
    opening = notebook.cells[0].source
    assert opening.startswith(f"# {name[:2]} · ") and f"papermill reproduce/{name}.ipynb " in opening
    assert "**However it ends**" in opening
    parameters, setup, launching = code_of(notebook)[:3]
    assert [cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())] == [
        parameters
    ]
    assert parameters == code_of(first)[0]
    assert all(isinstance(each, ast.Assign) for each in ast.parse(parameters).body)
    assert setup == code_of(first)[1].replace(STAGES[0], name) and "launch(stage, plan" in launching
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells), "commit it without outputs"
    assert notebook.metadata.kernelspec.name == "python3"
    assert not re.search(r"[\"' (]/(home|root|Users|tmp)/", path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Some of the embedded images as files, one folder per class: all of them take a minute more."""
    folder = tmp_path_factory.mktemp("images")
    pixels, labels = load_embedded("train")
    for i in range(96):
        path = folder / str(labels[i].item()) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[i].permute(1, 2, 0).numpy()).save(path)
    return folder


def papermilled(name: str, row: str, folder: Path, **parameters):
    """The copy of a notebook that papermill makes."""
    parameters = {"ROW": row, "FOLDER": str(folder), "STEPS": 3, "SAMPLES": 60, "DEVICE": "cpu", **parameters}
    return papermill.execute_notebook(
        FOLDER / f"{name}.ipynb",
        folder.parent / f"{name}.ipynb",
        parameters,
        kernel_name="python3",
        progress_bar=False,
    )


@pytest.mark.timeout(600)  # a loaded machine takes its time
def test_a_row_from_its_images_to_its_result(tmp_path, images, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    row, folder = "repae-sdvae", tmp_path / "sdvae"
    copies = {
        name: papermilled(name, row, folder, IMAGES=str(images))
        for name in ("01_preprocess", "02_train_repae", "05_generate", "06_evaluate")
    }
    assert "96 images" in "".join(outputs(copies["01_preprocess"], "text/plain"))
    trained = copies["02_train_repae"]
    assert "repae train-repae --data-dir" in "".join(outputs(trained, "stream"))
    assert any("finished after" in text for text in outputs(trained, "text/plain"))
    assert len(outputs(trained, "image/png")) == 4 and (folder / "pretrained" / row / f"{row}.pt").exists()
    assert len(outputs(copies["05_generate"], "image/png")) == 1
    (result,) = (folder / "results").glob("*.json")
    distance = json.loads(result.read_text())["metrics"]["frechet"]
    said = "".join(outputs(copies["06_evaluate"], "stream"))
    assert f"{distance:.4g}" in outputs(copies["06_evaluate"], "text/html")[0]
    assert "60 images" in said and "not to be compared" in said and "trained for 3 steps, not 400" in said
    assert row_results.read(folder / "result.json").data.images == 96

    # the notebooks of a frozen VAE, on the one that was just tuned
    row, ldm = "ldm-e2e-vavae", tmp_path / "ldm"
    tuned = ldm / "pretrained" / "repae-vavae"
    tuned.mkdir(parents=True)
    for file in (folder / "pretrained" / "repae-sdvae").glob("*.pt"):  # weights and latent statistics
        shutil.copy(file, tuned / file.name.replace("sdvae", "vavae"))
    cached = papermilled("03_cache_latents", row, ldm, DATA=str(folder / "data"))
    trained = papermilled("04_train_ldm", row, ldm, DATA=str(folder / "data"))
    assert len(outputs(cached, "image/png")) == 1 and len(outputs(trained, "image/png")) == 2
    assert (ldm / "exps" / row / "checkpoints" / "0000003").is_dir()
