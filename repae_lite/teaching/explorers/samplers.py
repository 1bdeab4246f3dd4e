"""Two ways of sampling side by side, from the same noise."""

from functools import partial
from itertools import count

import ipywidgets
import torch
from torch import Tensor

from repae_lite.checkpoints.models import load_sit, load_vae
from repae_lite.method.interpolant import Interpolant
from repae_lite.method.sampling import Guidance, sample_ode, sample_sde
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.teaching.explorers.material import Source, ready
from repae_lite.teaching.explorers.parts import Board, Explorer, Progress, heat, sheet, show
from repae_lite.utils.devices import choose_device

FRAMES = 7  # of the film strip, and images of one setting
SIDES = "A", "B"


def sampler_explorer(
    sit: Source | SiT = "tiny",
    vae: Source | AutoencoderKL = "tiny",
    *,
    class_names: list[str] | None = None,
    path: str | Interpolant = "linear",
    device: str | None = None,
) -> Explorer:
    """Steps, solver, guidance and its interval, twice: film strips and samples from the same noise.

    Args:
        sit: by default the one that ships, trained for 20,000 steps; copied, in float32.
        vae: the VAE it was trained on.
        class_names: what the menu calls the classes.
        path: from data to noise, on which the SiT was trained.
        device: where sampling runs; None for the best there is.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `load_sit` and `load_vae` say.
    """
    device = torch.device(choose_device(device))
    sit, vae = ready(sit, load_sit, device), ready(vae, load_vae, device)
    size, where = sit.config, Board()

    def draw(progress: Progress, label: int, seed: int, **given) -> None:
        shape = (FRAMES, size.in_channels, size.input_size, size.input_size)
        eps = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
        labels = torch.full((FRAMES,), label, device=device)
        settings = {side: {name[2:]: v for name, v in given.items() if name[0] == side} for side in SIDES}
        done, total = count(), sum(s["steps"] + 2 for s in settings.values())  # steps, and two decodings
        rows, captions = {}, {}

        @torch.no_grad()
        def decoded(z: Tensor) -> Tensor:
            progress(next(done), total)
            return vae.decode(sit.denormalize(z.to(eps)))

        for side, setting in settings.items():
            guidance, states = Guidance(setting["scale"], *setting["interval"]), [(1.0, eps)]

            def watch(t: float, z: Tensor, states: list = states) -> None:
                progress(next(done), total)
                states.append((t, z))

            solve = partial(sample_ode, solver=setting["solver"].lower())
            if setting["solver"] == "SDE":
                solve = partial(sample_sde, generator=torch.Generator().manual_seed(seed + 1))
            solve(sit, eps, labels, steps=setting["steps"], guidance=guidance, path=path, watch=watch)
            chosen = [states[round(i)] for i in torch.linspace(0, len(states) - 1, FRAMES).tolist()]
            rows[f"{side}, on its\nway"] = decoded(torch.cat([z[:1].to(eps) for _, z in chosen]))
            captions[f"{side}, on its\nway"] = [f"t = {t:.2f}" for t, _ in chosen]
            rows[f"{side}, samples"] = decoded(states[-1][1])
        apart = (rows["A, samples"] - rows["B, samples"]).abs().mean(1)
        rows["A and B,\ndifference"] = [heat(each, 0, 1, "magma") for each in apart]
        text = "; ".join(
            f"{side}: {s['solver']}, {s['steps']} steps, guidance {s['scale']:g} for t from "
            f"{s['interval'][0]:g} to {s['interval'][1]:g}"
            for side, s in settings.items()
        )
        text = f"Class {label}, seed {seed}. {text}. Mean absolute difference {float(apart.mean()):.3f}."
        show(where, sheet(rows, captions, tile=80), text)

    names = class_names or [f"class {i}" for i in range(size.num_classes)]
    controls = {
        "label": ipywidgets.Dropdown(options=[(n, i) for i, n in enumerate(names)], description="class"),
        "seed": ipywidgets.IntSlider(0, min=0, max=100),
    }
    guided = {"min": 1, "max": 6, "step": 0.25, "disabled": not size.label_dropout}
    for side, scale in zip(SIDES, (1.0, 2.5 if size.label_dropout else 1.0), strict=True):
        controls |= {
            f"{side} solver": ipywidgets.Dropdown(options=["Euler", "Heun", "SDE"]),
            f"{side} steps": ipywidgets.IntSlider(16, min=2, max=100),
            f"{side} scale": ipywidgets.FloatSlider(scale, **guided, description=f"{side} guidance scale"),
            f"{side} interval": ipywidgets.FloatRangeSlider(
                value=(0.0, 0.75), min=0, max=1, step=0.05, description=f"{side} guided for t in"
            ),
        }
    return Explorer(draw, controls, [where], slow=True)
