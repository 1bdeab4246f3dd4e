"""What `repae bench` measures: a training step as the trainer takes it, and the work around training.

Networks have random weights, or those that ship with the embedded scale: times do not depend on them. The
plain official step that ours is compared with is reproduce/benchmarks/reference_step.py.
"""

import gc
import logging
import multiprocessing
import runpy
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from repae_lite.data.datasets import ImageH5Dataset, read_batches
from repae_lite.data.hdf5 import write_images_h5
from repae_lite.data.preprocessing import preprocess
from repae_lite.data.training_data import TrainingData
from repae_lite.evaluation import metrics
from repae_lite.evaluation.features import load_judge
from repae_lite.method.losses import LPIPSLoss
from repae_lite.method.sampling import Guidance, sample_ode, sample_sde
from repae_lite.method.steps import Draws, Mechanics, TrainState, all_updates, as_floats, latent_updates
from repae_lite.networks.encoders import load_encoders
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import VAE_PRESETS, AutoencoderKL
from repae_lite.training.build import TrainSetup, build, compiled_parts
from repae_lite.training.config import NONE, OPTIONS, TrainConfig
from repae_lite.training.parallel import PRECISIONS, ParallelMechanics, StepBatches, draw
from repae_lite.utils.devices import (
    MKL_IS_SLOW,
    can_keep_memory,
    check_device,
    choose_precision,
    conv_layout,
    loading,
    peak_memory,
    try_compile,
)
from repae_lite.utils.measure import (
    REST,
    Parts,
    counting,
    device_seconds,
    in_turns,
    peak_resident,
    summary,
    timed_parts,
    watched,
)
from repae_lite.utils.pixels import to_unit_range
from repae_lite.utils.seeding import generator

BATCH, CLASSES = 32, {"tiny": 10}  # 1,000 classes otherwise
GUIDANCE = 2.2  # the scale of the released SiT on SD-VAE; its interval is [0, .65]
HEADS = 2_000  # images whose features the metrics compare
PHOTOS = 128  # JPEG files to preprocess
# How far losses of the first step may be from the reference's: relative, and ten times as far for gradient
# norms. Means of signed terms of order one, which cancel, are judged absolutely.
AGREEMENT = {"no": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
TF32_AGREEMENT = 5e-3
SIGNED = ("vae_align", "sit_align", "logits_real", "logits_fake", "weighted_gan")


def bench_config(**options) -> TrainConfig:
    """The options of a run of train-repae whose first weights need no download.

    Args:
        options: as given; the rest are the defaults of their scale, but for batches of 32.

    Raises:
        ValueError: see `TrainConfig`.
    """
    tiny = options.get("vae") == "tiny"
    encoder = options.get("enc_type", "tiny" if tiny else "dinov2-vit-b")
    if not tiny:
        options |= {"vae_ckpt": NONE, "perceptual": "tiny"}  # `networks` puts another in its place
    if encoder == NONE:
        options["vae_align_proj_coeff"] = 0.0
    elif encoder != "tiny":
        options["enc_weights"] = "random"
    return TrainConfig.build("repae", **{"batch_size": BATCH} | options)


@dataclass(frozen=True)
class Settings:
    """How everything is measured.

    Attributes:
        config: see `bench_config`.
        device: that computes.
        repeats: timed calls.
        warmup: calls before, which are not timed.
        num_steps: of the samplers; None for 50 of the ODE and 250 of the SDE.
        progress: show how far each measurement is.
    """

    config: TrainConfig
    device: str = "cpu"
    repeats: int = 5
    warmup: int = 2
    num_steps: int | None = None
    progress: bool = False

    @property
    def classes(self) -> int:
        """Of the labels."""
        return self.config.num_classes or CLASSES.get(self.config.vae, 1000)

    @property
    def latent(self) -> tuple[int, int, int]:
        """The shape of an image's latents."""
        vae, side = VAE_PRESETS[self.config.vae], self.config.resolution
        return vae.latent_channels, side // vae.downsampling, side // vae.downsampling

    @cached_property
    def precision(self) -> str:
        """ "no", "fp16" or "bf16"."""
        precision = choose_precision(self.config.mixed_precision, torch.device(self.device))
        self.config.check_precision(precision)
        return precision

    @property
    def rounds(self) -> dict[str, int | bool]:
        """How often what is measured is called."""
        return {"repeats": self.repeats, "warmup": self.warmup, "progress": self.progress}

    @property
    def agreement(self) -> float:
        """How far losses that rounding alone tells apart may be from each other; see `check_agreement`."""
        tf32 = self.config.allow_tf32 and torch.device(self.device).type == "cuda"
        return max(AGREEMENT[self.precision], TF32_AGREEMENT * tf32)

    def set_tf32(self) -> None:
        """Has float32 products take TF32 or not, as the options say."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.config.allow_tf32

    def autocast(self) -> AbstractContextManager:
        """The precision of training."""
        dtype = PRECISIONS[self.precision]
        return torch.autocast(torch.device(self.device).type, dtype) if dtype else nullcontext()


@dataclass
class Work:
    """Something to be measured.

    Attributes:
        name: of its row.
        call: does it once.
        images: that a call takes.
        precision: of its networks; None where no network runs.
        state: of a training step, whose parts are told apart.
        encoders: of that step.
        compiles: what --compile compiles where there is no training step.
    """

    name: str
    call: Callable[[], object]
    images: int
    precision: str | None = "no"
    state: TrainState | None = None
    encoders: list[nn.Module] = field(default_factory=list)
    compiles: list[nn.Module] = field(default_factory=list)


# ---------------------------------------------------------------- training steps


def networks(settings: Settings, command: str = "repae") -> TrainSetup:
    """What a run starts from, with LPIPS on a random trunk, and no weight of SiT at zero.

    SiT's blocks start as the identity; as such they would compute as much, but hide from a comparison of
    losses what they compute.
    """
    config, device = settings.config, torch.device(settings.device)
    if command == "vae":
        shared = [name for name, option in OPTIONS.items() if command in option.metadata["only"]]
        config = TrainConfig(command=command, **{name: getattr(config, name) for name in shared})
    with _quietly():
        setup = build(config, settings.classes, device)
    state = setup.state
    if config.vae != "tiny":
        state.perceptual = LPIPSLoss(pretrained_trunk=False).to(device)
        state.perceptual.to(memory_format=conv_layout(device))
    if state.sit is not None:
        for p in state.sit.parameters():
            if p.requires_grad and not p.any():
                nn.init.normal_(p, std=0.02)
        state.ema.load_state_dict(state.sit.state_dict())
    state.mechanics = ParallelMechanics(
        device,
        settings.precision,
        state.optimizers,
        micro_batches=config.micro_batches,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    return setup


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what every run is told: that weights are random, that a recipe is built in."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.INFO)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def batch_of(settings: Settings) -> tuple[Tensor, Tensor]:
    """Images (B, 3, R, R) uint8 and labels (B,), on the CPU as a loader gives them."""
    count, side, g = settings.config.batch_size, settings.config.resolution, generator("bench")
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, settings.classes, (count,), generator=g)
    return _pinned(settings, images, labels)


def _pinned(settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
    """On the CPU, as a loader gives them."""
    return tuple(tensor.pin_memory() for tensor in tensors) if "cuda" in settings.device else tensors


def draws_of(settings: Settings, step: int) -> Draws:
    """The random numbers of a step, as the trainer draws them."""
    config = settings.config
    how = {"path": config.path_type, "weighting": config.weighting, "label_dropout": config.cfg_prob}
    return draw(config.seed, step, config.batch_size, settings.latent, device=settings.device, **how)


def _tokens(settings: Settings, encoders: list[nn.Module], images: Tensor) -> list[Tensor]:
    """Targets in micro-batches, as in training."""
    cuts = Mechanics(micro_batches=settings.config.micro_batches).chunks(len(images))
    with settings.autocast():
        return [torch.cat([encoder(images[cut]) for cut in cuts]) for encoder in encoders]


def _training(settings: Settings, command: str) -> Iterator[Work]:
    setup, batch = networks(settings, command), batch_of(settings)
    state, encoders = setup.state, setup.encoders

    def step() -> dict[str, Tensor]:
        images, labels = (tensor.to(settings.device, non_blocking=True) for tensor in batch)
        draws = draws_of(settings, state.step)
        targets = _tokens(settings, encoders, images)
        return all_updates(state, to_unit_range(images), labels, targets, draws)[0]

    name = "REPA-E step" if command == "repae" else f"train-{command} step"
    yield Work(name, step, len(batch[0]), settings.precision, state, encoders)


def repae(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """A step of train-repae on images that are loaded, encoder included."""
    yield from _training(settings, "repae")


def ldm(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """A step of train-ldm on cached latents: the encoder's targets computed, then cached, too."""
    setup, (images, labels) = networks(settings), batch_of(settings)
    state, encoders = setup.state, setup.encoders
    state.vae = state.discriminator = state.perceptual = None
    state.optimizers = {"sit": state.optimizers["sit"]}
    state.sit.config = replace(state.sit.config, fixed_latent_stats=True)
    (moments,) = _pinned(settings, torch.rand(len(images), 2 * settings.latent[0], *settings.latent[1:]))

    def step(targets_of: Callable[..., list[Tensor]], *batch: Tensor) -> dict[str, Tensor]:
        posterior, labels, *rest = (tensor.to(settings.device, non_blocking=True) for tensor in batch)
        mean, std = posterior.chunk(2, dim=1)
        draws = draws_of(settings, state.step)
        return latent_updates(state, mean + std * draws.eps_posterior, labels, targets_of(*rest), draws)

    call = partial(step, partial(_tokens, settings, encoders), moments, labels, images)
    yield Work("train-ldm step", call, len(images), settings.precision, state, encoders)
    if encoders:
        kept = [tokens.half().cpu() for tokens in _tokens(settings, encoders, images.to(settings.device))]
        cached = partial(step, lambda *tokens: [t.float() for t in tokens], moments, labels)
        call = partial(cached, *_pinned(settings, *kept))
        yield Work("train-ldm step, cached targets", call, len(images), settings.precision, state)


def vae(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """A step of train-vae on images that are loaded."""
    yield from _training(settings, "vae")


# ---------------------------------------------------------------- the other work


def sample(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """Sampling of latents, in float32 as `repae generate` does."""
    config, device, (channels, side, _) = settings.config, settings.device, settings.latent
    sizes = {"in_channels": channels, "input_size": side, "num_classes": settings.classes}
    sit = SiT.from_preset(config.model, target_dims=(), **sizes).to(device).eval()
    eps = torch.randn(config.batch_size, *settings.latent, device=device)
    labels = torch.arange(config.batch_size, device=device) % settings.classes
    guidances = {
        "": None,
        ", guided on [0, 0.65]": Guidance(GUIDANCE, 0.0, 0.65),
        ", guided everywhere": Guidance(GUIDANCE),
    }
    for kind, sampler, usual in (("ODE", sample_ode, 50), ("SDE", sample_sde, 250)):
        for words, guidance in guidances.items():
            how = {"steps": settings.num_steps or usual, "guidance": guidance}
            call = partial(sampler, sit, eps, labels, **how)
            yield Work(f"sample, {kind}, {how['steps']} steps{words}", call, len(eps), compiles=[*sit.blocks])


def encode(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """Images to latents, in float32 as `repae cache-latents` does."""
    vae = AutoencoderKL.from_preset(settings.config.vae).to(settings.device).eval()
    x = to_unit_range(batch_of(settings)[0].to(settings.device))
    yield Work("VAE encode", torch.no_grad()(lambda: vae.encode(x).mean), len(x), compiles=[vae.encoder])


def decode(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """Latents to images, in float32 as `repae generate` does."""
    vae = AutoencoderKL.from_preset(settings.config.vae).to(settings.device).eval()
    z = draws_of(settings, 0).eps
    yield Work("VAE decode", torch.no_grad()(lambda: vae.decode(z)), len(z), compiles=[vae.decoder])


def encoder(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """Images to the tokens that SiT aligns with, in the precision of training."""
    config, images = settings.config, batch_of(settings)[0].to(settings.device)
    if not config.encoders:
        raise ValueError("--enc-type none leaves no encoder to measure: name one, or leave `encoder` out")
    with _quietly():
        encoders = load_encoders(config.encoders, config.resolution, weights=config.enc_weights)
    for each in encoders:
        call = partial(_tokens, settings, [each.to(settings.device)], images)
        yield Work(f"encoder {each.name}", call, len(images), settings.precision)


def loader(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """Batches from an images.h5, as the trainer reads them."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    batch, workers = settings.config.batch_size, settings.config.workers
    pixels = batch_of(settings)[0].repeat(-(-64 // batch), 1, 1, 1).numpy()
    write_images_h5(folder / "images.h5", pixels, np.arange(len(pixels)) % 10, compress=False)
    data = TrainingData(ImageH5Dataset(folder / "images.h5"), None)
    share, steps = slice(0, batch), range(10**9)
    order = StepBatches(len(pixels), batch=batch, share=share, seed=0, steps=steps)
    how = loading(torch.device(settings.device), workers)
    batches = read_batches(DataLoader(data, batch_sampler=order, num_workers=workers, **how))
    stack.callback(batches.close)
    count = max(16, 4 * workers)  # more than what workers have ready
    call = lambda: deque(islice(batches, count), maxlen=0)  # noqa: E731
    yield Work(f"loader, {workers} workers", call, count * batch, None)


def preprocessing(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """JPEG files of 500 × 400 pixels to an images.h5; the processes are started anew."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    rng, source = np.random.default_rng(0), folder / "photos" / "class"
    source.mkdir(parents=True)
    for i in range(PHOTOS):  # smooth shapes with grain, 70 kB as ImageNet's have
        coarse = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 400), Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 6, (400, 500, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(source / f"{i:04d}.jpg", quality=90)
    workers = max(1, settings.config.workers)
    how = {"resolution": settings.config.resolution, "workers": workers, "overwrite": True}
    call = partial(preprocess, source.parent, folder / "out", **how)
    yield Work(f"preprocess, {workers} workers", call, PHOTOS, None)


def evaluate(settings: Settings, stack: ExitStack) -> Iterator[Work]:
    """The judge's features, and the metrics of `HEADS` images."""
    images = batch_of(settings)[0].to(settings.device)
    judge = load_judge("tiny" if settings.config.vae == "tiny" else "inception-random").to(settings.device)
    yield Work(f"evaluate, features of {judge.name}", partial(judge, images), len(images))
    found, g = judge(images), generator("bench", "features")
    a, b = (torch.rand(HEADS, found["pooled"].shape[1], generator=g) for _ in range(2))
    probabilities = torch.rand(HEADS, found["probabilities"].shape[1], generator=g).softmax(1)

    def frechet() -> float:
        return metrics.frechet_distance(metrics.feature_stats(a), metrics.feature_stats(b))

    heads = {
        "Fréchet distance": frechet,
        "precision and recall": partial(metrics.precision_recall, a, b),
        "Inception Score": partial(metrics.inception_score, probabilities),
        "kernel distance": partial(metrics.kernel_distance, a, b),
    }
    for name, head in heads.items():
        yield Work(f"evaluate, {name} of {HEADS:,}", head, HEADS, None)


WORKS = {
    "repae": repae,
    "ldm": ldm,
    "vae": vae,
    "sample": sample,
    "encode": encode,
    "decode": decode,
    "encoder": encoder,
    "loader": loader,
    "preprocess": preprocessing,
    "evaluate": evaluate,
}


# ---------------------------------------------------------------- measuring


@contextmanager
def parts_of(work: Work, parts: Parts) -> Iterator[None]:
    """Inside, a training step switches parts: networks forward and backward, optimisers, moving average."""
    state, mechanics = work.state, work.state.mechanics
    named = [("encoder", each) for each in work.encoders]
    named += [("SiT", state.sit), ("discriminator", state.discriminator), ("perceptual", state.perceptual)]
    if state.vae is not None:
        named += [("VAE encoder", state.vae.encoder), ("VAE decoder", state.vae.decoder)]
    backward, update = mechanics.backward, mechanics.update

    def whole_backward(*given) -> None:
        backward(*given)
        parts.switch(REST)

    def whole_update(module: nn.Module, *given) -> Tensor:
        parts.switch("optimisers")
        norm = update(module, *given)
        parts.switch("moving average" if module is state.sit else REST)  # which is what comes next
        return norm

    with ExitStack() as stack:
        for name, module in named:
            if module is not None:
                entry = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
                call = watched(getattr(module, entry), name, parts)
                stack.enter_context(patch.object(module, entry, call))
        stack.enter_context(patch.object(mechanics, "backward", whole_backward))
        stack.enter_context(patch.object(mechanics, "update", whole_update))
        yield


def measure(item: str, settings: Settings) -> list[dict]:
    """The rows of an item of `WORKS`, timed in turns, as JSON values; seconds, bytes and FLOPs of one call.

    `memory` is the most that was held: on CUDA by torch for this row, on a CPU by this process since the item
    began. `outside_kernels`, on CUDA alone, is the share of the time in which the GPU does nothing. `parts`
    are those of a training step, each with its mean seconds, FLOPs and bytes.

    Raises:
        ValueError: what the item needs is not there.
    """
    gc.collect()  # what was compiled before refers to itself, and is still on the device
    check_device(settings.device)
    device, rows, before = torch.device(settings.device), [], peak_resident()
    settings.set_tf32()
    with ExitStack() as stack:
        works = list(WORKS[item](settings, stack))
        for work in works:
            row = {"item": item, "what": work.name, "images": work.images, "precision": work.precision}
            if work.precision is not None:
                row |= _counted(work)
            if settings.config.compile:
                _compile(compiled_parts(work.state) if work.state else work.compiles, device)
            if device.type == "cuda":
                work.call()  # which may compile
                torch.cuda.reset_peak_memory_stats(device)
                work.call()
            row["memory"] = peak_memory(device)
            rows.append(row)
        seconds = in_turns({work.name: work.call for work in works}, device, **settings.rounds)
        for work, row in zip(works, rows, strict=True):
            row["seconds"] = summary(seconds[work.name])
            row["images_per_second"] = work.images / row["seconds"]["median"]
            if (busy := device_seconds(work.call, device)) is not None:
                row["outside_kernels"] = max(0.0, 1 - busy / row["seconds"]["median"])
            if device.type == "cpu" and before is not None:
                row["memory"] = peak_resident() - before
            if work.state is not None:
                _time_parts(work, row["parts"], device, settings.repeats)
    return rows


def _counted(work: Work) -> dict:
    """FLOPs and bytes of a call, of a training step by part."""
    if work.state is None:
        with counting() as so_far:
            work.call()
        flops, moved = map(int, so_far())
        return {"flops": flops, "bytes": moved}
    work.call()  # optimisers have a state now
    with counting() as so_far:
        parts = Parts(so_far, lambda begin, end: end - begin)
        with parts_of(work, parts):
            work.call()
        found = {name: {"flops": int(f), "bytes": int(b)} for name, (f, b) in parts.totals().items()}
    total = {key: sum(part[key] for part in found.values()) for key in ("flops", "bytes")}
    return total | {"parts": found}


def _time_parts(work: Work, found: dict[str, dict], device: torch.device, repeats: int) -> None:
    """Adds the mean seconds of every part."""
    parts = timed_parts(device)
    with parts_of(work, parts):
        for _ in range(repeats):
            work.call()
            parts.switch(REST)  # from the moving average
    for name, seconds in parts.totals().items():
        found.setdefault(name, {"flops": 0, "bytes": 0})["seconds"] = seconds / repeats


def _compile(modules: list[nn.Module], device: torch.device) -> None:
    """Compiles modules, once each.

    Raises:
        ValueError: torch.compile does not work here.
    """
    if obstacle := try_compile(device):
        raise ValueError(f"--compile cannot be measured here: {obstacle}")
    for module in modules:
        if module._compiled_call_impl is None:
            module.compile()


# ---------------------------------------------------------------- against the reference


def check_comparable(settings: Settings) -> None:
    """Refuses what the reference cannot do.

    Raises:
        ValueError: there is no encoder to align with, or there are micro-batches.
    """
    if not settings.config.encoders:
        raise ValueError("--against reference compares steps that align: give --enc-type a name")
    if settings.config.micro_batches > 1:
        raise ValueError(
            "--against reference takes each batch at once, as officially: leave out --micro-batches"
        )


def against(settings: Settings, reference: ModuleType, *, ways: bool = True) -> dict:
    """A REPA-E step of ours and of the reference in turns, on the same weights, images, targets and draws.

    The encoder, which both would call alike, is left out. Then every way of the official code alone, against
    the reference with none of them. In each round everything is called once.

    Args:
        settings: how.
        reference: the module reproduce/benchmarks/reference_step.py.
        ways: also measure every way of the official code alone.

    Returns:
        JSON values: `losses` of the first step; `seconds` of both; `ratio`, reference over ours, round by
        round; `memory` of both in bytes, None but on CUDA; `ways`, each with its `cost` as a share of the
        time without it, or the reason why it is `idle` here.

    Raises:
        ValueError: see `check_comparable`; or the losses do not agree.
    """
    check_comparable(settings)
    check_device(settings.device)
    settings.set_tf32()
    gc.collect()
    device, precision = torch.device(settings.device), settings.precision
    apart = _is_apart(settings, reference.Official())
    setup, batch = _compared(settings)
    ours, theirs = setup.state, None if apart else networks(settings).state  # all the same: by the seed
    reference_step = partial(_reference_step, settings, reference, batch)
    if settings.config.compile:
        _compile(compiled_parts(ours), device)
    with ExitStack() as stack:
        calls = {
            "ours": partial(_our_step, ours, *batch),
            "reference": reference_step(reference.Official(), theirs, stack),
        }
        losses = {"ours": as_floats(calls["ours"]()), "reference": calls["reference"]()}
        check_agreement(losses, settings.agreement)
        seconds = in_turns(calls, device, **settings.rounds)
    memory = None
    if device.type == "cuda":
        memory = {  # without what else is held meanwhile
            "ours": _peak_of(calls["ours"], device, besides=theirs),
            "reference": _peak_of(calls["reference"], device, besides=ours),
        }
    idle = {"float32_losses": "there is no autocast"} if precision == "no" else {}
    if device.type != "cpu" or not MKL_IS_SLOW:
        idle["plain_linear"] = "there is no faster way here"
    if not apart:
        idle["memory_given_back"] = "there is no other way here"
    if ours.discriminator is None:
        idle["loss_calls"] = "there is no discriminator"
    if not ways:
        idle = dict.fromkeys(reference.WAYS, "--no-ways")
    elif settings.config.compile:  # every way would be compiled anew
        idle = dict.fromkeys(reference.WAYS, "it is measured without --compile")
    del ours, setup, calls  # a third state may not fit beside them
    wanted, spent = [way for way in reference.WAYS if way not in idle], {}
    if wanted:
        faster = networks(settings).state
        theirs = theirs or networks(settings).state
        with ExitStack() as stack:
            calls = {"": reference_step(reference.Official.only(), faster, stack)}
            for way in wanted:  # the optimisers' states, too, have a layout
                state = theirs if way == "contiguous" else faster
                calls[way] = reference_step(reference.Official.only(way), state, stack)
            spent = in_turns(calls, device, **settings.rounds)
    return {
        "losses": losses,
        "tolerance": settings.agreement,
        "precision": precision,
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "ratio": summary([r / o for o, r in zip(seconds["ours"], seconds["reference"], strict=True)]),
        "memory": memory,
        "ways": {
            way: {"idle": idle[way]}
            if way in idle
            else {"cost": summary([w / b - 1 for w, b in zip(spent[way], spent[""], strict=True)])}
            for way in reference.WAYS
        },
    }


def _compared(settings: Settings) -> tuple[TrainSetup, tuple]:
    """Networks, and the images, labels, targets and draws of a step, which are the same in every process."""
    setup = networks(settings)
    images, labels = (tensor.to(settings.device) for tensor in batch_of(settings))
    targets = _tokens(settings, setup.encoders, images)
    return setup, (to_unit_range(images), labels, targets, draws_of(settings, 0))


def _is_apart(settings: Settings, official: object) -> bool:
    """Whether a reference step needs a process of its own: one that does not keep the memory of tensors."""
    return official.memory_given_back and settings.device == "cpu" and can_keep_memory()


def _reference_step(
    settings: Settings,
    reference: ModuleType,
    batch: tuple,
    official: object,
    state: TrainState | None,
    stack: ExitStack,
) -> Callable[[], dict[str, float]]:
    """A step of the reference, on the state or in a process of its own, which lives as long as the stack."""
    if not _is_apart(settings, official):
        return _reference_step_here(settings, reference, batch, official, state)
    call = stack.enter_context(own_process("the reference"))
    call(_set_up_apart, settings, reference.__file__, vars(official))
    return partial(call, _step_apart)


def _reference_step_here(
    settings: Settings, reference: ModuleType, batch: tuple, official: object, state: TrainState
) -> Callable[[], dict[str, float]]:
    how = {"dtype": PRECISIONS[settings.precision], "compile": settings.config.compile}
    return partial(reference.ReferenceStep(state, official, **how), *batch)


_apart: dict[str, Callable[[], dict[str, float]]] = {}  # in a process of its own: its step


def _set_up_apart(settings: Settings, file: str, official: dict[str, bool]) -> None:
    reference, (setup, batch) = SimpleNamespace(**runpy.run_path(file)), _compared(settings)
    ways = reference.Official(**official)
    _apart["step"] = _reference_step_here(settings, reference, batch, ways, setup.state)


def _step_apart() -> dict[str, float]:
    return _apart["step"]()


@contextmanager
def own_process(what: str) -> Iterator[Callable]:
    """Inside, a function that calls others in a new process, with as many threads as this one.

    Raises:
        ValueError: that process was killed.
    """
    context, threads = multiprocessing.get_context("spawn"), (torch.get_num_threads(),)
    try:
        with ProcessPoolExecutor(1, context, torch.set_num_threads, threads) as pool:
            yield lambda function, *given: pool.submit(function, *given).result()
    except BrokenProcessPool:
        raise ValueError(
            f"the process that measured {what} was killed, as happens when memory runs out: take a smaller "
            "--batch-size or --model"
        ) from None


def _our_step(state: TrainState, *batch) -> dict[str, Tensor]:
    """Without waiting for the device, as the trainer takes a step."""
    return all_updates(state, *batch)[0]


def check_agreement(losses: dict[str, dict[str, float]], tolerance: float) -> None:
    """Refuses losses of "ours" and "reference" that differ by more than rounding.

    Raises:
        ValueError: the one that differs most.
    """
    ours, theirs = losses["ours"], losses["reference"]
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"the reference has other losses ({', '.join(theirs)}) than ours ({', '.join(ours)}): its file "
            "is of another version"
        )
    worst, name = max((_difference(name, ours[name], theirs[name]), name) for name in ours)
    if not worst <= tolerance:
        raise ValueError(
            f"ours and the reference disagree: {name} is {ours[name]:.6g} and {theirs[name]:.6g}, further "
            f"apart than {tolerance:g}: do not trust their times, and please report it"
        )


def _difference(name: str, one: float, other: float) -> float:
    """In units of what is allowed; NaN counts as infinite."""
    scale = 1.0 if name in SIGNED else max(abs(one), abs(other), 1e-12)
    if one == other:  # infinite norms, too, from which fp16 lowers its scale
        return 0.0
    found = abs(one - other) / scale / (10 if name.startswith("grad_norm") else 1)
    return found if found == found else float("inf")


def _peak_of(call: Callable, device: torch.device, *, besides: TrainState) -> int:
    """Bytes that a call needs at most on a CUDA device, without those that another state holds there."""
    torch.cuda.reset_peak_memory_stats(device)
    call()
    modules = [
        m for m in (besides.vae, besides.sit, besides.ema, besides.discriminator, besides.perceptual) if m
    ]
    held = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    held += [p.grad for p in held if p.grad is not None]
    for optimizer in besides.optimizers.values():
        held += [value for state in optimizer.state.values() for value in state.values()]
    return peak_memory(device) - sum(t.numel() * t.element_size() for t in held if t.device.type == "cuda")
