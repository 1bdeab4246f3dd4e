"""The explorers: what moves, what is drawn, what is said when drawing fails; nothing is captured output."""

import base64
import io
import sys
import threading
import time

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from repae_lite import SiT, load_sit, load_vae
from repae_lite.data.datasets import load_embedded
from repae_lite.teaching import figures
from repae_lite.utils.locks import locked

ipywidgets = pytest.importorskip("ipywidgets")
pytest.importorskip("anywidget")
from repae_lite.teaching import explorers  # noqa: E402
from repae_lite.teaching.explorers import explore, latents, noise, parts, samplers, tokens, training  # noqa: E402


def tiles(name: str, count: int) -> figures.Figure:
    if count == 3:
        raise ValueError("three <is> too many")
    return figures.image_grid(torch.full((count, 3, 4, 4), {"dark": -1.0, "light": 1.0}[name]), title=name)


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def boards(explorer) -> list[parts.Board]:
    """All pictures of an explorer but the line for progress and errors, in the order in which they stand."""
    return [board for board in parts.boards([explorer]) if board.pictures or board.rows]


def shown(explorer) -> list[bytes]:
    """Their PNG files."""
    return [png for board in boards(explorer) for png in board.pictures]


def press(explorer, name: str) -> None:
    """A button of an explorer."""
    next(each for each in explorer.children[1].children if each.description == name).click()
    explorer.wait()


# ---------------------------------------------------------------- explore


def test_moving_a_control_draws_anew():
    box = explore(tiles, name=[("Night", "dark"), ("Day", "light")], count=(1, 4))
    menu, slider = box.controls.values()
    assert (menu.description, slider.description) == ("name", "count")
    assert (menu.value, slider.value, slider.min, slider.max) == ("dark", 2, 1, 4)
    (first,) = shown(box)
    assert opened(first).format == "PNG" and "Night" in boards(box)[0].alt
    menu.value = "light"
    assert shown(box.wait()) != [first] and "Day" in boards(box)[0].alt
    menu.value = "dark"
    assert shown(box.wait()) == [first] == [tiles("dark", 2)._repr_png_()]

    slider.value = 3
    assert box.wait().message == "ValueError: three <is> too many" and shown(box) == [first]
    slider.value = 4
    assert shown(box.wait()) == [tiles("dark", 4)._repr_png_()] and box.message == ""


def test_controls_may_be_widgets_and_keep_their_description():
    slider = ipywidgets.FloatSlider(1.5, min=1, max=6, description="scale")
    seen = []
    box = explore(lambda s: seen.append(s) or tiles("dark", 1), s=slider)
    slider.value = 2.5
    box.wait()
    assert seen == [1.5, 2.5] and slider.description == "scale"


def test_what_cannot_be_drawn_at_first_fails_in_its_cell():
    with pytest.raises(ValueError, match="too many"):
        explore(tiles, name=["dark"], count=ipywidgets.IntSlider(3))
    with pytest.raises(TypeError, match=r"name=None is not a control: give a widget, \(low, high\)"):
        explore(tiles, name=None)
    with pytest.raises(TypeError, match="is not a control"):
        explore(tiles, name=ipywidgets.fixed("dark"))


def test_nothing_is_captured_output():
    """A cell whose output is captured can lose its end under papermill (see `explore`)."""
    children = explore(tiles, name=["dark"], count=(1, 2)).children
    assert not any(isinstance(child, ipywidgets.Output) for child in children)


def test_a_figure_has_a_still_picture_and_its_words():
    bundle, about = explore(tiles, name=["dark"], count=(1, 2))._repr_mimebundle_()
    assert opened(base64.b64decode(bundle["image/jpeg"])).width == opened(tiles("dark", 1)._repr_png_()).width
    assert about == {"image/jpeg": {"alt": "figure for name dark, count 1"}}
    assert parts.stacked([]) == b"" == parts.stacked([parts.Board()])


def test_pictures_in_a_sheet_are_never_smaller_than_they_are_unless_it_would_be_too_wide():
    large, row = torch.zeros(3, 256, 256), {"a": ["t = 1.00"], "b": ["t = 0.50"]}
    assert 256 < opened(parts.sheet({"a": [large]})).width < 300
    assert 1500 < opened(parts.sheet({"a": [large] * 20})).width < 1700
    plain, named = (opened(parts.sheet({"a": [large], "b": [large]}, given)) for given in ((), row))
    assert named.width == plain.width and named.height == plain.height + 2 * 20


# ---------------------------------------------------------------- the newest request


def test_only_the_newest_request_is_drawn_after_the_one_that_runs():
    drawn, may_go = [], threading.Event()

    def draw(progress, n):
        may_go.wait(10)
        drawn.append(n)

    latest = parts.Latest(draw, lambda text: None)
    for n in range(50):
        latest.request({"n": n})
        time.sleep(0.002)
    may_go.set()
    latest.wait()
    assert drawn[-1] == 49 and len(drawn) == 2


def test_long_work_ends_for_a_newer_request_and_for_cancel():
    said, begun = [], threading.Event()

    def work(progress, n):
        for i in range(2000):
            begun.set()
            progress(i, 2000)
            time.sleep(0.001 if n < 2 else 0)

    latest = parts.Latest(work, said.append)
    latest.request({"n": 0})
    assert begun.wait(5)
    latest.request({"n": 2})
    latest.wait()
    assert said[-2:] == ["1999 of 2000", ""] and "cancelled" not in said
    begun.clear()
    latest.request({"n": 1})
    assert begun.wait(5)
    latest.cancel()
    latest.wait()
    assert said[-1] == "cancelled"


def test_whatever_ends_a_drawing_is_told_and_the_next_one_comes():
    said = []
    latest = parts.Latest(lambda progress, code: code and sys.exit(code), said.append)
    for code in (7, 0):
        latest.request({"code": code})
        latest.wait()
    assert said == ["SystemExit: 7", ""]


def test_matplotlibs_settings_are_one_threads_at_a_time():
    before, inside, leave = dict(matplotlib.rcParams), threading.Event(), threading.Event()

    def other():
        with figures.style():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    threading.Timer(0.2, leave.set).start()
    with figures.style():
        assert leave.is_set()
    thread.join()
    assert dict(matplotlib.rcParams) == before


def test_two_hundred_moves_leave_no_thread_figure_or_observer():
    box = explore(tiles, name=["dark"], count=(1, 2))
    slider = box.controls["count"]
    threads, observers = threading.active_count(), len(slider._trait_notifiers["value"]["change"])
    for i in range(200):
        slider.value = 1 + i % 2
    box.wait()
    assert threading.active_count() <= threads and not box.message
    assert len(slider._trait_notifiers["value"]["change"]) == observers
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


# ---------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def images():
    return load_embedded("eval")[0][:6]


@pytest.fixture
def tab(images):
    return explorers.latent_explorer(images=images, device="cpu")


def stroke(explorer, *cells: int, of=()) -> None:
    """What the browser says when cells are painted in one stroke, on a picture of (image, VAE)."""
    board = boards(explorer)[0]
    said = {"of": [*of] or board.of, "cells": [[cell, not i] for i, cell in enumerate(cells)]}
    board._handle_custom_msg(said, [])
    explorer.wait()


def brush(explorer, **values) -> None:
    """The brush's controls, with new values."""
    found = {control.description.split()[0]: control for control in explorer.children[2].children}
    for name, value in values.items():
        found[name].value = value


def cells_changed(png: bytes, before: bytes) -> list[tuple[int, int]]:
    """Row and column of the cells, 36 pixels wide, in which two pictures of 8 x 8 differ."""
    apart = (np.asarray(opened(png)) != np.asarray(opened(before))).any(-1).reshape(8, 36, 8, 36)
    return list(zip(*map(np.ndarray.tolist, apart.any((1, 3)).nonzero()), strict=True))


def test_painting_changes_the_patch_and_its_decoding(tab):
    painting = tab.children[0]
    before = shown(painting)
    stroke(painting, 0)
    after = shown(painting)
    assert cells_changed(after[0], before[0]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert after[1] != before[1] and "difference 0.000" not in boards(painting)[1].description
    press(painting, "Undo all")
    assert shown(painting) == before
    brush(painting, patch=3)
    assert boards(painting)[0].brush == 3
    stroke(painting, 27)
    square = [(row, column) for row in (2, 3, 4) for column in (2, 3, 4)]
    assert cells_changed(shown(painting)[0], before[0]) == square  # around row 3, column 3


@pytest.mark.parametrize("action", [latents.ZERO, latents.OTHER])
def test_a_stroke_reaches_each_of_its_cells(tab, action):
    painting = tab.children[0]
    brush(painting, brush=action, patch=1)
    first = shown(painting)[0]
    stroke(painting, 0, 9)
    stroke(painting, 63)
    assert cells_changed(shown(painting)[0], first) == [(0, 0), (1, 1), (7, 7)]


def test_copy_and_swap_take_two_picks(tab):
    painting = tab.children[0]
    first = shown(painting)[0]
    brush(painting, brush=latents.SWAP)
    stroke(painting, 0, 1, 2)
    assert shown(painting)[0] == first and "Now click where" in boards(painting)[0].description
    stroke(painting, 1)
    assert "two patches overlap" in painting.message and shown(painting)[0] == first
    stroke(painting, 36, 37)
    assert shown(painting)[0] != first and "Now click where" not in boards(painting)[0].description
    stroke(painting, 36)
    stroke(painting, 0)
    assert shown(painting)[0] == first and not painting.message  # swapped back
    stroke(painting, 20)
    brush(painting, brush=latents.COPY)  # drops what was picked
    stroke(painting, 0)
    assert shown(painting.wait())[0] == first
    stroke(painting, 36)
    copied, was = np.asarray(opened(shown(painting)[0])), np.asarray(opened(first))
    assert (copied[144:216, 144:216] == was[:72, :72]).all() and (copied[:72, :72] == was[:72, :72]).all()


def test_edits_belong_to_the_picture_that_was_seen(tab):
    painting = tab.children[0]
    first = shown(painting)
    stroke(painting, 0)
    painted = shown(painting)
    painting.controls["image"].value = 3
    fresh = shown(painting.wait())
    stroke(painting, 9, of=(0, "before tuning"))  # on its way while the image changed
    assert shown(painting) == fresh
    painting.controls["image"].value = 0
    assert len(cells_changed(shown(painting.wait())[0], first[0])) == 7  # two squares that share a cell
    assert cells_changed(shown(painting)[0], painted[0])
    stroke(painting, 0, of=(0, "nowhere"))
    assert painting.message == "KeyError: 'nowhere'"


def test_between_two_latents():
    a, b = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    for spherical in (False, True):
        way = latents.between(a, b, ends, spherical)
        torch.testing.assert_close(way[[0, 2]], torch.cat([a, b]))
    straight, great = (latents.between(a, b, ends, kind)[1] for kind in (False, True))
    torch.testing.assert_close(straight, (a + b)[0] / 2)
    torch.testing.assert_close(great.norm(), (a.norm() + b.norm()) / 2)  # a straight line passes nearer to 0
    assert straight.norm() < 0.9 * great.norm()
    assert latents.between(a, 2 * a, ends, True)[1].isfinite().all()


def test_latents_of_two_sizes_are_refused(images):
    from repae_lite import AutoencoderKL

    other = AutoencoderKL.from_preset("tiny", latent_channels=3)
    with pytest.raises(ValueError, match=r"latents differ in size.*choose two VAEs of one architecture"):
        explorers.latent_explorer("tiny", other, images)
    with pytest.raises(ValueError, match=r"give uint8 \(B, 3, H, W\)"):
        explorers.latent_explorer(images=images.float())
    with pytest.raises(FileNotFoundError, match="do not exist"):
        explorers.latent_explorer("nothere/vae.safetensors", images=images)


# ---------------------------------------------------------------- time, tokens, samplers


def fit():
    return tuple(values[:100] for values in load_embedded("train"))


def test_networks_stay_as_they_are_and_run_in_float32(images):
    sit, vae = (network.bfloat16().train() for network in (load_sit("tiny"), load_vae("tiny")))
    for network in (sit, vae):
        network.requires_grad_(True)
    explorers.time_explorer({"own": (sit, vae)}, images, fit=fit(), device="cpu")
    for network in (sit, vae):
        assert network.training and all(value.requires_grad for value in network.parameters())
        assert {value.dtype for value in network.parameters()} == {torch.bfloat16}


def test_labels_are_classes_of_the_sit_or_the_null_class(images):
    of, sit = explorers.material.Material.of, load_sit("tiny")
    assert of(images, [9] * 6, "cpu").labels_for(sit).tolist() == [9] * 6
    assert of(images.numpy(), None, "cpu").labels_for(sit).tolist() == [sit.null_class] * 6
    with pytest.raises(ValueError, match="label 11 is outside"):
        of(images, [11] * 6, "cpu").labels_for(sit)
    with pytest.raises(ValueError, match="no null class"):
        of(images, None, "cpu").labels_for(SiT.from_preset("tiny", label_dropout=0.0))
    for given in ([1] * 5, [1.0] * 6):
        with pytest.raises(ValueError, match=r"for 6 images: give one integer for each"):
            of(images, given, "cpu")
    with pytest.raises(ValueError, match="labels but no images"):
        of(None, [1], "cpu")


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_both_paths_are_solved_for_the_clean_latents(path):
    z, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    z_t, v = noise.interpolate(z, eps, t, path)
    torch.testing.assert_close(noise.clean(v, z_t, t, noise.get_interpolant(path)), z)


def test_images_need_linear_maps_of_their_own_and_one_grid(images):
    with pytest.raises(ValueError, match=r"give fit=\(images, labels\)"):
        explorers.time_explorer(images=images, device="cpu")
    with pytest.raises(ValueError, match="the SiT has 16 tokens per image, the encoder 4"):
        noise.Lens.fitted(
            load_sit("tiny"), torch.zeros(2, 4, 8, 8), torch.zeros(2).long(), torch.zeros(2, 4, 9)
        )


def progress_of(explorer) -> list[tuple[int, int]]:
    """What drawing says of its progress."""
    found = []
    explorer._latest._work(lambda done, total: found.append((done, total)), **explorer.values)
    return found


def test_time_goes_from_the_image_to_noise(images):
    explorer = explorers.time_explorer(images=images, fit=fit(), path="cosine", device="cpu")
    assert progress_of(explorer) == [(0, 2), (1, 2)]
    (first,) = shown(explorer)
    found = {}
    explorer.controls["compare"].value = noise.CENTRED
    for t in (0.02, 0.98):
        explorer.controls["t"].value = t
        found[t] = boards(explorer.wait())[0].description
        assert f"t = {t:.2f}" in found[t]
    assert shown(explorer) != [first] and explorer.message == ""
    near, far = (float(found[t].split("REPA ")[1].split(",")[0]) for t in (0.02, 0.98))
    assert near > far  # noise leaves only what label and position say of the tokens


@torch.no_grad()
def test_linear_maps_find_what_features_hold(images):
    """Of tokens that are linear in a layer's features, the map leaves next to nothing."""
    material, sit, vae = (
        explorers.material.Material.of(images, [0] * 6, "cpu"),
        load_sit("tiny").eval(),
        load_vae("tiny").eval(),
    )
    z, labels = material.latents(vae), material.labels_for(sit)
    generator = torch.Generator().manual_seed(0)
    t, eps = torch.rand(len(z), generator=generator), torch.randn(z.shape, generator=generator)
    z_t = noise.interpolate(sit.normalize(z), eps, t)[0]
    hidden, v = noise.features(sit, z_t, t, labels)
    torch.testing.assert_close(v, sit(z_t, t, labels))
    torch.testing.assert_close(hidden[1], sit.features(z_t, t, labels, 2))
    maps = noise.Lens.fitted(sit, z, labels, hidden[1]).maps
    assert noise.cosine(maps[1](hidden[1]), hidden[1]).min() > 0.99
    assert not sit.blocks[0]._forward_hooks


def test_similarities_in_the_browser_are_the_tokens_cosines(images):
    from repae_lite import VisionEncoder

    explorer = explorers.token_explorer(images=images, count=3, device="cpu")
    (board,) = boards(explorer)
    sent = np.frombuffer(board.similarities, "<f2").reshape(3, len(board.maps), 16, 16)
    assert board.maps[0] == "encoder" and len(board.pictures) == 3 and len(board.maps) == 15
    assert opened(explorer.still()).height > 5 * 72
    token = noise.tokens_of(VisionEncoder.from_name("tiny"), images[:3])
    token = token - token.mean((0, 1))
    direct = torch.nn.functional.cosine_similarity(token[1, 5], token[1], dim=-1)
    np.testing.assert_allclose(sent[1, 0, 5], direct, atol=1e-3)
    assert (np.abs(sent.diagonal(axis1=2, axis2=3) - 1) < 1e-2).all()


def test_more_similarities_than_a_page_should_hold_are_refused(images, monkeypatch):
    monkeypatch.setattr(tokens, "MOST", 5 * 2 * 2 * 16**2)
    chosen = {"images": images, "count": 2, "device": "cpu"}
    (board,) = boards(explorers.token_explorer(blocks=[2], **chosen))
    assert [name for name in board.maps if "block" in name] == ["REPA, block 2", "REPA-E, block 2"]
    with pytest.raises(ValueError, match="choose a smaller count, or fewer blocks"):
        explorers.token_explorer(blocks=[2, 3], **chosen)


def test_tokens_of_other_grids_are_refused(images):
    from repae_lite import AutoencoderKL

    wide = AutoencoderKL.from_preset("tiny", fold=1)  # latents twice as wide: patches stay the encoder's
    explorers.token_explorer({}, {"wide": wide}, images, count=2, device="cpu")
    sit = noise.SHIPPED["REPA"][0]
    with pytest.raises(ValueError, match="SiT takes"):
        explorers.token_explorer({"wrong": (sit, wide)}, {}, images, count=2, device="cpu")


def test_both_samplers_start_from_the_same_noise_and_can_be_cancelled():
    explorer = explorers.sampler_explorer(device="cpu")
    moves = {"A steps": 3, "B steps": 3, "A scale": 1.0, "B scale": 1.0}
    for name, value in moves.items():
        explorer.controls[name].value = value
    explorer.wait()
    assert "difference 0.000" in boards(explorer)[0].description
    assert progress_of(explorer) == [(done, 10) for done in range(10)]  # three steps, two decodings, twice
    explorer.controls["B solver"].value = "Heun"
    explorer.wait()
    assert "difference 0.000" not in boards(explorer)[0].description
    assert "B: Heun, 3 steps, guidance 1 for t from 0 to 0.75" in boards(explorer)[0].description
    explorer.controls["A steps"].value = 100
    explorer.cancel()
    explorer.wait()
    assert explorer.message == "cancelled"
    assert "A: Euler, 3 steps" in boards(explorer)[0].description
    explorer.controls["A solver"].value = "SDE"
    explorer.controls["A steps"].value = 2
    assert "A: SDE, 2 steps" in boards(explorer.wait())[0].description


@pytest.mark.parametrize("module", [latents, noise, samplers, tokens])
def test_every_explorer_has_a_still_picture(module, images):
    made = {
        latents: lambda: explorers.latent_explorer(images=images, device="cpu"),
        noise: lambda: explorers.time_explorer(images=images, fit=fit(), device="cpu"),
        samplers: lambda: explorers.sampler_explorer(device="cpu"),
        tokens: lambda: explorers.token_explorer(images=images, count=2, device="cpu"),
    }[module]()
    still = opened(base64.b64decode(made._repr_mimebundle_()[0]["image/jpeg"]))
    assert still.format == "JPEG" and min(still.size) > 100
    assert len(still.convert("RGB").getcolors(1 << 20)) > 100


# ---------------------------------------------------------------- runs


def run_folder(path, rate: float):
    (path / "samples").mkdir(parents=True)
    (path / "divergence").mkdir()
    (path / "args.json").write_text("{}")
    lines = [
        f'{{"step": {s}, "denoising": {rate / s}, "grad_norm_sit": 1.0, "loss_scale_sit": 8}}'
        for s in range(1, 9)
    ]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_the_dashboard_shows_curves_findings_and_compares(tmp_path):
    one, two = run_folder(tmp_path / "one", 1.0), run_folder(tmp_path / "two", 2.0)
    (one / "divergence" / "0000007.json").write_text('{"finding": "the latents have collapsed"}')
    board = explorers.training_dashboard([one, two])
    assert board.controls["quantity"].options == ("denoising", "grad_norm_sit", "loss_scale_sit")
    assert "step 7: the latents have collapsed" in board.children[3].value
    assert len(shown(board)) == 3  # losses, health, the comparison; no samples
    first = shown(board)
    with (two / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "vae_align": 1.0}\n')
    board.controls["run"].value = two
    assert shown(board.wait()) != first and "collapsed" not in board.children[3].value
    assert board.controls["quantity"].options[-1] == "vae_align"
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        explorers.training_dashboard(tmp_path / "three")


def test_runs_of_one_name_are_told_apart_and_what_they_say_is_no_markup(tmp_path):
    runs = [run_folder(tmp_path / name / "run", 1.0) for name in ("a", "b")]
    (runs[0] / "divergence" / "0000007.json").write_text('{"finding": "<b>collapsed</b>"}')
    board = explorers.training_dashboard(runs)
    assert [name for name, _ in board.controls["run"].options] == ["a/run", "b/run"]
    assert "&lt;b&gt;collapsed" in board.children[3].value


def test_a_run_that_is_not_there_yet_has_no_picture_and_is_not_followed_after_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "POLL", 0.05)
    board = explorers.training_dashboard(tmp_path / "run", ["train-repae"])
    assert "image/jpeg" not in board._repr_mimebundle_() and "not started here" in board.children[3].value
    real, words = training.subprocess.Popen, [sys.executable, "-c", "import time; time.sleep(0.5)"]
    monkeypatch.setattr(training.subprocess, "Popen", lambda given, **more: real(words, **more))
    press(board, "Start or continue")
    follow = board.children[2]
    assert follow.value and comes(lambda: not follow.value)
    assert board.wait().message == "" and "finished" in board.children[3].value
    monkeypatch.setattr(training.subprocess, "Popen", lambda given, **more: real(["nowhere"], **more))
    press(board, "Start or continue")
    assert board.message.startswith("FileNotFoundError")


def comes(what) -> bool:
    """Whether something is so within ten seconds: signals take their time."""
    return any(what() or time.sleep(0.1) for _ in range(100))


def test_a_run_is_started_paused_stopped_and_says_how_it_ended(tmp_path, monkeypatch):
    words = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    real = training.subprocess.Popen
    asked = []
    monkeypatch.setattr(
        training.subprocess, "Popen", lambda given, **more: asked.append(given) or real(words, **more)
    )
    run = training.Training(tmp_path / "run", ["train-repae"])
    assert run.state == "not started here"
    with locked(tmp_path / "run" / "lock"):
        assert run.state == "training, started elsewhere"
    (tmp_path / "run.log").write_text("the first start\n")
    run.start()
    assert asked[0][-3:] == ["train-repae", "--resume", "latest"]
    try:
        assert run.state == "training"
        run.pause()
        assert comes(lambda: run.state.startswith("paused"))
        run.resume()
        assert comes(lambda: run.state == "training")
    finally:
        run.stop()
    run.process.wait(10)
    assert "ended with exit code -15: " in run.state
    assert (tmp_path / "run.log").read_text().startswith("the first start\n")
    run.process.returncode = 143
    assert run.state == "stopped, before its first checkpoint"
    (tmp_path / "run" / "checkpoints" / "0000010").mkdir(parents=True)
    assert run.state == "stopped, with a checkpoint"


def test_collapse_is_reached_in_few_steps_and_undone(small):
    explorer = explorers.collapse_lab(small)
    assert "1.00 of what it was" in boards(explorer)[0].description
    for name, value in {"alignment": 0.0, "denoising": 5.0, "stop": False, "rate": 1e-3}.items():
        explorer.controls[name].value = value
    explorer.request()
    explorer.wait()
    assert explorer.message == "" and "After 20 steps" in boards(explorer)[0].description
    share = float(boards(explorer)[0].description.split("variance is ")[1].split()[0])
    assert share < 0.7
    press(explorer, "Start again")
    assert "After 0 steps" in boards(explorer)[0].description


@pytest.fixture(scope="module")
def small():
    from repae_lite import SmallScale

    return SmallScale.load()
