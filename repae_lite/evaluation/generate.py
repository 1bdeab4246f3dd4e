"""Images of a trained run: from (seed, sample index) to the same pixels, however often it was interrupted.

The command is `repae generate`. Everything random in sample i follows from the seed and i alone: label, first
noise, and the SDE's noise. Draws are therefore the same whatever the number of processes, and the pixels are
the same to the bit where the images are cut into the same batches (other batch sizes change the rounding of
float32 sums).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repae_lite.data.samples import SampleFolder
from repae_lite.method.sampling import Guidance, sample_ode, sample_sde
from repae_lite.networks.sit import SiT, SiTConfig
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.utils.pixels import ROUNDINGS, to_uint8
from repae_lite.utils.processes import process_count, process_rank, together, wait_for_all
from repae_lite.utils.progress import progress_bar
from repae_lite.utils.seeding import generator

DECODED = 16  # latents that the VAE decodes at once
MODES = ("ode", "sde")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How images are drawn from any SiT: one half of a protocol, the other is how they are judged.

    Attributes:
        mode: "ode" (probability flow) or "sde" (reverse SDE, Euler-Maruyama).
        solver: of the ODE, "euler" or "heun".
        steps: of the sampler.
        cfg_scale: strength of classifier-free guidance; 1 is none.
        guidance_low: guidance acts for times from here ...
        guidance_high: ... to here.
        labels: "random" (uniform, independent), "balanced" (equal counts, shuffled) or "classes=3,7" (these
            in turn).
        count: number of images.
        to_uint8: "truncate" cuts 255·x as the official code does, "round" rounds it.

    Raises:
        ValueError: a value that makes no sense.
    """

    mode: str = "ode"
    solver: str = "euler"
    steps: int = 50
    cfg_scale: float = 1.0
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    labels: str = "random"
    count: int = 50_000
    to_uint8: str = "truncate"

    def __post_init__(self):
        for name, known in (("mode", MODES), ("solver", ("euler", "heun")), ("to_uint8", ROUNDINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {' or '.join(known)}")
        if self.solver == "heun" and self.mode == "sde":
            raise ValueError("heun solves the ODE: choose mode ode, or the solver euler")
        least = 2 if self.mode == "sde" else 1
        if self.steps < least:
            raise ValueError(f"steps is {self.steps}: mode {self.mode} takes at least {least}")
        if self.count < 1:
            raise ValueError(f"count is {self.count}: ask for at least 1 image")
        self.guidance()
        if self.labels not in ("random", "balanced"):
            self._classes()

    def guidance(self) -> Guidance:
        """The guidance of these settings."""
        return Guidance(self.cfg_scale, self.guidance_low, self.guidance_high)

    def check(self, sit: SiTConfig) -> None:
        """Refuses, before anything is drawn or written, what this SiT cannot draw.

        Raises:
            ValueError: a count that cannot be balanced, classes that the SiT does not have, or guidance
                without a null class.
        """
        self.guidance().check(sit)
        if self.labels == "balanced" and self.count % sit.num_classes:
            raise ValueError(
                f"{self.count} images cannot be shared equally by {sit.num_classes} classes: ask for "
                f"{max(1, round(self.count / sit.num_classes)) * sit.num_classes}"
            )
        if self.labels not in ("random", "balanced") and max(self._classes()) >= sit.num_classes:
            raise ValueError(
                f"labels is {self.labels!r}, but the SiT has the classes 0 to {sit.num_classes - 1}: choose "
                "among them"
            )

    def _classes(self) -> list[int]:
        given = self.labels.removeprefix("classes=").split(",")
        if not self.labels.startswith("classes=") or not all(one.strip().isdecimal() for one in given):
            raise ValueError(
                f"labels is {self.labels!r}: choose random, balanced or classes=N,N,… (class numbers from 0)"
            )
        return [int(one) for one in given]


@dataclass(frozen=True, kw_only=True)
class Sampling(Drawing):
    """How the images of one run are drawn.

    Attributes:
        path_type: the path that the SiT was trained on.
        seed: of every draw.
    """

    path_type: str = "linear"
    seed: int = 0

    def all_labels(self, num_classes: int) -> Tensor:
        """The class of every image, (count,) int64; `check` says whether the settings suit the SiT."""
        if self.labels == "random":
            return torch.tensor([
                int(torch.randint(num_classes, (), generator=generator("label", self.seed, i)))
                for i in range(self.count)
            ])  # fmt: skip
        if self.labels == "balanced":
            order = torch.randperm(self.count, generator=generator("labels", self.seed))
            return torch.arange(num_classes).repeat_interleave(self.count // num_classes)[order]
        classes = torch.tensor(self._classes())
        return classes.repeat(math.ceil(self.count / len(classes)))[: self.count]


class SampleDraws:
    """The random numbers of some samples, each from a generator of its own.

    Args:
        seed: of all draws.
        images: numbers of the samples.
        shape: of a latent, (C, h, w).
    """

    def __init__(self, seed: int, images: range, shape: tuple[int, int, int]):
        self.generators, self.shape = [generator("sample", seed, i) for i in images], shape

    def eps(self) -> Tensor:
        """The first noise, (B, C, h, w) float32; to be taken before `step_noise`."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])

    def step_noise(self) -> Iterator[Tensor]:
        """The SDE's noise of one step after the other, (B, C, h, w) float64."""
        while True:
            drawn = [torch.randn(self.shape, generator=g, dtype=torch.float64) for g in self.generators]
            yield torch.stack(drawn)


@torch.no_grad()
def draw_images(
    sit: SiT,
    vae: AutoencoderKL,
    sampling: Sampling,
    images: range,
    labels: Tensor,
    roundings: Sequence[str] = (),
    *,
    eps: Tensor | None = None,
    decoded: int = DECODED,
) -> list[Tensor]:
    """The samples of these numbers.

    Args:
        sit: in eval mode; its device is the one that computes.
        vae: decodes what the SiT was trained on.
        sampling: the settings.
        images: numbers of the samples.
        labels: their classes (B,).
        roundings: to uint8, one result each; only that of `sampling` if empty.
        eps: first noise (B, C, h, w) that was drawn elsewhere; None draws it for these numbers.
        decoded: latents that the VAE decodes at once; another number rounds float32 sums otherwise.

    Returns:
        For each rounding uint8 (B, 3, H, W), on the CPU.
    """
    device, size = sit.pos_embed.device, sit.config.input_size
    draws = SampleDraws(sampling.seed, images, (sit.config.in_channels, size, size))
    eps, labels = (draws.eps() if eps is None else eps).to(device), labels.to(device)
    given = {"steps": sampling.steps, "guidance": sampling.guidance(), "path": sampling.path_type}
    if sampling.mode == "ode":
        sample = sample_ode(sit, eps, labels, solver=sampling.solver, **given)
    else:
        sample = sample_sde(sit, eps, labels, noise=draws.step_noise(), **given)
    z = sit.denormalize(sample)
    parts = [vae.decode(chunk) for chunk in z.split(decoded)]
    roundings = roundings or (sampling.to_uint8,)
    return [torch.cat([to_uint8(x, rounding).cpu() for x in parts]) for rounding in roundings]


def generate(
    sit: SiT,
    vae: AutoencoderKL,
    sampling: Sampling,
    folder: Path,
    *,
    batch: int = 128,
    png: bool = False,
    about: dict | None = None,
    progress: bool = False,
) -> SampleFolder:
    """Draws all images that are not in the folder yet; torch.distributed's processes share the batches.

    Args:
        sit: in eval mode.
        vae: decodes what the SiT was trained on.
        sampling: the settings.
        folder: see `SampleFolder`.
        batch: images at once, in each process.
        png: write PNG files too.
        about: JSON values for the manifest: what else the images depend on.
        progress: show a bar.

    Returns:
        The folder, all batches of this process done; `finish` makes the .npz when those of all are.

    Raises:
        ValueError, OSError: see `Drawing.check` and `SampleFolder.open`.
    """
    sampling.check(sit.config)
    side = sit.config.input_size * vae.config.downsampling
    samples = SampleFolder(folder, count=sampling.count, side=side, batch=batch, png=png)
    with together():
        if process_rank() == 0:
            samples.open(manifest_of(sampling, batch=batch, about=about or {}))
    labels = sampling.all_labels(sit.config.num_classes)  # of a number that the disk has room for
    missing = samples.missing()
    wait_for_all()
    mine = missing[process_rank() :: process_count()]
    done = sampling.count - sum(map(len, missing))
    with progress_bar(sampling.count, done, show=progress) as bar:
        for images in mine:
            (pixels,) = draw_images(sit, vae, sampling, images, labels[images.start : images.stop])
            samples.write(images, pixels.permute(0, 2, 3, 1).numpy())
            bar.update(len(images) * process_count())
    wait_for_all()
    return samples


def manifest_of(sampling: Sampling, *, batch: int, about: dict) -> dict:
    """What the images depend on, as JSON values."""
    return {"sampling": asdict(sampling), "batch": batch, **about}


def first_images(samples: np.ndarray) -> Tensor:
    """The first 64 images (N, H, W, 3) as (64, 3, H, W), for a picture."""
    return torch.from_numpy(np.array(samples[:64])).permute(0, 3, 1, 2)
