"""The embedded scale's evaluation network, in the place that Inception has in FID."""

from torch import Tensor, nn


class EvaluationNet(nn.Module):
    """The small scale's judge: a plain VGG-like classifier of 32x32 images, used by nothing that is trained.

    It takes the place that Inception has in FID. Its weights must come from another seed and another
    architecture than the teacher and the perceptual network; otherwise a method wins by pleasing its judge.
    """

    width = 128  # D of `features`

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
        """Penultimate features, averaged over positions.

        Args:
            x: Images (B, 3, 32, 32) in [-1, 1].

        Returns:
            (B, 128), non-negative.
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
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
