"""Gauss-Newton steps on the output layer: nested training where no linearization is needed.

A network is linear in its output layer as it is, and that layer is small enough for its curvature to be
summed up and solved with: one inner problem, exact but for the risk. The hidden layers stay as they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhlnn_jax.linearize import OutputLayer
from dhlnn_jax.nested import Problem, Update, UpdateInfo

Params = Any

_SHORTEST = 1 / 64  # of a whole step
_LEFT_ALIVE = 0.25  # of the rows that an output counts in, at least, after a step


class NewtonState(NamedTuple):
    """Outer iterations done, and the running mean of the curvature, a matrix for each output."""

    n_outer: Array
    curvature: Float[Array, "n_outputs n_inputs n_inputs"]


def newton_update(layer: OutputLayer, *, n_inner: int = 1, damping: float = 0.01, burn_in: int = 3) -> Update:
    """Gauss-Newton on the weights W of the output layer, averaged over batches.

    In batch r, n_inner times, with gain_r = 1 / (1 + max(r - burn_in, 0)), r from 0:

      g = sum over rows of (d risk / d y) x^T,  G = sum over rows of rho'' (d v / d y)^2 x x^T,
      C <- C + gain_r (G - C),  W <- W - t gain_r (C + damping gain_r scale I)^-1 g

    for each output y of the layer: x its inputs, v the value that y belongs to, rho'' the second derivative
    of the risk to v, scale the mean diagonal of C over all outputs. So the first burn_in + 1 batches take
    whole steps if they may, and later ones average over batches. t is the first of 1, 1/2, ..., 1/64 that
    lowers the risk of the batch and leaves every output a quarter of the rows that it counts in, else 0: the
    quadratic model is made of those rows, and an edge of a band that no path reaches never comes back.

    Args:
      layer: of the network behind `Problem.outputs`.
      n_inner: steps on the same batch. damping: of the first steps, relative to the mean curvature.
    Raises: ValueError for n_inner < 1, a damping that is not above 0, burn_in < 0; and at the first update
      for a problem without `risk_curvature`, `inputs` or `row_moments`.
    Numerics: x of all rows is kept during an update, and serves all its steps. G leaves out the products of
      different rows and outputs of one value, and the rank-one part of a risk's second derivative. For rows
      that are values, linear in W, G is the whole Hessian.
    Source: Gauss-Newton as in Nocedal and Wright (2006), chapter 10; gains of a stochastic Newton method as
      in Bercu, Godichon-Baggioni and Portier (2020).
    """
    if n_inner < 1:
        raise ValueError(f"n_inner must be at least 1, got {n_inner}")
    if not damping > 0:
        raise ValueError(f"damping must be above 0, got {damping}")
    if burn_in < 0:
        raise ValueError(f"burn_in must be at least 0, got {burn_in}")

    def init(params: Params) -> NewtonState:
        weights = layer.weights(params)
        n_inputs, n_outputs = weights.shape
        return NewtonState(jnp.asarray(0), jnp.zeros((n_outputs, n_inputs, n_inputs), weights.dtype))

    def apply(problem: Problem, params: Params, state: NewtonState):
        risk_curvature, row_moments = problem.risk_curvature, problem.row_moments
        if risk_curvature is None or row_moments is None or problem.inputs is None:
            raise ValueError("newton_update needs a problem with risk_curvature, inputs and row_moments")
        gain = 1.0 / (1.0 + jnp.maximum(state.n_outer - burn_in, 0))
        x = problem.inputs(params)  # the only pass through the hidden layers, whatever n_inner

        def step(carry: tuple[Array, Array], _: Any):
            weights, _ = carry
            outputs = x @ weights
            values, slope = _values_and_slope(problem, outputs)
            risk, by_value = jax.value_and_grad(problem.risk)(values)
            each = (-1,) + (1,) * (slope.ndim - 1)
            by_output = by_value.reshape(each) * slope
            twice = risk_curvature(values).reshape(each) * jnp.square(slope)
            gradient, curvature = row_moments(x, by_output, twice)
            mean = state.curvature + gain * (curvature - state.curvature)
            shift = gain * _solve(mean, gradient, damping * gain).T

            change, few = x @ shift, _LEFT_ALIVE * _n_live(slope)

            def risk_at(t: Array) -> Array:
                values, slope = _values_and_slope(problem, outputs - t * change)
                return jnp.where(jnp.all(_n_live(slope) >= few), problem.risk(values), jnp.inf)

            fraction = _backtracked(risk_at, risk)
            return (weights - fraction * shift, mean), (risk, jnp.linalg.norm(gradient))

        weights = layer.weights(params)
        (moved, curvature), of_steps = jax.lax.scan(step, (weights, state.curvature), None, length=n_inner)
        risk, gradient_norm = (each[0] for each in of_steps)
        info = UpdateInfo(risk, gradient_norm, jnp.asarray(n_inner), x @ weights)
        return layer.replace(params, moved), NewtonState(state.n_outer + 1, curvature), info

    return Update(init, apply)


def _values_and_slope(problem: Problem, outputs: Array) -> tuple[Array, Array]:
    """Values and, for every output, the derivative of the value that it belongs to."""
    values, pullback = jax.vjp(problem.value, outputs)
    return values, pullback(jnp.ones_like(values))[0]


def _n_live(slope: Float[Array, "*rows n_outputs"]) -> Float[Array, " n_outputs"]:
    """Rows in which an output counts for anything, for each output."""
    return jnp.sum(slope != 0, axis=tuple(range(slope.ndim - 1)), dtype=slope.dtype)


def _solve(
    curvature: Float[Array, "n_outputs n_inputs n_inputs"],
    gradient: Float[Array, "n_outputs n_inputs"],
    damping: Array,
) -> Float[Array, "n_outputs n_inputs"]:
    """(C + damping scale I)^-1 g for each output, scale the mean of all diagonals; 0 where no row is live.

    An output that hardly any row depends on has next to no curvature; a scale of its own would let it leap.
    """
    n_outputs, n_inputs, _ = curvature.shape
    scale = jnp.trace(curvature, axis1=1, axis2=2).sum() / (n_outputs * n_inputs)
    alive = scale > 0
    shift = jnp.where(alive, damping * scale, 1.0) * jnp.eye(n_inputs, dtype=curvature.dtype)

    def one(matrix: Array, vector: Array) -> Array:
        return jax.scipy.linalg.solve(matrix + shift, vector, assume_a="pos")

    return jnp.where(alive, jax.vmap(one)(curvature, gradient), 0.0)


def _backtracked(risk_at: Callable[[Array], Array], risk: Array) -> Array:
    """The first of 1, 1/2, ..., 1/64 at which the risk is lower than it was, else 0; infinity is refused."""

    def shortened(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        fraction = 0.5 * carry[0]
        return fraction, risk_at(fraction)

    def goes_on(carry: tuple[Array, Array]) -> Array:
        return ~(carry[1] < risk) & (carry[0] > _SHORTEST)  # a risk that is not a number is not lower

    whole = jnp.ones_like(risk)
    fraction, reached = jax.lax.while_loop(goes_on, shortened, (whole, risk_at(whole)))
    return jnp.where(reached < risk, fraction, 0.0)
