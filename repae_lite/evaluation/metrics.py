"""Metrics of samples, reconstructions, features and latents.

Paper: section 4 and Tables 1, 10 and 14. Taught in `notebooks/00_map.ipynb` (Fréchet distance, linear probe,
CKNNA), `01_vae.ipynb` (PSNR, SSIM) and `04_stop_gradient.ipynb` (structure of latents).
Where float64 is computed with and the device has none (MPS), the CPU computes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from repae_lite.utils.devices import in_float64


class FeatureStats(NamedTuple):
    """A Gaussian fitted to features.

    Attributes:
        mean: (D,), float64.
        cov: (D, D), float64.
        count: Number of samples that it was fitted to.
    """

    mean: Tensor
    cov: Tensor
    count: int


def feature_stats(features: Tensor) -> FeatureStats:
    """Mean and unbiased covariance of features (N, D), in float64.

    Raises:
        ValueError: The features are not (N, D), fewer than two, or not finite.
    """
    features = _matrix(features, "features")
    if len(features) < 2:
        raise ValueError(f"A covariance needs at least 2 samples, got {len(features)}: pass more features.")
    cov = torch.cov(features.T).reshape(2 * features.shape[1:])
    return FeatureStats(features.mean(dim=0), cov, len(features))


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """Squared Fréchet distance between two Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    Source: Heusel et al. 2017 (arXiv 1706.08500), eq. 6. The trace of the root comes from the eigenvalues of
    the symmetric C_a^(1/2) C_b C_a^(1/2), which are those of C_a C_b, so that no complex or negative root can
    appear. The estimate falls as samples are added: compare only distances with equal sample counts.

    Returns:
        A distance >= 0, in the unit of the squared features.

    Raises:
        ValueError: The widths differ, a count is below 2, or a statistic is not finite.
    """
    for stats in (a, b):
        if stats.count < 2:
            raise ValueError(f"Fréchet distance needs at least 2 samples, got {stats.count}: pass more.")
        if not (stats.mean.isfinite().all() and stats.cov.isfinite().all()):
            raise ValueError("Fréchet distance got statistics that are not finite: check the features.")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Fréchet distance got widths {len(a.mean)} and {len(b.mean)}: use one network.")
    mean_a, cov_a, mean_b, cov_b = map(in_float64, (a.mean, a.cov, b.mean, b.cov))
    eigenvalues, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    product = root_a @ cov_b @ root_a
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_root
    return max(distance.item(), 0.0)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(2^2 / MSE), of images (B, C, H, W) in [-1, 1].

    Returns:
        (B,); infinite where the images are equal.
    """
    _same_images(x, y)
    return 10 * torch.log10(4 / (x - y).square().flatten(1).mean(dim=1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in [-1, 1], at least 11x11.

    Source: Wang et al. 2004, eq. 13, with an 11x11 Gaussian window of sigma 1.5, K = (.01, .03) and a data
    range of 2; averaged over channels and over the positions where the window fits (no padding).

    Returns:
        (B,), at most 1.
    """
    _same_images(x, y)
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window is 11x11, the images are {tuple(x.shape[-2:])}: use larger images.")
    offsets = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(image: Tensor) -> Tensor:  # (B, C, H, W) -> (B * C, 1, H - 10, W - 10)
        image = image.reshape(-1, 1, *x.shape[-2:])
        return F.conv2d(F.conv2d(image, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).reshape(len(x), -1).mean(dim=1)


def cknna(a: Tensor, b: Tensor, k: int = 10, *, unbiased: bool = True, normalize: bool = True) -> float:
    """Centered kernel nearest-neighbour alignment: do two networks agree on which images are neighbours?

    K = a a^T and L = b b^T are kept only where j is among the k nearest neighbours of i under *both* kernels
    (for the two normalising terms: under K, under L); then CKNNA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)).
    Source: Huh et al. 2024 (arXiv 2405.07987), in the order of their metrics.py: mask first, then centre.
    REPA uses k = 10 on features averaged over tokens. Values depend on N and k: compare only equal ones.

    Args:
        a: Features (N, D_a), of the same N images as b.
        b: Features (N, D_b).
        k: Neighbours per sample, 2 ... N - 1.
        unbiased: HSIC as in Song et al. 2012, eq. 5 (no self-similarity); otherwise tr(K H L H).
        normalize: Scale every feature to length 1 first, as Huh et al. do.

    Returns:
        1 for equal features, near 0 for unrelated ones; at most a little above 1.

    Raises:
        ValueError: Shapes or k do not fit, a value is not finite, or there are too few common neighbours.
    """
    a, b = _matrix(a, "a"), _matrix(b, "b")
    n = len(a)
    if len(b) != n:
        raise ValueError(f"CKNNA compares features of the same images, got {n} and {len(b)}.")
    if not 2 <= k < n or n < 4:
        raise ValueError(f"CKNNA needs N >= 4 and 2 <= k < N, got k = {k}, N = {n}: change k or add images.")
    if normalize:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    kernels = (a @ a.T, b @ b.T)
    masks = []
    for kernel in kernels:
        ranked = kernel.clone().fill_diagonal_(-math.inf) if unbiased else kernel
        masks.append(torch.zeros_like(kernel).scatter_(1, ranked.topk(k, dim=1).indices, 1.0))

    def alignment(i: int, j: int) -> float:
        mask = masks[i] * masks[j]
        return _hsic(kernels[i] * mask, kernels[j] * mask, unbiased=unbiased)

    norm_a, norm_b = alignment(0, 0), alignment(1, 1)
    if norm_a <= 0 or norm_b <= 0:
        raise ValueError(f"CKNNA cannot normalise (N = {n}, k = {k}): add images; check that features vary.")
    return alignment(0, 1) / math.sqrt(norm_a * norm_b)


def _hsic(kernel: Tensor, other: Tensor, *, unbiased: bool) -> float:
    n = len(kernel)
    if not unbiased:
        centre = torch.eye(n, dtype=kernel.dtype, device=kernel.device) - 1 / n
        return torch.trace(kernel @ centre @ other @ centre).item()
    kernel, other = kernel.clone().fill_diagonal_(0), other.clone().fill_diagonal_(0)
    total = (kernel * other.T).sum() + kernel.sum() * other.sum() / ((n - 1) * (n - 2))
    return ((total - 2 * (kernel.sum(dim=0) @ other.sum(dim=1)) / (n - 2)) / (n * (n - 3))).item()


def linear_probe(
    train_feats: Tensor, train_labels: Tensor, test_feats: Tensor, test_labels: Tensor, *, l2: float = 1e-3
) -> float:
    """Test accuracy of multinomial logistic regression on frozen features: what can be read off linearly?

    Features are standardised with the training statistics. L-BFGS minimises the mean cross-entropy
    + l2/2 |W|^2 in float64, starting from zero, so the result is deterministic.

    Args:
        train_feats: (N, D).
        train_labels: (N,) class indices.
        test_feats: (M, D).
        test_labels: (M,) class indices.
        l2: Strength of the penalty on the weights (not on the bias).

    Returns:
        The share of right answers, in [0, 1].
    """
    train, test = _matrix(train_feats, "train_feats"), _matrix(test_feats, "test_feats")
    for feats, labels, name in ((train, train_labels, "train"), (test, test_labels, "test")):
        if labels.shape != (len(feats),):
            raise ValueError(f"{name}_labels must be ({len(feats)},), got {tuple(labels.shape)}.")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train width {train.shape[1]}, test width {test.shape[1]}: use one layer for both.")
    train_labels, test_labels = train_labels.to(train.device), test_labels.to(test.device)
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-8)
    train, test = (train - mean) / std, (test - mean) / std
    weight = train.new_zeros(train.shape[1], int(train_labels.max()) + 1)
    bias = weight.new_zeros(weight.shape[1])
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, train_labels.long()) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return ((test @ weight + bias).argmax(dim=1) == test_labels).to(test.dtype).mean().item()


def latent_structure(z: Tensor) -> dict[str, float | list[float]]:
    """How large, how varied and how rough latents are. REPA-E, Table 10 (collapse: 17.06/6627 -> 0.02/90).

    The paper does not give its formulas for the first two, so compare numbers within this project only, at
    one latent shape: total variation is a sum and grows with it. Only the third ignores the latents' scale.

    Args:
        z: Latents (B, C, h, w) as the VAE gives them, not normalised; h, w >= 2.

    Returns:
        `spatial_variance`: variance over the h*w positions, averaged over images and channels.
        `total_variation`: sum of |neighbour differences| along h and w, over channels; mean over images.
        `high_frequency_share`: share of the power without the mean (DC) that lies above half the Nyquist
            frequency, sqrt(f_y^2 + f_x^2) > 1/4 cycle per position; mean over channels. For 8x8 white noise
            it is .81.
        `channel_std`: C standard deviations over images and positions.
    """
    if z.ndim != 4 or min(z.shape[-2:]) < 2:
        raise ValueError(f"latent_structure needs (B, C, h, w) with h, w >= 2, got {tuple(z.shape)}.")
    if not z.isfinite().all():
        raise ValueError("latent_structure got latents that are not finite: the VAE has diverged.")
    z = in_float64(z.detach())
    variation = z.diff(dim=2).abs().sum(dim=(1, 2, 3)) + z.diff(dim=3).abs().sum(dim=(1, 2, 3))  # (B,)
    power = torch.fft.fft2(z - z.mean(dim=(2, 3), keepdim=True)).abs().square().mean(dim=0)  # (C, h, w)
    f_y, f_x = (torch.fft.fftfreq(size, dtype=z.dtype, device=z.device) for size in z.shape[-2:])
    radius = torch.hypot(f_y[:, None], f_x[None, :])  # (h, w)
    total = power[:, radius > 0].sum(dim=1)
    high = power[:, radius > 0.25 + 1e-9].sum(dim=1) / total.clamp(min=torch.finfo(z.dtype).tiny)  # (C,)
    return {
        "spatial_variance": z.var(dim=(2, 3), unbiased=False).mean().item(),
        "total_variation": variation.mean().item(),
        "high_frequency_share": high.mean().item(),
        "channel_std": z.std(dim=(0, 2, 3), unbiased=False).tolist(),
    }


def effective_dimensions(z: Tensor) -> float:
    """The number of directions in which latents vary: the participation ratio (sum l)^2 / sum l^2.

    The l are the eigenvalues of the latents' covariance. The ratio is 1 when all variation lies along one
    line and C*h*w when it is spread evenly over all coordinates; scale does not matter.

    Args:
        z: Latents (B, ...), with B well above the number of coordinates.

    Raises:
        ValueError: There are fewer than two latents, or all are equal.
    """
    flat = in_float64(z.detach()).flatten(1)
    flat = flat - flat.mean(dim=0)
    trace = flat.square().sum()
    if len(flat) < 2 or not trace > 0:
        raise ValueError(
            f"effective_dimensions needs latents that differ, got {len(flat)}: give a batch of images."
        )
    gram = flat.T @ flat if flat.shape[1] <= len(flat) else flat @ flat.T  # same non-zero eigenvalues
    return (trace.square() / gram.square().sum()).item()  # the squared Frobenius norm is the sum of the l^2


def _matrix(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2:
        raise ValueError(f"{name} must be (N, D), got {tuple(features.shape)}: average the tokens.")
    if not features.isfinite().all():
        raise ValueError(f"{name} has NaN or infinity: check the network and the images that it comes from.")
    return in_float64(features.detach())


def _same_images(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"Images must both be (B, C, H, W), got {tuple(x.shape)} and {tuple(y.shape)}.")
    if not (x.is_floating_point() and y.is_floating_point()):
        raise TypeError(f"Images must be float in [-1, 1], got {x.dtype} and {y.dtype}: use x / 127.5 - 1.")


# ---------------------------------------------------------------- samples, as ADM's evaluator has them


class StreamingStats:
    """`feature_stats` of features (B, D) that come batch by batch: in float64, only sums are kept."""

    def __init__(self, first: Tensor):
        self.shift = first.double().mean(dim=0)  # products of values near zero keep their digits
        self.count, self.sum, self.products = 0, 0.0, 0.0

    def add(self, features: Tensor) -> None:
        """Takes features (B, D).

        Raises:
            ValueError: They are not finite.
        """
        features = _matrix(features, "features") - self.shift
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.products += features.T @ features

    def result(self) -> FeatureStats:
        """The Gaussian of all features.

        Raises:
            ValueError: Fewer than two came.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 samples, got {self.count}: pass more features.")
        cov = (self.products - torch.outer(self.sum, self.sum) / self.count) / (self.count - 1)
        return FeatureStats(self.shift + self.sum / self.count, (cov + cov.T) / 2, self.count)


def streamed_stats(features: Tensor, *, block: int = 2000) -> FeatureStats:
    """`feature_stats` of many features (N, D): in float64, with one block of them at a time."""
    stats = StreamingStats(features[:block])
    for part in features.split(block):
        stats.add(part)
    return stats.result()


def inception_score(probabilities: Tensor, *, chunk: int = 5000) -> float:
    """exp(mean KL(p(y|x) || p(y))), averaged over consecutive chunks as ADM's evaluator does.

    Source: Salimans et al. 2016 (arXiv 1606.03498). Chunks are consecutive, so images must not be sorted by
    class: a chunk would then hold few classes and score low.

    Args:
        probabilities: Of classes (N, K); rows sum to 1.
        chunk: Images of a chunk; the last one may be smaller.

    Returns:
        From 1 (all alike) to K.

    Raises:
        ValueError: Not (N, K), not finite, or rows that are no distributions.
    """
    scores = []
    for part in probabilities.split(chunk):
        p = _matrix(part, "probabilities")
        if (p < 0).any() or ((p.sum(dim=1) - 1).abs() > 1e-3).any():
            raise ValueError("The inception score needs class probabilities: rows must be >= 0 and sum to 1.")
        kl = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(dim=0, keepdim=True))
        scores.append(kl.sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item()


def kernel_distance(a: Tensor, b: Tensor, *, block: int = 2000) -> float:
    """Kernel (Inception) distance: unbiased squared MMD with the kernel (x·y / D + 1)^3.

    Source: Bińkowski et al. 2018 (arXiv 1801.01401), over all pairs rather than over random subsets. Unlike
    the Fréchet distance it has no bias that depends on the number of samples; it may be negative.

    Args:
        a: Features (N, D).
        b: Features (M, D).
        block: Rows of the kernel at once.

    Raises:
        ValueError: Widths differ, fewer than two samples, or values that are not finite.
    """
    _check_pair(a, b, 1)

    def total(x: Tensor, y: Tensor, *, upper: bool = False) -> Tensor:
        result = torch.zeros((), dtype=torch.float64)
        for i in range(0, len(x), block):
            rows = x[i : i + block].double()
            for j in range(i if upper else 0, len(y), block):
                kernel = (rows @ y[j : j + block].double().T / x.shape[1] + 1).pow(3)
                if upper and i == j:
                    kernel.fill_diagonal_(0)
                result += kernel.sum() * (2 if upper and i != j else 1)
        return result

    def within(x: Tensor) -> Tensor:
        return total(x, x, upper=True) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))).item()


def precision_recall(
    samples: Tensor, reference: Tensor, *, neighbours: int = 3, block: int = 2000
) -> tuple[float, float]:
    """Improved precision and recall: shares of one set inside the k-nearest-neighbour manifold of the other.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991). A point lies inside a set's manifold if its distance
    to any of the set's points is at most that point's distance to its k-th neighbour in the set. Blockwise in
    float32: beyond the features, memory grows with `block` alone.

    Args:
        samples: Features (N, D) of generated images.
        reference: Features (M, D) of real images.
        neighbours: k, without the point itself.
        block: Points at once.

    Returns:
        Precision (samples inside the reference) and recall (reference inside the samples), in [0, 1].

    Raises:
        ValueError: Widths differ, a set has no k-th neighbour, or values are not finite.
    """
    _check_pair(samples, reference, neighbours)
    radii, reference_radii = (_neighbour_radii(x, neighbours, block) for x in (samples, reference))
    inside = torch.zeros(len(samples), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    for i in range(0, len(samples), block):
        for j in range(0, len(reference), block):
            d = _squared_distances(samples[i : i + block], reference[j : j + block])
            inside[i : i + block] |= (d <= reference_radii[j : j + block]).any(dim=1)
            covered[j : j + block] |= (d <= radii[i : i + block, None]).any(dim=0)
    return inside.double().mean().item(), covered.double().mean().item()


def _neighbour_radii(x: Tensor, k: int, block: int) -> Tensor:
    """Squared distance of each point to its k-th neighbour; every pair of blocks is computed once."""
    nearest = torch.full((len(x), k), math.inf)

    def update(rows: slice, distances: Tensor) -> None:
        closest = distances.topk(min(k, distances.shape[1]), dim=1, largest=False).values
        nearest[rows] = torch.cat([nearest[rows], closest], dim=1).topk(k, dim=1, largest=False).values

    for i in range(0, len(x), block):
        for j in range(i, len(x), block):
            d = _squared_distances(x[i : i + block], x[j : j + block])
            if i == j:
                d.fill_diagonal_(math.inf)
            else:
                update(slice(j, j + block), d.T)
            update(slice(i, i + block), d)
    return nearest[:, -1]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """In float32, from a point among them: far from zero, squares and products would cancel to noise."""
    centre = b.mean(dim=0)
    a, b = (a - centre).float(), (b - centre).float()
    distances = torch.addmm(b.square().sum(dim=1), a, b.T, alpha=-2)
    return distances.add_(a.square().sum(dim=1)[:, None]).clamp_(min=0)


def _check_pair(a: Tensor, b: Tensor, neighbours: int) -> None:
    """Refuses two sets of features that cannot be compared point by point."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) <= neighbours:
        raise ValueError(
            f"features {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: give two sets (N, D) of one "
            f"width, with more than {neighbours} each"
        )
    if not all(part.isfinite().all() for x in (a, b) for part in x.split(256)):  # whole, it would copy them
        raise ValueError(
            "features have NaN or infinity: check the network and the images that they come from"
        )
