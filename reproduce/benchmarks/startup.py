"""How long one waits before anything happens: `import repae_lite`, `repae --help`, and the first public name.

    python reproduce/benchmarks/startup.py --repeats 7

Each way in a fresh Python, in turns; seconds of the whole process minus those of an empty one.
"""

import argparse
import json
import subprocess
import sys
import time
from statistics import median

WAYS = {
    "import repae_lite": "import repae_lite",
    "repae --help": "from repae_lite.commands.main import main; main(['--help'])",
    "repae train-repae --help": "from repae_lite.commands.main import main; main(['train-repae', '--help'])",
    "repae_lite.SiT": "import repae_lite; repae_lite.SiT",
}


def seconds(code: str) -> float:
    """Wall time of a Python that runs the code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7, help="how often each way is run (default: 7)")
    repeats = parser.parse_args().repeats
    took = {name: [] for name in ("nothing", *WAYS)}
    for _ in range(repeats):
        for name in took:
            took[name].append(seconds(WAYS.get(name, "")))
    empty = median(took.pop("nothing"))
    print(json.dumps({name: round(median(values) - empty, 3) for name, values in took.items()}, indent=1))


if __name__ == "__main__":
    main()
