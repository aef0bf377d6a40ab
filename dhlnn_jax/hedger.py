"""Hedgers: networks or rules put together with what they see and how their outputs become a position.

A trained hedger is cut at its raw outputs: everything before (`outputs`) depends on the parameters and is
what gets linearized or chunked by rows, everything after (`position`, `band`) does not.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dhlnn_jax.features import feature_matrix
from dhlnn_jax.hedge import Rule, band_hedge, european_call_delta, scan_hedge
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.model import BandNetwork, HedgeNetwork
from dhlnn_jax.settings import Settings

Params = Any


class Hedger(NamedTuple):
    """A trainable hedger on one path.

    Attributes:
      init: key -> params.
      inputs: (observed path, settings) -> (features [n_steps, n_features], centre [n_steps]).
      outputs: (params, features, centre) -> raw [n_steps, ...].
      position: (raw, centre) -> hedge ratio [n_steps].
      band: (raw, centre) -> (band_lower, band_upper), each [n_steps]; None for hedgers without a band.
    """

    init: Callable[[PRNGKeyArray], Params]
    inputs: Callable[[MarketPath, Settings], tuple[Array, Array]]
    outputs: Callable[[Params, Array, Array], Array]
    position: Callable[[Array, Array], Array]
    band: Callable[[Array, Array], tuple[Array, Array]] | None = None


class Policy(NamedTuple):
    """Anything that hedges, trained or not: (params, whole path, settings) -> hedge ratio [n_steps].

    Only the path without its last point reaches the rule or network inside. `band` gives its band's edges,
    or is None.
    """

    hedge_ratio: Callable[[Params, MarketPath, Settings], Array]
    band: Callable[[Params, MarketPath, Settings], tuple[Array, Array]] | None = None


def policy_of(hedger: Hedger) -> Policy:
    """The policy of a trained hedger; its params are the hedger's."""

    def raw(params: Params, path: MarketPath, settings: Settings) -> tuple[Array, Array]:
        features, centre = hedger.inputs(observed_path(path), settings)
        return hedger.outputs(params, features, centre), centre

    band = hedger.band
    return Policy(
        lambda params, path, settings: hedger.position(*raw(params, path, settings)),
        None if band is None else lambda params, path, settings: band(*raw(params, path, settings)),
    )


def rule_policy(
    rule: Rule, band: Callable[[MarketPath, Settings], tuple[Array, Array]] | None = None
) -> Policy:
    """The policy of a rule without parameters (pass `params=None`)."""
    return Policy(
        lambda params, path, settings: rule(observed_path(path), settings),
        None if band is None else lambda params, path, settings: band(observed_path(path), settings),
    )


def make_inputs(
    features: Sequence[str], centre: Rule, centre_strike: float | None
) -> Callable[[MarketPath, Settings], tuple[Array, Array]]:
    """Features of the contract, and the centre: a delta, of another strike if `centre_strike` is given."""
    names = tuple(features)

    def inputs(path: MarketPath, settings: Settings) -> tuple[Array, Array]:
        around = settings if centre_strike is None else settings._replace(strike=jnp.asarray(centre_strike))
        return feature_matrix(names, path, settings), centre(path, around)

    return inputs


def make_band_hedger(
    *,
    features: Sequence[str],
    hidden_sizes: Sequence[int] = (64, 64, 64, 64),
    centre: Rule = european_call_delta,
    centre_strike: float | None = None,
) -> Hedger:
    """The no-transaction-band network of DHLNN and DHNTB.

    lower = centre - g(raw_0), upper = centre + g(raw_1), g = leaky ReLU of slope 0.01,
    h_t = min(max(lower, h_{t-1}), upper).

    Source: paper Eq. (16)-(17) and App. D.
    """
    network: Any = BandNetwork(tuple(hidden_sizes))

    def band(raw: Array, centre: Array) -> tuple[Array, Array]:
        half_widths = nn.leaky_relu(raw, 0.01)
        return centre - half_widths[..., 0], centre + half_widths[..., 1]

    return Hedger(
        init=lambda key: network.init(key, jnp.zeros((1, len(features)))),
        inputs=make_inputs(features, centre, centre_strike),
        outputs=lambda params, features, centre: network.apply(params, features),
        position=lambda raw, centre: band_hedge(*band(raw, centre)),
        band=band,
    )


def make_recurrent_hedger(
    *,
    features: Sequence[str],
    hidden_sizes: Sequence[int] = (64, 64, 64, 64),
    form: Literal["delta_plus_tanh", "direct"] = "delta_plus_tanh",
    centre: Rule = european_call_delta,
    centre_strike: float | None = None,
) -> Hedger:
    """The plain network that sees its previous hedge ratio (DHMLP), one scan over time.

    "delta_plus_tanh": h_t = centre + tanh(raw_t), Imaki et al.'s baseline. "direct": h_t = raw_t.
    """
    network: Any = HedgeNetwork(tuple(hidden_sizes))

    def position(raw: Array, centre: Array) -> Array:
        return centre + jnp.tanh(raw) if form == "delta_plus_tanh" else raw

    def outputs(params: Params, features: Array, centre: Array) -> Array:
        def step(previous, inputs):
            x, around = inputs
            raw = network.apply(params, x, previous)
            return position(raw, around), raw

        return scan_hedge(step, (features, centre), jnp.zeros_like(centre[0]))[1]

    return Hedger(
        init=lambda key: network.init(key, jnp.zeros((1, len(features))), jnp.zeros(1)),
        inputs=make_inputs(features, centre, centre_strike),
        outputs=outputs,
        position=position,
    )


def batched_inputs(hedger: Hedger, paths: MarketPath, settings: Settings) -> tuple[Array, Array]:
    """`hedger.inputs` over a batch of whole paths."""
    return jax.vmap(lambda path: hedger.inputs(observed_path(path), settings))(paths)
