"""Every plot of the project: one style, one colour per method; functions return a Figure and show nothing.

Pictures of the method and of every notebook's results; taught in `notebooks/00_map.ipynb`.
"""

import functools
import html
import io
import itertools
import math
import re
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import matplotlib.figure
import numpy as np
import torch
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Polygon, Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import AutoLocator, FixedLocator, LogLocator, NullLocator
from PIL import Image, ImageChops
from scipy.special import stdtrit

from repae_lite.utils.tables import table_lines

# Okabe-Ito colours, which people with any common kind of colour blindness can tell apart.
METHOD_COLORS = {
    "sit": "#7A7A7A",
    "repa": "#0072B2",
    "vae-only": "#E69F00",
    "repa-e": "#009E73",
    "naive": "#D55E00",
}
METHOD_LABELS = {
    "sit": "plain SiT",
    "repa": "REPA, frozen VAE",
    "vae-only": "VAE-only control",
    "repa-e": "REPA-E",
    "naive": "naive end-to-end",
}
_OTHER_COLORS = ("#CC79A7", "#56B4E9", "#000000", "#8C6D1F", "#5B3A8E")
GREY = "#666666"
_STYLE = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "image.interpolation": "nearest",
}
Series = Mapping[str, tuple[Sequence[float], Sequence[float] | Sequence[Sequence[float]]]]


class Figure(matplotlib.figure.Figure):
    """A matplotlib Figure outside pyplot, which a notebook shows once, as the last value of a cell."""

    def _repr_png_(self) -> bytes:
        drawn, buffer = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=self.dpi, bbox_inches="tight", pad_inches=0.08)
        picture = Image.open(drawn).convert("RGB")
        if picture.getcolors(8192):  # lines and text: a palette takes a third of the space and looks the same
            palette = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            off = ImageChops.difference(picture, palette.convert("RGB")).getextrema()
            picture = palette if max(most for _, most in off) <= 16 else picture
        picture.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


class Html(str):
    """A string of HTML that a notebook renders, and the plain text that stands for it elsewhere."""

    def __new__(cls, markup: str, text: str = ""):
        new = super().__new__(cls, markup)
        new.text = text or markup
        return new

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return self.text


_ONE_AT_A_TIME = threading.RLock()  # matplotlib's settings are the whole process's


@contextmanager
def style() -> Iterator[None]:
    """The project's matplotlib settings, for a plot made elsewhere: `with figures.style(): ...`."""
    with _ONE_AT_A_TIME, matplotlib.rc_context(_STYLE):
        yield


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorates a function so that it draws with the project's matplotlib settings."""

    @functools.wraps(plot)
    def wrapped(*args, **kwargs):
        with style():
            return plot(*args, **kwargs)

    return wrapped


def _colors_and_labels(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, label) by name: a method's own; for other names the next free colour and the name itself."""
    others = [name for name in names if name not in METHOD_COLORS]
    if len(others) > len(_OTHER_COLORS):
        raise ValueError(
            f"{len(others)} series need a colour, only {len(_OTHER_COLORS)} are free: split the plot."
        )
    spare = dict(zip(others, _OTHER_COLORS, strict=False))
    return {name: (METHOD_COLORS.get(name) or spare[name], METHOD_LABELS.get(name, name)) for name in names}


def _wrap_title(text: str, inches: float, size: float) -> str:
    """A bold title in lines that are no wider than `inches`; formulas between dollar signs stay whole."""
    points = 70 * inches  # of 72: letters fitted to pixels are a little wider
    font, lines = FontProperties(weight="bold", size=size), []
    for word in re.findall(r"(?:\$[^$]*\$|[^\s$])+", text):
        longer = f"{lines[-1]} {word}" if lines else word
        fits = text_to_path.get_text_width_height_descent(longer, font, ismath="$" in longer)[0] <= points
        lines = [*lines[:-1], longer] if fits or not lines else [*lines, word]
    return "\n".join(lines)


def _wrap_titles(fig: Figure) -> None:
    """Breaks the titles that run over the edge of their axes or of the figure, which grows by as much."""
    fig.draw_without_rendering()  # gives the axes their widths
    size, more = matplotlib.rcParams["axes.titlesize"], [0]
    for ax in fig.axes:
        inches = ax.get_window_extent().width / fig.dpi
        ax.set_title(_wrap_title(ax.get_title(loc="left"), inches, size))
        more.append(ax.get_title(loc="left").count("\n"))
    above = _wrap_title(fig.get_suptitle(), 0.98 * fig.get_figwidth(), 13)
    if above:
        fig.suptitle(above, x=0.01, ha="left", fontsize=13, fontweight="bold")
    fig.set_figheight(fig.get_figheight() + 0.2 * (max(more) + above.count("\n")))


# ---- images --------------------------------------------------------------------------------------


@styled
def image_grid(
    images, *, columns: int = 8, captions: Sequence[str] = (), title: str = "", scale: int | None = None
) -> Figure:
    """Images in reading order, enlarged by whole pixels.

    Args:
        images: (B, 3 or 1, H, W), uint8 or float in [-1, 1] (clipped, because decoders overshoot).
        columns: Images per row.
        captions: One short text per image, drawn above it, or none at all.
        title: The finding.
        scale: Screen pixels per image pixel; None for the largest, up to 6, that fits into 960 pixels.
    """
    tiles = _tiles(images, "images")
    if captions and len(captions) != len(tiles):
        raise ValueError(f"image_grid got {len(tiles)} images, {len(captions)} captions: one each, or none.")
    starts = range(0, len(tiles), columns)
    rows = [tiles[i : i + columns] for i in starts]
    texts = [captions[i : i + columns] for i in starts]
    return _draw_tiles(rows, [""] * len(rows), texts, title, scale)


@styled
def image_rows(images: Mapping[str, torch.Tensor], *, title: str = "", scale: int | None = None) -> Figure:
    """One labelled row per entry ("input", a method's key, ...); arguments as in `image_grid`."""
    rows = [_tiles(batch, name) for name, batch in images.items()]
    labels = [METHOD_LABELS.get(name, name) for name in images]
    return _draw_tiles(rows, labels, [()] * len(rows), title, scale)


def _tiles(images, name: str) -> np.ndarray:
    images = torch.as_tensor(images, device="cpu").detach()
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"{name}: pictures must be (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}.")
    if images.dtype != torch.uint8:
        images = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # (B, H, W, 3)


@styled
def difference_maps(
    images: Mapping[str, torch.Tensor], reference, *, title: str = "", scale: int | None = None
) -> Figure:
    """Where rows of images differ from a reference: its row, and below it |image − reference| in grey.

    The darkest grey stands for the same difference in all rows, which the caption names: the largest one,
    leaving out the top 0.5 % of the pixels.

    Args:
        images: {row: (B, 3 or 1, H, W)}, as in `image_grid`.
        reference: The images to compare with, of the same shape.
        title: The finding.
        scale: Screen pixels per image pixel, as in `image_grid`.
    """
    first = _tiles(reference, "reference")
    rows = {name: _tiles(batch, name) for name, batch in images.items()}
    if wrong := [name for name, row in rows.items() if row.shape != first.shape]:
        raise ValueError(f"difference_maps: {wrong[0]} is {rows[wrong[0]].shape}, not {first.shape}.")
    apart = {name: np.abs(row.astype(float) - first).mean(axis=-1) for name, row in rows.items()}
    most = max(1.0, float(np.quantile(np.stack(list(apart.values())), 0.995)))
    grey = {name: np.uint8(255 - 255 * (a / most).clip(0, 1)) for name, a in apart.items()}
    tiles = [first, *(np.repeat(a[..., None], 3, axis=-1) for a in grey.values())]
    labels = ["reference", *(METHOD_LABELS.get(name, name) for name in rows)]
    note = f"white: no difference; black: {most:.0f} of 255 grey levels or more, in every row"
    return _draw_tiles(tiles, labels, [()] * len(tiles), title, scale, note)


def _draw_tiles(rows, labels, captions, title, scale, note="") -> Figure:
    base = max(row.shape[1] for row in rows)
    columns = max(len(row) for row in rows)
    margin = 8 + 7 * max(len(label) for label in labels) if any(labels) else 0
    scale = scale or max(1, min(6, (960 - margin) // (base * columns + columns)))
    side, gap = base * scale, max(3, scale)
    text = 20 if any(captions) else 0
    width = margin + columns * (side + gap) - gap
    title = _wrap_title(title, width / 100, 12)
    top = 12 + 18 * len(title.splitlines()) if title else 0
    foot = top + len(rows) * (side + gap + text) - gap
    height = foot + (18 if note else 0)
    canvas = np.full((height, width, 3), 255, np.uint8)
    fig = Figure(figsize=(width / 100, height / 100))
    ax = fig.add_axes((0, 0, 1, 1))
    for r, row in enumerate(rows):
        y = top + r * (side + gap + text) + text
        nearest = np.arange(side) * row.shape[1] // side  # every tile to one size
        for c, tile in enumerate(row):
            x = margin + c * (side + gap)
            canvas[y : y + side, x : x + side] = tile[nearest][:, nearest]
            if captions[r]:
                ax.text(x + side / 2, y - 3, captions[r][c], ha="center", va="bottom", fontsize=9)
        ax.text(margin - 8, y + side / 2, labels[r], ha="right", va="center", fontsize=10)
    ax.imshow(canvas, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
    ax.text(0, 4, title, ha="left", va="top", fontsize=12, fontweight="bold")
    ax.text(margin, foot + 4, note, ha="left", va="top", fontsize=9, color=GREY)
    ax.set_axis_off()
    return fig


class LatentPalette:
    """Latents as colours: the first three principal components of the vectors at all positions.

    Args:
        latents: what the components and their range are taken from, each (B, C, h, w) with the same C.
    """

    def __init__(self, latents: Sequence[torch.Tensor]):
        flat = torch.cat([self._vectors(z).flatten(0, -2) for z in latents])  # (positions, C)
        self.mean = flat.mean(dim=0)
        centred = flat - self.mean
        basis = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :3]  # (C, <= 3)
        signs = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()  # no arbitrary ones
        self.basis = basis * signs
        colours = centred @ self.basis
        self.low, self.high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """Colours (B, 3, h, w); what lies in the range is in [-1, 1]."""
        share = ((self._vectors(z) - self.mean) @ self.basis - self.low) / (self.high - self.low).clamp(1e-12)
        return torch.nn.functional.pad(2 * share - 1, (0, 3 - share.shape[-1])).movedim(-1, 1)

    @staticmethod
    def _vectors(z: torch.Tensor) -> torch.Tensor:
        return z.detach().cpu().to(torch.float64).movedim(1, -1)


@styled
def latent_rgb(
    z_by_method: Mapping[str, torch.Tensor], images=None, *, joint=False, title: str = "", count: int = 8
) -> Figure:
    """Latents as colours: their first three principal components, one row per method, below the images.

    Args:
        z_by_method: Latents (B, C, h, w) of the same images.
        images: The images (B, 3, H, W), or None.
        joint: One PCA for all methods, so that rows can be compared (C must be equal); otherwise one each.
        title: The finding.
        count: Number of images shown.
    """
    groups = [list(z_by_method)] if joint else [[name] for name in z_by_method]
    rows = {} if images is None else {"input": images[:count]}
    for group in groups:
        widths = {z_by_method[name].shape[1] for name in group}
        if len(widths) > 1:
            raise ValueError(f"A joint PCA needs equal channels, got {sorted(widths)}: use joint=False.")
        palette = LatentPalette([z_by_method[name] for name in group])
        rows |= {name: palette(z_by_method[name][:count]) for name in group}
    return image_rows(rows, title=title)


# ---- numbers -------------------------------------------------------------------------------------


def curves(
    series: Series,
    *,
    title: str = "",
    xlabel: str = "step",
    ylabel: str = "",
    log: bool | str = False,
    smooth: int = 1,
    floors: Mapping[str, float] | None = None,
    direct: bool = False,
) -> Figure:
    """One quantity over steps.

    Args:
        series: {method: (steps (T,), values (T,) or (seeds, T))}; seeds become thin lines under their mean.
            A line that lies on an earlier one is dashed, so that both show.
        title: The finding.
        xlabel: Name and unit.
        ylabel: Name and unit.
        log: True makes the value axis logarithmic, "both" the other one too.
        smooth: Width of a centred moving average, in points; it is narrower at the ends.
        floors: {name: value} of dotted lines across the plot: what the values are compared with.
        direct: Names the lines at their right ends instead of in a legend.
    """
    options = {"xlabel": xlabel, "ylabels": [ylabel], "log": log, "smooth": smooth, "direct": direct}
    return curve_panels({title: series}, floors={title: floors or {}}, **options)


@styled
def curve_panels(
    panels: Mapping[str, Series],
    *,
    title: str = "",
    xlabel: str = "step",
    ylabels: Sequence[str] = (),
    log: bool | str | Sequence[bool | str] = False,
    smooth: int = 1,
    floors: Mapping[str, Mapping[str, float]] | None = None,
    direct: bool = False,
) -> Figure:
    """Several quantities side by side, {panel title: series}, with one legend.

    Arguments as in `curves`, with one `ylabels` and, unless all are alike, one `log` per panel, and `floors`
    by panel title.
    """
    fig, axes, looks = _panels(panels, xlabel, ylabels, log)
    for ax, (heading, series) in zip(axes, panels.items(), strict=True):
        means = {}
        for name, (steps, values) in series.items():
            steps, values = _floats(steps), np.atleast_2d(_floats(values))  # (seeds, T)
            if values.shape[1] != len(steps):
                raise ValueError(f"{name}: {len(steps)} steps, values {values.shape}, not (seeds, T).")
            color, mean = looks[name][0], values.mean(axis=0)
            if len(values) > 1:
                ax.plot(steps, _moving_average(values, smooth).T, color=color, lw=0.8, alpha=0.35)
            elif smooth > 1:
                ax.plot(steps, mean, color=color, lw=0.8, alpha=0.3)
            means[name] = steps, _moving_average(mean[None], smooth)[0]
        dashes = _dashes(means, ax.get_yscale() == "log")
        for name, (steps, mean) in means.items():
            ax.plot(steps, mean, color=looks[name][0], lw=2, ls=dashes[name], label=looks[name][1])
        _floors(ax, (floors or {}).get(heading, {}), means)
    _finish(fig, axes, looks, title, direct)
    return fig


@styled
def learning_curves(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    *,
    title: str = "",
    xlabel: str = "training steps",
    ylabels: Sequence[str] = (),
    log: bool | Sequence[bool] = False,
    floors: Mapping[str, Mapping[str, float]] | None = None,
    direct: bool = False,
) -> Figure:
    """Results of separate runs of several lengths: the mean over seeds and the band of its 95 % interval.

    Args:
        panels: {panel title: {arm: {steps: one value per seed}}}; a point with one seed has no band.
        title: The finding.
        xlabel: Name and unit; this axis is logarithmic.
        ylabels: Name and unit, one per panel.
        log: Makes the value axes logarithmic too, all or one by one.
        floors: As in `curve_panels`.
        direct: Names the lines at their right ends instead of in a legend.
    """
    fig, axes, looks = _panels(panels, xlabel, ylabels, log)
    for ax, (heading, arms) in zip(axes, panels.items(), strict=True):
        means = {}
        for arm, by_steps in arms.items():
            steps = sorted(by_steps)
            mean, half = np.array([_mean_and_half(by_steps[n], f"{arm}, {n} steps") for n in steps]).T
            ax.fill_between(steps, mean - half, mean + half, color=looks[arm][0], alpha=0.18, lw=0)
            means[arm] = _floats(steps), mean
        dashes = _dashes(means, ax.get_yscale() == "log")
        for arm, (steps, mean) in means.items():
            color, label = looks[arm]
            ax.plot(steps, mean, "o", color=color, ms=6, mec="white", ls=dashes[arm], lw=2, label=label)
        _floors(ax, (floors or {}).get(heading, {}), means)
        ticks = sorted({steps for by_steps in arms.values() for steps in by_steps})
        ax.set_xscale("log")
        ax.set_xticks(ticks, [f"{steps:,}" for steps in ticks])
        ax.minorticks_off()
    _finish(fig, axes, looks, title, direct)
    return fig


def _panels(panels: Mapping, xlabel: str, ylabels: Sequence[str], log) -> tuple[Figure, np.ndarray, dict]:
    """An empty figure, its axes, and each series' colour and label."""
    count = len(panels)
    logs = [log] * count if isinstance(log, bool | str) else list(log)
    if unknown := [log for log in logs if log not in (False, True, "both")]:
        raise ValueError(f'log={unknown[0]!r}: use False, True (the value axis) or "both".')
    looks = _colors_and_labels(list(dict.fromkeys(name for series in panels.values() for name in series)))
    fig = Figure(figsize=(6.6 if count == 1 else 9, 3.8 if count < 3 else 3.4), layout="constrained")
    axes = fig.subplots(1, count, squeeze=False)[0]
    for i, (ax, heading) in enumerate(zip(axes, panels, strict=True)):
        ax.set(title=heading, xlabel=xlabel, yscale="log" if logs[i] else "linear")
        ax.set(ylabel=ylabels[i] if ylabels else "", xscale="log" if logs[i] == "both" else "linear")
    return fig, axes, looks


def _dashes(means: Mapping[str, tuple[np.ndarray, np.ndarray]], log: bool) -> dict[str, object]:
    """Line styles by name: of lines that coincide, the later ones are dashed in turn, so that all show."""
    with np.errstate(all="ignore"):
        values = {name: (steps, np.log10(y) if log else y) for name, (steps, y) in means.items()}
    every = np.concatenate([y for _, y in values.values()])
    every = every[np.isfinite(every)]
    near = 0.015 * (np.ptp(every) if len(every) else 0.0)
    groups: list[list[str]] = []
    for name, (steps, y) in values.items():
        for group in groups:
            other_steps, other = values[group[0]]
            if np.array_equal(steps, other_steps) and np.mean(np.abs(y - other) <= near) >= 0.5:
                group.append(name)
                break
        else:
            groups.append([name])
    styles = {}
    for group in groups:
        for k, name in enumerate(group):
            gap = 3 * (len(group) - 1)
            styles[name] = (3 + gap - 3 * k, (3, gap)) if k else "-"
    return styles


def _floors(ax, floors: Mapping[str, float], means: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Dotted lines across the plot, each named at the end and on the side where fewer curves pass."""
    for value in floors.values():
        ax.axhline(value, color=GREY, lw=1.3, ls=":")
    low, high = ax.get_ylim()
    log = ax.get_yscale() == "log"
    for name, value in floors.items():
        crowd = {}
        for x, above in ((0.99, True), (0.99, False), (0.01, True), (0.01, False)):
            ends = [y[-1 - len(y) // 4 :] if x > 0.5 else y[: 1 + len(y) // 4] for _, y in means.values()]
            others = np.concatenate([*ends, [f for f in floors.values() if f != value]])
            with np.errstate(all="ignore"):
                scaled = (
                    np.log(others / value) / np.log(high / low) if log else (others - value) / (high - low)
                )
            over = (scaled if above else -scaled)[np.isfinite(scaled)]
            crowd[x, above] = int(((over >= -0.01) & (over < 0.1)).sum())
            edge = high if above else low
            room = np.log(edge / value) / np.log(high / low) if log else (edge - value) / (high - low)
            crowd[x, above] += 99 * (abs(room) < 0.09)  # the note would leave the axes
        x, above = min(crowd, key=crowd.get)
        _note(ax, name, x, value, above=above)


def _finish(fig: Figure, axes, looks: Mapping[str, tuple[str, str]], title: str, direct: bool) -> None:
    """The title and either a legend or names at the lines' right ends."""
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    for ax in axes:
        _plain_numbers(ax.yaxis)
        if ax.get_xscale() == "log" and not isinstance(ax.xaxis.get_major_locator(), FixedLocator):
            _plain_numbers(ax.xaxis)
    labels = [_name_lines(ax) for ax in axes] if direct else []
    if not direct:
        _legend(fig, looks)
    _wrap_titles(fig)
    if direct:
        fig.draw_without_rendering()
        for ax, notes in zip(axes, labels, strict=True):
            _spread_out(ax, notes)


def _plain_numbers(axis) -> None:
    """Ticks of a logarithmic axis over few decades: 2, 5, 10, 20 instead of powers of ten."""
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log" and high / low < 1000:
        axis.set_major_locator(AutoLocator() if high / low < 5 else LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_locator(NullLocator())


def _name_lines(ax) -> list:
    """One note per labelled line, in its colour, to the right of its last finite value."""
    notes = []
    for line in ax.lines:
        x, y = (_floats(line.get_xdata()), _floats(line.get_ydata()))
        if line.get_label().startswith("_") or not np.isfinite(y).any():
            continue
        last = np.flatnonzero(np.isfinite(y))[-1]
        look = {"color": line.get_color(), "va": "center", "fontsize": 10, "fontweight": "bold"}
        place = {"textcoords": "offset points", "annotation_clip": False}
        name = _wrapped(line.get_label(), 16)
        notes.append(ax.annotate(name, (x[last], y[last]), xytext=(7, 0), **place, **look))
    return notes


def _spread_out(ax, notes: list) -> None:
    """Moves notes at the right of an axes up and down until none hides another."""
    points = 72 / ax.figure.dpi
    ends = [points * ax.transData.transform(note.xy)[1] for note in notes]
    heights = [13.5 * (1 + note.get_text().count("\n")) for note in notes]
    order = sorted(range(len(notes)), key=ends.__getitem__)
    places = {i: ends[i] for i in order}
    for _ in range(100):
        for low, high in itertools.pairwise(order):
            short = (heights[low] + heights[high]) / 2 - (places[high] - places[low])
            if short > 0:
                places[low] -= short / 2
                places[high] += short / 2
    for i, note in enumerate(notes):
        note.set_position((7, places[i] - ends[i]))


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    kernel = np.ones(min(width, values.shape[1]))
    weight = np.convolve(np.ones(values.shape[1]), kernel, "same")
    return np.stack([np.convolve(row, kernel, "same") / weight for row in values])


def _legend(fig: Figure, looks: Mapping[str, tuple[str, str]]) -> None:
    """One legend below all panels, in the order of the data."""
    handles = [Line2D([], [], color=color, lw=2.5, label=label) for color, label in looks.values()]
    columns = 5 if fig.get_figwidth() > 8 else 3
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=1.4)


def _mean_and_half(values, name: str) -> tuple[float, float]:
    """The mean over seeds, and half the width of its 95 % interval (Student's t); 0 for one seed."""
    seeds = _floats(values)
    if seeds.ndim != 1 or not len(seeds) or not np.isfinite(seeds).all():
        raise ValueError(f"{name}: needs one finite value per seed, got {seeds.tolist()}.")
    if len(seeds) == 1:
        return float(seeds[0]), 0.0
    half = stdtrit(len(seeds) - 1, 0.975) * seeds.std(ddof=1) / math.sqrt(len(seeds))
    return float(seeds.mean()), float(half)


@styled
def dots_with_spread(
    values: Mapping[str, Sequence[float]],
    *,
    title: str = "",
    ylabel: str = "",
    lower_is_better: bool = True,
    band: tuple[float, float, str] | None = None,
    paired: bool = False,
) -> Figure:
    """Every seed as a dot, the mean as a bar, its 95 % confidence interval (Student's t) as a whisker.

    The axis starts at 0, unless all values lie close together far above it; then it is cut and says so.

    Args:
        values: {method: one value per seed}.
        title: The finding.
        ylabel: Name and unit.
        lower_is_better: Written on the axis, either way.
        band: (low, high, name) of a grey reference band.
        paired: Joins the dots of each seed by a thin grey line; every method has the same seeds in the same
            order.
    """
    if paired and len({len(seeds) for seeds in values.values()}) > 1:
        counts = {name: len(seeds) for name, seeds in values.items()}
        raise ValueError(f"paired=True needs the same seeds everywhere, got {counts}.")
    looks = _colors_and_labels(list(values))
    fig = Figure(figsize=(max(5.5, 1.5 + 1.35 * len(values)), 4), layout="constrained")
    ax = fig.subplots()
    extremes, places = list(band[:2]) if band else [], []
    for i, (name, given) in enumerate(values.items()):
        (mean, half), seeds, color = _mean_and_half(given, name), _floats(given), looks[name][0]
        if len(seeds) > 1:
            ax.errorbar(i + 0.22, mean, half, color=color, lw=1.6, capsize=4)
        xs = i + (np.linspace(-0.14, 0.14, len(seeds)) if len(seeds) > 1 else np.zeros(1))
        places.append(np.stack([xs, seeds]))
        ax.plot(xs, seeds, "o", color=color, ms=6.5, alpha=0.8, mec="white", mew=0.8, zorder=4)
        ax.plot([i - 0.24, i + 0.3], [mean, mean], color=color, lw=2.6, solid_capstyle="butt")
        box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none"}  # hides the line at zero
        look = {"color": color, "va": "center", "fontsize": 10, "fontweight": "bold", "bbox": box}
        ax.annotate(f"{mean:.3g}", (i + 0.33, mean), **look)
        extremes += [mean - half, mean + half, *seeds]
    if paired:
        xs, ys = np.stack(places).transpose(1, 0, 2)  # (groups, seeds) each: one line per seed
        ax.plot(xs, ys, color="#B5B5B5", lw=0.8, zorder=1.5)
    low, high = min(extremes), max(extremes)
    if band:
        ax.axhspan(band[0], band[1], color="#DDDDDD", zorder=0)
        _note(ax, band[2], 0.99, band[1], above=True)
    pad = 0.12 * (high - low or abs(high) or 1)
    if low >= 0 and low > 0.55 * high:
        ax.set_ylim(low - pad, high + pad)
        ax.spines["left"].set_bounds(low - pad * 0.6, high + pad)
        for y in (0.012, 0.032):
            ax.plot([-0.012, 0.012], [y, y + 0.018], "k", transform=ax.transAxes, lw=1, clip_on=False)
        ax.text(0.025, 0.012, "axis cut: does not start at 0", transform=ax.transAxes, fontsize=9, color=GREY)
    elif low >= 0 or high <= 0:
        ax.set_ylim(min(0, 1.08 * low), max(0, 1.08 * high))
    else:
        ax.axhline(0, color="black", lw=0.8)
    ax.set(title=title, xlim=(-0.5, len(values) - 0.2))
    ax.set_ylabel(f"{ylabel}\n({'lower' if lower_is_better else 'higher'} is better)")
    names = [f"{_wrapped(looks[name][1])}\nn = {len(seeds)}" for name, seeds in values.items()]
    ax.set_xticks(range(len(names)), names)
    ax.grid(axis="x", visible=False)
    ax.tick_params(axis="x", length=0)
    _wrap_titles(fig)
    return fig


def _wrapped(label: str, width: int = 14) -> str:
    """A label in lines of about `width` characters, broken after commas and between words."""
    return "\n".join(
        line
        for part in label.replace(", ", ",\n").splitlines()
        for line in textwrap.wrap(part, width, break_on_hyphens=False)
    )


def _note(ax, text: str, x: float, y: float, *, above: bool) -> None:
    """Small grey text at x (axes fraction), just above or below the value y."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    shift, side = (0, 3 if above else -12), "right" if x > 0.5 else "left"
    ax.annotate(text, (x, y), xytext=shift, ha=side, fontsize=9, color=GREY, **place)


@styled
def spectrum(z_by_method: Mapping[str, torch.Tensor], *, title: str = "") -> Figure:
    """Radial power spectrum of latents (B, C, h, w), each channel divided by its mean power without DC.

    This removes the scale, and white noise is flat at 1. The shaded part, above half the Nyquist frequency,
    is what `metrics.latent_structure` counts as `high_frequency_share`.
    """
    looks = _colors_and_labels(list(z_by_method))
    fig = Figure(figsize=(6.6, 3.9), layout="constrained")
    ax = fig.subplots()
    for name, z in z_by_method.items():
        power = torch.fft.fft2(z.detach().cpu().to(torch.float64)).abs().square().mean(dim=0)  # (C, h, w)
        f_y, f_x = (torch.fft.fftfreq(size, dtype=torch.float64, device="cpu") for size in z.shape[-2:])
        radius = 2 * torch.hypot(f_y[:, None], f_x[None, :])  # 1 at Nyquist
        power = (power / power[:, radius > 0].mean(dim=1)[:, None, None]).mean(dim=0)
        rings = (radius * min(z.shape[-2:]) / 2).round()
        inside = [rings == ring for ring in range(1, int(rings.max()) + 1) if (rings == ring).any()]
        xs, ys = [radius[r].mean() for r in inside], [power[r].mean() for r in inside]
        ax.plot(xs, ys, "o-", color=looks[name][0], lw=2, ms=5, mec="white")
    ax.axhline(1, color=GREY, lw=1, ls="--")
    _note(ax, "white noise", 0.01, 1, above=False)
    ax.axvspan(0.5, math.sqrt(2), color="#F0F0F0", zorder=0)
    corner = {"transform": ax.transAxes, "ha": "right", "va": "top"}
    ax.text(0.99, 0.97, "high frequencies", color=GREY, fontsize=9, **corner)
    labels = {"xlabel": "radial frequency (1 = Nyquist)", "ylabel": "relative power"}
    ax.set(title=title, yscale="log", xlim=(0, 1.42), **labels)
    _legend(fig, looks)
    _wrap_titles(fig)
    return fig


# ---- tables --------------------------------------------------------------------------------------

_MARKS = {
    "gradient": ("#009E73", "gradient"),
    "zero": ("#767676", "exactly zero"),
    "statistics": ("#E69F00", "running statistics change, no gradient"),
}


@styled
def routing_table(
    rows: Sequence[str], columns: Sequence[str], entries: Sequence[Sequence[str]], *, title: str = ""
) -> Figure:
    """Which loss reaches which parameters, as marks.

    Args:
        rows: Losses.
        columns: Parameter groups.
        entries: entries[row][column] is "gradient", "zero", "statistics", or "" for an empty cell.
        title: The finding.
    """
    if len(entries) != len(rows) or any(len(row) != len(columns) for row in entries):
        raise ValueError(f"routing_table: entries must be {len(rows)} rows of {len(columns)}, one per name.")
    if unknown := {entry for row in entries for entry in row} - {*_MARKS, ""}:
        raise ValueError(f"routing_table: unknown entries {sorted(unknown)}: use {list(_MARKS)} or ''.")
    left = 0.25 + 0.085 * max(map(len, rows))
    cell = min(1.35, (9.2 - left) / len(columns))
    width = left + cell * len(columns)
    title = _wrap_title(title, width - 0.2, 12)
    more = 0.2 * title.count("\n")  # room for the title's other lines
    height = 0.5 * len(rows) + 1.6 + more
    fig = Figure(figsize=(width, height))
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    ax.text(0.1, 0.15, title, fontsize=12, fontweight="bold", va="top")
    for c, name in enumerate(columns):
        head = name if "\n" in name else name.replace(" ", "\n", 1)
        ax.text(
            left + cell * (c + 0.5), 0.78 + more, head, ha="center", va="center", weight="bold", fontsize=8.5
        )
    for r, (name, row) in enumerate(zip(rows, entries, strict=True)):
        y = 1.3 + more + 0.5 * r
        ax.add_patch(Rectangle((0, y - 0.25), width, 0.5, color="white" if r % 2 else "#F4F4F4", zorder=0))
        ax.text(left - 0.12, y, name, ha="right", va="center")
        for c, entry in enumerate(row):
            _mark(ax, left + cell * (c + 0.5), y, entry)
    y, x = height - 0.22, 0.25
    for entry, (_, text) in _MARKS.items():
        if any(entry in row for row in entries):
            _mark(ax, x, y, entry)
            ax.text(x + 0.2, y, text, va="center", fontsize=9, color=GREY)
            x += 0.55 + 0.075 * len(text)
    return fig


def _mark(ax, x: float, y: float, entry: str) -> None:
    color = _MARKS.get(entry, ("", ""))[0]
    if entry == "gradient":
        ax.add_patch(Circle((x, y), 0.12, color=color))
    elif entry == "zero":
        ax.add_patch(Circle((x, y), 0.12, fc="white", ec=color, lw=1.6))
        ax.text(x, y, "0", ha="center", va="center_baseline", fontsize=9, fontweight="bold", color=color)
    elif entry == "statistics":
        ax.add_patch(Polygon([(x - 0.15, y), (x, y - 0.15), (x + 0.15, y), (x, y + 0.15)], color=color))


def scoreboard(rows: Mapping[str, Mapping[str, object]], columns: Sequence[str] | Mapping[str, str]) -> Html:
    """A small table, as HTML and as text; several seeds become "mean ± standard deviation (n)", one "x (1)".

    Args:
        rows: {method or other name: {column: a number, one number per seed, or text}}; missing: a dash.
        columns: Column names, or {name: number format such as ".2f"}; the default format is ".3g".
    """
    formats = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns, ".3g")
    cells = [["", *formats]]
    for name, row in rows.items():
        if unknown := set(row) - set(formats):
            raise ValueError(f"scoreboard: {name} has {sorted(unknown)}, the columns are {list(formats)}.")
        label = METHOD_LABELS.get(name, name)
        cells.append([label, *(_cell(row.get(column, "–"), form) for column, form in formats.items())])
    looks = [
        f"text-align:{side};padding:4px 12px;border-bottom:1px solid #8884" for side in ("left", "right")
    ]
    lines = []
    for name, line in zip(["", *rows], cells, strict=True):
        tag = "td" if lines else "th"
        swatch = f'<span style="color:{METHOD_COLORS[name]}">&#9632;</span> ' if name in METHOD_COLORS else ""
        texts = [swatch + html.escape(line[0]), *map(html.escape, line[1:])]
        lines.append("".join(f'<{tag} style="{looks[c > 0]}">{text}</{tag}>' for c, text in enumerate(texts)))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    head, *texts = table_lines(cells)
    text = "\n".join([head, "-" * len(head), *texts])
    return Html(f'<table style="border-collapse:collapse">{body}</table>', text)


def _floats(values) -> np.ndarray:
    """Numbers, sequences of them or tensors on any device, as an array."""
    if isinstance(values, list | tuple):
        return np.asarray([_floats(value) for value in values], float)
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, float)


def _cell(value: object, form: str) -> str:
    if isinstance(value, str):
        return value
    seeds = _floats(value)
    if seeds.ndim == 0:
        return format(float(seeds), form)
    spread = f" ± {format(seeds.std(ddof=1), form)}" if len(seeds) > 1 else ""
    return f"{format(seeds.mean(), form)}{spread} ({len(seeds)})"
