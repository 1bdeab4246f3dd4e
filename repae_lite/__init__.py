"""repae_lite: learn, reproduce and extend REPA-E (arXiv 2504.10483), end-to-end tuning of a VAE and a diffusion transformer.

The house has eight floors; a file imports only from floors below its own (`figures` and `method_map` share one):

    ground  files, pickles, image_files, option_files, flow, layers, metrics, divergence, figures, method_map, hub, layouts, recipes
    1       objectives, projectors, data, widgets, encoder_zoo, training_options, architecture, diffusers_layout, model_files
    2       vae, sit, discriminator, encoders, resumable_h5, downloading
    3       sampling, steps, checkpoint, preprocessing, latents    `steps` is the method
    4       small_scale, parallel, run_folder, run_parts, exporting, machine
    5       run_log, model_options
    6       training
    7       cli

`notebooks/00_map.ipynb` is the guided way in.
"""

__version__ = "0.1.0"
