"""The pages of `make site`: made from the notebooks as they were run, in need of nothing from elsewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("myst_nb")
pytest.importorskip("furo")

import repae_lite

ROOT = Path(__file__).resolve().parents[1]
NEEDED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["'](https?:)?//[^"']*""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("a site") / "pages"
    done = subprocess.run(
        [sys.executable, "notebooks/site/build.py", "--output", str(place)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return place


def test_every_chapter_and_public_name_has_its_page(site):
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        page = (site / "notebooks" / f"{path.stem}.html").read_text()
        title = json.loads(path.read_text())["cells"][0]["source"][0].strip("# \n")
        assert title in page
    for name in set(repae_lite.__all__) - {"__version__"}:
        assert (site / "api" / f"repae_lite.{name}.html").is_file(), f"list {name} in notebooks/site/api.rst"
    for name in ("reproduce/RESULTS", "data_small/evidence/README", "DIFFERENCES", "search"):
        assert (site / f"{name}.html").is_file()


def test_nothing_is_fetched_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    assert not [f"{page.name}: {found[0]}" for page in pages if (found := NEEDED.search(page.read_text()))]
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", style.read_text()), style.name


def test_formulas_need_no_script(site):
    page = (site / "notebooks" / "01_vae.html").read_text()
    assert page.count("<math") > 10 and not re.search('mathjax[^"]*\\.js', page, re.I)


def test_readme_pictures_are_those_of_the_committed_chapters_and_networks(tmp_path):
    maker = ROOT / "notebooks" / "site" / "pictures.py"
    subprocess.run([sys.executable, str(maker), "--output", str(tmp_path)], cwd=ROOT, check=True)
    for name in ("method.png", "tour.png"):
        assert (tmp_path / name).read_bytes() == (ROOT / "notebooks" / "img" / name).read_bytes(), name
    for name in re.findall(r"notebooks/img/([\w.]+)", (ROOT / "README.md").read_text()):
        made, kept = (Image.open(place / name) for place in (tmp_path, ROOT / "notebooks" / "img"))
        assert made.size == kept.size and made.n_frames == kept.n_frames, name
