"""Put results side by side, if their protocols are the same; otherwise say what differs."""

import argparse
from pathlib import Path

FLAGS = {
    "what is compared": {
        "results": {"nargs": "+", "metavar": "FILE", "help": "results of repae evaluate, two or more"},
    }
}


def run(args: argparse.Namespace) -> None:
    """Prints one table, or refuses."""
    from repae_lite.evaluation.protocols import differences
    from repae_lite.evaluation.results import read_result, table

    if len(args.results) < 2:
        raise ValueError("one result cannot be compared: give two or more")
    results = {name: read_result(Path(name)) for name in args.results}
    (first, one), *others = results.items()
    for name, other in others:
        if other["protocol"]["hash"] != one["protocol"]["hash"]:
            found = "; ".join(differences(one["protocol"], other["protocol"])) or "the protocols' hashes"
            raise ValueError(f"{first} and {name} have different protocols and cannot be compared: {found}")
    stems = {name: Path(name).stem for name in results}
    unique = len(set(stems.values())) == len(stems)
    print(table({stems[name] if unique else name: result for name, result in results.items()}))
