"""The recipes of the paper and the embedded one: what each trains, and which released sets it starts from."""

from dataclasses import dataclass

IMAGENET = 1_281_167  # training images


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        command: of `repae`.
        vae: preset of the VAE. trains_vae: it is tuned, and so are a discriminator and their optimisers.
        model: preset of the SiT.
        encoder: name of the vision encoder to align with.
        sets: released sets that it starts from.
        resolution: of the images in pixels. images: how many there are.
        batch: of all processes together. steps: of the whole run.
    """

    command: str
    vae: str
    trains_vae: bool
    model: str
    encoder: str
    sets: tuple[str, ...] = ()
    resolution: int = 256
    images: int = IMAGENET
    batch: int = 256
    steps: int = 400_000


RECIPES = {
    "tiny": Recipe(
        "train-repae", "tiny", True, "tiny", "tiny", resolution=32, images=6000, batch=32, steps=400
    ),
    "repae-sdvae": Recipe("train-repae", "f8d4", True, "SiT-XL/2", "dinov2-vit-b", ("sdvae",)),
    "repae-invae": Recipe("train-repae", "f16d32", True, "SiT-XL/1", "dinov2-vit-b", ("invae",)),
    "repae-vavae": Recipe("train-repae", "f16d32", True, "SiT-XL/1", "dinov2-vit-b", ("vavae",)),
    "ldm-e2e-vavae": Recipe("train-ldm", "f16d32", False, "SiT-XL/1", "dinov2-vit-b", ("e2e-vavae",)),
}
