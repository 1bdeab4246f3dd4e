"""Figures: a Figure comes back, pyplot stays untouched, and what is drawn is what was given."""

import io

import matplotlib.colors
import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t as student

from repae_lite.teaching import figures
from repae_lite.teaching.method_map import LIT, method_map

torch.manual_seed(0)
IMAGES = torch.rand(5, 3, 8, 8) * 2 - 1
LATENTS = {"repa": torch.randn(6, 4, 8, 8), "naive": 0.1 * torch.randn(6, 4, 8, 8)}
SERIES = {"repa": ([0, 1, 2], [3.0, 2.0, 1.0]), "repa-e": ([0, 1, 2], [[3.0, 2.0, 1.0], [2.0, 1.0, 0.5]])}
SEEDS = {"vae-only": [1.0, 1.2, 0.9], "repa-e": [1.1], "my own arm": [2.0, 2.5]}
PLOTS = {
    "image_grid": lambda: figures.image_grid(IMAGES, columns=2, captions="abcde", title="five"),
    "image_rows": lambda: figures.image_rows({"input": IMAGES, "repa": IMAGES[:, :1]}),
    "latent_rgb": lambda: figures.latent_rgb(LATENTS, IMAGES, count=3),
    "curves": lambda: figures.curves(SERIES, title="down", ylabel="loss", log=True, smooth=2),
    "curve_panels": lambda: figures.curve_panels({"a": SERIES, "b": SERIES}, log=[True, False]),
    "dots_with_spread": lambda: figures.dots_with_spread(SEEDS, ylabel="d", band=(0.8, 1.2, "control")),
    "spectrum": lambda: figures.spectrum(LATENTS),
    "routing_table": lambda: figures.routing_table(["align"], ["VAE", "SiT"], [["gradient", "zero"]]),
    **{f"map {part}": lambda part=part: method_map(part) for part in (None, "vae", "stopgrad", "drop-in")},
}


def shown(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def drawn(fig) -> np.ndarray:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=fig.dpi, bbox_inches="tight", pad_inches=0.08)
    return shown(buffer.getvalue())


@pytest.mark.parametrize("name", PLOTS)
def test_plot_returns_a_figure_that_draws_and_leaves_pyplot_alone(name):
    plt = pytest.importorskip("matplotlib.pyplot")
    settings = dict(plt.rcParams)
    fig = PLOTS[name]()
    assert isinstance(fig, matplotlib.figure.Figure) and fig.get_figwidth() * fig.dpi <= 1000
    png = fig._repr_png_()
    assert png.startswith(b"\x89PNG") and len(png) < 150_000
    # a notebook stores what was drawn, up to 8 of 255 (drawing twice differs by 5)
    assert np.abs(shown(png) - drawn(fig)).max() <= 8
    assert plt.get_fignums() == [] and dict(plt.rcParams) == settings


def test_methods_have_distinct_colours_and_labels():
    methods = {"sit", "repa", "vae-only", "repa-e", "naive"}
    assert set(figures.METHOD_COLORS) == set(figures.METHOD_LABELS) == methods
    rgb = np.array([matplotlib.colors.to_rgb(c) for c in figures.METHOD_COLORS.values()])
    distances = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + np.eye(len(rgb))
    assert distances.min() > 0.25
    assert len(set(figures.METHOD_LABELS.values())) == 5
    assert not set(figures.METHOD_COLORS.values()) & set(figures._OTHER_COLORS)


def test_a_method_has_its_colour_in_every_plot():
    curve = figures.curves(SERIES).axes[0]
    dots = figures.dots_with_spread(SEEDS).axes[0]
    for ax, method in ((curve, "repa"), (curve, "repa-e"), (dots, "vae-only"), (dots, "repa-e")):
        assert figures.METHOD_COLORS[method] in [line.get_color() for line in ax.lines]


def test_image_grid_enlarges_by_whole_pixels():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    fig = figures.image_grid(images, scale=5)
    canvas = fig.axes[0].images[0].get_array()
    assert canvas.shape == (20, 20 + 5 + 20, 3)
    expected = images[1].permute(1, 2, 0).repeat_interleave(5, 0).repeat_interleave(5, 1)
    np.testing.assert_array_equal(canvas[:, 25:], expected)
    as_float = figures.image_grid(images.float() / 127.5 - 1, scale=5).axes[0].images[0].get_array()
    np.testing.assert_array_equal(as_float, canvas)


def test_latent_rgb_ignores_the_sign_of_a_per_method_basis():
    z = torch.randn(6, 4, 8, 8)
    first, second = (figures.latent_rgb({"repa": x}).axes[0].images[0].get_array() for x in (z, 50 * z + 3))
    difference = np.abs(first.astype(int) - second.astype(int))
    assert difference.max() <= 1  # scale and shift do not change the colours
    few = figures.latent_rgb({"repa": z[:, :2]})  # two channels still make a picture
    assert few.axes[0].images


def test_curves_draw_seeds_and_mean():
    lines = figures.curves({"repa-e": SERIES["repa-e"]}).axes[0].lines
    assert len(lines) == 3  # two seeds and their mean
    np.testing.assert_allclose(lines[-1].get_ydata(), [2.5, 1.5, 0.75])
    smooth = figures._moving_average(np.array([[0.0, 3.0, 6.0, 3.0]]), 3)
    np.testing.assert_allclose(smooth, [[1.5, 3, 4, 4.5]])


def test_dots_show_every_seed_mean_and_interval():
    seeds = [1.0, 1.2, 0.9, 1.4]
    ax = figures.dots_with_spread({"repa": seeds}).axes[0]
    drawn = [line for line in ax.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(drawn[0].get_ydata(), seeds)
    low, high = ax.collections[0].get_segments()[0][:, 1]
    half = student.ppf(0.975, 3) * np.std(seeds, ddof=1) / 2
    np.testing.assert_allclose([low, high], [np.mean(seeds) - half, np.mean(seeds) + half])


@pytest.mark.parametrize(("seeds", "cut"), [([14.0, 15.0], True), ([1.0, 9.0], False)])
def test_axis_starts_at_zero_or_says_so(seeds, cut):
    ax = figures.dots_with_spread({"repa": seeds, "sit": [s + 0.1 for s in seeds]}).axes[0]
    said = any("axis cut" in text.get_text() for text in ax.texts)
    low, high = ax.get_ylim()
    starts_at_zero = low <= 0 <= high
    assert said != starts_at_zero
    if not cut:
        assert starts_at_zero


def test_spectrum_of_white_noise_is_flat_and_scale_free():
    z = torch.randn(500, 2, 8, 8)
    first, second = (figures.spectrum({"repa": x}).axes[0].lines[0].get_ydata() for x in (z, 7 * z))
    np.testing.assert_allclose(first, 1, atol=0.1)
    np.testing.assert_allclose(first, second)


def test_method_map_greys_what_is_not_lit():
    colours = {
        part: {text.get_text(): text.get_color() for text in method_map(part).axes[0].texts}
        for part in (None, "stopgrad", "repa")
    }
    assert colours[None]["stop-gradient"] == colours["stopgrad"]["stop-gradient"] == "#D00000"
    assert colours["repa"]["stop-gradient"] == colours["stopgrad"]["projector"] == "#C8C8C8"
    assert colours["repa"]["projector"] != "#C8C8C8"
    parts = set("x enc z bn noise sit1 sit2 v den tap align teacher dec xhat rec disc stop".split())
    parts |= {"g_rec", "g_align", "g_align_vae", "g_den"}
    for name, lit in LIT.items():
        assert set(lit.split()) <= parts, name


def test_scoreboard_shows_uncertainty_and_escapes():
    board = figures.scoreboard(
        {"repa-e": {"FD ↓": [1.0, 2.0, 3.0]}, "a < b": {"FD ↓": 2.0, "note": "x & y"}},
        {"FD ↓": ".1f", "note": ""},
    )
    assert "2.0 ± 1.0 (3)" in board and ">2.0<" in board and "a &lt; b" in board and "x &amp; y" in board
    assert "REPA-E" in board and figures.METHOD_COLORS["repa-e"] in board and ">–<" in board
    assert board._repr_html_() == board
    assert "4 (1)" in figures.scoreboard({"sit": {"x": [4.0]}}, ["x"])


def test_errors_name_the_value_and_the_remedy():
    cases = [
        (lambda: figures.image_grid(torch.zeros(3, 8, 8)), r"got \(3, 8, 8\)"),
        (lambda: figures.image_grid(IMAGES, captions="ab"), "5 images, 2 captions"),
        (lambda: figures.curves({"repa": ([0, 1], [1.0])}), "2 steps"),
        (lambda: figures.dots_with_spread({"repa": []}), "one finite value per seed"),
        (lambda: method_map("tap"), "no part 'tap'"),
        (lambda: figures.routing_table(["a"], ["b"], [["yes"]]), r"unknown entries \['yes'\]"),
        (lambda: figures.routing_table(["a"], ["b"], [["zero", "zero"]]), "1 rows of 1"),
        (lambda: figures.scoreboard({"sit": {"y": 1.0}}, ["x"]), r"sit has \['y'\]"),
        (lambda: figures.curves({str(i): ([0], [1.0]) for i in range(9)}), "split the plot"),
        (
            lambda: figures.latent_rgb({"a": LATENTS["repa"], "b": LATENTS["repa"][:, :3]}, joint=True),
            "joint=False",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
