"""The evaluation network of the embedded scale; it takes the place that Inception has in FID.

Taught in `notebooks/00_map.ipynb`, where it is called the judge.
"""

from torch import Tensor, nn


class EvaluationNet(nn.Module):
    """A plain VGG-like classifier of 32x32 images whose features the Fréchet distance compares.

    Nothing may be trained with it. Its seed and architecture must differ from those of the teacher and of the
    perceptual network; otherwise a method could win by pleasing its judge.

    Attributes:
        width: Number of features per image.
    """

    width = 128

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(3, 24),
            nn.MaxPool2d(2),  # (B, 24, 16, 16)
            *_conv(24, 48),
            nn.MaxPool2d(2),  # (B, 48, 8, 8)
            *_conv(48, 96),
            *_conv(96, 128),
            nn.MaxPool2d(2),  # (B, 128, 4, 4)
            *_conv(128, self.width),
        )
        self.head = nn.Linear(self.width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Features before the classifier, averaged over positions.

        Args:
            x: Images (B, 3, 32, 32) in [-1, 1].

        Returns:
            (B, 128), non-negative.

        Raises:
            ValueError: The images have another shape.
            TypeError: The images are not float.
        """
        if x.ndim != 4 or x.shape[1:] != (3, 32, 32):
            raise ValueError(f"EvaluationNet needs images (B, 3, 32, 32), got {tuple(x.shape)}: resize them.")
        if not x.is_floating_point():
            raise TypeError(f"EvaluationNet needs float images in [-1, 1], got {x.dtype}: use x / 127.5 - 1.")
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (B, num_classes) of images (B, 3, 32, 32) in [-1, 1]."""
        return self.head(self.features(x))


def _conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
