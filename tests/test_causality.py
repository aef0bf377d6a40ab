"""No look-ahead: prices after t change no hedge ratio up to t, for every method and every price source.

For recorded prices the change is made where the user's data are, in the closes, the order book or the file
of paths, so that windows, fills, scales and volatilities are covered too.
"""

from datetime import date, timedelta

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from runs import METHODS, smoke_run

from dhlnn_jax.config import make_config
from dhlnn_jax.market import MarketPath, gbm_path
from dhlnn_jax.orderbook import sample_seconds
from dhlnn_jax.source import make_source
from dhlnn_jax.trained import load

N_STEPS = 10  # of the smoke run, whose hedgers are looked at
N_PATHS = 6  # of every source, so that little is compiled
CHANGED_AFTER = (0, 3, 8)


@pytest.fixture(scope="session")
def ratios_of(tmp_path_factory):
    """(paths, settings) -> {method: hedge ratios [n_paths, n_steps]} of all methods."""
    hedgers = {name: load(smoke_run(tmp_path_factory.getbasetemp()).folder, name) for name in METHODS}

    @jax.jit
    def ratios(paths, settings):
        return {
            name: jax.vmap(lambda path, h=hedger: h.policy.hedge_ratio(h.params, path, settings))(paths)
            for name, hedger in hedgers.items()
        }

    return ratios


def gbm(folder, after):
    """Simulated paths whose noise is another one after `after`."""
    noise = np.random.default_rng(0).normal(size=(N_PATHS, N_STEPS))
    if after is not None:
        noise[:, after:] = np.random.default_rng(1).normal(size=(N_PATHS, N_STEPS - after))
    path = lambda z: gbm_path(z, spot0=1.0, volatility=0.2, drift=0.0, dt=1 / 365)  # noqa: E731
    source = make_source(make_config({"methods": ["bsdh"], "evaluation": {"n_paths": 2}}), jax.random.key(0))
    return jax.vmap(path)(jnp.asarray(noise, jnp.float32)), source.test_settings


def shipped_history(folder, after):
    """Windows of the shipped closes, changed in memory."""
    config = make_config({"methods": ["bsdh"], "market": {"kind": "history", "n_steps": N_STEPS}})
    source = make_source(config, jax.random.key(0))
    paths = jax.tree.map(lambda x: x[:N_PATHS], source.test)
    return changed_in_memory(paths, after), source.test_settings


def changed_in_memory(paths, after):
    if after is None:
        return paths
    factor = np.ones(paths.spot.shape, np.float32)
    factor[:, after + 1 :] = np.exp(np.random.default_rng(4).normal(0, 0.02, (N_PATHS, N_STEPS - after)))
    return paths._replace(spot=paths.spot * factor)


def recorded(folder, market):
    config = make_config({"methods": ["bsdh"], "market": {"n_steps": N_STEPS, "path": str(folder), **market}})
    source = make_source(config, jax.random.key(0))
    return jax.tree.map(lambda x: x[:N_PATHS], source.test), source.test_settings


def closes(folder, after):
    """A table of closes; the first test window changed after its day `after`, and all days behind it."""
    n_dates, split = 200, 130
    days = [(date(2020, 1, 1) + timedelta(days=i)).isoformat() for i in range(n_dates)]
    rng, change = np.random.default_rng(5), np.random.default_rng(6)
    frames = []
    for ticker in ("AA", "BB", "CC", "DD", "EE", "FF"):
        close = 40 * np.exp(np.cumsum(rng.normal(0, 0.015, n_dates)))
        if after is not None:
            later = slice(split + after + 1, None)
            close[later] *= np.exp(change.normal(0, 0.02, len(close[later])))
        frames.append(pl.DataFrame({"date": days, "ticker": [ticker] * n_dates, "close": close}))
    pl.concat(frames).write_csv(folder / "closes.csv")
    return recorded(folder / "closes.csv", {"kind": "history"})  # the first window of each ticker


def paths_file(folder, after):
    """A file of paths; those of the test part changed after their point `after`."""
    rng = np.random.default_rng(6)
    spot = 7 * np.exp(np.cumsum(rng.normal(0, 0.01, (40, N_STEPS + 1)), axis=1))
    is_test = np.arange(40) >= 30
    if after is not None:
        spot[30:, after + 1 :] *= np.exp(rng.normal(0, 0.02, (10, N_STEPS - after)))
    np.savez(folder / "paths.npz", spot=spot, is_test=is_test)
    market = {"kind": "paths_file", "dt": 1 / 252, "target_volatility": 0.25}
    return recorded(folder / "paths.npz", market)


def order_book(folder, after):
    """Optiver's layout; the quotes of the test buckets changed after the second of sample `after`."""
    n_buckets, rng, change = 20, np.random.default_rng(7), np.random.default_rng(8)
    seconds = np.arange(0, 600, 15)
    seconds = np.unique(np.append(seconds, sample_seconds(N_STEPS)))
    for stock in (0, 1):
        frames = []
        for bucket in range(n_buckets):
            mid = np.exp(np.cumsum(rng.normal(0, 2e-4, len(seconds))))
            half = mid * rng.uniform(1e-4, 3e-4, len(seconds))
            sizes = rng.integers(1, 50, (2, len(seconds)))
            if after is not None and bucket >= n_buckets // 2:
                later = seconds > sample_seconds(N_STEPS)[after]
                mid = np.where(later, mid * np.exp(change.normal(0, 3e-4, len(seconds))), mid)
                half = np.where(later, 1.7 * half, half)
                sizes = np.where(later, sizes[::-1], sizes)
            frames.append(
                pl.DataFrame(
                    {
                        "time_id": np.full(len(seconds), 5 + 3 * bucket),
                        "seconds_in_bucket": seconds,
                        "bid_price1": mid - half,
                        "ask_price1": mid + half,
                        "bid_size1": sizes[0],
                        "ask_size1": sizes[1],
                    }
                )
            )
        where = folder / "book_train.parquet" / f"stock_id={stock}"
        where.mkdir(parents=True)
        pl.concat(frames).write_parquet(where / "part.parquet")
    market = {"kind": "order_book", "test_fraction": 0.5, "target_volatility": 0.2, "dt": 1 / 365}
    return recorded(folder, market)


SOURCES = {f.__name__: f for f in (gbm, shipped_history, closes, paths_file, order_book)}


@pytest.mark.parametrize("source", SOURCES)
def test_prices_after_t_change_no_hedge_ratio_up_to_t(ratios_of, source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths, settings = {}, {}
    for after in (None, *CHANGED_AFTER):
        folder = tmp_path / f"after_{after}"
        folder.mkdir()
        paths[after], settings[after] = SOURCES[source](folder, after)
    base = ratios_of(paths[None], settings[None])
    assert set(base) == set(METHODS)
    for after in CHANGED_AFTER:
        jax.tree.map(np.testing.assert_array_equal, settings[after], settings[None])
        held = ratios_of(paths[after], settings[after])
        upto = slice(None, after + 1)
        np.testing.assert_array_equal(paths[after].spot[:, upto], paths[None].spot[:, upto])
        assert np.all(paths[after].spot[:, after + 1] != paths[None].spot[:, after + 1])
        for name in METHODS:
            now, then = np.asarray(held[name]), np.asarray(base[name])
            np.testing.assert_array_equal(now[:, upto], then[:, upto], err_msg=f"{name} after {after}")
            moved = np.abs(now - then)[:, after + 1 :]
            if name == "no_hedge":
                assert np.all(now == 0)
                continue
            if (name == "periodic_delta" and after >= 5) or (name == "optimal" and after == 8):
                continue  # the one last traded at 5, the other's band is too wide to trade at the last step
            if name == "dhlnn_newton" and source != "gbm":
                continue  # its band is too wide to trade at recorded prices, far from its few epochs
            # the change is seen, and at once by those without a band to stay in
            seen = moved[:, 0] if name in ("bsdh", "leland", "dhmlp") else moved
            assert seen.max() > 1e-4, (name, after)


def test_price_at_t_changes_the_hedge_at_t_for_all_but_no_hedge(ratios_of):
    paths, settings = gbm(None, None)
    base = ratios_of(paths, settings)
    for t in (1, 5, 9):
        held = [ratios_of(MarketPath(paths.spot.at[:, t].mul(factor)), settings) for factor in (0.9, 1.1)]
        for name in METHODS:
            moved = [np.abs(np.asarray(h[name])[:, t] - np.asarray(base[name])[:, t]).max() for h in held]
            rests = name == "no_hedge" or (name == "periodic_delta" and t % 5 != 0)
            rests |= name == "optimal" and t == 9  # nothing is worth its cost at the last step
            assert (max(moved) > 1e-2) != rests, (name, t)


def test_last_price_reaches_no_hedger(ratios_of):
    paths, settings = gbm(None, None)
    base = ratios_of(paths, settings)
    held = ratios_of(paths._replace(spot=paths.spot.at[:, -1].set(jnp.nan)), settings)
    for name in METHODS:
        np.testing.assert_array_equal(held[name], base[name])
