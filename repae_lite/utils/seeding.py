"""Randomness that depends on its purpose alone, and not on what was drawn before."""

import hashlib

import torch


def generator(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on the key alone; other keys, or kinds of device, give independent numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)
