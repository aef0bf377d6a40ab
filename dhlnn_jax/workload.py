"""The training problem that is timed: builds the library's step, in this process or a fresh one."""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from dhlnn_jax.config import Config, load_config, make_config
from dhlnn_jax.fitting import build_hedger, build_update, make_contract, rows_options
from dhlnn_jax.hedger import Hedger, batched_inputs
from dhlnn_jax.market import SIMULATORS, Sampler, make_simulation_sampler
from dhlnn_jax.nested import Update
from dhlnn_jax.pnl import Contract, contract_pnl
from dhlnn_jax.processes import LineProcess
from dhlnn_jax.runtime import path_mesh, prepare
from dhlnn_jax.settings import Settings
from dhlnn_jax.source import settings_of
from dhlnn_jax.timing import CompileClock, compile_clock, cores, peak_memory
from dhlnn_jax.train import (
    CURVATURES,
    OBJECTIVES,
    Objective,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
)

Params = Any
Answer = dict[str, Any]

METHOD = "dhntb"
FORMS = {"pieces": "always", "rows": "never"}  # what training.by_pieces is then


class Workload(NamedTuple):
    """A training problem with everything that its step is made of.

    Attributes:
      step: not yet jitted. init: seed -> state before the first epoch.
    """

    config: Config
    hedger: Hedger
    sample: Sampler
    contract: Contract
    objective: Objective
    settings: Settings
    update: Update
    step: TrainStep
    init: Callable[[int], TrainState]
    mesh: Mesh | None


def make_workload(
    config: Config,
    *,
    method: str = METHOD,
    chunk: int | None = None,
    n_devices: int | None = None,
    rate: ArrayLike | None = None,
    epochs: ArrayLike | None = None,
) -> Workload:
    """The one place that builds the library's training step.

    Args:
      chunk: rows at a time, 0: all at once, neither by pieces. n_devices: that share the paths. None: as
        `fitting` trains.
      rate, epochs: may be traced, as in `fitting.build_update`.
    """
    rows = rows_options(method, config, compiled_free=True)
    if chunk is not None:
        rows = {"chunk_size": chunk or None, "by_pieces": False}
    mesh = path_mesh(config.training.n_paths, devices=n_devices)
    hedger, update = build_hedger(method, config), build_update(method, config, rate, epochs)
    market, contract, objective = config.market, make_contract(config), OBJECTIVES[config.risk.kind]
    sample = make_simulation_sampler(SIMULATORS[market.kind], n_steps=market.n_steps, noise=market.noise)
    step = make_train_step(
        hedger,
        sample,
        contract,
        objective,
        update,
        n_paths=config.training.n_paths,
        curvature=CURVATURES.get(config.risk.kind),
        mesh=mesh,
        **rows,
    )
    return Workload(
        config=config,
        hedger=hedger,
        sample=sample,
        contract=contract,
        objective=objective,
        settings=settings_of(config),
        update=update,
        step=step,
        init=lambda seed: init_state(hedger, update, jax.random.key(seed)),
        mesh=mesh,
    )


class Program(NamedTuple):
    """A compiled step: `run` gives its state's buffers away; `place` lays arguments where it wants them."""

    run: Any
    place: Callable[[Any], Any]
    settings: Settings

    def train(self, state: TrainState, key: PRNGKeyArray, n_steps: int) -> tuple[TrainState, float]:
        """The state after `n_steps`, from a copy of the one given, and the seconds they took."""
        keys = self.place(list(jax.random.split(key, n_steps)))
        state = jax.block_until_ready(jax.tree.map(jnp.copy, self.place(state)))
        began = time.perf_counter()
        for key in keys:
            # One run in flight: with several, devices of a CPU have waited for each other for ever.
            state, _ = jax.block_until_ready(self.run(state, key, self.settings))
        return state, time.perf_counter() - began


def compiled(work: Workload) -> Program:
    """The workload's step, compiled ahead of time."""
    everywhere = None if work.mesh is None else NamedSharding(work.mesh, PartitionSpec())

    def place(tree: Any) -> Any:
        return tree if everywhere is None else jax.device_put(tree, everywhere)

    jitted = jax.jit(work.step, donate_argnums=0, out_shardings=everywhere)
    arguments = place((work.init(0), jax.random.key(0), work.settings))
    return Program(jitted.lower(*arguments).compile(), place, arguments[2])


def step_config(
    n_paths: int,
    *,
    hidden_sizes: Sequence[int] = (64, 64, 64, 64),
    clamp: str = "auto",
    form: str | None = None,
) -> Config:
    """Where hedging matters, by default at the paper's size: 30 steps, 4 x 64, entropic risk, Adam.

    Args:
      form: in which networks see their rows, one of `FORMS`; None: as in training.
    """
    return make_config(
        {
            "market": {"volatility": 0.2, "n_steps": 30},
            "cost": {"rate": 2e-3},
            "risk": {"risk_aversion": 50.0},
            "model": {"hidden_sizes": list(hidden_sizes), "clamp": clamp},
            "training": {
                "n_paths": n_paths,
                "learning_rate": 1e-3,
                "by_pieces": "auto" if form is None else FORMS[form],
            },
        }
    )


def live_rows(work: Workload, params: Params) -> float:
    """Share of the decisions on fresh paths whose outputs have a gradient that is not exactly zero."""

    @jax.jit
    def share(params: Params) -> Array:
        paths, _ = work.sample(jax.random.key(1), work.config.training.n_paths, work.settings)
        features, anchor = batched_inputs(work.hedger, paths, work.settings)
        raw = jax.vmap(work.hedger.outputs, (None, 0, 0))(params, features, anchor)

        def risk(raw: Array) -> Array:
            hedge_ratio = jax.vmap(work.hedger.position)(raw, anchor)
            money = jax.vmap(lambda path, h: contract_pnl(work.contract, path, h, work.settings))
            return work.objective(money(paths, hedge_ratio), work.settings)

        return jnp.mean(jnp.any(jax.grad(risk)(raw) != 0, axis=-1))

    return float(share(params))


def peers_problem(config: Config, *, as_ours: bool, seed: int = 0) -> dict[str, Any]:
    """What scripts/peers.py is told.

    Args:
      as_ours: our inputs, prior and learning rates, where the peer can have them, instead of its own.
    """
    training, plain = config.training, not as_ours
    return {
        "n_paths": training.n_paths,
        "n_steps": config.market.n_steps,
        "dt": config.market.years_per_step,
        "volatility": config.market.volatility,
        "strike": config.contract.strike,
        "cost_rate": config.cost.rate,
        "risk_aversion": config.risk.risk_aversion,
        "hidden_sizes": [64] * 4 if plain else list(config.model.hidden_sizes),
        "inputs": "plain" if plain else "standardised",
        "prior": not plain and config.model.prior == "whalley_wilmott",
        "learning_rate": 1e-3 if plain else training.learning_rate,
        "warmup": 0 if plain else training.warmup,
        "cosine_epochs": training.epochs if as_ours and training.schedule == "cosine" else None,
        "seed": seed,
        "threads": cores(),
    }


def own_process(n_devices: int | None, cache: str | None = None) -> LineProcess:
    """A fresh process that `serve`s.

    Args:
      n_devices: as in `runtime.prepare`. cache: folder for compiled programs; None keeps none.
    """
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false" if cache is None else "true"}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = cache
    code = f"from dhlnn_jax.workload import serve; serve({n_devices})"
    return LineProcess([sys.executable, "-c", code], environment)


def serve(n_devices: int | None) -> None:
    """Answers JSON requests, a line each, until stdin ends; what libraries print goes to stderr."""
    prepare(devices=n_devices)
    replies, sys.stdout = sys.stdout, sys.stderr
    served = _Served()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(served, request.pop("do"))(**request)
        print(json.dumps(answer), file=replies, flush=True)


class _Served:
    """The requests that `serve` knows, by name."""

    def compile(self, config: dict[str, Any], chunk: int | None, n_devices: int | None) -> Answer:
        with compile_clock() as clock:
            work = make_workload(make_config(config), chunk=chunk, n_devices=n_devices)
            self._program = compiled(work)
            self._state = work.init(0)
        return _answer(clock)

    def train(self, n_steps: int) -> Answer:
        return {"seconds": self._program.train(self._state, jax.random.key(1), n_steps)[1]}

    def memory(self) -> Answer:
        plan = self._program.run.memory_analysis()
        self.train(2)
        return {
            "temporaries": plan.temp_size_in_bytes,
            "outputs": plan.output_size_in_bytes,
            "resident": peak_memory(),
        }

    def quickstart(self, file: str) -> Answer:
        """One epoch of a configuration at its own sizes: all programs of a run, and not its time."""
        from dhlnn_jax.experiment import run

        with tempfile.TemporaryDirectory() as folder, compile_clock() as clock:
            run(load_config(file, ["--training.epochs", "1", "--out", f"{folder}/run"]))
        return _answer(clock)


def _answer(clock: CompileClock) -> Answer:
    return {"seconds": clock.seconds, "xla_seconds": clock.xla_seconds, "programs": clock.programs}
