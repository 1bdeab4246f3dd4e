"""Two processes with half a batch each take the steps of one process with all of it, whatever the step is."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from steps_of_two import KINDS, steps
from torch.testing import assert_close

from repae_lite.method.steps import GRAD_NORMS
from repae_lite.training import sharding

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> list[dict]:
    """What each of two processes has after the steps of every kind."""
    folder = tmp_path_factory.mktemp("halves")
    done = subprocess.run(
        [*LAUNCH, str(ROOT / "tests" / "steps_of_two.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search("strides|unused param|broadcast_buffers", done.stderr), done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_make_the_steps_of_one(halves, alone, kind):
    history, weights = steps(kind, alone)
    rounding = 0.02 if kind == "bf16" else 1e-4  # rounding of bf16, summed in another order
    for first, second in zip(*(half[kind][0] for half in halves), strict=True):
        assert first == second
    for step, (one, two) in enumerate(zip(history, halves[0][kind][0], strict=True)):
        assert one == pytest.approx(two, rel=rounding, abs=rounding / 100), step
        assert all(one[norm] > 0 for norm in GRAD_NORMS.values() if norm in one)
    first, second = (half[kind][1] for half in halves)
    assert weights.keys() == first.keys() == second.keys()
    for name, tensor in weights.items():
        assert torch.equal(first[name], second[name]), name
        assert_close(
            tensor,
            first[name],
            rtol=rounding,
            atol=rounding / 10,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_a_torch_that_sums_the_gradients_of_pieces_is_refused(monkeypatch):
    def summing(layer, mesh):
        def pieces(weight):
            weight.grad.full_tensor = lambda: weight.grad * mesh.size()

        layer.weight.register_post_accumulate_grad_hook(pieces)

    monkeypatch.setattr(sharding, "fully_shard", summing)
    with pytest.raises(ValueError, match="makes the gradients of sharded weights 2 times as large on cpu"):
        sharding._check_averages(SimpleNamespace(size=lambda: 2, device_type="cpu"))


def test_an_overflow_in_one_process_holds_up_all(halves):
    torch.manual_seed(0)
    weights = torch.nn.Linear(3, 2).weight
    for half in halves:
        assert torch.equal(half["overflow"][0], weights) and not half["overflow"][1]


def test_gradients_are_averaged_once_with_the_last_micro_batch(halves):
    assert [half["micro_batches"] for half in halves] == [[1.0, 3.0], [2.0, 3.0]]


def test_a_request_to_stop_ends_all_after_the_same_step(halves):
    """The slower one takes 1 s for step 1, then half a second for each: 2 s are two steps, then four."""
    assert [half["stop"] for half in halves] == [(7, 3), (7, 3)]
