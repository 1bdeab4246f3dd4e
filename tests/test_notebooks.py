"""The notebooks' form: anatomy, tags, outputs kept from a run from top to bottom, size, proportions, paths."""

import ast
import re
from pathlib import Path
from statistics import median

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def test_there_are_notebooks():
    assert {"00_map", "05_end_to_end"} <= {p.stem for p in NOTEBOOKS}


def test_opens_with_claim_needs_time_and_map(path, notebook):
    first = notebook.cells[0].source
    assert first.startswith(f"# {path.stem[:2]} · ")
    for phrase in ("**By the end you will have shown that**", "**Needs**", "**Time**", "minute"):
        assert phrase in first, phrase
    picture = notebook.cells[1]
    assert picture.cell_type == "code" and "method_map(" in picture.source
    assert "image/png" in picture.outputs[0].data


def test_one_parameters_cell_of_literals(notebook):
    (cell,) = tagged(notebook, "parameters")
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
    assert "SEED" in cell.source


def test_set_up_is_short_and_alike(notebook):
    cells = code_cells(notebook)
    setup = cells[cells.index(tagged(notebook, "parameters")[0]) + 1].source
    assert len(setup.splitlines()) <= 15
    for line in ("torch.manual_seed(SEED)", 'if "CI" in os.environ:', "torch.__version__"):
        assert line in setup, line


def test_closes_with_pitfalls_exercises_summary_references(notebook):
    text = prose(notebook)
    places = [text.index(heading) for heading in ("## Pitfalls", "## Exercises", "## Summary")]
    assert places == sorted(places)
    end = text[places[2] :]
    assert all(part in end for part in ("**At full scale**", "**Next**", "**References**", "arXiv"))
    exercises = text[places[1] : places[2]]
    assert len(re.findall(r"^\*\*\d \(\d+ minutes\)\.\*\*", exercises, re.MULTILINE)) == 3
    assert exercises.count("<details><summary>Solution</summary>") == 3
    assert sum("def check_" in cell.source and "assert" in cell.source for cell in code_cells(notebook)) == 3


def test_has_signature_scoreboard_and_widget(notebook):
    figures = [out for cell in tagged(notebook, "signature") for out in cell.outputs if "image/png" in out.get("data", {})]
    assert figures
    assert any("text/html" in out.get("data", {}) for cell in tagged(notebook, "scoreboard") for out in cell.outputs)
    assert any("ipywidgets.interact" in cell.source for cell in code_cells(notebook))


def test_was_run_from_top_to_bottom_in_full(notebook):
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(out.output_type == "error" for cell in cells for out in cell.outputs)
    assert not any(out.get("name") == "stderr" for cell in cells for out in cell.outputs), "progress bars or warnings"
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2


def test_proportions(path, notebook):
    sources = [cell.source for cell in code_cells(notebook) if cell.source.strip()]
    assert 15 <= len(sources) <= 40
    assert median(len(source.splitlines()) for source in sources) <= 10
    ratio = len(prose(notebook).split()) / sum(len(source.split()) for source in sources)
    assert 1 <= ratio <= 2.5
    assert path.stat().st_size <= 1_000_000


def test_no_machine_paths_and_no_installs(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"[\"' (](/home/|/root/|/Users/|/work/|/tmp/|C:\\\\)", text)
    assert not re.search(r"^\s*\"?[%!]\s?(pip|conda)", text, re.MULTILINE)


def test_named_files_exist(notebook):
    root = FOLDER.parent
    for name in re.findall(r"`((?:notebooks|repae_lite|data_small|reproduce|tests)/[\w./-]+)`", prose(notebook)):
        assert (root / name).exists(), name
