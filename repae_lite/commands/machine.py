"""What this machine has, and what each preset needs of it: `repae check`.

Sizes are arithmetic on the networks' numbers of parameters and on the files' layouts: a lower bound, since
activations, which grow with the images per process, come on top. Times are not given: the paper publishes
none, and guesses would be worse.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants, scan_cache_dir

from repae_lite import __version__
from repae_lite.checkpoints.released import ORGANISATION, RELEASED
from repae_lite.commands.presets import Preset, preset_names, read_preset
from repae_lite.commands.rows import read_row, row_names
from repae_lite.data.datasets import SPLITS, ImageH5Dataset
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.encoder_table import ENCODERS, EncoderSpec
from repae_lite.networks.sit import SIT_PRESETS, SiT
from repae_lite.networks.vae import VAE_PRESETS, AutoencoderKL
from repae_lite.training.config import NO_GAN, TrainConfig
from repae_lite.utils import devices
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.state_dicts import read_weights

PACKAGES = "torch torchvision timm lpips accelerate huggingface_hub safetensors h5py diffusers".split()
NETWORKS = ("teacher", "perceptual", "evaluator", "vae")
CHECKSUMS, SHA256 = "CHECKSUMS.sha256", re.compile("[0-9a-f]{64}")
NO_FLOAT64 = "no float64: sampling keeps float32; PYTORCH_ENABLE_MPS_FALLBACK=1 has the CPU do what MPS lacks"
GIB = 2**30


def survey(
    folder: str | Path = ".", pretrained: str | Path = "pretrained", names: Sequence[str] = ()
) -> dict:
    """Everything `repae check` tells, as JSON values; sizes in bytes.

    Args:
        folder: where runs would be written: its disk is looked at.
        pretrained: where `repae download` puts released sets.
        names: of the presets that are looked at; those without a base if there are none.

    Raises:
        ValueError, FileNotFoundError: see `read_preset`.
    """
    presets = {name: read_preset(name) for name in names or preset_names(based=False)}
    found = this_machine(folder, pretrained)
    rows, found["presets"] = row_names(), {}
    for name, preset in presets.items():
        cost = read_row(name).hours if name in rows else "not known"
        found["presets"][name] = needs(preset) | verdict(preset, found) | {"cost": cost}
    return found


def this_machine(folder: str | Path = ".", pretrained: str | Path = "pretrained") -> dict:
    """`survey` without the presets."""
    return {
        "repae_lite": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) if find_spec(name) else None for name in PACKAGES},
        "cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()} | _abilities("cpu"),
        "memory": _memory(),
        "devices": _devices(),
        "unusable": devices.unusable_gpu(),
        "disk": {"folder": str(Path(folder).resolve()), "free": shutil.disk_usage(folder).free},
        "embedded": _embedded(),
        "cached": _cached(Path(pretrained)),
    }


# ---------------------------------------------------------------- what is there


def _memory() -> dict[str, int | None]:
    """Main memory: all of it, and what is free without swapping (None where the system does not say)."""
    info = Path("/proc/meminfo")
    available = re.search(r"MemAvailable: *(\d+) kB", info.read_text()) if info.is_file() else None
    return {
        "total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "available": int(available[1]) * 1024 if available else None,
    }


def _devices() -> list[dict]:
    """The GPUs: what they are, what torch can do on them, and what keeps it from using them."""
    found = []
    for i in range(devices.gpus()):
        obstacle = devices.cuda_obstacle(i)
        free, total = (0, 0) if obstacle else torch.cuda.mem_get_info(i)
        about = {"name": f"cuda:{i}", "kind": devices.gpu_name(i), "memory": total, "free": free}
        found.append(about | _abilities(f"cuda:{i}", obstacle))
    if torch.backends.mps.is_available():
        total = torch.mps.recommended_max_memory()
        free = total - torch.mps.driver_allocated_memory()
        about = {"name": "mps", "kind": "Apple GPU", "memory": total, "free": free}
        found.append(about | _abilities("mps"))
    return found


def _abilities(name: str, obstacle: str | None = None) -> dict:
    """What torch can do on a device; `obstacle` and `compile` say why not, None that nothing is known to be
    in the way.
    """
    device = torch.device(name)
    return {
        "bf16": not obstacle and devices.has_bf16(device),
        "float64": devices.widest_float(device) == torch.float64,
        "compile": None if obstacle else devices.compile_obstacle(device),
        "obstacle": obstacle,
    }


def _embedded() -> dict:
    """What the embedded data holds; `missing` says why it holds nothing, or what of it is damaged."""
    nothing = {"splits": {}, "networks": {}}
    try:
        folder = data_small_dir()
        damaged = damaged_files(folder)
        if damaged:
            names = ", ".join(f"{name} ({state})" for name, state in damaged.items())
            restore = f"git -C {shlex.quote(str(folder))} checkout -- {shlex.join(damaged)}"
            return nothing | {
                "missing": [
                    f"the embedded data in {folder} is not whole: {names}; bring it back with {restore}"
                ]
            }
        splits = {split: ImageH5Dataset(folder / split / "images.h5") for split in SPLITS}
        networks = {name: read_weights(folder / f"{name}.safetensors")[0] for name in NETWORKS}
    except (ValueError, OSError) as error:
        return nothing | {"missing": [str(error)]}
    return {
        "splits": {name: {"images": len(data), "classes": data.num_classes} for name, data in splits.items()},
        "networks": {name: sum(t.numel() for t in state.values()) for name, state in networks.items()},
    }


def damaged_files(folder: Path) -> dict[str, str]:
    """The embedded files that are not as their checksums say: name, and "missing", "unreadable" or "changed".

    `data_small/make_images.py` and `train_networks.py` write CHECKSUMS.sha256: "<sha256>  <name>", and also
    lines of pixels, which a test compares.
    """
    checksums = folder / CHECKSUMS
    if not checksums.is_file():
        return {CHECKSUMS: "missing"}
    lines = [line.partition("  ") for line in checksums.read_text("utf-8", "replace").splitlines()]
    expected = {name: digest for digest, _, name in lines if not name.startswith("pixels of ")}
    required = {f"{split}/{name}" for split in SPLITS for name in ("images.h5", "images_h5.json")}
    required |= {f"{name}.safetensors" for name in NETWORKS}
    if not required <= expected.keys() or not all(SHA256.fullmatch(digest) for digest in expected.values()):
        return {CHECKSUMS: "changed"}
    found = {name: _state(folder / name, digest) for name, digest in expected.items()}
    return {name: state for name, state in found.items() if state}


def _state(path: Path, digest: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return None if hashlib.file_digest(file, "sha256").hexdigest() == digest else "changed"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _cached(pretrained: Path) -> dict:
    """Which weights are here: encoders in timm's caches, released sets in the Hub's and in `pretrained`."""
    hub = Path(constants.HF_HUB_CACHE)
    held = {
        repository.repo_id
        for repository in (scan_cache_dir(hub).repos if hub.is_dir() else ())
        for revision in repository.revisions
        if any(file.file_name.endswith((".safetensors", ".bin", ".pt")) for file in revision.files)
    }

    def has_encoder(spec: EncoderSpec) -> bool:
        # It may name another network's repository.
        source = timm.get_pretrained_cfg(spec.timm_name) if spec.tag else None
        if source is None:
            return False
        if source.hf_hub_id:
            repository = source.hf_hub_id.split("@")[0]
            return repository + spec.timm_name * repository.endswith("/") in held
        file = Path(urlparse(source.url or "").path).name
        return bool(file) and (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file()

    return {
        "hub": str(hub),
        "encoders": [name for name, spec in ENCODERS.items() if has_encoder(spec)] + ["tiny"],
        "released": [name for name in RELEASED if f"{ORGANISATION}/{name}" in held],
        "pretrained": [
            name for name in RELEASED if any(path.is_file() for path in (pretrained / name).glob("[!.]*"))
        ],
    }


# ---------------------------------------------------------------- what presets need


@cache
def parameters(config: TrainConfig) -> dict[str, int]:
    """Numbers of parameters of a run's networks, without building them."""
    vae, sit = VAE_PRESETS[config.vae], SIT_PRESETS[config.model]
    with torch.device("meta"):
        networks = {
            "sit": SiT.from_preset(
                config.model,
                in_channels=vae.latent_channels,
                input_size=config.resolution // vae.downsampling,
                target_dims=sit.target_dims,
            ),
            "vae": AutoencoderKL(vae),
            "discriminator": PatchDiscriminator(),
        }
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def needs(preset: Preset) -> dict:
    """What a preset needs, in bytes, activations apart.

    `device_memory`: weights, gradients, AdamW's two moments (float32 each) and SiT's average; `disk`: images,
    latents where they are cached, and the run's `checkpoints`, of which --keep-last and the one being written
    decide how many are there at once; `downloads`: released sets; `images`, `steps`, `batch`.
    """
    config = preset.config
    count, vae = parameters(config), VAE_PRESETS[config.vae]
    side = config.resolution // vae.downsampling
    tunes_vae, adversarial = config.command != "ldm", config.loss_cfg_path not in ("tiny", NO_GAN)
    sit = count["sit"] if config.command != "vae" else 0
    trained = sit + tunes_vae * (count["vae"] + adversarial * count["discriminator"])
    frozen = 0 if tunes_vae else count["vae"]
    state = 4 * (4 * trained + sit + frozen)  # weight, gradient, two moments; the average
    checkpoint = 4 * (3 * trained + sit)  # weights, two moments; the average
    steps, kept = config.max_train_steps, -(-config.max_train_steps // config.checkpointing_steps)
    if config.keep_last:
        milestones = steps // config.milestone_steps if config.milestone_steps else 0
        kept = min(kept, config.keep_last + 1 + milestones)
    images = 0 if config.data_dir == "embedded" else preset.images * 3 * config.resolution**2
    latents = 0 if tunes_vae else preset.images * 8 * vae.latent_channels * side**2
    return {
        "command": f"train-{config.command}",
        "vae": config.vae,
        "model": config.model,
        "encoder": config.encoders,
        "parameters": count,
        "device_memory": state,
        "disk": images + latents + kept * checkpoint,
        "checkpoints": kept,
        "downloads": list(preset.released),
        "images": preset.images,
        "steps": steps,
        "batch": config.batch_size,
    }


def verdict(preset: Preset, found: dict) -> dict:
    """Whether this machine can run a preset.

    Returns:
        `possible`; `against`, the reasons why not; `missing`, what must be fetched or made first.
    """
    config, wanted, against, missing = preset.config, needs(preset), [], []
    if config.data_dir == "embedded":
        against += found["embedded"].get("missing", [])
    else:
        missing.append("preprocessed images (repae preprocess)")
    if config.vae != "tiny":
        cards = [device for device in found["devices"] if device["name"].startswith("cuda")]
        unusable = [card for card in cards if card.get("obstacle")]
        largest = max((card["memory"] for card in cards if card not in unusable), default=0)
        if not largest and unusable:
            against += [f"torch cannot use {card['name']} ({card['kind']})" for card in unusable]
        elif not largest:
            against.append("there is no CUDA device" + " that torch can use" * bool(found.get("unusable")))
        elif largest < wanted["device_memory"]:
            against.append(
                f"weights and optimisers alone need {wanted['device_memory'] / GIB:.1f} GiB of a device, the "
                f"largest has {largest / GIB:.1f}"
            )
    if config.command == "ldm":
        missing.append("cached latents (repae cache-latents)")
    cached, encoders = found["cached"], (config.encoders or "tiny").split(",")
    missing += [
        f"{name} (timm fetches it at the first run)" for name in encoders if name not in cached["encoders"]
    ]
    missing += [
        f"{name} (repae download {name})" for name in preset.released if name not in cached["pretrained"]
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
    lines.append(f"cpu: float32, {_compiles(cpu)}")
    for device in found["devices"]:
        if device.get("obstacle"):
            lines.append(f"{device['name']}: {device['kind']}, not usable: {device['obstacle']}")
            continue
        lines.append(
            f"{device['name']}: {device['kind']}, {_gib(device['memory'])}, {_gib(device['free'])} free, "
            f"{'bf16' if device['bf16'] else 'no bf16'}, {_compiles(device)}"
            + ("" if device.get("float64", True) else f"; {NO_FLOAT64}")
        )
    if found.get("unusable"):
        lines.append(f"not used: {found['unusable']}")
    if not any(device["name"].startswith("cuda") for device in found["devices"]):
        lines.append("no CUDA device: the embedded scale runs on the CPU, the full-scale presets need a GPU")
    lines += found["embedded"].get("missing", [])
    for split, size in found["embedded"]["splits"].items():
        lines.append(f"embedded {split} split: {size['images']} images, {size['classes']} classes")
    lines += [f"embedded {name}: {count:,} numbers" for name, count in found["embedded"]["networks"].items()]
    cached = found["cached"]
    lines.append(f"encoders here: {', '.join(cached['encoders'])}")
    released = sorted({*cached["pretrained"], *cached["released"]})
    lines.append(f"released sets here: {', '.join(released) or 'none (repae download fetches them)'}")
    lines.append(
        "presets (device memory without activations, which grow with the images per process; GPU-hours of "
        "an H100 from published speeds or from operations, none is measured):"
    )
    for name, preset in found["presets"].items():
        lines.append(
            f"  {name}: {preset['command']}, {preset['model']} on {preset['vae']}, {preset['steps']:,} steps "
            f"of {preset['batch']} images; {_gib(preset['device_memory'])} of device memory and more, "
            f"{preset['disk'] / 1e9:.1f} GB of disk; training: {preset['cost']}"
        )
        against = "; ".join(preset["against"])
        lines.append(f"    not possible here: {against}" if against else "    possible here")
        if preset["missing"]:
            lines.append(f"    needed first: {'; '.join(preset['missing'])}")
    others = len(set(preset_names()) - found["presets"].keys())
    lines.append(
        f"  {others} others: repae check NAME shows one, repae reproduce --list the rows they are for"
    )
    return "\n".join(lines)


def _compiles(device: dict) -> str:
    """Whether --compile has what it needs, in words."""
    obstacle = device.get("compile")
    return f"no torch.compile ({obstacle})" if obstacle else "torch.compile"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"
