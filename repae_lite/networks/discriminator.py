"""PatchGAN discriminator: judges overlapping image patches instead of whole images.

Isola et al. 2017 (arXiv 1611.07004); REPA-E uses it, as the VAEs of latent diffusion do, for the adversarial
term of the VAE's loss. Taught in `notebooks/01_vae.ipynb`. State dicts are those of the released ones.
"""

from torch import Tensor, nn

from repae_lite.networks.layers import BatchNorm2d


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions with BatchNorm; every output logit sees a 70x70 patch (for three layers).

    Args:
        in_channels: image channels.
        width: channels after the first convolution; doubled by each following layer, at most 8-fold.
        layers: number of stride-2 convolutions.

    Attributes:
        smallest: height and width, in pixels, that images must have to give a logit.

    Raises:
        ValueError: one of these is less than 1.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3):
        super().__init__()
        if min(in_channels, width, layers) < 1:
            raise ValueError(
                f"in_channels {in_channels}, width {width} and layers {layers} must be at least 1"
            )
        self.in_channels, self.smallest = in_channels, 3 * 2**layers
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.main = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.apply(self._initialise)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to one logit per patch (B, 1, h, w); high means "looks real".

        Raises:
            ValueError: x has another shape, or is too small for a patch.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) < self.smallest:
            raise ValueError(
                f"images have shape {tuple(x.shape)}: this discriminator takes (B, {self.in_channels}, H, "
                f"W), H and W at least {self.smallest}"
            )
        return self.main(x)
