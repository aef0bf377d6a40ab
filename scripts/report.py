"""Redraws tables and figures from results folders alone: python scripts/report.py RESULTS..."""

import sys

from dhlnn_jax.command_line import main

if __name__ == "__main__":
    sys.exit(main("report", sys.argv[1:]))
