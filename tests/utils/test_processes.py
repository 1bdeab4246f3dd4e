"""What a launcher's or accelerate's settings may be, and where processes cannot meet: one sentence each."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from repae_lite.utils import processes
from repae_lite.utils.processes import (
    LAUNCHER,
    REFUSED,
    check_settings,
    join,
    started_together,
    together,
    unwritten,
)

TOGETHER = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def launched(monkeypatch):
    """Variables of a launcher for two processes."""
    for name, value in TOGETHER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_nothing_honours_is_refused_by_name(name, monkeypatch):
    for value in ("", REFUSED[name][0][-1]):
        monkeypatch.setenv(name, value)
        check_settings()
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"accelerate's setting {name} is '2', and .* unset it"):
        check_settings()


def test_a_process_alone_is_alone(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    assert not started_together()
    with pytest.raises(OSError, match="full"), together():
        raise OSError("full")


@pytest.mark.parametrize("name", LAUNCHER)
def test_half_a_launcher_s_settings_are_refused_by_name(name, launched, monkeypatch):
    assert started_together()
    monkeypatch.setenv(name, "")
    if name == "WORLD_SIZE":
        monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=f"but {name} is not set: start with accelerate launch or torchrun"):
        started_together()


def test_a_port_in_use_and_processes_that_do_not_come(launched, monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(
            ConnectionError, match=r"it is in use, .* --main_process_port 0, torchrun --standalone"
        ):
            join(cpu=True)
    with pytest.raises(ConnectionError, match=r"the 2 processes cannot meet at 127\.0\.0\.1:.* \(Timed out"):
        join(cpu=True)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_that_are_started_again_find_nothing_of_those_before(order):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    starts = 0

    def start(rank: int) -> list[bytes]:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=60))
        store = unwritten(client, rank, 3)
        store.set(f"address/{rank}", f"{rank} of start {starts}")
        return [store.get(f"address/{other}") for other in range(3)]

    for starts in range(3):
        with ThreadPoolExecutor(3) as pool:
            everyone = list(pool.map(start, order))
        for addresses in everyone:
            assert addresses == [f"{rank} of start {starts}".encode() for rank in range(3)]


def test_processes_that_are_started_again_and_do_not_come(monkeypatch):
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(dist.DistError, match="Timed out"):
        unwritten(server, 0, 2)
