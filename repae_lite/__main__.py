"""`python -m repae_lite`, and `accelerate launch -m repae_lite`."""

import sys

from repae_lite.commands.main import main

sys.exit(main())
