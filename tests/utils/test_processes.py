"""What a launcher's or accelerate's settings may be, and where processes cannot meet: one sentence each."""

import socket
from datetime import timedelta

import pytest

from repae_lite.utils import processes
from repae_lite.utils.processes import (
    LAUNCHER,
    REFUSED,
    check_settings,
    join,
    started_together,
    together,
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
