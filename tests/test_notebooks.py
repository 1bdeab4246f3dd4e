"""The form of the notebooks: anatomy, tags, outputs from one whole run, size, proportions, paths."""

import ast
import json
import re
from pathlib import Path
from statistics import median

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = FOLDER / "solutions"
CHAPTERS = {
    "00_map",
    "01_vae",
    "02_latent_diffusion",
    "03_repa",
    "04_stop_gradient",
    "05_end_to_end",
    "06_drop_in_vae",
    "07_full_scale",
    "08_explorer",
}


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


def checks(notebook):
    """The exercises' check functions, by name, as source without comments and layout."""
    trees = (
        ast.parse("\n".join(line for line in cell.source.splitlines() if line[:1] not in "%!"))
        for cell in code_cells(notebook)
    )
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.unparse(node) for node in functions if node.name.startswith("check_")}


def test_there_are_notebooks_and_solutions_to_each():
    assert {p.stem for p in NOTEBOOKS} >= CHAPTERS
    assert {p.stem for p in NOTEBOOKS} == {p.stem for p in SOLUTIONS.glob("*.ipynb")}


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


def test_solutions_pass_the_checks_of_the_chapter(path, notebook):
    solutions = nbformat.read(SOLUTIONS / path.name, as_version=4)
    assert solutions.cells[0].source.startswith(f"# {path.stem[:2]} · Solutions")
    assert f"(../{path.name})" in solutions.cells[0].source
    assert checks(solutions) == checks(notebook)
    for name in checks(notebook):  # called, in the open; nbval runs them
        assert any(
            line.startswith(f"{name}(") for cell in code_cells(solutions) for line in cell.source.splitlines()
        ), name


def test_solutions_were_run_and_are_small(path):
    solutions = nbformat.read(SOLUTIONS / path.name, as_version=4)
    cells = [cell for cell in code_cells(solutions) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(
        out.output_type == "error" or out.get("name") == "stderr" for cell in cells for out in cell.outputs
    )
    assert len(tagged(solutions, "parameters")) == 1 and "torch.manual_seed(SEED)" in "".join(
        cell.source for cell in cells
    )
    assert (SOLUTIONS / path.name).stat().st_size <= 1_000_000


def test_evidence_beside_signature_figures_has_five_seeds(path, notebook):
    quoted = re.findall(
        r'(?:"evidence" / |read\()"(\w+\.json)"', "\n".join(cell.source for cell in code_cells(notebook))
    )
    assert quoted or path.stem in ("00_map", "08_explorer")  # which compare no methods over seeds
    for name in quoted:
        record = json.loads((FOLDER.parent / "data_small" / "evidence" / name).read_text(encoding="utf-8"))
        assert all(record[key] for key in ("date", "machine", "command"))
        assert all(run["commit"] for run in record["runs"])
        if "seeds" in record:  # a chapter's own: all arms of a seed in one run
            assert len(set(record["seeds"])) >= 5 and record["steps"]
            assert [run["seed"] for run in record["runs"]] == record["seeds"]
        else:  # a flat list: one run for every arm, length and seed
            seeds = {}
            for run in record["runs"]:
                seeds.setdefault((run["arm"], run["steps"]), []).append(run["seed"])
            fewest = 2 if name == "longer.json" else 5  # of the former both values are shown, no interval
            assert all(len(set(each)) == len(each) >= fewest for each in seeds.values()), seeds


def test_has_signature_scoreboard_and_widget(notebook):
    figures = [
        out
        for cell in tagged(notebook, "signature")
        for out in cell.outputs
        if "image/png" in out.get("data", {})
    ]
    assert figures
    assert any(
        "text/html" in out.get("data", {}) for cell in tagged(notebook, "scoreboard") for out in cell.outputs
    )
    assert any("explore(" in cell.source for cell in code_cells(notebook))


def test_was_run_from_top_to_bottom_in_full(notebook):
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(out.output_type == "error" for cell in cells for out in cell.outputs)
    assert not any(out.get("name") == "stderr" for cell in cells for out in cell.outputs), (
        "progress bars or warnings"
    )
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2


def test_proportions(path, notebook):
    sources = [cell.source for cell in code_cells(notebook) if cell.source.strip()]
    assert 15 <= len(sources) <= 40
    assert median(len(source.splitlines()) for source in sources) <= 10
    ratio = len(prose(notebook).split()) / sum(len(source.split()) for source in sources)
    assert 1 <= ratio <= 2.5
    assert path.stat().st_size <= 1_000_000


def test_no_machine_paths_and_no_installs(path):
    text = path.read_text(encoding="utf-8") + (SOLUTIONS / path.name).read_text(encoding="utf-8")
    assert not re.search(r"[\"' (](/home/|/root/|/Users/|/work/|/tmp/|C:\\\\)", text)
    assert not re.search(r"^\s*\"?[%!]\s?(pip|conda)", text, re.MULTILINE)


def test_named_and_linked_files_exist(path, notebook):
    for file, book in (
        (path, notebook),
        (SOLUTIONS / path.name, nbformat.read(SOLUTIONS / path.name, as_version=4)),
    ):
        for name in re.findall(
            r"`((?:notebooks|repae_lite|data_small|reproduce|tests)/[\w./-]+)`", prose(book)
        ):
            assert (FOLDER.parent / name).exists(), name
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose(book)):
            assert (file.parent / link).exists(), link


def test_glossary_is_in_order_and_has_every_term_that_is_linked():
    text = (FOLDER / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert terms == sorted(terms, key=str.lower)
    anchors = {re.sub(r"[^\w -]", "", term.lower()).replace(" ", "-") for term in terms}
    assert len(anchors) == len(terms)
    chapters = [prose(nbformat.read(path, as_version=4)) for path in NOTEBOOKS]
    linked = {anchor for chapter in chapters for anchor in re.findall(r"glossary\.md#([\w-]+)\)", chapter)}
    assert linked | set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors
