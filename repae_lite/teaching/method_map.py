"""The picture of REPA-E: what flows where, which gradient reaches what, and where it is stopped.

Drawn after REPA-E's figure 1 and section 3. Every notebook opens with it, its own part highlighted.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.patches import Circle, PathPatch, Polygon, Rectangle
from matplotlib.path import Path

from repae_lite.teaching.figures import GREY, METHOD_COLORS, Figure, styled

LIT = {  # the parts that each chapter highlights; everything else turns grey
    "vae": "x enc z dec xhat rec disc g_rec",
    "diffusion": "z bn noise sit1 sit2 v den g_den",
    "repa": "x teacher enc z bn noise sit1 tap align g_align sit2 v den g_den",
    "stopgrad": "x enc z bn noise sit1 sit2 v den g_den stop dec xhat rec g_rec",
    "end-to-end": "x teacher enc z bn noise sit1 tap align g_align g_align_vae sit2 v den g_den stop "
    "dec xhat rec disc g_rec",
    "drop-in": "x teacher enc z bn noise sit1 tap align g_align sit2 v den g_den dec xhat",
}
TITLES = {
    None: "REPA-E: three losses, three gradient paths",
    "vae": "The VAE: images to latents and back",
    "diffusion": "Latent diffusion: the velocity of a noisy latent",
    "repa": "REPA: a frozen encoder guides SiT's first blocks; the VAE is frozen too",
    "stopgrad": "The stop-gradient: the denoising loss must not shape z",
    "end-to-end": "End to end: the alignment loss reaches the VAE through SiT",
    "drop-in": "Drop-in: the tuned VAE, now frozen, serves a fresh SiT",
}


@styled
def method_map(highlight: str | None = None) -> Figure:
    """The picture of the method: values flow along thin dark arrows, gradients along wide coloured ones.

    Args:
        highlight: "vae", "diffusion", "repa", "stopgrad", "end-to-end" or "drop-in" turns all else grey.

    Raises:
        ValueError: There is no such part.
    """
    if highlight not in TITLES:
        raise ValueError(f"method_map has no part {highlight!r}: use one of {list(LIT)} or None.")
    m = _Map(LIT[highlight].split() if highlight else None)
    m.frozen = {"teacher"} | ({"enc", "dec"} if highlight in ("diffusion", "repa", "drop-in") else set())
    vae, sit, plain, loss = "#FBE7BF", "#D6E6F5", "#EDEDED", "white"
    green, blue, orange, red = (*(METHOD_COLORS[name] for name in ("repa-e", "repa", "vae-only")), "#D00000")
    top, mid, low = 42.5, 26, 9
    m.text("title", 1.5, 50, TITLES[highlight], size=13, weight="bold", ha="left")
    m.text("title", 88.5, 50, "dashed: frozen", size=9, ha="right", color=GREY)

    # Gradients run back beside the values, from box to box: over the arrow or under it, left or right of it.
    over, under = mid + 1.4, mid - 1.4
    m.lane("g_align", green, (58.1, 40), (58.1, 36.9))
    m.lane("g_align", green, (58.1, 33.5), (58.1, over), (56, over))
    m.lane("g_align_vae", green, (47, over), (39, over))
    m.lane("g_align_vae", green, (32, over), (25.3, over))
    m.lane("g_align_vae", green, (21.8, over), (18.5, over))
    m.text("g_align", 54.3, 37.3, "alignment gradient → SiT's first blocks", color="#00694D", ha="right")
    m.text("g_align_vae", 54.3, 35, "and back through them → VAE encoder", color="#00694D", ha="right")
    m.lane("g_den", blue, (79, under), (72, under))
    m.lane("g_den", blue, (63, under), (56, under))
    m.lane("g_den", blue, (47, under), (39, under))
    m.lane("stop", blue, (32, under), (29.4, under), head=False)
    m.text("g_den", 54.5, 19.6, "denoising gradient → SiT only", color="#00507D", ha="left")
    m.lane("stop", red, (29, 22.6), (29, 25.7), head=False, width=6)
    m.text("stop", 26.4, 21, "stop-gradient", color=red, weight="bold", ha="left")
    m.lane("g_rec", orange, (54, low - 1.4), (51, low - 1.4))
    m.lane("g_rec", orange, (45, low - 1.4), (42, low - 1.4))
    m.lane("g_rec", orange, (34, low - 1.4), (22.1, low - 1.4), (22.1, 24.3))
    m.lane("g_rec", orange, (21.8, under), (18.5, under))
    m.text("g_rec", 21, 10, "reconstruction\ngradient\n→ VAE only", color="#9A6A00", ha="right")

    # Values: image -> latent -> noisy latent -> velocity.
    m.picture("x", 4.5, mid, "image x")
    m.arrow("enc", (7.5, mid), (10.5, mid))
    m.shape("enc", 14.5, mid, 8, (10, 6), "VAE\nencoder", vae)
    m.arrow("z", (18.5, mid), (21.3, mid))
    m.disc("z", 23.5, mid, 2.2, "$z$", vae)
    m.arrow("bn", (25.7, mid), (32, mid))
    m.shape("bn", 35.5, mid, 7, (6, 6), "Batch-\nNorm", sit)
    m.arrow("noise", (39, mid), (41.5, mid))
    m.disc("noise", 43, mid, 1.5, "+", loss)
    m.text("noise", 43, 30.6, "$t,\\ \\epsilon$", size=12)
    m.arrow("noise", (43, 29.6), (43, 27.5))
    m.arrow("sit1", (44.5, mid), (47, mid))
    m.shape("sit1", 51.5, mid, 9, (8, 8), "SiT\nfirst blocks", sit)
    m.arrow("sit2", (56, mid), (63, mid))
    m.shape("sit2", 67.5, mid, 9, (8, 8), "SiT\nlast blocks", sit)
    m.arrow("v", (72, mid), (79, mid))
    m.text("v", 75.3, mid + 1.8, r"$\hat v$", size=13)
    m.shape("den", 84, mid, 10, (6, 6), "denoising\nloss", loss, edge=blue)

    # The frozen encoder's tokens against SiT's features at the tap.
    m.arrow("teacher", (4.5, 29), (4.5, top), (8, top))
    m.shape("teacher", 16, top, 16, (5.5, 5.5), "frozen vision\nencoder", plain)
    m.arrow("teacher", (24, top), (52.5, top))
    m.text("teacher", 38, top + 1.5, "target tokens")
    m.disc("tap", 59.5, mid, 0.6, "", "#444444")
    m.text("tap", 61.6, mid + 1.5, "tap")
    m.arrow("tap", (59.5, mid), (59.5, 33.5))
    m.shape("tap", 59.5, 35.2, 8, (3.4, 3.4), "projector", sit)
    m.arrow("tap", (59.5, 36.9), (59.5, 40))
    m.shape("align", 59.5, top, 14, (5, 5), "alignment loss", loss, edge=green)

    # Reconstruction.
    m.arrow("dec", (23.5, mid - 2.2), (23.5, low), (34, low))
    m.shape("dec", 38, low, 8, (6, 10), "VAE\ndecoder", vae)
    m.arrow("xhat", (42, low), (45, low))
    m.picture("xhat", 48, low, r"$\hat x$")
    m.arrow("rec", (51, low), (54, low))
    m.shape("rec", 63.5, low, 19, (6, 6), "reconstruction losses\nL1 + LPIPS + KL + GAN", loss, edge=orange)
    m.arrow("disc", (76.5, low), (73, low))
    m.shape("disc", 82.5, low, 12, (4, 4), "discriminator", plain)
    return m.fig


class _Map:
    """A canvas of 90 x 50 units, ten to the inch; marks of parts that are not lit are grey."""

    def __init__(self, lit: Sequence[str] | None) -> None:
        self.lit, self.frozen = lit, set()
        self.fig = Figure(figsize=(9, 5))
        self.ax = self.fig.add_axes((0, 0, 1, 1), xlim=(0, 90), ylim=(2, 52))
        self.ax.set_axis_off()

    def paint(self, part: str, color: str, grey: str) -> str:
        return color if self.lit is None or part in self.lit or part == "title" else grey

    def text(self, part, x, y, text, *, size=10, color="#222222", **options) -> None:
        options = {"ha": "center", "va": "center", "zorder": 6, "linespacing": 1.2} | options
        self.ax.text(x, y, text, fontsize=size, color=self.paint(part, color, "#C8C8C8"), **options)

    def shape(self, part, x, y, width, heights, text, fill, *, edge="#444444") -> None:
        """A box; with different heights (left, right), the funnel of an encoder or decoder."""
        (left, right), half = (h / 2 for h in heights), width / 2
        corners = [(x - half, y - left), (x + half, y - right), (x + half, y + right), (x - half, y + left)]
        dashes = (0, (4, 2)) if part in self.frozen else "-"
        fill, edge = self.paint(part, fill, "#FCFCFC"), self.paint(part, edge, "#DDDDDD")
        self.ax.add_patch(Polygon(corners, fc=fill, ec=edge, lw=1.6, ls=dashes, joinstyle="round", zorder=4))
        self.text(part, x, y, text)

    def disc(self, part, x, y, radius, text, fill) -> None:
        fill, edge = self.paint(part, fill, "#FCFCFC"), self.paint(part, "#444444", "#DDDDDD")
        self.ax.add_patch(Circle((x, y), radius, fc=fill, ec=edge, lw=1.6, zorder=4))
        self.text(part, x, y, text, size=14)

    def picture(self, part, x, y, text) -> None:
        """A small house under a sky: the image, or its reconstruction."""
        sky, grass = [(-3, -3), (-3, 3), (3, 3), (3, -3)], [(-3, -3), (-3, -1.6), (3, -1.6), (3, -3)]
        wall, roof = [(-1.6, -2.2), (-1.6, 0.4), (1.6, 0.4), (1.6, -2.2)], [(-2.3, 0.3), (0, 2.3), (2.3, 0.3)]
        colors = ("#C5E1F3", "#93BF90", "#EBCB94", "#B5533C"), ("#F6F6F6", "#EDEDED", "#E9E9E9", "#DFDFDF")
        for corners, color, grey in zip((sky, grass, wall, roof), *colors, strict=True):
            outline = [(x + dx, y + dy) for dx, dy in corners]
            self.ax.add_patch(Polygon(outline, fc=self.paint(part, color, grey), zorder=4))
        frame = self.paint(part, "#444444", "#DDDDDD")
        self.ax.add_patch(Rectangle((x - 3, y - 3), 6, 6, fc="none", ec=frame, lw=1.6, zorder=5))
        self.text(part, x, y - 4.2, text)

    def arrow(self, part, *points) -> None:
        self._path(points, self.paint(part, "#444444", "#DDDDDD"), 1.4, zorder=3, head=(2.4, 4.8))

    def lane(self, part, color, *points, head=True, width=3.6) -> None:
        self._path(points, self.paint(part, color, "#EEEEEE"), width, zorder=2, head=(5, 7) if head else None)

    def _path(self, points, color, width, *, zorder, head) -> None:
        """A polyline with rounded corners and, unless None, a head (half width and length in points)."""
        points = [np.asarray(point, float) for point in points]
        vertices, codes = [points[0]], [Path.MOVETO]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            legs = (before - corner, after - corner)
            inward, outward = (min(0.5, 1.2 / np.hypot(*leg)) * leg for leg in legs)
            vertices += [corner + inward, corner, corner + outward]
            codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
        end, along = points[-1], (points[-1] - points[-2]) / np.hypot(*(points[-1] - points[-2]))
        if head:
            half, back = head[0] / 7.2, along * head[1] / 7.2  # points to units
            across = half * np.array([-along[1], along[0]])
            tip = [end, end - back + across, end - back - across]
            self.ax.add_patch(Polygon(tip, fc=color, ec="none", zorder=zorder))
            end = end - 0.8 * back
        line = Path([*vertices, end], [*codes, Path.LINETO])
        self.ax.add_patch(PathPatch(line, fc="none", ec=color, lw=width, capstyle="butt", zorder=zorder))
