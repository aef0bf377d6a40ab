"""A hedger measured along its training: the quantities of the paper's section 4.3 and appendix D."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from dhlnn_jax.appendix_d import gradient_bound, hessian_bound, output_layer_fixed, perceptron_constants
from dhlnn_jax.files import plain
from dhlnn_jax.hedger import Anchor, Hedger, batched_inputs
from dhlnn_jax.market import MarketPath, Sampler
from dhlnn_jax.nested import CostSurrogate, Problem, Update
from dhlnn_jax.nonlinearity import (
    gradient_drift,
    gradient_drift_bound,
    gradient_norms,
    hessian_norms,
    linearization_error,
    log_slope,
)
from dhlnn_jax.pnl import COST_MODELS, Contract, contract_pnl, trades
from dhlnn_jax.settings import Settings
from dhlnn_jax.train import Objective, TrainState

Params = Any

STEP_SIZES = tuple(2.0**k for k in range(-8, 4))
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)


# --- problems and updates -----------------------------------------------------------------------------


def zero_gradient_share(problem: Problem, params: Params, *, n_row_axes: int) -> Float[Array, ""]:
    """Share of rows of the outputs whose gradient of the risk is exactly zero, in [0, 1].

    Args:
      n_row_axes: leading axes of every leaf of the outputs that count rows (2: paths and steps).
    Numerics: the raw widths of a step inside its band have no effect, hence the zero. A path outside the
      tail of an expected shortfall, or of an entropic weight below rounding, has zeros at every step too.
    """
    outputs = problem.outputs(params)
    gradient = jax.grad(lambda y: problem.risk(problem.value(y)))(outputs)
    moves = [jnp.any(g.reshape(*g.shape[:n_row_axes], -1) != 0, axis=-1) for g in jax.tree.leaves(gradient)]
    return 1.0 - jnp.mean(jnp.any(jnp.stack(moves), axis=0), dtype=float)


def inner_step_norms(
    update_of: Callable[[int], Update], problem: Problem, params: Params, state: Any, *, n_steps: int
) -> tuple[Float[Array, " n_steps"], list[Params]]:
    """||w_j - w_(j-1)|| for the inner iterations j = 1..n_steps of one outer iteration, and all w_j.

    Args:
      update_of: number of inner steps -> update, tolerance 0. state: that of the update before it.
    Numerics: runs the update n_steps times from the start, n_steps^2 / 2 inner steps in all.
    Source: paper Algorithm 1, line 8.
    """
    ends = [update_of(n).apply(problem, params, state)[0] for n in range(1, n_steps + 1)]
    steps = [
        jax.tree.map(jnp.subtract, after, before)
        for before, after in zip([params, *ends[:-1]], ends, strict=True)
    ]
    return jnp.stack([optax.global_norm(step) for step in steps]), ends


def inner_steps_allowed(step_norms: Float[ArrayLike, " n_steps"], tolerance: Float[ArrayLike, ""]) -> int:
    """Inner steps taken before a tolerance stops them: up to the first whose norm is below it, or all."""
    below = np.flatnonzero(np.asarray(step_norms) < tolerance)
    return int(below[0]) + 1 if below.size else int(np.size(step_norms))


def hedging_problem(
    hedger: Hedger,
    paths: MarketPath,
    contract: Contract,
    objective: Objective,
    settings: Settings,
    *,
    cut: Literal["raw", "hedge_ratio"] = "raw",
    cost_surrogate: CostSurrogate = "absolute",
) -> Problem:
    """The problem that one training step poses on these paths.

    Args:
      paths: a batch of whole paths. cut, cost_surrogate: those of the `Update`.
    """
    features, anchor = batched_inputs(hedger, paths, settings)

    def positions(raw: Array) -> Array:
        return jax.vmap(hedger.position)(raw, anchor)

    def outputs(params: Params) -> Array:
        raw = jax.vmap(hedger.outputs, (None, 0, 0))(params, features, anchor)
        return raw if cut == "raw" else positions(raw)

    def value_of(contract: Contract) -> Callable[[Array], Array]:
        def value(y: Array) -> Array:
            ratios = positions(y) if cut == "raw" else y
            return jax.vmap(lambda path, h: contract_pnl(contract, path, h, settings))(paths, ratios)

        return value

    surrogate = None
    if cost_surrogate != "absolute":
        surrogate = value_of(contract._replace(cost_model=COST_MODELS[cost_surrogate]))
    return Problem(outputs, value_of(contract), lambda pnl: objective(pnl, settings), surrogate)


# --- along training -----------------------------------------------------------------------------------


def make_diagnostics(
    hedger: Hedger,
    sample: Sampler,
    contract: Contract,
    objective: Objective,
    settings: Settings,
    key: PRNGKeyArray,
    *,
    update_of: Callable[[int], Update],
    n_inner: int = 5,
    n_inner_shown: int = 8,
    n_paths: int = 2_000,
    n_row_paths: int = 4,
    n_iterations: int = 20,
    step_sizes: Sequence[float] = STEP_SIZES,
    tolerances: Sequence[float] = TOLERANCES,
) -> Callable[[Sequence[TrainState]], dict[str, Any]]:
    """All the diagnostics at some epochs of a training, every training on the same fresh paths.

    The step looked at is the whole outer iteration of n_inner inner steps from each state.

    Args:
      key: of the paths and of the power iterations.
      update_of: number of inner steps -> the update that training used, tolerance 0.
      n_inner_shown: inner steps whose norms are measured, at least n_inner.
      n_row_paths: paths whose every output has its gradient and Hessian measured, one by one.
      step_sizes: multiples of the step.
    Returns: `diagnostics(states) -> numbers`, compiled once for all trainings; states are those of one
      training after the epochs to be looked at. The numbers are ready for JSON: lists over epochs, "epoch"
      first; curves have an inner list, over "step_sizes" or inner steps.
      "..._slope": of log error over log step size, up to the whole step. "..._max": over the outputs
      measured one by one. Bounds are None for hedgers that see their previous position: theirs is not the
      network of appendix D. Not a number is None too.
    Raises: ValueError if n_inner_shown is below n_inner.
    Numerics: paths as in training, everything after them in float64.
    """
    if n_inner_shown < n_inner:
        raise ValueError(f"n_inner_shown must be at least n_inner = {n_inner}, got {n_inner_shown}")
    key_paths, key_hessian = jax.random.split(key)
    drawn, _ = sample(key_paths, n_paths, settings)

    @jax.jit
    def measure(state: TrainState, paths: MarketPath, settings: Settings) -> dict[str, Array]:
        update = update_of(n_inner)

        def problem_at(cut: Literal["raw", "hedge_ratio"]) -> Problem:
            return hedging_problem(
                hedger, paths, contract, objective, settings, cut=cut, cost_surrogate=update.cost_surrogate
            )

        params, raw, ratio = state.params, problem_at("raw"), problem_at("hedge_ratio")
        norms, ends = inner_step_norms(
            update_of, problem_at(update.cut), params, state.update, n_steps=n_inner_shown
        )
        after = ends[n_inner - 1]
        step = jax.tree.map(jnp.subtract, after, params)
        sizes, distance = jnp.asarray(step_sizes), optax.global_norm(step)
        numbers = {"inner_step_norms": norms, "step_norm": distance}
        for name, problem in (("outputs", raw), ("hedge_ratio", ratio)):
            found = linearization_error(problem.outputs, params, step, sizes)
            numbers |= {f"{name}_{field}": values for field, values in found._asdict().items()}
            numbers |= {f"{name}_ratio": found.ratio, f"{name}_mean_ratio": found.mean_ratio}

        few = batched_inputs(hedger, jax.tree.map(lambda x: x[:n_row_paths], paths), settings)

        def of_single_outputs(features: Array, anchor: Anchor) -> dict[str, Array]:
            outputs = lambda w: hedger.outputs(w, features, anchor)  # noqa: E731
            hessian = partial(hessian_norms, key=key_hessian, n_iterations=n_iterations)
            found = {
                "gradient_drift": gradient_drift(outputs, params, after),
                "gradient_norm": gradient_norms(outputs, params),
                "hessian_norm": hessian(outputs, params),
            }
            if hedger.band is None:
                return found
            of_hidden, hidden = output_layer_fixed(outputs, params)
            found["hidden_gradient_norm"] = gradient_norms(of_hidden, hidden)
            return found | {"hidden_hessian_norm": hessian(of_hidden, hidden)}

        single = jax.lax.map(lambda inputs: of_single_outputs(*inputs), few)
        numbers |= {f"{name}_max": jnp.max(norms) for name, norms in single.items()}
        numbers["gradient_drift_median"] = jnp.median(single["gradient_drift"])
        numbers["drift_estimate_23"] = gradient_drift_bound(numbers["hessian_norm_max"], distance)
        if hedger.band is not None:
            constants = perceptron_constants(params, few[0])
            numbers |= {
                "hessian_bound_93": hessian_bound(constants),
                "gradient_bound_66": gradient_bound(constants),
                "drift_bound_25": gradient_drift_bound(hessian_bound(constants), distance),
                "output_weight_A": constants.output_weight,
                "activation_norm_H": constants.activation_norm,
            }
        trade = jax.vmap(trades)(ratio.outputs(params))[:, :-1]
        numbers["risk"] = raw.risk(raw.value(raw.outputs(params)))
        numbers["no_trade_share"] = jnp.mean(trade == 0, dtype=float)
        numbers["zero_gradient_share"] = zero_gradient_share(raw, params, n_row_axes=2)
        return numbers

    def diagnostics(states: Sequence[TrainState]) -> dict[str, Any]:
        with jax.enable_x64(True):
            inputs = _in_double(drawn), _in_double(settings)
            found = [jax.tree.map(np.asarray, measure(_in_double(state), *inputs)) for state in states]
        for numbers in found:
            norms = numbers["inner_step_norms"]
            numbers["inner_steps_allowed"] = np.array([inner_steps_allowed(norms, e) for e in tolerances])
            small = np.asarray(step_sizes) <= 1.0
            for name in _ERRORS:
                slope = log_slope(np.asarray(step_sizes)[small], numbers[name][small])
                numbers[f"{name}_slope"] = np.asarray(slope)
        return {
            "epoch": [int(state.epoch) for state in states],
            "n_inner": n_inner,
            "step_sizes": list(step_sizes),
            "tolerances": list(tolerances),
            **{name: [plain(numbers[name]) for numbers in found] for name in found[0]},
            **({} if hedger.band is not None else dict.fromkeys(_BOUNDS)),
        }

    return diagnostics


_ERRORS = ("outputs_error", "outputs_mean_error", "hedge_ratio_error", "hedge_ratio_mean_error")
_BOUNDS = ("hessian_bound_93", "gradient_bound_66", "drift_bound_25")


def _in_double(tree: Any) -> Any:
    """Floating point leaves in float64; needs x64 enabled."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree
    )
