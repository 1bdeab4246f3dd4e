"""Weights in and out, safely: find, load, save, the Hub, diffusers, export."""
