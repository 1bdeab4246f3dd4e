"""Explorers: latents, times, samplers, tokens, runs and collapse, to be moved, clicked and painted.

Each is an ipywidget that a notebook shows as the last value of a cell; `notebooks/08_explorer.ipynb` has them
all. Networks are given as `load_vae` and `load_sit` take them: by name, file, run folder or Hub id.
"""

from repae_lite.teaching.explorers.collapse import collapse_lab
from repae_lite.teaching.explorers.latents import latent_explorer
from repae_lite.teaching.explorers.noise import time_explorer
from repae_lite.teaching.explorers.parts import explore
from repae_lite.teaching.explorers.samplers import sampler_explorer
from repae_lite.teaching.explorers.tokens import token_explorer
from repae_lite.teaching.explorers.training import training_dashboard

__all__ = [
    "collapse_lab",
    "explore",
    "latent_explorer",
    "sampler_explorer",
    "time_explorer",
    "token_explorer",
    "training_dashboard",
]
