"""What scripts/benchmark.py prints of seconds and bytes: a row for each thing that was measured."""

from typing import Any


def print_rows(rows: dict[str, dict[str, Any]]) -> None:
    """Median, minimum and maximum of each row, and its further numbers, on stdout."""
    further = {
        "ratio_to_ours": "x ours",
        "ratio_to_scan": "x the scan",
        "ratio_to_fewest": "x fewest",
        "live_rows": "of rows live",
    }
    further |= {"share_of_product_rate": "of product rate", "programs_compiled": "programs"}
    further |= {"xla_seconds": "s in XLA", "compile_seconds": "s to compile", "resident": "MiB resident"}
    width = max(map(len, rows)) + 1
    print(f"{'':{width}}{'median':>11}{'min':>11}{'max':>11}")
    for name, row in rows.items():
        numbers = (row[key] for key in ("median", "min", "max"))
        cells = "".join(f"{'never':>11}" if x is None else f"{x:11.4g}" for x in numbers)
        plain = {key: row[key] for key in further if isinstance(row.get(key), int | float)}
        notes = "; ".join(f"{x:.3g} {further[key]}" for key, x in plain.items())
        print(f"{name:{width}}{cells} {row['unit']:4} {notes}".rstrip())
