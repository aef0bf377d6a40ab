"""What a script settles before JAX starts: devices, processes, and what is kept of its programs."""

import os
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

from dhlnn_jax import traces
from dhlnn_jax.errors import UsageError


def cache_folder() -> Path:
    """The user's cache folder of this package."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dhlnn_jax"


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # those that this process may use; not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def prepare(*, devices: int | None = None) -> None:
    """Keeps traced and compiled programs between runs, and makes a CPU as many devices as are asked for.

    Args:
      devices: on a CPU; None: one for each core. An accelerator's are counted by JAX.
    Numerics: does nothing to devices once JAX has started. JAX's environment variables
      for its cache are kept where they are set; one that turns it off turns off that of traces, too.
    """
    ours = {
        "jax_compilation_cache_dir": str(cache_folder() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,  # small programs are the most
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for option, value in ours.items():
        if option.upper() not in os.environ:
            jax.config.update(option, value)
    keeps = jax.config.values["jax_enable_compilation_cache"]
    traces.keep_in(cache_folder() / "traces" if keeps else None)
    try:
        jax.config.update("jax_num_cpu_devices", devices or _n_cores())
    except RuntimeError:
        pass  # JAX has started, with the devices that it has


def join(coordinator: str, *, n_processes: int, process: int) -> None:
    """Makes this process one of several that train together, each running the same script.

    Args:
      coordinator: "host:port" of process 0, free to be listened on. process: 0 to n_processes - 1.
    Raises: UsageError for numbers out of range.
    """
    if not 0 <= process < n_processes:
        raise UsageError(f"--process must be from 0 to {n_processes - 1} (--processes less 1), got {process}")
    jax.distributed.initialize(coordinator, n_processes, process)


def path_mesh(n_paths: int, *, devices: int | None = None) -> Mesh | None:
    """A mesh of devices that share n_paths evenly, along its axis "paths"; None for a single one.

    Args:
      devices: at most; None: all there are. Fewer are taken where they do not divide n_paths.
    """
    available = jax.devices()[:devices]
    n_devices = max(n for n in range(1, len(available) + 1) if n_paths % n == 0)
    return _mesh(available[:n_devices], "paths")


def member_mesh(n_members: int, *, devices: int | None = None) -> Mesh | None:
    """A mesh of all devices that share n_members evenly, along its axis "members"; None if they cannot.

    Members need nothing of each other, so that this beats sharing the paths of each wherever it is possible.
    Several processes share paths instead: every one of them then holds all that it writes and prints.

    Args:
      devices: at most; None: all there are.
    """
    available = jax.devices()[:devices]
    if n_members % len(available) or jax.process_count() > 1:
        return None
    return _mesh(available, "members")


def _mesh(devices: list[jax.Device], axis: str) -> Mesh | None:
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), (axis,), axis_types=(AxisType.Auto,), devices=devices)
