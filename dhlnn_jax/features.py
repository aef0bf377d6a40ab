"""Named inputs of the networks: `(path, settings) -> [n_times]`.

Each receives the path WITHOUT its last point (`market.observed_path`), so the spot that settles the claim
cannot leak into any decision; that entry t uses nothing after t is tested for every name in `FEATURES`.
Adding one means writing one function and naming it in `FEATURES`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhlnn_jax.market import MarketPath, path_volatility
from dhlnn_jax.settings import Settings

Feature = Callable[[MarketPath, Settings], Array]


def log_spot(path: MarketPath, settings: Settings) -> Array:
    """log S_t (S in money; the notebook of Imaki et al. feeds this whatever the strike)."""
    del settings
    return jnp.log(path.spot)


def log_moneyness(path: MarketPath, settings: Settings) -> Array:
    """log(S_t / K)."""
    return jnp.log(path.spot / settings.strike)


def max_log_moneyness(path: MarketPath, settings: Settings) -> Array:
    """log(max_{s <= t} S_s / K)."""
    return jnp.log(jax.lax.cummax(path.spot) / settings.strike)


def time_to_maturity(path: MarketPath, settings: Settings) -> Array:
    """maturity - t, in years, never negative."""
    elapsed = jnp.arange(path.spot.shape[0], dtype=path.spot.dtype) * settings.dt
    return jnp.maximum(settings.maturity - elapsed, 0.0)


def volatility(path: MarketPath, settings: Settings) -> Array:
    """Volatility known at t, per square root of a year."""
    return path_volatility(path, settings)


def standardised_log_moneyness(path: MarketPath, settings: Settings) -> Array:
    """log(S_t / K) / (volatility sqrt(maturity))."""
    return log_moneyness(path, settings) / _whole_deviation(path, settings)


def standardised_max_log_moneyness(path: MarketPath, settings: Settings) -> Array:
    """log(max_{s <= t} S_s / K) / (volatility sqrt(maturity))."""
    return max_log_moneyness(path, settings) / _whole_deviation(path, settings)


def standardised_time_to_maturity(path: MarketPath, settings: Settings) -> Array:
    """2 (maturity - t) / maturity - 1, in [-1, 1]."""
    return 2.0 * time_to_maturity(path, settings) / settings.maturity - 1.0


def deviations_from_strike(path: MarketPath, settings: Settings) -> Array:
    """log(S_t / K) / (volatility sqrt(time to maturity)), cut at +-10; 0 once no time is left.

    Numerics: the cut keeps one far path near expiry from dominating a batch.
    """
    remaining = jnp.square(volatility(path, settings)) * time_to_maturity(path, settings)
    over = remaining <= 0
    ratio = log_moneyness(path, settings) / jnp.sqrt(jnp.where(over, 1.0, remaining))
    return jnp.where(over, 0.0, jnp.clip(ratio, -10.0, 10.0))


def cost_rate(path: MarketPath, settings: Settings) -> Array:
    """Fraction of the traded notional: what the market quotes where it does, else the contract's rate."""
    if path.half_spread is not None:
        return path.half_spread
    return _constant(path, settings.cost_rate)


def risk_aversion(path: MarketPath, settings: Settings) -> Array:
    """lambda, 1/money."""
    return _constant(path, settings.risk_aversion)


def strike(path: MarketPath, settings: Settings) -> Array:
    """K, money."""
    return _constant(path, settings.strike)


def _whole_deviation(path: MarketPath, settings: Settings) -> Array:
    """Volatility over the whole maturity; 1 where that is zero, so that features stay finite."""
    deviation = volatility(path, settings) * jnp.sqrt(settings.maturity)
    return jnp.where(deviation <= 0, 1.0, deviation)


def _constant(path: MarketPath, value) -> Array:
    return jnp.broadcast_to(jnp.asarray(value, path.spot.dtype), path.spot.shape)


FEATURES: dict[str, Feature] = {
    f.__name__: f
    for f in (
        log_spot,
        log_moneyness,
        max_log_moneyness,
        time_to_maturity,
        volatility,
        standardised_log_moneyness,
        standardised_max_log_moneyness,
        standardised_time_to_maturity,
        deviations_from_strike,
        cost_rate,
        risk_aversion,
        strike,
    )
}

Bends = Callable[[MarketPath, Settings], list[Array]]


def _bends_of_deviations(path: MarketPath, settings: Settings) -> list[Array]:
    cut = 10.0 * volatility(path, settings) * jnp.sqrt(time_to_maturity(path, settings))
    return [-cut, cut]


# Features that at each time are affine in `log_moneyness`, but for some numbers of it [n_times] at which they
# bend, and see nothing else of a path of spots alone. What is not named here is neither.
BENDS: dict[str, Bends] = {
    **dict.fromkeys(
        (
            "log_spot",
            "log_moneyness",
            "time_to_maturity",
            "volatility",
            "standardised_log_moneyness",
            "standardised_time_to_maturity",
            "cost_rate",
            "risk_aversion",
            "strike",
        ),
        lambda path, settings: [],
    ),
    "deviations_from_strike": _bends_of_deviations,
}


def feature_matrix(
    names: Sequence[str], path: MarketPath, settings: Settings
) -> Float[Array, "n_times n_features"]:
    """The named features side by side, for one observed path.

    Raises: ValueError as `check_names`.
    """
    check_names(names)
    return jnp.stack([FEATURES[name](path, settings) for name in names], axis=-1)


def check_names(names: Sequence[str]) -> None:
    """Raises: ValueError for one name alone, and for a name that is not in `FEATURES`."""
    unknown = [names] if isinstance(names, str) else [name for name in names if name not in FEATURES]
    if unknown:
        known = ", ".join(FEATURES)
        raise ValueError(f"features must be several of {known}; got {', '.join(map(repr, unknown))}")
