"""Latents to look at, to paint, and to walk between: what does each of them mean to the decoder?"""

import ipywidgets
import numpy as np
import torch
import traitlets
from torch import Tensor

from repae_lite.checkpoints.models import load_vae
from repae_lite.networks.vae import AutoencoderKL
from repae_lite.teaching.explorers.material import Material, Source, ready
from repae_lite.teaching.explorers.parts import (
    TILE,
    Board,
    Explorer,
    Progress,
    Tabs,
    enlarged,
    heat,
    pixels,
    png_of,
    sheet,
    show,
)
from repae_lite.teaching.figures import LatentPalette

PCA = "PCA to RGB"
RAW, NORMALISED = "as they are", "normalised, as SiT sees them"
PAINT, ZERO, OTHER = "paint", "zero", "take from the other image"
COPY, SWAP = "copy a patch", "swap two patches"
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
        before: a VAE, for instance before tuning; all are copied, in float32.
        after: another with latents of the same size.
        images: uint8 (B, 3, H, W); by default 40 of the embedded evaluation split.
        device: where the VAEs run; None for the best there is.

    Raises:
        ValueError: the latents differ in size; images as `Material.of` says.
        FileNotFoundError, ConnectionError: as `load_vae` says.
    """
    material = Material.of(images, device=device)
    vaes = {"before tuning": before, "after tuning": after}
    vaes = {name: ready(vae, load_vae, material.device) for name, vae in vaes.items()}
    latents = {name: material.latents(vae) for name, vae in vaes.items()}
    sizes = {name: tuple(z.shape[1:]) for name, z in latents.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the latents differ in size, {sizes}: choose two VAEs of one architecture")
    painting = _Painting(material, vaes, latents).explorer
    return Tabs([painting, _walk(material, vaes, latents)], titles=["look and paint", "walk"])


class _Painting:
    """The first tab: latents to edit; edits stay with their image and VAE until they are undone."""

    def __init__(self, material: Material, vaes: dict[str, AutoencoderKL], latents: dict[str, Tensor]):
        self.material, self.vaes, self.latents = material, vaes, latents
        self.stats = {name: _stats(z) for name, z in latents.items()}
        self.palettes, self.ranges = {}, {}  # one for both VAEs, so that a colour means one number
        for units in (RAW, NORMALISED):
            every = [self._in(units, name, z) for name, z in latents.items()]
            self.palettes[units] = LatentPalette(every)
            far = [z.abs().movedim(1, 0).flatten(1).quantile(0.99, dim=1) for z in every]
            self.ranges[units] = torch.stack(far).amax(0)
        _, channels, rows, columns = latents["before tuning"].shape
        self.board = Board(rows=rows, columns=columns, paint=True, side=288)
        self.decoded, self.compared = Board(), Board()
        self.edited: dict[tuple[int, str], Tensor] = {}  # by image and VAE
        self.source = None  # a patch that waits for its copy: (image, VAE), cell
        last = len(material.images) - 1
        every = [f"channel {c}" for c in range(channels)]
        self.brush = {
            "action": ipywidgets.Dropdown(options=[PAINT, ZERO, OTHER, COPY, SWAP], description="brush"),
            "value": ipywidgets.FloatSlider(2.0, min=-4, max=4, step=0.25, description="paint with (std)"),
            "channel": ipywidgets.Dropdown(options=["all channels", *every], description="change"),
            "size": ipywidgets.IntSlider(2, min=1, max=min(rows, columns) // 2, description="patch (cells)"),
        }
        for control in self.brush.values():
            control.style = {"description_width": "initial"}
        traitlets.dlink((self.brush["size"], "value"), (self.board, "brush"))
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
                ipywidgets.Box(list(self.brush.values()), layout={"flex_flow": "row wrap"}),
                ipywidgets.Box(
                    [self.board, ipywidgets.VBox([self.decoded, self.compared])],
                    layout={"flex_flow": "row wrap", "grid_gap": "12px"},
                ),
            ],
            buttons={"Undo all": self._reset},
        )
        self.board.on_msg(self.explorer.guarded(lambda _board, said, _buffers: self._stroked(said)))
        for control in (self.brush["action"], *(self.explorer.controls[name] for name in ("image", "vae"))):
            control.observe(lambda _: self._unpick(), names="value")

    def draw(self, progress: Progress, image: int, other: int, vae: str, view: str, units: str) -> None:
        start = self.latents[vae][image]
        edited = self.edited.get((image, vae), start)
        with torch.no_grad():
            plain, changed = self.vaes[vae].decode(torch.stack([start, edited]))
        then = " Now click where the patch goes." if self.source else ""
        with self.board.hold_sync():
            self.board.pictures = [png_of(enlarged(self._seen(edited, vae, view, units), self.board.side))]
            self.board.of = [image, vae]
            self.board.description = f"Latents of image {image} {vae}, {view}, {units}.{then}"
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
        self.edited.clear()
        self._unpick()

    def _unpick(self) -> None:
        self.source = None
        self.explorer.request()

    def _stroked(self, said: dict) -> None:
        """Edits what was seen, at each cell; patches to copy or swap are picked by the first of a stroke."""
        of, action = tuple(said["of"]), self.brush["action"].value
        z = self.edited.setdefault(of, self.latents[of[1]][of[0]].clone())
        for cell, begins in said["cells"]:
            if action not in (COPY, SWAP):
                self._paint(z, of[1], self._patch(cell))
            elif begins:
                self._move(z, of, cell)
        self.explorer.request()

    def _paint(self, z: Tensor, vae: str, here: tuple[slice, ...]) -> None:
        if self.brush["action"].value == PAINT:
            mean, std = (stat[here[0]] for stat in self.stats[vae])
            z[here] = mean + self.brush["value"].value * std
        else:
            other = self.latents[vae][self.explorer.values["other"]]
            z[here] = other[here] if self.brush["action"].value == OTHER else 0

    def _move(self, z: Tensor, of: tuple[int, str], cell: int) -> None:
        if self.source is None or self.source[0] != of:
            self.source = of, cell
            return
        here, there = self._patch(cell), self._patch(self.source[1])
        swap = self.brush["action"].value == SWAP
        apart = [abs(a.start - b.start) for a, b in zip(here[1:], there[1:], strict=True)]
        if swap and max(apart) < self.brush["size"].value:
            raise ValueError("the two patches overlap: click farther away from the first")
        kept, self.source = z[here].clone(), None
        z[here] = z[there].clone()
        if swap:
            z[there] = kept

    def _patch(self, cell: int) -> tuple[slice, slice, slice]:
        """Channels, rows and columns under the brush around a cell, shifted to stay in the grid."""
        size, channel = self.brush["size"].value, self.brush["channel"].index - 1
        grid = zip(divmod(cell, self.board.columns), (self.board.rows, self.board.columns), strict=True)
        starts = (max(0, min(at - (size - 1) // 2, most - size)) for at, most in grid)
        channels = slice(None) if channel < 0 else slice(channel, channel + 1)
        return channels, *(slice(start, start + size) for start in starts)


def _walk(material: Material, vaes: dict[str, AutoencoderKL], latents: dict[str, Tensor]) -> Explorer:
    """The second tab: pictures on the way from one image's latents to another's, for both VAEs."""
    where, last = Board(), len(material.images) - 1

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
