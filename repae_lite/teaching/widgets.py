"""Controls above a figure: the explorer near the end of every chapter in `notebooks/`."""

import html
from collections.abc import Callable

import ipywidgets

from repae_lite.teaching.figures import Figure


def explore(draw: Callable[..., Figure], **controls) -> ipywidgets.VBox:
    """Sliders and menus above a figure that is redrawn whenever one of them moves.

    A notebook shows it when it is the last value of a cell. It works like `ipywidgets.interact`, but the
    figure is an image widget instead of captured output. Programs that run a notebook without a browser
    (papermill, nbclient) handle captured output on the same socket on which they wait for the end of the
    cell; when the two coincide, they miss the end and wait for ever. Also, a figure that cannot be drawn the
    first time fails in its cell.

    Args:
        draw: Makes the figure; it gets one keyword argument per control.
        controls: Widgets, or anything that `interact` makes one from: (low, high), a list of choices or of
            (label, value) pairs, a number, or True.

    Raises:
        TypeError: No widget can be made from a control.
    """
    made = {name: ipywidgets.interactive.widget_from_abbrev(given) for name, given in controls.items()}
    for name, control in made.items():
        if control is None:
            raise TypeError(
                f"{name}={controls[name]!r} is not a control: give a widget, (low, high), a list of choices, "
                "a number or True"
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
        except Exception as error:  # a callback has no cell to fail in: say it under the last good picture
            problem.value = html.escape(f"{type(error).__name__}: {error}")

    redraw()
    for control in made.values():
        control.observe(moved, names="value")
    return ipywidgets.VBox([*made.values(), picture, problem])
