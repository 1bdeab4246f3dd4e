"""Latents to look at, to paint, and to walk between: what does each of them mean to the decoder?"""

import ipywidgets
import numpy as np
import torch
from torch import Tensor

from repae_lite.networks.vae import AutoencoderKL
from repae_lite.teaching.explorers.material import Material, Source
from repae_lite.teaching.explorers.parts import (
    TILE,
    Board,
    Explorer,
    Progress,
    Tabs,
    enlarged,
    heat,
    picture,
    pixels,
    png_of,
    sheet,
    show,
)
from repae_lite.teaching.figures import LatentPalette

PCA = "PCA to RGB"
RAW, NORMALISED = "as they are", "normalised, as SiT sees them"
PAINT, ZERO, OTHER, COPY, SWAP = (
    "paint",
    "zero",
    "take from the other image",
    "copy a patch",
    "swap two patches",
)
WALK = 7  # pictures between two images, both included


def latent_explorer(
    before: Source | AutoencoderKL = "tiny",
    after: Source | AutoencoderKL = "tiny-e2e",
    images: Tensor | None = None,
    *,
    device: str | None = None,
) -> Tabs:
    """Latents of one image under two VAEs, which can be painted on, and a walk between two images.

    Args:
        before: a VAE, for instance before tuning.
        after: another with latents of the same size.
        images: uint8 (B, 3, H, W); by default 40 of the embedded evaluation split.
        device: where the VAEs run; None for the best there is.

    Raises:
        ValueError: the latents differ in size; images as `Material.of` says.
        FileNotFoundError, ConnectionError: as `load_vae` says.
    """
    material = Material.of(images, device=device)
    vaes = {"before tuning": material.vae(before), "after tuning": material.vae(after)}
    latents = {name: material.latents(vae) for name, vae in vaes.items()}
    sizes = {name: tuple(z.shape[1:]) for name, z in latents.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the latents differ in size, {sizes}: choose two VAEs of one architecture")
    tab = Tabs([_Painting(material, vaes, latents).explorer, _walk(material, vaes, latents)])
    tab.titles = ["look and paint", "walk"]
    return tab


class _Painting:
    """The first tab: one image's latents, with edits that end when another image or VAE is chosen."""

    def __init__(self, material: Material, vaes: dict[str, AutoencoderKL], latents: dict[str, Tensor]):
        self.material, self.vaes, self.latents = material, vaes, latents
        self.stats = {name: _stats(z) for name, z in latents.items()}
        scales = {
            RAW: latents,
            NORMALISED: {name: self._in(NORMALISED, name, z) for name, z in latents.items()},
        }
        self.palettes = {units: LatentPalette(list(z.values())) for units, z in scales.items()}
        self.ranges = {  # one for both VAEs, so that a colour means one number
            units: torch.stack(
                [z.abs().movedim(1, 0).flatten(1).quantile(0.99, dim=1) for z in every.values()]
            ).amax(0)
            for units, every in scales.items()
        }
        _, channels, rows, columns = latents["before tuning"].shape
        self.board = Board(rows=rows, columns=columns, paint=True, side=288)
        self.decoded, self.compared = picture(), picture()
        self.edited, self.source, self.of = None, None, None
        last = len(material.images) - 1
        every = [f"channel {c}" for c in range(channels)]
        self.brush = {
            "action": ipywidgets.Dropdown(options=[PAINT, ZERO, OTHER, COPY, SWAP]),
            "value": ipywidgets.FloatSlider(
                2.0,
                min=-4,
                max=4,
                step=0.25,
                description="paint with (standard deviations)",
                layout={"width": "420px"},
            ),
            "channel": ipywidgets.Dropdown(options=["all channels", *every], description="change"),
            "size": ipywidgets.IntSlider(2, min=1, max=max(1, rows // 2), description="patch (cells)"),
        }
        for control in self.brush.values():
            control.style = {"description_width": "initial"}
        reset = ipywidgets.Button(description="Undo all")
        reset.on_click(lambda _: self._reset())
        self.explorer = Explorer(
            self.draw,
            {
                "image": ipywidgets.IntSlider(0, min=0, max=last),
                "other": ipywidgets.IntSlider(min(1, last), min=0, max=last, description="other image"),
                "vae": ipywidgets.Dropdown(options=list(vaes), description="latents"),
                "view": ipywidgets.Dropdown(options=[PCA, *every], description="show as"),
                "units": ipywidgets.Dropdown(options=[RAW, NORMALISED], description="colours"),
            },
            [
                ipywidgets.Box([*self.brush.values(), reset], layout={"flex_flow": "row wrap"}),
                ipywidgets.Box(
                    [self.board, ipywidgets.VBox([self.decoded, self.compared])],
                    layout={"flex_flow": "row wrap", "grid_gap": "12px"},
                ),
            ],
        )
        self.board.observe(self._stroked, names="stroke")

    def draw(self, progress: Progress, image: int, other: int, vae: str, view: str, units: str) -> None:
        if self.of != (image, vae):
            self.of, self.source = (image, vae), None
            self.edited = self.latents[vae][image].clone()
        start = self.latents[vae][image]
        both = torch.stack([start, self.edited])
        with torch.no_grad():
            plain, changed = self.vaes[vae].decode(both)
        self.board.pictures = [png_of(enlarged(self._seen(self.edited, vae, view, units), self.board.side))]
        self.board.description = f"Latents of image {image} {vae}, {view}, {units}."
        apart = (changed - plain).abs().mean(0)
        top = [self.material.images[image], plain, changed, heat(apart, 0, 1, "magma")]
        captions = ["image", "as it was", "changed", f"difference\nmean {apart.mean():.3f}"]
        told = f"Image {image}, decoded from its latents and from the changed ones; mean absolute difference "
        show(self.decoded, sheet({"decoded": top}, captions, tile=TILE), f"{told}{apart.mean():.3f}.")
        rows, channels = {}, [f"channel {c}" for c in range(min(4, len(start)))]
        for name, z in self.latents.items():
            rows[name] = [self._seen(z[i], name, PCA, units) for i in (image, other)]
            rows[name] += [self._seen(z[image], name, channel, units) for channel in channels]
        captions = [f"PCA,\nimage {image}", f"PCA,\nimage {other}", *(f"\n{each}" for each in channels)]
        told = "Latents of both VAEs: principal components of this image and of the other one, and channels."
        show(self.compared, sheet(rows, captions, tile=TILE), told)

    def _in(self, units: str, name: str, z: Tensor) -> Tensor:
        """Latents (..., C, h, w) of a VAE as they are, or normalised."""
        mean, std = self.stats[name]
        return z if units == RAW else (z - mean) / std

    def _seen(self, z: Tensor, name: str, view: str, units: str) -> np.ndarray:
        """Latents (C, h, w) of a VAE as colours (h, w, 3)."""
        z = self._in(units, name, z)
        if view == PCA:
            return pixels(self.palettes[units](z[None])[0].float())
        channel = int(view.split()[1])
        far = float(self.ranges[units][channel])
        return heat(z[channel], -far, far, "RdBu_r")

    def _reset(self) -> None:
        self.of = None
        self.explorer.request()

    def _stroked(self, change: dict) -> None:
        """A patch around each cell that the stroke reached since the last message."""
        new, old = change["new"], change["old"]
        cells = new[len(old) :] if old and new[0] == old[0] else new[1:]
        if self.edited is None:
            return
        for cell in cells:
            self._apply(cell)
        self.explorer.request()

    def _apply(self, cell: int) -> None:
        given = {name: control.value for name, control in self.brush.items()}
        here, channels = self._patch(cell), slice(None)
        if given["channel"] != "all channels":
            channels = slice(int(given["channel"].split()[1]), int(given["channel"].split()[1]) + 1)
        values, z = self.explorer.values, self.edited
        every = self.latents[values["vae"]]
        if given["action"] in (COPY, SWAP):
            if self.source is None:
                self.source = cell
                return
            there, self.source = self._patch(self.source), None
            high, wide = (min(a.stop - a.start, b.stop - b.start) for a, b in zip(here, there, strict=True))
            one, two = (
                (channels, slice(a.start, a.start + high), slice(b.start, b.start + wide))
                for a, b in (here, there)
            )
            kept = z[one].clone()
            z[one] = z[two].clone()
            if given["action"] == SWAP:
                z[two] = kept
        elif given["action"] == PAINT:
            mean, std = (stat[channels] for stat in self.stats[values["vae"]])
            z[(channels, *here)] = mean + given["value"] * std
        else:
            z[(channels, *here)] = 0 if given["action"] == ZERO else every[values["other"]][(channels, *here)]

    def _patch(self, cell: int) -> tuple[slice, slice]:
        size, columns = self.brush["size"].value, self.board.columns
        row, column = divmod(cell, columns)
        row, column = (
            max(0, min(at, most - size)) for at, most in ((row, self.board.rows), (column, columns))
        )
        return slice(row, row + size), slice(column, column + size)


def _walk(material: Material, vaes: dict[str, AutoencoderKL], latents: dict[str, Tensor]) -> Explorer:
    """The second tab: pictures on the way from one image's latents to another's, for both VAEs."""
    where, last = picture(), len(material.images) - 1

    def draw(progress: Progress, start: int, end: int, share: float, way: str) -> None:
        kind, _, space = way.partition(" in ")
        shares = torch.cat([torch.linspace(0, 1, WALK), torch.tensor([share])])
        rows = {}
        for name, vae in vaes.items():
            z = latents[name]
            mean, std = _stats(z) if space == "normalised z" else (0.0, 1.0)
            a, b = (z[[start]] - mean) / std, (z[[end]] - mean) / std
            with torch.no_grad():
                rows[name] = list(vae.decode(between(a, b, shares.to(a), kind == "spherical") * std + mean))
        captions = [*(f"{s:.2f}" for s in shares[:-1]), f"share {share:.2f}"]
        show(
            where,
            sheet(rows, captions, tile=80),
            f"Decoded on the way from image {start} to image {end}, {way}.",
        )

    ways = [f"{kind} in {space}" for kind in ("straight", "spherical") for space in ("z", "normalised z")]
    controls = {
        "start": ipywidgets.IntSlider(0, min=0, max=last),
        "end": ipywidgets.IntSlider(min(1, last), min=0, max=last),
        "share": ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.02),
        "way": ipywidgets.Dropdown(options=ways),
    }
    return Explorer(draw, controls, [where])


def _stats(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C, 1, 1) of each channel of latents (B, C, h, w)."""
    return z.mean((0, 2, 3))[:, None, None], z.std((0, 2, 3))[:, None, None]


def between(a: Tensor, b: Tensor, shares: Tensor, spherical: bool) -> Tensor:
    """Points (S, C, h, w) on the way from a to b, each (1, C, h, w).

    Straight, or along the great circle of their directions with the length changing evenly (Shoemake 1985).
    """
    shares = shares[:, None, None, None]
    if not spherical:
        return a + shares * (b - a)
    lengths = a.norm(), b.norm()
    one, two = a / lengths[0], b / lengths[1]
    angle = torch.arccos((one * two).sum().clamp(-1, 1))
    if float(angle.sin()) < 1e-4:  # one direction, or opposite ones, between which no way is the shortest
        return a + shares * (b - a)
    way = (((1 - shares) * angle).sin() * one + (shares * angle).sin() * two) / angle.sin()
    return way * (lengths[0] + shares * (lengths[1] - lengths[0]))
