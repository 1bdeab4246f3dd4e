"""From a run's options to its data, encoders, networks and optimisers.

Every check that can be made before the first step is made here. Taught at small scale in
`notebooks/05_end_to_end.ipynb`, section 3.
"""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from repae_lite.checkpoints.models import load_discriminator, load_latent_stats, load_vae
from repae_lite.data.datasets import open_dataset
from repae_lite.data.latents import CachedLatentsDataset
from repae_lite.data.training_data import TrainingData
from repae_lite.evaluation.evaluate import RunJudge
from repae_lite.evaluation.protocols import load_protocol
from repae_lite.method.losses import LPIPSLoss, TinyPerceptualLoss, VAELossConfig
from repae_lite.method.steps import StepConfig, TrainState, make_ema
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.encoders import VisionEncoder, check_token_grid, load_encoders
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.layers import set_gradient_checkpointing
from repae_lite.networks.sit import SIT_PRESETS, SiT
from repae_lite.networks.vae import VAE_PRESETS, AutoencoderKL
from repae_lite.training.config import NONE, TrainConfig
from repae_lite.training.loss_config import is_built_in, read_loss_config
from repae_lite.utils.devices import conv_layout, fused_optimizer
from repae_lite.utils.files import data_small_dir
from repae_lite.utils.pixels import to_unit_range
from repae_lite.utils.processes import process_rank

ADAM = (torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam)
OPTIMIZERS = {kind.__name__.lower(): kind for kind in (*ADAM, torch.optim.SGD)}
logger = logging.getLogger(__name__)


def compiled_parts(state: TrainState) -> list[nn.Module]:
    """What --compile compiles, each by itself: both halves of the VAE and SiT's blocks."""
    vae, sit = state.vae, state.sit
    return [*((vae.encoder, vae.decoder) if vae else ()), *(sit.blocks if sit else ())]


def open_data(config: TrainConfig) -> TrainingData:
    """The training data of a run.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: see `repae_lite.open_dataset`; latents of another VAE; too many classes.
    """
    folder = data_small_dir() / "train" if config.data_dir == "embedded" else Path(config.data_dir)
    images = latents = None
    if config.vae_latents_name:
        latents = _open_latents(config, folder)
    if not config.vae_latents_name or config.encoders:
        images = open_dataset(folder, config.resolution)
    data = TrainingData(images, latents)
    if config.command != "vae":
        data.require_classes()
    if config.num_classes is not None and data.num_classes > config.num_classes:
        raise ValueError(
            f"the data has {data.num_classes} classes but --num-classes is {config.num_classes}: leave it out"
        )
    return data


def _open_latents(config: TrainConfig, folder: Path) -> CachedLatentsDataset:
    beside = folder.is_file() or folder.suffix.lower() == ".tar"  # a range of shards is no file
    path = (folder.parent if beside else folder) / f"{config.vae_latents_name}.h5"
    latents = CachedLatentsDataset(path)
    latents.check_vae(load_vae(config.vae_ckpt))
    vae = VAE_PRESETS[config.vae]
    side = config.resolution // vae.downsampling
    expected = (2 * vae.latent_channels, side, side)
    if latents.shape != expected:
        raise ValueError(
            f"the latents in {path} have shape {latents.shape} and not {expected}, which {config.vae} makes "
            f"of {config.resolution}-pixel images: cache them again, or choose their --vae and --resolution"
        )
    return latents


# ---------------------------------------------------------------- networks


@dataclass
class TrainSetup:
    """What a training run starts from.

    Attributes:
        state: networks and optimisers; its mechanics are still the plain ones.
        encoders: frozen; empty for a plain SiT.
        rates: full learning rate by optimiser.
    """

    state: TrainState
    encoders: list[VisionEncoder]
    rates: dict[str, float]

    def networks(self) -> dict[str, nn.Module]:
        """What a checkpoint holds: all that changes."""
        state = self.state
        vae = state.vae if "vae" in state.optimizers else None
        found = {"sit": state.sit, "ema": state.ema, "discriminator": state.discriminator, "vae": vae}
        return {name: module for name, module in found.items() if module is not None}


def build(config: TrainConfig, num_classes: int, device: torch.device) -> TrainSetup:
    """Networks with their first weights, which follow from the seed, and optimisers.

    Raises:
        ValueError: sizes that do not fit together, weights of another architecture.
        FileNotFoundError: weights that are not there.
        ConnectionError: weights that are not here and cannot be downloaded.
    """
    steps = _step_config(config)
    torch.manual_seed(config.seed)
    vae, stats = _start_vae(config)
    encoders = _encoders(config) if config.encoders else []
    sit = ema = discriminator = perceptual = None
    if config.command != "vae":
        sit = _new_sit(config, num_classes, vae, encoders)
        if stats is not None:
            sit.set_latent_stats(stats)
        ema = make_ema(sit)
    if config.command == "ldm":
        vae.requires_grad_(False)
    else:
        discriminator = _new_discriminator(config) if steps.vae_loss.gan_weight else None
        perceptual = _perceptual(config) if steps.vae_loss.perceptual_weight else None
        for network in (discriminator, perceptual):
            if config.resolution < getattr(network, "smallest", 0):
                raise ValueError(
                    f"--resolution {config.resolution} is too small for the {type(network).__name__} of "
                    f"--loss-cfg-path {config.loss_cfg_path}: give {network.smallest} or more"
                )
    for module in filter(None, (vae, sit, ema, discriminator, perceptual, *encoders)):
        module.to(device)
    for module in filter(None, (vae, discriminator, perceptual)):
        module.to(memory_format=conv_layout(device))
    set_gradient_checkpointing(config.gradient_checkpointing, vae, *([sit] if sit else []))
    trained = {
        "sit": (sit, config.learning_rate),
        "discriminator": (discriminator, config.disc_learning_rate),
    }
    if config.command != "ldm":
        trained["vae"] = (vae, config.vae_learning_rate)
    rates = {name: rate for name, (module, rate) in trained.items() if module is not None}
    optimizers = {name: new_optimizer(config, trained[name][0], rate) for name, rate in rates.items()}
    if config.command != "ldm" and is_built_in(config.loss_cfg_path) and process_rank() == 0:
        recipe = Path(config.loss_cfg_path).name
        logger.info(f"the weights of the VAE's losses are the built-in recipe {recipe}")
    state = TrainState(vae, sit, ema, optimizers, steps, discriminator, perceptual)
    return TrainSetup(state, encoders, rates)


def _start_vae(config: TrainConfig) -> tuple[AutoencoderKL, LatentStats | None]:
    """The VAE to start from, and its latent statistics; those of a fresh one are unknown."""
    preset = VAE_PRESETS[config.vae]
    if config.resolution % preset.downsampling:
        raise ValueError(
            f"--resolution {config.resolution} is not a multiple of {preset.downsampling}, by which "
            f"{config.vae} reduces it"
        )
    if config.vae_ckpt == NONE:
        return AutoencoderKL(preset), None
    vae = load_vae(config.vae_ckpt).requires_grad_(True)
    if vae.config != preset:
        fitting = [name for name, other in VAE_PRESETS.items() if other == vae.config]
        raise ValueError(
            f"the VAE in {config.vae_ckpt} is no {config.vae} (it has {vae.config.latent_channels} latent "
            f"channels and reduces {vae.config.downsampling}x): "
            f"{f'say --vae {fitting[0]}' if fitting else 'no --vae is like it'}"
        )
    return vae, load_latent_stats(config.vae_ckpt) if config.command != "vae" else None


def _encoders(config: TrainConfig) -> list[VisionEncoder]:
    weights = config.enc_weights.split(",")
    return load_encoders(
        config.encoders, config.resolution, weights=weights[0] if len(weights) == 1 else weights
    )


def _new_sit(config: TrainConfig, num_classes: int, vae: AutoencoderKL, encoders: list[VisionEncoder]) -> SiT:
    if config.model not in SIT_PRESETS:
        raise ValueError(f"unknown --model {config.model!r}: choose one of {', '.join(SIT_PRESETS)}")
    num_classes, width = config.num_classes or num_classes, SIT_PRESETS[config.model].width
    size = 2 * 4 * (num_classes + 1) * width  # bytes of the label tables of SiT and its moving average
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"--num-classes {num_classes} needs {size / 1e9:,.0f} GB for its tables of labels, but this "
            f"machine has {memory / 1e9:,.0f} GB: give as many as there are, or leave it out"
        )
    check_token_grid(
        encoders, downsampling=vae.config.downsampling, patch_size=SIT_PRESETS[config.model].patch_size
    )
    return SiT.from_preset(
        config.model,
        in_channels=vae.config.latent_channels,
        input_size=config.resolution // vae.config.downsampling,
        num_classes=num_classes,
        label_dropout=config.cfg_prob,
        target_dims=tuple(encoder.embed_dim for encoder in encoders),
        projector=config.projector,
        bn_momentum=config.bn_momentum,
        fixed_latent_stats=config.command == "ldm",  # as in the official run on a frozen VAE
        train_pos_embed=config.train_pos_embed,
        **({"alignment_depth": config.encoder_depth} if config.encoder_depth else {}),
    )


def _step_config(config: TrainConfig) -> StepConfig:
    common = {"max_grad_norm": config.max_grad_norm, "ema_decay": config.ema_decay}
    if config.command != "ldm":
        common["vae_loss"] = loss = VAELossConfig(**read_loss_config(config.loss_cfg_path))
        _check_losses(config, loss)
        common["loss_precision"] = config.loss_precision
    if config.command != "vae":
        common |= {"proj_coeff": config.proj_coeff, "path": config.path_type, "weighting": config.weighting}
    repae = config.command == "repae"
    return StepConfig(
        vae_align_coeff=config.vae_align_proj_coeff if repae and config.encoders else 0.0,
        vae_diffusion_coeff=config.vae_diffusion_coeff if repae else 0.0,
        **common,
    )


def _check_losses(config: TrainConfig, loss: VAELossConfig) -> None:
    """Refuses options that act on a term of the VAE's loss which is not there."""
    none = f"since --loss-cfg-path {config.loss_cfg_path} has"
    if not loss.gan_weight:
        config.refuse_idle("discriminator", f"{none} no adversarial loss", by="loss_cfg_path")
    if not loss.perceptual_weight:
        config.refuse_idle("perceptual", f"{none} no perceptual loss", by="loss_cfg_path")
    if not loss.gan_weight and not loss.perceptual_weight:
        config.refuse_idle(
            "losses", f"{none} neither a perceptual nor an adversarial loss", by="loss_cfg_path"
        )


def _new_discriminator(config: TrainConfig) -> PatchDiscriminator:
    given = config.disc_pretrained_ckpt
    return load_discriminator(given).train() if given else PatchDiscriminator()


def _perceptual(config: TrainConfig) -> nn.Module:
    if config.perceptual == "tiny":
        return TinyPerceptualLoss.pretrained()
    return LPIPSLoss(config.lpips_range)


# ---------------------------------------------------------------- evaluation


def run_judge(config: TrainConfig, device: torch.device) -> RunJudge | None:
    """What judges a run while it trains; None without --eval-every.

    Raises:
        FileNotFoundError, ValueError: see `load_protocol` and `RunJudge`.
    """
    if not config.eval_every:
        return None
    if config.eval_protocol is None:
        raise ValueError("--eval-every needs a protocol: give --eval-protocol, see repae evaluate --help")
    protocol = load_protocol(config.eval_protocol)
    return RunJudge(
        replace(protocol, count=config.eval_samples or protocol.count), config.eval_reference, device
    )


# ---------------------------------------------------------------- optimisers


def new_optimizer(config: TrainConfig, module: nn.Module, rate: float) -> torch.optim.Optimizer:
    """An optimiser of torch.optim by name, over the parameters that train, fused on a GPU where it can be.

    Raises:
        ValueError: no such optimiser.
    """
    kind = OPTIMIZERS.get(config.optimizer.lower())
    if kind is None:
        names = ", ".join(known.__name__ for known in OPTIMIZERS.values())
        raise ValueError(f"unknown --optimizer {config.optimizer!r}: choose one of {names}")
    parameters = [p for p in module.parameters() if p.requires_grad]
    options = {"lr": rate, "weight_decay": config.adam_weight_decay}
    if kind in ADAM:
        options |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        options["fused"] = fused_optimizer(parameters[0].device)
    return kind(parameters, **options)


# ---------------------------------------------------------------- measures


@torch.no_grad()
def latent_stats(
    vae: AutoencoderKL, data: TrainingData, device: torch.device, images: int = 512
) -> LatentStats:
    """Of the latents of the data's first images, in the VAE's own mode."""
    count, posteriors = min(images, len(data)), []
    for start in range(0, count, 32):
        batch = torch.stack([data[i]["image"] for i in range(start, min(start + 32, count))])
        posteriors.append(vae.encode(to_unit_range(batch.to(device))))
    return LatentStats.from_posteriors(
        torch.cat([posterior.mean for posterior in posteriors]),
        torch.cat([posterior.std for posterior in posteriors]),
    )
