"""What all explorers are made of: a thread for the newest request, controls with pictures, and drawing."""

import base64
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import anywidget
import ipywidgets
import matplotlib
import numpy as np
import torch
import traitlets
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from repae_lite.teaching.figures import Figure
from repae_lite.utils.pixels import to_uint8

Progress = Callable[[int, int], None]  # done, of how many; raises Cancelled
TILE, MOST, WIDE, GAP = 72, 256, 1600, 4  # pixels of a picture in a sheet, of a sheet, and between two
FONT = ImageFont.load_default(13)


class Cancelled(Exception):
    """Somebody pressed Cancel, or a newer request is waiting."""


class Latest:
    """Runs `work` in a thread, for the newest request only: what came in between is dropped.

    Args:
        work: gets `progress` and the values of the request. Where it calls progress(done, total), it ends if
            a newer request waits.
        tell: gets a line of text for the reader, "" for none.
    """

    def __init__(self, work: Callable[..., None], tell: Callable[[str], None]):
        self._work, self._tell = work, tell
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._values, self._thread = None, None

    def request(self, values: dict) -> None:
        """Computes with these values, as soon as what is being computed lets it."""
        with self._lock:
            self._values = values
            self._stop.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def cancel(self) -> None:
        """Ends what is being computed, at its next call of `progress`."""
        with self._lock:
            self._values = None
            self._stop.set()
            if self._thread is not None:
                self._tell("cancelled")

    def wait(self) -> None:
        """Returns when nothing is being computed."""
        while (thread := self._thread) is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                values, self._values = self._values, None
                if values is None:
                    self._thread = None
                    return
                self._stop.clear()
            try:
                self._work(self._progress, **values)
                self._tell("")
            except Cancelled:
                self._tell("" if self._values else "cancelled")
            except BaseException as error:  # a thread has no cell to fail in
                self._tell(sentence(error))

    def _progress(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise Cancelled
        self._tell(f"{done} of {total}")


def sentence(error: BaseException) -> str:
    """What an error says, for the line below the controls."""
    return f"{type(error).__name__}: {error}"


class Board(anywidget.AnyWidget):
    """A picture, and where it has rows and columns, cells to be picked or painted; see board.js.

    Attributes:
        pictures: PNG files, of which `shown` is seen.
        names: what a menu calls them.
        rows: of cells; 0 for a picture without any.
        columns: of cells.
        description: text below the picture, read out to those who do not see it.
        alt: what is read out to them instead.
        cell: the picked one, counted row by row; -1 for none.
        paint: whether cells are painted instead of picked, by messages {"of": …, "cells": [[cell, whether a
            stroke begins there], …]}: of two messages none replaces the other, as values of a trait would.
        of: what the picture shows, sent back with what is painted on it.
        brush: cells along each side of the marker.
        maps: names of the similarity maps beside the picture.
        similarities: float16 (pictures, maps, cells, cells), as bytes.
        side: width in pixels of a picture with cells.
    """

    _esm = Path(__file__).with_name("board.js")
    pictures = traitlets.List(traitlets.Bytes()).tag(sync=True)
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    shown = traitlets.Int(0).tag(sync=True)
    rows = traitlets.Int(0).tag(sync=True)
    columns = traitlets.Int(0).tag(sync=True)
    description = traitlets.Unicode().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
    cell = traitlets.Int(-1).tag(sync=True)
    paint = traitlets.Bool(False).tag(sync=True)
    of = traitlets.List().tag(sync=True)
    brush = traitlets.Int(1).tag(sync=True)
    maps = traitlets.List(traitlets.Unicode()).tag(sync=True)
    similarities = traitlets.Bytes().tag(sync=True)
    side = traitlets.Int(256).tag(sync=True)


class Still:
    """A widget with a picture for programs that show a notebook but no widgets, as code hosts do."""

    def still(self) -> bytes:
        """The PNG, b"" for none: by default, the pictures inside the widget, one below another."""
        return stacked([self])

    def _repr_mimebundle_(self, **kwargs) -> dict | tuple[dict, dict]:
        bundle = super()._repr_mimebundle_(**kwargs)
        if not (png := self.still()):
            return bundle
        file = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("RGB").save(file, "JPEG", quality=85)  # a third of a PNG's size
        bundle["image/jpeg"] = base64.b64encode(file.getvalue()).decode()
        told = " ".join(board.alt or board.description for board in boards([self]) if board.pictures)
        return bundle, {"image/jpeg": {"alt": told}}


class Tabs(Still, ipywidgets.Tab):
    """Several explorers behind tabs."""


class Explorer(Still, ipywidgets.VBox):
    """Controls above what they change, a line for progress and errors, and a still picture of it all.

    Args:
        draw: computes and shows; it gets `progress` and the value of each control by name. It runs in a
            thread, but for the first time, when its errors are those of the cell.
        controls: widgets by the name of draw's argument. Those without a description get their name.
        view: what draw changes.
        buttons: what else can be done, by name.
        button: draw only when this button is pressed; "" draws at every move.
        slow: whether drawing can be cancelled.
        still: makes the PNG for where widgets do not show; by default, the pictures of the view.
    """

    def __init__(
        self,
        draw: Callable[..., None],
        controls: Mapping[str, ipywidgets.Widget],
        view: Sequence[ipywidgets.Widget],
        *,
        buttons: Mapping[str, Callable[[], None]] | None = None,
        button: str = "",
        slow: bool = False,
        still: Callable[[], bytes] | None = None,
    ):
        self.controls = dict(controls)
        self._line = Board()  # of which only the text below it is used, which is read out when it changes
        self._latest = Latest(draw, self._tell)
        if still:
            self.still = still
        for name, control in self.controls.items():
            control.description = control.description or name.replace("_", " ")
            control.style = {"description_width": "initial"}
        shelf = ipywidgets.Box(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        acts = {button: self.request} if button else {}
        acts |= (buttons or {}) | ({"Cancel": self.cancel} if slow else {})
        made = [ipywidgets.Button(description=name, layout={"width": "auto"}) for name in acts]
        for each, act in zip(made, acts.values(), strict=True):
            each.on_click(self.guarded(lambda _, act=act: act()))
        draw(lambda done, total: None, **self.values)
        if not button:
            for control in self.controls.values():
                control.observe(lambda _: self.request(), names="value")
        super().__init__([shelf, ipywidgets.HBox([*made, self._line]), *view])

    @property
    def values(self) -> dict[str, object]:
        """What the controls say, by name."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def message(self) -> str:
        """Progress or an error, as text."""
        return self._line.description

    def __repr__(self) -> str:
        names = ", ".join(control.description for control in self.controls.values())
        return f"explorer ({names}): run this cell to use it" if names else "explorer"

    def request(self) -> None:
        """Draws anew, in the background."""
        self._latest.request(self.values)

    def cancel(self) -> None:
        """Ends what is being drawn."""
        self._latest.cancel()

    def wait(self) -> "Explorer":
        """Returns when all is drawn."""
        self._latest.wait()
        return self

    def guarded(self, act: Callable[..., None]) -> Callable[..., None]:
        """A callback whose errors are shown in place, where Jupyter would only log them."""

        def call(*given) -> None:
            try:
                act(*given)
            except Exception as error:
                self._tell(sentence(error))

        return call

    def _tell(self, text: str) -> None:
        self._line.description = text


def explore(draw: Callable[..., Figure], **controls) -> Explorer:
    """Sliders and menus above a figure that is redrawn whenever one of them moves.

    It works like `ipywidgets.interact`, but the figure is a widget instead of captured output. Programs that
    run a notebook without a browser (papermill, nbclient) handle captured output on the same socket on which
    they wait for the end of the cell; when the two coincide, they miss the end and wait for ever.

    Args:
        draw: Makes the figure; it gets one keyword argument per control.
        controls: Widgets, or anything that `interact` makes one from: (low, high), a list of choices or of
            (label, value) pairs, a number, or True.

    Raises:
        TypeError: No widget can be made from a control.
    """
    made = {name: ipywidgets.interactive.widget_from_abbrev(given) for name, given in controls.items()}
    if wrong := [name for name, control in made.items() if not isinstance(control, ipywidgets.Widget)]:
        raise TypeError(
            f"{wrong[0]}={controls[wrong[0]]!r} is not a control: give a widget, (low, high), a list of "
            "choices, a number or True"
        )
    where = Board()

    def redraw(progress: Progress, **values) -> None:
        png = draw(**values)._repr_png_()
        said = [f"{each.description} {getattr(each, 'label', each.value)}" for each in made.values()]
        where.alt, where.pictures = f"figure for {', '.join(said)}", [png]

    return Explorer(redraw, made, [where])


def show(where: Board, png: bytes, description: str) -> None:
    """Shows a PNG in place, and a text below it."""
    where.pictures, where.description = [png], description


# ---------------------------------------------------------------- drawing


def pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """An image (3, H, W) in [-1, 1], or uint8, as uint8 (H, W, 3); arrays (H, W, 3) stay."""
    if isinstance(image, np.ndarray):
        return image
    image = image.detach().cpu()
    image = image if image.dtype == torch.uint8 else to_uint8(image[None].float())[0]
    return image.permute(1, 2, 0).numpy()


def heat(values: Tensor, low: float, high: float, colours: str = "viridis") -> np.ndarray:
    """Numbers (h, w) as colours, uint8 (h, w, 3)."""
    share = ((values.detach().cpu().float() - low) / max(high - low, 1e-12)).clamp(0, 1).numpy()
    return matplotlib.colormaps[colours](share, bytes=True)[..., :3]


def png_of(image: Image.Image) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def enlarged(image: Tensor | np.ndarray, side: int) -> Image.Image:
    """An image as wide as `side` pixels: larger without smoothing, smaller without losing lines."""
    made = Image.fromarray(pixels(image))
    way = Image.Resampling.NEAREST if side >= made.width else Image.Resampling.LANCZOS
    return made.resize((side, max(1, round(side * made.height / made.width))), way)


def sheet(
    rows: Mapping[str, Sequence[Tensor | np.ndarray]],
    captions: Sequence[str] | Mapping[str, Sequence[str]] = (),
    tile: int = TILE,
) -> bytes:
    """Rows of pictures with their names, as PNG.

    Args:
        rows: pictures by the name of their row.
        captions: what stands above the pictures of the first row, or of rows by name.
        tile: width of a picture; larger for larger pictures, as long as the sheet does not become too wide.
    """
    captions = captions if isinstance(captions, Mapping) else {next(iter(rows)): captions}
    widest = max(map(len, rows.values()))
    own = max(pixels(image).shape[1] for row in rows.values() for image in row)
    tile = max(tile, min(own, MOST, WIDE // widest))
    left = 8 + max(round(FONT.getlength(line)) for name in rows for line in name.split("\n"))
    strips = []
    for name, row in rows.items():
        texts, tiles = captions.get(name, ()), [enlarged(image, tile) for image in row]
        top = max((4 + 16 * (text.count("\n") + 1) for text in texts), default=0)
        size = left + widest * (tile + GAP), top + max(image.height for image in tiles)
        strips.append(Image.new("RGB", size, "white"))
        write = partial(ImageDraw.Draw(strips[-1]).multiline_text, fill="black", font=FONT)
        write((2, top + 2), name)
        for i, text in enumerate(texts):
            write((left + i * (tile + GAP), 0), text)
        for i, image in enumerate(tiles):
            strips[-1].paste(image, (left + i * (tile + GAP), top))
    return column(strips)


def column(images: Sequence[Image.Image]) -> bytes:
    """Images one below another, as PNG."""
    size = max(image.width for image in images), sum(image.height + GAP for image in images)
    canvas, y = Image.new("RGB", size, "white"), 0
    for image in images:
        canvas.paste(image, (0, y))
        y += image.height + GAP
    return png_of(canvas)


def boards(widgets: Sequence[ipywidgets.Widget]) -> Iterator[Board]:
    """All pictures among some widgets and those inside them, from top to bottom."""
    for widget in widgets:
        if isinstance(widget, Board):
            yield widget
        yield from boards(getattr(widget, "children", ()))


def stacked(widgets: Sequence[ipywidgets.Widget]) -> bytes:
    """All pictures of some widgets and of those inside them, one below another, as PNG; b"" for none."""
    found = []
    for board in boards(widgets):
        if board.pictures:
            image = Image.open(io.BytesIO(board.pictures[board.shown])).convert("RGB")
            found.append(enlarged(np.asarray(image), board.side) if board.rows else image)
    return column(found) if found else b""
