import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import recorded
from dhlnn_jax.errors import UsageError

DT = 1 / 252


def usage_error(match):
    """One line, and the given text in it."""
    return pytest.raises(UsageError, match=rf"\A[^\n]*{match}[^\n]*\Z")


def random_paths(*, n_groups=40, n_assets=2, n_steps=3, half_spread=False, seed=0):
    rng = np.random.default_rng(seed)
    n_rows = n_groups * n_assets
    asset = np.tile(np.arange(n_assets), n_groups)
    log_return = rng.normal(size=(n_rows, n_steps)) * 0.01 * (1 + asset[:, None])
    price = 7.0 * np.exp(np.concatenate([np.zeros((n_rows, 1)), log_return.cumsum(axis=1)], axis=1))
    spread = rng.uniform(1e-4, 2e-4, price.shape) if half_spread else None
    group = np.repeat(10 * np.arange(n_groups), n_assets)
    names = tuple("ABCDEFGHIJ"[:n_assets])
    return recorded.normalised_paths(price, asset=asset, group=group, assets=names, half_spread=spread)


def random_market(**kwargs):
    return recorded.RecordedMarket(
        *recorded.split_by_group(random_paths(**kwargs), test_fraction=0.25), ("read",)
    )


def test_normalised_paths_divide_by_the_first_price_and_are_ordered_by_group():
    paths = recorded.normalised_paths(
        np.array([[2.0, 3.0], [4.0, 2.0], [5.0, 5.5]]),
        asset=np.array([1, 0, 0]),
        group=np.array([8, 8, 3]),
        assets=("A", "B"),
        half_spread=np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]),
    )
    np.testing.assert_allclose(paths.spot, [[1, 1.1], [1, 0.5], [1, 1.5]])
    np.testing.assert_array_equal(paths.half_spread, [[0.5, 0.6], [0.3, 0.4], [0.1, 0.2]])
    np.testing.assert_array_equal(paths.group, [3, 8, 8])
    np.testing.assert_array_equal(paths.asset, [0, 0, 1])


def test_split_is_by_group_in_order_of_the_group_never_by_row():
    train, test = recorded.split_by_group(random_paths(n_groups=10), test_fraction=0.3)
    np.testing.assert_array_equal(np.unique(train.group), 10 * np.arange(7))
    np.testing.assert_array_equal(np.unique(test.group), [70, 80, 90])
    assert len(train.spot) == 14 and len(test.spot) == 6


def test_split_gives_each_part_a_group_where_there_are_two():
    two = random_paths(n_groups=2)
    for fraction in (0.01, 0.99):
        train, test = recorded.split_by_group(two, test_fraction=fraction)
        assert len(train.spot) == len(test.spot) == 2
    train, test = recorded.split_by_group(random_paths(n_groups=1), test_fraction=0.5)
    assert len(train.spot) == 2 and len(test.spot) == 0


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, float("nan")])
def test_split_refuses_a_fraction_outside_0_and_1(fraction):
    with usage_error(r"test_fraction must lie strictly between 0 and 1, got"):
        recorded.split_by_group(random_paths(), test_fraction=fraction)


def test_asset_volatility_by_hand():
    spot = np.exp(np.array([[0.0, 0.01, 0.0], [0.0, 0.03, 0.02], [0.0, -0.02, 0.02]]))
    paths = recorded.PathSet(spot, None, np.array([0, 0, 2]), np.arange(3), ("A", "B", "C"))
    volatility = recorded.asset_volatility(paths, dt=0.25)
    # A: returns 0.01 -0.01 0.03 -0.01, mean 0.005, mean square 3e-4; C: returns -0.02 0.04
    np.testing.assert_allclose(volatility, [np.sqrt(3e-4 - 2.5e-5) / 0.5, np.nan, 0.03 / 0.5], rtol=1e-12)


def test_rescale_hits_the_target_exactly_on_the_training_part():
    market = random_market(half_spread=True)
    before = recorded.asset_volatility(market.train, dt=DT)
    scaled = recorded.rescale(market, dt=DT, target_volatility=0.2)
    np.testing.assert_allclose(recorded.asset_volatility(scaled.train, dt=DT), 0.2, rtol=1e-12)
    for old, new in ((market.train, scaled.train), (market.test, scaled.test)):
        factor = (0.2 / before)[old.asset][:, None]
        np.testing.assert_allclose(np.log(new.spot), factor * np.log(old.spot), atol=1e-15)
        np.testing.assert_allclose(new.half_spread, factor * old.half_spread)
    assert scaled.notes[0] == "read"
    assert scaled.notes[1].startswith("log returns and half-spreads multiplied, to reach volatility 0.2")
    assert f"A {0.2 / before[0]:.4g}, B {0.2 / before[1]:.4g}" in scaled.notes[1]


def test_test_prices_change_neither_factors_nor_variance():
    market = random_market()
    other = market._replace(test=market.test._replace(spot=market.test.spot**3))
    first, second = (recorded.rescale(m, dt=DT, target_volatility=0.2) for m in (market, other))
    assert first.notes == second.notes
    np.testing.assert_array_equal(first.train.spot, second.train.spot)
    for a, b in ((market, other), (first, second)):
        out_a, out_b = recorded.as_market_paths(a, dt=DT), recorded.as_market_paths(b, dt=DT)
        np.testing.assert_array_equal(out_a[0].variance, out_b[0].variance)
        np.testing.assert_array_equal(out_a[2].variance, out_b[2].variance)
        assert not np.array_equal(out_a[2].spot, out_b[2].spot)


def test_as_market_paths_gives_training_variance_and_dense_groups():
    market = random_market(n_groups=8, half_spread=True)
    train, train_groups, test, test_groups, notes = recorded.as_market_paths(market, dt=DT)
    variance = recorded.asset_volatility(market.train, dt=DT) ** 2
    np.testing.assert_allclose(train.variance, np.tile(variance, 6)[:, None] * np.ones((1, 4)), rtol=1e-6)
    np.testing.assert_allclose(test.variance, np.tile(variance, 2)[:, None] * np.ones((1, 4)), rtol=1e-6)
    np.testing.assert_array_equal(train_groups, np.repeat(np.arange(6), 2))
    np.testing.assert_array_equal(test_groups, [0, 0, 1, 1])
    np.testing.assert_allclose(test.spot, market.test.spot, rtol=1e-6)
    np.testing.assert_allclose(test.half_spread, market.test.half_spread, rtol=1e-6)
    assert {x.dtype for x in (*train, *test)} == {jnp.dtype("float32")}
    assert any(note.startswith("too few test time groups (2, want 30)") for note in notes)
    assert any(note.startswith("mean half-spread of the test part") for note in notes)


def test_thirty_test_groups_are_enough():
    *_, notes = recorded.as_market_paths(random_market(n_groups=120), dt=DT)
    assert not any(note.startswith("too few") for note in notes)
    *_, notes = recorded.as_market_paths(random_market(n_groups=116), dt=DT)
    assert any(note.startswith("too few test time groups (29") for note in notes)


def test_assets_unseen_in_training_are_dropped_and_noted():
    market = random_market(n_groups=8)
    market = market._replace(train=recorded.take_rows(market.train, market.train.asset == 1))
    for out in (market, recorded.rescale(market, dt=DT, target_volatility=0.3)):
        _, _, test, test_groups, notes = recorded.as_market_paths(out, dt=DT)
        assert test.spot.shape == (2, 4) and test_groups.tolist() == [0, 1]
        assert notes.count("2 test rows dropped, of assets without training rows: A") == 1
        assert np.isfinite(test.variance).all()


def test_few_windows_and_still_prices_are_refused():
    with usage_error(r"too few windows: 2 training and 0 test windows of 4 prices, at least 2 of each"):
        recorded.as_market_paths(random_market(n_groups=1), dt=DT)
    market = random_market()
    still = market._replace(train=market.train._replace(spot=np.ones_like(market.train.spot)))
    with usage_error("training prices never move for A, B"):
        recorded.as_market_paths(still, dt=DT)
    with usage_error("target volatility must be positive and finite, got -0.1"):
        recorded.rescale(market, dt=DT, target_volatility=-0.1)


def test_many_assets_are_noted_as_a_range():
    *_, notes = recorded.as_market_paths(random_market(n_assets=10), dt=DT)
    assert any(note.startswith("training volatility: ") and note.endswith("over 10 assets") for note in notes)


# ---- the paths file
