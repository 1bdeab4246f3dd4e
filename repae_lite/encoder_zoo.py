"""The vision encoders that REPA and REPA-E align with, and how each wants its images: one table.

REPA (arXiv 2410.06940) section 3 and REPA-E (arXiv 2504.10483) table 3; taught in `notebooks/03_repa.ipynb`. Networks and weights come
through timm; no code is fetched. `repae_lite.encoders.VisionEncoder` is how they are used.

An image of R pixels is resized to patch_size * R / 16 pixels, so that every encoder gives R / 16 tokens along each side: 16 at 256
pixels and 32 at 512, the grid of SiT/2 on an f8 VAE and of SiT/1 on an f16 VAE. Position embeddings are resampled to that grid
(bicubic, antialiased) when the weights are loaded.

What differs from the official code (sihyun-yu/REPA and End2End-Diffusion/REPA-E):

    encoder     official                                           here
    all         encoders run inside the run's autocast             the same; tokens are returned in float32
    not dinov2  256 pixels only                                    the same rule at 512 and every other multiple of 16
    dinov2      network and weights by torch.hub, which runs       timm's network and its copy of the weights; the same
                downloaded code                                    resampling of the position embedding
    dinov1      its network's file is not in the repository        DINO's final norm is applied and the class token dropped
    mocov3      ./ckpts/mocov3_vit*.pth                            weights=FILE, the same file; timm has no copy
    clip        the `clip` package, in float32                     timm's copy of the weights, in float32
    jepa, mae   left in train mode by oversight                    eval mode; neither network has dropout, so nothing changes
    dinov3      not there                                          ImageNet statistics; no resize (its patches are of 16 pixels)
    timm:NAME   not there                                          timm's own mean, std and interpolation, resized with
                                                                   antialiasing as timm's transforms do; no centre crop. (Of
                                                                   networks that norm after pooling, tokens without a norm)

Resizing before or after normalising, which `ENCODERS` keeps as the official code has it, changes rounding only: bicubic weights sum
to one. The networks, the file layouts and the preprocessing are tested offline, with random weights; tokens of the published weights
have not been compared with the official code's. timm fetches them from the Hugging Face Hub, those of jepa from their authors' site (a
whole training checkpoint). It names these licences: Apache-2.0 for dinov1, dinov2 and clip, CC BY-NC 4.0 for mae and jepa, and
dinov3's own.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from repae_lite.files import fill_module, read_weights
from repae_lite.pickles import read_pickle

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
PIXELS_PER_TOKEN = 16  # of the image as it is stored, before resizing


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder: its network, its weights and the images it wants.

    Attributes:
        model: timm's name of the architecture.
        tag: timm's name of the pretrained weights; None where timm has none.
        patch_size: pixels per token, of the resized image.
        mean, std: statistics that pixels in [0, 1] are normalised by, one number per channel.
        prefix_tokens: class and register tokens, which are dropped.
        final_norm: the tokens pass the network's last norm.
        resize_first: resize, then normalise; the other way round otherwise.
        interpolation: "bicubic" or "bilinear".
        antialias: low-pass before resizing.
        get: where the weights are, if timm has none. since: the first timm version with the architecture, if that is above ours.
        timm_args: changes to timm's architecture.
    """

    model: str
    tag: str | None
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    prefix_tokens: int = 1
    final_norm: bool = True
    resize_first: bool = False
    interpolation: str = "bicubic"
    antialias: bool = False
    get: str = ""
    since: str = ""
    timm_args: dict[str, Any] = field(default_factory=dict)

    @property
    def timm_name(self) -> str:
        """Architecture and weights, as `timm.create_model` takes them."""
        return f"{self.model}.{self.tag}" if self.tag else self.model


_DINOV2 = {"tag": "lvd142m", "patch_size": 14, **IMAGENET}
_DINOV3 = {"tag": "lvd1689m", "patch_size": 16, "prefix_tokens": 5, "since": "1.0.20", **IMAGENET}
_MOCO = {"tag": None, "patch_size": 16, **IMAGENET}
_RCG = "timm has none of it; the README of github.com/LTH14/rcg links the file, as the pre-trained moco v3"
_DINO_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}

ENCODERS = {
    **{f"dinov2-vit-{s}": EncoderSpec(f"vit_{size}_patch14_dinov2", **_DINOV2) for s, size in _DINO_SIZES.items()},
    **{
        f"dinov2-vit-{s}-reg": EncoderSpec(f"vit_{size}_patch14_reg4_dinov2", prefix_tokens=5, **_DINOV2)
        for s, size in _DINO_SIZES.items()
    },
    "dinov1-vit-b": EncoderSpec("vit_base_patch16_224", "dino", 16, **IMAGENET),
    "mocov3-vit-b": EncoderSpec("vit_base_patch16_224", get=f"{_RCG} ViT-B", **_MOCO),
    "mocov3-vit-l": EncoderSpec("vit_large_patch16_224", get=f"{_RCG} ViT-L", **_MOCO),
    # quick-GELU, x * sigmoid(1.702 x), is what OpenAI trained with; the last norm acts on the class token only, which is not used
    "clip-vit-L": EncoderSpec(
        "vit_large_patch14_clip_quickgelu_224", "openai", 14, final_norm=False, resize_first=True, **CLIP
    ),
    "jepa-vit-h": EncoderSpec("vit_huge_patch14_gap_224", "in1k_ijepa", 14, prefix_tokens=0, **IMAGENET),
    "mae-vit-l": EncoderSpec("vit_large_patch16_224", "mae", 16, final_norm=False, **IMAGENET),
    **{f"dinov3-vit-{s}": EncoderSpec(f"vit_{_DINO_SIZES[s]}_patch16_dinov3", **_DINOV3) for s in "sbl"},
}  # fmt: skip

_VIT_MODULES = ("vision_transformer", "deit", "eva", "beit")  # timm's files of plain vision transformers


def find_spec(name: str) -> EncoderSpec:
    """The table's row of an encoder; "timm:NAME" makes one for any plain vision transformer of timm.

    "dinov2reg-vit-b", the official spelling, means "dinov2-vit-b-reg".

    Raises:
        ValueError: unknown name, no vision transformer, or an architecture that the installed timm does not have.
    """
    if name.startswith("timm:"):
        return _timm_spec(name.removeprefix("timm:"))
    if name.startswith("dinov2reg-vit-"):
        name = name.replace("dinov2reg", "dinov2") + "-reg"
    if name not in ENCODERS:
        raise ValueError(
            f"unknown vision encoder {name!r}: choose one of tiny, {', '.join(ENCODERS)}, or timm:NAME for a vision transformer of timm"
        )
    spec = ENCODERS[name]
    if not timm.is_model(spec.model):
        raise ValueError(f"timm {timm.__version__} does not have {name}: pip install 'timm>={spec.since}'")
    return spec


def _timm_spec(model_name: str) -> EncoderSpec:
    model, _, tag = model_name.partition(".")
    if not timm.is_model(model):
        raise ValueError(f"timm {timm.__version__} has no model {model_name!r}: timm.list_models('vit_*') lists vision transformers")
    if not timm.models.is_model_in_modules(model, _VIT_MODULES):
        raise ValueError(f"timm's {model_name} is not a plain vision transformer: alignment needs patch tokens of one width on a grid")
    if tag and not timm.models.is_model_pretrained(model_name):
        raise ValueError(f"timm {timm.__version__} has no weights {tag!r} of {model}: timm.list_pretrained('{model}*') lists them")
    with torch.random.fork_rng(devices=[]):
        try:
            probe = timm.create_model(model_name, depth=1, num_classes=0)  # one block says all that is asked here
        except (AssertionError, IndexError, TypeError, ValueError):  # its blocks are no uniform stack
            raise ValueError(f"timm's {model_name} is not a plain stack of blocks: choose another vision transformer") from None
    patch_size = getattr(probe.patch_embed, "patch_size", None)
    if not (patch_size and patch_size[0] == patch_size[1]):
        raise ValueError(f"timm's {model_name} does not cut images into square patches: choose another vision transformer")
    data = resolve_model_data_config(probe)
    return EncoderSpec(
        model=model,
        tag=tag or probe.pretrained_cfg.get("tag") or None,
        patch_size=patch_size[0],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        prefix_tokens=probe.num_prefix_tokens,
        resize_first=True,
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        antialias=True,
        get="timm has none of it",
    )


class Preprocess(nn.Module):
    """uint8 images (B, 3, R, R) to what an encoder eats: float32 (B, 3, S, S), normalised."""

    def __init__(self, spec: EncoderSpec, resolution: int):
        super().__init__()
        self.spec, self.size = spec, spec.patch_size * resolution // PIXELS_PER_TOKEN
        self.register_buffer("mean", torch.tensor(spec.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float() / 255
        if self.spec.resize_first:
            return (self._resize(x) - self.mean) / self.std
        return self._resize((x - self.mean) / self.std)

    def _resize(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.size:
            return x
        return F.interpolate(
            x, (self.size, self.size), mode=self.spec.interpolation, align_corners=False, antialias=self.spec.antialias
        )


class PatchTokens(nn.Module):
    """A timm vision transformer reduced to its patch tokens: images (B, 3, S, S) to (B, N, D), row by row."""

    def __init__(self, vit: nn.Module, *, final_norm: bool):
        super().__init__()
        self.vit = vit
        if not final_norm:
            vit.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_features(x)[:, self.vit.num_prefix_tokens :]


def build_network(name: str, spec: EncoderSpec, resolution: int, weights: str | Path = "pretrained") -> PatchTokens:
    """Builds an encoder for images of `resolution` pixels and fills it.

    Args:
        name: what to call it in errors.
        spec: its row of the table.
        resolution: a multiple of 16.
        weights: "pretrained" downloads them once; a file; or "random", the same numbers every time, which stand in for the real ones.

    Raises:
        ValueError: a resolution that does not fit; weights that do not fit or that timm does not have.
        FileNotFoundError: no such file. ConnectionError: the weights are not cached and cannot be downloaded.
    """
    if resolution < PIXELS_PER_TOKEN or resolution % PIXELS_PER_TOKEN:
        raise ValueError(
            f"resolution {resolution} is not a multiple of {PIXELS_PER_TOKEN}: {name} gives one token per "
            f"{PIXELS_PER_TOKEN}x{PIXELS_PER_TOKEN} pixels of the image"
        )
    if weights == "pretrained" and not spec.tag:
        raise ValueError(f"{name} needs weights=FILE: {spec.get}")
    arguments = {"img_size": spec.patch_size * resolution // PIXELS_PER_TOKEN, "num_classes": 0, **spec.timm_args}
    with torch.random.fork_rng(devices=[]):  # building draws numbers; whoever calls keeps theirs
        torch.manual_seed(0)
        if weights == "pretrained":
            vit = _pretrained(name, spec, arguments)
        else:
            vit = timm.create_model(spec.model, **arguments)
    grid = resolution // PIXELS_PER_TOKEN
    if tuple(vit.patch_embed.grid_size) != (grid, grid) or vit.num_prefix_tokens != spec.prefix_tokens:
        raise ValueError(
            f"timm {timm.__version__} builds {name} with {vit.patch_embed.grid_size} patches and {vit.num_prefix_tokens} other tokens "
            f"instead of {(grid, grid)} and {spec.prefix_tokens}: use another timm version"
        )
    if weights not in ("pretrained", "random"):
        _fill(vit, Path(weights))
    return PatchTokens(vit, final_norm=spec.final_norm)


def _pretrained(name: str, spec: EncoderSpec, arguments: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(spec.timm_name, pretrained=True, **arguments)
    except OSError as error:  # huggingface_hub's errors are OSErrors: offline, not cached, refused, disk full
        raise ConnectionError(
            f"cannot download {name} ({spec.timm_name} of timm; {type(error).__name__}): connect once, or pass weights=FILE"
        ) from error
    except RuntimeError as error:  # timm has no such weights, no huggingface_hub that it understands, or gets another network's file
        raise ValueError(
            f"timm {timm.__version__} cannot load {name} ({spec.timm_name}): update timm, or pass weights=FILE "
            f"({str(error).splitlines()[0]})"
        ) from error


# ---------------------------------------------------------------- weights from a file


def _fill(vit: nn.Module, path: Path) -> None:
    """Loads a file in timm's layout, in the authors' (DINO, DINOv2, DINOv3, MAE, I-JEPA) or in MoCo v3's: all of it or nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not weights, more than weights, or the weights of another network.
    """
    if not path.is_file():
        raise FileNotFoundError(f'the weights {path} do not exist: give "pretrained", "random" or an existing file')
    state = read_weights(path)[0] if path.suffix == ".safetensors" else read_pickle(path)
    convert = importlib.import_module(type(vit).__module__).checkpoint_filter_fn  # timm's own, for the authors' layouts
    try:
        state = convert(from_moco(state), vit)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no weights of {type(vit).__name__} that timm can convert: {error}") from None
    own = vit.state_dict()
    state = {key: value for key, value in state.items() if key in own or key.split(".")[0] not in ("head", "head_dist")}
    fill_module(vit, state, path)


_MOCO_PREFIX = "module.base_encoder."
_MOCO_SLIPS = (  # misnamed in published files
    ("blocks.13.norm13.", "blocks.13.norm1."),
    ("blocks.13.mlp.fc13.", "blocks.13.mlp.fc1."),
    ("blocks.14.norm14.", "blocks.14.norm2."),
    ("blocks.14.mlp.fc14.", "blocks.14.mlp.fc2."),
)


def from_moco(state: dict) -> dict:
    """The encoder's own weights of a MoCo v3 training checkpoint, in timm's names; any other state dict comes back as it is.

    Momentum encoder, predictor and projection head are left out, and four misnamed layers of published files are named rightly.
    """
    inner = state.get("state_dict", state)
    if not any(key.startswith(_MOCO_PREFIX) for key in inner):
        return state
    converted = {}
    for key, value in inner.items():
        if key.startswith(_MOCO_PREFIX):
            key = key.removeprefix(_MOCO_PREFIX)
            for wrong, right in _MOCO_SLIPS:
                key = key.replace(wrong, right)
            if key.split(".")[0] not in ("head", "fc"):
                converted[key] = value
    return converted
