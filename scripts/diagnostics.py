"""Draws how far a network is from its linearization along training: python scripts/diagnostics.py CONFIG"""

import sys

from dhlnn_jax.diagnostics_run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
