"""Losses against values computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from repae_lite.method.losses import (
    LPIPSLoss,
    TinyPerceptualLoss,
    VAELossConfig,
    alignment_loss,
    hinge_discriminator_loss,
    spatial_norm,
    vae_regularization_loss,
    velocity_loss,
)


def test_alignment_loss_against_a_loop():
    projected, targets = (
        [torch.randn(2, 3, 5), torch.randn(2, 3, 4)],
        [torch.randn(2, 3, 5), torch.randn(2, 3, 4)],
    )
    total = 0.0
    for h, target in zip(projected, targets, strict=True):
        for b in range(2):
            for n in range(3):
                total -= float(h[b, n] @ target[b, n] / (h[b, n].norm() * target[b, n].norm()))
    assert float(alignment_loss(projected, targets)) == pytest.approx(total / 12, rel=1e-5)
    assert float(alignment_loss(targets, targets)) == pytest.approx(-1)


def test_spatial_norm_by_its_definition():
    tokens = 3 + 2 * torch.randn(2, 9, 5, dtype=torch.float64)
    found = spatial_norm(tokens, gamma=0.6)
    for b in range(2):
        for d in range(5):
            column = tokens[b, :, d].tolist()
            mean = sum(column) / 9
            std = (sum((v - mean) ** 2 for v in column) / 8) ** 0.5
            assert found[b, :, d].tolist() == pytest.approx([(v - 0.6 * mean) / (std + 1e-6) for v in column])
    # With all of the mean gone, what an image's tokens share no longer counts.
    assert_close(spatial_norm(tokens + torch.randn(2, 1, 5), gamma=1.0), spatial_norm(tokens, gamma=1.0))
    assert spatial_norm(tokens.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 3e3])
def test_alignment_loss_survives_half_precision(dtype, size):
    """Squares of these values over- and underflow in float16 (D7)."""
    h = (torch.ones(1, 2, 64) * size).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = alignment_loss([h], [torch.ones(1, 2, 64)])
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(-1, abs=1e-3)
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["features", "tokens", "both"])
def test_alignment_loss_normalises_both_sides_in_float32(dtype, side):
    """Half-precision inputs are rounded once, before; normalised in half they would be rounded again (D7)."""
    h, target = torch.randn(2, 1, 3, 8)
    h = h if side == "tokens" else h.to(dtype)
    target = target if side == "features" else target.to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        loss = alignment_loss([h], [target])
    exact = -F.cosine_similarity(h.double(), target.double(), dim=-1).mean()
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(exact), abs=1e-6)
    large = torch.full((1, 1, 64), 3e4, dtype=dtype)  # its norm, 2.4e5, is more than float16 can hold
    assert float(alignment_loss([large], [large])) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocity_loss_squares_in_float32(dtype):
    v_hat, v = (300 * torch.randn(2, 2, 1, 4, 4)).to(dtype)  # squares are more than float16 can hold
    expected = (v_hat.double() - v.double()).square().mean((1, 2, 3))
    assert_close(velocity_loss(v_hat, v), expected.float(), rtol=1e-5, atol=0)


def test_velocity_loss_is_per_image():
    v = torch.zeros(2, 1, 2, 2)
    v_hat = torch.stack([torch.full((1, 2, 2), 2.0), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])])
    assert velocity_loss(v_hat, v).tolist() == [4.0, 0.25]


def test_hinge_loss():
    assert float(
        hinge_discriminator_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0]))
    ) == pytest.approx(0.5 * (0.5 + 1.0))


def test_vae_loss_terms_and_weights():
    x, x_hat, kl = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5), torch.tensor([10.0, 30.0])
    l1 = vae_regularization_loss(
        x,
        x_hat,
        kl,
        VAELossConfig(),
        perceptual=lambda a, b: (b - a).mean((1, 2, 3)),
        logits_fake=torch.tensor([2.0]),
    )
    assert {k: round(float(v), 7) for k, v in l1.items()} == {
        "reconstruction": 0.5, "perceptual": 0.5, "kl": 2e-5, "weighted_gan": -0.2, "vae_reg": 0.80002,
    }  # fmt: skip
    l2 = vae_regularization_loss(x, x_hat, kl, VAELossConfig(pixel="l2", perceptual_weight=0.0))
    assert l2.keys() == {"reconstruction", "kl", "vae_reg"} and float(l2["reconstruction"]) == 0.25


def test_lpips_is_frozen_and_stays_in_eval_mode():
    loss = LPIPSLoss(pretrained_trunk=False).train()
    assert not any(module.training for module in loss.modules() if module is not loss)
    assert not any(p.requires_grad for p in loss.parameters())
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert float(loss(x, x)) == 0.0 < float(loss(x, -x))


def test_lpips_keeps_no_graph_for_real_images():
    loss, graphs = LPIPSLoss(pretrained_trunk=False), []
    loss.net.net.slice5.register_forward_hook(lambda *call: graphs.append(call[-1].requires_grad))
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    loss(x, x.clone().requires_grad_()).sum().backward()
    assert graphs == [False, True]


def test_tiny_perceptual_distance_has_gradient_and_is_zero_for_equal_images():
    torch.manual_seed(0)
    loss = TinyPerceptualLoss()
    x, x_hat = torch.rand(3, 3, 32, 32) * 2 - 1, (torch.rand(3, 3, 32, 32) * 2 - 1).requires_grad_()
    assert_close(loss(x, x), torch.zeros(3))
    distance = loss(x, x_hat)
    distance.sum().backward()
    assert (
        distance.shape == (3,) and (distance > 0).all() and x_hat.grad.isfinite().all() and x_hat.grad.any()
    )


def test_refusals():
    with pytest.raises(ValueError, match="unknown pixel loss 'huber'"):
        VAELossConfig(pixel="huber")
    with pytest.raises(ValueError, match="unknown lpips_range 'both'"):
        LPIPSLoss("both")
    with pytest.raises(ValueError, match="no perceptual network was given"):
        vae_regularization_loss(
            torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1), VAELossConfig()
        )
    for name in ("pixel_weight", "perceptual_weight", "kl_weight", "gan_weight", "gan_start"):
        for value in (-1e-3, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"{name} is {value}: it must be 0 or more"):
                VAELossConfig(**{name: value})


X = torch.zeros(2, 3, 32, 32)
ALIKE = {
    "velocities": lambda: velocity_loss(X, X[:, :1]),
    "images": lambda: vae_regularization_loss(X, X[:1], torch.zeros(2), VAELossConfig()),
    "perceptual": lambda: TinyPerceptualLoss()(X, X[:1]),
}


@pytest.mark.parametrize("case", ALIKE)
def test_what_would_broadcast_is_refused(case):
    with pytest.raises(ValueError, match=r"have shapes \(2, 3, 32, 32\) and .*: give two alike"):
        ALIKE[case]()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"the KL has shape \(1,\) for 2 images"):
        vae_regularization_loss(X, X, torch.zeros(1), VAELossConfig())
    for tokens, gamma in ((torch.zeros(2, 1, 4), 0.6), (torch.zeros(2, 4), 0.6), (torch.zeros(2, 4, 4), 1.1)):
        with pytest.raises(ValueError, match="give tokens"):
            spatial_norm(tokens, gamma)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"x" * 5000])
def test_a_damaged_vgg_in_torchs_cache_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path} is (not a whole|empty).*remove {path}, and it is downl"):
        LPIPSLoss()
