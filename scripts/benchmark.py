"""Measures speed, one question at a time: python scripts/benchmark.py QUESTION [options]"""

import sys

from dhlnn_jax.benchmark import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
