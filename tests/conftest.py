"""Shared set-up: two threads (one in each of pytest-xdist's workers), no network, no bars that fill logs."""

import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from repae_lite.utils import devices

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

BENCHMARKS = Path(__file__).resolve().parents[1] / "reproduce" / "benchmarks"


@pytest.fixture
def benchmark_script(monkeypatch):
    """Imports a script of reproduce/benchmarks by its name; afterwards all of them are forgotten."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for script in BENCHMARKS.glob("*.py"):
        sys.modules.pop(script.stem, None)


@pytest.fixture(autouse=True, scope="session")
def memory_given_back():
    """Test processes live long and side by side: each would keep what its largest test has taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "keep_memory", lambda: None)
        yield
