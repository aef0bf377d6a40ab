"""How far a function of parameters is from its linearization: errors, gradient drift, norms of Hessians.

The quantities of the paper's section 4.3, for any function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from dhlnn_jax.linearize import linearize_at

Params = Any
Outputs = Any


class LinearizationError(NamedTuple):
    """Along w = w0 + h d, one number for each step size h.

    Attributes:
      error: ||f(w) - f_lin(w)||. change: ||f(w) - f(w0)||; root mean squares over all outputs, in their unit.
      mean_error, mean_change: the same as mean absolute values.
    """

    error: Float[Array, " n_sizes"]
    change: Float[Array, " n_sizes"]
    mean_error: Float[Array, " n_sizes"]
    mean_change: Float[Array, " n_sizes"]

    @property
    def ratio(self) -> Float[Array, " n_sizes"]:
        """error / change; NaN where nothing changes."""
        return self.error / self.change

    @property
    def mean_ratio(self) -> Float[Array, " n_sizes"]:
        """mean_error / mean_change; NaN where nothing changes."""
        return self.mean_error / self.mean_change


def linearization_error(
    fn: Callable[[Params], Outputs],
    params0: Params,
    direction: Params,
    step_sizes: Float[ArrayLike, " n_sizes"],
) -> LinearizationError:
    """Error of the first-order expansion of fn at params0, along one direction.

    Args:
      direction: a step d of the parameters, not normalized. step_sizes: h, its multiples.
    Numerics: twice differentiable fn: error ~ h^2, change ~ h, ratio ~ h. A kink (ReLU, the clamp of a
      band) at distance u along d leaves an error ~ (h - u)^+; over many outputs with kinks spread evenly the
      root mean square goes like h^1.5, the mean absolute error like h^2 still. Errors below rounding are
      rounding: use float64 for small h.
    Source: paper Eq. (9) and (21).
    """
    at = linearize_at(fn, params0)
    slope = at.jvp(direction)

    def one(h: Array) -> LinearizationError:
        moved = fn(jax.tree.map(lambda w, d: w + h * d, params0, direction))
        change = ravel_pytree(jax.tree.map(jnp.subtract, moved, at.value))[0]
        error = change - h * ravel_pytree(slope)[0]
        rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))  # noqa: E731
        return LinearizationError(
            rms(error), rms(change), jnp.mean(jnp.abs(error)), jnp.mean(jnp.abs(change))
        )

    return jax.lax.map(one, jnp.asarray(step_sizes))


def log_slope(x: Float[ArrayLike, " n"], y: Float[ArrayLike, " n"]) -> float:
    """Least-squares slope of log y over log x; NaN if fewer than two of the y are positive."""
    x, y = np.asarray(x), np.asarray(y)
    used = y > 0
    return float(np.polyfit(np.log(x[used]), np.log(y[used]), 1)[0]) if used.sum() > 1 else float("nan")


def gradient_norms(fn: Callable[[Params], Outputs], params: Params) -> Float[Array, " n_outputs"]:
    """||grad f_k(params)|| for every number k among the outputs of fn, flattened.

    Numerics: builds the whole Jacobian, n_outputs times the number of parameters.
    """
    return jnp.linalg.norm(_jacobian(fn, params), axis=1)


def gradient_drift(
    fn: Callable[[Params], Outputs], params0: Params, params: Params
) -> Float[Array, " n_outputs"]:
    """||grad f_k(params) - grad f_k(params0)|| for every number k among the outputs, flattened.

    Source: left-hand side of paper Eq. (23) and (25).
    """
    return jnp.linalg.norm(_jacobian(fn, params) - _jacobian(fn, params0), axis=1)


def gradient_drift_bound(
    hessian_bound: ArrayLike, distance: ArrayLike, *, tau: ArrayLike = 1.0
) -> Float[Array, "..."]:
    """tau beta ||w - w0||, beta a bound on the Hessian's norm all along the way.

    Numerics: with beta the norm at w0 only this is the estimate (23), no bound; for ReLU networks no beta
      bounds the drift, since gradients jump at kinks.
    Source: paper Eq. (25).
    """
    return jnp.asarray(tau) * hessian_bound * distance


def hessian_norm(
    fn: Callable[[Params], Array], params: Params, key: PRNGKeyArray, *, n_iterations: int = 30
) -> Float[Array, ""]:
    """Spectral norm of the Hessian of a scalar function, by power iteration on Hessian-vector products.

    v <- H v / ||H v|| from a random v; returns the last ||H v||.

    Numerics: ||H v|| never decreases (H is symmetric) and never exceeds the norm: a lower bound. The Hessian
      of a ReLU network is that of its piece, without the kinks.
    Source: Golub and Van Loan (2013), Section 8.2.1.
    """
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda w: fn(unravel(w)))

    def iterate(v: Array, _: None) -> tuple[Array, Array]:
        product = jax.jvp(gradient, (flat,), (v,))[1]
        norm = jnp.linalg.norm(product)
        return jnp.where(norm > 0, product / jnp.where(norm > 0, norm, 1.0), v), norm

    start = jax.random.normal(key, flat.shape, flat.dtype)
    return jax.lax.scan(iterate, start / jnp.linalg.norm(start), length=n_iterations)[1][-1]


def hessian_norms(
    fn: Callable[[Params], Outputs], params: Params, key: PRNGKeyArray, *, n_iterations: int = 30
) -> Float[Array, " n_outputs"]:
    """`hessian_norm` of every number among the outputs of fn, flattened, from the same random start."""
    flat_fn = lambda w: ravel_pytree(fn(w))[0]  # noqa: E731
    outputs = jax.eval_shape(flat_fn, params)

    def one(unit: Array) -> Array:
        return hessian_norm(lambda w: jnp.vdot(unit, flat_fn(w)), params, key, n_iterations=n_iterations)

    return jax.vmap(one)(jnp.eye(outputs.shape[0], dtype=outputs.dtype))


def _jacobian(fn: Callable[[Params], Outputs], params: Params) -> Array:
    flat, unravel = ravel_pytree(params)
    return jax.jacrev(lambda w: ravel_pytree(fn(unravel(w)))[0])(flat)
