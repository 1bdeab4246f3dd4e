"""Two ways of sampling side by side, from the same noise."""

from functools import partial

import ipywidgets
import torch
from torch import Tensor

from repae_lite.method.sampling import Guidance, sample_ode, sample_sde
from repae_lite.networks.sit import SiT
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.teaching.explorers.material import Material, Source
from repae_lite.teaching.explorers.parts import Explorer, Progress, heat, picture, sheet, show

FRAMES = 7  # of the film strip, and images of one setting
SIDES = "A", "B"


def sampler_explorer(
    sit: Source | SiT = "tiny",
    vae: Source | AutoencoderKL = "tiny",
    *,
    class_names: list[str] | None = None,
    device: str | None = None,
) -> Explorer:
    """Steps, solver, guidance and its interval, twice: film strips and samples from the same noise.

    Args:
        sit: by default the one that ships, trained for 20,000 steps.
        vae: the VAE it was trained on.
        class_names: what the menu calls the classes.
        device: where sampling runs; None for the best there is.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `load_sit` and `load_vae` say.
    """
    material = Material.of(device=device)
    sit, vae = material.sit(sit), material.vae(vae)
    size = sit.config
    where = picture()

    def draw(progress: Progress, label: int, seed: int, **given) -> None:
        shape = (FRAMES, size.in_channels, size.input_size, size.input_size)
        eps = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(material.device)
        labels = torch.full((FRAMES,), label, device=material.device)
        settings = {side: {name[2:]: v for name, v in given.items() if name[0] == side} for side in SIDES}
        total, done, rows, finals = sum(s["steps"] for s in settings.values()), 0, {}, {}
        for side, setting in settings.items():
            low, high = setting["interval"]
            guidance = Guidance(setting["scale"], low, high)
            states = [(1.0, eps)]

            def watch(t: float, z: Tensor, states: list = states) -> None:
                nonlocal done
                done += 1
                progress(done, total)
                states.append((t, z))

            solve = partial(sample_ode, solver=setting["solver"].lower())
            if setting["solver"] == "SDE":
                solve = partial(sample_sde, generator=torch.Generator().manual_seed(seed + 1))
            solve(sit, eps, labels, steps=setting["steps"], guidance=guidance, watch=watch)
            chosen = [states[round(i)] for i in torch.linspace(0, len(states) - 1, FRAMES).tolist()]
            with torch.no_grad():
                film = torch.cat([vae.decode(sit.denormalize(z[:1].to(eps))) for _, z in chosen])
                finals[side] = vae.decode(sit.denormalize(states[-1][1].to(eps)))
            rows[f"{side}, on its\nway"], rows[f"{side}, samples"] = film, finals[side]
        apart = (finals["A"] - finals["B"]).abs().mean(1)
        rows["A and B,\ndifference"] = [heat(each, 0, 1, "magma") for each in apart]
        text = "; ".join(
            f"{side}: {s['solver']}, {s['steps']} steps, guidance {s['scale']:g} for t from "
            f"{s['interval'][0]:g} to {s['interval'][1]:g}"
            for side, s in settings.items()
        )
        text = f"Class {label}, seed {seed}. {text}. Mean absolute difference {float(apart.mean()):.3f}."
        show(where, sheet(rows, tile=80), text)

    names = class_names or [f"class {i}" for i in range(size.num_classes)]
    controls = {
        "label": ipywidgets.Dropdown(options=[(n, i) for i, n in enumerate(names)], description="class"),
        "seed": ipywidgets.IntSlider(0, min=0, max=100),
    }
    for side, scale in zip(SIDES, (1.0, 2.5), strict=True):
        controls |= {
            f"{side} solver": ipywidgets.Dropdown(options=["Euler", "Heun", "SDE"]),
            f"{side} steps": ipywidgets.IntSlider(16, min=2, max=100),
            f"{side} scale": ipywidgets.FloatSlider(
                scale if size.label_dropout else 1.0,
                min=1,
                max=6,
                step=0.25,
                description=f"{side} guidance scale",
                disabled=not size.label_dropout,
            ),
            f"{side} interval": ipywidgets.FloatRangeSlider(
                value=(0.0, 0.75), min=0, max=1, step=0.05, description=f"{side} guided for t in"
            ),
        }
    return Explorer(draw, controls, [where], slow=True)
