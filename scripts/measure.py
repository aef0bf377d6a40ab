"""Measures a finished run on fresh paths: python scripts/measure.py RESULTS --n-paths 100000000"""

import sys

from dhlnn_jax.measure_report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
