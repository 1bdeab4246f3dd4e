"""`repae reproduce`: rows shown, run by papermill, stopped and gone on with, judged and put into tables."""

import json
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from repae_lite.commands import row_results
from repae_lite.commands.main import main, make_parser
from repae_lite.commands.presets import presets_dir
from repae_lite.commands.row_results import read, state, tables, verify, with_tables
from repae_lite.commands.rows import Plan, read_row, row_names
from repae_lite.evaluation.protocols import hash_of, load_protocol

ROW = "repae-sdvae"
REPRODUCE = presets_dir().parent
PARAMETERS = "\n".join(
    f"{name} = 0"
    for name in (
        "ROW SCALE FOLDER IMAGES VALIDATION DATA REFERENCE PROCESSES STEPS SAMPLES DEVICE MICRO_BATCHES"
    ).split()
)
STUB = """
import json, os, time
from pathlib import Path
about = json.loads((Path(FOLDER) / "stub.json").read_text())
for path, text in about["writes"].get(STAGE, {}).items():
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
(Path(FOLDER) / f"{STAGE}.seen").write_text(f"{ROW} {SCALE} {STEPS}")
if about["fails"] == STAGE:
    raise ValueError("the last words of a child.")
if about["dies"] == STAGE:
    os.kill(os.getpid(), 9)
while about["waits"] == STAGE:
    time.sleep(0.1)
"""


def evaluated(entry, *, value: float = 4.2, side: int = 256, **changes) -> dict:
    """A result of `repae evaluate` by an entry's protocol."""
    protocol = replace(row_results.protocol_of(entry), **changes)
    record = protocol.record(judge_weights="f" * 16, reference="a" * 16, reference_images=10000)
    return {
        "schema": 1,
        "metrics": {"frechet": value, "spatial_frechet": 4.6},
        "protocol": {"name": entry.protocol} | record,
        "samples": {"content": "b" * 16, "side": side, "manifest": {"sampling": {"seed": 0}}},
        "versions": {},
        "date": "2026-11-26",
    }


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A folder in which a full-scale row has come to its end, with other numbers for some entries."""

    def make(
        values: dict[int, float] | None = None, images: int = 1_281_167, side: int = 256, **options
    ) -> Path:
        plan = Plan.open(ROW, options.pop("scale", "full"), tmp_path / "run", **options)
        plan.data_dir.mkdir(exist_ok=True)
        names = [f"{i}.png" for i in range(min(images, 10))]
        (plan.data_dir / "images_h5.json").write_text(json.dumps(names))
        monkeypatch.setattr(row_results, "trained_on", lambda plan: {"images": images, "names": "0" * 16})
        for i, (entry, path) in enumerate(plan.results):
            path.parent.mkdir(exist_ok=True)
            value = (values or {}).get(i, entry.metrics.get("frechet", 1.0))
            path.write_text(json.dumps(evaluated(entry, value=value, side=side)))
        return row_results.write(plan)

    return make


def edited(path: Path, *, rehash: bool = True, **changes) -> Path:
    content = json.loads(path.read_text()) | changes
    if rehash:
        content["hash"] = hash_of(content)
    path.write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------- shown


def test_the_list_names_every_row_in_110_columns(capsys):
    assert main(["reproduce", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    heads = [line for line in lines if not line.startswith(" ")]
    assert [line.partition(":")[0] for line in heads] == row_names()


def test_a_dry_run_prints_command_lines_that_exist_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", ROW, "--dry-run", "--to", "05"]) == 0
    out = capsys.readouterr().out
    commands = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    for words in commands:
        assert words[0] == "repae"
        make_parser().parse_args(words[1:])
    assert {words[1] for words in commands} == {
        "download",
        "preprocess",
        "train-repae",
        "export-vae",
        "generate",
    }
    assert "# needed: --images" in out and "GB" in out and "GPU-hours (not measured" in out
    assert not list(tmp_path.iterdir())


def test_disk_and_memory_of_a_chain(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["reproduce", "ldm-e2e-vavae-800", "--dry-run"]
    assert main(words) == 0 and "up to 4 checkpoint(s) at once" in capsys.readouterr().out
    assert main([*words, "--scale", "mid", "--micro-batches", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("--micro-batches 2 ") == 2 and out.count("up to 3 checkpoint(s) at once") == 2
    assert "32 for a card of 8 GB, 8 for a card of 12 GB, 2 for a card of 24 GB" in out
    assert "# inputs: released vavae\n" in out and "an evening on one GPU for each of 2 trainings" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["repae-sdva", "--dry-run"], "did you mean repae-sdvae"),
        ([], "say which row"),
        (["--verify"], "say what to verify"),
        (["--list", "--tables"], "--list and --tables are different things"),
        ([ROW, "--dry-run", "--from", "06", "--to", "02"], "--from 06 comes after --to 02"),
        ([ROW, "--dry-run", "--from", "03"], "has no stage '03'"),
        ([ROW, "--dry-run", "--steps", "0"], "give at least 1"),
        ([ROW, "--dry-run", "--scale", "tiny", "--samples", "64"], "give a multiple of 10"),
        ([ROW, "--dry-run", "--device", "cuda:1"], "choose one of auto, cpu, cuda, mps"),
        (["rec-sdvae", "--dry-run", "--micro-batches", "2"], "rec-sdvae trains nothing: leave it out"),
        ([ROW, "--tables"], "--tables is about all rows: leave repae-sdvae out"),
        ([ROW, "--emit", "slurm", "--from", "02"], "leave --from and --to out"),
        ([ROW, "--verify"], "runs/reproduce/repae-sdvae-full/result.json does not exist"),
        ([ROW, "--folder", "run"], "needs more: give --images"),
    ],
)
def test_mistakes_are_told_in_a_sentence(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


# ---------------------------------------------------------------- run


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Notebooks that write what a stage's commands would, and a folder to run them in."""
    notebooks, folder = tmp_path / "notebooks", tmp_path / "run"
    plan = Plan.open(ROW, "tiny", folder, steps=3)
    writes = {stage.name: {str(c.done): "" for c in stage.commands if c.done} for stage in plan.stages}
    ((entry, path),) = plan.results
    writes["01_preprocess"][str(plan.data_dir / "images_h5.json")] = '["a.png"]'
    writes["06_evaluate"][str(path)] = json.dumps(evaluated(entry))
    notebooks.mkdir()
    for stage in plan.stages:
        parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
        cells = [parameters, nbformat.v4.new_code_cell(f'STAGE = "{stage.name}"\n{STUB}')]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata=kernel), notebooks / f"{stage.name}.ipynb"
        )
    monkeypatch.setattr(row_results, "checkout", lambda: notebooks)
    monkeypatch.setenv("PYTHONPATH", "")

    def set_up(**about) -> Path:
        content = {"writes": writes, "fails": None, "dies": None, "waits": None} | about
        (folder / "stub.json").write_text(json.dumps(content))
        return folder

    return set_up


def run(folder: Path, *words: str) -> int:
    return main(["reproduce", ROW, "--scale", "tiny", "--folder", str(folder), "--steps", "3", *words])


def test_a_chain_is_stopped_fails_and_goes_on_to_its_result(stubs, capsys, monkeypatch):
    stopped = []
    launch = SimpleNamespace(stop=stopped.append)
    monkeypatch.setitem(sys.modules, "repae_lite.utils.launch", launch)
    folder = stubs(waits="02_train_repae")

    def terminate():
        while not (folder / "02_train_repae.seen").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        run(folder, "--to", "02")
    assert ended.value.code == 143 and folder in stopped
    assert "the same command goes on" in capsys.readouterr().out
    assert "KeyboardInterrupt" in (folder / "02_train_repae.ipynb").read_text()

    stubs(fails="05_generate")
    assert run(folder) == 2
    out, err = capsys.readouterr()
    assert "01_preprocess: done already" in out and "02_train_repae: done in" in out
    assert "stage 05_generate failed: the last words of a child (see" in err and err.count("\n") == 1

    stubs(dies="05_generate")
    assert run(folder) == 2 and "the kernel of notebook 05_generate was killed" in capsys.readouterr().err

    stubs()
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert out.count("done already") == 2 and "trained for 3 steps, not 400" in out
    assert (folder / "02_train_repae.seen").read_text() == f"{ROW} tiny 3"
    result = read(folder / "result.json")
    assert set(result.seconds) == {"01_preprocess", "02_train_repae", "05_generate", "06_evaluate"}
    assert (
        result.data.images == 1
        and result.plan.steps == 3
        and result.seeds == {ROW: 0}
        and result.measured[0].step == 3
    )
    with pytest.raises(SystemExit) as judged:
        run(folder, "--verify")
    assert judged.value.code == 5


# ---------------------------------------------------------------- judged


def code(path: Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "--verify", str(path)])
    return ended.value.code


def test_within_and_outside_of_the_tolerance(finished, capsys):
    path = finished({2: 4.07 * 1.14})
    assert code(path) == 0 and code(path.parent) == 0
    assert "ours 4.64, +14.0%; tolerance 15%; within tolerance" in capsys.readouterr().out
    assert code(finished({2: 4.07 * 1.16})) == 4
    by_metric = {v.metric: v.state for v in verify(read(path), read_row(ROW)) if v.expected.step == 100000}
    assert by_metric["spatial_frechet"] == "not judged"
    path = finished()
    measured = json.loads(path.read_text())["measured"]
    measured[0]["result"]["metrics"].pop("frechet")
    assert code(edited(path, measured=measured)) == 5  # one was not measured


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"images": 50_000}, "it trained on 50,000 images, not 1,281,167"),
        ({"side": 512}, "its images have 512 pixels, not 256"),
        ({"steps": 7}, "it trained for 7 steps, not 400,000"),
    ],
)
def test_what_cannot_be_compared_says_why(finished, options, why, capsys):
    assert code(finished(**options)) == 5
    assert why in capsys.readouterr().out


def test_other_options_protocols_and_drawings_cannot_be_compared(finished):
    path = finished()
    content = json.loads(path.read_text())
    content["options"][ROW]["batch_size"] = 32
    verdicts = verify(read(edited(path, options=content["options"])), read_row(ROW))
    assert {v.why for v in verdicts} == {f"{ROW} trained with batch_size 32, and has 256"}
    path = finished()
    measured = json.loads(path.read_text())["measured"]
    balanced = evaluated(Plan.open(ROW, "full", path.parent).draws[0][0], labels="balanced")
    verdicts = verify(read(edited(path, measured=[measured[0] | {"result": balanced}])), read_row(ROW))
    assert "labels: 'random', 'balanced'" in verdicts[0].why
    assert verdicts[-1].why == "it was not drawn" and state(verdicts) == "not comparable"


@pytest.mark.parametrize(
    ("changes", "rehash", "told"),
    [
        ({"schema": 9}, True, "has schema 9 and this version reads 1"),
        ({"date": "yesterday"}, False, "was edited"),
        ({"processes": "many"}, True, "has processes = 'many'"),
        ({"measured": [{"protocol": "tiny", "result": {"metrics": {}}}]}, True, "without its protocol"),
        ({"row": "repae-sdva"}, True, "did you mean repae-sdvae"),
    ],
)
def test_results_that_are_none_are_refused_in_a_sentence(finished, changes, rehash, told, capsys):
    path = edited(finished(), rehash=rehash, **changes)
    assert main(["reproduce", "--verify", str(path)]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_result_of_another_row_is_told(finished, capsys):
    assert main(["reproduce", "repae-vavae", "--verify", str(finished())]) == 2
    assert "is a result of repae-sdvae, not of repae-vavae" in capsys.readouterr().err


def test_a_result_of_repae_evaluate_is_another_thing(finished, capsys):
    path = next((finished().parent / "results").glob("*.json"))
    assert main(["reproduce", "--verify", str(path)]) == 2
    assert "is no result of repae reproduce" in capsys.readouterr().err


# ---------------------------------------------------------------- tables


def test_the_tables_in_the_readme_are_those_of_rows_and_results():
    results = row_results.contributed(REPRODUCE / "results")  # reads and checks each
    text = (REPRODUCE / "README.md").read_text(encoding="utf-8")
    assert with_tables(text, tables(results)) == text, "run repae reproduce --tables"


def test_a_table_has_one_protocol_and_says_what_was_not_run(finished):
    result = read(finished({3: 9.9}))
    made = tables({"ours.json": result})
    for part in made.split("### ")[1:]:
        names = [name for name in ("adm-sde250-random", "adm-ode50-random", "reconstruction") if name in part]
        assert len(names) <= 1
    unguided = next(
        part
        for part in made.split("### ")
        if part.startswith("Full scale, adm-sde250-random, no guidance, 256")
    )
    line = next(line for line in unguided.splitlines() if "`repae-sdvae` | 400,000" in line)
    assert "[2026-" in line and "FID 4.07" in line.split("|")[5]
    assert "not run" in made and "outside tolerance ([" in made


def test_numbers_of_another_reference_do_not_enter_a_table(finished):
    path = finished()
    measured = json.loads(path.read_text())["measured"]
    first = read(path)
    for each in measured:
        each["result"]["protocol"]["reference"] = "c" * 16
        each["result"]["protocol"]["hash"] = hash_of(each["result"]["protocol"])
        each["result"]["metrics"]["frechet"] *= 1.01
    made = tables({"a.json": first, "b.json": read(edited(path, measured=measured))})
    assert "not comparable ([" in made and "reference: 'aaaaaaaaaaaaaaaa', 'cccccccccccccccc'" in made


def test_every_published_protocol_has_a_name_that_exists():
    for name in row_names():
        for entry in read_row(name).published:
            if entry.protocol not in (None, "reconstruction"):
                assert load_protocol(entry.protocol)
