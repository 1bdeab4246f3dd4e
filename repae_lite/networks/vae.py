"""The KL autoencoder that turns images into latents and back.

The convolutional VAE of latent diffusion (Rombach et al. 2022, arXiv 2112.10752) in the two sizes REPA-E
tunes, f8d4 (SD-VAE) and f16d32 (IN-VAE, VA-VAE), and a tiny one for two CPU cores. Taught in
`notebooks/01_vae.ipynb`. Module names follow the released checkpoints: state dicts load with `strict=True`.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repae_lite.networks.layers import check_sizes, full_precision, run


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an `AutoencoderKL`.

    Attributes:
        latent_channels: C of the latents.
        width: channels at full image resolution.
        multipliers: channels of each level, in widths; every level but the last halves the resolution.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        attention_levels: levels (0 = full resolution) whose blocks are followed by self-attention.
        groups: groups of the GroupNorm layers; must divide every level's channels.
        mid_attention: self-attention at the bottom.
        fold: blocks of fold x fold pixels are folded into channels before the network; 1 for none.
    """

    latent_channels: int = 4
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    groups: int = 32
    mid_attention: bool = True
    fold: int = 1

    def __post_init__(self):
        for name in ("multipliers", "attention_levels"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give a tuple, as in (1, 2)")
        check_sizes(self, "latent_channels", "width", "multipliers", "blocks", "groups", "fold")
        check_sizes(self, "attention_levels", least=0)
        levels = len(self.multipliers)
        if not levels or max(self.attention_levels, default=0) >= levels:
            raise ValueError(
                f"multipliers is {self.multipliers}, attention_levels {self.attention_levels}: give at least "
                "one level, and attention to none but these, which count from 0"
            )
        bad = [self.width * m for m in self.multipliers if (self.width * m) % self.groups]
        if bad:
            raise ValueError(
                f"groups={self.groups} does not divide {bad[0]} channels: choose a divisor of width "
                f"{self.width}"
            )

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel, along each side."""
        return self.fold * 2 ** (len(self.multipliers) - 1)


VAE_PRESETS = {
    "f8d4": VAEConfig(),
    "f16d32": VAEConfig(latent_channels=32, multipliers=(1, 1, 2, 2, 4), attention_levels=(4,)),
    "tiny": VAEConfig(width=32, multipliers=(1, 1), blocks=1, groups=8, mid_attention=False, fold=2),
}


class Posterior:
    """The diagonal Gaussian q(z | x) that the encoder predicts.

    Args:
        moments: mean and log-variance, stacked along channels (B, 2C, h, w); the log-variance is clamped to
            [-30, 20]. Half precision is raised to float32: the KL of a sharp posterior overflows float16.
    """

    def __init__(self, moments: Tensor):
        if moments.ndim != 4 or moments.shape[1] % 2:
            raise ValueError(
                f"moments have shape {tuple(moments.shape)}: give means and log-variances (B, 2C, h, w)"
            )
        self.mean, log_var = full_precision(moments).chunk(2, dim=1)
        self.log_var = log_var.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.log_var)

    def sample(self, eps: Tensor | None = None) -> Tensor:
        """Draws z = mean + std * eps, (B, C, h, w); gradients reach mean and std; eps fixes the draw."""
        if eps is None:
            eps = torch.randn_like(self.mean)
        elif eps.shape != self.mean.shape:
            raise ValueError(
                f"posterior noise has shape {tuple(eps.shape)}, the latents {tuple(self.mean.shape)}: draw "
                "it like them"
            )
        return self.mean + self.std * eps

    def mode(self) -> Tensor:
        """The mean, (B, C, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence to the standard normal, summed over the latent: (B,), in nats."""
        return 0.5 * (self.mean.square() + self.log_var.exp() - 1.0 - self.log_var).sum(dim=(1, 2, 3))


def swish(norm: nn.Module, h: Tensor) -> Tensor:
    """Of the normalised h, both of one shape."""
    return F.silu(norm(h))


class ResidualBlock(nn.Module):
    """Norm, swish, 3x3 convolution, twice, added to the input (a 1x1 convolution adapts its channels).

    Norms and swishes have a switch of their own for recomputation: it repeats no product, and under autocast,
    which has them in float32 and convolutions in half precision, they keep more than half of all.
    """

    gradient_checkpointing = False  # see repae_lite.networks.layers

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        shortcut = self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else h
        h = self.conv1(run(self, partial(swish, self.norm1), h))
        return shortcut + self.conv2(run(self, partial(swish, self.norm2), h))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, added to the input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        normed = self.norm(h)
        q, k, v = (conv(normed).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # (B, hw, C)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return h + self.proj_out(attended.transpose(1, 2).reshape(h.shape))


class Downsample(nn.Module):
    """Halves the resolution by a stride-2 convolution, padded right and bottom as the weights expect."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.pad(h, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution of encoder or decoder: residual blocks, each followed by attention if wanted."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, groups: int):
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.block = nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], groups) for i in range(blocks))
        self.attn = nn.ModuleList(
            AttentionBlock(out_channels, groups) for _ in range(blocks if attention else 0)
        )

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    """The bottom of encoder and decoder: residual block, attention, residual block."""

    def __init__(self, channels: int, attention: bool, groups: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) to moments (B, 2C, h, w)."""

    gradient_checkpointing = False  # see repae_lite.networks.layers

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.fold = nn.PixelUnshuffle(config.fold)
        self.conv_in = nn.Conv2d(3 * config.fold**2, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, after) in enumerate(zip([config.width, *widths], widths, strict=False)):
            level = Level(before, after, config.blocks, i in config.attention_levels, config.groups)
            if i < last:
                level.downsample = Downsample(after)
            self.down.append(level)
        self.mid = Middle(widths[-1], config.mid_attention, config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(self.fold(x))
        for level in self.down:
            h = run(self, level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(swish(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    """Latents (B, C, h, w) to images (B, 3, H, W)."""

    gradient_checkpointing = False  # see repae_lite.networks.layers

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.mid_attention, config.groups)
        self.up = nn.ModuleList()  # up[i] works at the resolution of down[i]; it is run from last to first
        for i, width in enumerate(widths):
            level = Level(
                widths[min(i + 1, last)],
                width,
                config.blocks + 1,
                i in config.attention_levels,
                config.groups,
            )
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(config.groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3 * config.fold**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(config.fold)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = run(self, level, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.unfold(self.conv_out(run(self, partial(swish, self.norm_out), h)))


class AutoencoderKL(nn.Module):
    """A variational autoencoder with a spatial latent, trained with a very small KL weight.

    Args:
        config: sizes; see `VAEConfig`, or use `AutoencoderKL.from_preset`.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @classmethod
    def from_preset(cls, name: str, **changes) -> "AutoencoderKL":
        """Builds a named size with fresh weights; keywords replace fields of its `VAEConfig`.

        Args:
            name: "f8d4", "f16d32" or "tiny".
            changes: fields of the configuration.

        Raises:
            ValueError: the name is not a preset.
        """
        if name not in VAE_PRESETS:
            raise ValueError(f"unknown VAE preset {name!r}: choose one of {', '.join(VAE_PRESETS)}")
        return cls(replace(VAE_PRESETS[name], **changes))

    def encode(self, x: Tensor) -> Posterior:
        """The posterior over latents (B, C, H / f, W / f) of images x (B, 3, H, W) in [-1, 1].

        The range is checked once per training step, by `repae_lite.method.steps.check_batch`, and not here.

        Raises:
            ValueError: x is not a float image batch in that layout, or its sides are not multiples of f.
        """
        f = self.config.downsampling
        if x.ndim != 4 or x.shape[1] != 3 or not x.numel():
            raise ValueError(f"images have shape {tuple(x.shape)}: give a batch (B, 3, H, W)")
        if not x.is_floating_point():
            raise ValueError(
                f"images have dtype {x.dtype}: convert uint8 pixels with repae_lite.to_unit_range first"
            )
        if x.dtype != self.quant_conv.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"images have dtype {x.dtype}, the VAE {self.quant_conv.weight.dtype}: convert one, as in "
                "x.float()"
            )
        if x.shape[2] % f or x.shape[3] % f:
            raise ValueError(
                f"image size {x.shape[2]}x{x.shape[3]} is not a multiple of {f}: resize or crop to one "
                "that is"
            )
        return Posterior(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Images (B, 3, h * f, w * f), about in [-1, 1], of latents z (B, C, h, w) on the VAE's own scale.

        Any float dtype of z is converted to the VAE's.

        Raises:
            ValueError: z does not have the VAE's number of channels, or is not float.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels or not z.numel():
            raise ValueError(
                f"latents have shape {tuple(z.shape)}: this VAE decodes (B, {self.config.latent_channels}, "
                "h, w)"
            )
        if not z.is_floating_point():
            raise ValueError(f"latents have dtype {z.dtype}: give floats, as `encode` does")
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))

    def forward(self, x: Tensor, eps_posterior: Tensor | None = None) -> tuple[Posterior, Tensor, Tensor]:
        """Encodes, samples and decodes; returns (posterior, z, x_hat)."""
        posterior = self.encode(x)
        z = posterior.sample(eps_posterior)
        return posterior, z, self.decode(z)
