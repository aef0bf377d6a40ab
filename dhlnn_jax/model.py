"""The networks: features of one decision (or many) in, raw outputs out. They decide no position."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhlnn_jax.linearize import OutputLayer
from dhlnn_jax.pieces import HiddenLayer


class Columns(nn.Module):
    """A dense layer on columns: y = kernel^T x + bias, the batch behind the features; params of `nn.Dense`.

    Numerics: the gradient of the kernel then contracts the last axes of both its factors, 1.5 times as fast
      on XLA's CPU backend as the first axes, which it contracts for rows. The kernel's transpose is a copy of
      its own, since products that transpose as they go are slower there, too (docs/performance.md).
    """

    size: int
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, " n_inputs *batch"]) -> Float[Array, " n_outputs *batch"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[0], self.size))
        bias = self.param("bias", nn.initializers.zeros, (self.size,))
        transposed = jax.lax.optimization_barrier(kernel.T)
        return jnp.tensordot(transposed, x, axes=(1, 0)) + bias.reshape(-1, *(1,) * (x.ndim - 1))


class Perceptron(nn.Module):
    """Dense ReLU layers and a linear output, Eq. (50): a composition of layers (misprinted as a product).

    Attributes:
      hidden_sizes: width of each hidden layer.
      n_outputs: width of the output.
      output_scale: factor on the initial output weights; below 1 the outputs start near zero, with 0 at it.
      hidden_only: what the output layer sees instead of what it makes of it (same params).
    """

    hidden_sizes: Sequence[int]
    n_outputs: int
    output_scale: float = 1.0
    hidden_only: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch n_features"]) -> Float[Array, "*batch n_outputs"]:
        x = jnp.moveaxis(x, -1, 0)
        for i, size in enumerate(self.hidden_sizes):
            x = nn.relu(Columns(size, name=f"Dense_{i}")(x))
        if self.hidden_only:
            return jnp.moveaxis(x, 0, -1)
        scaled = nn.initializers.zeros
        if self.output_scale:
            scaled = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "truncated_normal")
        output = Columns(self.n_outputs, scaled, name=f"Dense_{len(self.hidden_sizes)}")(x)
        # Not a transpose inside the products of the backward pass: see `Columns`.
        return jnp.moveaxis(jax.lax.optimization_barrier(output), 0, -1)


class BandNetwork(nn.Module):
    """The no-transaction-band network: two raw widths (below, above the centre) for each decision.

    It never sees the previous hedge ratio, so all times and paths go through it in one call.

    Numerics: the output weights start at a tenth of the usual size. A band that starts too wide trades
      on no path, its gradient is zero everywhere and training never recovers.
    Source: paper Eq. (16)-(17) and App. D; Imaki et al. (2021).
    """

    hidden_sizes: Sequence[int] = (64, 64, 64, 64)
    output_scale: float = 0.1
    hidden_only: bool = False

    @nn.compact
    def __call__(self, features: Float[Array, "*batch n_features"]) -> Float[Array, "*batch n_outputs"]:
        return Perceptron(self.hidden_sizes, 2, self.output_scale, self.hidden_only)(features)


def band_output_layer(network: BandNetwork) -> OutputLayer:
    """The output layer of a band network, its bias as the weights of a constant 1."""
    hidden, name = network.clone(hidden_only=True), f"Dense_{len(network.hidden_sizes)}"

    def inputs(params: Any, features: Array) -> Array:
        x: Any = hidden.apply(params, features)
        return jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)

    def weights(params: Any) -> Array:
        layer = params["params"]["Perceptron_0"][name]
        return jnp.concatenate([layer["kernel"], layer["bias"][None]])

    def replace(params: Any, weights: Array) -> Any:
        layer = {"kernel": weights[:-1], "bias": weights[-1]}
        layers = {**params["params"]["Perceptron_0"], name: layer}
        return {**params, "params": {**params["params"], "Perceptron_0": layers}}

    return OutputLayer(inputs, weights, replace)


def band_hidden_layers(network: BandNetwork, params: Any) -> list[HiddenLayer]:
    """The ReLU layers of a band network, first to last."""
    layers = params["params"]["Perceptron_0"]
    return [HiddenLayer(**layers[f"Dense_{i}"]) for i in range(len(network.hidden_sizes))]


class HedgeNetwork(nn.Module):
    """The plain network (DHMLP): one raw output from the features and the previous hedge ratio.

    Source: paper section 5.1 (DHMLP); Imaki et al. (2021) for the form that adds a delta.
    """

    hidden_sizes: Sequence[int] = (64, 64, 64, 64)
    output_scale: float = 0.1

    @nn.compact
    def __call__(
        self, features: Float[Array, "*batch n_features"], previous: Float[Array, " *batch"]
    ) -> Float[Array, " *batch"]:
        x = jnp.concatenate([features, previous[..., None]], axis=-1)
        return Perceptron(self.hidden_sizes, 1, self.output_scale)(x)[..., 0]
