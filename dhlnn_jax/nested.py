"""Ways to move parameters on one batch: one gradient step, or nested steps on a linearized objective.

Nothing here knows about hedging. A `Problem` says how parameters become outputs, outputs become one value a
sample, and values become a risk; an `Update` moves the parameters. `nested_update` is Algorithm 1 with the
choices that the paper leaves open as options.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dhlnn_jax.linearize import Linearization, linearize_at

Params = Any
Outputs = Any
UpdateState = Any

RiskWeights = Literal["refreshed", "frozen"]
CostSurrogate = Literal["absolute", "squared_difference", "difference_of_squares"]
InnerUpdate = Literal["frozen_preconditioner", "frozen_state", "frozen_direction", "sgd", "adam"]
LinearizationKind = Literal["network", "position", "none"]


# Choices by name for `nested_update(..., **PRESETS[name])`; "default" leaves them at their defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "as_printed": {
        "risk_weights": "frozen",
        "cost_surrogate": "squared_difference",
        "inner_update": "frozen_preconditioner",
        "linearization": "network",
    },
}


class Problem(NamedTuple):
    """One batch as a composition risk(value(outputs(params))).

    Attributes:
      outputs: params -> outputs (any pytree); the part that nested training linearizes.
      value: outputs -> one number a sample.
      risk: values -> scalar to be minimized.
      surrogate_value: outputs -> values used by the inner iterations; None for `value` itself.
      linearize: params -> `outputs` linearized there; None for `linearize_at(outputs, params)`.
      risk_curvature: values -> second derivative of the risk to each, or an approximation; `newton` needs it.
      inputs: params -> inputs x of the output layer [..., n_inputs], so that outputs are x @ its weights.
      row_moments: (x, a, b), a and b like outputs -> sums over rows of a x^T [n_outputs, n_inputs] and of
        b x x^T [n_outputs, n_inputs, n_inputs]; `newton` needs both.
    """

    outputs: Callable[[Params], Outputs]
    value: Callable[[Outputs], Array]
    risk: Callable[[Array], Array]
    surrogate_value: Callable[[Outputs], Array] | None = None
    linearize: Callable[[Params], Linearization] | None = None
    risk_curvature: Callable[[Array], Array] | None = None
    inputs: Callable[[Params], Array] | None = None
    row_moments: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None


class UpdateInfo(NamedTuple):
    """Diagnostics of one update.

    Attributes:
      risk: risk on the batch before the update.
      gradient_norm: Euclidean norm of its exact gradient.
      n_gradients: gradients taken with respect to the parameters (vector-Jacobian products over the batch).
      outputs: of the network before the update.
      n_rises: inner steps in a row, outer iterations run together, that raised the linearized objective.
    """

    risk: Array
    gradient_norm: Array
    n_gradients: Array
    outputs: Outputs
    n_rises: Array | int = 0


class Update(NamedTuple):
    """How to move parameters on one batch.

    Attributes:
      init: params -> state.
      apply: (problem, params, state) -> (params, state, info).
      cut: what `Problem.outputs` are: raw outputs, or the pair of them and the hedge ratio.
      cost_surrogate: which cost `Problem.surrogate_value` charges.
    """

    init: Callable[[Params], UpdateState]
    apply: Callable[[Problem, Params, UpdateState], tuple[Params, UpdateState, UpdateInfo]]
    cut: Literal["raw", "hedge_ratio"] = "raw"
    cost_surrogate: CostSurrogate = "absolute"


def optax_update(optimizer: optax.GradientTransformation) -> Update:
    """One step of any optax optimizer on the exact gradient."""

    def apply(problem: Problem, params: Params, state: UpdateState):
        def risk_and_outputs(params: Params):
            outputs = problem.outputs(params)
            return problem.risk(problem.value(outputs)), outputs

        (risk, outputs), gradient = jax.value_and_grad(risk_and_outputs, has_aux=True)(params)
        step, state = optimizer.update(gradient, state, params)
        info = UpdateInfo(risk, optax.global_norm(gradient), jnp.asarray(1), outputs)
        return optax.apply_updates(params, step), state, info

    return Update(optimizer.init, apply)


class NestedState(NamedTuple):
    """Outer iterations done, Adam's second moment of the exact gradient, the wrapped optimizer's state, and
    how many inner steps in a row have raised the linearized objective."""

    n_outer: Array
    second_moment: Params
    optimizer: optax.OptState
    n_rises: Array


def nested_update(
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: optax.ScalarOrSchedule,
    n_inner: int = 5,
    tolerance: float = 0.0,
    risk_weights: RiskWeights = "refreshed",
    cost_surrogate: CostSurrogate = "absolute",
    inner_update: InnerUpdate = "frozen_preconditioner",
    linearization: LinearizationKind = "network",
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Update:
    """Nested training on a linearized objective, Algorithm 1.

    At w^r the outputs are linearized on the batch. Up to n_inner steps w_{j+1} = w_j + d_j follow, with
    g_j the gradient of the objective of the linearized outputs at w_j (g_0 is the exact gradient, but for
    the surrogate cost), until ||d_j|| < tolerance; then w^{r+1} is the last w_j.

    Args:
      optimizer: used by inner_update "frozen_state", "frozen_direction" and "adam" (any optax optimizer).
      learning_rate: eta of "frozen_preconditioner" and "sgd"; a schedule sees the count of outer iterations.
      n_inner: N. tolerance: on the Euclidean norm of one inner step; 0 takes all N.
      risk_weights: "refreshed": d risk / d value at every inner step; "frozen": at w^r, Eq. (12).
      cost_surrogate: "absolute": the true cost; "squared_difference": Eq. (13); "difference_of_squares":
        what Eq. (14) as printed differentiates.
      inner_update: d_j is
        "frozen_preconditioner": -eta g_j / (sqrt(v) + eps), v Adam's bias-corrected second moment of the
          exact outer gradients (with N = 1: Adam without momentum);
        "frozen_state": the optimizer's step on g_j from the state of the outer iteration, which advances
          once, with g_0;
        "frozen_direction": the optimizer's step on g_0, taken N times;
        "sgd": -eta g_j, Eq. (15);
        "adam": the optimizer's own step, its state running through all inner iterations.
      linearization: "network": raw outputs, Eq. (9); "position": the hedge ratio; "none": no
        linearization, g_j from the real network at w_j (control).
    Raises: ValueError for an unknown option or n_inner < 1.
    Source: paper Algorithm 1 and Eq. (9)-(15).
    """
    for name, given, kind in (
        ("risk_weights", risk_weights, RiskWeights),
        ("cost_surrogate", cost_surrogate, CostSurrogate),
        ("inner_update", inner_update, InnerUpdate),
        ("linearization", linearization, LinearizationKind),
    ):
        if given not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {given!r}")
    if n_inner < 1:
        raise ValueError(f"n_inner must be at least 1, got {n_inner}")

    def init(params: Params) -> NestedState:
        zero = jnp.asarray(0)
        return NestedState(zero, jax.tree.map(jnp.zeros_like, params), optimizer.init(params), zero)

    def apply(problem: Problem, params0: Params, state: NestedState):
        if problem.linearize is None:
            expansion = linearize_at(problem.outputs, params0)
        else:
            expansion = problem.linearize(params0)
        risk, output_gradient = jax.value_and_grad(lambda y: problem.risk(problem.value(y)))(expansion.value)
        exact_gradient = expansion.vjp(output_gradient)
        objective = _inner_objective(problem, expansion.value, frozen=risk_weights == "frozen")

        def objective_at(params: Params) -> tuple[Array, Params]:
            """Objective and gradient of an inner iteration."""
            if linearization == "none":
                return jax.value_and_grad(lambda w: objective(problem.outputs(w)))(params)
            change = expansion.jvp(jax.tree.map(jnp.subtract, params, params0))
            value, cotangent = jax.value_and_grad(objective)(jax.tree.map(jnp.add, expansion.value, change))
            return value, expansion.vjp(cotangent)

        if problem.surrogate_value is None:
            first_gradient, n_first = exact_gradient, 1  # freezing the weights changes no gradient here
        else:
            first_gradient, n_first = expansion.vjp(jax.grad(objective)(expansion.value)), 2

        n_outer = state.n_outer + 1
        second_moment = state.second_moment
        if inner_update == "frozen_preconditioner":
            second_moment = jax.tree.map(
                lambda v, g: b2 * v + (1.0 - b2) * jnp.square(g), second_moment, exact_gradient
            )
        eta = learning_rate(state.n_outer) if callable(learning_rate) else learning_rate

        def inner_step(gradient: Params, inner: optax.OptState, params: Params):
            """d_j and the running state, from g_j."""
            if inner_update == "sgd":
                return jax.tree.map(lambda g: -eta * g, gradient), inner
            if inner_update == "frozen_preconditioner":
                unbias = 1.0 - b2**n_outer
                scale = lambda g, v: -eta * g / (jnp.sqrt(v / unbias) + eps)  # noqa: E731
                return jax.tree.map(scale, gradient, second_moment), inner
            if inner_update == "adam":
                return optimizer.update(gradient, inner, params)
            return optimizer.update(gradient, state.optimizer, params)

        first_step, advanced = inner_step(first_gradient, state.optimizer, params0)

        def go_on(carry) -> Array:
            n_done, _, _, step_norm, _, _ = carry
            return (n_done < n_inner) & (step_norm >= tolerance)

        def iterate(carry):
            n_done, params, inner, _, reached, n_rises = carry
            if inner_update == "frozen_direction":  # looks at no objective
                step = first_step
            else:
                before = reached
                reached, gradient = objective_at(params)
                n_rises = jnp.where(reached > before, n_rises + 1, 0)
                step, advanced_again = inner_step(gradient, inner, params)
                inner = advanced_again if inner_update == "adam" else inner
            moved = optax.apply_updates(params, step)
            return n_done + 1, moved, inner, optax.global_norm(step), reached, n_rises

        first = (
            jnp.asarray(1),
            optax.apply_updates(params0, first_step),
            advanced,
            optax.global_norm(first_step),
            objective(expansion.value),
            state.n_rises,
        )
        n_done, params, kept, _, _, n_rises = jax.lax.while_loop(go_on, iterate, first)
        n_gradients = n_first + (0 if inner_update == "frozen_direction" else n_done - 1)
        gradient_norm = optax.global_norm(exact_gradient)
        info = UpdateInfo(risk, gradient_norm, jnp.asarray(n_gradients), expansion.value, n_rises)
        return params, NestedState(n_outer, second_moment, kept, n_rises), info

    return Update(init, apply, "hedge_ratio" if linearization == "position" else "raw", cost_surrogate)


def _inner_objective(problem: Problem, outputs0: Outputs, *, frozen: bool) -> Callable[[Outputs], Array]:
    """What the inner iterations minimize, as a function of the outputs.

    Frozen: sum_p (d risk / d V_p at w^r) V_p, whose gradient is Eq. (12) with the scalar product over paths.
    """
    value = problem.surrogate_value or problem.value
    if not frozen:
        return lambda outputs: problem.risk(value(outputs))
    path_weights = jax.lax.stop_gradient(jax.grad(problem.risk)(problem.value(outputs0)))
    return lambda outputs: jnp.sum(path_weights * value(outputs))
