"""What explorers look at: images with labels, networks from any source, and where they run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repae_lite.checkpoints.models import load_sit, load_vae
from repae_lite.data.datasets import load_embedded
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.devices import choose_device
from repae_lite.utils.pixels import to_unit_range

Source = str | Path  # as load_vae and load_sit take it
SHOWN = 40


@dataclass
class Material:
    """Images to look at.

    Attributes:
        images: uint8 (B, 3, H, W).
        labels: their classes (B,).
        device: where networks run; None for the best there is.
    """

    images: Tensor
    labels: Tensor
    device: torch.device

    @classmethod
    def of(
        cls, images: Tensor | None = None, labels: Tensor | None = None, device: str | None = None
    ) -> "Material":
        """The given images; for None, the first of the embedded evaluation split.

        Raises:
            ValueError: images are not uint8 (B, 3, H, W), or labels do not belong to them.
        """
        if images is None:
            images, labels = (values[:SHOWN] for values in load_embedded("eval"))
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
            raise ValueError(
                f"images have shape {tuple(images.shape)} and dtype {images.dtype}: give uint8 (B, 3, H, W)"
            )
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        if len(labels) != len(images):
            raise ValueError(f"{len(labels)} labels for {len(images)} images: give one for each")
        device = torch.device(choose_device(device))
        return cls(images.to(device), labels.to(device), device)

    @property
    def x(self) -> Tensor:
        """The images as networks take them, (B, 3, H, W) in [-1, 1]."""
        return to_unit_range(self.images)

    def vae(self, source: Source | AutoencoderKL) -> AutoencoderKL:
        """A VAE, frozen and in eval mode, on the device."""
        vae = source if isinstance(source, AutoencoderKL) else load_vae(source)
        return vae.to(self.device).eval().requires_grad_(False)

    def sit(self, source: Source | SiT) -> SiT:
        """A SiT, frozen and in eval mode, on the device."""
        sit = source if isinstance(source, SiT) else load_sit(source)
        return sit.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def latents(self, vae: AutoencoderKL, images: Tensor | None = None) -> Tensor:
        """Posterior means (B, C, h, w) of the images, or of others (B, 3, H, W) in [-1, 1]."""
        images = self.x if images is None else images
        return torch.cat([vae.encode(x).mode() for x in images.split(32)])
