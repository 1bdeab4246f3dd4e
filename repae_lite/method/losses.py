"""The losses of REPA-E: velocity, alignment, and what keeps a VAE a VAE.

REPA-E sections 3.1 and 3.3 (eq. 1 to 4); taught in `notebooks/01_vae.ipynb` and `notebooks/03_repa.ipynb`.
Which loss may reach which network is not decided here but in `repae_lite.method.steps`.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repae_lite.method.interpolant import Interpolant, get_interpolant, interpolate, sample_time
from repae_lite.networks.layers import full_precision
from repae_lite.networks.sit import SiT, check_times
from repae_lite.utils.downloads import torch_hub_file
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.pickles import read_pickle
from repae_lite.utils.state_dicts import fill_module, load_weights, plain_state
from repae_lite.utils.weight_files import DamagedFile


def velocity_loss(v_hat: Tensor, v: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity per image: (B, …) to (B,), at least in float32.

    Raises:
        ValueError: the shapes differ: they would broadcast.
    """
    _check_alike(v_hat, v, "velocities")
    return (full_precision(v_hat) - full_precision(v)).square().flatten(1).mean(1)


def _check_alike(one: Tensor, other: Tensor, what: str) -> None:
    if one.shape != other.shape:
        raise ValueError(f"{what} have shapes {tuple(one.shape)} and {tuple(other.shape)}: give two alike")


def alignment_loss(projected: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean negative cosine similarity of projected features and encoder tokens (REPA-E eq. 1), in [-1, 1].

    The mean runs over encoders, images and tokens. Both sides are normalised in float32 whatever the autocast
    dtype: in float16 the squares inside the norm over- and underflow (DIFFERENCES.md, D7).

    Args:
        projected: projected SiT features, one (B, N, D) per encoder.
        targets: frozen encoder tokens of the clean images, same shapes.

    Raises:
        ValueError: the number of encoders or their shapes do not match.
    """
    if len(projected) != len(targets):
        raise ValueError(
            f"{len(targets)} target encoders for a SiT with {len(projected)} projectors: build it with one "
            "target_dims entry each"
        )
    similarities = []
    for i, (h_proj, target) in enumerate(zip(projected, targets, strict=True)):
        if h_proj.shape != target.shape:
            raise ValueError(
                f"targets[{i}] have shape {tuple(target.shape)} but the projected SiT features "
                f"{tuple(h_proj.shape)} (B, N, D): "
                "choose an encoder resolution and SiT patch size with the same token grid, and its width in "
                "target_dims"
            )
        # Products, sums and norms are not autocast to half precision; what matters is that they start from
        # float32.
        cosine = F.normalize(h_proj.float(), dim=-1) * F.normalize(target.float(), dim=-1)
        similarities.append(cosine.sum(-1).mean())
    return -torch.stack(similarities).mean()


@dataclass
class LossOutput:
    """What `sit_losses` computes.

    Attributes:
        denoising_loss: mean squared velocity error per image (B,); None when only aligned.
        align_loss: mean negative cosine similarity, a scalar in [-1, 1]; None without targets.
        projected: projected features, one (B, N, D) per target.
        v_hat: predicted velocity (B, C, h, w); None when only aligned.
        z_t: the noised, normalised latents that SiT saw (B, C, h, w).
        t: times (B,).
        eps: noise (B, C, h, w).
    """

    denoising_loss: Tensor | None
    align_loss: Tensor | None
    projected: list[Tensor]
    v_hat: Tensor | None
    z_t: Tensor
    t: Tensor
    eps: Tensor


def as_list(targets: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
    """Encoder tokens as a list, one tensor per encoder; empty for None."""
    return [] if targets is None else [targets] if isinstance(targets, Tensor) else list(targets)


def sit_losses(
    sit: SiT,
    z: Tensor,
    labels: Tensor,
    targets: Tensor | Sequence[Tensor] | None = None,
    *,
    t: Tensor | None = None,
    eps: Tensor | None = None,
    path: str | Interpolant = "linear",
    weighting: str = "uniform",
    align_only: bool = False,
    label_drop: Tensor | None = None,
    batch_stats: bool | None = None,
) -> LossOutput:
    """SiT's velocity and alignment losses: normalise, interpolate, run, compare (REPA-E eq. 1 and 3).

    All parameters are used in one call of the module, so SiT may be wrapped in DistributedDataParallel.

    Args:
        sit: in train mode its BatchNorm follows the batch and labels are dropped.
        z: un-normalised latents (B, C, h, w), straight from the VAE.
        labels: classes (B,).
        targets: encoder tokens (B, N, D), or one such tensor per encoder; None skips alignment.
        t: times (B,); drawn by `weighting` when None.
        eps: noise like z; drawn when None.
        path: "linear" or "cosine".
        weighting: "uniform" or "lognormal" times.
        align_only: stop at the tap, which is all that the VAE's update needs.
        label_drop: which labels become the null class, bool (B,); drawn in train mode when None.
        batch_stats: see `SiT.normalize`.

    Raises:
        ValueError: shapes, labels or token counts do not fit.
    """
    network, targets, path = getattr(sit, "module", sit), as_list(targets), get_interpolant(path)
    network.check_input(z, labels)  # before BatchNorm takes notice
    if targets:
        network.check_targets(len(z), targets)
    if t is None:
        t = sample_time(len(z), weighting=weighting, path=path, device=z.device)
    t, eps = t.flatten(), torch.randn_like(z) if eps is None else eps
    if len(t) != len(z) or eps.shape != z.shape:
        raise ValueError(
            f"{len(t)} times and noise of shape {tuple(eps.shape)} for latents {tuple(z.shape)}: "
            "draw one time per latent and noise like z"
        )
    check_times(t, len(z))
    if label_drop is not None and (label_drop.shape != labels.shape or label_drop.dtype != torch.bool):
        raise ValueError(
            f"label_drop has shape {tuple(label_drop.shape)} and dtype {label_drop.dtype}: give one bool for "
            f"each of {len(z)} labels"
        )
    z_t, v = interpolate(network.normalize(z, batch_stats), eps, t, path)
    dropout = network.config.label_dropout
    if label_drop is None and sit.training and dropout:
        label_drop = torch.rand(len(z), device=z.device) < dropout
    if label_drop is not None:
        labels = torch.where(label_drop, network.null_class, labels)
    out = sit(z_t, t, labels, project=bool(targets), align_only=align_only)
    v_hat, projected = out if targets else (out, [])
    return LossOutput(
        denoising_loss=None if align_only else velocity_loss(v_hat, v),
        align_loss=alignment_loss(projected, targets) if targets else None,
        projected=projected,
        v_hat=v_hat,
        z_t=z_t,
        t=t,
        eps=eps,
    )


def spatial_norm(tokens: Tensor, gamma: float = 0.6, eps: float = 1e-6) -> Tensor:
    """iREPA's targets (arXiv 2512.10794): what tells an image's tokens apart, and less of what they share.

    Args:
        tokens: of a frozen encoder (B, N, D), N at least 2.
        gamma: share of the mean over an image's tokens that is subtracted; iREPA's code has 0.6.
        eps: added to the standard deviation over the tokens, by which the difference is divided.

    Returns:
        (B, N, D), at least in float32.

    Raises:
        ValueError: another shape, or a gamma that is no share.
    """
    if tokens.ndim != 3 or tokens.shape[1] < 2 or not 0 <= gamma <= 1:
        raise ValueError(
            f"tokens have shape {tuple(tokens.shape)} and gamma is {gamma}: give tokens (B, N, D), two or "
            "more of each image, and a share from 0 to 1"
        )
    tokens = full_precision(tokens)
    return (tokens - gamma * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + eps)


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017, arXiv 1705.02894): real logits should exceed 1, fake ones fall below -1."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def check_weights(config: object, *names: str) -> None:
    """Refuses a configuration's weights that are negative or not finite: they would turn a loss around.

    Raises:
        ValueError: see above.
    """
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}: it must be 0 or more")


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the VAE's regularisation loss; the defaults are the official l1_lpips_kl_gan recipe.

    Attributes:
        pixel: "l1", as the official configuration does, or "l2", as the paper writes (D3).
        pixel_weight: of the pixel term.
        perceptual_weight: of the perceptual distance; 0 leaves it out.
        kl_weight: of the KL divergence.
        gan_weight: of the adversarial term; 0 leaves it out.
        gan_start: first training step with the adversarial term (and with discriminator updates).

    Raises:
        ValueError: an unknown pixel loss, or a weight that is negative or not finite.
    """

    pixel: str = "l1"
    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    gan_weight: float = 0.1
    gan_start: int = 0

    def __post_init__(self):
        if self.pixel not in ("l1", "l2"):
            raise ValueError(f"unknown pixel loss {self.pixel!r}: choose l1 or l2")
        check_weights(self, "pixel_weight", "perceptual_weight", "kl_weight", "gan_weight", "gan_start")

    def gan_active(self, step: int) -> bool:
        """Whether the adversarial term counts at this step."""
        return self.gan_weight > 0 and step >= self.gan_start


def vae_regularization_loss(
    x: Tensor,
    x_hat: Tensor,
    kl: Tensor,
    config: VAELossConfig,
    *,
    perceptual: nn.Module | None = None,
    logits_fake: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted terms that keep a VAE a VAE (REPA-E eq. 4): pixels, perception, KL, realism.

    Args:
        x: images (B, 3, H, W) in [-1, 1].
        x_hat: reconstructions, same shape.
        kl: divergence per image (B,), from `Posterior.kl`.
        config: which terms, and their weights.
        perceptual: maps (x, x_hat) to a distance per image (B,); needed when perceptual_weight > 0.
        logits_fake: discriminator logits of x_hat; None leaves the adversarial term out.

    Returns:
        Weighted scalars "reconstruction", "perceptual", "kl", "weighted_gan" and their sum "vae_reg".

    Raises:
        ValueError: shapes differ, or a perceptual network is missing.
    """
    _check_alike(x, x_hat, "images and reconstructions")
    if kl.shape != (len(x),):
        raise ValueError(f"the KL has shape {tuple(kl.shape)} for {len(x)} images: give one for each")
    difference = x - x_hat
    pixel = difference.abs().mean() if config.pixel == "l1" else difference.square().mean()
    terms = {"reconstruction": config.pixel_weight * pixel}
    if config.perceptual_weight > 0:
        if perceptual is None:
            raise ValueError(
                f"perceptual_weight is {config.perceptual_weight} but no perceptual network was given: pass "
                "one or set the weight to 0"
            )
        terms["perceptual"] = config.perceptual_weight * perceptual(x, x_hat).mean()
    terms["kl"] = config.kl_weight * kl.mean()
    if logits_fake is not None:
        terms["weighted_gan"] = -config.gan_weight * logits_fake.mean()
    terms["vae_reg"] = torch.stack(list(terms.values())).sum()
    return terms


class LPIPSLoss(nn.Module):
    """LPIPS with a VGG-16 trunk (Zhang et al. 2018, arXiv 1801.03924), through the `lpips` package; frozen.

    Args:
        lpips_range: "corrected" feeds images as they are, in [-1, 1]. "official" repeats the released run,
            which rescales them once more as if they were in [0, 1], so that LPIPS sees [-3, 1] (D1).
        pretrained_trunk: False leaves the VGG trunk at random weights, for offline tests; the distance then
            means nothing.

    Attributes:
        smallest: height and width, in pixels, that images must have: the trunk halves them four times.

    Raises:
        ValueError: an unknown range.
        ConnectionError, OSError: the trunk is not in torch's cache (TORCH_HOME) and cannot be downloaded.
        DamagedFile: what is there is not whole.
    """

    smallest = 16

    def __init__(self, lpips_range: str = "corrected", pretrained_trunk: bool = True):
        super().__init__()
        if lpips_range not in ("corrected", "official"):
            raise ValueError(f"unknown lpips_range {lpips_range!r}: choose corrected or official")
        import lpips  # slow to import: only training with LPIPS pays for it

        self.lpips_range = lpips_range
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            self.net = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        weights = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
        linear = plain_state(read_pickle(weights, remedy="install the lpips package again"), weights)
        twice = {name.replace("lin", "lins.", 1): tensor for name, tensor in linear.items()}  # two names each
        state = self.net.state_dict() | linear | twice
        if pretrained_trunk:
            state |= _vgg_trunk(self.net)
        fill_module(self.net, state, weights)
        self.net.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "LPIPSLoss":
        """Stays in eval mode: the `lpips` package puts dropout before its linear layers."""
        return super().train(False)

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1], H and W at least `smallest`."""
        _check_alike(x, x_hat, "images and reconstructions")
        if min(x.shape[2:]) < self.smallest:
            raise ValueError(
                f"images have shape {tuple(x.shape)}: LPIPS needs sides of {self.smallest} or more"
            )
        if self.lpips_range == "official":
            x, x_hat = 2 * x - 1, 2 * x_hat - 1
        return self.net(x, x_hat).flatten()


_VGG = "https://download.pytorch.org/models/vgg16-397923af.pth"  # of torchvision, trained on ImageNet


def _vgg_trunk(net: nn.Module) -> dict[str, Tensor]:
    """The weights of LPIPS' trunk by its own names, from torch's cache (TORCH_HOME) or downloaded into it."""
    path = torch_hub_file(
        _VGG,
        "the VGG-16 network of LPIPS",
        "take --perceptual tiny, or a --loss-cfg-path with perceptual_weight: 0",
    )
    remedy = f"remove {path}, and it is downloaded again"
    state = read_pickle(path, remedy=remedy)
    trunk = {}
    for name in net.state_dict():
        if name.startswith("net."):  # net.slice2.5.bias is features.5.bias
            trunk[name] = state.get(f"features.{name.split('.', 2)[2]}")
    missing = [name for name, tensor in trunk.items() if not isinstance(tensor, Tensor)]
    if missing:
        raise DamagedFile(f"{path} is not the VGG-16 network of LPIPS", remedy)
    return trunk


class TinyPerceptualLoss(nn.Module):
    """The embedded scale's stand-in for LPIPS: distance between features of a small frozen network.

    The network (data_small/perceptual.safetensors) learnt by how many quarter turns an image was rotated, so
    it has never seen a label. As in LPIPS, the features of each stage are normalised to unit length at every
    position; their squared distances are summed over channels, then averaged over positions and stages.
    """

    def __init__(self):
        super().__init__()
        widths, strides = (3, 24, 48, 64), (1, 2, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(widths[i], widths[i + 1], 3, strides[i], 1), nn.ReLU()) for i in range(3)
        )
        self.head = nn.Linear(widths[-1], 4)

    @classmethod
    def pretrained(cls) -> "TinyPerceptualLoss":
        """The network that ships with the project, frozen."""
        return load_weights(data_small_dir() / "perceptual.safetensors", cls()).requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Features after each stage, full, half and quarter resolution."""
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def rotation_logits(self, x: Tensor) -> Tensor:
        """The task the network was trained on: logits (B, 4) of the number of quarter turns."""
        return self.head(self.features(x)[-1].mean((2, 3)))

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, 32, 32) in [-1, 1]."""
        _check_alike(x, x_hat, "images and reconstructions")
        distances = []
        for stages in zip(self.features(x), self.features(x_hat), strict=True):
            real, fake = (F.normalize(stage, dim=1, eps=1e-4) for stage in stages)
            distances.append((real - fake).square().sum(1).mean((1, 2)))
        return torch.stack(distances).mean(0)
