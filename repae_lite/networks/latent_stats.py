"""Mean and standard deviation of a VAE's latents: what SiT normalises by, and what brings its samples back.

REPA-E section 3; taught in `notebooks/06_drop_in_vae.ipynb`.
"""

from dataclasses import dataclass

from torch import Tensor

from repae_lite.networks.layers import can_look_at


@dataclass(frozen=True, eq=False)
class LatentStats:
    """Mean and standard deviation of latents, per channel; both are copied.

    Attributes:
        mean: (C,) float32; given in any shape and dtype.
        std: (C,) float32, rounded so that it survives 1 / (1 / std): files hold 1 / std, and give it back to
            the bit.

    Raises:
        ValueError: not one mean and one standard deviation per channel.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self):
        mean, std = (stat.detach().float().flatten().clone() for stat in (self.mean, self.std))
        if len(mean) != len(std) or not len(mean):
            raise ValueError(
                f"latent statistics of {len(mean)} means and {len(std)} standard deviations: give one of "
                "each per channel"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", 1 / (1 / std))

    @classmethod
    def from_moments(cls, mean: Tensor, variance: Tensor) -> "LatentStats":
        """From the mean and the variance of latents, each with one number per channel."""
        return cls(mean, variance.sqrt())

    @classmethod
    def from_posteriors(cls, mean: Tensor, std: Tensor) -> "LatentStats":
        """Of latents drawn from posteriors of this mean and std, each (N, C, h, w).

        The variance of a draw is that of the means plus the mean of the variances.
        """
        dims = (0, 2, 3)
        return cls.from_moments(mean.mean(dims), mean.var(dims) + std.square().mean(dims))

    def check(self) -> "LatentStats":
        """Returns itself if it can be used: construction does not look at the numbers.

        Raises:
            ValueError: a mean that is not finite, or a standard deviation that is not positive and finite.
        """
        if not (self.mean.isfinite() & self.std.isfinite() & (self.std > 0)).all():
            raise ValueError(
                "latent statistics are not finite means and positive, finite standard deviations"
            )
        return self

    def normalize(self, z: Tensor) -> Tensor:
        """Latents (…, C, h, w) to mean 0 and standard deviation 1 per channel.

        Raises:
            ValueError: another number of channels, or a channel without spread.
        """
        self._check_channels(z)
        if can_look_at(self.std):
            self.check()
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalize(self, z: Tensor) -> Tensor:
        """Normalised latents (…, C, h, w) back to the VAE's scale.

        Raises:
            ValueError: another number of channels.
        """
        self._check_channels(z)
        return z * self.std[:, None, None] + self.mean[:, None, None]

    def _check_channels(self, z: Tensor) -> None:
        if z.ndim < 3 or z.shape[-3] != len(self.mean):
            raise ValueError(
                f"latents have shape {tuple(z.shape)} and the latent statistics {len(self.mean)} channels: "
                "use those of the VAE that made the latents"
            )
