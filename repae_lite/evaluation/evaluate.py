"""Numbers of generated images, with the protocol inside: `repae evaluate`.

Fréchet distance (FID with Inception's pooled features), spatial Fréchet distance (sFID), Inception Score,
precision and recall in the definitions of ADM's evaluator, the kernel distance (KID), and on request the
Fréchet distance of DINOv2's features (FD-DINOv2).
"""

import hashlib
import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from repae_lite.data.latents import vae_fingerprint
from repae_lite.data.samples import ImageStream
from repae_lite.evaluation.features import (
    BATCH,
    DinoFeatures,
    Features,
    JudgeWithDino,
    features_of,
    load_judge,
)
from repae_lite.evaluation.generate import draw_images
from repae_lite.evaluation.metrics import (
    FeatureStats,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    streamed_stats,
)
from repae_lite.evaluation.protocols import DINO, Protocol
from repae_lite.evaluation.results import result
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.processes import process_count, process_rank

logger = logging.getLogger(__name__)
DEPENDENT = (
    "FD-DINOv2 is no independent judge here: the SiT was aligned with {teacher}, a network of its family"
)
CONTRAST = (0.5, 2.0)  # std of the samples' pixels over the reference's: outside, something is wrong


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        stats: Gaussians by kind of feature, "pooled" and perhaps "spatial" and "dinov2".
        features: "pooled" of the images that precision, recall and kernel distance compare with; or None.
        content: SHA-256 of the file, or of the images.
        side: of the images, pixels; None where only statistics are there.
        images: number of images that `features` are of; 0 for none.
        contrast: standard deviation of their pixel values; None without images.
        of_training_set: `stats` are ADM's of a training set, not of `images`.
    """

    stats: dict[str, FeatureStats]
    features: Tensor | None
    content: str
    side: int | None
    images: int
    contrast: float | None
    of_training_set: bool = False


def load_judges(
    protocol: Protocol, *, inception: str | Path | None = None, dinov2: str | Path | None = None
) -> nn.Module:
    """The protocol's judge, with DINOv2 beside it if the protocol lists FD-DINOv2.

    Args:
        protocol: with the judge inception-random, DINOv2 is a stand-in of random weights too.
        inception: the file of Inception's weights, see `load_judge`.
        dinov2: that of DINOv2's, see `DinoFeatures`; None leaves the download to timm.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: see `load_judge` and `DinoFeatures`; ValueError too
            for weights of DINOv2 that the protocol does not use.
    """
    judge = load_judge(protocol.judge, inception)
    if DINO in protocol.metrics:
        usual = "random" if protocol.judge == "inception-random" else "pretrained"
        return JudgeWithDino(judge, DinoFeatures(dinov2 or usual)).eval()
    if dinov2 is not None:
        raise ValueError(
            f"--dinov2 is given, but {DINO} is not among the protocol's metrics: list it in a YAML file, or "
            "leave the flag out"
        )
    return judge


def load_reference(source: str | Path, judge: nn.Module, **options) -> Reference:
    """The reference: ADM's .npz (mu, sigma, mu_s, sigma_s and perhaps arr_0), or images as .npz or folder.

    ADM's statistics are of the whole training set and of Inception; its arr_0 holds 10,000 images, for what
    compares images with images, and for FD-DINOv2.

    Args:
        source: the file or folder.
        judge: whose features are compared.
        options: of `features_of`.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not such a file; statistics of another judge.
    """
    path = Path(source)
    stats = _adm_stats(path) if path.suffix == ".npz" and path.is_file() else {}
    if not stats:
        images = features_of(ImageStream(path), judge, label="reference", **options)
        kinds = ("pooled", "spatial", "dinov2")
        stats = {kind: streamed_stats(images.values[kind]) for kind in kinds if kind in images.values}
        return Reference(
            stats, images.values["pooled"], images.content, images.side, len(images), images.contrast
        )
    width = len(stats["pooled"].mean)
    if not judge.name.startswith("inception") or width != 2048:
        raise ValueError(
            f"{path} holds statistics of {width} Inception features, but the judge is {judge.name}: give "
            "images as the reference"
        )
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 24):
            content.update(data)
    with zipfile.ZipFile(path) as archive:
        has_images = "arr_0.npy" in archive.namelist()
    if not has_images:
        return Reference(stats, None, content.hexdigest(), None, 0, None, of_training_set=True)
    images = features_of(ImageStream(path), judge, label="reference", **options)
    if "dinov2" in images.values:
        stats["dinov2"] = streamed_stats(images.values["dinov2"])
    found = (images.values["pooled"], content.hexdigest(), images.side, len(images), images.contrast)
    return Reference(stats, *found, of_training_set=True)


def _adm_stats(path: Path) -> dict[str, FeatureStats]:
    """The Gaussians in an ADM reference file; none in a file of images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file:
                return {}
            names = {"pooled": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
            found = {kind: [file[n] for n in pair] for kind, pair in names.items() if pair[0] in file}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole .npz ({error}): get it again") from None
    stats = {}
    for kind, (mean, cov) in found.items():
        if mean.ndim != 1 or cov.shape != 2 * mean.shape or not np.isfinite(cov).all():
            raise ValueError(f"{path} holds no statistics: mean {mean.shape}, covariance {cov.shape}")
        # The file does not say how many images; the count is only checked to be at least two.
        tensors = (torch.from_numpy(np.array(x, dtype=np.float64)) for x in (mean, cov))
        stats[kind] = FeatureStats(*tensors, count=len(mean) + 1)
    return stats


def evaluate(samples: Features, reference: Reference, protocol: Protocol) -> dict[str, float]:
    """The protocol's metrics.

    Raises:
        ValueError: another number of samples or size than asked for, or a reference without what a metric
            needs.
    """
    if len(samples) != protocol.count:
        raise ValueError(
            f"there are {len(samples)} samples and the protocol has {protocol.count}: distances of other "
            "numbers cannot be compared, so draw that many"
        )
    if reference.side not in (None, samples.side):
        raise ValueError(
            f"the samples have {samples.side} pixels and the reference has {reference.side}: give the "
            "reference of that resolution"
        )
    if protocol.reference and not reference.content.startswith(protocol.reference):
        raise ValueError(
            f"the reference has the hash {reference.content[:16]} and the protocol wants "
            f"{protocol.reference}: give that file"
        )
    if reference.contrast and not CONTRAST[0] <= samples.contrast / reference.contrast <= CONTRAST[1]:
        logger.warning(
            f"the samples' pixels vary by {samples.contrast:.1f} grey levels and the reference's by "
            f"{reference.contrast:.1f}: were the latents brought back to the VAE's scale before decoding?"
        )
    values, wanted, found = samples.values, protocol.metrics, {}
    images = {"precision", "recall", "kernel_distance", DINO} & set(wanted)
    if images and reference.features is None:
        raise ValueError(
            f"{', '.join(sorted(images))} need images in the reference (arr_0), and it has statistics only"
        )
    for metric, kind in (("frechet", "pooled"), ("spatial_frechet", "spatial"), (DINO, "dinov2")):
        if metric in wanted:
            if kind not in values or kind not in reference.stats:
                raise ValueError(f"{metric} needs {kind} features, which samples or reference do not have")
            found[metric] = frechet_distance(streamed_stats(values[kind]), reference.stats[kind])
    if "inception_score" in wanted:
        found["inception_score"] = inception_score(values["probabilities"], chunk=protocol.chunk)
    if {"precision", "recall"} & set(wanted):
        found["precision"], found["recall"] = precision_recall(
            values["pooled"], reference.features, neighbours=protocol.neighbours
        )
    if "kernel_distance" in wanted:
        found["kernel_distance"] = kernel_distance(values["pooled"], reference.features)
    return {name: found[name] for name in wanted}


class RunJudge:
    """Judges a run while it trains: `--eval-every`.

    Args:
        protocol: how; its `count` is the number of samples.
        reference: see `load_reference`; None for the embedded evaluation images.
        device: that computes.

    Raises:
        FileNotFoundError, ValueError: see `load_judges` and `load_reference`.
    """

    def __init__(self, protocol: Protocol, reference: str | Path | None, device: torch.device):
        if reference is None and protocol.judge != "tiny":
            raise ValueError("this protocol needs a reference: give --eval-reference FILE")
        self.protocol, self.device, self.judge = protocol, device, load_judges(protocol)
        source = reference or data_small_dir() / "eval" / "images.h5"
        self.reference = load_reference(source, self.judge, device=device)

    def __call__(self, sit: SiT, vae: AutoencoderKL, *, seed: int, path_type: str) -> dict[str, float]:
        """The protocol's metrics of samples drawn now; torch.distributed's processes share the batches."""
        sampling, parts = self.protocol.sampling(seed, path_type), []
        labels = sampling.all_labels(sit.config.num_classes)
        starts = range(0, sampling.count, BATCH)[process_rank() :: process_count()]
        for start in starts:
            images = range(start, min(start + BATCH, sampling.count))
            (pixels,) = draw_images(sit, vae, sampling, images, labels[images.start : images.stop])
            found = self.judge(pixels.to(self.device))
            contrast = pixels.double().var().item()
            parts.append((start, {kind: values.float().cpu() for kind, values in found.items()}, contrast))
        parts = sorted(gather_object(parts), key=lambda part: part[0])
        values = {kind: torch.cat([part[1][kind] for part in parts]) for kind in parts[0][1]}
        contrast = (sum(part[2] for part in parts) / len(parts)) ** 0.5
        side = sit.config.input_size * vae.config.downsampling
        return evaluate(Features(values, "", side, contrast), self.reference, self.protocol)


def result_of(
    metrics: dict[str, float],
    protocol: Protocol,
    *,
    name: str,
    samples: Features,
    reference: Reference,
    judge: nn.Module,
    manifest: dict | None,
    teacher: str | None = None,
) -> dict:
    """A result as JSON values: metrics, the whole protocol with its hash, and where the images come from.

    Args:
        metrics: of `evaluate`, as are ...
        protocol: ... this, and ...
        samples: ... these, and ...
        reference: ... this.
        name: of the protocol.
        judge: see `load_judges`.
        manifest: how the samples were drawn; None for samples that do not say.
        teacher: the encoders that the SiT was aligned with, as --enc-type has them; None if nobody knows.
    """
    found = {"reference": reference.content[:16], "reference_images": reference.images}
    if isinstance(judge, JudgeWithDino):
        found |= {
            "dinov2": judge.dino.name,
            "dinov2_weights": vae_fingerprint(judge.dino)[:16],
            "dinov2_reference_images": reference.stats["dinov2"].count,
        }
        judge = judge.judge
    record = protocol.record(judge_weights=vae_fingerprint(judge)[:16], **found)
    dependent = DINO in metrics and "dinov2" in (teacher or "")
    content = {
        "metrics": metrics,
        "protocol": {"name": name} | record,
        **({"note": DEPENDENT.format(teacher=teacher)} if dependent else {}),
        "reference_kind": "training set" if reference.of_training_set else "images",
        "samples": {"content": samples.content[:16], "side": samples.side, "manifest": manifest},
    }
    return result(content)
