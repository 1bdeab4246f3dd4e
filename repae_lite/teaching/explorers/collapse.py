"""The collapse laboratory: let the wrong loss reach the VAE for 20 steps, and watch the latents."""

from dataclasses import replace

import ipywidgets
import torch

from repae_lite.evaluation import metrics
from repae_lite.method.steps import repae_step
from repae_lite.teaching.explorers.parts import Board, Explorer, Progress, show
from repae_lite.teaching.figures import LatentPalette, curves, image_rows, spectrum
from repae_lite.teaching.small_scale import SmallScale
from repae_lite.utils.pixels import to_unit_range

SHOWN, STEPS, BATCH = 8, 20, 32
"""Images in the figures; steps at each press of the button; images of a step."""


def collapse_lab(small: SmallScale | None = None, *, seed: int = 0) -> Explorer:
    """Weights of both losses in the VAE step, the stop-gradient and BatchNorm's mode, 20 steps at a time.

    Args:
        small: data and networks of the embedded scale; loaded when None.
        seed: of SiT's weights and of the batches.
    """
    return _Laboratory(small or SmallScale.load(), seed).explorer


class _Laboratory:
    """A state of training, what it was at the start, and how its latents' variance went."""

    def __init__(self, small: SmallScale, seed: int):
        self.small, self.seed = small, seed
        self.pictures = [Board() for _ in range(3)]
        slider = {"min": 0, "step": 0.1, "readout_format": ".1f"}
        controls = {
            "alignment": ipywidgets.FloatSlider(1.5, max=10, **slider, description="weight of alignment"),
            "denoising": ipywidgets.FloatSlider(1.0, max=5, **slider, description="weight of denoising"),
            "stop": ipywidgets.Checkbox(True, description="stop-gradient: denoising does not reach the VAE"),
            "batch": ipywidgets.Checkbox(False, description="VAE step normalises by the batch's statistics"),
            "rate": ipywidgets.FloatLogSlider(
                2e-4, min=-5, max=-2, description="VAE's learning rate", readout_format=".0e"
            ),
        }
        self.start()
        train, again = f"Train {STEPS} steps", {"Start again": self._again}
        self.explorer = Explorer(self.draw, controls, self.pictures, button=train, buttons=again, slow=True)

    def start(self) -> None:
        torch.manual_seed(self.seed)
        self.state = self.small.new_state("repa-e")
        self.batches = self.small.batches(100_000, BATCH, self.seed)
        self.generator = self.small.generator(self.seed)
        self.first = self.small.eval_latents(self.state.vae)
        self.palette = LatentPalette([self.first])
        self.history: dict[str, list[float]] = {"variance": [1.0], "denoising": [], "alignment": []}
        self.fresh = True

    def draw(
        self, progress: Progress, alignment: float, denoising: float, stop: bool, batch: bool, rate: float
    ) -> None:
        weights = {"vae_align_coeff": alignment, "vae_diffusion_coeff": 0.0 if stop else denoising}
        self.state.config = replace(self.state.config, vae_step_batch_stats=batch, **weights)
        self.state.optimizers["vae"].param_groups[0]["lr"] = rate
        try:
            for done in range(0 if self.fresh else STEPS):
                progress(done, STEPS)
                self._step()
        finally:
            self.fresh = False
            self._show()

    def _step(self) -> None:
        index, small, config = next(self.batches), self.small, self.state.sit.config
        shape = (2, len(index), config.in_channels, config.input_size, config.input_size)
        noise = torch.randn(shape, generator=self.generator, device=small.device)
        t, drop = torch.rand(2, len(index), generator=self.generator, device=small.device)
        losses = repae_step(
            self.state,
            to_unit_range(small.images[index]),
            small.labels[index],
            small.tokens[index],
            eps_posterior=noise[0],
            t=t,
            eps=noise[1],
            label_drop=drop < config.label_dropout,
        )
        with torch.no_grad():
            z = self.state.vae.encode(to_unit_range(small.eval_images[:100])).mode()
        self.history["variance"].append(
            float(z.var((0, 2, 3)).mean() / self.first[:100].var((0, 2, 3)).mean())
        )
        self.history["denoising"].append(losses["denoising"])
        self.history["alignment"].append(-losses["sit_align"])

    @torch.no_grad()
    def _show(self) -> None:
        vae, steps = self.state.vae, self.state.step
        z = self.small.eval_latents(vae)
        x = to_unit_range(self.small.eval_images[:SHOWN])
        rows = {"image": x, "reconstruction": vae.decode(z[:SHOWN])}
        rows |= {
            "latents, at the start": self.palette(self.first[:SHOWN]),
            "latents, now": self.palette(z[:SHOWN]),
        }
        variance = self.history["variance"][-1]
        psnr = float(metrics.psnr(rows["reconstruction"], x).mean())
        told = (
            f"After {steps} steps the latents' variance is {variance:.2f} of what it was, in "
            f"{metrics.effective_dimensions(z):.1f} effective dimensions; PSNR {psnr:.1f} dB"
        )
        found = {name: (list(range(len(v))), v) for name, v in self.history.items() if len(v) > 1}
        figures = [image_rows(rows, title=told, scale=2), spectrum({"at the start": self.first, "now": z})]
        if found:
            figures.append(
                curves(found, title="By step: variance (share of the start), denoising loss, alignment")
            )
        for place, figure in zip(self.pictures, figures, strict=False):
            show(place, figure._repr_png_(), told)

    def _again(self) -> None:
        self.explorer.cancel()
        self.explorer.wait()
        self.start()
        self.pictures[2].pictures = []
        self.explorer.request()
