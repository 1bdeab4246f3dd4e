"""What a training run reads: images, cached latents, or both at once."""

import hashlib
import json

from torch.utils.data import Dataset


class TrainingData(Dataset):
    """Images, cached latents or both; item i is a dict of "label" and what there is of "image" and "latent".

    Args:
        images: items (uint8 (3, H, W), label), or None.
        latents: items (mean and std of the posterior (2C, h, w), label), or None.

    Attributes:
        num_classes: of the labels.
        fingerprint: changes with names, labels, pixels (of three images) and the latents' VAE.

    Raises:
        ValueError: images and latents are not of the same list.
    """

    def __init__(self, images: Dataset | None, latents: Dataset | None):
        self.images, self.latents = images, latents
        one = images if images is not None else latents
        if images is not None and latents is not None and list(images.labels) != list(latents.labels):
            raise ValueError(
                f"the cached latents ({len(latents)}) and the images ({len(images)}) differ in labels: cache "
                "those of these images"
            )
        self.num_classes = one.num_classes
        digest = hashlib.sha256(json.dumps([list(one.names), [int(label) for label in one.labels]]).encode())
        for i in (0, len(one) // 2, len(one) - 1) if images is not None else ():
            digest.update(images[i][0].numpy().tobytes())
        if latents is not None:
            digest.update(str(latents.fingerprint).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.images if self.images is not None else self.latents)

    def __getitem__(self, index: int) -> dict:
        item = {}
        if self.images is not None:
            item["image"], item["label"] = self.images[index]
        if self.latents is not None:
            item["latent"], item["label"] = self.latents[index]
        return item
