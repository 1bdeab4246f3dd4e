"""repae_lite: learn, reproduce and extend REPA-E (arXiv 2504.10483), end-to-end tuning of a VAE and a diffusion transformer.

The house has five floors; a file imports only from floors below its own (`figures` and `method_map` share one):

    ground  files, flow, metrics, figures, method_map    no knowledge of the networks
    1       objectives, data
    2       vae, sit, discriminator, encoders
    3       sampling, steps, checkpoint                  `steps` is the method
    4       small_scale, cli

`notebooks/00_map.ipynb` is the guided way in.
"""

__version__ = "0.1.0"
