"""What each of our ways of taking a step is worth: all of them, and all but one, in turns.

    python reproduce/benchmarks/attempts.py --device cuda --mixed-precision bf16 --batch-size 8
    python reproduce/benchmarks/attempts.py --model SiT-B/2 --batch-size 2 --only "layout of the VAE"
    python reproduce/benchmarks/attempts.py --vae tiny --model tiny --repeats 25

A step of REPA-E on images that are loaded, encoder included, with random weights. All start from the same
weights, and the losses of their first steps must agree. Beside ours one other state is held at a time. `repae
bench --against reference` does the same for the ways of the official code.
"""

import argparse
import gc
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from record import commit, head

from repae_lite.method import steps
from repae_lite.method.steps import as_floats
from repae_lite.networks.layers import Linear, set_gradient_checkpointing
from repae_lite.networks.vae import ResidualBlock
from repae_lite.training import benchmark, build
from repae_lite.training.benchmark import Settings, Work
from repae_lite.utils.devices import choose_device, conv_layout, fused_optimizer
from repae_lite.utils.files import write_text
from repae_lite.utils.measure import in_turns, summary


def ours(settings: Settings) -> Work:
    """The step as the trainer takes it."""
    (work,) = benchmark.repae(settings, ExitStack())
    return work


def other_layout(settings: Settings, *names: str) -> Work:
    """Channels last instead of contiguous, or the reverse."""
    work = ours(settings)
    usual = conv_layout(torch.device(settings.device))
    other = torch.contiguous_format if usual == torch.channels_last else torch.channels_last

    def convert(_: torch.nn.Module, images: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(x.contiguous(memory_format=other) for x in images)

    for name in names:
        if (module := getattr(work.state, name)) is not None:
            module.to(memory_format=other)
            module.register_forward_pre_hook(convert)  # one that is channels last decides for a convolution
    return work


def other_optimizers(settings: Settings) -> Work:
    """Fused, or as torch chooses; without that each norm is read before the update."""
    other = None if fused_optimizer(torch.device(settings.device)) else True
    with patch.object(build, "fused_optimizer", lambda _: other):
        return ours(settings)


def reads(settings: Settings) -> Work:
    """The host waits for each norm."""
    work = ours(settings)
    mechanics, update = work.state.mechanics, work.state.mechanics.update

    def waiting(*given: object) -> torch.Tensor:
        norm = update(*given)
        float(norm)
        return norm

    mechanics.update = waiting
    return work


def host_draws(settings: Settings) -> Work:
    """The whole batch is drawn on the CPU and copied."""
    work, draws_of = ours(settings), benchmark.draws_of
    host, call = replace(settings, device="cpu"), work.call

    def drawn(_: Settings, step: int) -> steps.Draws:
        return draws_of(host, step).map(lambda value: value.to(settings.device))

    def step() -> dict:
        with patch.object(benchmark, "draws_of", drawn):
            return call()

    work.call = step
    return work


def state_dict_average(settings: Settings) -> Work:
    """The moving average's lists are those of two state dicts."""
    work = ours(settings)
    call = work.call

    def step() -> dict:
        with patch.object(steps, "_own_pieces", lambda module: list(module.state_dict().values())):
            return call()

    work.call = step
    return work


def plain_linear(settings: Settings) -> Work:
    """Linear layers as PyTorch computes them."""
    work = ours(settings)
    for module in work.state.sit.modules():
        if isinstance(module, Linear):
            module.by_convolution = False
    return work


def norms(settings: Settings) -> Work:
    """Of all activations, what the VAE's norms and swishes keep is computed again."""
    work = ours(settings)
    set_gradient_checkpointing(True, *(m for m in work.state.vae.modules() if isinstance(m, ResidualBlock)))
    return work


def checkpointing(settings: Settings) -> Work:
    """Activations are computed again."""
    return ours(replace(settings, config=replace(settings.config, gradient_checkpointing=True)))


def compiled(settings: Settings) -> Work:
    """SiT's blocks and the VAE's halves go through torch.compile."""
    work = ours(settings)
    benchmark._compile(build.compiled_parts(work.state), torch.device(settings.device))
    return work


ATTEMPTS: dict[str, Callable[[Settings], Work]] = {
    "layout of the VAE": lambda settings: other_layout(settings, "vae"),
    "layout of LPIPS and discriminator": lambda settings: other_layout(
        settings, "perceptual", "discriminator"
    ),
    "fused optimisers": other_optimizers,
    "a read of every norm": reads,
    "draws from the host": host_draws,
    "moving average from state dicts": state_dict_average,
    "linear layers of PyTorch": plain_linear,
    "norms computed again": norms,
    "gradient checkpointing": checkpointing,
    "compiling": compiled,
}


def attempt(name: str, settings: Settings, usual: Work, first: dict[str, float]) -> dict:
    """Seconds with our ways and with this one changed, and their ratios, changed over ours.

    Args:
        name: of the attempt.
        settings: how.
        usual: ours.
        first: the losses of its first step.

    Raises:
        ValueError: the losses of the first steps differ; or what the attempt needs is not there.
        torch.OutOfMemoryError: the GPU cannot hold a second state.
    """
    changed = ATTEMPTS[name](settings)
    losses = as_floats(changed.call())
    if name != "draws from the host" or settings.device == "cpu":  # a GPU draws other numbers
        benchmark.check_agreement({"ours": first, "reference": losses}, settings.agreement)
    calls = {"ours": usual.call, "changed": changed.call}
    seconds = in_turns(calls, torch.device(settings.device), **settings.rounds)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["changed"], strict=True)]
    return {"ratio": summary(ratios)} | {which: summary(values) for which, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ATTEMPTS, default=list(ATTEMPTS), metavar="ATTEMPT")
    parser.add_argument("--vae", default="f8d4")
    parser.add_argument("--model", default="SiT-XL/2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--device")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs") / "attempts.json")
    args = parser.parse_args()
    device = choose_device(args.device)
    options = {name: getattr(args, name) for name in ("vae", "model", "batch_size", "mixed_precision")}
    config = benchmark.bench_config(**options, allow_tf32=device != "cpu")
    settings = Settings(config, device, repeats=args.repeats, warmup=args.warmup)
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    record = head(f"python reproduce/benchmarks/attempts.py {words}", device) | {"commit": commit()}
    record["machine"] = record["machine"].replace("1 thread", f"{torch.get_num_threads()} threads")
    record["attempts"] = {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings.set_tf32()
    usual = ours(settings)
    first = as_floats(usual.call())
    for name in args.only:
        try:
            found = attempt(name, settings, usual, first)
            low, high = min(found["ratio"]["values"]), max(found["ratio"]["values"])
            seconds = f"{found['ours']['median']:.4g} s became {found['changed']['median']:.4g} s"
            said = f"{seconds}, {found['ratio']['median']:.3f} ({low:.3f} to {high:.3f})"
        except (ValueError, torch.OutOfMemoryError) as error:
            found, said = {"not measured": str(error)}, f"not measured: {error}"
        record["attempts"][name] = found
        print(f"{name}: {said}", flush=True)
        write_text(args.out, json.dumps(record, indent=1) + "\n")
        gc.collect()


if __name__ == "__main__":
    main()
