"""Trains and compares hedgers: python scripts/run.py CONFIG [--section.key value ...]"""

import sys

from dhlnn_jax.command_line import main

if __name__ == "__main__":
    sys.exit(main("run", sys.argv[1:]))
