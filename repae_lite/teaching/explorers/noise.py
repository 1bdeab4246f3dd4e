"""One image on its way through time: what SiT sees, predicts, and how near its layers are to the encoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ipywidgets
import torch
from torch import Tensor

from repae_lite.data.datasets import load_embedded
from repae_lite.method.interpolant import interpolate
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.teaching.explorers.material import Material, Source
from repae_lite.teaching.explorers.parts import Explorer, Progress, heat, picture, pixels, sheet, show
from repae_lite.teaching.figures import LatentPalette
from repae_lite.utils.pixels import to_unit_range

Pair = tuple[Source | SiT, Source | AutoencoderKL]  # a SiT, and the VAE that it was trained on
SHIPPED = {"REPA": ("tiny", "tiny"), "REPA-E": ("tiny-e2e-20k", "tiny-e2e-20k")}
FIT, PENALTY = 500, 10.0  # images that the linear maps are fitted to, and their ridge penalty


def time_explorer(
    networks: Mapping[str, Pair] = SHIPPED,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    encoder: str | VisionEncoder = "tiny",
    fit: tuple[Tensor, Tensor] | None = None,
    device: str | None = None,
) -> Explorer:
    """A slider through time: noised latents, velocity, one-step denoising, alignment by layer and network.

    Only one layer was trained to be aligned, through a projector of its own. To compare all layers of all
    networks, also those trained without alignment, each gets a linear map of its own from features to tokens
    (ridge regression on `fit`, at random times); what is shown is the cosine of its output and the token.

    Args:
        networks: (SiT, VAE) by name.
        images: uint8 (B, 3, H, W) to look at; by default 40 of the embedded evaluation split.
        labels: their classes (B,).
        encoder: whose tokens the layers are compared with.
        fit: images and labels for the linear maps; by default 500 of the embedded training split.
        device: where all run; None for the best there is.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `load_sit`, `load_vae`, `Material.of` say.
    """
    material = Material.of(images, labels, device)
    pairs = {name: (material.sit(sit), material.vae(vae)) for name, (sit, vae) in networks.items()}
    teacher = VisionEncoder.from_name(encoder) if isinstance(encoder, str) else encoder
    teacher = teacher.to(material.device)
    fit = fit or tuple(values[:FIT] for values in load_embedded("train"))
    fit_x, fit_labels = to_unit_range(fit[0].to(material.device)), fit[1].to(material.device)
    fit_tokens, tokens = (
        tokens_of(teacher, given) for given in (fit[0].to(material.device), material.images)
    )
    lenses = {
        name: Lens.fitted(sit, material.latents(vae, fit_x), fit_labels, fit_tokens)
        for name, (sit, vae) in pairs.items()
    }
    latents = {name: sit.normalize(material.latents(vae)) for name, (sit, vae) in pairs.items()}
    palettes = {name: LatentPalette([z]) for name, z in latents.items()}
    where, depth = picture(), max(sit.config.depth for sit, _ in pairs.values())

    @torch.no_grad()
    def draw(progress: Progress, image: int, t: float, noise: int, compare: str) -> None:
        centre = fit_tokens.mean((0, 1)) if compare == CENTRED else 0
        rows, told = {}, []
        for name, (sit, vae) in pairs.items():
            z, label = latents[name][[image]], material.labels[[image]]
            eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(noise)).to(z)
            time = torch.full((1,), t).to(z)
            z_t, _ = interpolate(z, eps, time)
            hidden, v = features(sit, z_t, time, label)
            clean = vae.decode(sit.denormalize(z_t - t * v))[0]  # on the linear path
            maps = [lens(h) for lens, h in zip(lenses[name].maps, hidden, strict=True)]
            cosines = [cosine(h - centre, tokens[[image]] - centre)[0] for h in maps]
            told.append(f"{name} {max(float(c.mean()) for c in cosines):.2f}")
            side = sit.config.grid_size
            rows[name] = [
                pixels(palettes[name](z_t)[0].float()),
                heat(v[0].norm(dim=0), 0, 2 * v.shape[1] ** 0.5),
                clean,
                *(heat(c.unflatten(0, (side, side)), 0, 1) for c in cosines),
            ]
        captions = [
            "z_t",
            "|velocity|",
            "denoised\nin one step",
            *(f"block {k}" for k in range(1, depth + 1)),
        ]
        description = (
            f"Image {image} at t = {t:.2f}. Cosine to the {compare}, from 0 (dark) to 1 (bright); mean of "
            f"the best block: {', '.join(told)}."
        )
        show(where, sheet({"image": [material.images[image]]} | rows, captions, tile=80), description)

    controls = {
        "image": ipywidgets.IntSlider(0, min=0, max=len(material.images) - 1),
        "t": ipywidgets.FloatSlider(0.5, min=0.02, max=0.98, step=0.02, description="time t"),
        "noise": ipywidgets.IntSlider(0, min=0, max=20, description="noise (seed)"),
        "compare": ipywidgets.Dropdown(options=[WHOLE, CENTRED], description="cosine to"),
    }
    return Explorer(draw, controls, [where], slow=True)


WHOLE, CENTRED = "encoder's tokens", "encoder's tokens less their mean"


@dataclass
class Lens:
    """Linear maps from each layer's features to the encoder's tokens."""

    maps: list[Callable[[Tensor], Tensor]]

    @classmethod
    @torch.no_grad()
    def fitted(cls, sit: SiT, z: Tensor, labels: Tensor, tokens: Tensor) -> "Lens":
        """By ridge regression on latents z (N, C, h, w) at random times, and tokens (N, T, D)."""
        generator = torch.Generator().manual_seed(0)
        t = torch.rand(len(z), generator=generator).to(z)
        eps = torch.randn(z.shape, generator=generator).to(z)
        z_t, _ = interpolate(sit.normalize(z), eps, t)
        parts = [
            features(sit, *each)[0] for each in zip(*(v.split(100) for v in (z_t, t, labels)), strict=True)
        ]
        target = tokens.flatten(0, 1)
        maps = []
        for layer in zip(*parts, strict=True):
            h = torch.cat(layer).flatten(0, 1)
            mean, offset = h.mean(0), target.mean(0)
            gram = (h - mean).T @ (h - mean) + PENALTY * torch.eye(h.shape[1], device=h.device)
            weight = torch.linalg.solve(gram, (h - mean).T @ (target - offset))
            maps.append(lambda h, m=mean, w=weight, o=offset: (h - m) @ w + o)
        return cls(maps)


def features(sit: SiT, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features (B, N, width) after each block, and the velocity (B, C, h, w)."""
    found = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: found.append(out)) for block in sit.blocks]
    try:
        v = sit(z_t, t, labels)
    finally:
        for hook in hooks:
            hook.remove()
    return found, v


def tokens_of(encoder: VisionEncoder, images: Tensor) -> Tensor:
    """Tokens (B, N, D) of uint8 images."""
    with torch.no_grad():
        return torch.cat([encoder(part) for part in images.split(100)]).float()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Along the last axis."""
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)
