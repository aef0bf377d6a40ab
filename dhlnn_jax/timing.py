"""What scripts/benchmark.py measures with: repeats, compilations, the machine, other processes, JSON."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from dhlnn_jax.errors import UsageError
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import machine, write_json
from dhlnn_jax.runtime import cache_folder

PEER_PACKAGES = ("torch==2.13.0", "pfhedge==0.23.0")  # pfhedge pins numpy 1.26: never in the same environment
PEERS = ("pfhedge", "torch_loop")  # names in scripts/peers.py
_PEERS_SCRIPT = Path(__file__).parents[1] / "scripts" / "peers.py"


def spread(samples: Sequence[float], unit: str) -> dict[str, Any]:
    """{"median", "min", "max", "unit", "repeats"}; an infinite sample (never reached) becomes None."""

    def plain(x: float) -> float | None:
        return float(x) if np.isfinite(x) else None

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
    """

    def __init__(self) -> None:
        self.programs = 0
        self._spans: list[tuple[float, float]] = []

    def note(self, event: str, duration: float) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._spans.append((now - duration, now))
            self.programs += event.endswith("backend_compile_duration")

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


class LineProcess:
    """A process that answers one JSON line for each JSON line that it is asked.

    Raises: UsageError, with the last line of its stderr, where it ends instead of answering.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        self._name = Path(command[0]).name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.strip():
                self._errors[:] = [*self._errors[-20:], line.strip()]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self._process.wait()
            self._reader.join(1.0)
            last = self._errors[-1] if self._errors else "no message"
            raise UsageError(f"{self._name} process ended: {last}")
        return json.loads(reply)

    def close(self) -> None:
        """Its input ends, and so does it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._reader.join(1.0)
        self._process.stdout.close()

    def __enter__(self) -> "LineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peers_folder() -> Path:
    """Where the peers' virtual environment is kept."""
    return cache_folder() / "peers"


def make_peers(folder: Path) -> Path:
    """Python of a virtual environment that has the peers, made if it is not there yet.

    Raises: UsageError in one line if it cannot be had.
    """
    python, finished = folder / "bin" / "python", folder / "finished"
    if finished.exists():
        return python
    torch, pfhedge = PEER_PACKAGES
    print(f"making the peers' environment in {folder} (a few minutes, 1 GB)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    reason = "no virtual environment"
    try:
        _call([sys.executable, "-m", "venv", str(folder)])
        # The processor's build where it is to be had, else the default one, which brings a GPU's libraries.
        index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "0"]
        for wanted in ([f"{torch}+cpu"], [f"{torch}+cpu", *index], [torch]):
            reason = _call([str(python), "-m", "pip", "install", "--quiet", pfhedge, *wanted])
            if not reason:
                finished.touch()
                return python
    except OSError as error:
        reason = str(error)
    raise UsageError(f"cannot install {' and '.join(PEER_PACKAGES)}: {reason}")


def _call(command: list[str]) -> str:
    """Nothing if the command succeeds, else the last line of what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.returncode:
        return ""
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]


@contextmanager
def peers_process(wanted: bool, python: Path | None) -> Iterator[LineProcess | None]:
    """The running scripts/peers.py; None, after one line on stderr, where there are no peers.

    Args:
      python: one that has torch and pfhedge; None makes `peers_folder`.
    """
    process = None
    if wanted:
        try:
            if not _PEERS_SCRIPT.exists():
                raise UsageError(f"{_PEERS_SCRIPT} is not there: benchmark from a checkout")
            process = LineProcess([str(python or make_peers(peers_folder())), str(_PEERS_SCRIPT)])
            process.ask(do="versions")
        except (UsageError, OSError) as error:
            print(f"no peers: {error}", file=sys.stderr)
            process = None
    try:
        yield process
    finally:
        if process is not None:
            process.close()


def peak_memory() -> int:
    """Most bytes that this process has had in memory, without those of the one that started it."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
