"""How long from a key to a new picture: the explorers in JupyterLab, driven by a real browser.

    python reproduce/benchmarks/explorers.py

Measured inside the page, from the key or the click to the moment when the browser has loaded the last of the
new pictures (or drawn the new map), after which none came for a second. Needs playwright (pip) and Chromium.
Medians and 95 % quantiles are printed.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
from browser import jupyterlab, run_in_browser
from record import commit

CELLS = [
    "import torch\nfrom repae_lite import latent_explorer, time_explorer, token_explorer",
    "tabs = latent_explorer(device='cpu'); tabs.children[0]",
    "tabs.children[1]",
    "time_explorer(device='cpu')",
    "token_explorer(device='cpu')",
]
CLOCK = """
(cell) => {
  const board = document.querySelectorAll('.jp-CodeCell')[cell];
  window.begun = window.last = null;
  const drawn = () => { if (window.begun !== null) window.last = performance.now(); };
  board.addEventListener('keydown', () => { window.begun ??= performance.now(); }, true);
  for (const image of board.querySelectorAll('img')) image.addEventListener('load', drawn);
  const canvas = board.querySelector('canvas');
  if (canvas) new MutationObserver(drawn).observe(canvas, { attributes: true });
}
"""
SETTLED = "() => window.last !== null && performance.now() - window.last > 1000"
TIME = "() => { const time = window.last - window.begun; window.begun = window.last = null; return time; }"
SNAKE = [*["ArrowRight"] * 6, "ArrowDown", *["ArrowLeft"] * 6, "ArrowDown"]  # no patch is painted twice
MOVES = {  # what is moved: (cell, what gets the keys, the keys in turn)
    "latents: another image": (1, ".widget-slider .noUi-handle", ["ArrowRight"]),
    "latents: painting": (1, ".grid", SNAKE),
    "latents: the walk": (2, ".widget-slider .noUi-handle >> nth=2", ["ArrowRight", "ArrowLeft"]),
    "time": (3, ".widget-slider .noUi-handle >> nth=1", ["ArrowRight", "ArrowLeft"]),
    "tokens: another patch": (4, ".grid", ["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"]),
}


def measure(page, cell: int, what: str, keys: list[str], moves: int) -> list[float]:
    """Milliseconds of each move, sorted."""
    place = page.locator(".jp-CodeCell").nth(cell)
    place.scroll_into_view_if_needed()
    page.evaluate(CLOCK, cell)
    place.locator(what).first.focus()
    times = []
    for i in range(moves):
        page.keyboard.press(keys[i % len(keys)])
        if keys is SNAKE:
            page.keyboard.press("Space")
        page.wait_for_function(SETTLED)
        times.append(page.evaluate(TIME))
        if errors := [text for text in place.get_by_role("status").all_text_contents() if "Error: " in text]:
            raise RuntimeError(f"cell {cell} of the measured notebook: {errors[0]}")
    return sorted(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=30, help="at most 39, the images to move on to")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file, too")
    options = parser.parse_args()
    rows = {}
    with jupyterlab(CELLS) as address, run_in_browser(address, len(CELLS), Path("runs/browser")) as page:
        for name, (cell, what, keys) in MOVES.items():
            found = measure(page, cell, what, keys, options.moves)
            rows[name] = {"median_ms": found[len(found) // 2], "p95_ms": found[int(0.95 * len(found))]}
            print(
                f"{name:26} median {rows[name]['median_ms']:4.0f} ms, 95 % {rows[name]['p95_ms']:4.0f} ms",
                flush=True,
            )
    about = {"commit": commit(), "machine": platform.machine(), "torch": torch.__version__}
    if options.output:
        options.output.write_text(json.dumps(about | {"moves": options.moves, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
