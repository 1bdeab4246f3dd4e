"""What one training step keeps in memory for its backward passes, and how much it computes, counted on a CPU.

    python reproduce/benchmarks/memory.py --preset mid
    python reproduce/benchmarks/memory.py --preset repae-sdvae --parts   # each network's share

The preset's own networks with random weights take a step of few images, and every tensor that autograd saves
is counted while it lives, weights apart; a straight line through two sizes of the batch gives bytes per image
at once. A GPU needs more: its context, workspaces, and what lives only inside an operation. Gradient
checkpointing is left out: what it recomputes cannot be counted in this way. Operations are those of matrix
products and convolutions, two to a multiplication.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from repae_lite.commands.machine import GIB, needs
from repae_lite.commands.presets import read_preset
from repae_lite.method.losses import LPIPSLoss
from repae_lite.method.steps import Draws, StepConfig, TrainState, all_updates, make_ema
from repae_lite.networks.discriminator import PatchDiscriminator
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.networks.layers import set_gradient_checkpointing
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import VAE_PRESETS, AutoencoderKL, ResidualBlock
from repae_lite.training.config import TrainConfig
from repae_lite.training.parallel import ParallelMechanics

CARDS = (8, 12, 24)  # GiB
REST = 1.5  # GiB, assumed: context, workspaces, what lives only inside an operation


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, norms compute in float32 under autocast, too."""

    def in_float32(norm: Callable) -> Callable:
        return lambda x, *rest, **named: norm(x.float(), *rest, **named)

    with ExitStack() as patches:
        for name in ("group_norm", "layer_norm"):
            patches.enter_context(patch.object(functional, name, in_float32(getattr(functional, name))))
        yield


class Saved:
    """Counts the bytes that autograd has saved at a time; a storage that is saved twice counts once.

    Attributes:
        peak: the most bytes so far.
    """

    def __init__(self, *modules: torch.nn.Module):
        self.weights = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
        self.count, self.now, self.peak = Counter(), 0, 0

    def pack(self, tensor: torch.Tensor) -> "_Kept | torch.Tensor":
        """Called with each tensor that is saved."""
        storage = tensor.untyped_storage()
        return tensor if storage.data_ptr() in self.weights else _Kept(self, tensor)

    @staticmethod
    def unpack(kept: "_Kept | torch.Tensor") -> torch.Tensor:
        """Called with what `pack` returned."""
        return kept.tensor if isinstance(kept, _Kept) else kept


class _Kept:
    def __init__(self, saved: Saved, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.saved, self.tensor = saved, tensor
        self.key, self.size = storage.data_ptr(), storage.nbytes()
        saved.now += self.size * (not saved.count[self.key])
        saved.count[self.key] += 1
        saved.peak = max(saved.peak, saved.now)

    def __del__(self):
        self.saved.count[self.key] -= 1
        self.saved.now -= self.size * (not self.saved.count[self.key])


def networks(config: TrainConfig, half: bool) -> TrainState:
    """The networks of a run with random weights; plain SGD, whose state is nothing."""
    preset = VAE_PRESETS[config.vae]
    vae, discriminator = AutoencoderKL(preset), PatchDiscriminator()
    sit = SiT.from_preset(
        config.model,
        in_channels=preset.latent_channels,
        input_size=config.resolution // preset.downsampling,
        num_classes=10,
        target_dims=(768,),
        **({"alignment_depth": config.encoder_depth} if config.encoder_depth else {}),
    )
    trained = {"vae": vae, "discriminator": discriminator, "sit": sit}
    optimizers = {
        name: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-6)
        for name, module in trained.items()
    }
    mechanics = ParallelMechanics(torch.device("cpu"), "bf16" if half else "no", optimizers)
    perceptual = LPIPSLoss(pretrained_trunk=False)
    return TrainState(
        vae, sit, make_ema(sit), optimizers, StepConfig(), discriminator, perceptual, mechanics=mechanics
    )


def one_step(state: TrainState, config: TrainConfig, images: int) -> None:
    """A step of random images."""
    x = torch.rand(images, 3, config.resolution, config.resolution) * 2 - 1
    targets = [torch.randn(images, (config.resolution // 16) ** 2, 768)]
    state.step = 10**6  # the adversarial term is on
    all_updates(state, x, torch.arange(images) % 10, targets, Draws())


def peak(config: TrainConfig, images: int, half: bool) -> int:
    """Bytes that a step of some images keeps at most."""
    state = networks(config, half)
    saved = Saved(state.vae, state.sit, state.discriminator, state.perceptual)
    with saved_tensors_hooks(saved.pack, saved.unpack), as_on_a_gpu():
        one_step(state, config, images)
    return saved.peak


def operations(config: TrainConfig) -> float:
    """Floating-point operations of a step for each image, the encoder's too."""
    state, counter = networks(config, False), FlopCounterMode(display=False)
    encoder = VisionEncoder.from_name(config.encoders.split(",")[0], config.resolution, weights="random")
    with counter:
        one_step(state, config, 1)
        encoder(torch.zeros(1, 3, config.resolution, config.resolution, dtype=torch.uint8))
    return counter.get_total_flops()


def parts(config: TrainConfig) -> None:
    """Prints what each network's forward passes save in bfloat16 for each image, and how much they compute:
    what `--gradient-checkpointing` saves there at most, and what it costs. With it, one level of the VAE at a
    time is kept, whose norms are computed again.
    """
    state = networks(config, True)
    vae, sit, channels = state.vae, state.sit, VAE_PRESETS[config.vae].latent_channels

    def align(z: torch.Tensor, *, whole: bool) -> object:
        sit.requires_grad_(whole)
        labels, t = torch.zeros(len(z), dtype=torch.int64), torch.full((len(z),), 0.5)
        return sit(z, t, labels, project=True, align_only=not whole)

    def largest_level(x: torch.Tensor) -> torch.Tensor:
        level = vae.decoder.up[0]
        channels = level.block[0].norm1.num_channels
        return level(x.mean(1, keepdim=True).expand(-1, channels, -1, -1))

    calls = {
        "VAE, encoder": lambda x, z: vae.encode(x).mean,
        "VAE, decoder": lambda x, z: vae.decode(z),
        "VAE, the decoder's last level": lambda x, z: largest_level(x),
        "LPIPS": lambda x, z: state.perceptual(x.detach(), x),
        "discriminator, its update": lambda x, z: (state.discriminator(x), state.discriminator(x)),
        "SiT to the tap, for the VAE": lambda x, z: align(z, whole=False),
        "SiT, its update": lambda x, z: align(z.detach(), whole=True),
    }
    blocks = [module for module in vae.modules() if isinstance(module, ResidualBlock)]
    for again in (False, True):
        set_gradient_checkpointing(again, *blocks)
        for name, call in calls.items():
            if again and "VAE," not in name:
                continue
            exact = name.startswith(("LPIPS", "discriminator"))  # float32: DIFFERENCES.md, D11
            found = []
            for images in (1, 2):  # autocast's copies of the weights do not grow with the batch
                x = torch.rand(images, 3, config.resolution, config.resolution).requires_grad_()
                z = torch.randn(images, channels, sit.config.input_size, sit.config.input_size)
                saved = Saved(vae, sit, state.discriminator, state.perceptual)
                counter = FlopCounterMode(display=False)
                with saved_tensors_hooks(saved.pack, saved.unpack), as_on_a_gpu(), counter:
                    with nullcontext() if exact else state.mechanics.autocast():
                        kept = call(x, z.requires_grad_())
                    found.append((saved.peak / GIB, counter.get_total_flops() / 1e12))
                    del kept
            gib, tflop = (two - one for one, two in zip(*found, strict=True))
            what = name + ", norms computed again" * again
            print(f"{what}: {gib:.3f} GiB, {tflop:.3f} TFLOP, {gib / tflop:.1f} GiB per TFLOP", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mid")
    parser.add_argument("--images", type=int, nargs=2, default=(1, 2), help="sizes of the batch")
    parser.add_argument(
        "--parts", action="store_true", help="what each network saves for an image, in bfloat16"
    )
    args = parser.parse_args()
    preset = read_preset(args.preset, "repae")
    if args.parts:
        return parts(preset.config)
    config = replace(preset, options={**preset.options, "micro_batches": 1}).config
    state = needs(preset)["device_memory"]
    network = VisionEncoder.from_name(config.encoders.split(",")[0], config.resolution, weights="random")
    encoder = sum(p.numel() for p in network.parameters())
    fixed = state + 4 * encoder
    print(f"weights, gradients, AdamW, averages, encoder: {fixed / GIB:.2f} GiB")
    print(f"operations: {operations(config) / 1e12:.3f} TFLOP for each image of a step")
    for name, half in (("float32", False), ("bfloat16", True)):
        few, more = args.images
        low, high = (peak(config, images, half) for images in args.images)
        each = (high - low) / (more - few)
        base = low - few * each
        print(f"{name}: {base / GIB:.2f} GiB + {each / GIB:.3f} GiB for each image at once")
        for card in CARDS:
            room = card - (fixed + base) / GIB - REST
            print(f"  {card} GiB: {max(0, int(room * GIB / each))} images at once")


if __name__ == "__main__":
    main()
