"""FD-DINOv2: images as Pillow resizes them, Meta's position embedding, what a result says, refusals."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from repae_lite.commands.main import main
from repae_lite.data.samples import ImageStream
from repae_lite.evaluation import features
from repae_lite.evaluation.evaluate import evaluate, load_judges, load_reference, result_of
from repae_lite.evaluation.features import DinoFeatures, features_of, resized_as_pillow
from repae_lite.evaluation.metrics import feature_stats, frechet_distance
from repae_lite.evaluation.protocols import PROTOCOLS, Protocol

PROTOCOL = Protocol(count=9, judge="inception-random", metrics=("frechet_dinov2",))
YAML = "judge: inception-random\ncount: 9\nmetrics: [frechet_dinov2]\n"


class Stub(nn.Module):
    """Of Inception's name and width, and quick."""

    name, side = "inception-random", None

    def forward(self, images):
        return {"pooled": images.flatten(1)[:, :2048].float()}


@pytest.fixture(scope="module")
def dino() -> DinoFeatures:
    return DinoFeatures("random").eval()


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setattr("repae_lite.evaluation.evaluate.load_judge", lambda *given: Stub())
    return load_judges(PROTOCOL)


def noise(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("side", [32, 224, 256, 500])
def test_images_are_resized_as_pillow_does(side):
    images = noise(2, side)
    resized = [Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC) for x in images]
    ours = resized_as_pillow(torch.from_numpy(images).permute(0, 3, 1, 2), 224).permute(0, 2, 3, 1)
    apart = (ours - torch.from_numpy(np.stack(resized))).abs()
    assert apart.max() <= 1 and (apart > 0).double().mean() < 2e-3


def test_features_are_the_class_token_of_the_normalised_image(dino):
    images = noise(3, 64)
    resized = np.stack(
        [np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in images]
    )
    x = (resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    vit = dino.network
    h = F.conv2d(
        torch.from_numpy(x).float().permute(0, 3, 1, 2), *vit.patch_embed.proj.parameters(), stride=14
    )
    h = torch.cat([vit.cls_token.expand(3, -1, -1), h.flatten(2).mT], dim=1) + vit.pos_embed
    expected = vit.norm(vit.blocks(h))[:, 0]
    found = dino(torch.from_numpy(images).permute(0, 3, 1, 2))["pooled"]
    assert found.shape == (3, 384) and found.std(dim=0).min() > 1e-4
    assert torch.allclose(found, expected, atol=5e-3)  # Pillow may be a grey level off


def test_the_position_embedding_is_resampled_as_metas_code_does(dino, monkeypatch):
    kept = {}
    build = features.build_network

    def keeping(*given):
        network = build(*given)
        kept["grid"] = network.vit.pos_embed.detach()[0, 1:].reshape(37, 37, -1).double()
        return network

    monkeypatch.setattr(features, "build_network", keeping)
    found = DinoFeatures("random").network.pos_embed[0, 1:].reshape(16, 16, -1).double()

    def weights(at: int) -> dict[int, float]:  # of Keys' cubic, a = -0.75, pixels counted from their centres
        place, result = (at + 0.5) * 37 / 16.1 - 0.5, {}
        for near in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - near)
            inner, outer = (1.25 * d - 2.25) * d * d + 1, -0.75 * (((d - 5) * d + 8) * d - 4)
            kept_inside = min(max(near, 0), 36)
            result[kept_inside] = result.get(kept_inside, 0.0) + (inner if d <= 1 else outer)
        return result

    for row, column in ((0, 0), (5, 11), (15, 15)):
        expected = sum(
            u * v * kept["grid"][i, j] for i, u in weights(row).items() for j, v in weights(column).items()
        )
        assert torch.allclose(found[row, column], expected, atol=1e-5)


def test_a_result_says_what_judged_and_that_it_is_no_stranger_to_the_teacher(tmp_path, judge, capsys):
    samples = saved(tmp_path / "samples.npz", arr_0=noise(9, 32))
    reference = saved(tmp_path / "reference.npz", arr_0=noise(8, 32, seed=1))
    sampling = {"mode": "sde", "solver": "euler", "steps": 250, "cfg_scale": 1.0, "guidance_low": 0.0}
    sampling |= {"guidance_high": 1.0, "labels": "random", "count": 9, "to_uint8": "truncate"}
    manifest = {"sampling": sampling, "enc_type": "dinov2-vit-b", "step": 5}
    (tmp_path / "samples.json").write_text(json.dumps(manifest))
    (tmp_path / "mine.yaml").write_text(YAML)
    words = ["evaluate", "--samples", samples, "--reference", reference, "--device", "cpu"]
    assert main([*map(str, words), "--protocol", str(tmp_path / "mine.yaml")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "samples-mine.json").read_text())
    values = [features_of(ImageStream(path), judge.dino).values["pooled"] for path in (samples, reference)]
    expected = frechet_distance(*map(feature_stats, values))
    assert math.isclose(result["metrics"]["frechet_dinov2"], expected, rel_tol=1e-6)
    protocol = result["protocol"]
    assert (protocol["dinov2"], protocol["dinov2_reference_images"]) == ("dinov2-random", 8)
    assert f"FD-DINOv2 by dinov2-random {protocol['dinov2_weights']} against 8 images" in printed
    assert "no independent judge here: the SiT was aligned with dinov2-vit-b" in result["note"]
    assert result["note"] in printed


def test_adms_statistics_are_not_enough_but_its_images_are_and_the_result_says_how_many(tmp_path, judge):
    images = noise(9, 32)
    found = features_of(ImageStream(saved(tmp_path / "samples.npz", arr_0=images)), judge)
    stats = feature_stats(found.values["pooled"])
    arrays = {"mu": stats.mean.numpy(), "sigma": stats.cov.numpy()}
    bare = load_reference(saved(tmp_path / "bare.npz", **arrays), judge)
    with pytest.raises(ValueError, match="frechet_dinov2 need images in the reference"):
        evaluate(found, bare, PROTOCOL)
    whole = load_reference(saved(tmp_path / "whole.npz", arr_0=images[:5], **arrays), judge)
    metrics = evaluate(found, whole, PROTOCOL)
    named = {"name": "mine", "samples": found, "reference": whole, "judge": judge, "manifest": None}
    result = result_of(metrics, PROTOCOL, **named)
    assert result["protocol"]["dinov2_reference_images"] == 5 and result["reference_kind"] == "training set"
    assert "note" not in result  # nobody knows the teacher
    assert "note" not in result_of(metrics, PROTOCOL, teacher="mae-vit-l", **named)


def test_it_is_built_only_where_a_protocol_lists_it(monkeypatch):
    def refuse(*given):
        raise ConnectionError("cannot download dinov2-vit-l: connect, or pass weights=FILE")

    monkeypatch.setattr(features, "build_network", refuse)
    tiny = PROTOCOLS["tiny"]
    assert load_judges(tiny).name == "tiny-evaluator"
    assert "dinov2" not in str(tiny.record())  # hashes of results without it stay what they were
    with pytest.raises(ValueError, match="--dinov2 is given, but frechet_dinov2 is not among"):
        load_judges(tiny, dinov2="dinov2.pth")
    with pytest.raises(
        ConnectionError, match=r"--dinov2 FILE, as from https://.*/dinov2_vitl14_pretrain\.pth"
    ):
        load_judges(Protocol(judge="tiny", metrics=("frechet_dinov2",)))
