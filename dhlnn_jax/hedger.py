"""Hedgers: networks or rules put together with what they see and how their outputs become a position.

A trained hedger is cut at its raw outputs: everything before (`outputs`) depends on the parameters and is
what gets linearized or chunked by rows, everything after (`position`, `band`) does not.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dhlnn_jax.features import BENDS, check_names, feature_matrix
from dhlnn_jax.hedge import (
    CLAMPS,
    Rule,
    european_call_delta,
    scan_hedge,
    whalley_wilmott_half_width,
)
from dhlnn_jax.linearize import OutputLayer
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.model import BandNetwork, HedgeNetwork, band_hidden_layers, band_output_layer
from dhlnn_jax.pieces import HiddenLayer
from dhlnn_jax.settings import Settings

Params = Any


class Anchor(NamedTuple):
    """What the outputs of a network are added to, each [n_steps], in units of the underlying.

    Attributes:
      centre: a delta. half_width: that of the band before training; 0 without a prior.
    """

    centre: Array
    half_width: Array


class Piecewise(NamedTuple):
    """A network whose inputs at each time are piecewise linear in `features.log_moneyness`, see `pieces`.

    Attributes:
      layers: params -> its hidden layers. n_units: of all of them together.
      bends: (observed path of spots, settings) -> log-moneyness at which an input bends, [n_times] each.
    """

    layers: Callable[[Params], Sequence[HiddenLayer]]
    n_units: int
    bends: Callable[[MarketPath, Settings], list[Array]]


class Hedger(NamedTuple):
    """A trainable hedger on one path.

    Attributes:
      init: key -> params.
      inputs: (observed path, settings) -> (features [n_steps, n_features], anchor).
      outputs: (params, features, anchor) -> raw [n_steps, ...].
      position: (raw, anchor) -> hedge ratio [n_steps].
      band: (raw, anchor) -> (band_lower, band_upper), each [n_steps]; None for hedgers without a band.
      response: as that of `Policy`, from (params, features, anchor, previous); None if the band says it.
      memoryless: outputs of one decision depend on no other, so that decisions may go through in any chunks.
      output_layer: the parameters in which `outputs` are linear, its inputs from (params, features, anchor);
        None if they feed back into later inputs.
      piecewise: None if the features say more than time and moneyness.
    """

    init: Callable[[PRNGKeyArray], Params]
    inputs: Callable[[MarketPath, Settings], tuple[Array, Anchor]]
    outputs: Callable[[Params, Array, Anchor], Array]
    position: Callable[[Array, Anchor], Array]
    band: Callable[[Array, Anchor], tuple[Array, Array]] | None = None
    response: Callable[[Params, Array, Anchor, Array], Array] | None = None
    memoryless: bool = False
    output_layer: OutputLayer | None = None
    piecewise: Piecewise | None = None


class Policy(NamedTuple):
    """Anything that hedges, trained or not: (params, whole path, settings) -> hedge ratio [n_steps].

    Only the path without its last point reaches the rule or network inside.

    Attributes:
      band: its edges, each [n_steps]; None without one.
      response: (params, whole path, settings, previous [n_steps]) -> hedge ratio [n_steps] at each t if
        previous[t] were held until then; None if the band says it, or if it looks at no previous position.
    """

    hedge_ratio: Callable[[Params, MarketPath, Settings], Array]
    band: Callable[[Params, MarketPath, Settings], tuple[Array, Array]] | None = None
    response: Callable[[Params, MarketPath, Settings, Array], Array] | None = None


@lru_cache(maxsize=32)  # so that the same hedger is the same policy, and compiled once
def policy_of(hedger: Hedger) -> Policy:
    """The policy of a trained hedger; its params are the hedger's."""

    def raw(params: Params, path: MarketPath, settings: Settings) -> tuple[Array, Anchor]:
        features, anchor = hedger.inputs(observed_path(path), settings)
        return hedger.outputs(params, features, anchor), anchor

    def responding(params: Params, path: MarketPath, settings: Settings, previous: Array) -> Array:
        assert hedger.response is not None
        return hedger.response(params, *hedger.inputs(observed_path(path), settings), previous)

    band = hedger.band
    return Policy(
        lambda params, path, settings: hedger.position(*raw(params, path, settings)),
        None if band is None else lambda params, path, settings: band(*raw(params, path, settings)),
        None if hedger.response is None else responding,
    )


def rule_policy(
    rule: Rule,
    band: Callable[[MarketPath, Settings], tuple[Array, Array]] | None = None,
    response: Callable[[MarketPath, Settings, Array], Array] | None = None,
) -> Policy:
    """The policy of a rule without parameters (pass `params=None`)."""

    def responding(params: Params, path: MarketPath, settings: Settings, previous: Array) -> Array:
        assert response is not None
        return response(observed_path(path), settings, previous)

    return Policy(
        lambda params, path, settings: rule(observed_path(path), settings),
        None if band is None else lambda params, path, settings: band(observed_path(path), settings),
        None if response is None else responding,
    )


def make_inputs(
    features: Sequence[str], centre: Rule, centre_strike: float | None, half_width: Rule | None = None
) -> Callable[[MarketPath, Settings], tuple[Array, Anchor]]:
    """Features of the contract, and the anchor, of another strike if `centre_strike` is given."""
    check_names(features)
    names = tuple(features)

    def inputs(path: MarketPath, settings: Settings) -> tuple[Array, Anchor]:
        around = settings if centre_strike is None else settings._replace(strike=jnp.asarray(centre_strike))
        middle = centre(path, around)
        width = jnp.zeros_like(middle) if half_width is None else half_width(path, around)
        return feature_matrix(names, path, settings), Anchor(middle, width)

    return inputs


def make_band_hedger(
    *,
    features: Sequence[str],
    hidden_sizes: Sequence[int] = (64, 64, 64, 64),
    centre: Rule = european_call_delta,
    centre_strike: float | None = None,
    prior: Literal["none", "whalley_wilmott"] = "none",
    clamp: Literal["scan", "parallel"] = "scan",
) -> Hedger:
    """The no-transaction-band network of DHLNN and DHNTB.

    lower = centre - g(w + raw_0), upper = centre + g(w + raw_1), g = leaky ReLU of slope 0.01,
    h_t = min(max(lower, h_{t-1}), upper).

    Args:
      features: names in `features.FEATURES`.
      centre: of the band, for the claim that is hedged: the default is the delta of a European call, and a
        hedger of another claim has to learn the difference (see `hedge.DELTAS`).
      centre_strike: in place of the contract's, money.
      prior: "none": w = 0; "whalley_wilmott": w is the Whalley-Wilmott half-width and the raw outputs start
        at exactly zero, so that training starts from that band.
      clamp: `band_hedge`, or `band_hedge_parallel` for accelerators; same values.
    Raises: ValueError as `features.check_names`.
    Source: paper Eq. (16)-(17) and App. D; prior: Arzel and Lehdili (2026).
    """
    with_prior = prior == "whalley_wilmott"
    network: Any = BandNetwork(tuple(hidden_sizes), output_scale=0.0 if with_prior else 0.1)

    def band(raw: Array, anchor: Anchor) -> tuple[Array, Array]:
        half_widths = nn.leaky_relu(anchor.half_width[..., None] + raw, 0.01)
        return anchor.centre - half_widths[..., 0], anchor.centre + half_widths[..., 1]

    def bends(path: MarketPath, settings: Settings) -> list[Array]:
        return [at for name in features for at in BENDS[name](path, settings)]

    layer, held = band_output_layer(network), CLAMPS[clamp]
    layers = partial(band_hidden_layers, network)
    return Hedger(
        init=lambda key: network.init(key, jnp.zeros((1, len(features)))),
        inputs=make_inputs(
            features, centre, centre_strike, whalley_wilmott_half_width if with_prior else None
        ),
        outputs=lambda params, features, anchor: network.apply(params, features),
        position=lambda raw, anchor: held(*band(raw, anchor)),
        band=band,
        memoryless=True,
        output_layer=layer._replace(inputs=lambda params, features, anchor: layer.inputs(params, features)),
        piecewise=Piecewise(layers, sum(hidden_sizes), bends) if BENDS.keys() >= set(features) else None,
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

    Args: as for `make_band_hedger`.
    """
    network: Any = HedgeNetwork(tuple(hidden_sizes))

    def position(raw: Array, anchor: Anchor) -> Array:
        return anchor.centre + jnp.tanh(raw) if form == "delta_plus_tanh" else raw

    def response(params: Params, features: Array, anchor: Anchor, previous: Array) -> Array:
        return position(network.apply(params, features, previous), anchor)

    def outputs(params: Params, features: Array, anchor: Anchor) -> Array:
        def step(previous, inputs):
            x, around = inputs
            raw = network.apply(params, x, previous)
            return position(raw, around), raw

        return scan_hedge(step, (features, anchor), jnp.zeros_like(anchor.centre[0]))[1]

    return Hedger(
        init=lambda key: network.init(key, jnp.zeros((1, len(features))), jnp.zeros(1)),
        inputs=make_inputs(features, centre, centre_strike),
        outputs=outputs,
        position=position,
        response=response,
    )


def batched_inputs(hedger: Hedger, paths: MarketPath, settings: Settings) -> tuple[Array, Anchor]:
    """`hedger.inputs` over a batch of whole paths."""
    return jax.vmap(lambda path: hedger.inputs(observed_path(path), settings))(paths)
