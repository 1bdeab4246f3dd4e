"""The half hour on a GPU: budgets are kept, results survive, and every part can be tried on a CPU."""

import json
import sys
from pathlib import Path

import psutil
import pytest
import torch

from repae_lite.commands import bench
from repae_lite.commands.main import make_parser
from repae_lite.commands.train_flags import config_from
from repae_lite.training.build import build


@pytest.fixture
def gpu_day(benchmark_script):
    return benchmark_script("gpu_day")


def start(gpu_day, monkeypatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", *map(str, words)])
    return gpu_day.main()


def test_without_a_gpu_it_says_so(gpu_day, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start(gpu_day, monkeypatch, "--output", tmp_path / "out") == 2
    assert "finds no CUDA GPU: --device cpu --quick tries the parts" in capsys.readouterr().out
    assert start(gpu_day, monkeypatch, "--device", "cpu", "--output", tmp_path / "out") == 2
    assert "--device cpu goes with --quick" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_budgets_fit_into_25_minutes(gpu_day):
    assert list(gpu_day.PARTS) == ["tests", "bench", "attempts", "stability", "processes", "evidence"]
    assert sum(budget for budget, _ in gpu_day.PARTS.values()) <= 25 * 60


def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_found(gpu_day, monkeypatch, tmp_path):
    def part(day):
        yield "first", 1
        script = "import os, subprocess, sys; print(os.getpid(), flush=True)\n"
        script += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
        day.run("long", ["-c", script])
        yield "second", 2

    monkeypatch.setitem(gpu_day.PARTS, "tests", (5, part))
    found = gpu_day.take("tests", gpu_day.Day(tmp_path, "cpu", True))
    assert found["state"] == "out of time" and found["result"] == {"first": 1} and found["budget"] == 5
    log = (tmp_path / "logs" / "long.log").read_text()
    assert str(tmp_path / "logs" / "long.log") in found["why"]
    left = [p for p in psutil.process_iter(["cmdline"]) if "time.sleep(600)" in str(p.info["cmdline"])]
    assert not left and not (log and psutil.pid_exists(int(log)))


def test_a_part_that_fails_says_why_and_the_others_run(gpu_day, monkeypatch, capsys, tmp_path):
    calls = []

    def fails(day):
        calls.append("tests")
        day.run("wrong", ["-c", "print('a line'); raise SystemExit('what went wrong')"])
        yield "never", 0

    def works(day):
        calls.append("bench")
        day.run("right", ["-c", "import os; print(os.environ['RANK'])"], ["-c", "pass"])
        yield "rank", (day.folder / "logs" / "right.log").read_text().strip()

    monkeypatch.setattr(gpu_day, "PARTS", {"tests": (60, fails), "bench": (60, works)})
    words = ["--device", "cpu", "--quick", "--output", tmp_path]
    assert start(gpu_day, monkeypatch, *words) == 1
    assert "what went wrong" in json.loads((tmp_path / "tests.json").read_text())["why"]
    assert json.loads((tmp_path / "bench.json").read_text())["result"] == {"rank": "0"}
    record = json.loads((tmp_path / "gpu_day.json").read_text())
    assert {name: part["state"] for name, part in record["parts"].items()} == {
        "tests": "failed",
        "bench": "done",
    }
    assert record["date"] and record["versions"]["torch"] and record["quick"] is True
    assert start(gpu_day, monkeypatch, *words) == 1  # again: only what is not done
    assert calls == ["tests", "bench", "tests"] and "bench: done before" in capsys.readouterr().out
    assert start(gpu_day, monkeypatch, *words, "--only", "bench") == 0


def test_stability_trains_what_it_says(gpu_day):
    """`--quick` tries a smaller run: here the real one is built."""
    day = gpu_day.Day(Path("nowhere"), "cpu", False)
    words = gpu_day._train(day, "name", 500, *gpu_day.FROM_SCRATCH.split(), "--mixed-precision", "fp16")
    config = config_from(make_parser().parse_args(words))
    state = build(config, 10, torch.device("cpu")).state
    assert (state.sit.config.width, state.vae.config.latent_channels, config.batch_size) == (768, 4, 32)
    assert state.discriminator is not None and config.on_divergence == "halt"


def test_evidence_that_ran_out_of_time_is_not_done(gpu_day, monkeypatch, tmp_path):
    calls = []

    def run(day, log, *commands, **environment):
        calls.append(log)
        if log == "evidence":
            raise gpu_day.OutOfTime("ended while it ran")
        for name in ("learning_curves", "causes"):
            (tmp_path / "data_small" / "evidence" / f"{name}.json").write_text('{"runs": []}')

    monkeypatch.setattr(gpu_day.Day, "run", run)
    found = gpu_day.take("evidence", gpu_day.Day(tmp_path, "cuda", False))
    assert calls == ["evidence", "evidence-join"] and found["state"] == "out of time"
    assert found["result"] == {"learning_curves": {"runs": []}, "causes": {"runs": []}}


def test_the_bench_goes_on_after_a_failure_and_looks_for_the_largest_batch(gpu_day, monkeypatch, tmp_path):
    ran = []

    def run(day, log, command):
        ran.append(log)
        if log == "bench-checkpointing-4":
            raise ChildProcessError("losses disagree")
        if log == "bench-reference-48":
            raise ChildProcessError("out of memory on the GPU")
        path = tmp_path / "bench" / log.removeprefix("bench-") / "bench.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"words": command[3:]}))

    monkeypatch.setattr(gpu_day.Day, "run", run)
    found = gpu_day.take("bench", gpu_day.Day(tmp_path, "cuda", False))
    assert found["state"] == "failed" and found["why"].endswith("checkpointing-4: losses disagree")
    assert {"micro-batches-32", "ldm", "sampling", "reference-32", "reference-32-compiled"} <= found[
        "result"
    ].keys()
    assert found["result"]["reference-48"] == "out of memory on the GPU" and "bench-reference-64" not in ran
    for entry in found["result"].values():  # every command is one, and no option is idle
        if isinstance(entry, dict):
            args = make_parser().parse_args(["bench", *entry["words"]])
            bench.refuse_idle(args, args.what)
    before = len(ran)
    gpu_day.take("bench", gpu_day.Day(tmp_path, "cuda", False))
    # What was measured is not repeated.
    assert ran[before:] == ["bench-checkpointing-4", "bench-reference-48"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", ["tests", "bench", "attempts", "stability", "processes", "evidence"])
def test_every_part_can_be_tried_on_a_cpu(gpu_day, monkeypatch, part, tmp_path):
    assert (
        start(gpu_day, monkeypatch, "--device", "cpu", "--quick", "--only", part, "--output", tmp_path) == 0
    )
    found = json.loads((tmp_path / f"{part}.json").read_text())["result"]
    assert (
        found.keys()
        == {
            "tests": {"said"},
            "bench": {"tiny"},
            "attempts": {"attempts"},
            "stability": {"no", "bf16"},
            "processes": {"steps", "largest relative differences"},
            "evidence": {"learning_curves", "causes"},
        }[part]
    )
    if part == "attempts":
        assert all(a["ratio"]["median"] > 0 for name, a in found["attempts"].items() if name != "compiling")
    if part == "stability":
        assert all(run["steps"] == 3 and run["largest"]["grad_norm_sit"] > 0 for run in found.values())
    if part == "evidence":
        assert found["causes"]["runs"] == [] and found["causes"]["samples"] == 2000
