"""First-order expansion of any function of parameters, Eq. (9) of the paper."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

Params = Any


def linearize_apply(apply_fn: Callable[..., Any], params0: Params) -> Callable[..., Any]:
    """A function with the signature of `apply_fn` that is affine in its parameters.

    f_lin(w, x) = f(w0, x) + df/dw(w0, x) (w - w0).

    Args:
      apply_fn: `(params, *args) -> outputs`, any pytrees.
      params0: the linearization point w0.
    Numerics: exact where apply_fn is affine in its parameters; else the error is second order in w - w0.
    Source: paper Eq. (9).

    Example:
      logits = linearize_apply(network.apply, params0)(params, x)
    """

    def linearized(params: Params, *args: Any, **kwargs: Any) -> Any:
        step = jax.tree.map(jnp.subtract, params, params0)
        value, change = jax.jvp(lambda w: apply_fn(w, *args, **kwargs), (params0,), (step,))
        return jax.tree.map(jnp.add, value, change)

    return linearized


class Linearization(NamedTuple):
    """A function at one point: its value there, and its derivative in both directions.

    Attributes:
      value: fn(params0).
      jvp: tangent of the parameters -> tangent of the outputs.
      vjp: cotangent of the outputs -> cotangent of the parameters.
    """

    value: Any
    jvp: Callable[[Params], Any]
    vjp: Callable[[Any], Params]


def linearize_at(fn: Callable[[Params], Any], params0: Params) -> Linearization:
    """fn evaluated and differentiated once at params0; jvp and vjp may then be called many times.

    Source: paper Eq. (9); the forward pass is stored, so each call costs about two matrix products a layer.
    """
    value, jvp = jax.linearize(fn, params0)
    transposed = jax.linear_transpose(jvp, params0)
    return Linearization(value, jvp, lambda cotangent: transposed(cotangent)[0])


class OutputLayer(NamedTuple):
    """The parameters in which a network is linear: outputs = inputs(params, *rows) @ weights(params).

    Attributes:
      inputs: (params, *rows) -> [n_rows, n_inputs], a constant 1 for the bias among them; they do not depend
        on the weights.
      weights: params -> [n_inputs, n_outputs].
      replace: (params, weights) -> params with other weights.
    """

    inputs: Callable[..., Array]
    weights: Callable[[Params], Array]
    replace: Callable[[Params, Array], Params]
