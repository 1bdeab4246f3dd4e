"""Numbers of generated images, with the protocol inside: `repae evaluate`.

Fréchet distance (FID with Inception's pooled features), spatial Fréchet distance (sFID), Inception Score,
precision and recall in the definitions of ADM's evaluator, the kernel distance (KID), and on request the
Fréchet distance of DINOv2's features (FD-DINOv2).
"""

import hashlib
import logging
import zipfile
from collections.abc import Container
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
WIDTHS = {"pooled": 2048, "spatial": 2023}  # of Inception's features in ADM's reference file
DEPENDENT = (
    "FD-DINOv2 is no independent judge here: the SiT was aligned with {teacher}, a network of its family"
)
KINDS = {"frechet": "pooled", "spatial_frechet": "spatial", DINO: "dinov2"}  # of features, by distance
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


def load_reference(
    source: str | Path,
    judge: nn.Module,
    *,
    protocol: Protocol | None = None,
    side: int | None = None,
    **options,
) -> Reference:
    """The reference: ADM's .npz (mu, sigma, mu_s, sigma_s and perhaps arr_0), or images as .npz or folder.

    ADM's statistics are of the whole training set and of Inception; its arr_0 holds 10,000 images, for what
    compares images with images, and for FD-DINOv2.

    Args:
        source: the file or folder.
        judge: whose features are compared.
        protocol: what will be measured, so that a reference without it is refused before images are judged.
        side: of the samples' images, pixels; likewise.
        options: of `features_of`.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not such a file; statistics of another judge; a
            reference that does not suit protocol or samples.
    """
    path = Path(source)
    stats = _adm_stats(path) if path.suffix == ".npz" and path.is_file() else {}
    if not stats:
        stream = ImageStream(path)
        _check_suits(protocol, side, stream.side, images=stream.count)
        images = features_of(stream, judge, label="reference", **options)
        kinds = ("pooled", "spatial", "dinov2")
        stats = {kind: streamed_stats(images.values[kind]) for kind in kinds if kind in images.values}
        return Reference(
            stats, images.values["pooled"], images.content, images.side, len(images), images.contrast
        )
    width = len(stats["pooled"].mean)
    if not judge.name.startswith("inception") or width != WIDTHS["pooled"]:
        raise ValueError(
            f"{path} holds statistics of {width} Inception features, but the judge is {judge.name}: give "
            "images as the reference"
        )
    if "spatial" in stats and len(stats["spatial"].mean) != WIDTHS["spatial"]:
        raise ValueError(
            f"mu_s in {path} is of {len(stats['spatial'].mean)} features, and Inception has "
            f"{WIDTHS['spatial']} spatial ones: get ADM's file again"
        )
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 24):
            content.update(data)
    with zipfile.ZipFile(path) as archive:
        stream = ImageStream(path) if "arr_0.npy" in archive.namelist() else None
    kinds, count = {"dinov2", *stats}, stream.count if stream else 0  # DINOv2 sees the images
    _check_suits(protocol, side, stream and stream.side, images=count, kinds=kinds)
    if stream is None:
        return Reference(stats, None, content.hexdigest(), None, 0, None, of_training_set=True)
    images = features_of(stream, judge, label="reference", **options)
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
            found = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s") if name in file}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole .npz ({error}): get it again") from None
    stats = {}
    for kind, names in (("pooled", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
        if names[0] in found:
            wrong, arrays = "is missing", [found.get(name) for name in names]
            if arrays[1] is None or (wrong := _wrong_with(*arrays)):
                raise ValueError(f"{names[1]} beside {names[0]} in {path} {wrong}: get ADM's file again")
            # The file does not say how many images; the count is only checked to be at least two.
            tensors = (torch.from_numpy(np.array(x, dtype=np.float64)) for x in arrays)
            stats[kind] = FeatureStats(*tensors, count=len(arrays[0]) + 1)
    return stats


def _wrong_with(mean: np.ndarray, cov: np.ndarray) -> str | None:
    """Why two arrays are no mean and covariance."""
    if {mean.dtype.kind, cov.dtype.kind} - set("fiu") or mean.ndim != 1 or cov.shape != 2 * mean.shape:
        return f"makes no statistics ({cov.dtype} {cov.shape} and {mean.dtype} {mean.shape})"
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        return "makes no statistics (NaN or infinity)"
    cov = cov.astype(np.float64)
    slack = 1e-6 * np.trace(cov) + 1e-12  # of rounding, in a file of float32 too
    if not np.allclose(cov, cov.T, rtol=1e-4, atol=abs(slack)):
        return "is no covariance (not symmetric)"
    shifted = torch.from_numpy(cov + slack * np.eye(len(cov)))
    return "is no covariance (negative eigenvalues)" if torch.linalg.cholesky_ex(shifted).info else None


def _check_suits(
    protocol: Protocol | None,
    wanted: int | None,
    side: int | None,
    *,
    images: int,
    kinds: Container[str] | None = None,
) -> None:
    """Refuses a reference of another size than the samples', or without what the protocol's metrics need.

    Args:
        protocol: None allows all.
        wanted: the samples' size, pixels; None allows all, as does None for ...
        side: ... the reference's.
        images: number of images in it.
        kinds: of features that it has statistics of; None if that is the judge's affair.
    """
    if None not in (wanted, side) and wanted != side:
        raise ValueError(
            f"the samples have {wanted} pixels and the reference has {side}: give the reference of that "
            "resolution"
        )
    metrics = set(protocol.metrics) if protocol else set()
    comparing = sorted(metrics & {"precision", "recall", "kernel_distance", DINO})
    if comparing and not images:
        raise ValueError(
            f"{', '.join(comparing)} need images in the reference (arr_0), and it has statistics only"
        )
    if {"precision", "recall"} & metrics and images <= protocol.neighbours:
        raise ValueError(
            f"the reference has {images} images: precision and recall need more than {protocol.neighbours}"
        )
    for metric, kind in KINDS.items():
        if metric in metrics and kinds is not None and kind not in kinds:
            raise ValueError(f"{metric} needs {kind} features, which samples or reference do not have")


def check_samples(count: int, protocol: Protocol) -> None:
    """Refuses another number of samples than the protocol's.

    Raises:
        ValueError: both numbers.
    """
    if count != protocol.count:
        raise ValueError(
            f"there are {count} samples and the protocol has {protocol.count}: distances of other numbers "
            "cannot be compared, so draw that many"
        )


def contrast_note(samples: Features, reference: Reference) -> str | None:
    """A sentence on samples whose pixels vary far too little or too much; None for all others."""
    if not reference.contrast or CONTRAST[0] <= samples.contrast / reference.contrast <= CONTRAST[1]:
        return None
    return (
        f"the samples' pixels vary by {samples.contrast:.1f} grey levels and the reference's by "
        f"{reference.contrast:.1f}: were the latents brought back to the VAE's scale before decoding?"
    )


def evaluate(samples: Features, reference: Reference, protocol: Protocol) -> dict[str, float]:
    """The protocol's metrics.

    Raises:
        ValueError: another number of samples or size than asked for, or a reference without what a metric
            needs.
    """
    check_samples(len(samples), protocol)
    values, wanted, found = samples.values, protocol.metrics, {}
    images = 0 if reference.features is None else len(reference.features)
    kinds = values.keys() & reference.stats.keys()
    _check_suits(protocol, samples.side, reference.side, images=images, kinds=kinds)
    if protocol.reference and not reference.content.startswith(protocol.reference):
        raise ValueError(
            f"the reference has the hash {reference.content[:16]} and the protocol wants "
            f"{protocol.reference}: give that file"
        )
    if note := contrast_note(samples, reference):
        logger.warning(note)
    for metric, kind in KINDS.items():
        if metric in wanted:
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

    Attributes:
        record: of the protocol, see `record_of`.

    Raises:
        FileNotFoundError, ValueError: see `load_judges` and `load_reference`.
    """

    def __init__(self, protocol: Protocol, reference: str | Path | None, device: torch.device):
        if reference is None and protocol.judge != "tiny":
            raise ValueError("this protocol needs a reference: give --eval-reference FILE")
        self.protocol, self.device, self.judge = protocol, device, load_judges(protocol)
        source = reference or data_small_dir() / "eval" / "images.h5"
        self.reference = load_reference(source, self.judge, protocol=protocol, device=device)
        self.record = record_of(protocol, self.reference, self.judge)

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


def record_of(protocol: Protocol, reference: Reference, judge: nn.Module) -> dict:
    """The protocol as JSON values with its hash, and with what is known now that it is carried out."""
    found = {"reference": reference.content[:16], "reference_images": reference.images}
    if isinstance(judge, JudgeWithDino):
        found |= {
            "dinov2": judge.dino.name,
            "dinov2_weights": vae_fingerprint(judge.dino)[:16],
            "dinov2_reference_images": reference.stats["dinov2"].count,
        }
        judge = judge.judge
    return protocol.record(judge_weights=vae_fingerprint(judge)[:16], **found)


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
    dependent = DINO in metrics and "dinov2" in (teacher or "")
    notes = [DEPENDENT.format(teacher=teacher) if dependent else None, contrast_note(samples, reference)]
    content = {
        "metrics": metrics,
        "protocol": {"name": name} | record_of(protocol, reference, judge),
        **({"note": "; ".join(filter(None, notes))} if any(notes) else {}),
        "reference_kind": "training set" if reference.of_training_set else "images",
        "samples": {"content": samples.content[:16], "side": samples.side, "manifest": manifest},
    }
    return result(content)
