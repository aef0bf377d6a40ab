"""What the seller owes at maturity: claims on one path of spots."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Real

Payoff = Callable[..., Array]  # (spot [n_times], *, strike) -> money


def european_call(spot: Real[ArrayLike, " n_times"], *, strike: ArrayLike) -> Real[Array, ""]:
    """max(S_n - K, 0), in money. Source: paper Eq. (1)."""
    return jnp.maximum(jnp.asarray(spot)[-1] - strike, 0.0)


def european_put(spot: Real[ArrayLike, " n_times"], *, strike: ArrayLike) -> Real[Array, ""]:
    """max(K - S_n, 0), in money."""
    return jnp.maximum(strike - jnp.asarray(spot)[-1], 0.0)


def lookback_call(spot: Real[ArrayLike, " n_times"], *, strike: ArrayLike) -> Real[Array, ""]:
    """max(max_i S_i - K, 0) over all times, t = 0 included; in money. Source: paper Eq. (2)."""
    return jnp.maximum(jnp.max(jnp.asarray(spot)) - strike, 0.0)


class Claim(NamedTuple):
    """A payoff and what of the path it looks at.

    Attributes:
      payoff: `(spot [n_times], *, strike) -> money` on one path.
      depends_on: "terminal" (the last spot alone), "maximum" (the running maximum alone) or "path".
        For the first two the payoff may be called on a path of that one number, which is what the
        exact results (the law of the unhedged claim, the optimum) are built on.
    """

    payoff: Payoff
    depends_on: Literal["terminal", "maximum", "path"]

    @property
    def terminal(self) -> bool:
        return self.depends_on == "terminal"


CLAIMS: dict[str, Claim] = {
    "european_call": Claim(european_call, "terminal"),
    "european_put": Claim(european_put, "terminal"),
    "lookback_call": Claim(lookback_call, "maximum"),
}
