"""Vision encoders: preprocessing and tokens recomputed by hand, official file layouts, every full-size
network on the meta device.

Weights that matter are seeded random numbers in shallow, narrow networks: nothing is downloaded.
"""

import math
import re
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from repae_lite.method.losses import sit_losses
from repae_lite.networks import encoder_table
from repae_lite.networks.encoder_table import ENCODERS, find_spec
from repae_lite.networks.encoders import (
    ENCODER_NAMES,
    Preprocess,
    VisionEncoder,
    check_token_grid,
    load_encoders,
)
from repae_lite.networks.sit import SiT


def builds_on_meta():
    """Whether this timm builds networks on the meta device (old ones read numbers back from it)."""
    try:
        with torch.device("meta"):
            timm.create_model("test_vit")
    except (NotImplementedError, RuntimeError):
        return False
    return True


pytestmark = pytest.mark.filterwarnings("ignore:.*random weights. a stand-in:UserWarning")
SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 4}
needs_hub = pytest.mark.skipif(
    not timm.models._hub._has_hf_hub, reason="this timm does not understand this huggingface_hub"
)
NAMES = [name for name, spec in ENCODERS.items() if timm.is_model(spec.model)]


@pytest.fixture
def small(monkeypatch):
    """Loads an encoder whose table row is made narrow and shallow; every weight is then drawn anew, so that
    each of them matters.
    """

    def load(name, resolution=256, *, weights="random", **timm_args):
        monkeypatch.setitem(ENCODERS, name, replace(ENCODERS[name], timm_args=SMALL | timm_args))
        encoder = VisionEncoder.from_name(name, resolution, weights=weights)
        if weights == "random":
            generator = torch.Generator().manual_seed(1)
            for p in encoder.parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.data = noise / p[0].numel() ** 0.5 if p.ndim > 1 and "embed" not in name else 0.5 * noise
        return encoder

    return load


def pictures(resolution, count=2, seed=0):
    return torch.randint(
        0,
        256,
        (count, 3, resolution, resolution),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


# ---------------------------------------------------------------- preprocessing

IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
OPENAI = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])


def cubic(x, a):
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resize(x, size, kernel, support, antialias):
    """Separable resampling of the last two axes, pixel centres at half pixels, as a matrix product."""
    old = x.shape[-1]
    scale = max(old / size, 1) if antialias else 1
    matrix = np.zeros((size, old))
    for row in range(size):
        centre = (row + 0.5) * old / size - 0.5
        taps = np.arange(math.floor(centre - support * scale), math.ceil(centre + support * scale) + 1)
        weights = kernel((taps - centre) / scale)
        if antialias:  # taps outside the image are left out; otherwise they take the edge's value
            weights, taps = weights[(taps >= 0) & (taps < old)], taps[(taps >= 0) & (taps < old)]
        np.add.at(matrix[row], taps.clip(0, old - 1), weights / weights.sum())
    return matrix @ x @ matrix.T


def bicubic(x, size):
    return resize(x, size, lambda d: cubic(d, -0.75), 2, False)


def bicubic_antialiased(x, size):
    return resize(x, size, lambda d: cubic(d, -0.5), 2, True)


def bilinear_antialiased(x, size):
    return resize(x, size, lambda d: np.maximum(1 - np.abs(d), 0), 1, True)


def normalise(x, statistics):
    return (x - statistics[0][:, None, None]) / statistics[1][:, None, None]


# in the order of the official code
RECIPES = {
    "dinov2": lambda x, r: bicubic(normalise(x, IMAGENET), 224 * (r // 256)),
    "jepa": lambda x, r: bicubic(normalise(x, IMAGENET), 224 * (r // 256)),
    "clip": lambda x, r: normalise(bicubic(x, 224 * (r // 256)), OPENAI),
    "dinov1": lambda x, r: normalise(x, IMAGENET),
    "mocov3": lambda x, r: normalise(x, IMAGENET),
    "mae": lambda x, r: normalise(x, IMAGENET),
    "dinov3": lambda x, r: normalise(x, IMAGENET),
}


@pytest.mark.parametrize(
    "name",
    ["dinov2-vit-b", "jepa-vit-h", "clip-vit-L", "dinov1-vit-b", "mocov3-vit-b", "mae-vit-l", "dinov3-vit-b"],
)
@pytest.mark.parametrize("resolution", [256, 512])
def test_preprocessing_is_the_official_one(name, resolution):
    images = pictures(resolution, 1)
    expected = RECIPES[name.split("-")[0]](images.numpy().astype(np.float64) / 255, resolution)
    prepared = Preprocess(ENCODERS[name], resolution)(images)
    assert prepared.dtype == torch.float32
    np.testing.assert_allclose(
        prepared.numpy(), expected, atol=5e-4
    )  # torch computes source positions in float32


def test_rows_of_a_family_share_their_preprocessing():
    def wants(spec):
        return (
            spec.patch_size,
            spec.mean,
            spec.std,
            spec.resize_first,
            spec.interpolation,
            spec.antialias,
            spec.final_norm,
        )

    for family in RECIPES:
        assert len({wants(spec) for name, spec in ENCODERS.items() if name.startswith(family)}) == 1


def test_timm_models_are_fed_by_timms_own_configuration():
    spec = find_spec("timm:vit_base_patch14_dinov2")
    assert (spec.tag, spec.patch_size, spec.prefix_tokens) == ("lvd142m", 14, 1)
    images = pictures(96, 1)
    expected = normalise(bicubic_antialiased(images.numpy() / 255, 84), IMAGENET)
    np.testing.assert_allclose(Preprocess(spec, 96)(images).numpy(), expected, atol=2e-4)

    spec = replace(spec, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    expected = normalise(bilinear_antialiased(images.numpy() / 255, 84), np.full((2, 3), 0.5))
    np.testing.assert_allclose(Preprocess(spec, 96)(images).numpy(), expected, atol=2e-4)

    assert find_spec("timm:vit_base_patch16_siglip_224.webli").mean == (0.5, 0.5, 0.5)


# ---------------------------------------------------------------- tokens


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def swiglu(x):
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def vit_by_hand(state, x, *, patch, heads, act=F.gelu, eps=1e-6, final_norm=True):
    """All tokens of a vision transformer, from its state dict; class and register tokens first."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def split(x):  # (B, N, D) to (B, heads, N, D / heads)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    weight = state["patch_embed.proj.weight"]
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, rows, columns, p, p)
    h = torch.einsum("bcrqij,dcij->brqd", patches, weight).flatten(1, 2) + state.get(
        "patch_embed.proj.bias", 0
    )
    first = [state[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in state]
    count = state["pos_embed"].shape[1]
    if count == h.shape[1]:  # of patches only
        h = torch.cat([*first, h + state["pos_embed"]], 1)
    else:
        h = torch.cat([*first, h], 1) + state["pos_embed"]
    if "norm_pre.weight" in state:
        h = norm(h, "norm_pre")
    for block in range(SMALL["depth"]):
        b = f"blocks.{block}"
        q, k, v = map(split, linear(norm(h, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, -1))
        attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        update = linear((attention @ v).transpose(1, 2).flatten(2), f"{b}.attn.proj")
        h = h + update * state.get(f"{b}.ls1.gamma", 1)
        update = linear(act(linear(norm(h, f"{b}.norm2"), f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
        h = h + update * state.get(f"{b}.ls2.gamma", 1)
    return norm(h, "norm") if final_norm else h


HANDMADE = {  # official settings: tokens in front, what differs from a plain pre-norm transformer
    "dinov2-vit-b": (1, {"patch": 14}),
    "dinov2-vit-b-reg": (5, {"patch": 14}),
    "dinov2-vit-g": (1, {"patch": 14, "act": swiglu}),
    "dinov1-vit-b": (1, {"patch": 16}),
    "mocov3-vit-b": (1, {"patch": 16}),
    "clip-vit-L": (1, {"patch": 14, "act": quick_gelu, "eps": 1e-5, "final_norm": False}),
    "jepa-vit-h": (0, {"patch": 14}),
    "mae-vit-l": (1, {"patch": 16, "final_norm": False}),
}


@pytest.mark.parametrize("name", HANDMADE)
def test_tokens_are_those_of_a_handmade_network(small, name):
    prefix, settings = HANDMADE[name]
    encoder = small(name, 64)
    images = pictures(64)
    with torch.no_grad():
        expected = vit_by_hand(
            dict(encoder.network.vit.state_dict()), encoder.preprocess(images), heads=4, **settings
        )
    tokens = encoder(images)
    assert tokens.shape == (2, 16, 64) and encoder.embed_dim == 64 and encoder.grid_size == 4
    torch.testing.assert_close(tokens, expected[:, prefix:], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif("dinov3-vit-b" not in NAMES, reason="needs timm 1.0.20")
def test_dinov3_drops_class_and_registers_and_keeps_its_norm(small):
    encoder = small("dinov3-vit-b", 64)
    images, vit = pictures(64), encoder.network.vit
    with torch.no_grad():
        everything = vit.forward_features(encoder.preprocess(images))
        before = vit.norm
        vit.norm = nn.Identity()
        raw = vit.forward_features(encoder.preprocess(images))
        vit.norm = before
    assert everything.shape[1] == 5 + 16
    torch.testing.assert_close(encoder(images), everything[:, 5:])
    torch.testing.assert_close(everything, F.layer_norm(raw, (64,), before.weight, before.bias, before.eps))


def test_clip_has_quick_gelu_and_the_others_have_not(small):
    assert type(small("clip-vit-L", 32).network.vit.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert isinstance(small("mae-vit-l", 32).network.vit.blocks[0].mlp.act, nn.GELU)


@pytest.mark.parametrize("name", ["dinov2-vit-b-reg", "mae-vit-l"])
def test_tokens_lie_row_by_row(small, name):
    encoder = small(name, 64)
    images = pictures(64)
    other = images.clone()
    other[:, :, 20:28, 36:44] = 0  # inside the image's second row and third column of 16-pixel cells
    first = encoder.network.vit.patch_embed  # before attention mixes the tokens
    with torch.no_grad():
        moved = (first(encoder.preprocess(images)) != first(encoder.preprocess(other))).any(-1).any(0)
    assert moved.flatten().nonzero().flatten().tolist() == [1 * 4 + 2]


# ---------------------------------------------------------------- full size

SIZES = {  # width, depth as published
    "dinov2-vit-s": (384, 12), "dinov2-vit-b": (768, 12),
    "dinov2-vit-l": (1024, 24), "dinov2-vit-g": (1536, 40),
    "dinov2-vit-s-reg": (384, 12), "dinov2-vit-b-reg": (768, 12),
    "dinov2-vit-l-reg": (1024, 24), "dinov2-vit-g-reg": (1536, 40),
    "dinov1-vit-b": (768, 12), "mocov3-vit-b": (768, 12), "mocov3-vit-l": (1024, 24),
    "clip-vit-L": (1024, 24), "jepa-vit-h": (1280, 32), "mae-vit-l": (1024, 24),
    "dinov3-vit-s": (384, 12), "dinov3-vit-b": (768, 12), "dinov3-vit-l": (1024, 24),
}  # fmt: skip


@pytest.mark.skipif(not builds_on_meta(), reason="this timm does not build networks on the meta device")
@pytest.mark.parametrize("name", NAMES)
def test_every_encoder_has_its_published_size_and_the_grid_of_sit(name):
    with torch.device("meta"):
        encoder = VisionEncoder.from_name(name, weights="random")
    vit = encoder.network.vit
    assert (encoder.embed_dim, len(vit.blocks)) == SIZES[name]
    assert encoder.resolution == 256 and encoder.grid_size == 16
    assert vit.patch_embed.proj.weight.shape[-1] * 16 == encoder.preprocess.size
    check_token_grid(encoder, downsampling=8, patch_size=2)
    check_token_grid(encoder, downsampling=16, patch_size=1)


def test_the_list_is_the_official_one_and_more():
    official = "dinov2-vit-b dinov2-vit-l dinov2-vit-g dinov1-vit-b mocov3-vit-b mocov3-vit-l"
    official += " clip-vit-L jepa-vit-h mae-vit-l"
    assert set(official.split()) <= set(ENCODER_NAMES) and set(SIZES) == set(ENCODERS)
    assert find_spec("dinov2reg-vit-l") == ENCODERS["dinov2-vit-l-reg"]


@pytest.mark.parametrize("name", NAMES)
def test_pretrained_tags_are_known_to_timm(name):
    spec = ENCODERS[name]
    if spec.tag is None:
        assert name.startswith("mocov3") and spec.get
    else:
        config = timm.models.get_pretrained_cfg(spec.timm_name)
        assert (config.hf_hub_id or config.url) and (config.mean, config.std) == (spec.mean, spec.std)
        assert config.interpolation == spec.interpolation


@pytest.mark.parametrize(
    "name", ["dinov2-vit-s", "dinov2-vit-s-reg", "clip-vit-L", "jepa-vit-h", "mae-vit-l"]
)
def test_512_pixels_give_32_tokens_a_side(small, name):
    encoder = small(name, 512, depth=1)
    assert encoder.grid_size == 32 and encoder(pictures(512, 1)).shape == (1, 1024, 64)
    check_token_grid(encoder, downsampling=8, patch_size=2)


def test_tokens_feed_a_sit_of_the_same_grid(small):
    encoders = [small("dinov2-vit-b", 64), small("mae-vit-l", 64)]
    sizes = {"depth": 1, "alignment_depth": 1, "width": 32, "heads": 2, "projector_width": 16}
    sit = SiT.from_preset("SiT-S/2", input_size=8, target_dims=(64, 64), **sizes)
    check_token_grid(encoders, downsampling=8, patch_size=sit.config.patch_size)
    out = sit_losses(
        sit, torch.randn(2, 4, 8, 8), torch.tensor([0, 1]), [encoder(pictures(64)) for encoder in encoders]
    )
    assert -1 <= float(out.align_loss.detach()) <= 1


# ---------------------------------------------------------------- frozen


def test_an_encoder_is_frozen_deterministic_and_stays_in_eval_mode(small):
    encoder = small("dinov2-vit-b", 64)
    images = pictures(64)
    tokens = encoder.train()(images)
    assert not any(module.training for module in encoder.modules())
    assert not tokens.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    assert torch.equal(tokens, encoder(images))


def test_building_draws_nothing_from_the_callers_numbers_and_repeats(small):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        encoder = VisionEncoder.from_name("timm:test_vit", 64, weights="random")
        assert torch.equal(torch.rand(1), expected)
        states.append(encoder.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_autocast_gives_float32_tokens_close_to_full_precision(small):
    encoder = small("clip-vit-L", 64)
    images = pictures(64)
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert F.cosine_similarity(half, exact, dim=-1).min() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dinov2-vit-b", "clip-vit-L", "jepa-vit-h", "dinov3-vit-b"])
def test_full_size_under_autocast_on_a_gpu(name, dtype):
    encoder = VisionEncoder.from_name(name, weights="random").cuda()
    images = pictures(256).cuda()
    exact = encoder(images)
    with torch.autocast("cuda", dtype):
        half = encoder(images)
    assert half.dtype == torch.float32 and half.shape == (2, 256, encoder.embed_dim)
    assert F.cosine_similarity(half, exact, dim=-1).min() > 0.99


def test_tiny_is_what_it_was():
    encoder = VisionEncoder.from_name("tiny")
    assert (encoder.embed_dim, encoder.grid_size, encoder.resolution, encoder.stand_in) == (128, 4, 32, False)
    images = pictures(32)
    torch.testing.assert_close(encoder(images), encoder.network(images.float() / 127.5 - 1))
    check_token_grid(encoder, downsampling=4, patch_size=2)


def test_several_encoders_come_as_a_list(small):
    small("dinov2-vit-b")
    small("mae-vit-l")
    both = load_encoders("dinov2-vit-b, mae-vit-l", 64, weights="random")
    assert [encoder.name for encoder in both] == ["dinov2-vit-b", "mae-vit-l"]
    mixed = load_encoders("tiny,dinov2-vit-b", 32, weights=["pretrained", "random"])
    assert [encoder.stand_in for encoder in mixed] == [False, True]


def test_random_weights_say_what_they_are(small):
    with pytest.warns(UserWarning, match="dinov2-vit-b has random weights: a stand-in"):
        encoder = small("dinov2-vit-b", 64)
    assert (
        encoder.stand_in
        and "dinov2-vit-b, 64 pixels, 4x4 tokens of width 64, random weights: a stand-in" in repr(encoder)
    )


# ---------------------------------------------------------------- weights from files


def grown(pos_embed, prefix, side):
    """A position embedding on another grid, so that it must be resampled back."""
    grid = (
        pos_embed[:, prefix:].unflatten(1, (math.isqrt(pos_embed.shape[1] - prefix), -1)).permute(0, 3, 1, 2)
    )
    grid = torch.from_numpy(bicubic_antialiased(grid.double().numpy(), side)).float()
    return torch.cat([pos_embed[:, :prefix], grid.flatten(2).transpose(1, 2)], 1)


def official_moco(state, slips):
    """A MoCo v3 training checkpoint around an encoder's weights, with the misnamed layers that published
    files have.
    """
    published = {}
    for key, value in state.items():
        if slips:
            key = key.replace("blocks.13.norm1.", "blocks.13.norm13.").replace(
                "blocks.13.mlp.fc1.", "blocks.13.mlp.fc13."
            )
            key = key.replace("blocks.14.norm2.", "blocks.14.norm14.").replace(
                "blocks.14.mlp.fc2.", "blocks.14.mlp.fc14."
            )
        published[f"module.base_encoder.{key}"] = value
        published[f"module.momentum_encoder.{key}"] = value + 1
    published["module.base_encoder.head.0.weight"] = published["module.predictor.0.weight"] = torch.zeros(
        3, 3
    )
    return {
        "epoch": 300,
        "arch": "vit_base",
        "state_dict": published,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }


@pytest.mark.parametrize("slips", [True, False])
def test_moco_checkpoints_are_converted_and_their_slips_corrected(small, tmp_path, slips):
    sizes = {"depth": 15, "embed_dim": 32}
    source = small("mocov3-vit-b", 224, **sizes)  # 14x14 tokens, as the published files have
    state = {key: value for key, value in source.network.vit.state_dict().items()}
    torch.save(official_moco(state, slips), tmp_path / "vit-b.pth.tar")
    encoder = small("mocov3-vit-b", weights=tmp_path / "vit-b.pth.tar", **sizes)
    loaded = encoder.network.vit.state_dict()
    assert loaded.keys() == state.keys() and loaded["pos_embed"].shape == (1, 257, 32)
    torch.testing.assert_close(loaded["pos_embed"], grown(state["pos_embed"], 1, 16), rtol=1e-4, atol=1e-4)
    for key in state.keys() - {"pos_embed"}:
        assert torch.equal(loaded[key], state[key]), key


def to_openai(state):
    names = (
        ("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"),
        ("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre"), ("cls_token", "class_embedding"),
        ("qkv.", "in_proj_"), ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"), ("norm1", "ln_1"), ("norm2", "ln_2"),
    )  # fmt: skip
    renamed = {
        "visual.ln_post.weight": torch.ones(64),
        "visual.ln_post.bias": torch.zeros(64),
        "visual.proj": torch.zeros(64, 8),
    }
    for key, value in state.items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        renamed[f"visual.{key}"] = (
            value[0, 0] if "class" in key else value[0] if "positional" in key else value
        )
    return renamed | {"logit_scale": torch.zeros(())}


def to_dinov2_registers(state):
    state = dict(state)
    registers, positions = state.pop("reg_token"), state.pop("pos_embed")
    first = torch.full((1, 1, 64), 0.25)  # the class token's place in their position embedding
    state["cls_token"] = state["cls_token"] - first
    return state | {
        "register_tokens": registers,
        "pos_embed": torch.cat([first, positions], 1),
        "mask_token": torch.zeros(1, 64),
    }


def to_dinov3(state):
    state = {
        key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): value
        for key, value in state.items()
    }
    zeros = {
        f"blocks.{i}.attn.qkv.bias": torch.zeros(192) for i in range(SMALL["depth"])
    }  # learned none, says timm
    state |= {
        "storage_tokens": state.pop("reg_token"),
        "mask_token": torch.zeros(1, 64),
        "rope_embed.periods": torch.ones(4),
    }
    return state | zeros


LAYOUTS = {
    "dinov2-vit-b": lambda state: state | {"mask_token": torch.zeros(1, 64)},
    "dinov2-vit-b-reg": to_dinov2_registers,
    "dinov1-vit-b": dict,
    "mae-vit-l": lambda state: {"model": state},
    "jepa-vit-h": lambda state: {
        "encoder": {f"module.{key}": value for key, value in state.items()},
        "epoch": 300,
    },
    "clip-vit-L": to_openai,
    "dinov3-vit-b": to_dinov3,
}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name in NAMES])
def test_the_authors_files_load(small, tmp_path, name):
    source = small(name, 64)
    state = dict(source.network.vit.state_dict())
    if not ENCODERS[name].final_norm and name != "clip-vit-L":
        state |= {
            "norm.weight": torch.ones(64),
            "norm.bias": torch.zeros(64),
        }  # in the file, though the tokens do not pass it
    torch.save(LAYOUTS[name](state), tmp_path / "official.pth")
    encoder = small(name, 64, weights=tmp_path / "official.pth")
    torch.testing.assert_close(encoder(pictures(64)), source(pictures(64)), rtol=1e-5, atol=1e-5)
    assert not encoder.stand_in


def test_safetensors_load_with_a_classifier_left_out(small, tmp_path):
    source = small("dinov1-vit-b", 64)
    state = source.network.vit.state_dict() | {
        "head.weight": torch.zeros(10, 64),
        "head.bias": torch.zeros(10),
    }
    save_file(state, tmp_path / "vit.safetensors")
    encoder = small("dinov1-vit-b", 64, weights=str(tmp_path / "vit.safetensors"))
    assert torch.equal(encoder(pictures(64)), source(pictures(64)))


def test_wrong_files_of_weights_are_refused(small, tmp_path):
    state = small("dinov1-vit-b", 64).network.vit.state_dict()
    with pytest.raises(FileNotFoundError, match=r"the weights nowhere\.pth do not exist: give"):
        small("dinov1-vit-b", 64, weights="nowhere.pth")

    def refused(content, message, name="w.pth"):
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            small("dinov1-vit-b", 64, weights=path)

    refused(
        {key: value for key, value in state.items() if "fc2" not in key},
        r"blocks.0.mlp.fc2.bias missing .*\(4 in all\)",
    )
    refused(state | {"stray": torch.zeros(2)}, r"stray \[2\] instead of nothing")
    refused({"teacher": state}, "does not fit VisionTransformer")
    refused([torch.zeros(2)], "holds a list: give a file with a state dict")
    refused(
        state | {"run": nn.Linear(1, 1)},
        r"wants to run torch\.nn\.modules\.linear\.Linear when it is read: refused",
    )
    refused(b"not a file", "is not a whole safetensors file", "w.safetensors")
    for damaged in (b"hello", b"\x80\x02X", b""):
        refused(damaged, r"is not a whole file of torch\.save")
    refused({"model": 3}, "holds no weights of VisionTransformer")


@needs_hub
@pytest.mark.parametrize(
    ("name", "published"),
    [("dinov2-vit-b", 518), ("clip-vit-L", 224), ("mae-vit-l", 224), ("dinov1-vit-b", 224)],
)
def test_downloads_load_and_their_position_embedding_is_resampled(small, monkeypatch, name, published):
    source = small(name, published * 16 // ENCODERS[name].patch_size).network.vit.state_dict()
    extra = (
        {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64)} if "norm.weight" not in source else {}
    )
    asked = []
    monkeypatch.setattr(
        timm.models._builder, "load_state_dict_from_hf", lambda hub, **_: asked.append(hub) or source | extra
    )
    loaded = small(name, weights="pretrained").network.vit.state_dict()
    assert asked == [timm.models.get_pretrained_cfg(ENCODERS[name].timm_name).hf_hub_id]
    torch.testing.assert_close(loaded["pos_embed"], grown(source["pos_embed"], 1, 16), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(loaded[key], source[key]) for key in source.keys() - {"pos_embed"})


@needs_hub
def test_without_a_network_one_sentence_says_what_to_do(small, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = (
        r"^cannot download dinov2-vit-b \(vit_base_patch14_dinov2.lvd142m of timm; the Hub cannot be reached "
        r"\(offline\)\): connect and unset HF_HUB_OFFLINE, or pass weights=FILE$"
    )
    with pytest.raises(ConnectionError, match=message):
        small("dinov2-vit-b", 64, weights="pretrained")


def test_a_transfer_that_fails_in_its_own_way_is_one_sentence(small, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Data processing error: CAS service error")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", broken)
    message = (
        r"^cannot download dinov2-vit-b \(.*; the transfer of timm/vit_base_patch14_dinov2.lvd142m failed "
        r"\(RuntimeError: Data .*\)\): give the same command again; .*HF_HUB_DISABLE_XET=1.*weights=FILE$"
    )
    with pytest.raises(ConnectionError, match=message):
        small("dinov2-vit-b", 64, weights="pretrained")


@needs_hub
def test_a_cached_file_that_is_not_whole_is_named(small, monkeypatch, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10")
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", lambda *_, **__: str(path))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(path))
    sentence = r"model\.safetensors is not a whole .*: remove \S+, and it is downloaded"
    with pytest.raises(ValueError, match=sentence):
        small("dinov2-vit-b", 64, weights="pretrained")


def test_what_timm_cannot_load_is_said_in_one_sentence(small, monkeypatch):
    def create_model(name, **arguments):
        raise RuntimeError(f"No pretrained weights exist for {name}.\nmore")

    monkeypatch.setattr(encoder_table.timm, "create_model", create_model)
    message = (
        r"cannot load mae-vit-l \S+: update timm, or pass weights=FILE "
        r"\(No pretrained weights exist for \S+\)$"
    )
    with pytest.raises(ValueError, match=message):
        small("mae-vit-l", 64, weights="pretrained")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "resolution", "weights", "message"),
    [
        (
            "dinov4-vit-b",
            256,
            "random",
            "unknown vision encoder 'dinov4-vit-b': choose one of tiny, dinov2-vit-s, .*, or timm:NAME",
        ),
        ("dinov2-vit-b,tiny", 256, "random", "names several encoders: use load_encoders"),
        ("dinov2-vit-b", 250, "random", "resolution 250 is not a multiple of 16"),
        ("tiny", 256, "pretrained", "the tiny encoder takes 32-pixel images, not 256"),
        ("tiny", 32, "random", "the tiny encoder ships with its weights"),
        (
            "mocov3-vit-l",
            256,
            "pretrained",
            "mocov3-vit-l needs weights=FILE: timm has none of it; .* the pre-trained moco v3 ViT-L",
        ),
        ("timm:resnet18", 256, "random", "timm's resnet18 is not a plain vision transformer"),
        ("timm:swin_tiny_patch4_window7_224", 256, "random", "is not a plain vision transformer"),
        ("timm:vit_enormous", 256, "random", "has no model 'vit_enormous'"),
        ("timm:hf-hub:someone/something", 256, "random", "has no model"),
        ("timm:test_vit.no_such_tag", 64, "pretrained", "has no weights 'no_such_tag' of test_vit"),
    ],
)
def test_refusals(name, resolution, weights, message):
    with pytest.raises(ValueError, match=message):
        VisionEncoder.from_name(name, resolution, weights=weights)


def test_an_old_timm_without_the_architecture_is_named(monkeypatch):
    monkeypatch.setattr(encoder_table.timm, "is_model", lambda name: False)
    with pytest.raises(
        ValueError,
        match=f"timm {re.escape(timm.__version__)} does not have dinov3-vit-b: pip install 'timm>=1.0.20'",
    ):
        find_spec("dinov3-vit-b")


@pytest.mark.parametrize(
    "images",
    [pictures(64).float(), pictures(32), pictures(64)[:, :2], pictures(64)[0], pictures(64)[:, :, :48]],
    ids=["float", "size", "channels", "no batch", "oblong"],
)  # fmt: skip
def test_images_of_another_kind_are_refused(images):
    encoder = VisionEncoder.from_name("timm:test_vit", 64, weights="random")
    with pytest.raises(
        ValueError, match=r"timm:test_vit takes uint8 \(B, 3, 64, 64\) with values from 0 to 255"
    ):
        encoder(images)


def test_the_number_of_weights_must_fit():
    with pytest.raises(ValueError, match="3 weights for 2 encoders"):
        load_encoders("tiny,tiny", weights=["pretrained"] * 3)


def test_combinations_that_do_not_fit_are_told_which_do():
    encoder = VisionEncoder.from_name("timm:test_vit", 64, weights="random")
    message = (
        "timm:test_vit gives a token per 16x16 pixels, but a VAE that reduces 16x and SiT patch 2 make one "
        "per 32x32: VAE factor times patch must be 16, as in f8d4 with SiT patch 2, f16d32 with SiT patch 1, "
        "tiny with SiT patch 4"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_token_grid([encoder], downsampling=16, patch_size=2)
    with pytest.raises(ValueError, match="tiny with SiT patch 2"):
        check_token_grid(VisionEncoder.from_name("tiny"), downsampling=4, patch_size=4)
