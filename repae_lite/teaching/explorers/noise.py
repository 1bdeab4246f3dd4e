"""One image on its way through time: what SiT sees, predicts, and how near its layers are to the encoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ipywidgets
import torch
from torch import Tensor

from repae_lite.checkpoints.models import load_sit, load_vae
from repae_lite.data.datasets import load_embedded
from repae_lite.method.interpolant import Interpolant, expand_time, get_interpolant, interpolate
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.teaching.explorers.material import BATCH, Material, Source, ready
from repae_lite.teaching.explorers.parts import Board, Explorer, Progress, heat, pixels, sheet, show
from repae_lite.teaching.figures import LatentPalette
from repae_lite.teaching.small_scale import progress as bar
from repae_lite.utils.devices import widest_float

Pair = tuple[Source | SiT, Source | AutoencoderKL]  # a SiT, and the VAE that it was trained on
SHIPPED = {"REPA": ("tiny", "tiny"), "REPA-E": ("tiny-e2e-20k", "tiny-e2e-20k")}
FIT, PENALTY = 500, 10.0  # images that the linear maps are fitted to, and their ridge penalty


def time_explorer(
    networks: Mapping[str, Pair] = SHIPPED,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    encoder: str | VisionEncoder = "tiny",
    fit: tuple[Tensor, Tensor | None] | None = None,
    path: str | Interpolant = "linear",
    device: str | None = None,
) -> Explorer:
    """A slider through time: noised latents, velocity, one-step denoising, alignment by layer and network.

    Only one layer was trained to be aligned, through a projector of its own. To compare all layers of all
    networks, also those trained without alignment, each gets a linear map of its own from features to tokens
    (ridge regression on `fit`, at random times); what is shown is the cosine of its output and the token.

    Args:
        networks: (SiT, VAE) by name; all are copied, in float32.
        images: uint8 (B, 3, H, W) to look at; by default 40 of the embedded evaluation split.
        labels: their classes (B,); the null class where nobody says them.
        encoder: whose tokens the layers are compared with.
        fit: images and labels for the linear maps, needed with images of your own; by default 500 of the
            embedded training split.
        path: from data to noise, on which the SiTs were trained.
        device: where all run; None for the best there is.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `load_sit`, `load_vae`, `Material`, `Lens` say;
            images without `fit`.
    """
    if images is not None and fit is None:
        raise ValueError("the linear maps need images like yours: give fit=(images, labels), a few hundred")
    material, path = Material.of(images, labels, device), get_interpolant(path)
    fit = Material.of(*(fit or (values[:FIT] for values in load_embedded("train"))), device)
    pairs = {name: ready_pair(pair, material.device) for name, pair in networks.items()}
    teacher = ready(encoder, VisionEncoder.from_name, material.device)
    fit_tokens, tokens = tokens_of(teacher, fit.images), tokens_of(teacher, material.images)
    lenses = {
        name: Lens.fitted(sit, fit.latents(vae), fit.labels_for(sit), fit_tokens, path)
        for name, (sit, vae) in pairs.items()
    }
    latents = {name: sit.normalize(material.latents(vae)) for name, (sit, vae) in pairs.items()}
    palettes = {name: LatentPalette([z]) for name, z in latents.items()}
    labels = {name: material.labels_for(sit) for name, (sit, _) in pairs.items()}
    where, depth = Board(), max(sit.config.depth for sit, _ in pairs.values())

    @torch.no_grad()
    def draw(progress: Progress, image: int, t: float, noise: int, compare: str) -> None:
        centre = fit_tokens.mean((0, 1)) if compare == CENTRED else 0
        rows, told = {}, []
        for done, (name, (sit, vae)) in enumerate(pairs.items()):
            progress(done, len(pairs))
            z, time = latents[name][[image]], torch.full((1,), t, device=material.device)
            eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(noise)).to(z)
            z_t, _ = interpolate(z, eps, time, path)
            hidden, v = features(sit, z_t, time, labels[name][[image]])
            maps = [lens(h) for lens, h in zip(lenses[name].maps, hidden, strict=True)]
            cosines = [cosine(h - centre, tokens[[image]] - centre)[0] for h in maps]
            told.append(f"{name} {max(float(c.mean()) for c in cosines):.2f}")
            rows[name] = [
                material.images[image],
                pixels(palettes[name](z_t)[0].float()),
                heat(v[0].norm(dim=0), 0, 2 * v.shape[1] ** 0.5),
                vae.decode(sit.denormalize(clean(v, z_t, time, path)))[0],
                *(heat(c.unflatten(0, (sit.config.grid_size, -1)), 0, 1) for c in cosines),
            ]
        captions = ["image", "z_t", "|velocity|", "denoised\nin one step"]
        captions += [f"block {k}" for k in range(1, depth + 1)]
        description = (
            f"Image {image} at t = {t:.2f}. |velocity| from 0 (dark) to 2 √channels (bright); cosine to the "
            f"{compare} from 0 (dark) to 1 (bright), mean of the best block: {', '.join(told)}."
        )
        show(where, sheet(rows, captions, tile=80), description)

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
    def fitted(
        cls, sit: SiT, z: Tensor, labels: Tensor, tokens: Tensor, path: str | Interpolant = "linear"
    ) -> "Lens":
        """By ridge regression on latents z (N, C, h, w) at random times of a path, and tokens (N, T, D).

        Raises:
            ValueError: SiT and encoder cut images into grids of different sizes.
        """
        if sit.config.grid_size**2 != tokens.shape[1]:
            raise ValueError(
                f"the SiT has {sit.config.grid_size**2} tokens per image, the encoder {tokens.shape[1]}: "
                "choose an encoder, or its resolution, with the SiT's grid"
            )
        generator = torch.Generator().manual_seed(0)
        t = torch.rand(len(z), generator=generator).to(z)
        z_t, _ = interpolate(sit.normalize(z), torch.randn(z.shape, generator=generator).to(z), t, path)
        size, wide = max(1, 8192 // tokens.shape[1]), widest_float(z.device)  # images at a time
        parts = list(zip(*(values.split(size) for values in (z_t, t, labels, tokens)), strict=True))
        penalty = torch.eye(sit.config.width + 1, dtype=wide, device=z.device) * PENALTY
        penalty[-1, -1] = 0  # the offset is free
        grams, sums = [penalty.clone() for _ in sit.blocks], [0] * len(sit.blocks)
        for *given, target in bar(parts, len(parts), "fitting linear maps") if len(parts) > 1 else parts:
            for k, h in enumerate(features(sit, *given)[0]):
                h = _with_one(h.to(wide)).flatten(0, 1)
                grams[k] += h.mT @ h
                sums[k] = sums[k] + h.mT @ target.to(wide).flatten(0, 1)
        weights = [torch.linalg.solve(gram, each).to(z) for gram, each in zip(grams, sums, strict=True)]
        return cls([lambda h, w=weight: _with_one(h) @ w for weight in weights])


def _with_one(h: Tensor) -> Tensor:
    return torch.nn.functional.pad(h, (0, 1), value=1.0)


def ready_pair(pair: Pair, device: torch.device) -> tuple[SiT, AutoencoderKL]:
    """Both networks of a pair, to look at."""
    return ready(pair[0], load_sit, device), ready(pair[1], load_vae, device)


def clean(v: Tensor, z_t: Tensor, t: Tensor, path: Interpolant) -> Tensor:
    """The z (B, C, h, w) that solves z_t = alpha z + sigma eps and v = alpha' z + sigma' eps."""
    t = expand_time(t, z_t)
    determinant = path.alpha(t) * path.d_sigma(t) - path.sigma(t) * path.d_alpha(t)
    return (path.d_sigma(t) * z_t - path.sigma(t) * v) / determinant


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
        return torch.cat([encoder(part) for part in images.split(BATCH)]).float()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Along the last axis."""
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)
