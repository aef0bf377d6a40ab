"""Seconds of the band's recursion over time, one step after another and in parallel."""

import argparse
from collections.abc import Callable
from itertools import product

from dhlnn_jax.clamp_choice import make_clamp_timer
from dhlnn_jax.hedge import CLAMPS
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.timing import compile_clock, interleaved, ratio, spread
from dhlnn_jax.timing_report import print_rows
from dhlnn_jax.workload import Answer


def clamp(options: argparse.Namespace) -> Answer:
    """Seconds of the band's recursion and of its gradient to both edges, scan and parallel, by horizon."""
    runs: dict[str, Callable[[], float]] = {}
    compile_seconds = {}
    with progress_bar("compiling", len(options.horizons) * len(CLAMPS)) as advance:
        for horizon, kind in product(options.horizons, CLAMPS):
            name = f"{horizon} steps, {kind}"
            with compile_clock() as clock:
                runs[name] = make_clamp_timer(kind, horizon)
            compile_seconds[name] = clock.seconds
            advance(note=name)
    samples = interleaved(runs, options.repeats)
    rows = {}
    for name, seconds in samples.items():
        scan = samples[f"{name.split(',')[0]}, scan"]
        rows[name] = {
            **spread(seconds, "s"),
            "ratio_to_scan": ratio(seconds, scan),
            "compile_seconds": compile_seconds[name],
        }
    print_rows(rows)
    return {"ours": {**next(iter(rows.values())), "by_horizon": rows}}
