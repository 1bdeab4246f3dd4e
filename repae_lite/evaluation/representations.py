"""What representations hold: SiT's features by layer and noise level, and the structure of latents.

REPA (arXiv 2410.06940) section 3 measures alignment by CKNNA and a linear probe; REPA-E, Table 10, the
structure of latents. Taught in `notebooks/00_map.ipynb` and `notebooks/04_stop_gradient.ipynb`.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from repae_lite.data.latents import vae_fingerprint
from repae_lite.evaluation.metrics import cknna, effective_dimensions, latent_structure, linear_probe
from repae_lite.evaluation.protocols import hash_of
from repae_lite.evaluation.reconstruction import CHUNK, image_chunks
from repae_lite.evaluation.results import result
from repae_lite.method.interpolant import Interpolant, interpolate
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.pixels import to_unit_range
from repae_lite.utils.progress import progress_bar
from repae_lite.utils.seeding import generator

MOST = 5000  # images of CKNNA: eight float64 matrices of this side are 1.6 GB

# ---------------------------------------------------------------- features


class Probed(NamedTuple):
    """Images as SiT and target encoder see them.

    Attributes:
        z: posterior means (N, C, h, w), on the VAE's scale.
        labels: classes (N,).
        target: the encoder's features, averaged over tokens (N, D).
        content: SHA-256 of the images' pixels (N, H, W, 3) and labels, in order.
    """

    z: Tensor
    labels: Tensor
    target: Tensor
    content: str


@torch.no_grad()
def probe_images(
    vae: AutoencoderKL, encoder: nn.Module, dataset: Dataset, indices: Sequence[int], device: str = "cpu"
) -> Probed:
    """What `representation_table` needs of some images of a dataset.

    Of all images only a latent and a vector are held: 16 kB and 3 kB of each with f8d4 and DINOv2-B.

    Args:
        vae: moved to the device.
        encoder: a `repae_lite.VisionEncoder` for images of this size; moved to the device.
        dataset: items (uint8 (3, S, S), label).
        indices: which of them; at least one.
        device: that computes.

    Raises:
        ValueError: no images, or of several sizes, or such as VAE or encoder do not take.
    """
    if not len(indices):
        raise ValueError("no images are given: name at least one")
    vae, encoder, parts, digest = vae.to(device), encoder.to(device), [], hashlib.sha256()
    for images, labels in image_chunks(Subset(dataset, indices)):
        digest.update(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes() + labels.numpy().tobytes())
        images = images.to(device)
        z = vae.encode(to_unit_range(images)).mode()
        parts.append((z.cpu(), labels, encoder(images).mean(dim=1).cpu()))
    return Probed(*(torch.cat(part) for part in zip(*parts, strict=True)), digest.hexdigest())


@torch.no_grad()
def sit_features(
    sit: SiT,
    z: Tensor,
    t: float,
    layers: Sequence[int],
    *,
    path: str | Interpolant = "linear",
    seed: int = 0,
    first: int = 0,
) -> dict[int, Tensor]:
    """Features of noised latents after some blocks, averaged over tokens.

    Every image has a noise of its own, the same at all times t. The label is the null class: SiT is told its
    label, and a probe of the class would read it back.

    Args:
        sit: its device is the one that computes.
        z: latents (N, C, h, w) on the VAE's scale; normalised by SiT's running statistics.
        t: noise level, 0 clean, 1 noise.
        layers: numbers of blocks, from 1; one pass serves all.
        path: that SiT was trained on.
        seed: of the noise.
        first: number of the first image, whose noise it chooses.

    Returns:
        (N, width) float32 by layer, on the CPU: 4 N width bytes each.

    Raises:
        ValueError: layers or latents that SiT does not have, times outside [0, 1].
    """
    if not 0 <= t <= 1:
        raise ValueError(f"the noise level is {t}: it lies between 0 (clean) and 1 (noise)")
    if not layers or not all(1 <= layer <= sit.config.depth for layer in layers):
        raise ValueError(f"layers are {list(layers)}: this SiT has blocks 1 to {sit.config.depth}")
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [
        sit.blocks[layer - 1].register_forward_hook(
            lambda module, inputs, h, kept=kept: kept.append(h.float().mean(dim=1).cpu())
        )
        for layer, kept in found.items()
    ]
    device = sit.pos_embed.device
    try:
        for at in range(0, len(z), CHUNK):
            part = z[at : at + CHUNK].to(device)
            labels = torch.full((len(part),), sit.null_class, device=device)
            sit.check_input(part, labels)
            draws = [generator("representation", seed, first + at + i) for i in range(len(part))]
            eps = torch.stack([torch.randn(z.shape[1:], generator=g) for g in draws]).to(device)
            times = torch.full((len(part),), float(t), device=device)
            z_t, _ = interpolate(sit.normalize(part, False), eps, times, path)
            sit.features(z_t, times, labels, max(layers))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(kept) for layer, kept in found.items()}


def representation_table(
    sit: SiT,
    train: Probed,
    test: Probed,
    *,
    noise_levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7),
    layers: Sequence[int] | None = None,
    path: str | Interpolant = "linear",
    k: int = 10,
    images: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, float]]:
    """CKNNA with the target encoder and a linear probe of the class, by layer and noise level.

    Memory: the features of one noise level, 4 (N_train + N_test) width bytes a layer, and CKNNA's matrices,
    64 bytes times `images` squared.

    Args:
        sit: in eval mode.
        train: images that the probe is fitted to.
        test: other images, which both numbers are of.
        noise_levels: times t.
        layers: numbers of blocks, from 1; None for all.
        path: that SiT was trained on.
        k: neighbours of CKNNA.
        images: CKNNA compares the first so many of `test`. Its values depend on this number and on k: compare
            only equal ones.
        seed: of the noise.
        progress: show a bar.

    Returns:
        One row per layer and noise level: "layer", "t", "cknna" and "linear_probe" (share of right answers).

    Raises:
        ValueError: see `sit_features`, `cknna` and `linear_probe`; too many images for CKNNA.
    """
    layers, rows = range(1, sit.config.depth + 1) if layers is None else layers, []
    images = min(images, len(test.z))
    if images > MOST:
        raise ValueError(f"CKNNA of {images} images takes too much memory: choose at most {MOST}")
    with progress_bar(len(noise_levels) * (len(train.z) + len(test.z)), 0, show=progress) as bar:
        for t in noise_levels:
            options = {"path": path, "seed": seed}
            fitted = sit_features(sit, train.z, t, layers, **options)
            bar.update(len(train.z))
            tested = sit_features(sit, test.z, t, layers, first=len(train.z), **options)
            bar.update(len(test.z))
            for layer in layers:
                features = tested[layer]
                aligned = cknna(features[:images], test.target[:images], k)
                accuracy = linear_probe(fitted[layer], train.labels, features, test.labels)
                rows.append({"layer": layer, "t": t, "cknna": aligned, "linear_probe": accuracy})
    return rows


def probe_result(
    rows: Sequence[dict[str, float]],
    train: Probed,
    test: Probed,
    *,
    encoder: VisionEncoder,
    run: dict,
    **settings: object,
) -> dict:
    """A result as JSON values, in the layout of `repae evaluate`.

    Its metrics are the largest of the table, each over all layers and noise levels.

    Args:
        rows: of `representation_table`, of ...
        train: ... these and ...
        test: ... these images.
        encoder: that `Probed.target` is of.
        run: where the SiT comes from.
        settings: of the table.
    """
    numbers = {f"largest_{name}": max(row[name] for row in rows) for name in ("cknna", "linear_probe")}
    record = settings | {
        "kind": "representations",
        "metrics": list(numbers),
        "layers": sorted({row["layer"] for row in rows}),
        "noise_levels": sorted({row["t"] for row in rows}),
        "encoder": encoder.name,
        "encoder_weights": vae_fingerprint(encoder)[:16],
        "reference": hashlib.sha256((train.content + test.content).encode()).hexdigest()[:16],
        "fitted_images": len(train.z),
        "tested_images": len(test.z),
        "label": "null class",
        "precision": "float32 networks, float64 measures",
    }
    protocol = {"name": "representations"} | record | {"hash": hash_of(record)}
    return result({"metrics": numbers, "protocol": protocol, "run": run, "table": list(rows)})


# ---------------------------------------------------------------- latents


def spectrum(z: Tensor) -> tuple[Tensor, Tensor]:
    """Power of latents by frequency, averaged over images, channels and directions.

    Normalised so that white noise of variance s^2 has the power s^2 at every frequency.

    Args:
        z: latents (B, C, h, w); h, w >= 2.

    Returns:
        Frequencies 0, 1/n, …, floor(n/2)/n in cycles per position, with n = min(h, w), and the power of the
        rings of width 1/n around them, both float64. Ring 0 is the mean's; corners beyond are left out.

    Raises:
        ValueError: another shape, or latents that are not finite.
    """
    _check_latents(z)
    power = torch.fft.fft2(z.detach().double(), norm="ortho").abs().square().mean(dim=(0, 1))  # (h, w)
    n = min(z.shape[-2:])
    f_y, f_x = (torch.fft.fftfreq(size, dtype=power.dtype, device=z.device) for size in z.shape[-2:])
    ring = (torch.hypot(f_y[:, None], f_x[None, :]) * n + 0.5).floor().long().flatten()
    sums = torch.zeros(int(ring.max()) + 1, dtype=power.dtype, device=z.device)
    counts = torch.bincount(ring, minlength=len(sums))
    sums = sums.index_add(0, ring, power.flatten())
    rings = n // 2 + 1
    return torch.arange(rings, dtype=power.dtype) / n, (sums / counts)[:rings].cpu()


def pca_maps(z: Tensor) -> Tensor:
    """Latents as colours: their first three principal components over all positions as red, green and blue.

    Each component runs from its smallest value in the batch (0) to its largest (255); its sign is the one
    that makes the largest weight positive. Pictures of one call can be compared, those of two cannot.

    Args:
        z: latents (B, C, h, w). Missing components of C < 3 channels stay 0.

    Returns:
        uint8 (B, 3, h, w).

    Raises:
        ValueError: another shape, or latents that are not finite.
    """
    _check_latents(z)
    rows = z.detach().double().permute(0, 2, 3, 1).flatten(0, 2)  # (B * h * w, C)
    rows = rows - rows.mean(dim=0)
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :3]  # largest eigenvalue first
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    maps = rows @ (axes * largest.sign())
    low, high = maps.amin(dim=0), maps.amax(dim=0)
    maps = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    maps = F.pad(maps, (0, 3 - maps.shape[1]))
    return (255 * maps).round().to(torch.uint8).view(len(z), *z.shape[-2:], 3).permute(0, 3, 1, 2)


def latent_report(z: Tensor) -> dict[str, float | list[float]]:
    """Everything measured of latents (B, C, h, w), as JSON values.

    Returns:
        Those of `latent_structure`, `effective_dimensions`, and of the `spectrum` "frequencies" and "power".

    Raises:
        ValueError: see there.
    """
    frequencies, power = spectrum(z)
    return latent_structure(z) | {
        "effective_dimensions": effective_dimensions(z),
        "frequencies": frequencies.tolist(),
        "power": power.tolist(),
    }


def _check_latents(z: Tensor) -> None:
    if z.ndim != 4 or min(z.shape[-2:]) < 2:
        raise ValueError(f"latents have shape {tuple(z.shape)}: give (B, C, h, w) with h and w at least 2")
    if not z.isfinite().all():
        raise ValueError("latents are not finite: the VAE has diverged")
