"""Closed forms under Black-Scholes at zero interest rate: calls, fixed-strike lookbacks, bandwidths.

Everything takes log-moneyness x = log(S / K) and time to maturity in years, broadcasts, and stays finite,
value and gradient, at expiry, at the money and far from it: where the remaining standard deviation
s = volatility * sqrt(time) is below 1e-6 the expiry value is returned, and both branches of every
`where` are finite ("double where"), because a NaN in the branch not taken leaks through the gradient.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, ArrayLike, Real

_EXPIRED_DEVIATION = 1e-6
# E. g. Broadie, Glasserman, Kou (1997): -zeta(1/2) / sqrt(2 pi).
_MONITORING_SHIFT = 0.5825971579390106


class _Terms(NamedTuple):
    alive: Array  # is there any randomness left?
    deviation: Array  # s = volatility sqrt(time), 1 where not alive
    d1: Array
    d2: Array


def _terms(log_moneyness: ArrayLike, time_to_maturity: ArrayLike, volatility: ArrayLike) -> _Terms:
    """d1 = x / s + s / 2 and d2 = d1 - s, with s = volatility sqrt(time). What is not a number is alive."""
    time = jnp.asarray(time_to_maturity)
    over = time <= 0
    deviation = volatility * jnp.sqrt(jnp.where(over, 1.0, time))
    alive = ~(over | (deviation <= _EXPIRED_DEVIATION))
    deviation = jnp.where(alive, deviation, 1.0)
    d1 = jnp.asarray(log_moneyness) / deviation + 0.5 * deviation
    return _Terms(alive, deviation, d1, d1 - deviation)


def price(
    log_moneyness: Real[ArrayLike, "..."],
    time_to_maturity: Real[ArrayLike, "..."],
    volatility: Real[ArrayLike, "..."],
    *,
    strike: Real[ArrayLike, "..."] = 1.0,
) -> Real[Array, "..."]:
    """Price of a European call, K (e^x N(d1) - N(d2)), in money.

    Args:
      log_moneyness: log(spot / strike). time_to_maturity: years. volatility: per square root of a year.
      strike: money.
    Numerics: at expiry K max(e^x - 1, 0).
    Source: Black and Scholes (1973), Eq. (13), zero rate.
    """
    t = _terms(log_moneyness, time_to_maturity, volatility)
    moneyness = jnp.exp(log_moneyness)
    alive = moneyness * norm.cdf(t.d1) - norm.cdf(t.d2)
    return jnp.where(t.alive, alive, jnp.maximum(moneyness - 1.0, 0.0)) * strike


def delta(
    log_moneyness: Real[ArrayLike, "..."],
    time_to_maturity: Real[ArrayLike, "..."],
    volatility: Real[ArrayLike, "..."],
) -> Real[Array, "..."]:
    """Delta of a European call, N(d1), in units of the underlying.

    Numerics: at expiry 0, 1/2 or 1 for spot below, at or above the strike; its gradient there is 0.
    Source: Black and Scholes (1973); paper Eq. (46)-(47), where N is misprinted as erf.
    """
    t = _terms(log_moneyness, time_to_maturity, volatility)
    expired = 0.5 * (1.0 + jnp.sign(jnp.asarray(log_moneyness)))
    return jnp.where(t.alive, norm.cdf(t.d1), expired)


def gamma(
    log_moneyness: Real[ArrayLike, "..."],
    time_to_maturity: Real[ArrayLike, "..."],
    volatility: Real[ArrayLike, "..."],
    *,
    strike: Real[ArrayLike, "..."] = 1.0,
) -> Real[Array, "..."]:
    """Gamma of a European call, phi(d1) / (S s), in units of the underlying per money.

    Numerics: 0 at expiry (the Dirac mass at the strike is left out).
    """
    t = _terms(log_moneyness, time_to_maturity, volatility)
    spot = strike * jnp.exp(log_moneyness)
    return jnp.where(t.alive, norm.pdf(t.d1) / (spot * t.deviation), 0.0)


def whalley_wilmott_half_width(
    log_moneyness: Real[ArrayLike, "..."],
    time_to_maturity: Real[ArrayLike, "..."],
    volatility: Real[ArrayLike, "..."],
    *,
    cost_rate: Real[ArrayLike, "..."],
    risk_aversion: Real[ArrayLike, "..."],
    strike: Real[ArrayLike, "..."] = 1.0,
) -> Real[Array, "..."]:
    """Half-width of the no-transaction band, (3/2 c S Gamma^2 / lambda)^(1/3), in units of the underlying.

    Args:
      cost_rate: fraction of the traded notional. risk_aversion: 1/money.
    Numerics: computed as a product of cube roots with Gamma^(2/3) = exp(2/3 log Gamma), so that the
      gradient stays finite as Gamma -> 0 (d x^(1/3) / dx does not). The gradient to `cost_rate` at zero
      cost is set to 0; the true one is infinite.
    Source: Whalley and Wilmott (1997), leading order, zero rate.
    """
    t = _terms(log_moneyness, time_to_maturity, volatility)
    log_spot = jnp.log(strike) + log_moneyness
    log_gamma = norm.logpdf(t.d1) - log_spot - jnp.log(t.deviation)
    root_of_gamma = jnp.where(t.alive, jnp.exp((log_spot + 2.0 * log_gamma) / 3.0), 0.0)
    ratio = 1.5 * jnp.asarray(cost_rate) / risk_aversion
    nothing = ratio <= 0
    root_of_ratio = jnp.where(nothing, 0.0, jnp.cbrt(jnp.where(nothing, 1.0, ratio)))
    return root_of_ratio * root_of_gamma


def lookback_price(
    log_moneyness: Real[ArrayLike, "..."],
    max_log_moneyness: Real[ArrayLike, "..."],
    time_to_maturity: Real[ArrayLike, "..."],
    volatility: Real[ArrayLike, "..."],
    *,
    strike: Real[ArrayLike, "..."] = 1.0,
    monitoring_dt: Real[ArrayLike, "..."] = 0.0,
) -> Real[Array, "..."]:
    """Price of a fixed-strike lookback call max(M_T - K, 0), in money, at zero rate.

    With B = max(M, K), y = log(S / B), s = volatility sqrt(time), d1 = y / s + s / 2, d2 = d1 - s:
      max(M - K, 0) + S N(d1) - B N(d2) + S s (phi(d1) + d1 N(d1)).
    If the maximum is only looked at every `monitoring_dt` years, B is moved up by the factor
    e^a, a = 0.5826 volatility sqrt(monitoring_dt), and the part after max(M - K, 0) is scaled by e^-a.

    Args:
      log_moneyness: log(spot / strike). max_log_moneyness: log(running maximum / strike).
      monitoring_dt: years between two looks; 0 is continuous monitoring.
    Numerics: at expiry max(M - K, 0). The shift is an asymptotic correction, good to o(sqrt(dt)): 0.02010
      for 30 daily looks at volatility 0.1, where the true value is 0.02016. Its derivative to
      `monitoring_dt` is infinite at 0.
    Source: Conze and Viswanathan (1991), the limit r -> 0; shift: Broadie, Glasserman, Kou (1999).
    """
    barrier, shift = _lookback_barrier(max_log_moneyness, volatility, monitoring_dt)
    t = _terms(jnp.asarray(log_moneyness) - barrier, time_to_maturity, volatility)
    spot = jnp.exp(log_moneyness)
    future = spot * (norm.cdf(t.d1) + t.deviation * _mean_positive_part(t.d1)) - jnp.exp(barrier) * norm.cdf(
        t.d2
    )
    locked_in = jnp.maximum(jnp.exp(max_log_moneyness) - 1.0, 0.0)
    return (locked_in + jnp.where(t.alive, jnp.exp(-shift) * future, 0.0)) * strike


def lookback_delta(
    log_moneyness: Real[ArrayLike, "..."],
    max_log_moneyness: Real[ArrayLike, "..."],
    time_to_maturity: Real[ArrayLike, "..."],
    volatility: Real[ArrayLike, "..."],
    *,
    monitoring_dt: Real[ArrayLike, "..."] = 0.0,
) -> Real[Array, "..."]:
    """Derivative of `lookback_price` to the spot at a given running maximum, in units of the underlying.

    e^-a (2 N(d1) + s (phi(d1) + d1 N(d1))), with the terms of `lookback_price`; it can exceed 1.

    Numerics: 0 at expiry.
    """
    barrier, shift = _lookback_barrier(max_log_moneyness, volatility, monitoring_dt)
    t = _terms(jnp.asarray(log_moneyness) - barrier, time_to_maturity, volatility)
    alive = jnp.exp(-shift) * (2.0 * norm.cdf(t.d1) + t.deviation * _mean_positive_part(t.d1))
    return jnp.where(t.alive, alive, 0.0)


def _lookback_barrier(max_log_moneyness: ArrayLike, volatility: ArrayLike, monitoring_dt: ArrayLike):
    """log(B / K) with the monitoring shift a added, and a."""
    shift = _MONITORING_SHIFT * volatility * jnp.sqrt(jnp.asarray(monitoring_dt, float))
    return jnp.maximum(jnp.asarray(max_log_moneyness), 0.0) + shift, shift


def _mean_positive_part(d: Array) -> Array:
    """E max(d + Z, 0) = phi(d) + d N(d) for a standard normal Z."""
    return norm.pdf(d) + d * norm.cdf(d)
