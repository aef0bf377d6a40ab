"""Which form of the band's recursion over time is faster here, by horizon and device, from a measurement."""

import json
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dhlnn_jax.files import write_json
from dhlnn_jax.hedge import CLAMPS
from dhlnn_jax.results import device_name
from dhlnn_jax.runtime import cache_folder

DECISIONS = 1_000_000  # of every horizon: paths x steps
_REPEATS = 5


@lru_cache  # one answer for a process, whatever others write meanwhile
def fastest_clamp(n_steps: int) -> str:
    """The faster one of `hedge.CLAMPS` for bands of this many steps on this device.

    On a CPU "scan", which was 6 to 13 times faster at 30, 1,000 and 10,000 steps (docs/performance.md). On
    other devices both are timed the first time that a horizon is asked for, and the times are kept in the
    user's cache folder. Several processes take what the first has measured, since all must run the same
    program; all of them must ask.
    """
    if jax.default_backend() == "cpu":
        return "scan"
    kinds = list(CLAMPS)
    first = jax.process_index() == 0
    chosen = kinds.index(measured_clamp(n_steps, cache_folder() / "clamp.json")) if first else 0
    if jax.process_count() > 1:
        chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
    return kinds[chosen]


def measured_clamp(n_steps: int, file: Path) -> str:
    """The faster one on this device, as kept in `file`, or measured now and kept there.

    Timed are value and gradient of a million decisions, five times each in turn; the shortest time of each
    counts, since other load only adds to it.
    """
    known = _read(file)
    name = f"{device_name()}, jax {jax.__version__}, {n_steps} steps"
    if name not in known:
        print(f"timing the band's recursion, once for {name} ...", end=" ", file=sys.stderr, flush=True)
        timers = {kind: make_clamp_timer(kind, n_steps) for kind in CLAMPS}
        rounds = [{kind: timer() for kind, timer in timers.items()} for _ in range(_REPEATS)]
        milliseconds = {kind: min(1e3 * seconds[kind] for seconds in rounds) for kind in CLAMPS}
        known[name] = milliseconds
        _write(file, known)
        told = ", ".join(f"{kind} {ms:.3g} ms" for kind, ms in milliseconds.items())
        print(f"{told}; kept in {file}", file=sys.stderr)
    return min(CLAMPS, key=known[name].__getitem__)


def make_clamp_timer(kind: str, n_steps: int) -> Callable[[], float]:
    """`seconds()` of the recursion's value and gradient to both edges, over `DECISIONS`; compiled here."""
    # Lower edges that cross a band of width 0.1 as often at every horizon.
    shape = max(1, DECISIONS // n_steps), n_steps
    lower = np.cumsum(np.random.default_rng(0).normal(scale=0.05, size=shape), axis=1)
    edges = jnp.asarray(lower, jnp.float32), jnp.asarray(lower + 0.1, jnp.float32)

    def loss(lower: jax.Array, upper: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jax.vmap(CLAMPS[kind])(lower, upper)))

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*edges).compile()

    def seconds() -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(*edges))
        return time.perf_counter() - began

    return seconds


def _read(file: Path) -> dict[str, Any]:
    """What is kept; without what is damaged, or was kept of other forms."""
    try:
        kept = json.loads(file.read_text())
        return {name: times for name, times in kept.items() if set(times) == set(CLAMPS)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(file: Path, known: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    except OSError:
        pass  # it is measured again next time
