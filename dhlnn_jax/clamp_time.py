"""Seconds of the band's recursion over time, one step after another and in parallel."""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from dhlnn_jax.hedge import CLAMPS
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.timing import compile_clock, interleaved, ratio, spread
from dhlnn_jax.timing_report import print_rows
from dhlnn_jax.workload import Answer

DECISIONS = 1_000_000  # of every horizon: paths x steps


def clamp(options: argparse.Namespace) -> Answer:
    """Seconds of the band's recursion and of its gradient to both edges, scan and parallel, by horizon."""
    runs: dict[str, Callable[[], float]] = {}
    compile_seconds = {}
    with progress_bar("compiling", len(options.horizons) * len(CLAMPS)) as advance:
        for horizon, kind in product(options.horizons, CLAMPS):
            name = f"{horizon} steps, {kind}"
            lower = _random_walks(horizon, max(1, DECISIONS // horizon))
            with compile_clock() as clock:
                program = jax.jit(_value_and_gradient(kind)).lower(lower, lower).compile()
            compile_seconds[name] = clock.seconds
            runs[name] = partial(_seconds, program, lower)
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


def _random_walks(n_steps: int, n_paths: int) -> jax.Array:
    """Lower edges that cross a band of width 0.1 as often at every horizon."""
    steps = np.random.default_rng(0).normal(scale=0.05, size=(n_paths, n_steps))
    return jnp.asarray(np.cumsum(steps, axis=1), jnp.float32)


def _value_and_gradient(kind: str) -> Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]:
    def loss(lower: jax.Array, upper: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jax.vmap(CLAMPS[kind])(lower, upper)))

    return jax.value_and_grad(loss, argnums=(0, 1))


def _seconds(compiled: Callable[..., object], lower: jax.Array) -> float:
    upper = jax.block_until_ready(lower + 0.1)
    began = time.perf_counter()
    jax.block_until_ready(compiled(lower, upper))
    return time.perf_counter() - began
