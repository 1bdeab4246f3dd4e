"""SiT, the scalable interpolant transformer, with REPA's alignment tap and REPA-E's BatchNorm in front.

Architecture of DiT (Peebles & Xie 2023) and SiT (arXiv 2401.08740); tap and projector of REPA (arXiv
2410.06940); latent BatchNorm of REPA-E section 3. Taught in `notebooks/02_latent_diffusion.ipynb` and
`notebooks/03_repa.ipynb`. Module names follow the released checkpoints: state dicts load with `strict=True`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.layers import BatchNorm2d, Linear, can_look_at, check_sizes, run
from repae_lite.networks.projectors import PROJECTORS


@dataclass(frozen=True)
class SiTConfig:
    """Sizes of a `SiT`.

    Attributes:
        in_channels: latent channels C.
        input_size: latent height and width.
        patch_size: latent pixels per token, along each side.
        width: token width.
        depth: number of blocks.
        heads: attention heads.
        num_classes: classes; one more row of the label table, the last, is the null class of guidance.
        label_dropout: share of training labels replaced by the null class.
        target_dims: widths of the vision encoders' tokens to align with; empty for a plain SiT.
        alignment_depth: the features after this many blocks are aligned.
        projector: "mlp", REPA's, or "conv", iREPA's (arXiv 2512.10794).
        projector_width: hidden width of the former.
        bn_momentum: weight of a new batch in the running latent statistics.
        fixed_latent_stats: normalise by the statistics set at the start, always, as latent diffusion did
            before REPA-E (its ablation "no BatchNorm").
        label_std: standard deviation of the initial label embeddings.
        train_pos_embed: train the sin-cos position embedding, as the official run does by accident (D2).
    """

    in_channels: int = 4
    input_size: int = 32
    patch_size: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    num_classes: int = 1000
    label_dropout: float = 0.1
    target_dims: tuple[int, ...] = (768,)
    alignment_depth: int = 8
    projector: str = "mlp"
    projector_width: int = 2048
    bn_momentum: float = 0.1
    fixed_latent_stats: bool = False
    label_std: float = 0.02
    train_pos_embed: bool = False

    def __post_init__(self):
        if not isinstance(self.target_dims, tuple):
            raise ValueError(
                f"target_dims is {self.target_dims!r}: give a tuple with one width per encoder, as in (768,)"
            )
        sizes = "in_channels input_size patch_size width depth heads num_classes projector_width target_dims"
        check_sizes(self, *sizes.split())
        check_sizes(self, "alignment_depth", least=0)
        if self.projector not in PROJECTORS:
            raise ValueError(f"projector is {self.projector!r}: choose one of {', '.join(PROJECTORS)}")
        if not 0 <= self.label_std < math.inf:
            raise ValueError(f"label_std is {self.label_std}: it must be 0 or more")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(
                f"label_dropout is {self.label_dropout}: it is a share, from 0 up to (not including) 1"
            )
        if not 0 <= self.bn_momentum <= 1:
            raise ValueError(
                f"bn_momentum is {self.bn_momentum}: it is the share of the newest batch, from 0 to 1"
            )
        if self.input_size % self.patch_size:
            raise ValueError(
                f"latent size {self.input_size} is not a multiple of patch size {self.patch_size}: "
                "choose a SiT/patch that divides the VAE's latents"
            )
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of heads {self.heads} and of 4: change either"
            )
        if not 1 <= self.alignment_depth <= self.depth:
            raise ValueError(
                f"alignment depth {self.alignment_depth} is outside 1 to {self.depth}, the number of blocks: "
                "choose one inside"
            )

    @property
    def grid_size(self) -> int:
        """Tokens along each side."""
        return self.input_size // self.patch_size


_SIZES = {  # depth, width, heads, alignment depth (REPA's choice; half of B's depth and less for the larger)
    "S": (12, 384, 6, 4),
    "B": (12, 768, 12, 4),
    "L": (24, 1024, 16, 8),
    "XL": (28, 1152, 16, 8),
}
SIT_PRESETS = {
    f"SiT-{name}/{patch}": SiTConfig(
        patch_size=patch, depth=depth, width=width, heads=heads, alignment_depth=tap
    )
    for name, (depth, width, heads, tap) in _SIZES.items()
    for patch in (1, 2, 4, 8)
} | {
    "tiny": SiTConfig(
        input_size=8,
        width=128,
        depth=6,
        heads=4,
        num_classes=10,
        target_dims=(128,),
        alignment_depth=2,
        projector_width=256,
        label_std=0.5,
    )
}


def sincos_position_embedding(width: int, grid_size: int) -> Tensor:
    """2-D sine-cosine embedding (1, grid_size^2, width): half the channels for columns, half for rows."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    angles = torch.arange(grid_size, dtype=torch.float64, device="cpu")[:, None] * omega  # (grid, width/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, width/2)
    columns = axis[None].expand(grid_size, -1, -1)
    rows = axis[:, None].expand(-1, grid_size, -1)
    table = torch.cat([columns, rows], dim=2).reshape(1, grid_size**2, width)
    return table.float().to(torch.get_default_device())  # which may have no float64


class PatchEmbed(nn.Module):
    """Cuts latents (B, C, h, w) into patches and maps each to a token: (B, N, width)."""

    def __init__(self, patch_size: int, in_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, patch_size)

    def forward(self, z_t: Tensor) -> Tensor:
        return self.proj(z_t).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t, then a two-layer network: (B,) to (B, width)."""

    def __init__(self, width: int, frequencies: int = 256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(Linear(frequencies, width), nn.SiLU(), Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        omega = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t.float().flatten()[:, None] * omega
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings; the last row is the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        batch, tokens, width = h.shape
        q, k, v = (
            self.qkv(h).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        )
        return self.proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        )


class MLP(nn.Module):
    """Two linear layers with a tanh-GELU between, applied to every token."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shifts and scales every token of h (B, N, D) by vectors (B, D)."""
    return h * (1 + scale[:, None]) + shift[:, None]


class SiTBlock(nn.Module):
    """A transformer block whose norms the condition shifts, scales and gates; it starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
        h = h + gate_a[:, None] * self.attn(modulate(self.norm1(h), shift_a, scale_a))
        return h + gate_m[:, None] * self.mlp(modulate(self.norm2(h), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated norm and a linear map from each token to its latent patch."""

    def __init__(self, width: int, patch_dim: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = Linear(width, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


def check_label_count(labels: Tensor, count: int, noun: str) -> None:
    """Refuses labels that are not one class number per image, latent or sample (the noun).

    Raises:
        ValueError: no tensor, another shape, which would broadcast, no integers, or nothing at all.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels are a {type(labels).__name__}: give a tensor, as in torch.tensor([0, 1])")
    if count == 0:
        raise ValueError(f"the batch is empty: give at least one {noun}")
    if labels.shape != (count,):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} for {count} {noun}s: give one class number per {noun}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels have dtype {labels.dtype}: give integer class numbers (int64)")


def check_times(t: Tensor, count: int, *, wait: bool = False) -> None:
    """Refuses times that are not one per latent, from 0 to 1.

    Args:
        t: times.
        count: latents.
        wait: look at the numbers on a GPU, too, which then has to be waited for.

    Raises:
        ValueError: see above.
    """
    if t.numel() != count or not t.is_floating_point():
        raise ValueError(
            f"times have shape {tuple(t.shape)} and dtype {t.dtype} for {count} latents: give one float for "
            "each"
        )
    if (wait or can_look_at(t)) and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(
            f"times reach from {float(t.min()):.4g} to {float(t.max()):.4g}: they go from 0, data, to 1, "
            "noise"
        )


class SiT(nn.Module):
    """Velocity model over latents, with an alignment tap.

    Args:
        config: sizes; see `SiTConfig`, or use `SiT.from_preset`.

    Attributes:
        gradient_checkpointing: see `repae_lite.networks.layers.set_gradient_checkpointing`.
    """

    gradient_checkpointing = False

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.config = config
        c = config
        self.x_embedder = PatchEmbed(c.patch_size, c.in_channels, c.width)
        self.t_embedder = TimestepEmbedder(c.width)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width)
        # Fixed, unless the official slip is asked for: D2 of DIFFERENCES.md.
        self.pos_embed = nn.Parameter(
            sincos_position_embedding(c.width, c.grid_size), requires_grad=c.train_pos_embed
        )
        self.blocks = nn.ModuleList(SiTBlock(c.width, c.heads) for _ in range(c.depth))
        project = PROJECTORS[c.projector]
        self.projectors = nn.ModuleList(project(c.width, c.projector_width, dim) for dim in c.target_dims)
        self.final_layer = FinalLayer(c.width, c.patch_size**2 * c.in_channels)
        self.bn = BatchNorm2d(c.in_channels, eps=1e-4, momentum=c.bn_momentum, affine=False)
        self._initialise()

    @classmethod
    def from_preset(cls, name: str, **changes) -> "SiT":
        """Builds a named size with fresh weights; keywords replace fields of its `SiTConfig`.

        Args:
            name: "SiT-{S,B,L,XL}/{1,2,4,8}" or "tiny".
            changes: fields of the configuration.

        Raises:
            ValueError: the name is not a preset, or the sizes do not fit together.
        """
        if name not in SIT_PRESETS:
            raise ValueError(f"unknown SiT preset {name!r}: choose one of {', '.join(SIT_PRESETS)}")
        return cls(replace(SIT_PRESETS[name], **changes))

    def _initialise(self) -> None:
        """DiT's initialisation: Xavier, but zero for adaLN and output: blocks start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.config.label_std)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in [block.adaLN_modulation[1] for block in self.blocks] + [
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    # ---------------------------------------------------------------- latents in and out

    @property
    def null_class(self) -> int:
        """The label that means "no class": `num_classes`."""
        return self.config.num_classes

    def set_latent_stats(self, stats: LatentStats) -> None:
        """Starts the running statistics from those of a VAE's latents.

        Raises:
            ValueError: of another number of channels, not finite, or of a channel without spread.
        """
        stats.check()
        if len(stats.mean) != self.config.in_channels:
            raise ValueError(
                f"latent statistics of {len(stats.mean)} channels for a SiT of {self.config.in_channels}: "
                "use those of the VAE that the SiT was built for"
            )
        self.bn.running_mean.copy_(stats.mean)
        self.bn.running_var.copy_(stats.std.square())

    def latent_stats(self) -> LatentStats:
        """The running statistics, without BatchNorm's eps, as in the official code."""
        return LatentStats.from_moments(self.bn.running_mean, self.bn.running_var)

    def normalize(self, z: Tensor, batch_stats: bool | None = None) -> Tensor:
        """BatchNorm of latents z (B, C, h, w).

        Args:
            z: latents on the VAE's scale.
            batch_stats: None follows train/eval mode. True in eval mode uses this batch's statistics and
                leaves the running ones alone; False in train mode uses the running ones.
        """
        if z.ndim != 4 or z.shape[1] != self.config.in_channels:
            raise ValueError(
                f"latents have shape {tuple(z.shape)}: this SiT takes {self.config.in_channels} channels"
            )
        return self.bn(z, False if self.config.fixed_latent_stats else batch_stats)

    def denormalize(self, sample: Tensor) -> Tensor:
        """Brings sampled latents (B, C, h, w) back to the VAE's scale, in the model's dtype."""
        return self.latent_stats().denormalize(sample).to(self.pos_embed.dtype)

    # ---------------------------------------------------------------- network

    def check_labels(self, labels: Tensor, *, allow_null: bool = True) -> None:
        """Refuses labels out of range; the null class is for sampling only. Waits for a GPU: once per batch.

        Raises:
            ValueError: see above.
        """
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > self.null_class - (not allow_null):
            raise ValueError(
                f"label {low if low < 0 else high} is outside 0 to {self.null_class - 1} (null class "
                f"{self.null_class}): fix the labels (they count from 0) or build the SiT with more "
                "num_classes"
            )

    def check_targets(self, batch: int, targets: Sequence[Tensor]) -> None:
        """Refuses encoder tokens that do not fit this SiT's grid and projectors.

        Raises:
            ValueError: the wrong number of encoders, or targets that are not floats (batch, N, D).
        """
        dims = self.config.target_dims
        if len(targets) != len(dims):
            raise ValueError(
                f"{len(targets)} target encoders for a SiT with {len(dims)} projectors: build it with one "
                "target_dims entry each"
            )
        for i, (target, dim) in enumerate(zip(targets, dims, strict=True)):
            expected = (batch, self.config.grid_size**2, dim)
            if not target.is_floating_point():
                raise ValueError(f"targets[{i}] have dtype {target.dtype}: give floats, as an encoder does")
            if tuple(target.shape) != expected:
                raise ValueError(
                    f"targets[{i}] have shape {tuple(target.shape)} but this SiT needs {expected} (B, N, D): "
                    "choose an encoder resolution and SiT patch size with the same token grid, and its width "
                    "in target_dims"
                )

    def check_input(self, z: Tensor, labels: Tensor) -> None:
        """Refuses latents of another size than this SiT's, and labels that are not one per latent.

        Shapes and dtypes are checked always, labels on a CPU only.

        Raises:
            ValueError: see above.
        """
        expected = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if z.ndim != 4 or tuple(z.shape[1:]) != expected or not len(z):
            raise ValueError(
                f"latents have shape {tuple(z.shape)}: this SiT takes (B, {', '.join(map(str, expected))}); "
                "build it with the VAE's in_channels and input_size"
            )
        if not z.is_floating_point():
            raise ValueError(f"latents have dtype {z.dtype}: give floats, as a VAE makes them")
        check_label_count(labels, z.shape[0], "latent")
        if can_look_at(labels):
            self.check_labels(labels)

    def _embed(self, z_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, width) and condition (B, width)."""
        self.check_input(z_t, labels)
        check_times(t, len(z_t))
        h = self.x_embedder(z_t.to(self.pos_embed.dtype)) + self.pos_embed
        return h, self.t_embedder(t) + self.y_embedder(labels)

    def features(self, z_t: Tensor, t: Tensor, labels: Tensor, depth: int | None = None) -> Tensor:
        """Token features (B, N, width) of normalised z_t after `depth` blocks, by default at the tap."""
        if depth is not None and not 0 <= depth <= self.config.depth:
            raise ValueError(
                f"depth {depth} is outside 0 to {self.config.depth}, the number of blocks: choose one inside"
            )
        h, condition = self._embed(z_t, t, labels)
        for block in self.blocks[: self.config.alignment_depth if depth is None else depth]:
            h = block(h, condition)
        return h

    def forward(
        self, z_t: Tensor, t: Tensor, labels: Tensor, *, project: bool = False, align_only: bool = False
    ) -> Tensor | tuple[Tensor | None, list[Tensor]] | None:
        """Predicts velocities, and what the tap sees on the way.

        Args:
            z_t: normalised, noised latents (B, C, h, w).
            t: times (B,).
            labels: classes (B,).
            project: also return the projected features at the tap.
            align_only: stop at the tap; the velocity is None.

        Returns:
            The velocity (B, C, h, w); with `project` the pair (velocity, [(B, N, D) per projector]).
        """
        h, condition = self._embed(z_t, t, labels)
        for i, block in enumerate(self.blocks, start=1):
            h = run(self, block, h, condition)
            if i == self.config.alignment_depth:
                tapped = h
                if align_only:
                    break
        v_hat = None if align_only else self._unpatchify(self.final_layer(h, condition))
        return (v_hat, [projector(tapped) for projector in self.projectors]) if project else v_hat

    def _unpatchify(self, h: Tensor) -> Tensor:
        """(B, N, p * p * C) to (B, C, h, w)."""
        grid, p, channels = self.config.grid_size, self.config.patch_size, self.config.in_channels
        h = h.reshape(h.shape[0], grid, grid, p, p, channels)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(h.shape[0], channels, grid * p, grid * p)
