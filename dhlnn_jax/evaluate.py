"""Measures a hedger, trained or not, on given paths: money per path, risks with standard errors."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from dhlnn_jax.compiling import jit_for_seldom
from dhlnn_jax.files import plain
from dhlnn_jax.hedger import Policy
from dhlnn_jax.market import MarketPath
from dhlnn_jax.pnl import Contract, round_trip, trades, trading_gain, turnover
from dhlnn_jax.risk import (
    clustered_stderr,
    effective_sample_size,
    entropic_risk_measure,
    expected_shortfall,
    influence,
    mean,
    standard_deviation,
    value_at_risk,
)
from dhlnn_jax.settings import Settings

Params = Any


class HedgedPaths(NamedTuple):
    """Money of one hedger on each path, [n_paths]; pnl = premium - payoff + trading_gain - trading_cost.

    Attributes:
      payoff, trading_gain, trading_cost, pnl: money. turnover: units of the underlying bought and sold.
      trade_frequency: fraction of the decisions at which anything is traded.
      round_trip: units bought and sold again (or sold and bought back) before the end.
    """

    payoff: Array
    trading_gain: Array
    trading_cost: Array
    pnl: Array
    turnover: Array
    trade_frequency: Array
    round_trip: Array


def hedged_paths(
    policy: Policy,
    params: Params,
    paths: MarketPath,
    contract: Contract,
    settings: Settings,
    *,
    batch_size: int = 10_000,
) -> HedgedPaths:
    """Runs a policy over a batch of whole paths, `batch_size` at a time so that memory stays small.

    Args:
      settings: what the hedger goes by, and the contract's numbers.
    """

    def one(path: MarketPath) -> HedgedPaths:
        hedge_ratio = policy.hedge_ratio(params, path, settings)
        payoff = contract.payoff(path, settings)
        gain = trading_gain(path.spot, hedge_ratio)
        cost = contract.cost(path, settings)(trades(hedge_ratio), path.spot)
        pnl = gain + settings.premium - payoff - cost
        traded = jnp.mean(trades(hedge_ratio)[:-1] != 0, dtype=pnl.dtype)
        return HedgedPaths(payoff, gain, cost, pnl, turnover(hedge_ratio), traded, round_trip(hedge_ratio))

    n_paths = paths.spot.shape[0]
    return jax.lax.map(one, paths, batch_size=min(batch_size, n_paths))


class Metric(NamedTuple):
    """A reported number of a hedger: which money it is taken of, and how it is reduced over paths."""

    column: str
    reduce: Callable[..., Array]


def metrics_of(settings: Settings) -> dict[str, Metric]:
    """The reported metrics by name; risks are larger when worse, all but the last three are in money."""
    return {
        "entropic_risk_measure": Metric(
            "pnl", partial(entropic_risk_measure, risk_aversion=settings.risk_aversion)
        ),
        "expected_shortfall": Metric("pnl", partial(expected_shortfall, tail_prob=settings.tail_prob)),
        "value_at_risk": Metric("pnl", partial(value_at_risk, tail_prob=settings.tail_prob)),
        "pnl_mean": Metric("pnl", mean),
        "pnl_std": Metric("pnl", standard_deviation),
        "trading_cost_mean": Metric("trading_cost", mean),
        "turnover_mean": Metric("turnover", mean),
        "trade_frequency_mean": Metric("trade_frequency", mean),
        "round_trip_mean": Metric("round_trip", mean),
    }


class Measurement(NamedTuple):
    """All metrics of one hedger on one set of paths.

    Attributes:
      values: name -> number.
      influences: name -> influence of each path [n_paths]; a standard error is their clustered sum, a
        paired one that of a difference.
      effective_sample_size: paths that carry the entropic estimate.
    """

    values: dict[str, Array]
    influences: dict[str, Array]
    effective_sample_size: Array


@jit_for_seldom
def measure(money: HedgedPaths, settings: Settings) -> Measurement:
    """Values and influences of all metrics."""
    values, influences = {}, {}
    for name, metric in metrics_of(settings).items():
        sample = getattr(money, metric.column)
        values[name] = metric.reduce(sample)
        influences[name] = influence(metric.reduce, sample)
    ess = effective_sample_size(money.pnl, risk_aversion=settings.risk_aversion)
    return Measurement(values, influences, ess)


@jit_for_seldom
def standard_errors(influences: dict[str, Array], group_ids: Int[Array, " n_paths"]) -> dict[str, Array]:
    """Clustered standard error of each metric from its influences."""
    errors = jax.vmap(clustered_stderr, (0, None))(jnp.stack(list(influences.values())), group_ids)
    return dict(zip(influences, errors, strict=True))


def as_report(values: dict[str, Any], stderrs: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """{"metric": {"value", "stderr"}} as plain floats; a number that is not finite becomes None."""
    return {name: {"value": plain(values[name]), "stderr": plain(stderrs[name])} for name in values}


class Regret(NamedTuple):
    """Entropic risk in excess of the exact optimum's, in money."""

    value: Array | np.ndarray
    stderr: Array | np.ndarray


def regret(measurement: Measurement, optimal: Measurement, group_ids: Int[Array, " n_paths"]) -> Regret:
    """Entropic risk less that of the optimal policy on the same paths, with its paired standard error."""
    name = "entropic_risk_measure"
    apart = jax.tree.map(np.subtract, measurement.influences, optimal.influences)
    error = standard_errors(apart, group_ids)[name]  # of all metrics, by a program that there is already
    return Regret(measurement.values[name] - optimal.values[name], error)


def regret_report(regret: Regret, optimum: float) -> dict[str, float | None]:
    """{"value", "stderr", "percent", "percent_stderr"} as plain floats, percent of the exact `optimum`.

    Percents are None where the optimum is not above 1e-6, money: there is no liability then.
    """
    value, stderr = (plain(x) for x in regret)
    share = 100.0 / optimum if optimum > 1e-6 else None
    percents = (None if x is None or share is None else share * x for x in (value, stderr))
    return dict(
        zip(("value", "stderr", "percent", "percent_stderr"), (value, stderr, *percents), strict=True)
    )


def unhedged_values(payoff: np.ndarray, probability: np.ndarray, settings: Settings) -> dict[str, float]:
    """The metrics of no hedge from the law of the claim (`unhedged.unhedged_law`)."""
    with jax.enable_x64(True):
        numbers = jax.tree.map(lambda x: np.float64(x), settings)
        return jax.tree.map(float, _weighted_values(payoff, probability, numbers))


@jit_for_seldom
def _weighted_values(payoff: Array, probability: Array, settings: Settings) -> dict[str, Array]:
    """Values of all metrics without a hedge, each payoff with its probability."""
    pnl = settings.premium - payoff
    nothing = jnp.zeros_like(pnl)
    return {
        name: metric.reduce(pnl if metric.column == "pnl" else nothing, weights=probability)
        for name, metric in metrics_of(settings).items()
    }
