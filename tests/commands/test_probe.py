"""`repae probe`: a table by layer and noise level with its protocol, or one sentence."""

import json

import pytest
from small_runs import run

from repae_lite.commands.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("trained"), "tiny").path


def probe(trained, *words):
    return main(["probe", "--exp-path", str(trained), "--device", "cpu", "--limit", "60", *words])


def test_a_run_is_probed_and_its_results_are_compared(trained, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("ema.json", "raw.json", "other.json")]
    words = ["--layers", "2", "1", "--times", "0.1", "0.6"]
    assert probe(trained, "--output", paths[0], *words) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "ema.json").read_text())
    assert [(row["layer"], row["t"]) for row in found["table"]] == [(1, 0.1), (2, 0.1), (1, 0.6), (2, 0.6)]
    for name in ("cknna", "linear_probe"):
        assert found["metrics"][f"largest_{name}"] == max(row[name] for row in found["table"])
    row = found["table"][2]
    assert f"{row['cknna']:.3f}  {row['linear_probe']:6.1%}" in said.splitlines()[2]
    protocol = found["protocol"]
    assert (protocol["encoder"], protocol["fitted_images"], protocol["images"]) == ("tiny", 30, 30)
    assert protocol["hash"] in said and found["run"]["weights"] == "ema"
    assert probe(trained, "--output", paths[1], *words, "--no-ema") == 0
    assert main(["compare", *paths[:2]]) == 0
    assert probe(trained, "--output", paths[2], *words, "--seed", "1") == 0
    assert main(["compare", *paths[1:]]) == 2
    assert "cannot be compared: seed: 0, 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--layers", "99"], "this SiT has blocks 1 to"),
        (["--times", "1.5"], "between 0 (clean) and 1 (noise)"),
        (["--enc-type", "a,b"], "compares with one encoder, and here it is a,b"),
        (["--limit", "21"], "21 images of 2000 are asked for: give at least 22"),
        (["--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_refusals_are_one_sentence(trained, tmp_path, capsys, words, sentence):
    assert probe(trained, "--output", str(tmp_path / "result.json"), *words) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())
