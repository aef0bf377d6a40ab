"""Training: one step on fresh paths, a block of them in one program, and the loop over epochs around them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from dhlnn_jax.hedger import Hedger, batched_inputs
from dhlnn_jax.linearize import Linearization, linearize_at
from dhlnn_jax.market import Sampler
from dhlnn_jax.nested import Problem, Update
from dhlnn_jax.piece_network import PieceNetwork, has_pieces
from dhlnn_jax.pnl import COST_MODELS, Contract, contract_pnl, turnover
from dhlnn_jax.risk import entropic_risk_measure, expected_shortfall, quadratic_risk
from dhlnn_jax.row_network import RowNetwork, shared
from dhlnn_jax.settings import Settings

Params = Any
Objective = Callable[[Array, Settings], Array]

OBJECTIVES: dict[str, Objective] = {
    "entropic": lambda pnl, s: entropic_risk_measure(pnl, risk_aversion=s.risk_aversion),
    "expected_shortfall": lambda pnl, s: expected_shortfall(pnl, tail_prob=s.tail_prob),
    "quadratic": lambda pnl, s: quadratic_risk(pnl, risk_aversion=s.risk_aversion),
}

# Second derivative of an objective to the PnL of each path, but for the rank-one part that all paths share.
CURVATURES: dict[str, Objective] = {
    "entropic": lambda pnl, s: s.risk_aversion * jax.nn.softmax(-s.risk_aversion * pnl),
    "quadratic": lambda pnl, s: jnp.full_like(pnl, s.risk_aversion / pnl.shape[0]),
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
      finite: whether all outputs of the network were.
      n_rises: inner steps in a row that raised the linearized objective, see `nested.UpdateInfo`.
    """

    risk: Array
    gradient_norm: Array
    n_gradients: Array
    turnover: Array
    finite: Array
    n_rises: Array


TrainStep = Callable[[TrainState, PRNGKeyArray, Settings], tuple[TrainState, TrainInfo]]


def init_state(hedger: Hedger, update: Update, key: PRNGKeyArray) -> TrainState:
    """State before the first epoch."""
    params = jax.jit(hedger.init)(key)  # one compilation instead of one for each small operation
    return first_state(params, update)


def first_state(params: Params, update: Update) -> TrainState:
    """State before the first epoch, from given parameters."""
    return TrainState(params, update.init(params), jnp.asarray(0))


def make_train_step(
    hedger: Hedger,
    sample: Sampler,
    contract: Contract,
    objective: Objective,
    update: Update,
    *,
    n_paths: int = 10_000,
    curvature: Objective | None = None,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    by_pieces: bool = False,
) -> TrainStep:
    """One epoch: fresh paths, one update. Pure; the caller jits it.

    Args:
      objective: `(pnl [n_paths], settings) -> risk`.
      n_paths: paths a step.
      curvature: of the objective, from `CURVATURES`, for updates that solve with it.
      chunk_size: decisions that go through the network at a time, see `rows.in_chunks`; None: all at once.
      mesh: devices that share the paths evenly, over its one axis; the state is the same on all of them. On a
        CPU, wait for one step (`jax.block_until_ready`) before the next: two in flight can deadlock.
      by_pieces: networks that are piecewise linear in the moneyness, on paths of spots alone, go through in
        two rows a piece instead of one a decision, see `piece_network`; others go through as ever.
    Returns: `step(state, key, settings) -> (state, info)`.
    Raises: ValueError for by_pieces without a chunk_size.
    Numerics: results are the same for every chunk_size, mesh and by_pieces, to rounding.
    """
    if by_pieces and chunk_size is None:
        raise ValueError("by_pieces needs a chunk_size: without one all rows go through at once")
    exact = update.cost_surrogate == "absolute"
    surrogate = contract if exact else contract._replace(cost_model=COST_MODELS[update.cost_surrogate])

    def step(state: TrainState, key: PRNGKeyArray, settings: Settings) -> tuple[TrainState, TrainInfo]:
        paths = shared(sample(key, n_paths, settings)[0], mesh)
        features, anchor = shared(batched_inputs(hedger, paths, settings), mesh)
        rows = RowNetwork(hedger, features, anchor, chunk_size, mesh)
        cut_up = by_pieces and has_pieces(hedger, paths, settings)
        network = PieceNetwork(rows, paths, settings) if cut_up else rows

        def positions(raw: Array) -> Array:
            return jax.vmap(hedger.position)(raw, anchor)

        def pnl_of(contract: Contract, hedge_ratio: Array) -> Array:
            return jax.vmap(lambda path, h: contract_pnl(contract, path, h, settings))(paths, hedge_ratio)

        cut_at_raw = update.cut == "raw"

        def beside(raw: Array) -> tuple[Array, Array]:
            return raw, positions(raw)

        def outputs(params: Params) -> Any:
            raw = network.outputs(params)
            return raw if cut_at_raw else beside(raw)

        def linearize(params: Params) -> Linearization:
            raw = network.linearize(params)
            if cut_at_raw:
                return raw
            both = linearize_at(beside, raw.value)
            return Linearization(both.value, lambda t: both.jvp(raw.jvp(t)), lambda c: raw.vjp(both.vjp(c)))

        def hedge(outputs: Any) -> Array:
            return positions(outputs) if cut_at_raw else outputs[1]

        problem = Problem(
            outputs=outputs,
            value=lambda y: pnl_of(contract, hedge(y)),
            risk=lambda pnl: objective(pnl, settings),
            surrogate_value=None if exact else lambda y: pnl_of(surrogate, hedge(y)),
            linearize=linearize,
            risk_curvature=None if curvature is None else lambda pnl: curvature(pnl, settings),
            inputs=None if hedger.output_layer is None else rows.inputs,
            row_moments=rows.row_moments,
        )
        params, update_state, info = update.apply(problem, state.params, state.update)
        mean_turnover = jnp.mean(jax.vmap(turnover)(hedge(info.outputs)))
        finite = jnp.all(jnp.isfinite(info.outputs if cut_at_raw else info.outputs[0]))
        diagnostics = TrainInfo(
            info.risk, info.gradient_norm, info.n_gradients, mean_turnover, finite, jnp.asarray(info.n_rises)
        )
        return TrainState(params, update_state, state.epoch + 1), diagnostics

    return step


TrainBlock = Callable[[TrainState, PRNGKeyArray, Settings, ArrayLike], tuple[TrainState, TrainInfo]]


def make_train_block(step: TrainStep, *, max_epochs: int) -> TrainBlock:
    """Several epochs in one program: the numbers of `fit`, without going back to the host in between.

    Args:
      step: from `make_train_step`.
      max_epochs: the most that a block may have; diagnostics take their room from it.
    Returns: `block(state, key, settings, n_epochs) -> (state, infos)`, pure, with fresh paths from
      `fold_in(key, epoch)` where `epoch` counts from the state's. n_epochs may be traced, so that one
      compilation serves every block; infos are [max_epochs], zero and False from n_epochs on.
    Numerics: a diagnostic that is not finite stops nothing inside a block; the caller looks at infos.
    """

    def block(state: TrainState, key: PRNGKeyArray, settings: Settings, n_epochs: ArrayLike):
        @partial(jax.jit, inline=True)  # traced once for its shapes and for the loop
        def one(state: TrainState) -> tuple[TrainState, TrainInfo]:
            return step(state, jax.random.fold_in(key, state.epoch), settings)

        def epoch(i: Array, carry: tuple[TrainState, TrainInfo]) -> tuple[TrainState, TrainInfo]:
            state, info = one(carry[0])
            return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), carry[1], info)

        shapes = jax.eval_shape(one, state)[1]
        infos = jax.tree.map(lambda like: jnp.zeros((max_epochs, *like.shape), like.dtype), shapes)
        return jax.lax.fori_loop(0, jnp.minimum(n_epochs, max_epochs), epoch, (state, infos))

    return block


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
    Raises: FloatingPointError naming the epoch if outputs of the network, parameters or a validation risk are
      not finite.
    Numerics: the outputs of an epoch are looked at while the next one runs.
    """
    best = FitResult(state, state.params, int(state.epoch), float("inf"))
    finite: Array | bool = True
    for epoch in range(int(state.epoch), n_epochs):
        state, info = step(state, jax.random.fold_in(key, epoch), settings)
        if not finite:
            raise FloatingPointError(f"network outputs are not finite in epoch {epoch}")
        finite = info.finite
        risk = None if on_epoch is None else on_epoch(epoch + 1, state, info)
        if risk is not None:
            if not jnp.isfinite(risk):
                raise FloatingPointError(f"validation risk is {risk} after epoch {epoch + 1}")
            if risk < best.best_risk:
                best = best._replace(best_params=state.params, best_epoch=epoch + 1, best_risk=float(risk))
    leaves = jax.tree.leaves(state.params)
    if not finite or not all(jnp.all(jnp.isfinite(leaf)) for leaf in leaves):
        raise FloatingPointError(f"network outputs or parameters are not finite after epoch {n_epochs}")
    if best.best_risk == float("inf"):
        best = best._replace(best_params=state.params, best_epoch=n_epochs)
    return best._replace(state=state)
