"""The explorers in JupyterLab, driven by a real browser that reaches nothing but this machine.

    python -m pytest -m browser

Screenshots go to runs/browser. Needs playwright (pip) and Chromium (on Debian the package chromium).
"""

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
playwright = pytest.importorskip("playwright.sync_api")
sys.path.append(str(Path(__file__).resolve().parents[2] / "reproduce" / "benchmarks"))
from browser import CHROMIUM, choose, jupyterlab, run_in_browser  # noqa: E402

if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH", allow_module_level=True)
SHOTS = Path("runs") / "browser"
CELLS = [
    "import torch\ntorch.set_num_threads(1)\nfrom repae_lite import latent_explorer, token_explorer, explore",
    """import ipywidgets
tabs, said = latent_explorer(device='cpu'), ipywidgets.Label().add_class("said")
def tell(board, message, buffers):
    said.value += "".join(f"{cell}{'+' * begins} " for cell, begins in message["cells"])
tabs.children[0].children[3].children[0].on_msg(tell)
ipywidgets.VBox([tabs, said])""",
    "token_explorer(device='cpu', count=4)",
    "latent_explorer('tiny', 'tiny-e2e-20k', device='cpu')",
    """from repae_lite.teaching import figures
def draw(n):
    if n == 3:
        raise ValueError("not three")
    return figures.image_grid(torch.full((n, 3, 4, 4), 0.5), title=f"{n} tiles")
explore(draw, n=(1, 4))""",
]


@pytest.fixture(scope="module")
def page():
    """The notebook in JupyterLab, run from top to bottom."""
    with jupyterlab(CELLS) as address, run_in_browser(address, len(CELLS), SHOTS) as page:
        yield page


def board(page, at: int):
    """The picture with cells of the explorer in cell `at`, counted from 0, and the picture below it."""
    outputs = page.locator(".jp-CodeCell").nth(at)
    outputs.scroll_into_view_if_needed()
    return outputs.locator(".grid").first, outputs.locator("img").nth(2)  # 0 is that of the line above


def changed(image, before: str) -> None:
    """Waits until a picture is another one."""
    playwright.expect(image).not_to_have_attribute("src", before)


def test_strokes_arrive_whole_and_one_after_another(page):
    grid, _ = board(page, 1)
    box = grid.bounding_box()

    def move(row: int, column: int) -> None:
        page.mouse.move(box["x"] + 36 * column + 18, box["y"] + 36 * row + 18)

    def click(row: int, column: int, **how) -> None:
        move(row, column)
        page.mouse.down(**how)
        page.mouse.up(**how)

    move(0, 0)
    page.mouse.down()
    move(3, 3)  # at once: the cells between are painted, too
    page.mouse.up()
    click(7, 7, button="right")
    page.keyboard.press("Escape")  # JupyterLab's menu
    click(0, 7)
    click(7, 0)
    playwright.expect(page.locator(".said")).to_have_text("0+ 9 18 27 7+ 56+")
    page.locator(".jp-CodeCell").nth(1).get_by_role("button", name="Undo all").click()
    playwright.expect(page.locator(".jp-CodeCell").nth(1)).to_contain_text("difference 0.000")


def test_painting_with_the_mouse_changes_the_decoding(page):
    grid, decoded = board(page, 1)
    before = decoded.get_attribute("src")
    box = grid.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 120, steps=5)
    page.mouse.up()
    changed(decoded, before)
    playwright.expect(page.locator(".jp-CodeCell").nth(1)).not_to_contain_text("difference 0.000")
    page.screenshot(path=SHOTS / "painted.png")


def test_keys_move_and_paint(page):
    grid, decoded = board(page, 3)
    grid.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator(".jp-CodeCell").nth(3)).to_contain_text("row 2, column 2")
    before = decoded.get_attribute("src")
    page.keyboard.press("Space")
    changed(decoded, before)


def test_two_explorers_on_one_page_do_not_disturb_each_other(page):
    (_, one), (grid, two) = board(page, 1), board(page, 3)
    kept, before = one.get_attribute("src"), two.get_attribute("src")
    grid.click(position={"x": 150, "y": 150})
    changed(two, before)
    assert one.get_attribute("src") == kept


def test_a_click_on_a_patch_needs_no_kernel(page):
    cell = page.locator(".jp-CodeCell").nth(2)
    maps = cell.locator("canvas")
    choose(page, "Kernel", "Shut Down Kernel")
    grid, _ = cell.locator(".grid"), cell.scroll_into_view_if_needed()
    before = maps.first.get_attribute("aria-label")
    assert maps.first.bounding_box()["width"] > 100  # the other boards of the page have no maps
    grid.click(position={"x": 20, "y": 20})
    playwright.expect(maps.first).not_to_have_attribute("aria-label", before)
    playwright.expect(cell).to_contain_text("row 1, column 1")
    cell.locator("select").select_option("2")
    playwright.expect(maps.first).not_to_have_attribute("aria-label", maps.nth(1).get_attribute("aria-label"))
    page.screenshot(path=SHOTS / "tokens.png")
