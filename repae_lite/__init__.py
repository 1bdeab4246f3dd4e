"""repae_lite: learn, reproduce and extend REPA-E, end-to-end tuning of a VAE and a diffusion transformer.

The paper is arXiv 2504.10483. Nine rooms, one subject each; a room imports only from rooms below it (`ROOMS`
lists them from the ground up). The names in `__all__` are the public face. Each is imported when it is first
used, so `import repae_lite` itself costs nothing. `notebooks/00_map.ipynb` is the guided way in, and
`method/steps.py` is the method.
"""

from importlib import import_module

__version__ = "0.1.0"

# From the ground up: each imports only from those before it.
ROOMS = tuple("utils networks method data checkpoints evaluation training teaching commands".split())

_HOMES = {  # where the public names live
    "networks.vae": "AutoencoderKL VAEConfig",
    "networks.sit": "SiT SiTConfig",
    "networks.latent_stats": "LatentStats",
    "networks.discriminator": "PatchDiscriminator",
    "networks.encoders": "VisionEncoder load_encoders",
    "method.losses": "VAELossConfig LPIPSLoss sit_losses",
    "method.steps": "Draws StepConfig TrainState latent_step make_ema make_optimizer repae_step",
    "method.sampling": "Guidance sample_ode sample_sde",
    "data.datasets": "open_dataset",
    "checkpoints.models": "load_discriminator load_latent_stats load_sit load_vae "
    "export_diffusers save_sit save_vae",
    "evaluation.statistics": "difference_interval",
    "teaching.small_scale": "SmallScale progress",
    "teaching.explorers": "collapse_lab explore latent_explorer sampler_explorer time_explorer "
    "token_explorer training_dashboard",
    "utils.pixels": "to_uint8 to_unit_range",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> object:
    """Imports a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
