"""Time, memory and operations are told as they were, and given to the part that spent them."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from repae_lite.utils import measure
from repae_lite.utils.measure import Parts, counting, in_turns, summary, watched

CPU = torch.device("cpu")


def test_calls_take_turns_and_warm_ups_are_not_timed(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) ** 2)
    order = []
    found = in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU, repeats=2, warmup=1
    )
    assert "".join(order) == "abbaab"
    # Readings are squares: from 2i to 2i + 1 are 4i + 1 seconds, and only timed rounds read once more.
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
    assert all(value > 0 for values in found.values() for value in values)


def test_a_summary_has_the_quartiles():
    found = summary([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (found["low"], found["median"], found["high"]) == (2.0, 3.0, 4.0)
    assert found["values"] == [4.0, 1.0, 3.0, 2.0, 5.0]
    assert summary([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0, "values": [7.0]}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells it")
def test_the_peak_of_memory_stays_after_the_memory_is_gone():
    before = measure.peak_resident()
    block = torch.ones(before // 4)  # as many bytes as the process has ever held, on top of what it holds
    del block
    assert 1.05 * before < measure.peak_resident() < 2.05 * before


def bytes_of(function) -> int:
    with counting() as so_far:
        function()
        return int(so_far()[1])


def test_a_gpus_work_counts_once_where_kernels_overlap():
    assert measure.covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (5.5, 5.75)]) == 4.0
    assert measure.covered([]) == 0.0 and measure.device_seconds(lambda: None, CPU) is None


@pytest.mark.gpu
def test_the_work_of_a_gpu_is_within_the_time_it_takes():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    call = lambda: [a @ a for _ in range(20)]  # noqa: E731
    (seconds,) = in_turns({"": call}, device, repeats=1, warmup=2)[""]
    assert 0.3 * seconds < measure.device_seconds(call, device) < 3 * seconds


def test_bytes_are_those_that_operations_read_and_write():
    x, y = torch.ones(10, 100), torch.ones(10, 100)  # 4,000 bytes each
    assert bytes_of(lambda: x + y) == 3 * 4000
    assert bytes_of(lambda: x.t().contiguous()) == 2 * 4000  # the view costs nothing, the copy does
    assert bytes_of(lambda: x.view(1000).detach()[:10]) == 0
    assert bytes_of(lambda: x.add_(y)) == 3 * 4000
    assert bytes_of(lambda: torch._foreach_lerp_([x, x.clone()], [y, y], 0.5)) == (2 + 6) * 4000
    assert bytes_of(lambda: x.double()) == 4000 + 8000


def test_flops_are_two_to_a_multiplication():
    a, b = torch.ones(3, 5), torch.ones(5, 7, requires_grad=True)
    with counting() as so_far:
        (a @ b).sum().backward()
    assert so_far()[0] == 2 * (2 * 3 * 5 * 7)  # forward, and the gradient of b


def test_parts_split_what_is_spent():
    spent = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    parts = Parts(lambda: next(spent), lambda begin, end: end - begin)
    parts.switch("a")
    parts.switch("b")
    parts.switch("a")
    assert parts.totals() == {measure.REST: 1.0, "a": 2.0 + 8.0, "b": 4.0}


@pytest.mark.parametrize("repeated", [False, True])
def test_networks_are_told_apart_forward_and_backward(repeated):
    torch.manual_seed(0)
    one, two = nn.Linear(8, 16, bias=False), nn.Sequential(nn.Linear(16, 2, bias=False), nn.Tanh())
    x = torch.randn(4, 8)

    def step(call_one, call_two) -> torch.Tensor:
        h = call_one(x)
        h = checkpoint(call_two, h, use_reentrant=False) if repeated else call_two(h)
        return h.square().sum()

    step(one, two).backward()
    expected = [p.grad.clone() for p in (one.weight, two[0].weight)]
    one.weight.grad = two[0].weight.grad = None
    with FlopCounterMode(display=False) as counter:
        parts = Parts(counter.get_total_flops, lambda begin, end: end - begin)
        step(watched(one.forward, "one", parts), watched(two.forward, "two", parts)).backward()
        found = parts.totals()
    first, second = 2 * 4 * 8 * 16, 2 * 4 * 16 * 2
    assert {name: flops for name, flops in found.items() if name != measure.REST} == {
        "one, forward": first,
        "one, backward": first,  # of the weight alone: the images need no gradient
        "two, forward": second * (2 if repeated else 1),
        "two, backward": 2 * second,
    }
    assert found[measure.REST] == 0
    assert all(map(torch.equal, expected, (one.weight.grad, two[0].weight.grad)))


def test_peaks_are_positive_and_of_the_right_operation(monkeypatch):
    asked = []

    def turns(calls, device, **_):
        with counting() as so_far:
            calls[""]()
        asked.append(so_far())
        return {"": [4.0, 2.0]}

    monkeypatch.setattr(measure, "in_turns", turns)
    product, copy = measure.matmul_peak(CPU, torch.bfloat16), measure.copy_peak(CPU)
    assert product == asked[0][0] / 2 > 0 and asked[0][1] == 3 * 2 * 1024**2
    assert copy == 2 * 2**26 / 2 and asked[1][0] == 0 and asked[1][1] >= 2 * 2**26
