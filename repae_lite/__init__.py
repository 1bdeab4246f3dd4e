"""repae_lite: learn, reproduce and extend REPA-E (arXiv 2504.10483), end-to-end tuning of a VAE and a diffusion transformer.

The house has four floors; a file imports only from floors below its own, or from the formulas of the ground floor:

    ground  flow, objectives                                      formulas, no weights of their own but LPIPS
    1       vae, sit, discriminator, encoders, data, metrics, figures
    2       sampling
    3       steps                                                 the method
    4       cli

`notebooks/00_map.ipynb` is the guided way in.
"""

__version__ = "0.1.0"
