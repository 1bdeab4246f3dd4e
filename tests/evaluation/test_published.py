"""Published numbers beside a result, and never beside one of another protocol."""

import json
from dataclasses import replace

import numpy as np
import pytest

from repae_lite.commands.main import main
from repae_lite.evaluation.protocols import PROTOCOLS
from repae_lite.evaluation.results import Expected, published_beside, table

BALANCED = {"protocol": "adm-sde250-balanced", "step": 4_000_000}
LDM = (
    Expected(source="paper v3, Table 8", step=400_000, metrics={"frechet": 3.46}),
    Expected(source="paper v3, Table 9", **BALANCED, metrics={"frechet": 1.69}),
    Expected(source="paper v3, Table 9", **BALANCED, guidance=(2.4, 0, 0.73), metrics={"frechet": 1.12}),
    Expected(source="paper v1", step=4_000_000, metrics={"frechet": 1.83}),
    Expected(source="a blog", protocol=None, guidance=None, metrics={"frechet": 9.9}),
)


def result(name="adm-sde250-random", *, step=400_000, reference_kind="training set", **changes) -> dict:
    """One of repae evaluate's, as if with the real weights."""
    protocol = replace(PROTOCOLS[name], **changes)
    record = protocol.record(judge_weights="a" * 16, reference="b" * 16, reference_images=10_000)
    return {
        "metrics": {"frechet": 3.5, "recall": 0.6},
        "protocol": {"name": name} | record,
        "reference_kind": reference_kind,
        "samples": {"manifest": {"step": step}},
    }


def numbers(found: dict) -> list[float]:
    return [entry.metrics["frechet"] for entry in published_beside(found, LDM)[0]]


def test_the_row_of_the_same_protocol_guidance_and_step_stands_below():
    assert numbers(result()) == [3.46]
    assert numbers(result(step=4_000_000)) == [1.83]
    assert numbers(result("adm-sde250-balanced", step=4_000_000)) == [1.69]
    guided = {"cfg_scale": 2.4, "guidance_low": 0.0, "guidance_high": 0.73}
    assert numbers(result("adm-sde250-balanced", step=4_000_000, **guided)) == [1.12]
    assert numbers(result(guidance_high=0.7)) == [3.46]  # without guidance its interval means nothing
    assert numbers(result(metrics=("frechet",))) == [3.46]  # and one metric less changes no other
    header, ours, published, protocol, *apart = table({"mine": result()}, LDM).splitlines()
    assert header.split() == ["FID", "recall"] and ours.split() == ["mine", "3.5", "0.6"]
    assert published.split() == ["published", "(paper", "v3,", "Table", "8)", "3.46"]
    assert protocol.startswith("protocol adm-sde250-random") and len(apart) == 4
    assert apart[-1] == (
        "a blog: FID 9.9 under an unknown protocol, guidance unknown, the last step: not comparable, differs "
        "in protocol"
    )


@pytest.mark.parametrize(
    ("found", "fields"),
    [
        (result("adm-sde250-balanced"), "labels"),
        (result("adm-ode50-random"), "mode, steps"),
        (result(count=5000, to_uint8="round"), "count, to_uint8"),
        (result(judge="inception-random"), "judge"),
        (result(cfg_scale=2.5), "guidance"),
        (result(step=None), "step"),
        (result(reference_kind="images"), "reference"),
        (result() | {"samples": {"manifest": None}}, "step"),
    ],
)
def test_a_number_of_another_protocol_gets_a_line_that_says_what_differs(found, fields):
    beside, apart = published_beside(found, LDM[:1])
    assert not beside
    assert apart == [
        "paper v3, Table 8: FID 3.46 under adm-sde250-random, guidance 1.0, step 400,000: not comparable, "
        f"differs in {fields}"
    ]
    assert apart[0] in table({"mine": found}, LDM) and "published" not in table({"mine": found}, LDM[:1])


def test_evaluate_prints_what_a_preset_names(tmp_path, capsys):
    for name, count in (("samples", 8), ("reference", 9)):
        images = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
    (tmp_path / "mine.yaml").write_text("judge: tiny\ncount: 8\nmetrics: [frechet]\n")
    words = ["evaluate", "--foreign", "--device", "cpu", "--protocol", str(tmp_path / "mine.yaml")]
    words += ["--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz")]
    assert main([*words, "--preset", "repae-sdvae"]) == 0
    printed = capsys.readouterr().out
    assert "Tables 1, 7 and 11; README A: FID 4.07, sFID 4.6, IS 161.8 under adm-sde250-random" in printed
    assert "FID 1.67 under adm-sde250-random, guidance 2.2 on [0.0, 0.65], step 400,000" in printed
    assert printed.count("not comparable, differs in") == 4
    assert "4.07" not in json.dumps(json.loads((tmp_path / "samples-mine.json").read_text()))
