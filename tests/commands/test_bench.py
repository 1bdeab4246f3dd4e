"""`repae bench`: tables, bench.json and bench.png, or one sentence."""

import json

import pytest
from dying import dies
from PIL import Image

from repae_lite.commands import bench
from repae_lite.commands.main import main
from repae_lite.training import benchmark

TINY = "--vae tiny --batch-size 2 --repeats 2 --warmup 0 --device cpu".split()


def test_a_step_is_measured_shown_and_written(tmp_path, capsys):
    folder = tmp_path / "measured"
    assert (
        main(["bench", "repae", "decode", *TINY, "--against", "reference", "--output-dir", str(folder)]) == 0
    )
    said, found = capsys.readouterr().out, json.loads((folder / "bench.json").read_text())
    step, decode = found["rows"]
    assert (step["what"], decode["what"]) == ("REPA-E step", "VAE decode")
    matmul, copy = found["peaks"]["matmul"]["no"], found["peaks"]["copy"]
    for row in (step, decode, step["parts"]["SiT, backward"] | {"seconds": {"median": None}}):
        seconds = row["seconds"]["median"] or step["parts"]["SiT, backward"]["seconds"]
        assert row["of_matmul_peak"] == pytest.approx(row["flops"] / seconds / matmul)
        assert row["of_copy_peak"] == pytest.approx(row["bytes"] / seconds / copy)
    assert step["memory"] > 20 * 2**20  # of a process of its own: the weights, gradients and moments alone
    assert found["options"]["what"] == ["repae", "decode"] and found["options"]["batch_size"] == 2
    assert found["machine"]["threads"] > 0 and found["versions"]["torch"] and found["date"]
    lines = said.splitlines()
    assert lines[0].split()[:3] == ["precision", "median", "quartiles"] and "fp32" in lines[1]
    for name in ("REPA-E step", "VAE decode", "SiT, backward", "moving average", "reference / ours: median"):
        assert any(line.startswith(name) for line in lines), name
    assert f"{found['against']['ratio']['median']:.3f}" in said
    assert "loss calls" in said and "not measured: there is no discriminator" in said
    assert Image.open(folder / "bench.png").width > 600


def test_nothing_is_drawn_where_no_step_was_measured():
    assert bench.chart([{"what": "VAE decode", "images": 2}]) is None


def test_the_chart_shows_every_part_and_its_share():
    parts = {"SiT, forward": 1.0, "SiT, backward": 2.0, "optimisers": 1.0}
    row = {"what": "step", "images": 2, "parts": {name: {"seconds": s} for name, s in parts.items()}}
    (ax,) = bench.chart([row]).axes
    widths = sorted(bar.get_width() for bar in ax.patches if bar.get_width())
    assert widths == [1000.0, 1000.0, 2000.0] and ax.get_title("left") == "step, 2 images: 4000 ms"
    assert [text.get_text().strip() for text in ax.texts] == ["25%", "75%"]


def test_the_items_are_those_that_can_be_measured():
    assert tuple(bench.ITEMS) == tuple(benchmark.WORKS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["everything"], "there is no 'everything' to measure: choose among repae, ldm"),
        (["--repeats", "0"], "--repeats is 0: give 1 or more"),
        (["--warmup", "-1"], "--warmup is -1: give 0 or more"),
        (["--num-steps", "1"], "--num-steps is 1: give 2 or more"),
        (["--batch-size", "0"], "--batch-size is 0: it must be more than 0"),
        (["--resolution", "30"], "30"),
        (["encoder", "--enc-type", "none"], "no encoder to measure"),
        (["loader", "--num-steps", "4"], "--num-steps changes nothing here: it is for sample; measure"),
        (["--num-workers", "1"], "--num-workers changes nothing here: it is for loader, preprocess"),
        (["decode", "--mixed-precision", "bf16"], "--mixed-precision changes nothing here: it is for repae"),
        (["--micro-batches", "3"], "2 images cannot be cut into 3 micro-batches: lower --micro-batches"),
        (["--no-ways"], "--no-ways shortens --against reference: give that, too"),
        (["--against", "reference", "--micro-batches", "2"], "takes each batch at once, as officially"),
        (
            ["--against", "reference", "--enc-type", "none"],
            "compares steps that align: give --enc-type a name",
        ),
    ],
)
def test_refusals_are_one_sentence(words, sentence, tmp_path, capsys):
    folder = tmp_path / "measured"
    assert main(["bench", *TINY, *words, "--output-dir", str(folder)]) == 2
    said = capsys.readouterr().err
    assert sentence in said.splitlines()[-1] and "Traceback" not in said and not folder.exists()


def test_an_installed_package_has_no_reference(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "repae_lite" / "commands" / "bench.py"))
    assert main(["bench", *TINY, "--against", "reference", "--output-dir", str(tmp_path / "out")]) == 2
    assert "which an installed package does not have: run it in a checkout" in capsys.readouterr().err


def test_several_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["bench", *TINY]) == 2
    assert "one process's work" in capsys.readouterr().err


def test_a_killed_measurement_is_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "measure", dies)
    assert main(["bench", *TINY, "--output-dir", str(tmp_path / "out")]) == 2
    assert "was killed, as happens when memory runs out" in capsys.readouterr().err
