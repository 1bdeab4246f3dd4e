"""CPU threads beside other programs; no test measures a time."""

import pytest
import torch

from repae_lite.teaching.small_scale import progress
from repae_lite.utils import cores


@pytest.fixture
def machine(monkeypatch):
    """Two cores, two threads of torch, and others that use what the test says."""
    used = {"cores": 0.0}
    monkeypatch.setattr(cores, "core_count", lambda: 2)
    monkeypatch.setattr(cores.OtherPrograms, "cores", lambda self: used["cores"])
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield used
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("others", "wanted", "given"),
    [(0.0, 2, 2), (0.3, 2, 2), (1.0, 2, 1), (2.0, 2, 1), (9.0, 2, 1), (0.0, 8, 2)],
)
def test_every_thread_has_a_core(machine, others, wanted, given):
    machine["cores"] = others
    assert cores.free_threads(wanted) == given


def test_one_thread_needs_no_look(monkeypatch):
    monkeypatch.setattr(cores, "OtherPrograms", None)
    assert cores.free_threads(1) == 1


def test_threads_follow_what_others_use_but_never_exceed_the_start(machine):
    seen = []
    for used in cores.beside_others([0.0, 1.0, 2.0, 0.2], every=-1.0):
        seen.append(torch.get_num_threads())
        machine["cores"] = used
    assert seen == [2, 2, 1, 1] and torch.get_num_threads() == 2

    torch.set_num_threads(1)
    assert list(cores.beside_others([1, 2], every=-1.0)) == [1, 2] and torch.get_num_threads() == 1


def test_the_bar_of_every_training_loop_looks(machine, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(cores.time, "monotonic", lambda: next(clock))
    machine["cores"] = 1.0
    assert list(progress([5, 6], 2, "a label")) == [5, 6] and torch.get_num_threads() == 1


def test_own_work_is_not_that_of_others(monkeypatch):
    class Times(tuple):
        idle, iowait, guest = property(lambda s: s[0]), property(lambda s: s[1]), property(lambda s: s[2])

    readings = iter([(Times((100, 5, 0, 50)), 7.0, 0.0), (Times((106, 6, 0, 63)), 11.0, 10.0)])

    def read(self):
        times, own, at = next(readings)
        monkeypatch.setattr(cores.psutil, "cpu_times", lambda: times)
        monkeypatch.setattr(cores.time, "process_time", lambda: own)
        monkeypatch.setattr(cores.time, "monotonic", lambda: at)
        original(self)

    original = cores.OtherPrograms._read
    monkeypatch.setattr(cores.OtherPrograms, "_read", read)
    others = cores.OtherPrograms()
    assert others.cores() == pytest.approx(0.9)  # 13 seconds busy, 4 of them ours, in 10 seconds
