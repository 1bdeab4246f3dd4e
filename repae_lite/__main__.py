"""`python -m repae_lite`, and `accelerate launch -m repae_lite`."""

import sys

from repae_lite.cli import main

sys.exit(main())
