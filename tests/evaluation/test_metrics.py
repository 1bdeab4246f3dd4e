"""Metrics against closed forms, scipy and plain loops."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from repae_lite.evaluation.metrics import (
    FeatureStats,
    cknna,
    effective_dimensions,
    feature_stats,
    frechet_distance,
    latent_structure,
    linear_probe,
    psnr,
    ssim,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# ---- Fréchet distance


def test_feature_stats_are_numpys(generator):
    features = torch.randn(50, 4, generator=generator)
    stats = feature_stats(features)
    np.testing.assert_allclose(stats.mean, features.double().numpy().mean(0))
    np.testing.assert_allclose(stats.cov, np.cov(features.double().numpy(), rowvar=False))
    assert stats.count == 50 and stats.cov.dtype == torch.float64
    assert feature_stats(features[:, :1]).cov.shape == (1, 1)


def test_frechet_of_diagonal_gaussians_has_a_closed_form():
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 1.0, 0.0])
    a, b = (FeatureStats(m, torch.diag(s**2), 9) for m, s in ((mean_a, std_a), (mean_b, std_b)))
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("count", [400, 12])  # 12 samples of 20 features: singular covariances
def test_frechet_agrees_with_sqrtm_and_is_symmetric(generator, count):
    mix = torch.randn(20, 20, generator=generator)
    a = feature_stats(torch.randn(count, 20, generator=generator))
    b = feature_stats(torch.randn(count, 20, generator=generator) @ mix + 0.5)
    cov_a, cov_b = a.cov.numpy(), b.cov.numpy()
    ridge = 0.0 if count > 20 else 1e-12 * np.eye(20)
    root = scipy.linalg.sqrtm((cov_a + ridge) @ (cov_b + ridge)).real
    expected = float(((a.mean - b.mean) ** 2).sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4 if count < 20 else 1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)


def test_frechet_of_a_set_with_itself_is_never_negative():
    for seed in range(20):  # rounding alone makes some of these negative
        a = feature_stats(1e3 * torch.randn(60, 40, generator=torch.Generator().manual_seed(seed)))
        assert 0 <= frechet_distance(a, a) < 1e-3


def test_frechet_errors():
    a = feature_stats(torch.arange(8.0).reshape(4, 2))
    with pytest.raises(ValueError, match="widths 2 and 3"):
        frechet_distance(a, FeatureStats(torch.zeros(3), torch.eye(3), 4))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(a, FeatureStats(torch.tensor([math.nan, 0]), torch.eye(2), 4))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        frechet_distance(a, FeatureStats(torch.zeros(2), torch.eye(2), 1))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        feature_stats(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        feature_stats(torch.tensor([[1.0, math.nan], [0, 0]]))
    with pytest.raises(ValueError, match=r"must be \(N, D\), got \(4, 2, 2\)"):
        feature_stats(torch.zeros(4, 2, 2))


# ---- images


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[0] += 0.2  # MSE .04, 4 / .04 = 100
    torch.testing.assert_close(psnr(x, y), torch.tensor([20.0, math.inf]))


def test_ssim_against_a_loop_over_windows(generator):
    x = torch.rand(2, 3, 13, 14, generator=generator, dtype=torch.float64) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)).clamp(-1, 1)
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    expected = np.zeros(2)
    for b in range(2):
        values = []
        for c in range(3):
            for i in range(3):
                for j in range(4):
                    p, q = (t[b, c, i : i + 11, j : j + 11].numpy() for t in (x, y))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    top = (2 * mp * mq + 0.0004) * (2 * cov + 0.0036)
                    values.append(top / ((mp**2 + mq**2 + 0.0004) * (vp + vq + 0.0036)))
        expected[b] = np.mean(values)
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-10)
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))


def test_image_metrics_errors():
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\) and \(1, 3, 4, 4\)"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 4, 4))
    with pytest.raises(TypeError, match="float in"):
        psnr(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="window is 11x11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


# ---- features


def _naive_cknna(a: np.ndarray, b: np.ndarray, k: int, unbiased: bool) -> float:
    """The definition in loops over pairs and triples."""
    n = len(a)
    kernels = [(f / np.linalg.norm(f, axis=1, keepdims=True)) for f in (a, b)]
    kernels = [f @ f.T for f in kernels]

    def near(kernel, i):
        others = [j for j in range(n) if not (unbiased and j == i)]
        return set(sorted(others, key=lambda j: -kernel[i, j])[:k])

    def masked(kernel, p, q):
        return np.array(
            [[kernel[i, j] * (j in near(p, i) and j in near(q, i)) for j in range(n)] for i in range(n)]
        )

    def hsic(p, q):
        x, y = masked(p, p, q), masked(q, p, q)
        if not unbiased:
            h = np.eye(n) - 1 / n
            return np.trace(x @ h @ y @ h)
        x, y = x - np.diag(np.diag(x)), y - np.diag(np.diag(y))
        pairs = sum(x[i, j] * y[j, i] for i in range(n) for j in range(n))
        triples = sum(x[i, j] * y[j, m] for i in range(n) for j in range(n) for m in range(n))
        return (pairs + x.sum() * y.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * triples) / n / (n - 3)

    k_, l_ = kernels
    return hsic(k_, l_) / math.sqrt(hsic(k_, k_) * hsic(l_, l_))


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("k", [2, 5, 11])
def test_cknna_against_loops(generator, unbiased, k):
    a = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    b = a @ torch.randn(3, 5, generator=generator, dtype=torch.float64)
    expected = _naive_cknna(a.numpy(), b.numpy(), k, unbiased)
    assert cknna(a, b, k=k, unbiased=unbiased) == pytest.approx(expected, rel=1e-10)


def test_cknna_of_equal_rotated_and_unrelated_features(generator):
    a = torch.randn(200, 16, generator=generator)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    assert cknna(a, a) == pytest.approx(1)
    assert cknna(a, a[:, :8]) == cknna(a, a[:, :8], k=10)  # REPA's k is the default
    assert cknna(a, 3 * a @ rotation) == pytest.approx(1, abs=1e-6)
    assert abs(cknna(a, torch.randn(200, 16, generator=generator))) < 0.1
    assert 0.2 < cknna(a, a + 0.3 * torch.randn(200, 16, generator=generator)) < 0.95


def test_cknna_errors(generator):
    a = torch.randn(20, 4, generator=generator)
    with pytest.raises(ValueError, match="same images, got 20 and 19"):
        cknna(a, a[:-1])
    for k, n in ((1, 20), (20, 20), (2, 3)):
        with pytest.raises(ValueError, match=f"got k = {k}, N = {n}"):
            cknna(a[:n], a[:n], k=k)
    with pytest.raises(ValueError, match="cannot normalise"):
        cknna(a, torch.zeros(20, 4))


def test_linear_probe_on_separable_and_random_labels(generator):
    labels = torch.arange(300) % 3
    centres = 4 * torch.randn(3, 8, generator=generator)
    features = centres[labels] + torch.randn(300, 8, generator=generator)
    split = (features[:200], labels[:200], features[200:], labels[200:])
    accuracy = linear_probe(*split)
    assert accuracy > 0.97
    shuffled = labels[torch.randperm(300, generator=generator)]
    assert linear_probe(features[:200], shuffled[:200], features[200:], shuffled[200:]) < 0.55
    with torch.no_grad():  # a caller's no_grad must not break the fit
        assert linear_probe(*split) == accuracy
    dead = torch.nn.functional.pad(features, (0, 1))  # a feature that is always 0 changes nothing
    assert linear_probe(dead[:200], labels[:200], dead[200:], labels[200:]) == accuracy


def test_linear_probe_minimises_the_stated_objective(generator):
    """With classes of unequal size, so that the bias counts, and a test set with other statistics."""
    labels = torch.randint(0, 10, (2000,), generator=generator).clamp(max=5) // 2
    features = 0.8 * torch.randn(3, 5, generator=generator)[labels] + torch.randn(
        2000, 5, generator=generator
    )
    features[100:] += 0.3
    mean, std = features[:100].double().mean(0), features[:100].double().std(0)
    x, y = ((features.double() - mean) / std).numpy(), labels.numpy()

    def logits(parameters, inputs):
        return inputs @ parameters[:15].reshape(5, 3) + parameters[15:]

    def objective(parameters):
        rows = logits(parameters, x[:100])
        entropy = np.log(np.exp(rows).sum(1)) - rows[np.arange(100), y[:100]]
        return entropy.mean() + 0.5 / 2 * (parameters[:15] ** 2).sum()  # the bias is not penalised

    fit = scipy.optimize.minimize(objective, np.zeros(18), method="BFGS", options={"gtol": 1e-9}).x
    expected = (logits(fit, x[100:]).argmax(1) == y[100:]).mean()
    found = linear_probe(features[:100], labels[:100], features[100:], labels[100:], l2=0.5)
    assert found == pytest.approx(expected, abs=0.002)  # other objectives are off by 0.03 and more


def test_linear_probe_matches_scikit_learn(generator):
    linear_model = pytest.importorskip("sklearn.linear_model")
    labels = torch.arange(400) % 4
    features = torch.randn(4, 6, generator=generator)[labels] + torch.randn(400, 6, generator=generator)
    train, test = features[:200].double(), features[200:].double()
    mean, std = train.mean(0), train.std(0)
    model = linear_model.LogisticRegression(C=1 / (1e-3 * 200), tol=1e-8, max_iter=1000)
    model.fit(((train - mean) / std).numpy(), labels[:200].numpy())
    expected = model.score(((test - mean) / std).numpy(), labels[200:].numpy())
    assert linear_probe(train, labels[:200], test, labels[200:]) == pytest.approx(expected, abs=0.011)


def test_linear_probe_errors():
    with pytest.raises(ValueError, match=r"train_labels must be \(4,\)"):
        linear_probe(torch.zeros(4, 2), torch.zeros(3), torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="train width 2, test width 3"):
        linear_probe(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 3), torch.zeros(4))


# ---- latents


def test_latent_structure_by_hand():
    z = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])  # along h: 2 + 2, along w: 1 + 1
    found = latent_structure(z)
    assert found["total_variation"] == pytest.approx(6)
    assert found["spatial_variance"] == pytest.approx(1.25)
    assert found["channel_std"] == pytest.approx([math.sqrt(1.25)])


def test_latent_structure_against_loops_over_images_and_channels(generator):
    z = torch.randn(2, 3, 4, 5, generator=generator) * torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    z = z + torch.tensor([0.0, 3.0])[:, None, None, None]
    maps = z.double().numpy().reshape(6, 4, 5)
    found = latent_structure(z)
    assert found["spatial_variance"] == pytest.approx(np.mean([m.var() for m in maps]))
    variation = [np.abs(np.diff(m, axis=0)).sum() + np.abs(np.diff(m, axis=1)).sum() for m in maps]
    assert found["total_variation"] == pytest.approx(np.sum(variation) / 2)
    assert found["channel_std"] == pytest.approx([z[:, c].double().numpy().std() for c in range(3)])


def test_high_frequency_share_orders_textures(generator):
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    checkerboard = ((rows + columns) % 2 * 2 - 1).expand(2, 3, 8, 8)
    slow_wave = torch.cos(2 * math.pi * columns / 8).expand(2, 3, 8, 8)
    gradient = (rows + columns).expand(2, 3, 8, 8)
    noise = torch.randn(400, 3, 8, 8, generator=generator)
    shares = [latent_structure(z)["high_frequency_share"] for z in (slow_wave, gradient, noise, checkerboard)]
    assert shares[0] == pytest.approx(0, abs=1e-12) and shares[-1] == pytest.approx(1)
    assert shares == sorted(shares) and shares[1] < 0.2
    assert shares[2] == pytest.approx(51 / 63, abs=0.01)  # white noise: 51 of the 63 frequencies lie above
    louder = latent_structure(100 * noise)["high_frequency_share"]
    assert louder == pytest.approx(shares[2])  # scale is ignored
    two = torch.stack([100 + 10 * slow_wave[:, 0], checkerboard[:, 0]], dim=1)
    assert latent_structure(two)["high_frequency_share"] == pytest.approx(0.5)  # each channel counts alike
    assert latent_structure(torch.full((2, 3, 8, 8), 0.1))["high_frequency_share"] == 0


def test_latent_structure_errors():
    with pytest.raises(ValueError, match=r"needs \(B, C, h, w\)"):
        latent_structure(torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="not finite"):
        latent_structure(torch.full((1, 1, 2, 2), math.nan))


def test_effective_dimensions_against_eigenvalues_and_extremes():
    spread = torch.linspace(0.1, 3, 9).reshape(3, 3)
    z = spread * torch.randn(400, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    values = np.linalg.eigvalsh(np.cov(z.flatten(1).numpy(), rowvar=False))
    assert effective_dimensions(z) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-5)
    assert effective_dimensions(z) == pytest.approx(effective_dimensions(7 * z + 1), rel=1e-4)
    line = torch.arange(5.0)[:, None] * torch.ones(1, 4)
    assert effective_dimensions(line) == pytest.approx(1)
    simplex = torch.eye(6)  # its six corners differ in five directions
    assert effective_dimensions(simplex) == pytest.approx(5)
    assert effective_dimensions(z[:10]) == pytest.approx(effective_dimensions(z[:10].repeat(4, 1, 1, 1)))
    assert effective_dimensions(line + torch.arange(4.0)) == pytest.approx(
        1
    )  # each coordinate has its own mean
    with pytest.raises(ValueError, match="needs latents that differ"):
        effective_dimensions(torch.ones(3, 4))
