"""Trains one configured method, with checkpoints, validation, measurements on the way and a progress bar."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray

from dhlnn_jax.checkpoint import load_tree, save_tree
from dhlnn_jax.config import Config
from dhlnn_jax.evaluate import (
    HedgedPaths,
    Measurement,
    as_report,
    hedged_paths,
    measure,
    standard_errors,
)
from dhlnn_jax.hedge import DELTAS
from dhlnn_jax.hedger import Hedger, Policy, policy_of
from dhlnn_jax.market import MarketPath
from dhlnn_jax.methods import METHODS, RuleOptions
from dhlnn_jax.nested import Update, nested_update, optax_update
from dhlnn_jax.optimal import solve_contract
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import COST_MODELS, Contract
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import write_json
from dhlnn_jax.runtime import path_mesh
from dhlnn_jax.settings import Settings
from dhlnn_jax.source import Source
from dhlnn_jax.train import OBJECTIVES, TrainInfo, TrainState, fit, init_state, make_train_step

Params = Any


class TrainedMethod(NamedTuple):
    """What training one method gave.

    Attributes:
      params: those to be measured (`evaluation.parameters`).
      curve: {"epoch", "risk", "turnover"} of every training batch, and {"validation_epoch",
        "validation_risk"}.
      history: metrics on the test paths after `evaluation.epochs`, and what had been spent by then.
      best_epoch: of the smallest validation risk.
      Others: counts and seconds for the whole training, resumed parts included.
    """

    params: Params
    curve: dict[str, list[float]]
    history: list[dict[str, Any]]
    best_epoch: int
    train_seconds: float
    compile_seconds: float
    paths_simulated: int
    gradient_evaluations: int


def build_hedger(name: str, config: Config) -> Hedger:
    """The trainable hedger of a method."""
    method, model = METHODS[name], config.model
    assert method.make_hedger is not None
    # The paper's lineage centres the band of a lookback on the European delta.
    default = "european_put" if config.contract.kind == "european_put" else "european_call"
    extra: dict[str, Any] = {"form": model.form} if method.recurrent else {"prior": model.prior}
    return method.make_hedger(
        features=model.features,
        hidden_sizes=model.hidden_sizes,
        centre=DELTAS[model.centre or default],
        centre_strike=model.centre_strike,
        **extra,
    )


def make_contract(config: Config) -> Contract:
    """The contract record of a configuration."""
    return Contract(
        CLAIMS[config.contract.kind],
        cost_model=COST_MODELS[config.cost.kind],
        liquidate=config.cost.liquidate,
        charge_half_spread=config.cost.charge == "half_spread",
    )


def build_policy(name: str, config: Config, market_settings: Settings) -> Policy:
    """The policy of any method, trained or not.

    Args:
      market_settings: of the market that is hedged in, for `optimal`.
    """
    make_rule = METHODS[name].make_rule
    if make_rule is None:
        return policy_of(build_hedger(name, config))
    rules, optimum = config.rules, None
    if name == "optimal":
        optimum = solve_contract(make_contract(config), market_settings, n_steps=config.market.n_steps)
    return make_rule(RuleOptions(config.contract.kind, rules.rebalance_every, rules.half_width, optimum))


def build_update(name: str, config: Config) -> Update:
    """How a method's parameters are moved."""
    training, nested = config.training, config.nested
    if not METHODS[name].nested:
        return optax_update(_optimizer(config, training.learning_rate))
    rate = nested.learning_rate or training.learning_rate
    return nested_update(
        _optimizer(config, rate),
        learning_rate=_schedule(config, rate),
        n_inner=nested.n_inner,
        tolerance=nested.tolerance,
        risk_weights=nested.risk_weights,
        cost_surrogate=nested.cost_surrogate,
        inner_update=nested.inner_update,
        linearization=nested.linearization,
    )


def _schedule(config: Config, rate: float) -> optax.Schedule:
    training = config.training
    after = max(training.epochs - training.warmup, 1)
    main = (
        optax.cosine_decay_schedule(rate, after)
        if training.schedule == "cosine"
        else optax.constant_schedule(rate)
    )
    if not training.warmup:
        return main
    # The first step has a rate above zero: (epoch + 1) / warmup of the full one.
    rising = optax.linear_schedule(rate / training.warmup, rate, max(training.warmup - 1, 1))
    return optax.join_schedules([rising, main], [training.warmup])


def _optimizer(config: Config, rate: float) -> optax.GradientTransformation:
    return getattr(optax, config.training.optimizer)(_schedule(config, rate))


_BLOCK_PATHS = 10_000


def evaluator(policy: Policy, contract: Contract) -> Callable[[Params, MarketPath, Settings], HedgedPaths]:
    """`hedged_paths` of one policy, in blocks of one size, so that any number of paths compiles once."""
    block = jax.jit(lambda params, paths, settings: hedged_paths(policy, params, paths, contract, settings))

    def evaluate(params: Params, paths: MarketPath, settings: Settings) -> HedgedPaths:
        n_paths = paths.spot.shape[0]
        size = min(_BLOCK_PATHS, n_paths)
        done = []
        for start in range(0, n_paths, size):
            # The last block is filled up with copies of the last path, which are cut off again.
            rows = np.minimum(np.arange(start, start + size), n_paths - 1)
            done.append(block(params, jax.tree.map(lambda x, rows=rows: x[rows], paths), settings))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n_paths], *done)

    return evaluate


def train_method(
    name: str,
    config: Config,
    source: Source,
    contract: Contract,
    key_init: PRNGKeyArray,
    key_train: PRNGKeyArray,
    key_validation: PRNGKeyArray,
    folder: Path,
    judge: Callable[[Measurement], dict[str, Any]] = lambda measurement: {},
) -> TrainedMethod:
    """Trains a method to `training.epochs`, going on from its last checkpoint in `folder` if there is one.

    Args:
      judge: adds to the measurements of `evaluation.epochs`, as the regret to the optimum.
    Raises: FloatingPointError naming method and epoch if its validation risk or parameters stop being
      finite.
    """
    training = config.training
    hedger, update = build_hedger(name, config), build_update(name, config)
    objective = OBJECTIVES[config.risk.kind]
    # A CPU is fastest on chunks that stay in its cache, an accelerator on everything at once.
    chunk_size = training.chunk_size or (500 if jax.default_backend() == "cpu" else None)
    mesh = path_mesh(training.n_paths, devices=training.devices)
    step = make_train_step(
        hedger, source.train, contract, objective, update,
        n_paths=training.n_paths, chunk_size=chunk_size, mesh=mesh,
    )  # fmt: skip
    evaluate = evaluator(policy_of(hedger), contract)

    objective_of = jax.jit(objective)
    validation_paths, _ = jax.jit(source.train, static_argnums=1)(
        key_validation, training.validation_paths, source.settings
    )
    state = init_state(hedger, update, key_init)
    checkpoints = _Checkpoints(folder / "checkpoints" / name)
    saved = checkpoints.latest(_Saved(state, state.params))
    log = saved.log if saved else _new_log()
    # The step gives its buffers away, so the best parameters need their own.
    state, best_params = saved.trees if saved else (state, jax.tree.map(jnp.copy, state.params))
    if mesh is not None:
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))

    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, key_train, source.settings).compile()
    log["compile_seconds"] += time.perf_counter() - began

    def timed_step(state: TrainState, key: PRNGKeyArray, settings: Settings):
        began = time.perf_counter()
        done = jax.block_until_ready(compiled(state, key, settings))
        log["train_seconds"] += time.perf_counter() - began
        return done

    def on_epoch(epoch: int, state: TrainState, info: TrainInfo) -> None:
        nonlocal best_params
        curve = log["curve"]
        curve["epoch"].append(epoch - 1)  # the batch's risk is that of the parameters before the update
        curve["risk"].append(float(info.risk))
        curve["turnover"].append(float(info.turnover))
        log["gradient_evaluations"] += int(info.n_gradients)
        if not info.finite:
            raise FloatingPointError(
                f"{name}: network outputs are not finite in epoch {epoch}; lower training.learning_rate = "
                f"{training.learning_rate:g} (last good checkpoint: {checkpoints.newest or 'none'})"
            )
        if epoch % training.validation_every == 0 or epoch == training.epochs:
            money = evaluate(_here(state.params), validation_paths, source.settings)
            risk = float(objective_of(money.pnl, source.settings))
            # A band whose edges are not a number never trades: its risk alone would look finite.
            sound = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))
            if not (sound and jnp.isfinite(risk)):
                what = f"validation risk is {risk}" if sound else "parameters are not finite"
                raise FloatingPointError(
                    f"{name}: {what} after epoch {epoch}; lower training.learning_rate "
                    f"(last good checkpoint: {checkpoints.newest or 'none'})"
                )
            curve["validation_epoch"].append(epoch)
            curve["validation_risk"].append(risk)
            if log["best_risk"] is None or risk < log["best_risk"]:
                log["best_risk"], log["best_epoch"] = risk, epoch
                best_params = jax.tree.map(jnp.copy, _here(state.params))
        if epoch in config.evaluation.epochs:
            measurement = measure(
                evaluate(_here(state.params), source.test, source.test_settings), source.test_settings
            )
            stderrs = standard_errors(measurement.influences, source.test_groups)
            spent = {name: log[name] for name in ("train_seconds", "gradient_evaluations")}
            metrics = as_report(measurement.values, stderrs)
            log["history"].append({"epoch": epoch, **spent, **metrics, **judge(measurement)})
        if epoch % training.checkpoint_every == 0 or epoch == training.epochs:
            checkpoints.save(epoch, _Saved(_here(state), best_params), log)
        advance(note=f"risk {curve['risk'][-1]:.5f}")

    with progress_bar(f"training {name}", training.epochs) as advance:
        advance(int(state.epoch))
        result = fit(
            timed_step, state, key_train, source.settings, n_epochs=training.epochs, on_epoch=on_epoch
        )

    last_params = _here(result.state.params)
    for which, params in (("best", best_params), ("last", last_params)):
        target = folder / "params" / name / which
        if not target.exists():
            save_tree(target, params)
    return TrainedMethod(
        params=best_params if config.evaluation.parameters == "best" else last_params,
        curve=log["curve"],
        history=log["history"],
        best_epoch=log["best_epoch"],
        train_seconds=log["train_seconds"],
        compile_seconds=log["compile_seconds"],
        paths_simulated=training.epochs * training.n_paths,
        gradient_evaluations=log["gradient_evaluations"],
    )


def _here(tree: Any) -> Any:
    """What all devices hold alike, from the first of them."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def _new_log() -> dict[str, Any]:
    names = ("epoch", "risk", "turnover", "validation_epoch", "validation_risk")
    return {
        "curve": {name: [] for name in names},
        "history": [],
        "best_risk": None,
        "best_epoch": 0,
        "train_seconds": 0.0,
        "compile_seconds": 0.0,
        "gradient_evaluations": 0,
    }


class _Saved(NamedTuple):
    state: TrainState
    best_params: Params


class _Restored(NamedTuple):
    trees: _Saved
    log: dict[str, Any]


class _Checkpoints:
    """Numbered checkpoints of one method; only a complete one counts, and older ones are removed after it."""

    def __init__(self, folder: Path):
        self._folder = folder

    def _complete(self) -> list[int]:
        found = (p.stem for p in self._folder.glob("*.json"))
        return sorted(int(stem) for stem in found if (self._folder / stem).is_dir())

    @property
    def newest(self) -> str | None:
        complete = self._complete()
        return str(self._folder / str(complete[-1])) if complete else None

    def save(self, epoch: int, trees: _Saved, log: dict[str, Any]) -> None:
        """The arrays first; the log beside them marks them as complete."""
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / str(epoch)
        if target.exists():
            shutil.rmtree(target)
        save_tree(target, trees)
        write_json(self._folder / f"{epoch}.json", log)
        for old in self._complete()[:-1]:
            (self._folder / f"{old}.json").unlink()
            shutil.rmtree(self._folder / str(old))

    def latest(self, like: _Saved) -> _Restored | None:
        if self.newest is None:
            return None
        trees = load_tree(Path(self.newest), like)
        return _Restored(trees, json.loads(Path(f"{self.newest}.json").read_text()))
