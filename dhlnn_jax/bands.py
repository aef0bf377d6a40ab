"""No-transaction bands over spot and time: those of band policies, and what other policies have for one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dhlnn_jax.hedge import band_step
from dhlnn_jax.hedger import Policy
from dhlnn_jax.market import MarketPath
from dhlnn_jax.settings import Settings

Params = Any


def respond(policy: Policy, params: Params, path: MarketPath, settings: Settings, previous: Array) -> Array:
    """Hedge ratio at each t [n_steps] if previous[t] were held until then, along one whole path."""
    if policy.response is not None:
        return policy.response(params, path, settings, previous)
    if policy.band is not None:
        return band_step(previous, *policy.band(params, path, settings))
    return policy.hedge_ratio(params, path, settings)


def effective_band(
    policy: Policy,
    params: Params,
    spot: Float[Array, " n_spot"],
    settings: Settings,
    n_steps: int,
    *,
    tolerance: float = 0.01,
    n_swept: int = 601,
) -> tuple[Float[Array, "n_steps n_spot"], Float[Array, "n_steps n_spot"]]:
    """Edges of the no-transaction band at each time and spot, on paths that jump from spot0 there and stay.

    A policy without a band of its own is swept over previous hedge ratios from -1.5 to 1.5: the edges are
    the smallest and the largest from which it trades less than `tolerance`; NaN where there is none.

    Args:
      spot: money. tolerance: units of the underlying.
      n_swept: previous hedge ratios that are tried.
    Numerics: t = 0 is at spot0, whatever `spot` says.
    """

    def at(level: Array) -> tuple[Array, Array]:
        path = MarketPath(jnp.full(n_steps + 1, level).at[0].set(settings.spot0))
        if policy.band is not None:
            return policy.band(params, path, settings)
        previous = jnp.linspace(-1.5, 1.5, n_swept)
        # One at a time: a sweep of all spots, times and ratios through a network would fill the memory.
        reached = jax.lax.map(
            lambda held: respond(policy, params, path, settings, jnp.full(n_steps, held)), previous
        )
        rests = jnp.abs(reached - previous[:, None]) < tolerance
        lower = jnp.min(jnp.where(rests, previous[:, None], jnp.inf), axis=0)
        upper = jnp.max(jnp.where(rests, previous[:, None], -jnp.inf), axis=0)
        none = ~rests.any(axis=0)
        return jnp.where(none, jnp.nan, lower), jnp.where(none, jnp.nan, upper)

    lower, upper = jax.jit(lambda levels: jax.lax.map(at, levels, batch_size=101))(spot)
    return lower.T, upper.T
