"""The bounds of the paper's appendix D on gradients and Hessians of a ReLU network, as printed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Params = Any
Outputs = Any


class PerceptronConstants(NamedTuple):
    """What the bounds of appendix D are made of, for a ReLU network and a set of rows.

    Attributes:
      output_weight: A = max_j |a_kj|, over both outputs, in the parametrization (50): the output layer is
        a / sqrt(m), so A is sqrt(m) times its largest weight.
      activation_norm: H, the largest Euclidean norm among the inputs of all hidden layers.
      n_hidden: L, the number of hidden layers.
      slope: M_1, the bound on |sigma'|: 1. curvature: M_2, that on |sigma''|: 0 but for the kink.
    """

    output_weight: Array
    activation_norm: Array
    n_hidden: int
    slope: float = 1.0
    curvature: float = 0.0


def perceptron_constants(
    params: Params, features: Float[Array, "*rows n_features"], *, module: str = "Perceptron_0"
) -> PerceptronConstants:
    """The constants of a network with one `Perceptron` at these parameters on these rows.

    Source: paper App. D.1 and D.4.
    """
    *hidden, last = _dense_layers(params, module)
    largest = jnp.zeros((), features.dtype)
    for layer in hidden:
        largest = jnp.maximum(largest, jnp.max(jnp.linalg.norm(features, axis=-1)))
        features = jax.nn.relu(features @ layer["kernel"] + layer["bias"])
    kernel = last["kernel"]
    return PerceptronConstants(
        jnp.sqrt(kernel.shape[0]) * jnp.max(jnp.abs(kernel)), largest, n_hidden=len(hidden)
    )


def gradient_bound(constants: PerceptronConstants) -> Float[Array, ""]:
    """A M_1^l (H + 1), at the l in 1..L where it is largest. Source: paper Eq. (66), as printed.

    Not a bound: (53) multiplies activations where the chain rule multiplies by the weights of the later
    layers, which appear nowhere in it. With f = a s(w_2 s(w_1 x)), everything positive, df/dw_1 = a w_2 x.
    """
    a, h, n, m1, _ = constants
    return a * max(m1**layer for layer in range(1, n + 1)) * (h + 1.0)


def hessian_bound(constants: PerceptronConstants) -> Float[Array, ""]:
    """max(A (M_2 H^2 + M_1)^L, A M_2^L). Source: paper Eq. (93), as printed.

    Not a bound: it takes the Hessian to be block diagonal, one block a weight matrix or a bias vector. The
    blocks that mix layers are not zero, and for ReLU they are all there is: (93) is A whatever the input,
    while f = a s(w_2 s(w_1 x)), everything positive, is a w_2 w_1 x with Hessian norm a |x|. Nor is (92)
    true within one layer: d2f / dw db = a s''(w x + b) x for one hidden unit. And as in (66) the weights of
    later layers are missing, so smooth activations do not save it.
    """
    a, h, n, m1, m2 = constants
    return jnp.maximum(a * (m2 * jnp.square(h) + m1) ** n, a * m2**n)


def output_layer_fixed(
    fn: Callable[[Params], Outputs], params: Params, *, module: str = "Perceptron_0"
) -> tuple[Callable[[Params], Outputs], Params]:
    """fn as a function of the hidden layers alone, and these: what appendix D calls w.

    Source: paper App. D.1, "exclude [a_k] from the training procedure".
    """
    layers = params["params"][module]
    last = f"Dense_{len(layers) - 1}"

    def of_hidden(hidden: Params) -> Outputs:
        joined = {**params["params"], module: {**hidden, last: layers[last]}}
        return fn({**params, "params": joined})

    return of_hidden, {name: layer for name, layer in layers.items() if name != last}


def _dense_layers(params: Params, module: str) -> list[dict[str, Array]]:
    layers = params["params"][module]
    return [layers[f"Dense_{i}"] for i in range(len(layers))]
