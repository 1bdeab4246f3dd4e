"""Devices by name, the processes of a launcher, and the space that work needs."""

import shutil
import subprocess
import sys

import pytest
import torch

from repae_lite.utils import progress
from repae_lite.utils.devices import choose_device
from repae_lite.utils.locks import check_space
from repae_lite.utils.processes import local_process_count


@pytest.mark.parametrize("gpu", [False, True])
def test_a_gpu_is_taken_if_there_is_one(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch, "empty", lambda *_, device: device)  # as if it were there
    assert choose_device() == choose_device(None) == ("cuda" if gpu else "cpu")
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["nonsense", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(ValueError, match=rf"^there is no device '{name}' \(.*\): give cpu, cuda or cuda:N$"):
        choose_device(name)


JOINING = """
import torch.distributed as dist
from repae_lite.utils.devices import choose_device
from repae_lite.utils.processes import local_process_count, process_count, process_rank
device = choose_device("cpu")
print(f"{device}: {process_rank()} of {process_count()}, {local_process_count()} here\\n", end="", flush=True)
dist.destroy_process_group()
"""


def test_processes_of_a_launcher_join(tmp_path):
    (tmp_path / "joining.py").write_text(JOINING)
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "joining.py"),
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[1:] == ["cpu: 0 of 2, 2 here", "cpu: 1 of 2, 2 here"]


def test_a_process_alone_is_alone(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_process_count() == 1


def test_space_is_checked_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, 2 * 10**9))
    check_space(tmp_path, 2 * 10**9, "the images need")
    with pytest.raises(
        OSError, match=rf"^the images need 2\.0 GB more in {tmp_path}, where 2\.0 GB are free: "
    ):
        check_space(tmp_path, 2 * 10**9 + 1, "the images need")


@pytest.mark.parametrize(("terminal", "seconds"), [(True, 0.5), (False, 60)])
def test_a_log_file_gets_a_line_a_minute(monkeypatch, terminal, seconds):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress.progress_bar(10, 4, show=True) as bar:
        assert (bar.mininterval, bar.total, bar.n) == (seconds, 10, 4)
    assert progress.progress_bar(10, 0, show=False).disable
