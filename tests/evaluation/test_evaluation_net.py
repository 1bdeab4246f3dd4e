"""The evaluation network: shapes, size, and refusals."""

import pytest
import torch

from repae_lite.evaluation.evaluation_net import EvaluationNet


def test_evaluation_net_shapes_and_size():
    net = EvaluationNet(num_classes=7).eval()
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert net(x).shape == (3, 7)
    assert net.features(x).shape == (3, EvaluationNet.width)
    assert 300_000 <= sum(p.numel() for p in net.parameters()) <= 400_000
    torch.testing.assert_close(net(x), net.head(net.features(x)))
    torch.testing.assert_close(net.features(x), net.body(x).flatten(2).mean(2))  # averaged over positions


def test_evaluation_net_names_wrong_images():
    net = EvaluationNet()
    with pytest.raises(ValueError, match=r"needs images \(B, 3, 32, 32\), got \(1, 3, 64, 64\)"):
        net(torch.zeros(1, 3, 64, 64))
    with pytest.raises(TypeError, match=r"float images in \[-1, 1\], got torch.uint8"):
        net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
