"""Training: one compiled step on fresh paths, and the loop over epochs around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dhlnn_jax.hedger import Hedger, batched_inputs
from dhlnn_jax.market import Sampler
from dhlnn_jax.nested import Problem, Update
from dhlnn_jax.pnl import COST_MODELS, Contract, contract_pnl, turnover
from dhlnn_jax.risk import entropic_risk_measure, expected_shortfall, quadratic_risk
from dhlnn_jax.settings import Settings

Params = Any
Objective = Callable[[Array, Settings], Array]

OBJECTIVES: dict[str, Objective] = {
    "entropic": lambda pnl, s: entropic_risk_measure(pnl, risk_aversion=s.risk_aversion),
    "expected_shortfall": lambda pnl, s: expected_shortfall(pnl, tail_prob=s.tail_prob),
    "quadratic": lambda pnl, s: quadratic_risk(pnl, risk_aversion=s.risk_aversion),
}


class TrainState(NamedTuple):
    """What the next step needs: parameters, the update's state, epochs done."""

    params: Params
    update: Any
    epoch: Array


class TrainInfo(NamedTuple):
    """Diagnostics of one step, on its own fresh batch and the parameters before the update.

    Attributes:
      risk: training risk, money. gradient_norm: of its exact gradient.
      n_gradients: gradients with respect to the parameters taken.
      turnover: mean units traded a path; 0 means that nobody trades.
    """

    risk: Array
    gradient_norm: Array
    n_gradients: Array
    turnover: Array


TrainStep = Callable[[TrainState, PRNGKeyArray, Settings], tuple[TrainState, TrainInfo]]


def init_state(hedger: Hedger, update: Update, key: PRNGKeyArray) -> TrainState:
    """State before the first epoch."""
    params = jax.jit(hedger.init)(key)  # one compilation instead of one for each small operation
    return TrainState(params, update.init(params), jnp.asarray(0))


def make_train_step(
    hedger: Hedger,
    sample: Sampler,
    contract: Contract,
    objective: Objective,
    update: Update,
    *,
    n_paths: int = 10_000,
) -> TrainStep:
    """One epoch: fresh paths, one update. Pure; the caller jits it.

    Args:
      objective: `(pnl [n_paths], settings) -> risk`.
      n_paths: paths a step.
    Returns: `step(state, key, settings) -> (state, info)`.
    """
    exact = update.cost_surrogate == "absolute"
    surrogate = contract if exact else contract._replace(cost_model=COST_MODELS[update.cost_surrogate])

    def step(state: TrainState, key: PRNGKeyArray, settings: Settings) -> tuple[TrainState, TrainInfo]:
        paths, _ = sample(key, n_paths, settings)
        features, anchor = batched_inputs(hedger, paths, settings)

        def raw_outputs(params: Params) -> Array:
            return jax.vmap(hedger.outputs, (None, 0, 0))(params, features, anchor)

        def positions(raw: Array) -> Array:
            return jax.vmap(hedger.position)(raw, anchor)

        def pnl_of(contract: Contract, hedge_ratio: Array) -> Array:
            return jax.vmap(lambda path, h: contract_pnl(contract, path, h, settings))(paths, hedge_ratio)

        cut_at_raw = update.cut == "raw"

        def outputs(params: Params) -> Array:
            raw = raw_outputs(params)
            return raw if cut_at_raw else positions(raw)

        def hedge(outputs: Array) -> Array:
            return positions(outputs) if cut_at_raw else outputs

        problem = Problem(
            outputs=outputs,
            value=lambda y: pnl_of(contract, hedge(y)),
            risk=lambda pnl: objective(pnl, settings),
            surrogate_value=None if exact else lambda y: pnl_of(surrogate, hedge(y)),
        )
        params, update_state, info = update.apply(problem, state.params, state.update)
        mean_turnover = jnp.mean(jax.vmap(turnover)(hedge(info.outputs)))
        diagnostics = TrainInfo(info.risk, info.gradient_norm, info.n_gradients, mean_turnover)
        return TrainState(params, update_state, state.epoch + 1), diagnostics

    return step


class FitResult(NamedTuple):
    """What training leaves behind.

    Attributes:
      state: after the last epoch.
      best_params: parameters of the epoch with the smallest validation risk (the last without validation).
      best_epoch: epochs done when they were reached. best_risk: their validation risk, money.
    """

    state: TrainState
    best_params: Params
    best_epoch: int
    best_risk: float


def fit(
    step: TrainStep,
    state: TrainState,
    key: PRNGKeyArray,
    settings: Settings,
    *,
    n_epochs: int,
    on_epoch: Callable[[int, TrainState, TrainInfo], float | None] | None = None,
) -> FitResult:
    """Runs `step` until `n_epochs` epochs are done, with fresh paths from `fold_in(key, epoch)`.

    Args:
      step: from `make_train_step`, jitted by the caller.
      state: from `init_state`, or that of an earlier run: training goes on where it stopped (the best
        epoch is that of this call).
      on_epoch: called after each epoch with (epochs done, state, info); if it returns a validation risk,
        the parameters with the smallest one are kept.
    Raises: FloatingPointError naming the epoch if a validation risk is not finite.
    """
    best = FitResult(state, state.params, int(state.epoch), float("inf"))
    for epoch in range(int(state.epoch), n_epochs):
        state, info = step(state, jax.random.fold_in(key, epoch), settings)
        risk = None if on_epoch is None else on_epoch(epoch + 1, state, info)
        if risk is not None:
            if not jnp.isfinite(risk):
                raise FloatingPointError(f"validation risk is {risk} after epoch {epoch + 1}")
            if risk < best.best_risk:
                best = best._replace(best_params=state.params, best_epoch=epoch + 1, best_risk=float(risk))
    if best.best_risk == float("inf"):
        best = best._replace(best_params=state.params, best_epoch=n_epochs)
    return best._replace(state=state)
