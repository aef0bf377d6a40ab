"""What scripts/benchmark.py measures with: repeats, compilations, the machine, memory, JSON."""

import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import plain, write_json
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import machine


def spread(samples: Sequence[float], unit: str) -> dict[str, Any]:
    """{"median", "min", "max", "unit", "repeats"}; an infinite sample (never reached) becomes None."""
    return {
        "median": plain(statistics.median(samples)),
        "min": plain(min(samples)),
        "max": plain(max(samples)),
        "unit": unit,
        "repeats": len(samples),
    }


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """Median of the ratios of samples taken beside each other: other load falls on both."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def interleaved(runs: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each run returns, `repeats` times, all runs once in turn; a first round is left out."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with progress_bar("measuring", (repeats + 1) * len(runs)) as advance:
        for i in range(repeats + 1):
            for name, run in runs.items():
                sample = run()
                advance(note=name)
                if i:
                    samples[name].append(sample)
    return samples


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_product_rate(n_products: int = 2000) -> Callable[[], float]:
    """`rate()`: GFLOP/s of products of a 64 x 64 with a 64 x 500 matrix now, on all cores at once.

    On an accelerator the second matrix has 300,000 columns instead, for one product fills the device.
    """
    on_cpu = jax.default_backend() == "cpu"
    n_threads, columns = (cores(), 500) if on_cpu else (1, 300_000)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0], jnp.float32)
    block = jnp.ones((64, columns), jnp.float32)
    powers = jax.jit(lambda q, x: jax.lax.fori_loop(0, n_products, lambda i, x: q @ x, x))
    jax.block_until_ready(powers(rotation, block))

    def rate() -> float:
        def work() -> None:
            jax.block_until_ready(powers(rotation, block))

        threads = [threading.Thread(target=work) for _ in range(n_threads)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        operations = n_threads * n_products * 2 * 64 * 64 * columns
        return operations / (time.perf_counter() - began) / 1e9

    return rate


class CompileClock:
    """Counts programs compiled, or fetched from the persistent cache, and the seconds that took.

    Attributes:
      programs: number of them. seconds: spent on tracing, lowering and compiling; nested ones once.
      xla_seconds: of these, XLA's: compiling or fetching, which is all that a persistent cache can save.
    """

    def __init__(self) -> None:
        self.programs = 0
        self.xla_seconds = 0.0
        self._spans: list[tuple[float, float]] = []

    def note(self, event: str, duration: float) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - duration, now))
            if event.endswith("backend_compile_duration"):
                self.programs += 1
                self.xla_seconds += duration

    @property
    def seconds(self) -> float:
        total, until = 0.0, -float("inf")
        for start, end in sorted(self._spans):
            total += max(end - max(start, until), 0.0)
            until = max(until, end)
        return total


@contextmanager
def compile_clock() -> Iterator[CompileClock]:
    """Context that yields a running `CompileClock`."""
    clock = CompileClock()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        clock.note(event, duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield clock
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def machine_report() -> dict[str, Any]:
    """Processor, cores, load and JAX device of this moment, and versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    load = [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []
    return {
        "cpu": model,
        "cores": cores(),
        "load": load,
        "jax_devices": jax.device_count(),
        "python": platform.python_version(),
        **machine(),
    }


def check_target(path: Path | None, question: str, *, overwrite: bool) -> None:
    """Raises: UsageError, before any work, if the answer could not be written to `path` afterwards."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UsageError(f"--json: there is no folder {str(path.parent)!r}")
    if question in _read_answers(path) and not overwrite:
        raise UsageError(f"{str(path)!r} has an answer to {question!r}; give another --json, or --overwrite")


def add_answer(path: Path, question: str, answer: dict[str, Any]) -> None:
    """Writes {question: answer} into the file, beside the other questions in it."""
    write_json(path, {**_read_answers(path), question: answer})


def _read_answers(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        answers = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        answers = None
    if not isinstance(answers, dict):
        raise UsageError(f"{str(path)!r} was not written by benchmark.py; give another --json")
    return answers


def peak_memory() -> int:
    """Most bytes that this process has had in memory, without those of the one that started it."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
