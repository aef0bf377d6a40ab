"""Draws where hedging is worth its cost: python scripts/regime_map.py [--volatility 0.2] [--out FOLDER]"""

import sys

from dhlnn_jax.regime_map import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
