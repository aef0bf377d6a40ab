"""From the configured market to samplers: where training, validation and test paths come from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from dhlnn_jax.config import Config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.market import (
    SIMULATORS,
    MarketPath,
    Sampler,
    make_bootstrap_sampler,
    make_simulation_sampler,
)
from dhlnn_jax.settings import Settings, make_settings


class Source(NamedTuple):
    """Everything a run needs of its market.

    Attributes:
      train: sampler of training and validation paths.
      test: test paths. test_groups: their groups.
      settings: the numbers hedgers are trained with.
      test_settings: what hedgers go by on the test paths (another volatility, if it is refreshed).
      market_settings: what the test paths were drawn with (simulated markets).
      notes: what the user should know about the data, one line each.
    """

    train: Sampler
    test: MarketPath
    test_groups: Int[Array, " n_paths"]
    settings: Settings
    test_settings: Settings
    market_settings: Settings
    notes: tuple[str, ...]


def settings_of(config: Config, *, volatility: float | None = None) -> Settings:
    """The numbers of a configuration; `volatility` replaces the market's (recorded markets)."""
    return make_settings(
        n_steps=config.market.n_steps,
        strike=config.contract.strike,
        cost_rate=config.cost.rate,
        risk_aversion=config.risk.risk_aversion,
        tail_prob=config.risk.tail_prob,
        volatility=config.market.volatility if volatility is None else volatility,
        drift=config.market.drift,
        dt=config.market.years_per_step,
        maturity=config.maturity,
        spot0=config.market.spot0,
        premium=config.contract.premium,
        parameters=dict(config.market.parameters),
    )


def make_source(config: Config, key: PRNGKeyArray) -> Source:
    """Samplers and test paths of a configuration; reads files if the market is recorded.

    Args:
      key: draws the simulated test paths.
    Raises: UsageError for prices that cannot be used.
    """
    return _recorded_source(config) if config.market.recorded else _simulated_source(config, key)


def _simulated_source(config: Config, key: PRNGKeyArray) -> Source:
    simulator, market = SIMULATORS[config.market.kind], config.market
    settings = settings_of(config)
    changed: dict[str, Any] = {
        name: jnp.asarray(number, float)
        for name, number in config.evaluation.market.model_dump().items()
        if number is not None
    }
    market_settings = settings._replace(**changed)
    refreshed = config.evaluation.volatility_seen == "refreshed"
    # Test paths are always plain draws, so that their standard errors need no assumption.
    sample_test = make_simulation_sampler(simulator, n_steps=market.n_steps)
    test, groups = jax.jit(sample_test, static_argnums=1)(key, config.evaluation.n_paths, market_settings)
    return Source(
        train=make_simulation_sampler(simulator, n_steps=market.n_steps, noise=market.noise),
        test=test,
        test_groups=groups,
        settings=settings,
        test_settings=settings._replace(volatility=market_settings.volatility) if refreshed else settings,
        market_settings=market_settings,
        notes=(),
    )


def _recorded_source(config: Config) -> Source:
    from dhlnn_jax import history, orderbook, paths_file, recorded

    market = config.market
    path = market.path or ""  # the configuration requires one where there is no default
    if market.kind == "history":
        prices = history.load_history(
            market.path, n_steps=market.n_steps, tickers=market.tickers, test_fraction=market.test_fraction
        )
    elif market.kind == "order_book":
        prices = orderbook.load_order_book(
            path, n_steps=market.n_steps, wap=market.wap, test_fraction=market.test_fraction
        )
    else:
        prices = paths_file.load_paths_file(path, n_steps=market.n_steps, test_fraction=market.test_fraction)
    dt = market.years_per_step
    if market.target_volatility is not None:
        prices = recorded.rescale(prices, dt=dt, target_volatility=market.target_volatility)
    train, train_groups, test, test_groups, notes = recorded.as_market_paths(prices, dt=dt)
    if config.cost.charge == "half_spread" and test.half_spread is None:
        raise UsageError(f"cost.charge 'half_spread': the {market.kind} prices quote none; use cost.rate")
    train, test = (_scaled(paths, market.spot0) for paths in (train, test))
    assert train.variance is not None
    typical = float(jnp.sqrt(jnp.mean(train.variance)))
    settings = settings_of(config, volatility=typical)
    return Source(
        train=make_bootstrap_sampler(train, train_groups),
        test=test,
        test_groups=test_groups,
        settings=settings,
        test_settings=settings,
        market_settings=settings,
        notes=notes,
    )


def _scaled(paths: MarketPath, spot0: float) -> MarketPath:
    return paths._replace(spot=spot0 * paths.spot)
