"""DIFFERENCES.md, the ledger: every D-number leads to a section, and what a section names exists."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
from test_project import project_files, texts

import repae_lite
from repae_lite.commands.main import main
from repae_lite.commands.presets import preset_names, read_preset
from repae_lite.commands.rows import row_names
from repae_lite.evaluation.statistics import difference_interval

ROOT = Path(__file__).resolve().parents[1]
LEDGER = (ROOT / "DIFFERENCES.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\bD[1-9]\d?\b")
FIELDS = ["Paper", "Official code", "Here", "Effect", "Switch", "Found", "Tested", "At small scale"]
SECTIONS = {
    match[1]: dict(re.findall(r"^- \*\*(.+?)\.\*\* (.+?)(?=^- |\Z)", match[2], flags=re.M | re.S))
    for match in re.finditer(r"^## (D\d+) · [^\n]+\n(.*?)(?=^## |\Z)", LEDGER, flags=re.M | re.S)
}


def mentions() -> dict[str, set[str]]:
    """D-number -> the files that mention it: code, presets, documents, the sources of notebooks' cells."""
    found: dict[str, set[str]] = {}
    for path in project_files():
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells)
        elif path.suffix in (".py", ".md", ".yaml", ".yml") and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
        else:
            continue
        for number in NUMBER.findall(text):
            found.setdefault(number, set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_number_leads_to_a_section_and_every_section_is_needed():
    found = mentions()
    assert not {number: files for number, files in found.items() if number not in SECTIONS}
    for number in SECTIONS:
        assert any(file.startswith(("repae_lite/", "tests/")) for file in found[number]), (
            f"{number} is unused"
        )
    assert list(SECTIONS) == [f"D{i + 1}" for i in range(len(SECTIONS))]


def test_library_presets_and_notebooks_say_where_the_numbers_are_explained():
    for file in set().union(*mentions().values()):
        if file.startswith(("repae_lite/", "reproduce/", "notebooks/")):
            assert "DIFFERENCES.md" in (ROOT / file).read_text(encoding="utf-8"), file


@pytest.mark.parametrize("number", SECTIONS)
def test_sections_are_complete(number):
    assert list(SECTIONS[number]) == FIELDS
    assert f"| [{number}](#" in LEDGER, f"the table at the top leaves {number} out"
    measured = SECTIONS[number]["At small scale"]
    assert measured.startswith("Not measured: ") or ("five seeds" in measured and "[" in measured)


@pytest.mark.parametrize(("number", "arm", "scores"), [
    ("D2", "repa, D2", ("frechet", "class_accuracy")),
    ("D3", "repa-e, D3", ("frechet", "psnr", "reconstruction_frechet")),
])  # fmt: skip
def test_measured_differences_are_those_of_the_record(number, arm, scores):
    record = json.loads((ROOT / "data_small" / "evidence" / "differences.json").read_text(encoding="utf-8"))
    runs = [run["scores"] for run in record["runs"]]
    assert [run["seed"] for run in record["runs"]] == record["seeds"] == [0, 1, 2, 3, 4]
    assert all(record[key] for key in ("date", "machine", "versions", "command", "steps"))
    text = SECTIONS[number]["At small scale"]
    assert f"{record['steps']} steps" in text
    for score in scores:
        found = difference_interval(
            [run[arm][score] for run in runs], [run[arm.split(",")[0]][score] for run in runs], paired=True
        )
        digits = 3 if score == "class_accuracy" else 2
        quoted = f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
        assert quoted.replace("-", "\N{MINUS SIGN}") in text, f"{score}: {quoted}"


@pytest.mark.parametrize("number", SECTIONS)
def test_the_tests_named_exist(number):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", SECTIONS[number]["Tested"])
    assert named
    for file, test in named:
        names = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if hasattr(node, "name")
        }
        assert not test or test in names, f"{file} has no {test}"


@pytest.mark.parametrize("number", SECTIONS)
def test_the_switches_named_exist(number, capsys):
    section, switch = "".join(SECTIONS[number].values()), SECTIONS[number]["Switch"]
    for name, argument in re.findall(r"`(\w+)\((\w+)=", switch):
        assert argument in inspect.signature(getattr(repae_lite, name)).parameters, f"{name}({argument}=…)"
    with pytest.raises(SystemExit):
        main(["train-repae", "--help"])
    help_text = capsys.readouterr().out
    for flag, value in re.findall(r"`(--[\w-]+)(?: ([a-z]\w*))?`", section):
        assert flag in help_text and value in help_text, f"repae train-repae has no {flag} {value}"
    assert switch.startswith("None") or "`--" in switch


def test_presets_of_the_official_runs_follow_them():
    presets = [read_preset(name) for name in preset_names() if name in row_names()]
    for options in (preset.options for preset in presets if preset.command == "repae"):
        assert options["lpips_range"] == "official" and options["train_pos_embed"] is True
        assert options["mixed_precision"] == "fp16" and options.get("loss_precision", "float32") == "float32"


def test_links_to_sections_lead_somewhere():
    titles = re.findall(r"^#+ (.+)$", LEDGER, flags=re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for path, text in texts():
        for anchor in re.findall(r"DIFFERENCES\.md#([^)\s]+)\)", text):
            assert anchor in anchors, f"{path.relative_to(ROOT)} links to #{anchor}"
    for anchor in re.findall(r"\]\(#([^)]+)\)", LEDGER):
        assert anchor in anchors, f"#{anchor}"
