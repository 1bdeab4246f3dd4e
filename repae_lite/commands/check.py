"""Print versions, devices, memory, disk, cached weights, and which presets this machine can run.

Says too whether the embedded data is whole, and what each preset needs.
"""

import argparse
import json

FLAGS = {
    "what is shown": {
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

    found = survey(pretrained=args.pretrained)
    print(json.dumps(found, indent=1) if args.json else report(found))
