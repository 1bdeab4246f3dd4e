"""SiT beyond its agreement with the official one (test_golden): normalisation, dropout, presets, refusals."""

import pytest
import torch
from torch.testing import assert_close

from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SIT_PRESETS, SiT, SiTConfig, check_label_count, sincos_position_embedding


@pytest.fixture()
def sit():
    torch.manual_seed(0)
    model = SiT.from_preset("tiny", depth=2)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_presets_cover_all_sizes_and_patches():
    assert set(SIT_PRESETS) == {f"SiT-{s}/{p}" for s in ("S", "B", "L", "XL") for p in (1, 2, 4, 8)} | {
        "tiny"
    }


@pytest.mark.parametrize(
    ("name", "millions"), [("SiT-S/2", 33), ("SiT-B/2", 130), ("SiT-L/2", 458), ("SiT-XL/2", 675)]
)
def test_preset_sizes_match_the_published_parameter_counts(name, millions):
    """SiT paper, Table 1, without projector and position embedding (which the published counts leave out)."""
    with torch.device("meta"):
        model = SiT.from_preset(name, target_dims=())
    count = sum(p.numel() for n, p in model.named_parameters() if n != "pos_embed")
    assert round(count / 1e6) == pytest.approx(millions, abs=1)


def test_starts_as_zero_velocity():
    out = SiT.from_preset("tiny")(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 10]))
    assert out.shape == (2, 4, 8, 8) and not out.any()


def test_position_embedding_is_a_function_of_row_and_column():
    embedding = sincos_position_embedding(16, 3).reshape(3, 3, 16)
    columns, rows = embedding[..., :8], embedding[..., 8:]
    assert_close(columns, columns[:1].expand(3, -1, -1))
    assert_close(rows, rows[:, :1].expand(-1, 3, -1))
    assert_close(rows[:, 0], columns[0])
    assert len({tuple(v.tolist()) for v in embedding.reshape(9, 16)}) == 9


def test_patches_return_to_their_place():
    model = SiT(
        SiTConfig(
            input_size=4,
            patch_size=2,
            in_channels=3,
            width=16,
            depth=1,
            heads=2,
            alignment_depth=1,
            target_dims=(),
        )
    )
    z = torch.arange(48.0).reshape(1, 3, 4, 4)
    tokens = (
        z.reshape(1, 3, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 4, 12)
    )  # (row, column), then (y, x, channel)
    assert torch.equal(model._unpatchify(tokens), z)


def test_normalize_modes_and_round_trip(sit):
    z = torch.randn(8, 4, 8, 8) * 3 + 2
    sit.set_latent_stats(LatentStats(z.mean((0, 2, 3)), z.std((0, 2, 3), correction=0)))
    running = sit.normalize(z)
    batch = sit.normalize(z, batch_stats=True)
    assert_close(running, batch, rtol=1e-4, atol=1e-4)
    assert_close(batch.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    assert_close(sit.denormalize(running.double()), z, rtol=1e-4, atol=1e-3)
    before = sit.bn.running_mean.clone()
    sit.train()
    sit.normalize(z + 5, batch_stats=False)
    assert torch.equal(before, sit.bn.running_mean)
    stats = sit.latent_stats()
    sit.normalize(z + 5)
    assert_close(sit.bn.running_mean, 0.9 * before + 0.1 * (z + 5).mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert torch.equal(stats.mean, before)  # a copy
    faster = SiT.from_preset("tiny", depth=2, bn_momentum=0.3)
    faster.normalize(z)
    assert_close(faster.bn.running_mean, 0.3 * z.mean((0, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_see_times_in_full_precision(sit, dtype):
    t = torch.tensor([0.9991, 0.12345])
    exact = sit.t_embedder(t)
    half = sit.to(dtype).t_embedder(t).float()
    assert (half - exact).abs().max() < 0.02 * exact.abs().max()
    assert sit(torch.randn(2, 4, 8, 8), t, torch.tensor([1, 2])).dtype == dtype


def test_one_call_gives_the_velocity_and_the_features_at_the_tap(sit):
    z_t, t, labels = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2])
    v_hat, projected = sit(z_t, t, labels, project=True)
    assert torch.equal(v_hat, sit(z_t, t, labels))
    (projector,) = sit.projectors
    assert_close(projected, [projector(sit.features(z_t, t, labels))])
    none, same = sit(z_t, t, labels, project=True, align_only=True)
    assert none is None and torch.equal(same[0], projected[0])


REFUSED = {
    "preset": (lambda s: SiT.from_preset("SiT-H/2"), "unknown SiT preset 'SiT-H/2': choose one of SiT-S/1"),
    "patch": (
        lambda s: SiT.from_preset("SiT-S/8", input_size=20),
        "latent size 20 is not a multiple of patch size 8",
    ),
    "heads": (lambda s: SiT.from_preset("tiny", heads=3), "width 128 must be a multiple of heads 3"),
    "tap": (lambda s: SiT.from_preset("tiny", alignment_depth=7), "alignment depth 7 is outside 1 to 6"),
    "channels": (
        lambda s: s(torch.zeros(1, 32, 8, 8), torch.zeros(1), torch.zeros(1).long()),
        r"takes \(B, 4, 8, 8\)",
    ),
    "size": (
        lambda s: s(torch.zeros(1, 4, 16, 16), torch.zeros(1), torch.zeros(1).long()),
        r"shape \(1, 4, 16, 16\)",
    ),
    "labels count": (
        lambda s: s(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.tensor([1])),
        "for 2 latents: give one",
    ),
    "no patches": (lambda s: SiT.from_preset("tiny", patch_size=0), "patch_size is 0: it must be at least 1"),
    "target dims": (lambda s: SiT.from_preset("tiny", target_dims=128), r"target_dims is 128: give a tuple"),
    "dropout": (lambda s: SiT.from_preset("tiny", label_dropout=1.5), "label_dropout is 1.5"),
    "depth": (
        lambda s: s.features(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1).long(), 99),
        "depth 99 is outside 0 to 2",
    ),
    "statistics": (
        lambda s: s.set_latent_stats(LatentStats(torch.zeros(32), torch.ones(32))),
        "32 channels for a SiT of 4",
    ),
    "label": (
        lambda s: s(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.tensor([11])),
        "label 11 is outside 0 to 9",
    ),
    "label 1.7": (
        lambda s: s(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.tensor([1.7])),
        r"labels have dtype torch\.float32",
    ),
    "label true": (
        lambda s: s(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.tensor([True])),
        r"labels have dtype torch\.bool",
    ),
    "t = 7": (
        lambda s: s(torch.zeros(2, 4, 8, 8), torch.tensor([0.0, 7.0]), torch.zeros(2).long()),
        "times reach from 0 to 7: they go from 0, data, to 1, noise",
    ),
    "t nan": (
        lambda s: s(torch.zeros(1, 4, 8, 8), torch.tensor([float("nan")]), torch.zeros(1).long()),
        "times reach from nan",
    ),
    "one time for two": (
        lambda s: s(torch.zeros(2, 4, 8, 8), torch.zeros(1), torch.zeros(2).long()),
        r"times have shape \(1,\) and dtype torch\.float32 for 2 latents: give one float for each",
    ),
    "whole times": (
        lambda s: s(torch.zeros(1, 4, 8, 8), torch.zeros(1).long(), torch.zeros(1).long()),
        r"dtype torch\.int64 for 1 latents",
    ),
    "no latents": (
        lambda s: s(torch.zeros(0, 4, 8, 8), torch.zeros(0), torch.zeros(0).long()),
        r"latents have shape \(0, 4, 8, 8\)",
    ),
    "whole latents": (
        lambda s: s(torch.zeros(1, 4, 8, 8).long(), torch.zeros(1), torch.zeros(1).long()),
        r"latents have dtype torch\.int64",
    ),
    "normalize": (lambda s: s.normalize(torch.zeros(2, 1, 8, 8)), "this SiT takes 4 channels"),
    "denormalize": (lambda s: s.denormalize(torch.zeros(2, 1, 8, 8)), "the latent statistics 4 channels"),
    "no spread": (
        lambda s: s.set_latent_stats(LatentStats(torch.zeros(4), torch.zeros(4))),
        "positive, finite standard deviations",
    ),
    "half a block": (lambda s: SiT.from_preset("tiny", depth=2.5), "depth is 2.5: it must be a whole number"),
    "true": (lambda s: SiT.from_preset("tiny", heads=True), "heads is True: it must be a whole number"),
    "target width": (
        lambda s: SiT.from_preset("tiny", target_dims=(128, 0)),
        r"target_dims is \(128, 0\): it must be at least 1",
    ),
    "label std": (lambda s: SiT.from_preset("tiny", label_std=float("nan")), "label_std is nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(sit, case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(sit)


def test_fixed_latent_statistics_never_move():
    torch.manual_seed(0)
    sit = SiT.from_preset("tiny", fixed_latent_stats=True)
    sit.set_latent_stats(LatentStats(torch.ones(4), torch.full((4,), 2.0)))
    z = 3 * torch.randn(8, 4, 8, 8)
    expected = (z - 1) / (4 + 1e-4) ** 0.5
    for mode in (True, False):
        torch.testing.assert_close(sit.train(mode).normalize(z), expected)
        torch.testing.assert_close(sit.normalize(z, batch_stats=True), expected)
    assert sit.latent_stats().std.tolist() == [2.0] * 4


def test_the_convolutional_projector_sees_a_token_and_its_neighbours():
    torch.manual_seed(0)
    sit = SiT.from_preset("tiny", projector="conv").eval()
    (project,) = sit.projectors
    h = torch.randn(2, 16, 128)
    grid = h.reshape(2, 4, 4, 128)
    out = project(h)
    assert out.shape == (2, 16, 128)
    expected = project.bias.clone()  # token 5 is at row 1, column 1
    for i in range(3):
        for j in range(3):
            expected = expected + project.weight[:, :, i, j] @ grid[0, i, j]
    torch.testing.assert_close(out[0, 5], expected, rtol=1e-4, atol=1e-5)
    _, projected = sit(torch.randn(2, 4, 8, 8), torch.rand(2), torch.arange(2), project=True)
    assert projected[0].shape == (2, 16, 128) and projected[0].requires_grad


@pytest.mark.parametrize(
    ("labels", "count", "words"),
    [
        ([0, 1], 2, "labels are a list: give a tensor"),
        (torch.zeros(0).long(), 0, "the batch is empty: give at"),
    ],
)
def test_labels_are_a_tensor_that_holds_some(labels, count, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        check_label_count(labels, count, "sample")
