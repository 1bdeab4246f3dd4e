"""Long commands from a notebook: however a command, notebook or kernel ends, the next start goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from stub_commands import plan_in, stage_in, starts

from repae_lite.teaching.run_plots import plot_health, plot_losses, plot_samples
from repae_lite.utils import launch as launching
from repae_lite.utils.launch import launch, stop, to_checkout

TESTS = Path(__file__).resolve().parents[1]
FINDS_STUBS = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def shown(monkeypatch):
    """What the cell's outputs were replaced with."""
    found = []
    monkeypatch.setattr(launching, "UPDATE", 0)
    monkeypatch.setattr(launching._Display, "show", lambda self, content: found.append(content["text/plain"]))
    return found


def test_a_command_runs_once_with_its_progress(tmp_path, shown, capsys):
    launch(stage_in(tmp_path, "well"), plan_in(tmp_path))
    launch(stage_in(tmp_path, "well"), plan_in(tmp_path))
    assert len(starts(tmp_path)) == 1
    assert "finished before: repae train-repae" in capsys.readouterr().out
    assert shown[-1].startswith("repae train-repae: finished after")
    log = (tmp_path / "logs" / "02_train_repae.log").read_text()
    assert log.startswith("$ repae train-repae ") and "step 4 of 4" in log


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("1", "exit code 1: a bug of this program"),
        ("2", "exit code 2: a mistake in the command, the data or the disk: mend it"),
        ("3", "exit code 3: halted by the collapse guard"),
        ("launched", "exit code 3: halted by the collapse guard"),
        ("killed", "exit code 137: killed, as happens when memory runs out"),
        ("forgets", "exit code 0: it ended as if finished, but there is no"),
    ],
)
def test_a_failure_is_told_with_the_last_words(tmp_path, shown, how, words):
    with pytest.raises(ChildProcessError, match=words) as error:
        launch(stage_in(tmp_path, how), plan_in(tmp_path))
    assert "    exps/run: step 0 of 4" in str(error.value)
    assert "02_train_repae.log" in str(error.value)
    launch(stage_in(tmp_path, "well"), plan_in(tmp_path))
    assert len(starts(tmp_path)) == 2 and (tmp_path / "done").exists()


def test_a_stopped_command_goes_on_at_the_next_start(tmp_path, shown):
    stopped = []

    def preempt():
        wait_for(lambda: any("2 of 4" in text for text in shown))
        stopped.append(stop(tmp_path))

    thread = threading.Thread(target=preempt)
    thread.start()
    with pytest.raises(ChildProcessError, match="exit code 143: stopped by SIGTERM: run this") as error:
        launch(stage_in(tmp_path, "waits"), plan_in(tmp_path))
    thread.join()
    assert "stopped by SIGTERM at step 2" in str(error.value)
    assert stopped == ["repae train-repae"] and stop(tmp_path) is None
    (tmp_path / "go").touch()
    launch(stage_in(tmp_path, "waits"), plan_in(tmp_path))
    assert len(starts(tmp_path)) == 2


def test_a_command_that_another_process_started_is_followed(tmp_path, shown, capsys):
    plan, stage = plan_in(tmp_path), stage_in(tmp_path, "waits")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom stub_commands import *\n"
        "from repae_lite.utils import launch\nfolder = Path(sys.argv[1])\n"
        "stage = stage_in(folder, 'waits')\nlaunch._start(stage, plan_in(folder), stage.commands[0])\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=FINDS_STUBS)
    wait_for(lambda: starts(tmp_path))
    with pytest.raises(ValueError, match="is busy with repae train-repae"):
        launch(stage_in(tmp_path, "well"), plan)
    threading.Timer(1, os.kill, (starts(tmp_path)[0], signal.SIGKILL)).start()
    with pytest.raises(ChildProcessError, match="has ended: why is known only to the notebook that"):
        launch(stage, plan)
    assert "it is running already" in capsys.readouterr().out
    assert len(starts(tmp_path)) == 1


def test_an_interrupted_cell_leaves_the_command_alone(tmp_path, shown, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(launching, "_follow", interrupt)
        with pytest.raises(KeyboardInterrupt):
            launch(stage_in(tmp_path, "waits"), plan_in(tmp_path))
    assert "goes on without this notebook" in capsys.readouterr().out
    (tmp_path / "go").touch()
    launch(stage_in(tmp_path, "waits"), plan_in(tmp_path))
    assert len(starts(tmp_path)) == 1


def test_a_command_survives_its_kernel_and_its_notebook(tmp_path):
    """The kernel is killed, then papermill, as a closed terminal would; the third start sees the end."""
    source = (
        "import os\nfrom pathlib import Path\nfrom repae_lite.utils.launch import launch\n"
        "from stub_commands import *\n"
        f"folder = Path({str(tmp_path)!r})\n(folder / 'kernel').write_text(str(os.getpid()))\n"
        "launch(stage_in(folder, 'waits'), plan_in(folder))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar"]

    def started() -> subprocess.Popen:
        (tmp_path / "kernel").unlink(missing_ok=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        papermill = subprocess.Popen(command, cwd=tmp_path, env=FINDS_STUBS, **quiet)
        wait_for(lambda: (tmp_path / "kernel").exists() and starts(tmp_path))
        return papermill

    papermill = started()
    os.kill(int((tmp_path / "kernel").read_text()), signal.SIGKILL)
    assert papermill.wait(60) != 0
    papermill = started()
    papermill.kill()
    papermill.wait(60)
    papermill = started()
    (tmp_path / "go").touch()
    assert papermill.wait(60) == 0
    assert len(starts(tmp_path)) == 1 and (tmp_path / "done").exists()
    assert "running already" in (tmp_path / "out.ipynb").read_text()


def test_plots_of_a_run(tmp_path):
    run = tmp_path / "run"
    assert plot_losses(run) is plot_health(run) is plot_samples(run) is None
    (run / "samples").mkdir(parents=True)
    values = {
        "denoising": 1.0,
        "sit_align": -0.1,
        "vae_align": -0.2,
        "reconstruction": 0.1,
        "perceptual": 0.1,
    }
    values |= {"grad_norm_sit": 1.0, "grad_norm_vae": 0.3, "latent_variance": 1.5, "disc": 2.0}
    lines = [
        json.dumps({"step": step} | values | ({"disc": None} if step == 2 else {})) for step in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "den')
    (run / "args.json").write_text('{"sample_images": 16}')
    (tmp_path / "log").write_text("step 1 of 3, 2.5 steps/s, sit_total 1.0\nstep 3 of 3, 5e-01 steps/s\n")
    for step in range(1, 8):
        grid = np.full((8, 32, 3), 10 * step, np.uint8)  # two rows of eight
        Image.fromarray(grid).save(run / "samples" / f"{step:07d}.png")
    losses, health = plot_losses(run), plot_health(run, tmp_path / "log")
    assert [ax.get_title(loc="left") for ax in losses.axes] == ["SiT", "VAE", "discriminator"]
    assert [ax.get_title(loc="left") for ax in health.axes] == ["gradient norms", "latents", "speed"]
    assert list(health.axes[2].lines[0].get_ydata()) == [2.5, 0.5]
    assert len(losses.axes[0].lines[0].get_ydata()) == 3
    texts = [text.get_text() for text in plot_samples(run, count=3).axes[0].texts]
    assert texts[:3] == ["step 1", "step 4", "step 7"]


def test_a_notebook_opened_in_its_own_folder_goes_to_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(TESTS.parent / "reproduce")
    to_checkout()
    assert Path.cwd() == TESTS.parent
    (tmp_path / "plan.json").touch()  # a copy outside of any checkout
    monkeypatch.chdir(tmp_path)
    to_checkout()
    assert Path.cwd() == tmp_path
