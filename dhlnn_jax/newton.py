"""Gauss-Newton steps on the output layer: nested training where no linearization is needed.

A network is linear in its output layer as it is, and that layer is small enough for its curvature to be
summed up and solved with: one inner problem, exact but for the risk. The hidden layers stay as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhlnn_jax.linearize import OutputLayer
from dhlnn_jax.nested import Problem, Update, UpdateInfo

Params = Any


class NewtonState(NamedTuple):
    """Outer iterations done, and the running mean of the curvature, a matrix for each output."""

    n_outer: Array
    curvature: Float[Array, "n_outputs n_inputs n_inputs"]


def newton_update(layer: OutputLayer, *, n_inner: int = 1, damping: float = 0.03, burn_in: int = 3) -> Update:
    """Gauss-Newton on the weights W of the output layer, averaged over batches.

    In batch r, n_inner times, with gain_r = 1 / (1 + max(r - burn_in, 0)), r from 0:

      g = sum over rows of (d risk / d y) x^T,  G = sum over rows of rho'' (d v / d y)^2 x x^T,
      C <- C + gain_r (G - C),  W <- W - gain_r (C + damping gain_r mean(diag C) I)^-1 g

    for each output y of the layer, x its inputs, v the value that y belongs to, rho'' the second derivative
    of the risk to v. The first burn_in + 1 batches take whole steps, later ones average over batches.

    Args:
      layer: of the network behind `Problem.outputs`.
      n_inner: steps on the same batch. damping: of the first steps, relative to the mean curvature.
    Raises: ValueError for n_inner < 1, a damping that is not above 0, burn_in < 0; and at the first update
      for a problem without `risk_curvature` or `output_moments`.
    Numerics: G leaves out the products of different rows and outputs of one value, and the rank-one part of a
      risk's second derivative. For rows that are values, linear in W, G is the whole Hessian.
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
        risk_curvature, output_moments = problem.risk_curvature, problem.output_moments
        if risk_curvature is None or output_moments is None:
            raise ValueError("newton_update needs a problem with risk_curvature and output_moments")
        gain = 1.0 / (1.0 + jnp.maximum(state.n_outer - burn_in, 0))

        def step(params: Params):
            outputs = problem.outputs(params)
            values, pullback = jax.vjp(problem.value, outputs)
            (slope,) = pullback(jnp.ones_like(values))
            risk, by_value = jax.value_and_grad(problem.risk)(values)
            each = (-1,) + (1,) * (slope.ndim - 1)
            by_output = by_value.reshape(each) * slope
            twice = risk_curvature(values).reshape(each) * jnp.square(slope)
            gradient, curvature = output_moments(params, by_output, twice)
            mean = state.curvature + gain * (curvature - state.curvature)
            shift = _solve(mean, gradient, damping * gain)
            moved = layer.replace(params, layer.weights(params) - gain * shift.T)
            return moved, mean, UpdateInfo(risk, jnp.linalg.norm(gradient), jnp.asarray(n_inner), outputs)

        moved, curvature, info = step(params)
        for _ in range(n_inner - 1):
            moved, curvature, _ = step(moved)
        return moved, NewtonState(state.n_outer + 1, curvature), info

    return Update(init, apply)


def _solve(
    curvature: Float[Array, "n_outputs n_inputs n_inputs"],
    gradient: Float[Array, "n_outputs n_inputs"],
    damping: Array,
) -> Float[Array, "n_outputs n_inputs"]:
    """(C + damping mean(diag C) I)^-1 g for each output; 0 where C = 0, that is where no row is live."""

    def one(matrix: Array, vector: Array) -> Array:
        scale = jnp.trace(matrix) / len(vector)
        alive = scale > 0
        shifted = matrix + jnp.where(alive, damping * scale, 1.0) * jnp.eye(len(vector), dtype=matrix.dtype)
        solution = jax.scipy.linalg.solve(shifted, vector, assume_a="pos")
        return jnp.where(alive, solution, 0.0)

    return jax.vmap(one)(curvature, gradient)
