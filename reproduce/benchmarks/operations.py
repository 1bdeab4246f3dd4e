"""What an image costs in the training of each row: operations that torch counts, and the GPU-hours they make.

    python reproduce/benchmarks/operations.py                       # every row that trains
    python reproduce/benchmarks/operations.py repae-sdvae repa-l-sdvae
    python reproduce/benchmarks/operations.py repae-sdvae --images-per-second 60   # of one card, as measured

Counted is one step with one image, on torch's device without numbers ("meta"): seconds a row, and the memory
of its networks. Attention counts as two products, without what fused kernels compute again in the backward
pass. Hours are of one H100 and a range, since nothing was measured: from `PEAK_SHARE` of the card's bf16 peak
to what REPA's published speed amounts to. With a measured speed (`repae bench`) hours are what it makes, and
no range. A row's file has them as `cost`.
"""

import argparse
from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

import torch

from repae_lite.commands.rows import read_row, row_names
from repae_lite.method.steps import Draws
from repae_lite.training import benchmark
from repae_lite.training.config import TrainConfig
from repae_lite.utils.measure import counting

PEAK, PEAK_SHARE = 989e12, 0.4  # of an H100 SXM in bf16, FLOP/s, as its data sheet has it
PUBLISHED_SPEED = 5.4 * 256 / 8  # images per second and H100 (REPA, SiT-XL/2 with DINOv2-B)
PUBLISHED_ROW = "repa-sdvae"  # which is this row
DECIDES = (
    "vae", "model", "enc_type", "encoder_depth", "resolution", "loss_cfg_path", "vae_align_proj_coeff",
    "vae_diffusion_coeff",
)  # fmt: skip


def flops(config: TrainConfig) -> float:
    """Of a training step, for one image; counted once for all rows that compute the same."""
    return _flops(config.command, *(getattr(config, name) for name in DECIDES))


@cache
def _flops(command: str, *decides: object) -> float:
    known = dict(zip(DECIDES, decides, strict=True))
    settings = benchmark.Settings(benchmark.bench_config(batch_size=1, **known))
    with ExitStack() as stack:
        work = next(benchmark.WORKS[command](settings, stack))
        state = work.state
        networks = [state.vae, state.sit, state.ema, state.discriminator, state.perceptual, *work.encoders]
        for module in networks:
            if module is not None:
                module.to("meta")
        draws = {name: value.to("meta") for name, value in vars(benchmark.draws_of(settings, 0)).items()}
        object.__setattr__(settings, "device", "meta")
        state.mechanics.update = lambda *_: torch.zeros((), device="meta")  # no products in an optimiser
        stack.enter_context(patch.object(benchmark, "draws_of", lambda *_: Draws(**draws)))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: False))
        with counting() as so_far:
            work.call()
        return float(so_far()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", default=row_names(), help="names (default: all that train)")
    parser.add_argument("--images-per-second", type=float, help="of one card, measured with one of the rows")
    args = parser.parse_args()
    if args.images_per_second is not None and not (args.images_per_second > 0 and len(args.rows) == 1):
        parser.error("--images-per-second is one row's, and more than 0: name the row")
    slow = flops(read_row(PUBLISHED_ROW).preset.config) * PUBLISHED_SPEED
    print(f"{PUBLISHED_ROW}'s published speed is {slow / 1e12:.0f} TFLOP/s")
    for name in args.rows:
        if (preset := read_row(name).preset) is None:
            continue
        config = preset.config
        one = flops(config)
        images = config.max_train_steps * config.batch_size
        if args.images_per_second:
            hours = images / args.images_per_second / 3600
            print(f"{name}: {hours:.0f} GPU-hours at {args.images_per_second:g} images/s")
            continue
        low, high = (images * one / speed / 3600 for speed in (PEAK * PEAK_SHARE, slow))
        print(f"{name}: {one / 1e12:.2f} TFLOP an image, {low:.0f} to {high:.0f} GPU-hours", flush=True)


if __name__ == "__main__":
    main()
