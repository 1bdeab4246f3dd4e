"""repae_lite: learn, reproduce and extend REPA-E (arXiv 2504.10483), end-to-end tuning of a VAE and a diffusion transformer.

The house has five floors; a file imports only from floors below its own (`figures` and `method_map` share one):

    ground  files, flow, metrics, figures, method_map    no knowledge of the networks
    1       objectives, vae, discriminator, data
    2       sit, encoders, checkpoint
    3       sampling, steps                              `steps` is the method
    4       small_scale, cli

`notebooks/00_map.ipynb` is the guided way in.
"""

__version__ = "0.1.0"
