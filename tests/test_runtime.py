"""Devices, processes and caches: the same training on one device, on two, and over two processes of two."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dhlnn_jax import runtime
from dhlnn_jax.command_line import main
from dhlnn_jax.errors import UsageError

TRAIN = """
import json, re, sys
from dhlnn_jax import runtime
coordinator, n_processes, process, devices, chunk, by_pieces = sys.argv[1], *map(int, sys.argv[2:])
runtime.prepare(devices=devices)
if n_processes > 1:
    runtime.join(coordinator, n_processes=n_processes, process=process)
import jax, optax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from dhlnn_jax import make_settings
from dhlnn_jax.hedger import make_band_hedger
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.nested import nested_update
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract
from dhlnn_jax.train import OBJECTIVES, init_state, make_train_step
jax.config.update("jax_disable_most_optimizations", True)
settings = make_settings(n_steps=5, cost_rate=5e-3, risk_aversion=50.0, dt=6 / 365)
hedger = make_band_hedger(
    features=("standardised_log_moneyness", "standardised_time_to_maturity"), hidden_sizes=(8,)
)
update = nested_update(optax.adam(1e-3), learning_rate=1e-3, n_inner=2)
mesh = runtime.path_mesh(256)
sample = make_simulation_sampler(SIMULATORS["gbm"], n_steps=5)
contract, objective = Contract(CLAIMS["european_call"]), OBJECTIVES["entropic"]
rows = {"n_paths": 256, "chunk_size": chunk or None, "mesh": mesh, "by_pieces": bool(by_pieces)}
step = jax.jit(make_train_step(hedger, sample, contract, objective, update, **rows))
state = init_state(hedger, update, jax.random.key(0))
if mesh is not None:
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
program = step.lower(state, jax.random.key(1), settings).compile().as_text()
words = re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?[(]", program)
for epoch in range(2):
    state, info = step(state, jax.random.fold_in(jax.random.key(1), epoch), settings)
params = [x.addressable_data(0).ravel().tolist() for x in jax.tree.leaves(state.params)]
numbers = {"devices": jax.device_count(), "risk": float(info.risk), "params": sum(params, [])}
numbers["collectives"] = sorted(set(words))
print(json.dumps({**numbers, "gradient_norm": float(info.gradient_norm)}))
"""


@functools.cache
def trained(n_processes, devices, chunk=50, by_pieces=0):
    """What every process printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, coordinator]
            + [str(number) for number in (n_processes, process, devices, chunk, by_pieces)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(n_processes)
    ]
    printed = []
    for job in jobs:
        out, err = job.communicate(timeout=300)
        assert job.returncode == 0, err
        printed.append(json.loads(out.strip().splitlines()[-1]))
    return printed


@pytest.mark.parametrize("by_pieces", [0, 1])
def test_training_is_the_same_on_two_processes_of_two_devices(by_pieces):
    (single,) = trained(1, 1)
    assert single["devices"] == 1
    for shared in trained(2, 2, by_pieces=by_pieces):
        assert shared["devices"] == 4
        for name in ("risk", "gradient_norm", "params"):
            assert shared[name] == pytest.approx(single[name], rel=2e-5, abs=1e-6), name


def test_training_is_the_same_where_the_compiler_shares_all_paths_out():
    (single,), (shared,) = trained(1, 1), trained(1, 2, chunk=0)
    assert shared["devices"] == 2 and single["collectives"] == []
    assert shared["collectives"] == ["all-reduce"]  # sums are all that devices tell each other
    for name in ("risk", "gradient_norm", "params"):
        assert shared[name] == pytest.approx(single[name], rel=2e-5, abs=1e-6), name


def test_mesh_takes_as_many_devices_as_divide_the_paths():
    assert runtime.path_mesh(100, devices=1) is None
    n_devices = len(jax.devices())
    mesh = runtime.path_mesh(12 * n_devices)
    assert (mesh is None) if n_devices == 1 else mesh.shape == {"paths": n_devices}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--coordinator", "localhost:1"], "--coordinator HOST:PORT --processes N --process I"),
        (["--coordinator", "localhost:1", "--processes", "two", "--process", "0"], "--processes N"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "2"], "must be from 0 to 1"),
        (["--resume", "--coordinator", "localhost:1", "--processes", "2", "--process", "0"], "one process"),
    ],
)  # fmt: skip
def test_mistakes_about_processes_are_one_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "prepare", lambda **_: None)
    assert main("run", ["configs/smoke.toml", "--out", str(tmp_path / "run"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_processes_out_of_range_are_refused():
    with pytest.raises(UsageError, match="--process must be from 0 to 0"):
        runtime.join("localhost:1", n_processes=1, process=1)


def test_importing_the_package_starts_no_jax():
    folder = Path(runtime.__file__).parent
    names = [f"dhlnn_jax.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__"]
    code = (
        f"import importlib; [importlib.import_module(name) for name in {names}]; "
        "from dhlnn_jax import runtime; runtime.prepare(devices=3); import jax; print(jax.device_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["3"], done.stderr  # started, it would have one device, and join no other


def test_programs_are_kept_in_the_users_cache(tmp_path):
    code = (
        "from dhlnn_jax import runtime; runtime.prepare(devices=1); import jax; "
        "print(jax.config.values['jax_compilation_cache_dir'], jax.device_count(), "
        "jax.config.values['jax_persistent_cache_min_compile_time_secs'])"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
    out = run([sys.executable, "-c", code], env={**environment, "JAX_PLATFORMS": "cpu"}).stdout
    assert out.split() == [str(tmp_path / "dhlnn_jax" / "programs"), "1", "0.0"]
    kept = {**environment, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    assert run([sys.executable, "-c", code], env=kept).stdout.split() == ["elsewhere", "1", "0.0"]
    own = {**kept, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "3"}
    assert run([sys.executable, "-c", code], env=own).stdout.split() == ["elsewhere", "1", "3.0"]
    code = "from dhlnn_jax import runtime, traces; runtime.prepare(devices=1); print(traces._folder)"
    assert run([sys.executable, "-c", code], env=kept).stdout.split() == [
        str(tmp_path / "dhlnn_jax" / "traces")
    ]
    without = {**kept, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    assert run([sys.executable, "-c", code], env=without).stdout.split() == ["None"]
