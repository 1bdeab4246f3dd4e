"""Controls over a figure: the explorer near the end of every chapter of `notebooks/`."""

import html
from collections.abc import Callable

import ipywidgets

from repae_lite.teaching.figures import Figure


def explore(draw: Callable[..., Figure], **controls) -> ipywidgets.VBox:
    """Sliders and menus over a figure that is drawn anew whenever one of them moves; shown when it is a
    cell's last value.

    Like `ipywidgets.interact`, but the figure is a picture of its own and no captured output. Who runs a
    notebook without a browser (papermill, nbclient) answers captured output on the socket on which it awaits
    the cell's end; when both meet, it misses the end and waits for ever. And a figure that cannot be drawn at
    first is an error of its cell.

    Args:
        draw: makes the figure from one keyword per control.
        controls: widgets, or what `interact` takes for one: (low, high), a list of choices or of (label,
            value), a number, True.

    Raises:
        TypeError: nothing can be made of a control.
    """
    made = {name: ipywidgets.interactive.widget_from_abbrev(given) for name, given in controls.items()}
    for name, control in made.items():
        if control is None:
            raise TypeError(
                f"{name}={controls[name]!r} is no control: give a widget, (low, high), a list of choices, a "
                "number or True"
            )
        control.description = control.description or name
    picture = ipywidgets.Image(
        format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%")
    )
    problem = ipywidgets.HTML()

    def redraw() -> None:
        picture.value = draw(**{name: control.value for name, control in made.items()})._repr_png_()

    def moved(_: dict) -> None:
        try:
            redraw()
            problem.value = ""
        # a callback has no cell to fail in: said under the picture, which is of the last good choice
        except Exception as error:
            problem.value = html.escape(f"{type(error).__name__}: {error}")

    redraw()
    for control in made.values():
        control.observe(moved, names="value")
    return ipywidgets.VBox([*made.values(), picture, problem])
