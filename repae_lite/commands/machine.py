"""What this machine has, and what each recipe needs of it: `repae check`.

Sizes are arithmetic on the networks' numbers of parameters and on the files' layouts: a lower bound, since
activations, which grow with the images per process, come on top. Times are not given: the paper publishes
none, and guesses would be worse.
"""

import os
import platform
import shutil
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants

from repae_lite import __version__
from repae_lite.checkpoints.released import ORGANISATION, RELEASED
from repae_lite.commands.presets import RECIPES, Recipe
from repae_lite.data.datasets import ImageH5Dataset
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.encoder_table import ENCODERS, EncoderSpec
from repae_lite.networks.sit import SIT_PRESETS, SiT
from repae_lite.networks.vae import VAE_PRESETS, AutoencoderKL
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.state_dicts import read_weights

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "lpips",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "h5py",
    "diffusers",
)
NETWORKS = ("teacher", "perceptual", "evaluator", "vae")
GIB = 2**30
CHECKPOINTS = 3  # that a recipe's disk space is reckoned with


def survey(folder: str | Path = ".", pretrained: str | Path = "pretrained") -> dict:
    """Everything `repae check` tells, as JSON values; sizes in bytes.

    Args:
        folder: where runs would be written: its disk is looked at.
        pretrained: where `repae download` puts released sets.

    Raises:
        FileNotFoundError, ValueError: the embedded data is not there, or damaged.
    """
    found = {
        "repae_lite": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "memory": _memory(),
        "devices": _devices(),
        "disk": {"folder": str(Path(folder).resolve()), "free": shutil.disk_usage(folder).free},
        "embedded": _embedded(),
        "cached": _cached(Path(pretrained)),
    }
    found["presets"] = {name: needs(recipe) | verdict(recipe, found) for name, recipe in RECIPES.items()}
    return found


# ---------------------------------------------------------------- what is there


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory() -> dict[str, int | None]:
    """Main memory: all of it, and what is free without swapping (None where the system does not say)."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        total = None
    available = None
    if Path("/proc/meminfo").is_file():
        lines = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
        )
        available = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else None
    return {"total": total, "available": available}


def _devices() -> list[dict]:
    devices = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        with torch.cuda.device(i):
            bf16 = torch.cuda.is_bf16_supported()
        devices.append(
            {
                "name": f"cuda:{i}",
                "kind": torch.cuda.get_device_name(i),
                "memory": total,
                "free": free,
                "bf16": bf16,
            }
        )
    return devices


def _embedded() -> dict:
    folder = data_small_dir()
    splits = {split: ImageH5Dataset(folder / split / "images.h5") for split in ("train", "eval")}
    networks = {name: read_weights(folder / f"{name}.safetensors")[0] for name in NETWORKS}
    return {
        "splits": {name: {"images": len(data), "classes": data.num_classes} for name, data in splits.items()},
        "networks": {
            name: sum(tensor.numel() for tensor in state.values()) for name, state in networks.items()
        },
    }


def _cached(pretrained: Path) -> dict:
    """Which weights are on this machine: encoders in timm's caches, released sets in the Hub's and in
    `pretrained`.
    """
    hub = Path(constants.HF_HUB_CACHE)
    held = {entry.name for entry in hub.iterdir()} if hub.is_dir() else set()
    weights = ("*.safetensors", "*.bin", "*.pt")

    def has(repository: str) -> bool:
        entry = f"models--{repository.replace('/', '--')}"
        return entry in held and any(
            path.exists() for pattern in weights for path in (hub / entry).glob(f"snapshots/**/{pattern}")
        )

    def has_encoder(spec: EncoderSpec) -> bool:
        source = (
            timm.get_pretrained_cfg(spec.timm_name) if spec.tag else None
        )  # which may be another network's repository
        if source is None:
            return False
        if not source.hf_hub_id:
            return (
                bool(source.url)
                and (
                    Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(source.url).path).name
                ).is_file()
            )
        repository = source.hf_hub_id.split("@")[0]
        return has(repository + spec.timm_name if repository.endswith("/") else repository)

    return {
        "hub": str(hub),
        "encoders": [name for name, spec in ENCODERS.items() if has_encoder(spec)] + ["tiny"],
        "released": [name for name in RELEASED if has(f"{ORGANISATION}/{name}")],
        "pretrained": [
            name for name in RELEASED if any(path.is_file() for path in (pretrained / name).glob("[!.]*"))
        ],
    }


# ---------------------------------------------------------------- what recipes need


@cache
def parameters(recipe: Recipe) -> dict[str, int]:
    """Numbers of parameters of a recipe's networks, without building them."""
    vae = VAE_PRESETS[recipe.vae]
    with torch.device("meta"):
        networks = {
            "sit": SiT.from_preset(
                recipe.model, in_channels=vae.latent_channels, input_size=recipe.resolution // vae.downsampling,
                target_dims=SIT_PRESETS[recipe.model].target_dims,
            ),
            "vae": AutoencoderKL(vae),
            "discriminator": PatchDiscriminator(),
        }  # fmt: skip
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def needs(recipe: Recipe) -> dict:
    """What a recipe needs, in bytes, activations apart.

    `device_memory`: weights, gradients, AdamW's two moments (float32 each) and SiT's average; `disk`: images,
    latents where they are cached, and three checkpoints; `downloads`: released sets; `images`, `steps`,
    `batch`.
    """
    count, vae = parameters(recipe), VAE_PRESETS[recipe.vae]
    tuned = count["vae"] + (
        0 if recipe.vae == "tiny" else count["discriminator"]
    )  # the embedded scale has no adversarial term
    trained = count["sit"] + (tuned if recipe.trains_vae else 0)
    frozen = 0 if recipe.trains_vae else count["vae"]
    state = 4 * (4 * trained + count["sit"] + frozen)  # weight, gradient, two moments; the average
    checkpoint = 4 * (3 * trained + count["sit"])  # weights, two moments; the average
    images = 0 if recipe.vae == "tiny" else recipe.images * 3 * recipe.resolution**2
    latents = (
        0
        if recipe.trains_vae
        else recipe.images * 8 * vae.latent_channels * (recipe.resolution // vae.downsampling) ** 2
    )
    return {
        "command": recipe.command,
        "vae": recipe.vae,
        "model": recipe.model,
        "encoder": recipe.encoder,
        "parameters": count,
        "device_memory": state,
        "disk": images + latents + CHECKPOINTS * checkpoint,
        "downloads": list(recipe.sets),
        "images": recipe.images,
        "steps": recipe.steps,
        "batch": recipe.batch,
    }


def verdict(recipe: Recipe, found: dict) -> dict:
    """Whether this machine can run a recipe: `possible`, `against` [why not] and `missing` [what is to be
    fetched or made first].
    """
    wanted, against, missing = needs(recipe), [], []
    if recipe.vae != "tiny":
        largest = max((device["memory"] for device in found["devices"]), default=0)
        if not largest:
            against.append("there is no CUDA device")
        elif largest < wanted["device_memory"]:
            against.append(
                f"weights and optimisers alone need {wanted['device_memory'] / GIB:.1f} GiB of a device, the "
                "largest has "
                f"{largest / GIB:.1f}"
            )
        missing.append("preprocessed images (repae preprocess)")
        if recipe.command == "train-ldm":
            missing.append("cached latents (repae cache-latents)")
        if recipe.encoder not in found["cached"]["encoders"]:
            missing.append(f"{recipe.encoder} (timm fetches it at the first run)")
        missing += [
            f"{name} (repae download {name})"
            for name in recipe.sets
            if name not in found["cached"]["pretrained"]
        ]
    if found["disk"]["free"] < wanted["disk"]:
        against.append(
            f"{wanted['disk'] / 1e9:.0f} GB of disk are needed in all, {found['disk']['free'] / 1e9:.0f} are "
            "free here"
        )
    return {"possible": not against, "against": against, "missing": missing}


# ---------------------------------------------------------------- in words


def report(found: dict) -> str:
    """A survey as lines of text."""
    memory, cpu = found["memory"], found["cpu"]
    packages = ", ".join(f"{name} {number or 'not installed'}" for name, number in found["packages"].items())
    lines = [
        f"repae_lite {found['repae_lite']}, Python {found['python']} on {found['system']}",
        packages,
        f"{cpu['cores']} CPU cores, torch uses {cpu['threads']} threads; memory {_gib(memory['total'])}, "
        f"{_gib(memory['available'])} available; disk {found['disk']['free'] / 1e9:.0f} GB free here",
    ]
    for device in found["devices"]:
        bf16 = "bf16" if device["bf16"] else "no bf16"
        lines.append(
            f"{device['name']}: {device['kind']}, {_gib(device['memory'])}, {_gib(device['free'])} free, "
            f"{bf16}"
        )
    if not found["devices"]:
        lines.append("no CUDA device: the embedded scale runs on the CPU, the full-scale recipes need a GPU")
    for split, size in found["embedded"]["splits"].items():
        lines.append(f"embedded {split} split: {size['images']} images, {size['classes']} classes")
    lines += [f"embedded {name}: {count:,} numbers" for name, count in found["embedded"]["networks"].items()]
    cached = found["cached"]
    lines.append(f"encoders here: {', '.join(cached['encoders'])}")
    released = sorted({*cached["pretrained"], *cached["released"]})
    lines.append(f"released sets here: {', '.join(released) or 'none (repae download fetches them)'}")
    lines.append(
        "presets (device memory without activations, which grow with the images per process; times are not "
        "published):"
    )
    for name, preset in found["presets"].items():
        sizes = f"{_gib(preset['device_memory'])} of device memory and more, {preset['disk'] / 1e9:.1f} GB of disk"
        lines.append(
            f"  {name}: {preset['command']}, {preset['model']} on {preset['vae']}, "
            f"{preset['steps']:,} steps of {preset['batch']} images; {sizes}"
        )
        lines.append(
            "    "
            f"{'possible here' if preset['possible'] else 'not possible here: ' + '; '.join(preset['against'])}"
        )
        if preset["missing"]:
            lines.append(f"    to be had first: {'; '.join(preset['missing'])}")
    return "\n".join(lines)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"
