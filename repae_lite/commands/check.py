"""Print versions, devices, memory, disk, cached weights, and which presets this machine can run.

Says too whether the embedded data is whole, and what presets need: the named ones, or those without a
base.
"""

import argparse
import json

FLAGS = {
    "what is shown": {
        "names": {
            "nargs": "*",
            "metavar": "NAME",
            "help": "presets, as in reproduce/presets (default: those without a base)",
        },
        "--json": {"action": "store_true", "help": "machine-readable, sizes in bytes"},
        "--pretrained": {
            "default": "pretrained",
            "metavar": "FOLDER",
            "help": "where released sets lie (default: pretrained)",
        },
    }
}


def run(args: argparse.Namespace) -> None:
    """Prints a survey of this machine: as text, or as JSON."""
    from repae_lite.commands.machine import report, survey

    found = survey(pretrained=args.pretrained, names=args.names)
    print(json.dumps(found, indent=1) if args.json else report(found))
