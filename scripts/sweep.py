"""Trains hedgers over a grid of settings: python scripts/sweep.py CONFIG --over cost.rate 2e-3 4e-3"""

import sys

from dhlnn_jax.command_line import main

if __name__ == "__main__":
    sys.exit(main("sweep", sys.argv[1:]))
