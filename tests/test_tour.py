"""The runner behind `make tour`, on toy notebooks in a folder whose path has a space."""

import base64
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("papermill")
pytest.importorskip("myst_nb")

TOUR = Path(__file__).resolve().parents[1] / "notebooks" / "tour.py"

# A 1 x 1 PNG and a table, shown the way matplotlib and pandas show theirs: without importing either.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGD4DwABBAEAX+XDSwAAAABJRU5ErkJggg=="
GOOD = [
    ("markdown", "# A toy *chapter*\n\nBy the end you will have seen it run.", []),
    ("code", "seed = 0\nwait = 0", ["parameters"]),
    ("code", "import os, sys, time\nprint(sys.executable)\ntime.sleep(wait)", []),
    ("code", f"display({{'image/png': '{PNG}', 'text/plain': '<Figure size 1x1>'}}, raw=True)",
     ["signature"]),
    ("code", "display({'text/html': '<table><tr><td>row 7</td></tr></table>', 'text/plain': '-'}, raw=True)",
     ["scoreboard"]),
    ("markdown", "The loss **fell** & stayed down, $z_t$ too.", ["finding"]),
    ("code", "print('seed is', seed, 'smoke is', os.environ.get('CI'))", ["finding"]),
]  # fmt: skip
BAD = [
    ("markdown", "# The one that fails", []),
    ("code", "done = 'this much is kept'\nprint(done)", []),
    ("code", "raise ValueError('no such latent')", []),
]


def notebook(cells):
    """A notebook from (kind, source, tags) triples; it asks for a kernel that is not installed."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    made = [make[kind](source, metadata={"tags": tags}) for kind, source, tags in cells]
    spec = {"kernelspec": {"name": "somebody-elses", "display_name": "?", "language": "python"}}
    return nbformat.v4.new_notebook(cells=made, metadata=spec)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with tour.py and one good notebook, and a home where the kernel python3 is a broken one."""
    root = tmp_path / "a check out"
    (root / "notebooks").mkdir(parents=True)
    shutil.copy(TOUR, root / "notebooks")
    shutil.copytree(TOUR.parent / "site", root / "notebooks" / "site")
    nbformat.write(notebook(GOOD), root / "notebooks" / "01_good.ipynb")
    for data in (".local/share/jupyter", "Library/Jupyter"):
        kernel = tmp_path / "home" / data / "kernels" / "python3"
        kernel.mkdir(parents=True)
        broken = {"argv": ["false"], "display_name": "broken", "language": "python"}
        (kernel / "kernel.json").write_text(json.dumps(broken))
    return root


def start(root, *options):
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "JUPYTER_PATH", "XDG_DATA_HOME")}
    environment |= {"HOME": str(root.parent / "home"), "JUPYTER_PREFER_ENV_PATH": "0", "MPLBACKEND": "Agg"}
    return subprocess.Popen(
        [sys.executable, "notebooks/tour.py", *options], cwd=root, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(root, *options):
    process = start(root, *options)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def left(root):
    return sorted(path.name for path in (root / "runs" / "tour").iterdir())


def test_page_holds_the_tagged_results(checkout):
    code, stdout, stderr = run(checkout, "--smoke", "--param", "seed=3")
    assert code == 0, stderr
    assert left(checkout) == ["01_good.ipynb", "pages"]
    assert "01_good  cell 6/6" in stdout and stdout.strip().endswith("Results: runs/tour/pages/index.html")

    page = (checkout / "runs/tour/pages/index.html").read_text()
    assert re.search(r'href="01_good.html"><span[^>]*>A toy <em>chapter</em>', page)
    (png,) = (checkout / "runs/tour/pages/_images").glob("*.png")
    assert png.read_bytes() == base64.b64decode(PNG) and png.name in page and "Figure size" not in page
    assert "<td>row 7</td>" in page
    assert "<strong>fell</strong> &amp; stayed" in page and "<msub><mi>z</mi><mi>t</mi></msub>" in page
    assert "seed is 3 smoke is 1" in page and "smoke run" in page and "seed = 3" in page
    whole = re.sub("<[^>]*>", "", (checkout / "runs/tour/pages/01_good.html").read_text())
    assert "import os, sys, time" in whole
    assert float(re.search(r"at most ([\d.]+) GiB", page)[1]) > 0
    needed = re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(https?:|//|/)""", page)
    assert not needed, "the page must not need a network"
    assert str(checkout) not in page

    executed = nbformat.read(checkout / "runs/tour/01_good.ipynb", as_version=4)
    assert sys.executable in "".join(o.get("text", "") for c in executed.cells for o in c.get("outputs", []))


def test_failure_is_one_sentence_and_the_next_success_clears_it(checkout):
    bad = checkout / "notebooks" / "02_bad.ipynb"
    nbformat.write(notebook(BAD), bad)
    code, _, stderr = run(checkout)
    assert code == 1
    assert stderr.strip() == (
        "02_bad failed in cell [2]: ValueError: no such latent"
        " (what ran is in runs/tour/02_bad.failed.ipynb)."
    )
    assert left(checkout) == ["01_good.ipynb", "02_bad.failed.ipynb", "pages"]
    assert "this much is kept" in (checkout / "runs/tour/02_bad.failed.ipynb").read_text()
    page = (checkout / "runs/tour/pages/index.html").read_text()
    assert "02_bad failed in cell [2]: ValueError: no such latent" in page and "row 7" in page

    nbformat.write(notebook(BAD[:2]), bad)
    code, _, stderr = run(checkout, "--only", "02")
    assert code == 0, stderr
    assert left(checkout) == ["01_good.ipynb", "02_bad.ipynb", "pages"]
    page = (checkout / "runs/tour/pages/index.html").read_text()
    assert "row 7" in page, "results of notebooks that were not run again stay"
    assert "no such latent" not in page


def test_interruption_leaves_nothing_half_written(checkout):
    process = start(checkout, "--param", "wait=600")
    partial = checkout / "runs/tour/01_good.ipynb.partial"
    kernel = None
    for _ in range(300):  # until the kernel has printed which Python it is and sleeps
        time.sleep(0.1)
        if partial.exists() and '"execution_count": 1' in partial.read_text():
            kernel = children(process.pid)
            if kernel:
                break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.strip() == "Interrupted: finished notebooks are kept, the one that was running is not."
    assert left(checkout) == []
    assert not any(alive(pid) for pid in kernel), "the kernel outlived the runner"

    code, _, stderr = run(checkout)
    assert code == 0, stderr
    assert left(checkout) == ["01_good.ipynb", "pages"]


def test_a_kernel_that_dies_is_named(checkout):
    cell = ("code", "import os, sys\nprint('out of luck', file=sys.__stderr__, flush=True)\nos._exit(9)", [])
    nbformat.write(notebook([cell]), checkout / "notebooks" / "02_dies.ipynb")
    code, _, stderr = run(checkout, "--only", "02")
    assert code == 1
    assert stderr.startswith("02_dies failed in cell [1]: its kernel died (its last words: out of luck)")
    assert len(stderr.strip().splitlines()) == 1
    assert left(checkout) == ["02_dies.failed.ipynb", "pages"]


def test_a_kernel_that_stops_answering_is_started_over(checkout):
    wait = (
        "import pathlib, time\nseen = pathlib.Path('seen')\nfirst = not seen.exists()\nseen.touch()\n"
        "time.sleep(600 * first)"
    )
    nbformat.write(notebook([("code", wait, [])]), checkout / "notebooks" / "02_hangs.ipynb")
    code, stdout, stderr = run(checkout, "--only", "02", "--patience", "2")
    assert (code, stderr) == (0, "")
    assert "the kernel stopped answering: starting over" in stdout
    assert left(checkout) == ["02_hangs.ipynb", "pages"]


def test_a_kernel_that_stops_answering_twice_is_named(checkout):
    nbformat.write(
        notebook([("code", "import time\ntime.sleep(600)", [])]), checkout / "notebooks" / "02_hangs.ipynb"
    )
    code, _, stderr = run(checkout, "--only", "02", "--patience", "2")
    assert code == 1 and stderr.startswith("02_hangs failed in cell [1]: its kernel stopped answering, twice")


def children(pid):
    psutil = pytest.importorskip("psutil")
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def alive(pid):
    psutil = pytest.importorskip("psutil")
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--only", "07"], "--only 07 matches no notebook; there are 01_good."),
        (["--param", "sede=1"], "--param sede: none of the chosen notebooks has a parameter of that name."),
    ],
)
def test_wrong_options(checkout, options, sentence):
    code, _, stderr = run(checkout, *options)
    assert (code, stderr.strip()) == (2, sentence)


def test_only_widgets_that_live_without_a_kernel_are_kept(monkeypatch):
    spec = importlib.util.spec_from_file_location("tour", TOUR)
    tour = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tour", tour)  # where dataclasses look for their module
    spec.loader.exec_module(tour)
    models = {
        "a1": {"state": {"children": ["IPY_MODEL_a2"]}},
        "a2": {"state": {"layout": "IPY_MODEL_a3", "maps": ["encoder"]}},
        "a3": {"state": {}},
        "b1": {"state": {"children": ["IPY_MODEL_b2"]}},
        "b2": {"state": {"maps": []}},
    }
    cells = [nbformat.v4.new_code_cell("") for _ in range(3)]
    for cell, model in zip(cells, ("a1", "b1", "gone"), strict=True):
        data = {tour.VIEW: {"model_id": model}, "image/jpeg": model}
        cell.outputs = [nbformat.v4.new_output("display_data", data)]
    kept = nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {tour.STATE: {"state": models}}})
    tour.drop_dead_widgets(kept)
    assert set(kept.metadata["widgets"][tour.STATE]["state"]) == {"a1", "a2", "a3"}
    assert [tour.VIEW in cell.outputs[0]["data"] for cell in cells] == [True, False, False]
    assert [cell.outputs[0]["data"]["image/jpeg"] for cell in cells] == ["a1", "b1", "gone"]

    kept.cells = cells[1:]
    tour.drop_dead_widgets(kept)
    assert "widgets" not in kept.metadata
