"""What XLA makes of a training step for a GPU: kernels and memory traffic, counted in the compiled program.

No GPU need be there: JAX's CUDA plugin compiles for one that is described to it. Nothing here is a time.
"""

import argparse
import re
import time
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from dhlnn_jax.config import Config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.methods import METHODS
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.workload import Answer, make_workload, step_config

# NVIDIA's data sheet and CUDA's limits for compute capability 9.0, in the form that XLA reads.
_BANDWIDTH = 3.35e12  # bytes a second
_H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {int(_BANDWIDTH)} l2_cache_size: 52428800 device_memory_size: 84942979072
  cuda_compute_capability {{ major: 9 }}
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0" device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)")
_ARRAY = re.compile(r"([a-z]+)(\d*)\[([\d,]*)\]")
_NO_KERNEL = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "after-all",
    "all-reduce-done",
}


class Kernels(NamedTuple):
    """Kernels of a program.

    Attributes:
      launched: their number. gigabytes: that they read and write, every array once for each kernel that
        takes or gives it, whether or not a cache holds it; None where a loop hides how much of an array.
    """

    launched: int
    gigabytes: float | None


def count_kernels(program: str) -> Kernels:
    """Kernels of a compiled program.

    Args:
      program: `jax.stages.Compiled.as_text()`. The body of a loop counts as often as it runs, or once where
        that is not known; its condition is left out.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        lines.append(line)

    def walk(name: str) -> tuple[int, float, bool]:
        launched, moved, whole, sizes = 0, 0.0, True, {}
        for line in computations[name]:
            if (found := _INSTRUCTION.match(line)) is None:
                continue
            result, kind, operation, rest = found.groups()
            sizes[result] = _n_bytes(kind)
            if operation in ("while", "call"):
                inner = re.search(r"(?:body|to_apply)=%?([\w.-]+)", rest)
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
                times = int(trips[1]) if trips else 1
                assert inner is not None
                inner_launched, inner_moved, inner_whole = walk(inner[1])
                launched, moved = launched + times * inner_launched, moved + times * inner_moved
                whole = whole and inner_whole and times == 1
            elif operation not in _NO_KERNEL:
                operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
                launched, moved = launched + 1, moved + sizes[result] + sum(sizes[x] for x in operands)
        return launched, moved, whole

    launched, moved, whole = walk(entry)
    return Kernels(launched, moved / 1e9 if whole else None)


def _n_bytes(kind: str) -> float:
    total = 0.0
    for letters, bits, shape in _ARRAY.findall(kind):
        size = (int(bits) if bits else 8) / 8 if letters != "pred" else 1
        for extent in shape.split(",") if shape else ():
            size *= int(extent)
        total += size
    return total


def program(options: argparse.Namespace) -> Answer:
    """Kernels and memory traffic of a training step as compiled for an H100, which need not be there."""
    where = SingleDeviceSharding(_described_h100())
    asked = {
        name if METHODS[name].recurrent else f"{name}, {clamp}": (name, clamp)
        for name, method in METHODS.items()
        for clamp in ("parallel", "scan")
        if method.trained
    }
    rows: dict[str, Answer] = {}
    with progress_bar("compiling", len(asked)) as advance:
        for row, (name, clamp) in asked.items():
            rows[row] = _counted(name, step_config(options.n_paths, clamp=clamp), where)
            advance(note=row)
    print(f"{'':32}{'kernels':>11}{'GB moved':>11}{'ms, memory':>11}{'MiB kept':>11}")
    for row, numbers in rows.items():
        moved, bound = numbers["gigabytes"], numbers["milliseconds_of_memory"]
        cells = "".join(f"{'':>11}" if x is None else f"{x:11.3g}" for x in (moved, bound))
        print(f"{row:32}{numbers['median']:11d}{cells}{numbers['temporaries'] / 2**20:11.4g}")
    return {"ours": {**next(iter(rows.values())), "by_program": rows}}


def _described_h100() -> jax.Device:
    try:
        return topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x1").devices[0]
    except (NotImplementedError, RuntimeError) as error:
        raise UsageError(
            "JAX has no compiler for NVIDIA GPUs here: pip install 'dhlnn_jax[cuda]', and without "
            f"a GPU set JAX_PLATFORMS=cpu ({str(error).splitlines()[0]})"
        ) from None


def _counted(method: str, config: Config, where: SingleDeviceSharding) -> Answer:
    work = make_workload(config, method=method, chunk=0, n_devices=1)
    arguments = jax.eval_shape(lambda: (work.init(0), jax.random.key(0), work.settings))
    jitted = jax.jit(work.step, in_shardings=where, out_shardings=where, donate_argnums=0)
    began = time.perf_counter()
    compiled = jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    seconds = time.perf_counter() - began
    launched, gigabytes = count_kernels(compiled.as_text())
    return {
        **dict.fromkeys(("median", "min", "max"), launched),
        "unit": "kernels",
        "gigabytes": gigabytes,
        "milliseconds_of_memory": None if gigabytes is None else 1e12 * gigabytes / _BANDWIDTH,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }
