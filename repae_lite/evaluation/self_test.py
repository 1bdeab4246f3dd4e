"""Every metric beside an independent computation of it: `repae evaluate --self-test`.

The computations here share no code with `repae_lite.evaluation.metrics`: loops by the definition, closed
forms, SciPy. The features are random numbers, so the values mean nothing; that both columns agree does.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from repae_lite.evaluation.features import SPATIAL_CHANNELS, InceptionFeatures
from repae_lite.evaluation.metrics import (
    FeatureStats,
    cknna,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    psnr,
    ssim,
    streamed_stats,
)

Row = tuple[str, float, float]  # what, ours, independent


def checks(seed: int = 0) -> Iterator[Row]:
    """What is compared: a name, our value, the independent one."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(60, 8)), rng.normal(0.3, 1.2, size=(50, 8))
    ours = [torch.from_numpy(x) for x in (a, b)]
    stats = [streamed_stats(x, block=7) for x in ours]
    yield "Fréchet distance, SciPy's eigenvalues of C1 C2", frechet_distance(*stats), _frechet(a, b)
    few = [rng.normal(size=(5, 8)) for _ in range(2)]  # fewer images than features: singular covariances
    ours_few = frechet_distance(*(streamed_stats(torch.from_numpy(x)) for x in few))
    yield "Fréchet distance, fewer images than features", ours_few, _frechet(*few)
    yield "Fréchet distance, closed form of diagonal Gaussians", *_diagonal(rng)
    yield "Fréchet distance of a set to itself", frechet_distance(stats[0], stats[0]), 0.0
    p = rng.dirichlet(np.ones(10), size=25)
    yield "Inception Score, loops", inception_score(torch.from_numpy(p), chunk=10), _score(p, 10)
    yield "kernel distance, double sum", kernel_distance(*ours, block=9), _kernel(a, b)
    for name, one, other in zip(
        ("precision", "recall"), precision_recall(*ours, block=9), _manifolds(a, b), strict=True
    ):
        yield f"{name}, brute force", one, other
    yield "CKNNA, loops", cknna(ours[0][:50], ours[1], k=5), _cknna(a[:50], b, 5)
    x, y = rng.uniform(-1, 1, size=(2, 1, 3, 16, 16))
    yield (
        "PSNR, definition",
        float(psnr(*map(torch.from_numpy, (x, y)))),
        10 * math.log10(4 / ((x - y) ** 2).mean()),
    )
    yield "SSIM, loops over windows", float(ssim(*map(torch.from_numpy, (x, y)))), _ssim(x[0], y[0])
    yield from _inception(rng)


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.linalg import eigvals

    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    roots = np.sqrt(eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots)


def _diagonal(rng: np.random.Generator) -> tuple[float, float]:
    means, stds = rng.normal(size=(2, 6)), rng.uniform(0.5, 2, size=(2, 6))
    stats = [
        FeatureStats(torch.from_numpy(mean), torch.diag(torch.from_numpy(std) ** 2), 100)
        for mean, std in zip(means, stds, strict=True)
    ]
    exact = ((means[0] - means[1]) ** 2).sum() + ((stds[0] - stds[1]) ** 2).sum()
    return frechet_distance(*stats), float(exact)


def _score(p: np.ndarray, chunk: int) -> float:
    scores = []
    for start in range(0, len(p), chunk):
        part, total = p[start : start + chunk], 0.0
        marginal = [sum(row[k] for row in part) / len(part) for k in range(p.shape[1])]
        for row in part:
            total += sum(q * (math.log(q) - math.log(m)) for q, m in zip(row, marginal, strict=True))
        scores.append(math.exp(total / len(part)))
    return sum(scores) / len(scores)


def _kernel(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (sum(u * v for u, v in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(x: np.ndarray) -> float:
        pairs = [k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return sum(pairs) / len(pairs)

    between = sum(k(x, y) for x in a for y in b) / (len(a) * len(b))
    return float(within(a) + within(b) - 2 * between)


def _manifolds(a: np.ndarray, b: np.ndarray, k: int = 3) -> tuple[float, float]:
    def radius(points: np.ndarray, i: int) -> float:
        return sorted(math.dist(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    def inside(point: np.ndarray, points: np.ndarray) -> bool:
        return any(math.dist(point, points[i]) <= radius(points, i) for i in range(len(points)))

    return sum(inside(x, b) for x in a) / len(a), sum(inside(y, a) for y in b) / len(b)


def _cknna(a: np.ndarray, b: np.ndarray, k: int) -> float:
    n = len(a)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    kernels = [[[float(u @ v) for v in x] for u in x] for x in unit]
    nearest = [
        [set(sorted((j for j in range(n) if j != i), key=lambda j: -rows[i][j])[:k]) for i in range(n)]
        for rows in kernels
    ]

    def hsic(p: int, q: int) -> float:
        common = [nearest[p][i] & nearest[q][i] for i in range(n)]
        one, two = np.zeros((n, n)), np.zeros((n, n))
        for i in range(n):
            for j in common[i]:
                one[i, j], two[i, j] = kernels[p][i][j], kernels[q][i][j]
        total = sum(one[i, j] * two[j, i] for i in range(n) for j in range(n))
        total += one.sum() * two.sum() / ((n - 1) * (n - 2))
        crossed = sum(one[i, j] * two[j, m] for i in range(n) for j in range(n) for m in range(n))
        return (total - 2 * crossed / (n - 2)) / (n * (n - 3))

    return hsic(0, 1) / math.sqrt(hsic(0, 0) * hsic(1, 1))


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window, values = window / window.sum(), []
    for u, v in zip(x, y, strict=True):
        for i in range(u.shape[0] - 10):
            for j in range(u.shape[1] - 10):
                p, q = u[i : i + 11, j : j + 11], v[i : i + 11, j : j + 11]
                m, n = (window * p).sum(), (window * q).sum()
                spread = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum()
                shared = (window * (p - m) * (q - n)).sum()
                top = (2 * m * n + 0.02**2) * (2 * shared + 0.06**2)
                values.append(top / ((m * m + n * n + 0.02**2) * (spread[0] + spread[1] + 0.06**2)))
    return float(np.mean(values))


def _inception(rng: np.random.Generator) -> Iterator[Row]:
    """The layout of Inception's spatial features, by the convolution written out (random weights)."""
    from importlib.util import find_spec

    if find_spec("torch_fidelity") is None:
        return
    judge, kept = InceptionFeatures(None).eval(), {}
    judge.network.Mixed_6c.register_forward_hook(lambda module, inputs, output: kept.update(x=output))
    images = torch.from_numpy(rng.integers(0, 256, size=(2, 3, 64, 64), dtype=np.uint8))
    found = judge(images)
    layer, x = judge.network.Mixed_6d.branch1x1, kept["x"][1].double().numpy()
    weight, norm = layer.conv.weight[:, :, 0, 0].detach().double().numpy(), layer.bn
    row, column, channel = 3, 11, SPATIAL_CHANNELS - 1
    value = float(weight[channel] @ x[:, row, column]) - float(norm.running_mean[channel])
    value = value / math.sqrt(float(norm.running_var[channel]) + norm.eps) * float(norm.weight[channel])
    value = max(0.0, value + float(norm.bias[channel]))
    at = (row * 17 + column) * SPATIAL_CHANNELS + channel
    yield "sFID's features, one by hand (random weights)", float(found["spatial"][1, at]), value
    logits = found["pooled"][0].double() @ judge.network.fc.weight.T.double()
    expected = float(logits.softmax(0).max())
    yield "Inception's probabilities without bias", float(found["probabilities"][0].max()), expected


def report() -> str:
    """A table of all checks.

    Raises:
        ValueError: a metric is not what the independent computation gives.
    """
    rows = list(checks())
    width = max(len(name) for name, *_ in rows)
    lines = [f"{'metric':{width}}  {'ours':>13}  {'independent':>13}"]
    lines += [f"{name:{width}}  {ours:13.8f}  {other:13.8f}" for name, ours, other in rows]
    wrong = [name for name, ours, other in rows if not math.isclose(ours, other, rel_tol=1e-4, abs_tol=1e-9)]
    if wrong:
        raise ValueError("\n".join([*lines, f"these differ: {'; '.join(wrong)}"]))
    return "\n".join([*lines, "all agree to four digits"])
