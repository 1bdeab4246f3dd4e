"""Shared set-up: two threads, no network, no progress bars that fill logs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(2)
