"""Makes the README's pictures: two from chapters as they were run, two with the networks that ship.

`python notebooks/site/pictures.py` puts them into notebooks/img.
"""

import argparse
import base64
import json
from pathlib import Path

import torch
from PIL import Image

from repae_lite import Guidance, load_sit, load_vae, sample_ode, to_uint8, to_unit_range
from repae_lite.data.datasets import load_embedded
from repae_lite.teaching.figures import LatentPalette, image_rows

NOTEBOOKS = Path(__file__).resolve().parents[1]
CELLS = {"method.png": ("00_map", "c01"), "tour.png": ("02_latent_diffusion", "6a84c2e7")}  # notebook, cell
NAME, STEPS, TILE = "tiny-e2e-20k", 20, 64  # networks; Euler steps, a frame each; pixels of an icon


def output_of(notebook: str, cell: str) -> bytes:
    """The PNG that a cell of a committed notebook shows."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    (outputs,) = (each["outputs"] for each in cells if each["id"] == cell)
    return base64.b64decode("".join(outputs[0]["data"]["image/png"]))


@torch.no_grad()
def latents(path: Path) -> None:
    """One image of each class, and its latents before and after tuning, normalised, in one palette."""
    images, labels = load_embedded("eval")
    images = torch.stack([images[labels == label][1] for label in range(10)])
    found = {}
    for name, vae in (("before tuning", "tiny"), ("after REPA-E", NAME)):
        z = load_vae(vae).encode(to_unit_range(images)).mode()
        found[name] = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), keepdim=True)
    palette = LatentPalette(list(found.values()))
    rows = {"image": images} | {f"latents\n{name}": palette(z) for name, z in found.items()}
    path.write_bytes(image_rows(rows, scale=3)._repr_png_())


@torch.no_grad()
def trajectory(path: Path) -> None:
    """One icon of each class on its way from noise, decoded at every step: an animated GIF."""
    sit, vae = load_sit(NAME), load_vae(NAME)
    eps = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = [eps]
    sample_ode(
        sit,
        eps,
        torch.arange(10),
        steps=STEPS,
        guidance=Guidance(2.5, 0.0, 0.75),  # as in chapter 02
        watch=lambda t, z: states.append(z),
    )
    frames = []
    for z in states:
        row = torch.cat(list(to_uint8(vae.decode(sit.denormalize(z.float())))), 2).permute(1, 2, 0)
        icons = Image.fromarray(row.numpy()).resize((10 * TILE, TILE), Image.Resampling.NEAREST)
        frames.append(icons.quantize(128, dither=Image.Dither.NONE))
    times = [120] * STEPS + [2500]  # milliseconds; the finished icons stay
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=NOTEBOOKS / "img", help="folder of the pictures")
    output = parser.parse_args().output
    for name, (notebook, cell) in CELLS.items():
        (output / name).write_bytes(output_of(notebook, cell))
    latents(output / "latents.png")
    trajectory(output / "trajectory.gif")


if __name__ == "__main__":
    main()
