"""The program: `repae`, `python -m repae_lite`, and `accelerate launch -m repae_lite`."""

import sys


def main() -> int:
    """Runs `repae_lite.commands.main`; Ctrl-C is one line even while that is still being imported."""
    try:
        from repae_lite.commands.main import main

        return main()
    except KeyboardInterrupt:
        print("repae: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
