"""Compares nested training with its variants and controls: python scripts/ablation.py CONFIG [--seeds 5]"""

import sys

from dhlnn_jax.ablation_report import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
