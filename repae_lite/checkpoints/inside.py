"""The network that is wanted, out of a state dict that holds more: other projects' training checkpoints.

VA-VAE's has the VAE beside `loss.*` and `foundation_model.*`; latent diffusion's in `first_stage_model.*`.
What is known to be another network is left aside, and that is logged. Anything else stays, so that it is
refused.
"""

import logging
from pathlib import Path

from torch import Tensor

logger = logging.getLogger(__name__)

_ANCHORS = {"vae": "encoder.conv_in.weight", "discriminator": "main.0.weight"}  # what a network begins with
_OWN = {"vae": {"encoder", "decoder", "quant_conv", "post_quant_conv"}, "discriminator": {"main"}}
_HOMES = {  # parts of the prefix before a network's names
    "vae", "autoencoder", "ae", "first_stage_model", "model", "net", "network", "module", "_orig_mod",
    "ema", "ema_model", "model_ema", "vae_ema", "ema_vae", "discriminator", "disc", "loss",
}  # fmt: skip
_OTHERS = {  # what is known to lie beside a VAE: first parts of names
    "loss", "discriminator", "disc", "perceptual_loss", "lpips", "foundation_model", "linear_proj", "model",
    "diffusion_model", "first_stage_model", "cond_stage_model", "conditioner", "denoiser", "unet",
    "text_encoder", "vae", "autoencoder", "model_ema", "ema", "ema_model", "vae_ema", "ema_vae",
    # buffers of latent diffusion's noise schedule
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "lvlb_weights", "logvar", "scale_factor",
}  # fmt: skip


def has_network(state: dict[str, Tensor], which: str) -> bool:
    """Whether a state dict holds a VAE or a discriminator, under whatever prefix."""
    return bool(_prefixes(state, which))


def network_inside(state: dict[str, Tensor], which: str, path: Path) -> dict[str, Tensor]:
    """A network's own weights, without their prefix, and whatever is not known to be another's.

    Args:
        state: all that a file holds.
        which: "vae" or "discriminator"; a state dict of others comes back as it is.
        path: what to call it in errors.

    Raises:
        ValueError: there are several of them.
    """
    if which not in _ANCHORS or not (found := _prefixes(state, which)):
        return state
    plain = [
        prefix for prefix in found if "ema" not in prefix
    ] or found  # its own weights before their average
    if len(plain) > 1:
        raise ValueError(
            f"{path} holds several networks that could be meant ({', '.join(p + '*' for p in plain)}): save "
            "one of them in a file of its own"
        )
    prefix, own, aside = plain[0], {}, {}
    others = _OTHERS | set().union(*(names for network, names in _OWN.items() if network != which))
    for name, tensor in state.items():
        inside = name.removeprefix(prefix) if name.startswith(prefix) else ""
        if inside.split(".")[0] in _OWN[which]:
            own[inside] = tensor
        elif (first := (inside or name).split(".")[0]) in others:
            aside.setdefault(first, tensor)
        else:
            own[name] = tensor
    averaged = "ema" in prefix
    if averaged or any("ema" in name for name in aside):
        said = "the averaged (EMA)" if averaged else "not the averaged (EMA) but the plain"
        logger.info(f"{path}: taken is {said} {which}")
    if aside:
        logger.info(f"{path}: the {which} is {prefix}*; left aside: {', '.join(sorted(aside))}")
    return own


def _prefixes(state: dict[str, Tensor], which: str) -> list[str]:
    anchor = _ANCHORS.get(which, "\n")
    found = sorted(name.removesuffix(anchor) for name in state if name.endswith(anchor))
    return [prefix for prefix in found if set(prefix.split(".")[:-1]) <= _HOMES and prefix[-1:] in ("", ".")]
