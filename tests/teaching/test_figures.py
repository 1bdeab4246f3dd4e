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
RUNS = {"repa": {400: [8.0, 8.2, 8.1], 3000: [3.9, 4.0, 3.8]}, "my own arm": {400: [8.0], 3000: [3.5]}}
LONG = "A finding that needs a good many more words than fit above one small plot, and then some others"
SEEDS = {"vae-only": [1.0, 1.2, 0.9], "repa-e": [1.1], "my own arm": [2.0, 2.5]}
PLOTS = {
    "image_grid": lambda: figures.image_grid(IMAGES, columns=2, captions="abcde", title="five"),
    "image_rows": lambda: figures.image_rows({"input": IMAGES, "repa": IMAGES[:, :1]}),
    "latent_rgb": lambda: figures.latent_rgb(LATENTS, IMAGES, count=3),
    "curves": lambda: figures.curves(SERIES, title="down", ylabel="loss", log=True, smooth=2),
    "curve_panels": lambda: figures.curve_panels({"a": SERIES, "b": SERIES}, log=[True, False]),
    "dots_with_spread": lambda: figures.dots_with_spread(SEEDS, ylabel="d", band=(0.8, 1.2, "control")),
    "log-log": lambda: figures.curves(SERIES, log="both", direct=True, floors={"label": 0.6}, title=LONG),
    "learning_curves": lambda: figures.learning_curves(
        {"a": RUNS, "b": RUNS}, ylabels=["d", "d"], title=LONG
    ),
    "difference_maps": lambda: figures.difference_maps(
        {"repa": IMAGES, "other": -IMAGES}, IMAGES, title=LONG
    ),
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


def test_lines_that_coincide_are_dashed_in_turn():
    steps = np.arange(10)
    series = {"sit": (steps, steps), "repa": (steps, steps + 0.01), "repa-e": (steps, 9 - steps)}
    ax = figures.curves(series | {"naive": (steps, steps)}).axes[0]
    dashed = {line.get_label(): line.is_dashed() for line in ax.lines}
    expected = {"sit": False, "repa": True, "repa-e": False, "naive": True}
    assert dashed == {figures.METHOD_LABELS[name]: is_dashed for name, is_dashed in expected.items()}


def test_floors_are_dotted_and_named_in_their_panel():
    first, second = figures.curve_panels({"a": SERIES, "b": SERIES}, floors={"b": {"label": 0.2}}).axes
    assert not first.texts and [text.get_text() for text in second.texts] == ["label"]
    (floor,) = [line for line in second.lines if line.get_linestyle() == ":"]
    assert set(floor.get_ydata()) == {0.2} and second.get_ylim()[0] < 0.2


def test_both_axes_can_be_logarithmic_and_lines_named_directly():
    fig = figures.curves(SERIES, log="both", direct=True)
    (ax,) = fig.axes
    assert ax.get_xscale() == ax.get_yscale() == "log" and not fig.legends
    labels = {text.get_text().replace("\n", " "): text.get_color() for text in ax.texts}
    assert labels == {figures.METHOD_LABELS[m]: figures.METHOD_COLORS[m] for m in SERIES}
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert boxes[0].y1 <= boxes[1].y0 + 1  # none hides another


def test_learning_curves_show_mean_and_interval_over_runs():
    (ax,) = figures.learning_curves({"d": RUNS}).axes
    assert ax.get_xscale() == "log" and [tick.get_text() for tick in ax.get_xticklabels()] == ["400", "3,000"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [8.1, 3.9])
    band = ax.collections[0].get_paths()[0].get_extents()
    half = student.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    np.testing.assert_allclose([band.y0, band.y1], [3.9 - half, 8.1 + half])


def test_difference_maps_share_one_scale_and_name_it():
    reference = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    fig = figures.difference_maps({"half": reference + 20, "all": reference - 40}, reference, scale=2)
    canvas = fig.axes[0].images[0].get_array()
    column = [canvas[y + 4, -4, 0] for y in (0, 11, 22)]  # rows of 8 pixels, gaps of 3
    assert column == [100, 127, 0]
    assert any("black: 40 of 255 grey levels" in text.get_text() for text in fig.axes[0].texts)


@pytest.mark.parametrize("name", ["log-log", "learning_curves", "difference_maps", "rows", "routing", "dots"])
def test_no_title_runs_over_the_edge(name):
    more = {
        "rows": lambda: figures.image_rows({"input": IMAGES}, title=LONG, scale=4),
        "routing": lambda: figures.routing_table(["a"], ["b", "c"], [["zero", ""]], title=LONG),
        "dots": lambda: figures.dots_with_spread(SEEDS, title=LONG),
    }
    fig = (PLOTS | more)[name]()
    fig.draw_without_rendering()
    titles = [text for ax in fig.axes for text in [ax._left_title, *ax.texts]] + [fig._suptitle]
    found = [text for text in titles if text is not None and text.get_text().startswith("A finding")]
    assert len(found) == 1 and "\n" in found[0].get_text()
    edge = found[0].axes.bbox.x1 if found[0].axes else fig.bbox.x1
    assert found[0].get_window_extent().x1 <= edge + 3 and found[0].get_window_extent().y1 <= fig.bbox.y1


def test_paired_dots_are_joined_by_seed():
    fig = figures.dots_with_spread({"repa": [1.0, 2.0], "repa-e": [0.5, 1.5]}, paired=True)
    lines = [line for line in fig.axes[0].lines if line.get_color() == "#B5B5B5"]
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 0.5], [2.0, 1.5]]


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
    lines = repr(board).splitlines()
    assert lines[0].split() == ["FD", "↓", "note"] and set(lines[1]) == {"-"}
    assert lines[2].startswith("REPA-E  2.0 ± 1.0 (3)") and lines[3].startswith("a < b ")
    assert len({len(line) for line in lines}) == 1
    assert "4 (1)" in figures.scoreboard({"sit": {"x": [4.0]}}, ["x"])


def test_errors_name_the_value_and_the_remedy():
    cases = [
        (lambda: figures.image_grid(torch.zeros(3, 8, 8)), r"got \(3, 8, 8\)"),
        (lambda: figures.image_grid(IMAGES, captions="ab"), "5 images, 2 captions"),
        (lambda: figures.curves({"repa": ([0, 1], [1.0])}), "2 steps"),
        (lambda: figures.dots_with_spread({"repa": []}), "one finite value per seed"),
        (lambda: figures.dots_with_spread(SEEDS, paired=True), "same seeds everywhere"),
        (lambda: figures.curves(SERIES, log="x"), "log='x'"),
        (lambda: figures.learning_curves({"a": {"repa": {400: []}}}), "repa, 400 steps: needs one finite"),
        (lambda: figures.difference_maps({"repa": IMAGES[:2]}, IMAGES), r"repa is \(2, 8, 8, 3\)"),
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
