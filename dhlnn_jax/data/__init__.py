"""Data shipped with the package; provenance in README.md, remade by make_closes.py."""
