"""The explorers in JupyterLab, driven by a real browser that reaches nothing but this machine.

    python -m pytest -m browser

Screenshots go to runs/browser. Needs playwright (pip) and Chromium (on Debian the package chromium).
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")

SHOTS = Path("runs") / "browser"
CELLS = [
    "import torch\ntorch.set_num_threads(1)\nfrom repae_lite import latent_explorer, token_explorer, explore",
    "latent_explorer(device='cpu')",
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
def lab(tmp_path_factory):
    """Address of a JupyterLab in a folder with one notebook."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "explorers.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        f"--notebook-dir={folder}",
    ]
    own = {"JUPYTER_CONFIG_DIR": str(folder / "config"), "OMP_NUM_THREADS": "1"}
    own |= {"PYTHONPATH": os.pathsep.join(sys.path), "JUPYTER_PREFER_ENV_PATH": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *words],
        env=os.environ | own,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "JupyterLab ended"
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def page(lab):
    """The notebook, run from top to bottom."""
    outside = []

    def only_here(route):
        if "//localhost" in route.request.url:
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    SHOTS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        page.set_default_timeout(120_000)
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.route("**/*", only_here)
        page.goto(f"{lab}/lab/tree/explorers.ipynb")
        page.locator(".jp-CodeCell").nth(len(CELLS) - 1).wait_for()
        page.get_by_text("| Idle").first.wait_for()  # what runs before the kernel is there is lost
        choose(page, "Run", "Run All Cells")
        try:
            page.get_by_text("[5]:").first.wait_for()
            yield page
        finally:
            page.screenshot(path=SHOTS / "last.png")
            browser.close()
    assert not outside and not errors


def choose(page, menu: str, entry: str) -> None:
    """An entry of JupyterLab's menus."""
    page.locator(".lm-MenuBar-item", has_text=menu).first.click()
    page.locator(".lm-Menu-item", has_text=entry).first.click()


def board(page, at: int):
    """The picture with cells of the explorer in cell `at`, counted from 0, and the picture below it."""
    outputs = page.locator(".jp-CodeCell").nth(at)
    outputs.scroll_into_view_if_needed()
    return outputs.locator(".grid").first, outputs.locator("img").nth(1)


def changed(image, before: str) -> None:
    """Waits until a picture is another one."""
    playwright.expect(image).not_to_have_attribute("src", before)


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
