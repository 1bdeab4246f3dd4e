"""Pixels and latents on disk: image files, data sets, preprocessing, cached latents."""
