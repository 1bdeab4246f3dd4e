"""What a training run reads: images, cached latents, or both at once."""

import hashlib
import json
import logging

import numpy as np
from torch.utils.data import Dataset

from repae_lite.data.image_lists import classes_without_images
from repae_lite.data.latents import same_images
from repae_lite.utils.processes import process_rank

logger = logging.getLogger(__name__)


class TrainingData(Dataset):
    """Images, cached latents or both; item i is a dict of "label" and what there is of "image" and "latent".

    With cached targets there are "target 0" … too, and images are not read where latents stand for them.

    Args:
        images: items (uint8 (3, H, W), label), or None.
        latents: items (mean and std of the posterior (2C, h, w), label), or None.

    Attributes:
        targets: items (float16 (N, D) of each encoder); None until they are set.
        num_classes: of the labels.
        no_classes: why the items have no classes; empty when they have.
        fingerprint: changes with names, labels, pixels (of three images) and the latents' VAE.

    Raises:
        ValueError: images and latents are not of the same list.
    """

    def __init__(self, images: Dataset | None, latents: Dataset | None):
        self.images, self.latents = images, latents
        self.targets: Dataset | None = None
        one = images if images is not None else latents
        both = images is not None and latents is not None
        if both and not np.array_equal(images.labels, latents.labels):
            raise ValueError(
                f"the cached latents ({len(latents)}) and the images ({len(images)}) differ in labels: cache "
                "those of these images"
            )
        pixels = getattr(latents, "pixels", None)
        if images is not None and not same_images(pixels, images):
            raise ValueError(
                "the cached latents are of other images than these, though their labels agree: cache those "
                "of these images"
            )
        self.num_classes, self.no_classes = one.num_classes, getattr(one, "no_classes", "")
        digest = hashlib.sha256(json.dumps([list(one.names), np.asarray(one.labels).tolist()]).encode())
        for i in (0, len(one) // 2, len(one) - 1) if images is not None else ():
            digest.update(images[i][0].numpy().tobytes())
        if latents is not None:
            digest.update(str(latents.fingerprint).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def require_classes(self) -> None:
        """For training that conditions on classes; says so when some of them have no images.

        Raises:
            ValueError: there are no classes.
        """
        if self.no_classes:
            raise ValueError(
                f"{self.no_classes}, and only train-vae, preprocess and cache-latents do without: "
                "put the images into one subfolder per class, or list their classes in a dataset.json (in "
                "shards, beside each image in a .cls)"
            )
        one = self.images if self.images is not None else self.latents
        empty = classes_without_images(one.labels, self.num_classes)
        if empty and process_rank() == 0:
            logger.warning(empty)

    def __len__(self) -> int:
        return len(self.images if self.images is not None else self.latents)

    def __getitem__(self, index: int) -> dict:
        item = {}
        if self.targets is not None:
            item |= {f"target {i}": tokens for i, tokens in enumerate(self.targets[index])}
        if self.images is not None and (self.latents is None or self.targets is None):
            item["image"], item["label"] = self.images[index]
        if self.latents is not None:
            item["latent"], item["label"] = self.latents[index]
        return item
