"""From the configured market to training sampler, test paths and the numbers hedgers go by."""

import jax
import numpy as np
import pytest

from dhlnn_jax.config import make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.source import make_source, settings_of

KEY = jax.random.key(3)


def source_of(key=KEY, **sections):
    sections = {"evaluation": {"n_paths": 500}} | sections
    return make_source(make_config({"methods": ["bsdh"], **sections}), key)


def test_settings_are_those_of_the_configuration():
    config = make_config(
        {
            "market": {"n_steps": 20, "dt": 0.01, "volatility": 0.3, "drift": 0.1, "spot0": 2.0},
            "contract": {"strike": 1.9, "premium": 0.05},
            "cost": {"rate": 1e-3},
            "risk": {"risk_aversion": 7.0, "tail_prob": 0.2},
        }
    )
    wanted = dict(
        strike=1.9, cost_rate=1e-3, risk_aversion=7.0, tail_prob=0.2, volatility=0.3, drift=0.1, dt=0.01,
        maturity=0.2, spot0=2.0, premium=0.05,
    )  # fmt: skip
    for name, number in wanted.items():
        assert float(getattr(settings_of(config), name)) == pytest.approx(number, rel=1e-6), name
    assert float(settings_of(config, volatility=0.9).volatility) == pytest.approx(0.9)


def shared_rows(a, b):
    return len({row.tobytes() for row in np.asarray(a.spot)} & {row.tobytes() for row in np.asarray(b.spot)})


def test_simulated_test_paths_are_their_own():
    market = {"n_steps": 5, "spot0": 2.0}
    source, other = source_of(market=market), source_of(jax.random.key(4), market=market)
    assert source.test.spot.shape == (500, 6) and source.notes == ()
    np.testing.assert_array_equal(source.test.spot[:, 0], 2.0)
    np.testing.assert_array_equal(source.test_groups, np.arange(500))
    assert shared_rows(source.test, source_of(market=market).test) == 500
    assert shared_rows(source.test, other.test) == 0
    drawn, more = (source.train(jax.random.key(seed), 500, source.settings)[0] for seed in (5, 6))
    assert shared_rows(drawn, source.test) == shared_rows(more, source.test) == shared_rows(drawn, more) == 0


def test_training_noise_is_the_asked_one_and_testing_always_plain():
    source = source_of(market={"n_steps": 3, "noise": "antithetic"}, training={"n_paths": 10})
    paths, groups = source.train(KEY, 10, source.settings)
    np.testing.assert_array_equal(groups, [*range(5), *range(5)])
    log_return = np.diff(np.log(np.asarray(paths.spot, float)), axis=1) + 0.5 * 0.2**2 / 365
    np.testing.assert_allclose(log_return[:5], -log_return[5:], atol=1e-6)
    np.testing.assert_array_equal(source.test_groups, np.arange(500))


@pytest.mark.parametrize("seen, believed", [("stale", 0.2), ("refreshed", 0.4)])
def test_other_volatility_in_the_test_is_drawn_and_seen_as_asked(seen, believed):
    source = source_of(
        evaluation={"n_paths": 4000, "market": {"volatility": 0.4, "drift": 2.0}, "volatility_seen": seen}
    )
    log_return = np.diff(np.log(np.asarray(source.test.spot, float)), axis=1) * np.sqrt(365)
    error = 0.4 / np.sqrt(2 * log_return.size)
    assert log_return.std() == pytest.approx(0.4, abs=4 * error)
    drift = (2.0 - 0.5 * 0.4**2) / np.sqrt(365)
    assert log_return.mean() == pytest.approx(drift, abs=4 * 0.4 / np.sqrt(log_return.size))
    assert float(source.settings.volatility) == pytest.approx(0.2)
    assert float(source.market_settings.volatility) == pytest.approx(0.4)
    assert float(source.test_settings.volatility) == pytest.approx(believed)
    # training goes on under the volatility it was told
    drawn, _ = source.train(KEY, 4000, source.settings)
    trained = np.diff(np.log(np.asarray(drawn.spot, float)), axis=1).std() * np.sqrt(365)
    assert trained == pytest.approx(0.2, abs=4 * 0.2 / np.sqrt(2 * log_return.size))


def test_shipped_closes_give_windows_with_training_volatility():
    source = source_of(market={"kind": "history", "n_steps": 30, "spot0": 5.0, "tickers": ["IBM", "AAPL"]})
    assert source.test.spot.shape[1] == 31
    np.testing.assert_allclose(source.test.spot[:, 0], 5.0, rtol=1e-6)
    variance = np.asarray(source.test.variance)
    assert variance.shape == source.test.spot.shape and len(np.unique(variance)) == 2  # one a ticker
    assert np.all((variance > 0.15**2) & (variance < 0.8**2))
    assert 0.15 < float(source.settings.volatility) < 0.8
    assert float(source.settings.dt) == pytest.approx(1 / 252)
    rows, groups = source.train(KEY, 50, source.settings)
    assert rows.spot.shape == (50, 31) and groups.shape == (50,)
    np.testing.assert_allclose(rows.spot[:, 0], 5.0, rtol=1e-6)
    assert any("shipped closes" in note for note in source.notes)
    assert source.test_settings is source.settings


def paths_file(folder, **changes):
    rng = np.random.default_rng(2)
    spot = 20.0 * np.exp(np.cumsum(rng.normal(0, 0.02, (60, 5)), axis=1))
    arrays = {"spot": spot, "group_id": np.arange(60) // 2} | changes
    np.savez(folder / "paths.npz", **arrays)
    return {"kind": "paths_file", "path": str(folder / "paths.npz"), "dt": 0.01, "n_steps": 4}


def test_users_own_paths_are_split_by_group_and_rescaled_on_request(tmp_path):
    market = paths_file(tmp_path)
    source = source_of(market=market)
    spot = np.load(tmp_path / "paths.npz")["spot"]
    n_test = len(source.test.spot)
    assert n_test == 2 * round(0.35 * 30)
    np.testing.assert_allclose(source.test.spot, (spot / spot[:, :1])[-n_test:], rtol=1e-6)
    assert len(np.unique(source.test_groups)) == n_test // 2
    raw = np.diff(np.log(spot[:-n_test]), axis=1).std() / np.sqrt(0.01)
    assert float(source.settings.volatility) == pytest.approx(raw, rel=1e-5)
    drawn, _ = source.train(KEY, 200, source.settings)
    same = np.isclose(np.asarray(drawn.spot)[:, None, 1:], np.asarray(source.test.spot)[None, :, 1:]).all(
        axis=2
    )
    assert not same.any()  # what tests is never trained on

    rescaled = source_of(market=market | {"target_volatility": 0.5})
    assert float(rescaled.settings.volatility) == pytest.approx(0.5, rel=1e-5)
    factor = 0.5 / raw
    np.testing.assert_allclose(rescaled.test.spot, np.asarray(source.test.spot) ** factor, rtol=1e-5)
    assert any("multiplied" in note for note in rescaled.notes)


def test_half_spread_is_charged_only_where_one_is_quoted(tmp_path):
    charged = {"charge": "half_spread"}
    with pytest.raises(UsageError, match="the paths_file prices quote none"):
        source_of(market=paths_file(tmp_path), cost=charged)
    with pytest.raises(UsageError, match="the history prices quote none"):
        source_of(market={"kind": "history"}, cost=charged)
    quoted = paths_file(tmp_path, half_spread=np.full((60, 5), 1e-3))
    source = source_of(market=quoted, cost=charged)
    np.testing.assert_allclose(source.test.half_spread, 1e-3, rtol=1e-6)


def test_recorded_test_paths_do_not_depend_on_the_key(tmp_path):
    market = paths_file(tmp_path)
    one, two = source_of(market=market), source_of(jax.random.key(9), market=market)
    np.testing.assert_array_equal(one.test.spot, two.test.spot)
