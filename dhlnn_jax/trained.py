"""Applies the hedger of a finished run to the user's own prices."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from dhlnn_jax.checkpoint import load_tree
from dhlnn_jax.config import Config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import HedgedPaths, hedged_paths
from dhlnn_jax.fitting import build_hedger, build_policy, make_contract
from dhlnn_jax.hedger import Policy
from dhlnn_jax.market import MarketPath
from dhlnn_jax.methods import METHODS
from dhlnn_jax.results import params_folder, read_results
from dhlnn_jax.settings import Settings, make_settings


class Positions(NamedTuple):
    """What to hold at each given time, [..., n_times]; the band's edges are None for hedgers without one."""

    hedge_ratio: Array
    band_lower: Array | None
    band_upper: Array | None


class TrainedHedger(NamedTuple):
    """A method of a finished run, ready for other prices.

    Prices may be in any unit: the contract is scaled so that `market.spot0` is the first price of each path
    (a strike of 1 with spot0 = 1 is at the money of that day). Hedge ratios have no unit; money comes back in
    the unit of the prices. The method "optimal" was solved for the run's market and sees no other volatility.
    """

    config: Config
    policy: Policy
    params: Any
    settings: Settings

    def positions(self, spot: ArrayLike, *, volatility: ArrayLike | None = None) -> Positions:
        """Hedge ratios and band edges at every price given so far.

        Args:
          spot: [..., n_times], 1 <= n_times; one more than n_steps are allowed, the last is then not used.
          volatility: per square root of a year (0.2 is 20 %): a number, one a path [...], or one a price
            [..., n_times] as known then; default what the hedger was trained with.
        Raises: UsageError for prices and volatilities that cannot be used.
        """
        n_steps = self.config.market.n_steps
        prices = _checked_prices(spot, least=1, most=n_steps + 1)
        settings, variance = self._seen(volatility, prices.shape)

        def until_today(x: np.ndarray) -> np.ndarray:
            # A policy never looks at the last point of a path, so that today is repeated as tomorrow.
            rows = x.reshape(-1, x.shape[-1])[:, :n_steps]
            return np.concatenate([rows, rows[:, -1:]], axis=-1)

        def one(path: MarketPath) -> Positions:
            lower = upper = None
            if self.policy.band is not None:
                lower, upper = self.policy.band(self.params, path, settings)
            return Positions(self.policy.hedge_ratio(self.params, path, settings), lower, upper)

        seen = None if variance is None else jnp.asarray(until_today(variance), float)
        positions = jax.jit(jax.vmap(one))(MarketPath(self._scaled(until_today(prices)), seen))
        return jax.tree.map(lambda x: x.reshape(*prices.shape[:-1], -1), positions)

    def pnl(self, spot: ArrayLike, *, volatility: ArrayLike | None = None) -> HedgedPaths:
        """Payoff, gain, cost and PnL of hedging the contract along whole paths, in the unit of the prices.

        Args:
          spot: [n_paths, n_steps + 1] or [n_steps + 1].
          volatility: as in `positions`.
        Raises: UsageError for prices and volatilities that cannot be used, or a contract charged by the
          half-spread.
        """
        if self.config.cost.charge == "half_spread":
            raise UsageError("this hedger was charged the quoted half-spread; plain prices quote none")
        n_points = self.config.market.n_steps + 1
        prices = _checked_prices(spot, least=n_points, most=n_points)
        settings, variance = self._seen(volatility, prices.shape)
        rows = prices.reshape(-1, n_points)
        seen = None if variance is None else jnp.asarray(variance.reshape(rows.shape), float)
        paths = MarketPath(self._scaled(rows), seen)
        money = hedged_paths(self.policy, self.params, paths, make_contract(self.config), settings)
        unit = jnp.asarray(rows[:, 0] / self.config.market.spot0, float)
        scaled = jax.tree.map(lambda x: x * unit, money)._replace(
            turnover=money.turnover, trade_frequency=money.trade_frequency, round_trip=money.round_trip
        )
        return jax.tree.map(lambda x: x.reshape(prices.shape[:-1]), scaled)

    def _scaled(self, rows: np.ndarray) -> Array:
        return jnp.asarray(rows / rows[:, :1] * self.config.market.spot0, float)

    def _seen(
        self, volatility: ArrayLike | None, shape: tuple[int, ...]
    ) -> tuple[Settings, np.ndarray | None]:
        """Settings with one volatility for all prices, or the variance at each price."""
        if volatility is None:
            return self.settings, None
        given = np.asarray(volatility, float)
        if not (np.isfinite(given).all() and (given >= 0).all()):
            raise UsageError("volatility must be finite and not negative, per square root of a year")
        if given.ndim == 0:
            return self.settings._replace(volatility=jnp.asarray(given, float)), None
        if given.shape == shape[:-1]:
            given = given[..., None]
        elif given.shape != shape:
            wanted = " or ".join(str(one) for one in dict.fromkeys((shape[:-1], shape)) if one)
            raise UsageError(f"volatility must be a number or of shape {wanted}, got {given.shape}")
        return self.settings, np.broadcast_to(np.square(given), shape)


def load(results_folder: str | Path, method: str, *, seed: int | None = None) -> TrainedHedger:
    """A method of a finished run, with the parameters that its table was measured with.

    Args:
      seed: of a run with several; None: the first.
    Raises: UsageError if the folder holds no finished run, or the run has no such method or seed.
    """
    results = read_results(results_folder)
    config = results.config
    if method not in results.metrics["methods"]:
        known = ", ".join(results.metrics["methods"])
        raise UsageError(f"{str(results_folder)!r} has no method {method!r}; it has {known}")
    params = None
    if METHODS[method].trained:
        hedger = build_hedger(method, config)
        if seed is not None and seed not in range(config.seed, config.seed + config.seeds):
            last = config.seed + config.seeds - 1
            raise UsageError(f"{str(results_folder)!r} has seeds {config.seed} to {last}, not {seed}")
        folder = params_folder(Path(results_folder), method, None if seed == config.seed else seed)
        params = load_tree(
            folder / config.measured_parameters, jax.eval_shape(hedger.init, jax.random.key(0))
        )
    settings, market_settings = (
        make_settings(n_steps=config.market.n_steps, **results.meta[name])
        for name in ("settings", "market_settings")
    )
    return TrainedHedger(config, build_policy(method, config, market_settings), params, settings)


def _checked_prices(spot: ArrayLike, *, least: int, most: int) -> np.ndarray:
    """Prices as float64. Raises: UsageError for a wrong length or a price not finite and positive."""
    prices = np.asarray(spot, dtype=float)
    n_points = prices.shape[-1] if prices.ndim else 0
    if not least <= n_points <= most:
        wanted = f"{least}" if least == most else f"{least} to {most}"
        raise UsageError(f"spot must have {wanted} prices along its last axis, got {n_points}")
    if not (np.isfinite(prices).all() and (prices > 0).all()):
        raise UsageError("spot must be finite and positive")
    return prices
