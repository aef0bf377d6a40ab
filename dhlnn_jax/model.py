"""The networks: features of one decision (or many) in, raw outputs out. They decide no position."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class Perceptron(nn.Module):
    """Dense ReLU layers and a linear output, Eq. (50): a composition of layers (misprinted as a product).

    Attributes:
      hidden_sizes: width of each hidden layer.
      n_outputs: width of the output.
      output_scale: factor on the initial output weights; below 1 the outputs start near zero, with 0 at it.
    """

    hidden_sizes: Sequence[int]
    n_outputs: int
    output_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch n_features"]) -> Float[Array, "*batch n_outputs"]:
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size)(x))
        scaled = nn.initializers.zeros
        if self.output_scale:
            scaled = nn.initializers.variance_scaling(self.output_scale**2, "fan_in", "truncated_normal")
        return nn.Dense(self.n_outputs, kernel_init=scaled)(x)


class BandNetwork(nn.Module):
    """The no-transaction-band network: two raw widths (below, above the centre) for each decision.

    It never sees the previous hedge ratio, so all times and paths go through it in one call.

    Numerics: the output weights start at a tenth of the usual size. A band that starts too wide trades
      on no path, its gradient is zero everywhere and training never recovers.
    Source: paper Eq. (16)-(17) and App. D; Imaki et al. (2021).
    """

    hidden_sizes: Sequence[int] = (64, 64, 64, 64)
    output_scale: float = 0.1

    @nn.compact
    def __call__(self, features: Float[Array, "*batch n_features"]) -> Float[Array, "*batch 2"]:
        return Perceptron(self.hidden_sizes, 2, self.output_scale)(features)


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
