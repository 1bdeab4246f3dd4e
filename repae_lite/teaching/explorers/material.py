"""What explorers look at: images with labels, networks from any source, and where they run."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repae_lite.data.datasets import load_embedded
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.devices import choose_device
from repae_lite.utils.pixels import to_unit_range

Source = str | Path  # as load_vae and load_sit take it
SHOWN, BATCH = 40, 32


def ready(source: Source | nn.Module, load: Callable[..., nn.Module], device: torch.device) -> nn.Module:
    """A network to look at: float32, frozen, in eval mode, on the device.

    Args:
        source: what `load` takes, or a network, which is copied and stays as it is.
        load: `load_vae`, `load_sit` or `VisionEncoder.from_name`.
        device: where it will run.
    """
    network = load(source) if isinstance(source, str | Path) else copy.deepcopy(source)
    return network.float().to(device).eval().requires_grad_(False)


@dataclass
class Material:
    """Images to look at.

    Attributes:
        images: uint8 (B, 3, H, W).
        labels: their classes (B,); None where nobody said.
        device: where networks run.
    """

    images: Tensor
    labels: Tensor | None
    device: torch.device

    @classmethod
    def of(
        cls,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        device: str | None = None,
        count: int | None = None,
    ) -> "Material":
        """The given images, or the first of them; for None, of the embedded evaluation split.

        Raises:
            ValueError: images are not uint8 (B, 3, H, W), or labels do not belong to them.
        """
        if images is None and labels is not None:
            raise ValueError("there are labels but no images: give both, or neither")
        if images is None:
            images, labels = (values[:SHOWN] for values in load_embedded("eval"))
        images, labels = torch.as_tensor(images), None if labels is None else torch.as_tensor(labels)
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
            raise ValueError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}: give uint8 (B, 3, H, W)"
            )
        device = torch.device(choose_device(device))
        if labels is not None:
            if labels.shape != images.shape[:1] or labels.is_floating_point():
                raise ValueError(
                    f"labels {tuple(labels.shape)} of {labels.dtype} for {len(images)} images: give one "
                    "integer for each"
                )
            labels = labels[:count].long().to(device)
        return cls(images[:count].to(device), labels, device)

    def labels_for(self, sit: SiT) -> Tensor:
        """The labels (B,), or the null class where nobody said them.

        Raises:
            ValueError: they are none of the SiT's classes, or it has no null class.
        """
        if self.labels is None and not sit.config.label_dropout:
            raise ValueError("this SiT has no null class (label_dropout 0): give the labels of the images")
        if self.labels is None:
            return torch.full((len(self.images),), sit.null_class, device=self.device)
        sit.check_labels(self.labels)
        return self.labels

    @torch.no_grad()
    def latents(self, vae: AutoencoderKL) -> Tensor:
        """Posterior means (B, C, h, w)."""
        return torch.cat([vae.encode(to_unit_range(part)).mode() for part in self.images.split(BATCH)])
