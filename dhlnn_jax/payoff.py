"""What the seller owes at maturity: claims on one path of spots."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Real

from dhlnn_jax.compiling import jit_for_seldom

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


def payoff_at(payoff: Callable[..., Array], spot: np.ndarray) -> np.ndarray:
    """Money owed on paths of one spot each, [n_spots], on the host in float64.

    Args:
      payoff: `(spot [1]) -> money`. As a `jax.tree_util.Partial` it is compiled once for all numbers bound in
        it, otherwise once for itself.
    """
    chunk = 2048  # of one shape, so that any number of spots is one program
    tree = payoff if isinstance(payoff, Partial) else Partial(payoff)
    parts = np.append(spot, np.ones(-len(spot) % chunk)).reshape(-1, chunk)
    with jax.enable_x64(True):
        money = [np.asarray(_payoff_of_spots(tree, part), float) for part in parts]
    return np.concatenate(money)[: len(spot)] if money else np.empty(0)


@jit_for_seldom
def _payoff_of_spots(payoff: Partial, spot: Array) -> Array:
    return jax.vmap(lambda s: payoff(s[None]))(spot)


CLAIMS: dict[str, Claim] = {
    "european_call": Claim(european_call, "terminal"),
    "european_put": Claim(european_put, "terminal"),
    "lookback_call": Claim(lookback_call, "maximum"),
}
