"""The embedded scale in one object: images, the teacher's tokens, the shipped VAE, and the judge.

It does for the notebooks what they do not teach. Results are judged as at full scale, in miniature: by the
Fréchet distance of 2,000 samples to the evaluation split, on the features of an evaluation network that
nothing is trained with. Taught in `notebooks/00_map.ipynb`.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from repae_lite.checkpoints.models import load_latent_stats, load_vae
from repae_lite.data.datasets import load_embedded
from repae_lite.evaluation.evaluation_net import EvaluationNet
from repae_lite.evaluation.features import BATCH, TinyFeatures, load_judge
from repae_lite.evaluation.generate import Sampling, draw_images
from repae_lite.evaluation.metrics import FeatureStats, feature_stats, frechet_distance, psnr
from repae_lite.method.losses import TinyPerceptualLoss, VAELossConfig
from repae_lite.method.sampling import Guidance
from repae_lite.method.steps import StepConfig, TrainState, latent_step, make_ema, make_optimizer, repae_step
from repae_lite.networks.encoders import VisionEncoder
from repae_lite.networks.latent_stats import LatentStats
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.cores import beside_others
from repae_lite.utils.devices import choose_device
from repae_lite.utils.pixels import to_uint8, to_unit_range

# On 32-pixel icons an adversarial term gained nothing to speak of and cost 0.6 dB (chapter 05).
TINY_VAE_LOSS = VAELossConfig(gan_weight=0.0)
GENERATED = 250  # images that are drawn and decoded at once
METHODS = {
    "sit": StepConfig(vae_loss=TINY_VAE_LOSS, proj_coeff=0.0, ema_decay=0.98),  # VAE frozen: SiT steps alone
    "repa": StepConfig(vae_loss=TINY_VAE_LOSS, ema_decay=0.98),  # VAE frozen: SiT steps alone
    "vae-only": StepConfig(vae_loss=TINY_VAE_LOSS, vae_align_coeff=0.0, ema_decay=0.98),
    "repa-e": StepConfig(vae_loss=TINY_VAE_LOSS, ema_decay=0.98),
    "naive": StepConfig(vae_loss=TINY_VAE_LOSS, vae_align_coeff=0.0, vae_diffusion_coeff=1.0, ema_decay=0.98),
}


@dataclass
class SmallScale:
    """Data and frozen networks of the embedded scale.

    Attributes:
        images: Training images, uint8 (6000, 3, 32, 32).
        labels: Their classes (6000,).
        tokens: The teacher's tokens for them (6000, 16, 128), computed once: there is no augmentation.
        eval_images: Evaluation images, uint8 (2000, 3, 32, 32), for measuring only.
        eval_labels: Their classes (2000,).
        encoder: The teacher.
        perceptual: The VAE's perceptual distance.
        judge: The judge, as `repae evaluate` has it in protocol `tiny`.
        reference: Feature statistics of the evaluation images.
    """

    images: Tensor
    labels: Tensor
    tokens: Tensor
    eval_images: Tensor
    eval_labels: Tensor
    encoder: VisionEncoder
    perceptual: TinyPerceptualLoss
    judge: TinyFeatures
    reference: FeatureStats

    @classmethod
    def load(cls, device: str | torch.device = "cpu") -> "SmallScale":
        """Loads everything that ships in data_small; this takes about ten seconds.

        Args:
            device: where everything is and runs: "cpu", "cuda", "cuda:1" or "mps".

        Raises:
            ValueError: torch cannot use the device; the embedded data is damaged.
            FileNotFoundError: the data folder is not there.
        """
        device = choose_device(str(device))
        images, labels, eval_images, eval_labels = (
            values.to(device) for split in ("train", "eval") for values in load_embedded(split)
        )
        encoder = VisionEncoder.from_name("tiny").to(device)
        judge = load_judge("tiny").to(device).requires_grad_(False)
        return cls(
            images=images,
            labels=labels,
            tokens=_tokens(encoder, images),
            eval_images=eval_images,
            eval_labels=eval_labels,
            encoder=encoder,
            perceptual=TinyPerceptualLoss.pretrained().to(device, memory_format=torch.channels_last),
            judge=judge,
            reference=feature_stats(_judged(judge, eval_images)["pooled"]),
        )

    @property
    def device(self) -> torch.device:
        """Where everything is and runs."""
        return self.images.device

    @cached_property
    def eval_tokens(self) -> Tensor:
        """The teacher's tokens for the evaluation images (2000, 16, 128), for measuring only."""
        return _tokens(self.encoder, self.eval_images)

    @property
    def evaluator(self) -> EvaluationNet:
        """The judge's network."""
        return self.judge.network

    def generator(self, seed: int) -> torch.Generator:
        """A generator for draws on the device; other devices draw other numbers from the same seed."""
        return torch.Generator(self.device).manual_seed(seed)

    def batches(self, count: int, batch: int, seed: int) -> Iterator[Tensor]:
        """Yields `count` batches of indices (batch,) into the training split, reshuffled every epoch."""
        generator = self.generator(seed)
        order = torch.empty(0, dtype=torch.int64, device=self.device)
        for _ in range(count):
            if len(order) < batch:
                drawn = torch.randperm(len(self.images), generator=generator, device=self.device)
                order = torch.cat([order, drawn])
            yield order[:batch]
            order = order[batch:]

    @torch.no_grad()
    def latents(self, vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
        """Cached latents of the training images: posterior mean and std, each (6000, C, h, w)."""
        posteriors = [vae.encode(x) for x in to_unit_range(self.images).split(500)]
        return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])

    def new_state(
        self,
        method: str,
        *,
        sit_lr: float = 1e-3,
        vae_lr: float = 2e-4,
        vae: AutoencoderKL | None = None,
        **sit_changes,
    ) -> TrainState:
        """A fresh SiT on a VAE, ready for `method`: "sit", "repa", "vae-only", "repa-e" or "naive".

        The SiT's weights come from torch's global generator, so seed it first. A plain "sit" has a projector
        too, which is never trained, so that it starts from the same weights as the others.

        Args:
            method: A key of `METHODS`; "sit" and "repa" freeze the VAE.
            sit_lr: SiT's learning rate.
            vae_lr: The VAE's learning rate.
            vae: The VAE to start from, used itself and not copied; None for the shipped one.
            sit_changes: Fields of the tiny `SiTConfig` to replace.

        Raises:
            ValueError: There is no such method.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
        sit = SiT.from_preset("tiny", **sit_changes)
        if vae is None:
            vae = load_vae("tiny").to(self.device)
            sit.set_latent_stats(load_latent_stats("tiny"))
        else:
            sit.set_latent_stats(LatentStats.from_posteriors(*self.latents(vae.to(self.device))))
        sit.to(self.device)
        vae.to(memory_format=torch.channels_last)  # convolutions take a tenth less time
        optimizers = {"sit": make_optimizer(sit, lr=sit_lr)}
        if method in ("sit", "repa"):
            vae.requires_grad_(False)
        else:
            optimizers["vae"] = make_optimizer(vae, lr=vae_lr)
        return TrainState(vae, sit, make_ema(sit), optimizers, METHODS[method], perceptual=self.perceptual)

    def train(
        self,
        state: TrainState,
        steps: int,
        *,
        targets: Tensor | None,
        batch: int = 32,
        seed: int = 0,
        warmup: int = 50,
        label: str = "training",
        moving_step: Callable[..., dict[str, float]] = repae_step,
    ) -> list[dict[str, float]]:
        """Trains a state from `new_state`, in place, with a progress bar.

        The VAE trains if the state has an optimiser for it; otherwise its latents are cached first. All
        random draws come from a generator with this seed, so two runs with one seed see the same batches,
        times and noise, whatever they do with them. Learning rates follow `learning_rate`.

        Args:
            state: Updated in place.
            steps: Training steps.
            targets: Tokens to align with (6000, 16, D), for instance `self.tokens`; None for a plain SiT.
            batch: Images per step.
            seed: Seed of batches, times and noise.
            warmup: Steps over which the learning rates rise.
            label: Name of the progress bar.
            moving_step: What a step is where the VAE trains; another for study.

        Returns:
            The losses of each step.

        Raises:
            ValueError: The state's method aligns SiT, but there are no targets.
        """
        if targets is None and state.config.proj_coeff:
            raise ValueError(
                f"the method aligns SiT (proj_coeff {state.config.proj_coeff}) but there are no targets: "
                "pass the tokens, or make the state for 'sit'"
            )
        rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in state.optimizers.items()}
        mean, std = self.latents(state.vae) if "vae" not in state.optimizers else (None, None)
        size, draw, history = state.sit.config, {"generator": self.generator(seed), "device": self.device}, []
        for step, index in enumerate(progress(self.batches(steps, batch, seed), steps, label)):
            for name, optimizer in state.optimizers.items():
                optimizer.param_groups[0]["lr"] = rates[name] * learning_rate(step, steps, warmup)
            noise = torch.randn(2, len(index), size.in_channels, size.input_size, size.input_size, **draw)
            t, drop = torch.rand(2, len(index), **draw)
            draws = {"t": t, "eps": noise[1], "label_drop": drop < size.label_dropout}
            labels, tokens = self.labels[index], None if targets is None else targets[index]
            if mean is None:
                x = to_unit_range(self.images[index])
                history.append(moving_step(state, x, labels, tokens, eps_posterior=noise[0], **draws))
            else:
                history.append(
                    latent_step(state, mean[index] + std[index] * noise[0], labels, tokens, **draws)
                )
        return history

    def generate(
        self,
        sit: SiT,
        vae: AutoencoderKL,
        count: int = 2000,
        *,
        steps: int = 20,
        seed: int = 0,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Samples with labels in turn, by Euler steps: uint8 (count, 3, 32, 32) and labels (count,).

        As `repae generate` draws them, but with all first noise from one generator on the device and
        `GENERATED` images at once: the notebooks' numbers were recorded so.
        """
        guidance = guidance or Guidance()
        sampling = Sampling(
            steps=steps,
            cfg_scale=guidance.scale,
            guidance_low=guidance.low,
            guidance_high=guidance.high,
            count=count,
            to_uint8="round",
        )
        labels = torch.arange(count, device=self.device) % sit.config.num_classes
        shape = (count, sit.config.in_channels, sit.config.input_size, sit.config.input_size)
        eps = torch.randn(shape, generator=self.generator(seed), device=self.device)
        images = []
        for at in range(0, count, GENERATED):
            part = slice(at, at + GENERATED)
            given = {"eps": eps[part], "decoded": GENERATED}
            images += draw_images(sit, vae, sampling, range(count)[part], labels[part], **given)
        return torch.cat(images).to(self.device), labels

    @torch.no_grad()
    def reconstruct(self, vae: AutoencoderKL) -> Tensor:
        """The evaluation images, reconstructed from posterior means: uint8 (2000, 3, 32, 32)."""
        batches = to_unit_range(self.eval_images).split(250)
        return torch.cat([to_uint8(vae.decode(vae.encode(x).mode())) for x in batches])

    @torch.no_grad()
    def eval_latents(self, vae: AutoencoderKL) -> Tensor:
        """Posterior means of the evaluation images (2000, C, h, w)."""
        return torch.cat([vae.encode(x).mode() for x in to_unit_range(self.eval_images).split(250)])

    def score(self, samples: Tensor, labels: Tensor, reconstructions: Tensor) -> dict[str, float]:
        """What the scoreboard shows for one run, all measured on the evaluation split.

        Args:
            samples: Generated images, uint8 (N, 3, 32, 32).
            labels: The classes asked for (N,).
            reconstructions: `reconstruct` with the same run's VAE.

        Returns:
            "frechet" to real images; "frechet_to_reconstructions", which leaves out the decoder's faults;
            "class_accuracy" of the samples; "psnr" (dB) and "reconstruction_frechet" of the VAE.
        """
        judged = _judged(self.judge, samples)
        generated, guesses = feature_stats(judged["pooled"]), judged["probabilities"].argmax(1)
        rebuilt = feature_stats(_judged(self.judge, reconstructions)["pooled"])
        return {
            "frechet": frechet_distance(generated, self.reference),
            "frechet_to_reconstructions": frechet_distance(generated, rebuilt),
            "class_accuracy": float((guesses == labels).float().mean()),
            "psnr": float(psnr(to_unit_range(reconstructions), to_unit_range(self.eval_images)).mean()),
            "reconstruction_frechet": frechet_distance(rebuilt, self.reference),
        }


def learning_rate(step: int, steps: int, warmup: int = 50) -> float:
    """The factor on the learning rate: it rises over `warmup` steps and falls to 0 over the second half."""
    return min((step + 1) / warmup, 2 * (steps - step) / steps, 1.0)


def progress(items: Iterable, total: int, label: str) -> Iterator:
    """Yields the items, with tqdm's bar in a terminal, or in a notebook one that ends as a line of text.

    While it lasts, torch gets no more threads than other programs leave cores for (`repae_lite.utils.cores`).
    """
    items = beside_others(items)
    ipython = sys.modules.get("IPython")  # a notebook has loaded it; the library does without
    if ipython is None or ipython.get_ipython() is None:
        yield from tqdm(items, total=total, desc=label, mininterval=2)
        return
    from IPython.display import HTML, display

    start = shown = time.perf_counter()
    handle = display(HTML(f"{label} …"), display_id=True)
    for done, item in enumerate(items):
        yield item
        now = time.perf_counter()
        if now - shown > 1:
            left = (now - start) * (total / (done + 1) - 1)
            bar = f'<progress value="{done + 1}" max="{total}"></progress>'
            handle.update(HTML(f"{label} {bar} {done + 1} of {total}, {left:.0f} s left"))
            shown = now
    handle.update(HTML(f"{label}: {total} in {time.perf_counter() - start:.0f} s"))


def _tokens(encoder: VisionEncoder, images: Tensor) -> Tensor:
    """Tokens (N, 16, 128) of images (N, 3, 32, 32) uint8."""
    return torch.cat([encoder(batch) for batch in images.split(500)])


def _judged(judge: TinyFeatures, images: Tensor) -> dict[str, Tensor]:
    """Features of images (N, 3, 32, 32) uint8, by kind."""
    parts = [judge(batch) for batch in images.split(BATCH)]
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
