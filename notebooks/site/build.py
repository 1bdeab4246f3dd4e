"""Builds the project's pages from the notebooks as they were run: `make site`, into runs/site.

    python notebooks/site/build.py                          the committed notebooks
    python notebooks/site/build.py --notebooks runs/tour    those of a tour of your own

Nothing is executed and nothing fetched: Sphinx with MyST-NB turns outputs into pages that work from the disk.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from sphinx.cmd.build import build_main

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "DIFFERENCES.md", "reproduce/README.md")
PAGES += ("reproduce/RESULTS.md", "reproduce/results/README.md", "reproduce/cluster/README.md")
PAGES += ("data_small/DATA.md", "data_small/evidence/README.md", "notebooks/glossary.md")


def gather(place: Path, notebooks: Path) -> None:
    """Lays out the pages' sources as the checkout has them, so that links from one to another hold."""
    for name in PAGES:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    shutil.copytree(ROOT / "notebooks" / "img", place / "notebooks" / "img")
    for path in (ROOT / "data_small" / "evidence").glob("*.json"):
        shutil.copy(path, place / "data_small" / "evidence")
    for folder in ("notebooks", "notebooks/solutions", "reproduce"):
        (place / folder).mkdir(exist_ok=True)
        for path in sorted((ROOT / folder).glob("[0-9][0-9]_*.ipynb")):
            own = notebooks / path.name
            shutil.copy(own if folder == "notebooks" and own.is_file() else path, place / folder)
    for name in ("index.md", "api.rst"):
        shutil.copy(HERE / name, place / name)


def build(source: Path, output: Path) -> None:
    """Pages from a folder of sources.

    Raises:
        RuntimeError: Sphinx failed; what it says stands above.
    """
    made = source / "_build" / "pages"  # MyST-NB puts a folder of its own beside the pages
    if code := build_main(["-q", "-c", str(HERE), "-j", "auto", str(source), str(made)]):
        raise RuntimeError(f"the pages were not built (Sphinx ended with {code})")
    shutil.rmtree(output, ignore_errors=True)
    shutil.move(made, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="where executed ones are")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "site", help="folder of the pages")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="repae-site-") as source:
        gather(Path(source), options.notebooks)
        build(Path(source), options.output)
    print(f"open {options.output / 'index.html'}")


if __name__ == "__main__":
    main()
