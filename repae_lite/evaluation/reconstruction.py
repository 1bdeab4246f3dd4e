"""What a VAE keeps of images: rFID, PSNR, SSIM and LPIPS of its reconstructions.

The command is `repae reconstruct`. The reference is the originals themselves: against statistics of a
training set, the Fréchet distance of the very same reconstructions comes out as 1.8 where 0.57 is right.
Networks always see `CHUNK` images at once, and means are in float64. Where both follow a batch size that
users choose, rFID follows it too: users of another project saw 1.88 to 3.96.
"""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from repae_lite.data.datasets import CroppedDataset, ImageH5Dataset, open_dataset, read_batches
from repae_lite.data.latents import vae_fingerprint
from repae_lite.evaluation.metrics import StreamingStats, frechet_distance, latent_structure, psnr, ssim
from repae_lite.evaluation.protocols import hash_of
from repae_lite.evaluation.results import result
from repae_lite.method.losses import LPIPSLoss, TinyPerceptualLoss
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.pixels import ROUNDINGS, to_uint8, to_unit_range
from repae_lite.utils.progress import progress_bar
from repae_lite.utils.seeding import generator

logger = logging.getLogger(__name__)
CHUNK = 16  # images in the networks at once; a constant, so that no number depends on a setting
SHOWN = 8  # images of a picture
LATENTS = 1000  # latents that are kept
OF_LATENTS = ("spatial_variance", "total_variation")  # measured as in Table 10, see `latent_structure`
POSTERIORS = ("mode", "sample")
PERCEPTUAL = {  # by judge: the metric's name, and what it is
    "inception": ("lpips", "VGG-16 with the linear weights of lpips, images in [-1, 1]"),
    "inception-random": ("lpips_random", "VGG-16 of random weights with the linear weights of lpips"),
    "tiny": ("tiny_perceptual", "the embedded scale's stand-in for LPIPS"),
}


@dataclass(frozen=True, kw_only=True)
class Reconstructing:
    """How images are reconstructed and judged.

    Attributes:
        judge: "inception" with LPIPS; "tiny" with the embedded scale's networks; or "inception-random", the
            former with random weights, for tests.
        posterior: "mode" decodes the posterior's mean, "sample" a draw from it.
        seed: of the draws, one generator per image.
        to_uint8: what becomes of fractions of a grey level, "round" or "truncate". Everything is measured
            after that, so that numbers are those of the images as saved.

    Raises:
        ValueError: another value.
    """

    judge: str = "inception"
    posterior: str = "mode"
    seed: int = 0
    to_uint8: str = "round"

    def __post_init__(self):
        known = {"judge": tuple(PERCEPTUAL), "posterior": POSTERIORS, "to_uint8": ROUNDINGS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(values)}")


@dataclass(frozen=True)
class Reconstruction:
    """What came of it.

    Attributes:
        metrics: "reconstruction_frechet" (rFID if the judge is Inception), "reconstruction_spatial_frechet"
            where the judge has spatial features, "psnr" (dB), "ssim", and a perceptual distance under the
            name in `PERCEPTUAL`; the last three are means over images.
        unchanged: images that came back to the bit; PSNR, infinite there, is the mean over the others.
        content: SHA-256 of the originals' pixels (N, H, W, 3), in order.
        count: images.
        side: of an image, pixels.
        pairs: the first originals and their reconstructions, uint8 (2, n, 3, H, W).
        latents: of the first `LATENTS` images, as they were decoded (n, C, h, w).
    """

    metrics: dict[str, float]
    unchanged: int
    content: str
    count: int
    side: int
    pairs: Tensor
    latents: Tensor


def load_perceptual(judge: str) -> nn.Module:
    """The perceptual distance that goes with a judge, see `PERCEPTUAL`.

    Raises:
        ConnectionError: the trunk of LPIPS is neither in torch's cache nor can it be downloaded.
    """
    if judge == "tiny":
        return TinyPerceptualLoss.pretrained().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return LPIPSLoss(pretrained_trunk=judge == "inception")
        except OSError as error:
            raise ConnectionError(
                f"cannot download the VGG-16 network of LPIPS ({error}): connect once, or put "
                "https://download.pytorch.org/models/vgg16-397923af.pth into "
                f"{Path(torch.hub.get_dir()) / 'checkpoints'}"
            ) from None


def open_originals(source: str | Path, resolution: int | None = None) -> ImageH5Dataset | CroppedDataset:
    """The images to reconstruct, see `open_dataset`.

    Raises:
        FileNotFoundError, ValueError: see there; ValueError too for an .npz, as evaluators have them for
            references.
    """
    if Path(source).suffix == ".npz":
        raise ValueError(
            f"{source} is an .npz: reconstructions are compared with their originals and not with statistics "
            "of a training set (rFID would be 1.8 where 0.57 is right), so give the images, a folder or an "
            "images.h5"
        )
    return open_dataset(source, resolution)


def image_chunks(dataset: Dataset, *, batch: int = 128, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order, `CHUNK` at once, the last time perhaps fewer.

    Args:
        dataset: items (uint8 (3, H, W), label).
        batch: images that are read at once; what comes out does not depend on it.
        workers: processes that read.

    Yields:
        Images (B, 3, S, S) uint8 and labels (B,).

    Raises:
        ValueError: images of several sizes, or not square.
    """
    loader = DataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=_stack)
    images, labels, shape = torch.empty(0), torch.empty(0, dtype=torch.long), None
    with closing(read_batches(loader)) as batches:
        for more, their_labels in batches:
            shape = more.shape[1:] if shape is None else shape
            if more.shape[1:] != shape:
                raise _several_sizes(shape, more.shape[1:])
            images = torch.cat([images, more]) if len(images) else more
            labels = torch.cat([labels, their_labels])
            while len(images) >= CHUNK:
                yield images[:CHUNK], labels[:CHUNK]
                images, labels = images[CHUNK:], labels[CHUNK:]
    if len(images):
        yield images, labels


def _stack(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*items, strict=True)
    for image in images:
        if image.shape != images[0].shape:
            raise _several_sizes(images[0].shape, image.shape)
    if images[0].shape[1] != images[0].shape[2]:
        height, width = images[0].shape[1:]
        raise ValueError(f"the images are {height} × {width}: they must be square, so preprocess them")
    return torch.stack(images), torch.tensor(labels)


def _several_sizes(one: torch.Size, other: torch.Size) -> ValueError:
    sizes = " and ".join(f"{height} × {width}" for _, height, width in (one, other))
    return ValueError(f"the images have several sizes, {sizes}: bring all to one, by repae preprocess")


@torch.no_grad()
def reconstruct(
    vae: AutoencoderKL,
    dataset: Dataset,
    judge: nn.Module,
    perceptual: nn.Module,
    settings: Reconstructing,
    *,
    limit: int | None = None,
    batch: int = 128,
    workers: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> Reconstruction:
    """Reconstructs images and measures what was lost.

    Float32, without TF32. Memory: features are summed up on the way, so it does not grow with the images.

    Args:
        vae: moved to the device and put into eval mode, as are judge and perceptual distance.
        dataset: items (uint8 (3, S, S), label), see `open_originals`.
        judge: of `settings.judge`, see `repae_lite.evaluation.features.load_judge`.
        perceptual: see `load_perceptual`.
        settings: the settings.
        limit: only the first so many images. (Where images are sorted by class, these are few classes.)
        batch: images that are read at once; no number depends on it.
        workers: processes that read.
        device: that computes.
        progress: show a bar.

    Raises:
        ValueError: fewer than two images, of several sizes, not square, or of a size that VAE or judge do not
            take; latents or reconstructions that are not finite.
    """
    if batch < 1 or workers < 0:
        raise ValueError(f"{batch} images a batch, {workers} workers: give at least 1, and at least 0")
    count = len(dataset) if limit is None else limit
    if not 2 <= count <= len(dataset):
        raise ValueError(
            f"{count} images of {len(dataset)} are asked for: statistics need at least 2, and no more than "
            "there are"
        )
    vae, judge, perceptual = (network.to(device).eval() for network in (vae, judge, perceptual))
    exact = "cpu" if str(device).startswith("mps") else device  # has float64
    digest, pairs, latents = hashlib.sha256(), [], []
    per_image: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], PERCEPTUAL[settings.judge][0]: []}
    stats: dict[tuple[str, str], StreamingStats] = {}
    done = 0
    float32 = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    chunks = image_chunks(Subset(dataset, range(count)), batch=batch, workers=workers)
    with float32, closing(chunks), progress_bar(count, 0, show=progress) as bar:
        for images, _ in chunks:
            side = images.shape[-1]
            if judge.side not in (None, side):
                raise ValueError(
                    f"the images have {side} pixels, but {judge.name} judges {judge.side}: choose another "
                    "judge"
                )
            digest.update(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            x = images.to(device)
            z, y = _through(vae, x, settings, done)
            for who, pixels in (("original", x), ("reconstruction", y)):
                for kind, features in judge(pixels).items():
                    if kind == "probabilities":
                        continue
                    if (kind, who) not in stats:
                        stats[kind, who] = StreamingStats(features.cpu())
                    stats[kind, who].add(features.cpu())
            # SSIM is that of pixels from 0: in [-1, 1], where means cancel, it would be another number.
            a, b = (pixels.to(exact).double() / 127.5 for pixels in (x, y))
            distance = perceptual(to_unit_range(x), to_unit_range(y)).cpu().double()
            for values, found in zip(per_image.values(), (psnr(a, b), ssim(a, b), distance), strict=True):
                values.append(found.cpu())
            if done < SHOWN:
                pairs.append(torch.stack([images, y.cpu()])[:, : SHOWN - done])
            if done < LATENTS:
                latents.append(z[: LATENTS - done].cpu())
            done += len(images)
            bar.update(len(images))
    metrics = {}
    for kind, name in (("pooled", "frechet"), ("spatial", "spatial_frechet")):
        if (kind, "original") in stats:
            pair = (stats[kind, who].result() for who in ("original", "reconstruction"))
            metrics[f"reconstruction_{name}"] = frechet_distance(*pair)
    found = {name: torch.cat(values) for name, values in per_image.items()}
    changed = found["psnr"].isfinite()
    unchanged = count - int(changed.sum())
    if unchanged:
        logger.warning(f"{unchanged} images came back to the bit: their PSNR, infinite, is not in the mean")
    if unchanged < count:
        found["psnr"] = found["psnr"][changed]
    metrics |= {name: values.mean().item() for name, values in found.items()}
    shown = torch.cat(pairs, dim=1)
    return Reconstruction(metrics, unchanged, digest.hexdigest(), count, side, shown, torch.cat(latents))


def _through(vae: AutoencoderKL, x: Tensor, settings: Reconstructing, first: int) -> tuple[Tensor, Tensor]:
    """Latents and reconstructions, uint8, of images whose numbers start at `first`."""
    posterior = vae.encode(to_unit_range(x))
    if settings.posterior == "mode":
        z = posterior.mode()
    else:
        draws = [generator("posterior", settings.seed, first + i) for i in range(len(x))]
        eps = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in draws])
        z = posterior.sample(eps.to(x.device))
    x_hat = vae.decode(z)
    if not (z.isfinite().all() and x_hat.isfinite().all()):
        raise ValueError(
            f"latents or reconstructions of the images {first} to {first + len(x) - 1} are not finite: the "
            "VAE has diverged"
        )
    return z, to_uint8(x_hat, settings.to_uint8)


def result_of(
    found: Reconstruction,
    settings: Reconstructing,
    *,
    vae: AutoencoderKL,
    source: str,
    judge: nn.Module,
    perceptual: nn.Module,
) -> dict:
    """A result as JSON values, in the layout of `repae evaluate`: metrics, protocol with its hash, the VAE.

    The metrics are the reconstruction's and those of its latents in `OF_LATENTS`. Results of the same
    images, networks and settings have the same hash, whatever the VAE.

    Args:
        found: what came of it.
        settings: the settings.
        vae: that was measured.
        source: where it comes from.
        judge: whose weights are recorded by their hash, as those of ...
        perceptual: ... the perceptual distance.
    """
    structure = latent_structure(found.latents)
    metrics = found.metrics | {name: structure[name] for name in OF_LATENTS}
    record = asdict(settings) | {
        "kind": "reconstruction",
        "seed": settings.seed if settings.posterior == "sample" else None,
        "metrics": list(metrics),
        "judge_weights": vae_fingerprint(judge)[:16],
        "perceptual": PERCEPTUAL[settings.judge][1],
        "perceptual_weights": vae_fingerprint(perceptual)[:16],
        "reference": found.content[:16],
        "reference_images": found.count,
        "count": found.count,
        "side": found.side,
        "chunk": CHUNK,
        "precision": "float32 networks, float64 statistics and means",
    }
    content = {
        "metrics": metrics,
        "unchanged": found.unchanged,
        "protocol": {"name": f"reconstruction-{settings.judge}"} | record | {"hash": hash_of(record)},
        "vae": {"source": source, "weights": vae_fingerprint(vae)[:16]},
    }
    return result(content, "lpips")


def picture(pairs: Tensor, maps: Tensor) -> Tensor:
    """Originals above reconstructions above maps of their latents.

    Args:
        pairs: (2, n, 3, S, S) uint8.
        maps: (n, 3, h, w) uint8, enlarged to S.

    Returns:
        (3, 3 S, n S) uint8.
    """
    enlarged = F.interpolate(maps, size=pairs.shape[-2:], mode="nearest")
    return torch.cat([torch.cat(list(row), dim=2) for row in (*pairs, enlarged)], dim=1)
