"""Positions times price changes, less costs, less the claim: the seller's profit and loss on one path."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from dhlnn_jax.market import MarketPath
from dhlnn_jax.payoff import Claim
from dhlnn_jax.settings import Settings

# (trade [n_steps + 1, ...], spot [n_steps + 1, ...]) -> money; the last trade sells what is left.
CostFn = Callable[[Array, Array], Array]


def trades(hedge_ratio: Float[Array, " n_steps *assets"]) -> Float[Array, " n_times *assets"]:
    """Units bought at t = 0..n_steps: h_t - h_{t-1} with h_{-1} = 0; the last one sells what is left."""
    flat = jnp.zeros_like(hedge_ratio[:1])
    return jnp.diff(hedge_ratio, axis=0, prepend=flat, append=flat)


def trading_gain(
    spot: Float[Array, " n_times *assets"], hedge_ratio: Float[Array, " n_steps *assets"]
) -> Float[Array, ""]:
    """sum_t h_t (S_{t+1} - S_t) over times and instruments, in money. Source: paper Eq. (8)."""
    _check_lengths(spot, hedge_ratio)
    return jnp.sum(hedge_ratio * jnp.diff(spot, axis=0))


def turnover(hedge_ratio: Float[Array, " n_steps *assets"]) -> Float[Array, ""]:
    """sum_t |h_t - h_{t-1}|, first purchase included, final sale not; in units of the underlying."""
    return jnp.sum(_absolute(trades(hedge_ratio)[:-1]))


def round_trip(hedge_ratio: Float[Array, " n_steps *assets"]) -> Float[Array, ""]:
    """Units bought and sold again, or sold and bought back, before the end: the smaller of both sums.

    0 for who trades one way only: a band of which one edge is out of reach.
    """
    trade = trades(hedge_ratio)[:-1]
    bought, sold = (jnp.sum(jnp.maximum(sign * trade, 0), axis=0) for sign in (1, -1))
    return jnp.sum(jnp.minimum(bought, sold))


def proportional_cost(rate: ArrayLike, *, liquidate: bool = False) -> CostFn:
    """c sum_t S_t |trade_t|, in money; the final sale is charged only if `liquidate`.

    Args:
      rate: fraction of the traded notional: a number, or one for each time.
    Numerics: |.| has derivative 0 at 0 here (JAX's has 1). Inside a band both trades' derivatives cancel.
    Source: paper Eq. (4) and (8), trading and pricing at t, first purchase charged.
    """
    return _summed_cost(rate, lambda trade, spot: spot * _absolute(trade), liquidate)


def squared_difference_cost(rate: ArrayLike, *, liquidate: bool = False) -> CostFn:
    """c sum_t S_t (h_t - h_{t-1})^2: the paper's smooth surrogate. Source: paper Eq. (13)."""
    return _summed_cost(rate, lambda trade, spot: spot * jnp.square(trade), liquidate)


def difference_of_squares_cost(rate: ArrayLike, *, liquidate: bool = False) -> CostFn:
    """c sum_t S_t (h_t^2 - h_{t-1}^2): what Eq. (14) as printed is the gradient of. It can be negative.

    Source: paper Eq. (14), kept as an ablation.
    """

    def charge(trade: Array, spot: Array) -> Array:
        after = jnp.cumsum(trade, axis=0)
        return spot * (jnp.square(after) - jnp.square(after - trade))

    return _summed_cost(rate, charge, liquidate)


COST_MODELS: dict[str, Callable[..., CostFn]] = {
    "proportional": proportional_cost,
    "squared_difference": squared_difference_cost,
    "difference_of_squares": difference_of_squares_cost,
}


def hedged_pnl(
    spot: Float[Array, " n_times *assets"],
    hedge_ratio: Float[Array, " n_steps *assets"],
    payoff: Real[ArrayLike, ""],
    *,
    cost: CostFn,
    premium: Real[ArrayLike, ""] = 0.0,
) -> Float[Array, ""]:
    """Terminal profit and loss of one hedged short claim on one path.

    pnl = premium - payoff + sum_t h_t (S_{t+1} - S_t) - cost(trades, S),
    trade_t = h_t - h_{t-1}, h_{-1} = 0.

    Args:
      spot: money, at t = 0..n_steps (n_times = n_steps + 1).
      hedge_ratio: units of underlying; entry t is held over (t, t+1], chosen from data up to t.
      payoff: money owed at maturity.
      cost: `(trade [n_times, ...], spot [n_times, ...]) -> money`; trade[-1] sells the last position,
        and the function decides whether that is charged.
      premium: money received at t = 0.
    Returns: money; negative is a loss.
    Raises: ValueError if the lengths disagree (checked in the body, at trace time).
    Numerics: inside the band h_t == h_{t-1}, so |.| sits on its kink; see `proportional_cost`.
    Source: paper Eq. (8), first purchase charged, traded and priced at t.
    """
    gain = trading_gain(spot, hedge_ratio)
    return gain + premium - payoff - cost(trades(hedge_ratio), spot)


class Contract(NamedTuple):
    """What the seller owes and how trading is charged: all that is static about the money of a problem.

    Attributes:
      claim: the payoff and what it depends on.
      cost_model: `(rate, *, liquidate) -> CostFn`.
      liquidate: charge the sale of the last position.
      charge_half_spread: the rate is the path's own half-spread instead of `settings.cost_rate`.
    """

    claim: Claim
    cost_model: Callable[..., CostFn] = proportional_cost
    liquidate: bool = False
    charge_half_spread: bool = False

    def payoff(self, path: MarketPath, settings: Settings) -> Array:
        """Money owed at maturity on one whole path."""
        return self.claim.payoff(path.spot, strike=settings.strike)

    def cost(self, path: MarketPath, settings: Settings) -> CostFn:
        """The cost function of one whole path."""
        rate = settings.cost_rate
        if self.charge_half_spread:
            if path.half_spread is None:
                raise ValueError("charge_half_spread needs a market that quotes one, this path has none")
            rate = path.half_spread
        return self.cost_model(rate, liquidate=self.liquidate)


def contract_pnl(
    contract: Contract, path: MarketPath, hedge_ratio: Float[Array, " n_steps *assets"], settings: Settings
) -> Float[Array, ""]:
    """`hedged_pnl` of a contract on one whole path."""
    return hedged_pnl(
        path.spot,
        hedge_ratio,
        contract.payoff(path, settings),
        cost=contract.cost(path, settings),
        premium=settings.premium,
    )


def _summed_cost(rate: ArrayLike, charge: Callable[[Array, Array], Array], liquidate: bool) -> CostFn:
    """rate_t * charge_t summed over times and instruments, the last trade left out unless it is a sale."""

    def cost(trade: Array, spot: Array) -> Array:
        rates = jnp.asarray(rate)
        if rates.ndim:
            rates = rates.reshape(rates.shape + (1,) * (trade.ndim - rates.ndim))
        charged = jnp.broadcast_to(rates, trade.shape) * charge(trade, spot)
        return jnp.sum(charged if liquidate else charged[:-1])

    return cost


def _absolute(x: Array) -> Array:
    return jnp.sign(x) * x


def _check_lengths(spot: Array, hedge_ratio: Array) -> None:
    if spot.shape != (hedge_ratio.shape[0] + 1, *hedge_ratio.shape[1:]):
        raise ValueError(
            f"spot must have one time more than hedge_ratio, got {spot.shape} and {hedge_ratio.shape}"
        )
