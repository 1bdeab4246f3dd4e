"""What images are judged by: networks that turn them into features, and features kept on disk.

`InceptionFeatures` is the Inception of ADM's evaluator, ported from TensorFlow by torch-fidelity (extra
`eval`), resizing included. `TinyFeatures` is the embedded scale's evaluation network. Neither is the teacher
of what it judges. `DinoFeatures`, for FD-DINOv2 beside them, is of the family of REPA's usual teacher.
"""

import hashlib
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from repae_lite.data.latents import vae_fingerprint
from repae_lite.data.samples import ImageStream
from repae_lite.evaluation.evaluation_net import EvaluationNet
from repae_lite.networks.encoder_table import IMAGENET, find_spec
from repae_lite.networks.encoders import build_network
from repae_lite.utils.files import atomic_path, data_small_dir
from repae_lite.utils.locks import writing
from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.pixels import to_unit_range
from repae_lite.utils.progress import progress_bar
from repae_lite.utils.state_dicts import fill_module, load_weights

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name in torch's cache
INCEPTION_SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
DINO_SOURCE = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
SPATIAL_CHANNELS = 7  # of mixed_6/conv, which sFID compares
BATCH = 64  # images at once; a constant, so that no number depends on a setting


class InceptionFeatures(nn.Module):
    """Inception-v3 as ADM's evaluator uses it: `pooled` (2048), `spatial` (2023), `probabilities` (1008).

    `spatial` is the first seven channels of mixed_6/conv, 17 × 17, flattened with the channel last.
    `probabilities` leave out the classifier's bias.

    Args:
        weights: torch-fidelity's file; None draws random weights from seed 0, for tests of the code alone.

    Raises:
        FileNotFoundError, ValueError: see `read_pickle` and `fill_module`.
        ValueError: torch-fidelity is not installed.
    """

    name, side, square = "inception-v3-tf", None, True

    def __init__(self, weights: Path | None):
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as port

        kind = port.FeatureExtractorInceptionV3
        # Its constructor would unpickle a file; here the weights are read without running code.
        with (
            torch.random.fork_rng(devices=[]),
            patch.object(port, "load_state_dict_from_url", return_value={}),
            patch.object(kind, "load_state_dict"),
        ):
            torch.manual_seed(0)
            self.network = kind("inception-v3-compat", ["2048", "logits_unbiased"])
        if weights is not None:
            fill_module(self.network, read_pickle(weights), weights)
        else:
            self.name = "inception-v3-random"
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).clone()

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W) uint8, each (B, D) float32."""
        pooled, logits = self.network(images)
        return {"pooled": pooled, "spatial": self._spatial, "probabilities": logits.softmax(dim=1)}


class TinyFeatures(nn.Module):
    """The embedded scale's evaluation network: `pooled` (128) and `probabilities` (10) of 32-pixel images."""

    name, side = "tiny-evaluator", 32

    def __init__(self):
        super().__init__()
        self.network = load_weights(data_small_dir() / "evaluator.safetensors", EvaluationNet())

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (B, 3, 32, 32) uint8, each (B, D) float32."""
        pooled = self.network.features(to_unit_range(images))
        return {"pooled": pooled, "probabilities": self.network.head(pooled).softmax(dim=1)}


class DinoFeatures(nn.Module):
    """The features of FD-DINOv2: `pooled` (1024), the class token of DINOv2 ViT-L/14 after its last norm.

    Not independent of a SiT that was aligned with a DINOv2, as REPA's and REPA-E's are: the evaluation
    network is then a relative of the teacher, and pleasing the one may please the other.

    Source: Stein et al. 2023 (arXiv 2306.04675) with the defaults of their code, layer6ai-labs/dgm-eval:
    images resized to 224 pixels by Pillow's bicubic filter, ImageNet's mean and standard deviation, and the
    position embedding resampled as Meta's code does (bicubic, not low-passed, by the factor 16.1 / 37). The
    network is timm's; its numbers with the published weights have not been compared with dgm-eval's.

    Args:
        weights: "pretrained" (timm downloads them once), a file in timm's layout or Meta's, or "random": a
            small network of random weights, for tests of the code alone.

    Raises:
        ConnectionError: the weights are neither cached nor can they be downloaded; where to get them.
        FileNotFoundError, ValueError, OSError: see `build_network`.
    """

    name, side, resolution = "dinov2-vit-l", None, 224

    def __init__(self, weights: str | Path = "pretrained"):
        super().__init__()
        arguments = {"dynamic_img_size": True}  # takes 224 pixels although it is built for 518
        if weights == "random":
            self.name, arguments = "dinov2-random", arguments | {"depth": 1, "init_values": 1.0}
        network = "dinov2-vit-s" if weights == "random" else self.name
        try:
            # 16 pixels to a token in the project's count: 592 are the 37 x 37 tokens of the weights.
            spec = replace(find_spec(network), timm_args=arguments)
            self.network = build_network(network, spec, 592, weights).vit
        except ConnectionError as error:
            raise ConnectionError(f"{error} (repae evaluate: --dinov2 FILE, as from {DINO_SOURCE})") from None
        grid = self.network.pos_embed.data[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")  # (1, D, 16, 16)
        tokens = torch.cat([self.network.pos_embed.data[:, :1], grid.flatten(2).mT], dim=1)
        self.network.pos_embed, self.network.patch_embed.grid_size = nn.Parameter(tokens), (16, 16)
        for name, values in IMAGENET.items():
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W) uint8, (B, D) float32."""
        x = resized_as_pillow(images, self.resolution) / 255
        return {"pooled": self.network.forward_features((x - self.mean) / self.std)[:, 0]}


def resized_as_pillow(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, H, W) uint8 by Pillow's bicubic filter, to whole grey levels after either direction.

    Returns:
        (B, 3, side, side) float32, 0 to 255; one level off in about one of 10³ values of white noise.
    """
    x = images.float()
    for size in ((x.shape[2], side), (side, side)):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x


class JudgeWithDino(nn.Module):
    """A judge with DINOv2 beside it, whose features are the kind `dinov2`.

    Args:
        judge: see `load_judge`; name and size of images are its.
        dino: the other network.
    """

    def __init__(self, judge: nn.Module, dino: DinoFeatures):
        super().__init__()
        self.judge, self.dino, self.name, self.side = judge, dino, judge.name, judge.side

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images (B, 3, H, W) uint8, each (B, D) float32."""
        return self.judge(images) | {"dinov2": self.dino(images)["pooled"]}


def load_judge(name: str, weights: str | Path | None = None) -> nn.Module:
    """A network that features come from, in eval mode.

    Args:
        name: "inception" (ADM's), "inception-random" (the same with random weights, for tests) or "tiny".
        weights: the file of "inception"; None looks in torch's cache.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: Inception's weights are not here; which file, from where, and where it goes.
        ValueError: torch-fidelity is not installed.
    """
    if name == "tiny":
        return TinyFeatures().eval()
    if name not in ("inception", "inception-random"):
        raise ValueError(f"unknown judge {name!r}: choose inception or tiny")
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("Inception's features need the package torch-fidelity: pip install torch-fidelity")
    if name == "inception-random":
        return InceptionFeatures(None).eval()
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE)
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights of Inception are not at {path}: get them once from {INCEPTION_SOURCE}, or name the "
            "file with --inception"
        )
    return InceptionFeatures(path).eval()


@dataclass(frozen=True)
class Features:
    """Features of a set of images.

    Attributes:
        values: by kind, each (N, D) float32.
        content: SHA-256 of the pixels, in their order.
        side: of the images, pixels.
        contrast: standard deviation of all pixel values.
    """

    values: dict[str, Tensor]
    content: str
    side: int
    contrast: float

    def __len__(self) -> int:
        return len(self.values["pooled"])


def features_of(
    images: ImageStream,
    judge: nn.Module,
    *,
    device: str = "cpu",
    cache: Path | None = None,
    progress: bool = False,
    label: str = "",
) -> Features:
    """Features of all images, in order, in batches of a fixed size.

    Args:
        images: of any size that the judge takes.
        judge: see `load_judge`; moved to the device.
        device: that computes.
        cache: a folder in which features are kept by the content of images and judge; None for none.
        progress: show a bar.
        label: for the bar.

    Raises:
        ValueError: images of a size that the judge does not take.
        OSError: the cache cannot be written.
    """
    if judge.side not in (None, images.side):
        raise ValueError(
            f"{images.path} holds images of {images.side} pixels, but {judge.name} judges {judge.side}: "
            "choose another protocol"
        )
    seen, path = _Content(), None
    if cache:  # the key must be known first
        for batch in images.batches(BATCH):
            seen.add(batch)
        path = cache / f"{seen.digest.hexdigest()[:32]}-{vae_fingerprint(judge)[:16]}.safetensors"
        if path.is_file():
            return Features(load_file(path), seen.digest.hexdigest(), images.side, seen.contrast())
    judge, values, done = judge.to(device), {}, 0
    with progress_bar(images.count, 0, show=progress) as bar:
        bar.set_description(label)
        for batch in images.batches(BATCH):
            if not cache:
                seen.add(batch)
            pixels = torch.from_numpy(np.array(batch)).permute(0, 3, 1, 2).contiguous()
            for kind, found in judge(pixels.to(device)).items():
                if kind not in values:  # all at once: joined at the end, they would be there twice
                    values[kind] = torch.empty(images.count, found.shape[1])
                values[kind][done : done + len(batch)] = found
            done += len(batch)
            bar.update(len(batch))
    if path:
        with writing(cache), atomic_path(path) as partial:
            save_file(values, partial)
    return Features(values, seen.digest.hexdigest(), images.side, seen.contrast())


class _Content:
    """SHA-256 of pixels that come batch by batch, and their standard deviation."""

    def __init__(self):
        self.digest, self.levels = hashlib.sha256(), np.zeros(256, dtype=np.int64)

    def add(self, batch: np.ndarray) -> None:
        self.digest.update(np.ascontiguousarray(batch).tobytes())
        self.levels += np.bincount(batch.ravel(), minlength=256)

    def contrast(self) -> float:
        grey, count = np.arange(256), int(self.levels.sum())
        mean = float(self.levels @ grey) / count
        return max(0.0, float(self.levels @ grey**2) / count - mean**2) ** 0.5
