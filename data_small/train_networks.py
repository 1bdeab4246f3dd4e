"""Train the small networks that ship with the embedded dataset, and write each with its training log.

    python data_small/train_networks.py teacher       # the frozen vision encoder REPA aligns with
    python data_small/train_networks.py perceptual    # the VAE's perceptual distance
    python data_small/train_networks.py evaluator     # the network that judges; never trained against
    python data_small/train_networks.py vae           # the VAE all experiments start from (needs perceptual)
    python data_small/train_networks.py vae_only      # that VAE after 400 steps of chapter 05's control
    python data_small/train_networks.py vae_e2e       # that VAE after 400 steps of REPA-E, as in chapter 05
    python data_small/train_networks.py sit           # a SiT: 20,000 steps of REPA on that VAE, frozen
    python data_small/train_networks.py e2e_20k       # 20,000 steps of REPA-E: a VAE and its SiT, two files

The last four need all the others. Teacher, perceptual network and evaluator see different images (each has
its own seed of the image maker), learn different tasks (the teacher class, pose and the parts in every
patch; the perceptual network quarter turns, without labels; the evaluator class) and have different
architectures. On one machine the same command gives the same bytes: one thread, fixed seeds, deterministic
algorithms.
"""

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from make_images import PART_NAMES, POSE_NAMES, make_split, record_checksums, sha256
from torch import Tensor
from tqdm import tqdm

from repae_lite.checkpoints.models import save_sit, save_vae
from repae_lite.data.datasets import load_embedded
from repae_lite.evaluation.evaluation_net import EvaluationNet
from repae_lite.evaluation.metrics import psnr
from repae_lite.method.losses import TinyPerceptualLoss, VAELossConfig, vae_regularization_loss
from repae_lite.networks.encoders import TinyViT
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.teaching.small_scale import SmallScale
from repae_lite.utils.files import write_text
from repae_lite.utils.pixels import CLASS_NAMES, to_unit_range
from repae_lite.utils.state_dicts import save_weights

FOLDER = Path(__file__).resolve().parent
# Of the weights and of the image maker; from the fifth on they are chapter 05's seed.
SEEDS = {"teacher": 101, "perceptual": 102, "evaluator": 103, "vae": 104}
SEEDS |= {"vae_only": 0, "vae_e2e": 0, "sit": 0, "e2e_20k": 0}
# Of the images on which progress is measured, disjoint from training images and evaluation split.
HELD_OUT_SEED = 199


def draw_images(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh draws: images (N, 3, 32, 32) in [-1, 1], labels (N,), parts (N, 32, 32), poses (N, 7)."""
    images, labels, parts, poses = (
        torch.from_numpy(a) for a in make_split("train", count, seed=seed, progress=True)
    )
    return to_unit_range(images), labels, parts.long(), poses


def train(
    name: str,
    module: torch.nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    evaluate: Callable[[], dict[str, float]],
    *,
    count: int,
    steps: int,
    batch: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    log_every: int = 500,
) -> list[dict[str, float]]:
    """AdamW with warm-up and cosine decay; `loss_of` maps indices (B,) to a loss. Returns the log."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False, final_div_factor=100
    )
    log = []
    for step in tqdm(range(1, steps + 1), desc=name, unit="step", mininterval=5):
        module.train()
        loss = loss_of(torch.randint(count, (batch,)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % log_every == 0 or step == steps:
            module.eval()
            with torch.no_grad():
                log.append(
                    {"step": step, "loss": round(float(loss), 6)}
                    | {k: round(v, 5) for k, v in evaluate().items()}
                )
            tqdm.write(json.dumps(log[-1]))
    module.eval()
    return log


def train_teacher(steps: int) -> tuple[torch.nn.Module, dict]:
    x, labels, parts, poses = draw_images(SEEDS["teacher"], 12000)
    coverage = patch_coverage(parts)
    x_test, labels_test, parts_test, poses_test = draw_images(HELD_OUT_SEED, 1000)
    coverage_test = patch_coverage(parts_test)
    pose_mean, pose_std = poses.mean(0), poses.std(0)
    teacher = TinyViT(len(PART_NAMES), len(POSE_NAMES))

    def loss_of(index: Tensor) -> Tensor:
        tokens = teacher(x[index])
        pooled = tokens.mean(1)
        pose = (poses[index] - pose_mean) / pose_std
        return (
            F.cross_entropy(teacher.class_head(pooled), labels[index])
            + F.smooth_l1_loss(teacher.pose_head(pooled), pose)
            + 2 * F.cross_entropy(teacher.parts_head(tokens).transpose(1, 2), coverage[index].transpose(1, 2))
        )

    def evaluate() -> dict[str, float]:
        tokens = teacher(x_test)
        pooled = tokens.mean(1)
        pose_error = (teacher.pose_head(pooled) - (poses_test - pose_mean) / pose_std).square().mean()
        parts_hat = teacher.parts_head(tokens).softmax(-1)
        overlap = torch.minimum(parts_hat, coverage_test).sum(-1).mean()
        return {
            "class_accuracy": float((teacher.class_head(pooled).argmax(1) == labels_test).float().mean()),
            "pose_r2": 1 - float(pose_error),
            "parts_overlap": float(overlap),
            "cosine_to_label_mean": label_leak(tokens, labels_test),
        }

    log = train("teacher", teacher, loss_of, evaluate, count=len(x), steps=steps, weight_decay=0.05)
    return teacher, {"images": len(x), "curve": log}


def patch_coverage(parts: Tensor, grid: int = 4) -> Tensor:
    """Share of each part type in each patch: (N, 32, 32) integers to (N, grid^2, parts)."""
    onehot = (F.one_hot(chunk, len(PART_NAMES)).permute(0, 3, 1, 2).float() for chunk in parts.split(500))
    return torch.cat([F.adaptive_avg_pool2d(chunk, grid).flatten(2).transpose(1, 2) for chunk in onehot])


def label_leak(tokens: Tensor, labels: Tensor) -> float:
    """Mean cosine of tokens to the mean token of their class and position: 1 if the label says it all."""
    means = torch.stack([tokens[labels == c].mean(0) for c in range(len(CLASS_NAMES))])
    return float(F.cosine_similarity(tokens, means[labels], dim=-1).mean())


def train_perceptual(steps: int) -> tuple[torch.nn.Module, dict]:
    x, *_ = draw_images(SEEDS["perceptual"], 8000)
    x_test, *_ = draw_images(HELD_OUT_SEED, 1000)
    net = TinyPerceptualLoss()

    def rotated(images: Tensor, turns: Tensor) -> Tensor:
        return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images, turns, strict=True)])

    turns_test = torch.arange(len(x_test)) % 4
    x_test = rotated(x_test, turns_test)

    def loss_of(index: Tensor) -> Tensor:
        turns = torch.randint(4, index.shape)
        return F.cross_entropy(net.rotation_logits(rotated(x[index], turns)), turns)

    def evaluate() -> dict[str, float]:
        return {
            "rotation_accuracy": float((net.rotation_logits(x_test).argmax(1) == turns_test).float().mean())
        }

    log = train("perceptual", net, loss_of, evaluate, count=len(x), steps=steps, lr=3e-3, weight_decay=0.01)
    return net, {"images": len(x), "curve": log}


def train_evaluator(steps: int) -> tuple[torch.nn.Module, dict]:
    x, labels, *_ = draw_images(SEEDS["evaluator"], 12000)
    x_test, labels_test, *_ = draw_images(HELD_OUT_SEED, 1000)
    net = EvaluationNet(len(CLASS_NAMES))

    def loss_of(index: Tensor) -> Tensor:
        return F.cross_entropy(net(x[index]), labels[index], label_smoothing=0.05)

    def evaluate() -> dict[str, float]:
        return {"class_accuracy": float((net(x_test).argmax(1) == labels_test).float().mean())}

    log = train(
        "evaluator", net, loss_of, evaluate, count=len(x), steps=steps, weight_decay=0.05, log_every=200
    )
    return net, {"images": len(x), "curve": log}


def train_vae(steps: int) -> tuple[AutoencoderKL, dict]:
    x = to_unit_range(load_embedded("train")[0])
    x_test, *_ = draw_images(HELD_OUT_SEED, 1000)
    perceptual = TinyPerceptualLoss.pretrained()
    vae = AutoencoderKL.from_preset("tiny")
    config = VAELossConfig(gan_weight=0.0)  # an adversarial term costs 0.6 dB at this scale

    def loss_of(index: Tensor) -> Tensor:
        images = x[index]
        images = torch.where(torch.rand(len(index), 1, 1, 1) < 0.5, images.flip(3), images)
        posterior, _, x_hat = vae(images)
        losses = vae_regularization_loss(images, x_hat, posterior.kl(), config, perceptual=perceptual)
        return losses["vae_reg"]

    def evaluate() -> dict[str, float]:
        x_hat = vae.decode(vae.encode(x_test).mode())
        return {
            "psnr": float(psnr(x_test, x_hat).mean()),
            "perceptual": float(perceptual(x_test, x_hat).mean()),
        }

    log = train("vae", vae, loss_of, evaluate, count=len(x), steps=steps, batch=32, lr=2e-3)
    return vae, {"images": len(x), "curve": log, "loss": vars(config)}


def tune_vae(method: str, steps: int) -> tuple[AutoencoderKL, dict]:
    """What becomes of the VAE in chapter 05, seed 0, under "repa-e" or its control "vae-only"."""
    small = SmallScale.load()
    state = small.new_state(method)
    losses = small.train(state, steps, targets=small.tokens, seed=torch.initial_seed(), label=method)
    curve = [
        {"step": i + 1, **{k: round(v, 4) for k, v in losses[i].items()}}
        for i in range(steps // 10 - 1, steps, steps // 10)
    ]
    return state.vae, {"images": len(small.images), "method": method, "curve": curve}


def train_long(method: str, steps: int) -> tuple[dict[str, torch.nn.Module], dict]:
    """Chapter 05's recipe for far longer: the averaged SiT, and the VAE if the method trains it."""
    small = SmallScale.load()
    state = small.new_state(method)
    state.config = dataclasses.replace(state.config, ema_decay=0.999)
    losses = small.train(state, steps, targets=small.tokens, seed=torch.initial_seed(), label=method)
    every = max(steps // 40, 1)  # the log holds means over this many steps
    curve = [
        {"step": end}
        | {k: round(sum(step[k] for step in losses[end - every : end]) / every, 4) for k in losses[0]}
        for end in range(every, steps + 1, every)
    ]
    networks = (
        {"sit": state.ema} if method == "repa" else {"vae_e2e_20k": state.vae, "sit_e2e_20k": state.ema}
    )
    return networks, {"images": len(small.images), "method": method, "curve": curve}


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, x: Tensor) -> LatentStats:
    """Of sampled latents."""
    z = torch.cat([vae.encode(batch).sample() for batch in x.split(500)])
    return LatentStats(z.mean((0, 2, 3)), z.std((0, 2, 3)))


TRAINERS = {
    "teacher": (train_teacher, 3000),
    "perceptual": (train_perceptual, 1500),
    "evaluator": (train_evaluator, 1200),
    "vae": (train_vae, 9000),
    "vae_only": (lambda steps: tune_vae("vae-only", steps), 400),
    "vae_e2e": (lambda steps: tune_vae("repa-e", steps), 400),
    "sit": (lambda steps: train_long("repa", steps), 20000),
    "e2e_20k": (lambda steps: train_long("repa-e", steps), 20000),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=TRAINERS)
    parser.add_argument("--steps", type=int, help="training steps instead of the shipped number")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to")
    args = parser.parse_args()

    torch.set_num_threads(1)  # the same sums in the same order, and two networks can train side by side
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEEDS[args.network])
    trainer, steps = TRAINERS[args.network]
    steps = args.steps or steps
    start = time.perf_counter()
    trained, log = trainer(steps)
    networks = trained if isinstance(trained, dict) else {args.network: trained}
    for name, net in networks.items():
        path = args.out / f"{name}.safetensors"
        if isinstance(net, AutoencoderKL):
            save_vae(path, net, latent_statistics(net, to_unit_range(load_embedded("train")[0])))
        elif isinstance(net, SiT):
            save_sit(path, net.half())  # half the size; a sample's pixels change by a level at most
        else:
            save_weights(path, net)
        record_checksums(args.out, {path.name: sha256(path.read_bytes())})
    log = {
        "network": args.network,
        "parameters": sum(p.numel() for net in networks.values() for p in net.parameters()),
        "steps": steps,
        "seed": SEEDS[args.network],
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        **log,
    }
    write_text(args.out / "logs" / f"{args.network}.json", json.dumps(log, indent=1) + "\n")
    print(f"wrote {', '.join(networks)} and a log", file=sys.stderr)


if __name__ == "__main__":
    main()
