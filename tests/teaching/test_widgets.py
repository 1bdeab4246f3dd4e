"""The explorers: what moves, what is drawn, what is said when drawing fails; nothing is captured output."""

import io

import pytest
import torch
from PIL import Image

from repae_lite.teaching import figures

ipywidgets = pytest.importorskip("ipywidgets")
from repae_lite.teaching.widgets import explore  # noqa: E402


def tiles(name: str, count: int) -> figures.Figure:
    if count == 3:
        raise ValueError("three <is> too many")
    return figures.image_grid(torch.full((count, 3, 4, 4), {"dark": -1.0, "light": 1.0}[name]), title=name)


def test_moving_a_control_draws_anew():
    box = explore(tiles, name=[("Night", "dark"), ("Day", "light")], count=(1, 4))
    menu, slider, picture, problem = box.children
    assert (menu.description, slider.description) == ("name", "count")
    assert (menu.value, slider.value, slider.min, slider.max) == ("dark", 2, 1, 4)
    first = picture.value
    assert Image.open(io.BytesIO(first)).format == picture.format.upper() == "PNG"
    menu.value = "light"
    assert picture.value != first
    menu.value = "dark"
    assert picture.value == first == tiles("dark", 2)._repr_png_()

    slider.value = 3
    assert problem.value == "ValueError: three &lt;is&gt; too many" and picture.value == first
    slider.value = 4
    assert problem.value == "" and picture.value == tiles("dark", 4)._repr_png_()


def test_controls_may_be_widgets_and_keep_their_description():
    slider = ipywidgets.FloatSlider(1.5, min=1, max=6, description="scale")
    seen = []
    explore(lambda s: seen.append(s) or tiles("dark", 1), s=slider)
    slider.value = 2.5
    assert seen == [1.5, 2.5] and slider.description == "scale"


def test_what_cannot_be_drawn_at_first_fails_in_its_cell():
    with pytest.raises(ValueError, match="too many"):
        explore(tiles, name=["dark"], count=ipywidgets.IntSlider(3))
    with pytest.raises(TypeError, match=r"name=None is not a control: give a widget, \(low, high\)"):
        explore(tiles, name=None)


def test_nothing_is_captured_output():
    """A cell whose output is captured can lose its end under papermill (see `explore`)."""
    children = explore(tiles, name=["dark"], count=(1, 2)).children
    assert not any(isinstance(child, ipywidgets.Output) for child in children)
