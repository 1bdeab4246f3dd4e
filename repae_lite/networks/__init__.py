"""Architectures, and nothing but: VAE, SiT, discriminator, vision encoders."""
