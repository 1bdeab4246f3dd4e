"""The vision encoders that REPA and REPA-E align with, and how each wants its images: one table.

REPA (arXiv 2410.06940) section 3 and REPA-E (arXiv 2504.10483) table 3; taught in `notebooks/03_repa.ipynb`.
Networks and weights come through timm; no code is fetched. `repae_lite.VisionEncoder` is how they are used.

An image of R pixels is resized to patch_size * R / 16 pixels, so that every encoder gives R / 16 tokens along
each side: 16 at 256 pixels and 32 at 512, the grid of SiT/2 on an f8 VAE and of SiT/1 on an f16 VAE. Position
embeddings are resampled to that grid (bicubic, antialiased) when the weights are loaded.

What differs from the official code (sihyun-yu/REPA and End2End-Diffusion/REPA-E):

    encoder     official                                      here
    all         encoders run inside the run's autocast        the same; tokens are returned in float32
    not dinov2  256 pixels only                               the same rule at every multiple of 16, as at 512
    dinov2      network and weights by torch.hub, which runs  timm's network and its copy of the weights; the
                downloaded code                               same resampling of the position embedding
    dinov1      its network's file is not in the repository   DINO's final norm is applied, the class token
                                                              dropped
    mocov3      ./ckpts/mocov3_vit*.pth                       weights=FILE, the same file; timm has no copy
    clip        the `clip` package, in float32                timm's copy of the weights, in float32
    jepa, mae   left in train mode by oversight               eval mode; neither network has dropout, so
                                                              nothing changes
    dinov3      not there                                     ImageNet statistics; no resize (its patches are
                                                              of 16 pixels)
    timm:NAME   not there                                     timm's own mean, std and interpolation, resized
                                                              with antialiasing as timm's transforms do; no
                                                              centre crop; tokens without a norm where the
                                                              network norms after pooling

Resizing before or after normalising, which `ENCODERS` keeps as the official code has it, changes rounding
only: bicubic weights sum to one. The networks, the file layouts and the preprocessing are tested offline,
with random weights; tokens of the published weights have not been compared with the official code's. timm
fetches them from the Hugging Face Hub, those of jepa from their authors' site (a whole training checkpoint).
It names these licences: Apache-2.0 for dinov1, dinov2 and clip, CC BY-NC 4.0 for mae and jepa, and dinov3's
own.
"""

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config

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
        mean: of pixels in [0, 1], by which they are normalised, one number per channel.
        std: likewise.
        prefix_tokens: class and register tokens, which are dropped.
        final_norm: the tokens pass the network's last norm.
        resize_first: resize, then normalise; the other way round otherwise.
        interpolation: "bicubic" or "bilinear".
        antialias: low-pass before resizing.
        get: where the weights are, if timm has none.
        since: the first timm version with the architecture, if that is above ours.
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
    **{
        f"dinov2-vit-{s}": EncoderSpec(f"vit_{size}_patch14_dinov2", **_DINOV2)
        for s, size in _DINO_SIZES.items()
    },
    **{
        f"dinov2-vit-{s}-reg": EncoderSpec(f"vit_{size}_patch14_reg4_dinov2", prefix_tokens=5, **_DINOV2)
        for s, size in _DINO_SIZES.items()
    },
    "dinov1-vit-b": EncoderSpec("vit_base_patch16_224", "dino", 16, **IMAGENET),
    "mocov3-vit-b": EncoderSpec("vit_base_patch16_224", get=f"{_RCG} ViT-B", **_MOCO),
    "mocov3-vit-l": EncoderSpec("vit_large_patch16_224", get=f"{_RCG} ViT-L", **_MOCO),
    # quick-GELU, x * sigmoid(1.702 x), is what OpenAI trained with; the last norm acts on the class token
    # only, which is not used
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
        ValueError: unknown name, no vision transformer, or an architecture that the installed timm does not
            have.
    """
    if name.startswith("timm:"):
        return _timm_spec(name.removeprefix("timm:"))
    if name.startswith("dinov2reg-vit-"):
        name = name.replace("dinov2reg", "dinov2") + "-reg"
    if name not in ENCODERS:
        raise ValueError(
            f"unknown vision encoder {name!r}: choose one of tiny, {', '.join(ENCODERS)}, or timm:NAME for a "
            "vision transformer of timm"
        )
    spec = ENCODERS[name]
    if not timm.is_model(spec.model):
        raise ValueError(f"timm {timm.__version__} does not have {name}: pip install 'timm>={spec.since}'")
    return spec


def _timm_spec(model_name: str) -> EncoderSpec:
    model, _, tag = model_name.partition(".")
    if not timm.is_model(model):
        raise ValueError(
            f"timm {timm.__version__} has no model {model_name!r}: timm.list_models('vit_*') lists vision "
            "transformers"
        )
    if not timm.models.is_model_in_modules(model, _VIT_MODULES):
        raise ValueError(
            f"timm's {model_name} is not a plain vision transformer: alignment needs patch tokens of one "
            "width on a grid"
        )
    if tag and not timm.models.is_model_pretrained(model_name):
        raise ValueError(
            f"timm {timm.__version__} has no weights {tag!r} of {model}: timm.list_pretrained('{model}*') "
            "lists them"
        )
    with torch.random.fork_rng(devices=[]):
        try:
            # One block says all that is asked here.
            probe = timm.create_model(model_name, depth=1, num_classes=0)
        except (AssertionError, IndexError, TypeError, ValueError):  # its blocks are no uniform stack
            raise ValueError(
                f"timm's {model_name} is not a plain stack of blocks: choose another vision transformer"
            ) from None
    patch_size = getattr(probe.patch_embed, "patch_size", None)
    if not (patch_size and patch_size[0] == patch_size[1]):
        raise ValueError(
            f"timm's {model_name} does not cut images into square patches: choose another vision transformer"
        )
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
