"""JupyterLab and pages in a real browser that reaches nothing elsewhere: for tests and explorers.py."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def jupyterlab(cells: Sequence[str]) -> Iterator[str]:
    """Address of a notebook with these code cells in a JupyterLab of this Python; it ends with the block.

    Raises:
        RuntimeError: JupyterLab does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="repae-lab-") as folder:
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, Path(folder, "explorers.ipynb"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
        own = {"JUPYTER_CONFIG_DIR": str(Path(folder, "config")), "JUPYTER_PREFER_ENV_PATH": "1"}
        own |= {"PYTHONPATH": os.pathsep.join(sys.path), "JUPYTERLAB_SETTINGS_DIR": str(Path(folder, "lab"))}
        settings = Path(folder, "lab", "@jupyterlab", "notebook-extension", "tracker.jupyterlab-settings")
        settings.parent.mkdir(parents=True)
        settings.write_text('{"windowingMode": "none"}')  # cells out of sight are there, too
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words, f"--notebook-dir={folder}"],
            env=os.environ | own,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = f"http://localhost:{port}"
        try:
            _answers(server, f"{address}/api")
            yield f"{address}/lab/tree/explorers.ipynb"
        finally:
            server.terminate()
            server.wait(30)


def _answers(server: subprocess.Popen, address: str) -> None:
    for _ in range(240):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        if server.poll() is not None:
            break
        time.sleep(0.5)
    raise RuntimeError(f"JupyterLab does not answer at {address}")


@contextlib.contextmanager
def browser_page(allowed: str, shots: Path, width: int = 1300) -> Iterator:
    """A page of playwright that gets only addresses which start with `allowed`.

    A last screenshot goes to the folder `shots`, also after a failure.

    Raises:
        RuntimeError: the page asked for something elsewhere, or a script of it failed.
    """
    from playwright.sync_api import sync_playwright

    problems = []

    def only_these(route) -> None:
        if route.request.url.startswith((allowed, "blob:", "data:")):
            route.continue_()
        else:
            problems.append(f"asked for {route.request.url}")
            route.abort()

    shots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 1500})
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.route("**/*", only_these)
        try:
            yield page
        finally:
            page.screenshot(path=shots / "last.png")
            browser.close()
    if problems:
        raise RuntimeError("; ".join(problems))


@contextlib.contextmanager
def run_in_browser(address: str, count: int, shots: Path) -> Iterator:
    """A page of `browser_page` with the notebook at `address`, in JupyterLab, after its `count` cells ran."""
    with browser_page("http://localhost", shots) as page:
        page.goto(address)
        page.locator(".jp-CodeCell").nth(count - 1).wait_for()
        page.get_by_text("| Idle").first.wait_for()  # what runs before the kernel is there is lost
        choose(page, "Run", "Run All Cells")
        page.get_by_text(f"[{count}]:").first.wait_for()
        yield page


def choose(page, menu: str, entry: str) -> None:
    """An entry of JupyterLab's menus."""
    page.locator(".lm-MenuBar-item", has_text=menu).first.click()
    page.locator(".lm-Menu-item", has_text=entry).first.click()
