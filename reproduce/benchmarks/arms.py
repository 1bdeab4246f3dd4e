"""Arms of chapters 03 and 05, trained longer and varied: the records behind their learning curves and causes.

    python reproduce/benchmarks/arms.py learning_curves --seeds 0 2 4      # and, beside it, --seeds 1 3
    python reproduce/benchmarks/arms.py learning_curves --join

A record is a list of arms and numbers of steps. Each run has its own schedule (warm-up, then a learning
rate that falls to 0 over the second half), so 400 steps are no part of 1,000. Within a seed, all arms of
one length start from the same weights and see the same batches, times and noise. Every run is judged by
2,000 samples, without guidance and with it, and each set once more with its latents widened to the standard
deviation of real ones. A finished run is kept in runs/arms, so a stopped command goes on where it was;
`--join` writes what there is to data_small/evidence/RECORD.json.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from record import commit, head
from torch import Tensor

from repae_lite import (
    AutoencoderKL,
    Guidance,
    SiT,
    SmallScale,
    load_sit,
    load_vae,
    repae_step,
    sample_ode,
    save_sit,
    save_vae,
    to_uint8,
)
from repae_lite.checkpoints.find import SHIPPED
from repae_lite.evaluation import metrics
from repae_lite.method.steps import Draws, TrainState, as_floats, latent_updates, vae_step
from repae_lite.utils.files import data_small_dir, write_text

SAMPLES, SAMPLER_STEPS = 2000, 16
GUIDANCE = {"unguided": None, "guided": Guidance(2.5, 0.0, 0.75)}  # chosen in chapter 02, on training images
RUNS = Path("runs") / "arms"


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        method: of `SmallScale.new_state`.
        config: what changes in its `StepConfig`.
        sit: what changes in the tiny `SiTConfig`.
        targets: what SiT, and the VAE through it, aligns with: a key of `targets_of`.
        sit_running_stats: in the SiT step, normalise by the running statistics, which follow as ever.
        fresh_draws: the SiT step encodes the batch again and draws its own noise and times.
    """

    method: str
    config: dict = field(default_factory=dict)
    sit: dict = field(default_factory=dict)
    targets: str = "tokens"
    sit_running_stats: bool = False
    fresh_draws: bool = False


STRONG = {"vae_align_coeff": 5.0}  # where the effect is large enough to see what it depends on
ARMS = {method: Arm(method) for method in ("sit", "repa", "vae-only", "repa-e", "naive")}
ARMS["align-5"] = Arm("repa-e", STRONG)
for kind in ("label only", "shuffled", "no mean token"):
    ARMS[f"repa, {kind}"] = Arm("repa", targets=kind)
    ARMS[f"align-5, {kind}"] = Arm("repa-e", STRONG, targets=kind)
ARMS["align-5, batch statistics in the VAE step"] = Arm("repa-e", STRONG | {"vae_step_batch_stats": True})
ARMS["align-5, running statistics in the SiT step"] = Arm("repa-e", STRONG, sit_running_stats=True)
ARMS["align-5, fresh draws"] = Arm("repa-e", STRONG, fresh_draws=True)
CURVES = ("repa", "vae-only", "repa-e", "align-5", "naive")
CAUSES = ("repa", *(name for name in ARMS if name.startswith(("repa, ", "align-5"))))
TAPS = {depth: "repa" if depth == 2 else f"repa, tap {depth}" for depth in range(1, 7)}
ARMS |= {name: Arm("repa", sit={"alignment_depth": depth}) for depth, name in TAPS.items() if depth != 2}

PAIRS = tuple(name for name, files in SHIPPED.items() if "sit" in files)  # a SiT and its VAE ship
RECORDS = {
    "learning_curves": [(arm, steps) for steps in (400, 1000, 3000) for arm in CURVES],
    "longer": [(arm, 10000) for arm in CURVES[:-1]],
    "causes": [(arm, 1000) for arm in CAUSES],
    "shipped": [(name, 20000) for name in PAIRS],  # trained once; the seeds are of sampling
    "taps": [(arm, 1000) for arm in ("sit", *TAPS.values())],
}


def targets_of(small: SmallScale, kind: str) -> Tensor:
    """Targets (6000, 16, 128): the teacher's tokens, or what is left of them."""
    tokens = small.tokens
    if kind == "label only":  # the mean token of the image's class, at each position
        return by_label(tokens, small.labels)
    if kind == "shuffled":  # the tokens of another image, always the same one
        return tokens[torch.randperm(len(tokens), generator=small.generator(7))]
    if kind == "no mean token":  # where in the object, not which object
        return tokens - tokens.mean(1, keepdim=True)
    return tokens


def fresh_step(generator: torch.Generator) -> Callable[..., dict[str, float]]:
    """`repae_step`, with a second encoding and second draws for SiT."""

    def step(
        state: TrainState, x: Tensor, labels: Tensor, targets: Tensor, **draws: Tensor
    ) -> dict[str, float]:
        losses = vae_step(state, x, labels, targets, **draws).losses
        noise = torch.randn(2, *draws["eps"].shape, generator=generator)
        with torch.no_grad():
            z = state.vae.encode(x).sample(noise[0])
        t = torch.rand(len(x), generator=generator)
        return as_floats(
            losses | latent_updates(state, z, labels, targets, Draws(None, t, noise[1], draws["label_drop"]))
        )

    return step


def follow_but_run(sit: torch.nn.Module) -> None:
    """In training, BatchNorm follows each batch as ever, but normalises by the running statistics."""
    forward = sit.bn.forward

    def by_running(z: Tensor, batch_stats: bool | None = None) -> Tensor:
        if sit.bn.training and batch_stats is None:
            forward(z)
            batch_stats = False
        return forward(z, batch_stats)

    sit.bn.forward = by_running


def train(small: SmallScale, arm: Arm, steps: int, seed: int) -> tuple[TrainState, list[dict], float]:
    """A trained arm, its losses by step, and its seconds."""
    torch.manual_seed(seed)
    state = small.new_state(arm.method, **arm.sit)
    state.config = replace(state.config, ema_decay=0.98 if steps <= 400 else 0.995, **arm.config)
    if arm.sit_running_stats:
        follow_but_run(state.sit)
    step = fresh_step(small.generator(1000 + seed)) if arm.fresh_draws else repae_step
    targets = None if arm.method == "sit" else targets_of(small, arm.targets)
    start = time.perf_counter()
    history = small.train(state, steps, targets=targets, seed=seed, label=arm.method, moving_step=step)
    return state, history, time.perf_counter() - start


@torch.no_grad()
def judge(small: SmallScale, sit: SiT, vae: AutoencoderKL, seed: int) -> dict:
    """Scores by kind of sampling, the samples' width, and the structure of the latents."""
    found = {"scores": {}, "width": {}}
    rebuilt, labels = small.reconstruct(vae), torch.arange(SAMPLES) % 10
    size = sit.config
    shape = (SAMPLES, size.in_channels, size.input_size, size.input_size)
    eps = torch.randn(shape, generator=small.generator(seed))

    def score(z: Tensor) -> dict[str, float]:
        images = [to_uint8(vae.decode(sit.denormalize(part))) for part in z.split(250)]
        return small.score(torch.cat(images), labels, rebuilt)

    for name, guidance in GUIDANCE.items():
        parts = zip(eps.split(250), labels.split(250), strict=True)
        z = torch.cat([sample_ode(sit, e, y, steps=SAMPLER_STEPS, guidance=guidance) for e, y in parts])
        mean, std = (value[:, None, None] for value in (z.mean((0, 2, 3)), z.std((0, 2, 3))))
        found["width"][name] = float(std.mean())
        found["scores"] |= {name: score(z), f"{name}, widened": score((z - mean) / std)}
    latents = small.eval_latents(vae)
    found["residual_alignment"] = residual_alignment(small, sit, latents, seed)
    found["structure"] = metrics.latent_structure(latents)
    found["structure"]["effective_dimensions"] = metrics.effective_dimensions(latents)
    return found


def residual_alignment(small: SmallScale, sit: SiT, z: Tensor, seed: int) -> dict[str, float]:
    """Cosine of projected features and tokens by noise level, both less their mean per class and position.

    It is 0 for whatever depends on label and position alone (chapter 03, section 4).
    """
    labels, z = small.eval_labels, sit.normalize(z)
    eps, found = torch.randn(z.shape, generator=small.generator(seed)), {}
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        parts = zip(((1 - t) * z + t * eps).split(250), labels.split(250), strict=True)
        h = torch.cat([sit.projectors[0](sit.features(x, torch.full((len(x),), t), y)) for x, y in parts])
        pair = (values - by_label(values, labels) for values in (h, small.eval_tokens))
        found[str(t)] = float(torch.nn.functional.cosine_similarity(*pair, dim=-1).mean())
    return found


def by_label(values: Tensor, labels: Tensor) -> Tensor:
    """For every image the mean over all images of its class, of the same shape as values (N, ...)."""
    return torch.stack([values[labels == label].mean(0) for label in range(10)])[labels]


def run(small: SmallScale, name: str, steps: int, seed: int) -> dict:
    """Trains and judges one arm; its weights stay in runs/arms. What ships is only judged."""
    about = {"arm": name, "steps": steps, "seed": seed, "commit": commit()}
    if name in PAIRS:
        shipped = (load(name).to(small.device) for load in (load_sit, load_vae))
        return about | {"seconds": 0.0} | judge(small, *shipped, seed)
    state, history, seconds = train(small, ARMS[name], steps, seed)
    last = history[-100:]
    about |= {"seconds": round(seconds, 1)}
    about |= {"losses": {key: sum(each[key] for each in last) / len(last) for key in last[0]}}
    save_sit(path_of(name, steps, seed, "sit.safetensors"), state.ema)
    if "vae" in state.optimizers:
        save_vae(path_of(name, steps, seed, "vae.safetensors"), state.vae, state.ema.latent_stats())
    return about | judge(small, state.ema, state.vae, seed)


def path_of(arm: str, steps: int, seed: int, ending: str) -> Path:
    """Where something of a run is kept."""
    return RUNS / f"{arm.replace(', ', '_').replace(' ', '-')}_{steps}_{seed}.{ending}"


def join(record: str, seeds: list[int], device: str) -> None:
    """Writes the finished runs of a record to data_small/evidence, and prints what is missing."""
    path = data_small_dir() / "evidence" / f"{record}.json"
    done = json.loads(path.read_text())["runs"] if path.is_file() else []
    known = {(each["arm"], each["steps"], each["seed"]): each for each in done}
    for arm, steps in RECORDS[record]:
        for seed in seeds:
            if (kept := path_of(arm, steps, seed, "json")).is_file():
                known[arm, steps, seed] = json.loads(kept.read_text())
            elif (arm, steps, seed) not in known:
                print(f"missing: {arm}, {steps} steps, seed {seed}")
    more = f" --device {device}" * (device != "cpu")
    content = head(f"python reproduce/benchmarks/arms.py {record}{more}", device)
    content |= {"samples": SAMPLES, "sampler_steps": SAMPLER_STEPS, "runs": list(known.values())}
    write_text(path, json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", choices=RECORDS, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="0 to 4")
    parser.add_argument("--steps", type=int, nargs="+", help="only runs of these lengths")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--join", action="store_true", help="only gather the finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_device(options.device)
    if not options.join:
        small = SmallScale.load(options.device)
        RUNS.mkdir(parents=True, exist_ok=True)
        for seed, record in itertools.product(options.seeds, options.record):
            for arm, steps in RECORDS[record]:
                path = path_of(arm, steps, seed, "json")
                if path.is_file() or (options.steps and steps not in options.steps):
                    continue
                result = run(small, arm, steps, seed)
                write_text(path, json.dumps(result) + "\n")
                scores = {kind: round(each["frechet"], 2) for kind, each in result["scores"].items()}
                print(arm, steps, seed, f"{result['seconds']:.0f} s", scores, flush=True)
    for record in options.record:
        join(record, options.seeds, options.device)


if __name__ == "__main__":
    main()
