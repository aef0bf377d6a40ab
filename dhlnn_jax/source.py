"""From the configured market to samplers: where training, validation and test paths come from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from dhlnn_jax.compiling import jit_for_seldom
from dhlnn_jax.config import Config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.market import (
    SIMULATORS,
    MarketPath,
    Sampler,
    make_bootstrap_sampler,
    make_simulation_sampler,
)
from dhlnn_jax.settings import Settings, keywords_from, make_settings


class Source(NamedTuple):
    """Everything a run needs of its market.

    Attributes:
      train: sampler of training and validation paths.
      test: test paths. test_groups: their groups.
      settings: the numbers hedgers are trained with.
      test_settings: what hedgers go by on the test paths (another volatility, if it is refreshed).
      market_settings: what the test paths were drawn with (simulated markets).
      notes: what the user should know about the data, one line each.
      from_config: the configuration says all of `train`.
    """

    train: Sampler
    test: MarketPath
    test_groups: Int[Array, " n_paths"]
    settings: Settings
    test_settings: Settings
    market_settings: Settings
    notes: tuple[str, ...]
    from_config: bool = False


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
    return make_sources([config], key)[0]


def make_sources(configs: Sequence[Config], key: PRNGKeyArray) -> list[Source]:
    """Sources of configurations that differ in numbers only, on common random numbers.

    Prices are read once; the same simulated paths are drawn and kept once.
    """
    first = configs[0]
    if first.market.recorded:
        source = _recorded_source(first)
        typical = float(source.settings.volatility)
        every = [settings_of(config, volatility=typical) for config in configs]
        return [source._replace(settings=s, test_settings=s, market_settings=s) for s in every]
    simulator, market = SIMULATORS[first.market.kind], first.market
    train = make_simulation_sampler(simulator, n_steps=market.n_steps, noise=market.noise)
    # Test paths are always plain draws, so that their standard errors need no assumption.
    draw = jit_for_seldom(make_simulation_sampler(simulator, n_steps=market.n_steps), static_argnums=1)
    drawn: dict[tuple[float, ...], Any] = {}
    sources = []
    for config in configs:
        settings = settings_of(config)
        changed: dict[str, Any] = {
            name: jnp.asarray(number, float)
            for name, number in config.evaluation.market.model_dump().items()
            if number is not None
        }
        market_settings = settings._replace(**changed)
        numbers = keywords_from(market_settings, simulator.keywords)
        seen = tuple(float(number) for number in numbers.values())
        if seen not in drawn:
            drawn[seen] = draw(key, config.evaluation.n_paths, market_settings)
        refreshed = config.evaluation.volatility_seen == "refreshed"
        test_settings = settings._replace(volatility=market_settings.volatility) if refreshed else settings
        paths, groups = drawn[seen]
        sources.append(
            Source(train, paths, groups, settings, test_settings, market_settings, notes=(), from_config=True)
        )
    return sources


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
