"""Positions: rules that turn what is known of one path into a hedge ratio, [n_steps].

Every rule receives the observed path (without its last point) and returns the units of the underlying held
over (t, t + 1]. The band rules share one recursion, `band_hedge`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhlnn_jax import black_scholes
from dhlnn_jax.features import cost_rate, log_moneyness, max_log_moneyness, time_to_maturity
from dhlnn_jax.market import MarketPath, path_volatility
from dhlnn_jax.settings import Settings

Rule = Callable[[MarketPath, Settings], Array]


def band_step(
    previous: Float[Array, "*shape"], band_lower: Float[Array, "*shape"], band_upper: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The previous hedge ratio moved to the nearest point of the band; to the midpoint of a crossed one.

    Numerics: gradients are one-sided at ties: on the edge counts as inside, so that derivative to
      `previous` is 1 and to the edges 0 (`jnp.clip` would give halves, and the upper edge if crossed). An
      edge that is not a number gives none, instead of a band that is never left.
    Source: paper Eq. (17); crossed bands as in Imaki et al.'s Clamp.
    """
    inside = jnp.where(
        previous < band_lower, band_lower, jnp.where(previous > band_upper, band_upper, previous)
    )
    return jnp.where(band_lower <= band_upper, inside, 0.5 * (band_lower + band_upper))


def band_hedge(
    band_lower: Float[Array, " n_steps *assets"], band_upper: Float[Array, " n_steps *assets"]
) -> Float[Array, " n_steps *assets"]:
    """Hedge ratio that trades only to the edge of a no-transaction band, starting from no position.

    h_t = min(max(band_lower_t, h_{t-1}), band_upper_t), h_{-1} = 0.

    Args: edges of the band, units of the underlying.
    Numerics: kinks and ties as in `band_step`.
    Source: paper Eq. (17).
    """

    def step(previous, band):
        current = band_step(previous, *band)
        return current, current

    return jax.lax.scan(step, jnp.zeros_like(band_lower[0]), (band_lower, band_upper))[1]


def band_hedge_parallel(
    band_lower: Float[Array, " n_steps *assets"], band_upper: Float[Array, " n_steps *assets"]
) -> Float[Array, " n_steps *assets"]:
    """`band_hedge` in log2(n_steps) rounds over all times at once instead of n_steps one after another.

    A move into one band and then into another is a move into one band: with C_t(h) the point of band t
    nearest to h, C_2(C_1(h)) moves h into [C_2(lower_1), C_2(upper_1)]. So they can be put together in any
    order (an associative scan).

    Numerics: values are those of `band_hedge` bit for bit, gradients too but at ties, where they are finite
      and one-sided as there, perhaps to the other side.
    Source: Blelloch (1990), Prefix Sums and Their Applications, for the scan.
    """
    ordered = band_lower <= band_upper
    midpoint = 0.5 * (band_lower + band_upper)
    bands = jnp.where(ordered, band_lower, midpoint), jnp.where(ordered, band_upper, midpoint)

    def compose(first, then):
        return band_step(first[0], *then), band_step(first[1], *then)

    return band_step(jnp.zeros_like(band_lower), *jax.lax.associative_scan(compose, bands))


CLAMPS = {"scan": band_hedge, "parallel": band_hedge_parallel}


def no_hedge(path: MarketPath, settings: Settings) -> Array:
    """Never holds anything."""
    del settings
    return jnp.zeros_like(path.spot)


def european_call_delta(path: MarketPath, settings: Settings) -> Array:
    """Black-Scholes delta of the European call with `settings.strike`, at each t. Source: paper App. C."""
    return black_scholes.delta(
        log_moneyness(path, settings), time_to_maturity(path, settings), path_volatility(path, settings)
    )


def european_put_delta(path: MarketPath, settings: Settings) -> Array:
    """Black-Scholes delta of the European put, N(d1) - 1."""
    return european_call_delta(path, settings) - 1.0


def lookback_call_delta(path: MarketPath, settings: Settings) -> Array:
    """Delta of the fixed-strike lookback call, looked at once every dt."""
    return black_scholes.lookback_delta(
        log_moneyness(path, settings),
        max_log_moneyness(path, settings),
        time_to_maturity(path, settings),
        path_volatility(path, settings),
        monitoring_dt=settings.dt,
    )


DELTAS: dict[str, Rule] = {
    "european_call": european_call_delta,
    "european_put": european_put_delta,
    "lookback_call": lookback_call_delta,
}


def delta_hedge(path: MarketPath, settings: Settings) -> Array:
    """Holds the Black-Scholes delta of the European call: rebalanced at every step, whatever it costs."""
    return european_call_delta(path, settings)


def leland_hedge(path: MarketPath, settings: Settings, *, delta: Rule = european_call_delta) -> Array:
    """The delta at Leland's volatility, sigma^2 (1 + sqrt(8 / pi) c / (sigma sqrt(dt))), at every step.

    For the seller of a convex claim; c is the cost of one trade (Leland's k is that of a round trip, 2 c).

    Source: Leland (1985), Eq. (10).
    """
    believed = path_volatility(path, settings)
    trading = jnp.sqrt(8.0 / jnp.pi) * cost_rate(path, settings) / jnp.sqrt(settings.dt)
    return delta(path._replace(variance=believed * (believed + trading)), settings)


def periodic_delta_hedge(
    path: MarketPath, settings: Settings, *, every: int, delta: Rule = european_call_delta
) -> Array:
    """The delta of every `every`-th step, held in between."""
    step = jnp.arange(path.spot.shape[0])
    return delta(path, settings)[step - step % every]


def fixed_band(
    path: MarketPath, settings: Settings, *, half_width: float, delta: Rule = european_call_delta
) -> tuple[Array, Array]:
    """Edges delta -+ a constant half-width, units of the underlying."""
    centre = delta(path, settings)
    return centre - half_width, centre + half_width


def whalley_wilmott_half_width(path: MarketPath, settings: Settings) -> Array:
    """Half-width of the Whalley-Wilmott band of the European call (and put: same gamma), at each t."""
    return black_scholes.whalley_wilmott_half_width(
        log_moneyness(path, settings),
        time_to_maturity(path, settings),
        path_volatility(path, settings),
        cost_rate=cost_rate(path, settings),
        risk_aversion=settings.risk_aversion,
        strike=settings.strike,
    )


def whalley_wilmott_band(
    path: MarketPath, settings: Settings, *, delta: Rule = european_call_delta
) -> tuple[Array, Array]:
    """Edges delta -+ half-width of the Whalley-Wilmott band for a European claim."""
    half_width, centre = whalley_wilmott_half_width(path, settings), delta(path, settings)
    return centre - half_width, centre + half_width


def whalley_wilmott_hedge(
    path: MarketPath, settings: Settings, *, delta: Rule = european_call_delta
) -> Array:
    """Trades to the edge of the Whalley-Wilmott band."""
    return band_hedge(*whalley_wilmott_band(path, settings, delta=delta))


def scan_hedge(
    step: Callable[[Array, Any], tuple[Array, Array]], inputs: Any, previous: Array
) -> tuple[Array, Array]:
    """The one recursion of hedgers that see their previous hedge ratio.

    Args:
      step: `(previous, inputs_t) -> (hedge_ratio_t, raw_t)`.
      inputs: pytree with leading axis n_steps.
    Returns: hedge ratios and raw outputs, [n_steps].
    """

    def body(carry, x):
        current, raw = step(carry, x)
        return current, (current, raw)

    return jax.lax.scan(body, previous, inputs)[1]
