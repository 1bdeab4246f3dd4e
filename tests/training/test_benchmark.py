"""What `repae bench` measures: every item runs, and a step's parts add up to the step."""

import runpy
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from repae_lite.commands.bench import reference_module
from repae_lite.training import benchmark
from repae_lite.training.benchmark import Settings, against, bench_config, check_agreement, measure, networks


def tiny(**options) -> Settings:
    config = bench_config(vae="tiny", model="tiny", **{"batch_size": 2} | options)
    return Settings(config, repeats=1, warmup=0, num_steps=2)


@pytest.fixture(scope="module")
def reference():
    yield reference_module()
    del sys.modules["reference_step"]


ROWS = {
    "repae": 1, "ldm": 2, "vae": 1, "sample": 6, "encode": 1, "decode": 1, "encoder": 1, "loader": 1,
    "preprocess": 1, "evaluate": 5,
}  # fmt: skip


@pytest.mark.parametrize("item", ROWS)
def test_every_item_is_measured(item, monkeypatch):
    monkeypatch.setattr(benchmark, "PHOTOS", 3)
    monkeypatch.setattr(benchmark, "HEADS", 50)
    rows = measure(item, tiny())
    assert len(rows) == ROWS[item] == len({row["what"] for row in rows})
    for row in rows:
        assert row["item"] == item and len(row["seconds"]["values"]) == 1
        assert row["images_per_second"] == row["images"] / row["seconds"]["median"] > 0
        assert ("flops" in row) == (row["precision"] is not None)
        assert "flops" not in row or row["flops"] > 0 < row["bytes"]
        assert ("parts" in row) == (item in ("repae", "ldm", "vae"))
    assert ROWS.keys() == benchmark.WORKS.keys()


def test_guidance_costs_what_it_evaluates():
    by_name = {row["what"]: row["flops"] for row in measure("sample", replace(tiny(), num_steps=4))}
    plain = by_name["sample, ODE, 4 steps"]  # at t = 1, 0.75, 0.5 and 0.25
    assert by_name["sample, ODE, 4 steps, guided everywhere"] == 2 * plain
    assert by_name["sample, ODE, 4 steps, guided on [0, 0.65]"] == 1.5 * plain


NETWORKS = {"VAE encoder", "VAE decoder", "perceptual", "SiT"}
PARTS = {
    "repae": {f"{name}, {way}" for name in NETWORKS for way in ("forward", "backward")}
    | {"encoder, forward", "optimisers", "moving average", "rest"},
    "ldm": {"SiT, forward", "SiT, backward", "encoder, forward", "optimisers", "moving average", "rest"},
    "vae": {f"{name}, {way}" for name in NETWORKS - {"SiT"} for way in ("forward", "backward")}
    | {"optimisers", "rest"},
}


@pytest.mark.parametrize("command", PARTS)
def test_the_parts_of_a_step_add_up(command):
    row, *_ = measure(command, tiny())
    assert row["parts"].keys() == PARTS[command]
    assert all(part["seconds"] > 0 for part in row["parts"].values())
    with ExitStack() as stack, FlopCounterMode(display=False) as counter:
        work = next(benchmark.WORKS[command](tiny(), stack))
        work.call()
    assert sum(part["flops"] for part in row["parts"].values()) == row["flops"] == counter.get_total_flops()
    networks = {name for name in row["parts"] if "," in name}
    assert {name for name, part in row["parts"].items() if part["flops"] > 1e6} == networks
    moved = row["parts"]["optimisers"]["bytes"]
    weights = sum(
        p.numel() for o in work.state.optimizers.values() for g in o.param_groups for p in g["params"]
    )
    assert moved >= 7 * 4 * weights  # reads weight, gradient and two moments, writes three of them


def test_cached_targets_are_the_encoders_and_their_step_does_without_one():
    live, cached = benchmark.ldm(tiny(), ExitStack())
    first, second = (work.call() for work in (live, cached))
    assert set(first) == set(second) and live.state is cached.state and not cached.encoders
    live, cached = measure("ldm", tiny())
    assert "encoder, forward" not in cached["parts"]
    assert live["flops"] - cached["flops"] == live["parts"]["encoder, forward"]["flops"] > 0


def test_no_part_goes_on_into_the_next_step(monkeypatch):
    made, seen, draws = [], [], benchmark.draws_of
    parts = benchmark.timed_parts
    monkeypatch.setattr(benchmark, "timed_parts", lambda device: made.append(parts(device)) or made[0])
    monkeypatch.setattr(benchmark, "draws_of", lambda *how: seen.extend(p.now for p in made) or draws(*how))
    measure("ldm", replace(tiny(), repeats=3))
    assert seen == ["rest"] * len(seen) and len(seen) >= 3


def test_watching_a_step_changes_nothing_and_leaves_nothing():
    settings, losses = tiny(), []
    for watch in (False, True):
        (work,) = benchmark.repae(settings, ExitStack())
        if watch:
            parts = benchmark.timed_parts(torch.device("cpu"))
            with benchmark.parts_of(work, parts):
                losses.append(work.call())
            assert "forward" not in vars(work.state.sit) and "update" not in vars(work.state.mechanics)
        else:
            losses.append(work.call())
    assert losses[0] == losses[1]


def test_checkpointing_repeats_forward_passes():
    def flops(**options) -> dict[str, int]:
        (row,) = measure("repae", tiny(**options))
        return {name: part["flops"] for name, part in row["parts"].items()}

    plain, repeated = flops(), flops(gradient_checkpointing=True)
    assert repeated["perceptual, forward"] > plain["perceptual, forward"]
    assert repeated["perceptual, backward"] == plain["perceptual, backward"]
    assert sum(repeated.values()) > 1.2 * sum(plain.values())


def test_micro_batches_compute_as_much():
    (whole,), (cut,) = (measure("repae", tiny(micro_batches=count)) for count in (1, 2))
    assert cut["flops"] == whole["flops"] and cut["bytes"] > whole["bytes"]


def test_no_weight_of_sit_is_idle_and_all_follows_from_the_seed():
    one, other = networks(tiny()).state, networks(tiny()).state
    assert all(p.any() for p in one.sit.parameters())
    for name, tensor in one.sit.state_dict().items():
        assert torch.equal(tensor, other.sit.state_dict()[name]) and torch.equal(
            tensor, one.ema.state_dict()[name]
        )


def test_full_size_needs_no_download():
    config = bench_config()
    assert (config.vae, config.model, config.batch_size) == ("f8d4", "SiT-XL/2", 32)
    assert (config.vae_ckpt, config.enc_weights, config.perceptual) == ("none", "random", "tiny")
    assert bench_config(enc_type="none").vae_align_proj_coeff == 0
    state = networks(
        Settings(bench_config(model="SiT-S/2", enc_type="none", resolution=32, batch_size=1))
    ).state
    assert type(state.perceptual).__name__ == "LPIPSLoss" and state.discriminator is not None


def test_ours_and_the_reference_take_turns(reference, monkeypatch):
    known = {"ours": [1.0, 2.0], "reference": [2.0, 6.0], "": [1.0, 2.0]}

    def turns(calls, device, **_):
        assert all(call() for call in calls.values())
        return {name: known.get(name, [1.5, 2.0]) for name in calls}

    monkeypatch.setattr(benchmark, "in_turns", turns)
    monkeypatch.setattr(benchmark, "MKL_IS_SLOW", True)
    monkeypatch.setattr(benchmark, "can_keep_memory", lambda: True)
    found = against(tiny(), reference)
    assert found["losses"]["ours"].keys() == found["losses"]["reference"].keys()
    assert found["losses"]["ours"]["sit_align"] != 0 and found["tolerance"] == 1e-4
    assert found["seconds"]["reference"]["median"] == 4.0 and found["memory"] is None
    assert found["ratio"]["values"] == [2.0, 3.0]
    idle = {"float32_losses", "loss_calls"}  # the tiny scale is float32, without a discriminator
    assert found["ways"].keys() == {*reference.WAYS}
    for way, entry in found["ways"].items():
        assert ("idle" in entry) if way in idle else (entry["cost"]["values"] == [0.5, 0.0])
    short = against(tiny(), reference, ways=False)
    assert short["ratio"] == found["ratio"] and all("idle" in entry for entry in short["ways"].values())


def test_a_reference_that_computes_something_else_is_refused(reference, tmp_path, monkeypatch):
    """Whether its step runs in this process or in one of its own."""
    more = "ReferenceStep.__call__ = lambda self, *batch, call=ReferenceStep.__call__: {\n"
    more += "    name: value * 1.001 for name, value in call(self, *batch).items()\n}\n"
    path = tmp_path / "reference_step.py"
    path.write_text(Path(reference.__file__).read_text() + more)
    wrong = SimpleNamespace(**runpy.run_path(str(path)))
    for apart in (True, False):
        monkeypatch.setattr(benchmark, "can_keep_memory", lambda apart=apart: apart)
        with pytest.raises(ValueError, match=r"disagree: .* further apart than 0\.0001"):
            against(tiny(), wrong)


def test_agreement_is_relative_but_for_means_that_cancel():
    def agree(**reference) -> None:
        ours = {"denoising": 1e-3, "sit_align": 1e-3, "grad_norm_sit": 2.0}
        check_agreement({"ours": ours, "reference": ours | reference}, 1e-4)

    agree(denoising=1.00009e-3, sit_align=1.09e-3, grad_norm_sit=2.0019)
    for name, value in {"denoising": 1.0002e-3, "sit_align": 1.2e-3, "grad_norm_sit": 2.003}.items():
        with pytest.raises(ValueError, match=name):
            agree(**{name: value})
    with pytest.raises(ValueError, match=r"denoising is 0\.001 and nan"):
        agree(denoising=float("nan"))
    with pytest.raises(ValueError, match="other losses"):
        agree(more=1.0)


def test_infinite_norms_agree_with_each_other_alone():
    norms = {"grad_norm_sit": float("inf")}
    check_agreement({"ours": norms, "reference": norms}, 1e-2)
    with pytest.raises(ValueError, match="grad_norm_sit is inf and 1, further"):
        check_agreement({"ours": norms, "reference": {"grad_norm_sit": 1.0}}, 1e-2)


def test_what_cannot_be_measured_is_refused(reference, monkeypatch):
    plain = tiny(enc_type="none")
    with pytest.raises(ValueError, match="give --enc-type a name"):
        against(plain, reference)
    with pytest.raises(ValueError, match="leave out --micro-batches"):
        against(tiny(micro_batches=2), reference)
    with pytest.raises(ValueError, match="no encoder to measure"):
        measure("encoder", plain)
    monkeypatch.setattr(benchmark, "try_compile", lambda device: "there is no compiler")
    with pytest.raises(ValueError, match="--compile cannot be measured here: there is no compiler"):
        measure("decode", tiny(compile=True))
