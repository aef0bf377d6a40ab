"""The numbers of a hedging problem, as one traced argument of every compiled step."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike


class Settings(NamedTuple):
    """Numbers of one hedging problem; names and shapes are static, these are not.

    An argument of every compiled function, so that a sweep is a `vmap` over one or more
    fields and changing a number never recompiles.

    Attributes:
      strike: money.
      cost_rate: fraction of the traded notional.
      risk_aversion: 1/money, lambda of the entropic and quadratic risks.
      tail_prob: worst fraction in expected shortfall and value at risk (0.1 = "alpha 0.9").
      volatility: per square root of a year, as the hedger believes it to be.
      drift: per year.
      dt: years between two decisions.
      maturity: years from the first decision to expiry (n_steps * dt unless said otherwise).
      spot0: money at t = 0.
      premium: money received for the claim at t = 0.
      parameters: further numbers by name, for simulators that need more than these.
    """

    strike: Array
    cost_rate: Array
    risk_aversion: Array
    tail_prob: Array
    volatility: Array
    drift: Array
    dt: Array
    maturity: Array
    spot0: Array = 1.0  # type: ignore[assignment]
    premium: Array = 0.0  # type: ignore[assignment]
    parameters: dict[str, Array] = {}  # read only


def make_settings(
    *,
    n_steps: int,
    strike: ArrayLike = 1.0,
    cost_rate: ArrayLike = 0.0,
    risk_aversion: ArrayLike = 1.0,
    tail_prob: ArrayLike = 0.1,
    volatility: ArrayLike = 0.2,
    drift: ArrayLike = 0.0,
    dt: ArrayLike = 1 / 365,
    maturity: ArrayLike | None = None,
    spot0: ArrayLike = 1.0,
    premium: ArrayLike = 0.0,
    parameters: dict[str, ArrayLike] | None = None,
) -> Settings:
    """Settings as arrays of the default float type, with `maturity = n_steps * dt` if it is not given.

    Args:
      n_steps: of the paths that go with them; on longer ones the claim expires before the path ends.
    """
    numbers = {
        "strike": strike,
        "cost_rate": cost_rate,
        "risk_aversion": risk_aversion,
        "tail_prob": tail_prob,
        "volatility": volatility,
        "drift": drift,
        "dt": dt,
        "maturity": n_steps * jnp.asarray(dt, float) if maturity is None else maturity,
        "spot0": spot0,
        "premium": premium,
    }
    arrays = {name: jnp.asarray(number, float) for name, number in numbers.items()}
    further = {name: jnp.asarray(number, float) for name, number in (parameters or {}).items()}
    return Settings(**arrays, parameters=further)


def keywords_from(settings: Settings, names: tuple[str, ...]) -> dict[str, Array]:
    """The named numbers of `settings`, looked up among its fields and then its `parameters`.

    Raises: KeyError naming the number that is in neither.
    """
    found: dict[str, Array] = {}
    for name in names:
        if name != "parameters" and name in Settings._fields:
            found[name] = getattr(settings, name)
        elif name in settings.parameters:
            found[name] = settings.parameters[name]
        else:
            raise KeyError(f"{name!r} is neither a field of Settings nor in settings.parameters")
    return found
