"""The pages of `make site` in a real browser, from the disk: what needs no kernel lives, phones have room."""

import shutil
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("myst_nb")
ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "reproduce" / "benchmarks"), str(ROOT / "notebooks" / "site")]
from browser import CHROMIUM, browser_page  # noqa: E402
from build import build  # noqa: E402

if CHROMIUM is None:
    pytest.skip("no Chromium on the PATH", allow_module_level=True)
SHOTS = Path("runs") / "browser"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of chapter 08, as it was last run."""
    source = tmp_path_factory.mktemp("source")
    shutil.copy(ROOT / "notebooks" / "08_explorer.ipynb", source / "index.ipynb")
    build(source, source.parent / "pages")
    return (source.parent / "pages" / "index.html").as_uri()


@pytest.mark.parametrize("width", [1300, 390])
def test_patches_can_be_clicked_without_a_kernel(address, width):
    with browser_page("file:", SHOTS, width) as page:
        page.goto(address)
        grid, maps = page.locator(".repae-board .grid"), page.locator(".repae-board canvas")
        playwright.expect(grid).to_have_count(1)
        grid.scroll_into_view_if_needed()
        before = maps.first.get_attribute("aria-label")
        grid.click(position={"x": 20, "y": 20})
        playwright.expect(page.locator(".repae-board")).to_contain_text("row 1, column 1")
        playwright.expect(maps.first).not_to_have_attribute("aria-label", before)
        page.screenshot(path=SHOTS / f"page-{width}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
