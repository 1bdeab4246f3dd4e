"""repae_lite: learn, reproduce and extend REPA-E (arXiv 2504.10483), end-to-end tuning of a VAE and a
diffusion transformer.

Nine rooms, by subject; a room imports only from rooms below it (`ROOMS`, from the ground up). The names in
`__all__` are the public face: `import repae_lite` costs nothing, since each is imported when it is first
used. `notebooks/00_map.ipynb` is the guided way in; `method/steps.py` is the method.
"""

from importlib import import_module

__version__ = "0.1.0"

# Each imports only from those before it; the last two stand side by side.
ROOMS = (
    "utils",
    "networks",
    "method",
    "data",
    "checkpoints",
    "evaluation",
    "training",
    "teaching",
    "commands",
)

_HOMES = {  # where the public names live
    "networks.vae": "AutoencoderKL VAEConfig",
    "networks.sit": "SiT SiTConfig",
    "networks.discriminator": "PatchDiscriminator",
    "networks.encoders": "VisionEncoder load_encoders",
    "method.losses": "VAELossConfig LPIPSLoss sit_losses",
    "method.steps": "Draws StepConfig TrainState latent_step make_ema make_optimizer repae_step",
    "method.sampling": "Guidance sample_ode sample_sde",
    "data.datasets": "open_dataset",
    "checkpoints.models": "export_diffusers load_discriminator load_latent_stats load_sit load_vae save_sit save_vae",
    "teaching.small_scale": "SmallScale",
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
