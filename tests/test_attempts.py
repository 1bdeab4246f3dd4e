"""What each of our ways of taking a step is worth: they are undone one at a time, and compute the same."""

import json
import sys

import pytest
import torch

TINY = "--vae tiny --model tiny --batch-size 2 --device cpu --repeats 1 --warmup 0".split()


@pytest.fixture
def attempts(benchmark_script):
    return benchmark_script("attempts")


def start(attempts, monkeypatch, path, *words: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["attempts.py", *TINY, "--out", str(path), *words])
    attempts.main()
    return json.loads(path.read_text())


def test_every_attempt_is_measured(attempts, monkeypatch, tmp_path, capsys):
    names = [name for name in attempts.ATTEMPTS if name != "compiling"]
    found = start(attempts, monkeypatch, tmp_path / "new" / "attempts.json", "--only", *names)
    assert found["date"] and found["command"].endswith("--batch-size 2 --mixed-precision no")
    assert (
        list(found["attempts"])
        == names
        == [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    )
    for entry in found["attempts"].values():
        assert entry["ratio"]["median"] == entry["changed"]["median"] / entry["ours"]["median"] > 0


def test_attempts_change_what_they_say(attempts):
    settings = attempts.Settings(attempts.benchmark.bench_config(vae="tiny", model="tiny", batch_size=2))
    usual = attempts.ours(settings).state
    weight = attempts.other_layout(settings, "vae").state.vae.decoder.conv_in.weight
    assert usual.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)
    assert attempts.other_optimizers(settings).state.optimizers["sit"].defaults["fused"] is True
    assert not usual.optimizers["sit"].defaults["fused"]
    assert attempts.checkpointing(settings).state.sit.gradient_checkpointing
    again = attempts.norms(settings).state
    assert again.vae.decoder.mid.block_1.gradient_checkpointing and not again.sit.gradient_checkpointing


def test_loss_networks_compute_in_the_other_layout(attempts):
    settings = attempts.Settings(attempts.benchmark.bench_config(vae="tiny", model="tiny", batch_size=2))
    for make in (attempts.ours, lambda settings: attempts.other_layout(settings, "perceptual")):
        work, layouts = make(settings), set()
        for module in work.state.perceptual.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda *call, layouts=layouts: layouts.add(call[-1].is_contiguous())
                )
        work.call()
        assert layouts == {make is not attempts.ours}


def test_waits_draws_and_lists_are_the_other_ones(attempts, monkeypatch):
    settings = attempts.Settings(attempts.benchmark.bench_config(vae="tiny", model="tiny", batch_size=2))
    read, real = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: read.append(1) or real(tensor))
    counts = []
    for make in (attempts.ours, attempts.reads):
        work = make(settings)
        read.clear()
        work.call()
        counts.append(len(read))
    assert counts[1] == counts[0] + len(work.state.optimizers)
    asked, draws_of = [], attempts.benchmark.draws_of
    monkeypatch.setattr(
        attempts.benchmark, "draws_of", lambda how, step: asked.append(how) or draws_of(how, step)
    )
    attempts.host_draws(settings).call()
    assert asked[-1] is not settings and asked[-1].device == "cpu"
    work, dicts = attempts.state_dict_average(settings), []
    for name in ("ema", "sit"):
        module = getattr(work.state, name)
        monkeypatch.setattr(module, "state_dict", lambda of=module.state_dict: dicts.append(1) or of())
    work.call()
    assert len(dicts) == 2


def test_an_attempt_that_computes_something_else_is_no_measurement(attempts, monkeypatch, tmp_path, capsys):
    def wrong(settings):
        work = attempts.ours(settings)
        torch.nn.init.normal_(work.state.sit.x_embedder.proj.weight)
        return work

    monkeypatch.setitem(attempts.ATTEMPTS, "compiling", wrong)
    found = start(attempts, monkeypatch, tmp_path / "attempts.json", "--only=compiling")
    assert "disagree" in found["attempts"]["compiling"]["not measured"]
    assert capsys.readouterr().out.startswith("compiling: not measured: ")
