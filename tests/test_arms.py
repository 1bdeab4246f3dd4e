"""The script behind the records of chapters 03 and 05: its arms train what they say, and a run is kept."""

import json

import pytest
import torch

from repae_lite import SmallScale, repae_step
from repae_lite.utils.pixels import to_unit_range


@pytest.fixture(scope="module")
def small():
    return SmallScale.load()


@pytest.fixture
def arms(benchmark_script):
    return benchmark_script("arms")


def test_every_record_names_arms_and_pairs_them(arms):
    assert {arm for runs in arms.RECORDS.values() for arm, _ in runs} <= {*arms.ARMS, *arms.PAIRS}
    causes = [arm for arm, _ in arms.RECORDS["causes"]]
    kinds = {arm.partition(", ")[2] for arm in causes if arm.startswith("repa")}
    assert kinds == {"", "label only", "shuffled", "no mean token"}
    assert all(f"align-5{', ' * bool(kind)}{kind}" in causes for kind in kinds)


def test_targets_lose_what_their_name_says(arms, small):
    tokens, of_label, shuffled, rest = (
        arms.targets_of(small, kind) for kind in ("tokens", "label only", "shuffled", "no mean token")
    )
    fish = small.labels == 0
    assert torch.equal(tokens, small.tokens)
    torch.testing.assert_close(of_label[fish], tokens[fish].mean(0).expand(int(fish.sum()), -1, -1))
    assert not torch.equal(shuffled, tokens) and torch.equal(shuffled.sort(0).values, tokens.sort(0).values)
    assert rest.mean(1).abs().max() < 1e-4


def batch_of(small, seed=0):
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 8, 4, 8, 8, generator=g)
    draws = {"eps_posterior": noise[0], "eps": noise[1], "t": torch.rand(8, generator=g)}
    x = to_unit_range(small.images[:8])
    return (x, small.labels[:8], small.tokens[:8]), draws | {"label_drop": torch.zeros(8, dtype=torch.bool)}


def test_fresh_draws_change_sit_and_not_the_vae(arms, small):
    ends = {}
    for name, step in (("shared", repae_step), ("fresh", arms.fresh_step(torch.Generator().manual_seed(1)))):
        torch.manual_seed(0)
        state = small.new_state("repa-e")
        batch, draws = batch_of(small)
        step(state, *batch, **draws)
        ends[name] = state
    for a, b in zip(*(end.vae.parameters() for end in ends.values()), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(*(end.sit.bn.running_mean for end in ends.values()))


def test_running_statistics_in_the_sit_step_still_follow(arms, small):
    sit = small.new_state("repa").sit
    arms.follow_but_run(sit)
    z, before = 3 * torch.randn(16, 4, 8, 8) + 1, sit.bn.running_mean.clone()
    normalised = sit.train().normalize(z)
    after = sit.latent_stats()
    assert not torch.equal(after.mean, before)
    torch.testing.assert_close(normalised, after.normalize(z), rtol=0, atol=1e-3)


def test_a_run_is_judged_and_kept_and_joined(arms, small, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "SAMPLES", 200)
    monkeypatch.setattr(arms, "SAMPLER_STEPS", 2)
    monkeypatch.setattr(arms, "RUNS", tmp_path)
    monkeypatch.setattr(arms, "RECORDS", {"two": [("repa-e", 2), ("repa", 2)]})
    monkeypatch.setattr(arms, "data_small_dir", lambda: tmp_path)
    result = arms.run(small, "repa-e", 2, 0)
    assert set(result["scores"]) == {f"{kind}{end}" for kind in arms.GUIDANCE for end in ("", ", widened")}
    assert {"psnr", "frechet"} <= result["scores"]["guided"].keys() and result["losses"]["vae_align"]
    assert (tmp_path / "repa-e_2_0.vae.safetensors").is_file()
    (tmp_path / "repa-e_2_0.json").write_text(json.dumps(result))
    (tmp_path / "evidence").mkdir()
    arms.join("two", [0], "cpu")
    record = json.loads((tmp_path / "evidence" / "two.json").read_text())
    assert [run["arm"] for run in record["runs"]] == ["repa-e"] and record["machine"] and record["date"]
