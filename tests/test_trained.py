"""A finished run's hedgers applied to other prices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import METHODS, programs_kept, smoke_run

import dhlnn_jax
from dhlnn_jax.errors import UsageError
from dhlnn_jax.trained import load

SPOT = np.array([1.0, 1.01, 0.985, 0.99, 1.02, 1.03, 1.01, 1.0, 0.97, 0.99, 1.02])
OTHER = np.array([1.0, 0.97, 1.01, 1.06, 1.02, 0.98, 0.95, 1.01, 1.03, 1.04, 0.96])


ONE_OF_EACH = ("dhlnn", "dhmlp", "whalley_wilmott", "no_hedge")  # dhntb and bsdh are built like these


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return smoke_run(tmp_path_factory.getbasetemp()).folder


@pytest.fixture(scope="session")
def hedgers(folder):
    return {name: load(folder, name) for name in METHODS}


@pytest.fixture(autouse=True)
def programs(tmp_path_factory):
    with programs_kept(tmp_path_factory.getbasetemp() / "programs"):
        yield


@pytest.mark.parametrize("name", METHODS)
def test_hedger_has_the_pnl_that_its_table_was_made_of(folder, hedgers, name):
    table, path = np.load(folder / "pnl.npz"), np.load(folder / "sample_path.npz")
    money = hedgers[name].pnl(path["spot"])
    assert money.pnl.shape == ()
    np.testing.assert_allclose(money.payoff, table["payoff"][0], atol=1e-6)
    for column in ("trading_gain", "trading_cost", "pnl"):
        np.testing.assert_allclose(getattr(money, column), table[f"{name}/{column}"][0], atol=2e-6)
    positions = hedgers[name].positions(path["spot"])
    np.testing.assert_allclose(positions.hedge_ratio, path[f"{name}/hedge_ratio"], atol=2e-5)
    if f"{name}/band_lower" in path:
        np.testing.assert_allclose(positions.band_lower, path[f"{name}/band_lower"], atol=2e-5)
        np.testing.assert_allclose(positions.band_upper, path[f"{name}/band_upper"], atol=2e-5)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_unit_of_the_prices_is_the_unit_of_the_money(hedgers, name):
    rows = np.stack([SPOT, OTHER])
    plain, scaled = hedgers[name].positions(rows), hedgers[name].positions(150 * rows)
    assert plain.hedge_ratio.shape == (2, 10)
    np.testing.assert_allclose(scaled.hedge_ratio, plain.hedge_ratio, atol=1e-5)
    money, dear = hedgers[name].pnl(rows), hedgers[name].pnl(150 * rows)
    for column in ("payoff", "trading_gain", "trading_cost", "pnl"):
        assert getattr(money, column).shape == (2,)
        np.testing.assert_allclose(getattr(dear, column), 150 * getattr(money, column), atol=2e-4)
    np.testing.assert_allclose(dear.turnover, money.turnover, atol=1e-5)
    np.testing.assert_allclose(money.payoff, [0.02, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_hedge_ratios_so_far_do_not_depend_on_what_comes(hedgers, name):
    whole = hedgers[name].positions(np.stack([SPOT, np.append(SPOT[:4], OTHER[4:])])).hedge_ratio
    np.testing.assert_array_equal(whole[0, :4], whole[1, :4])
    for n_times in (1, 6):
        part = hedgers[name].positions(SPOT[:n_times])
        np.testing.assert_allclose(part.hedge_ratio, whole[0, :n_times], atol=1e-6)
    if name != "no_hedge":
        assert float(jnp.abs(whole[0, 4:] - whole[1, 4:]).max()) > 1e-3


def test_bands_are_those_of_the_band_methods(hedgers):
    for name in METHODS:
        positions = hedgers[name].positions(SPOT)
        if name in ("optimal", "dhlnn", "dhlnn_newton", "dhntb", "whalley_wilmott", "fixed_band"):
            lower, upper, held = positions.band_lower, positions.band_upper, positions.hedge_ratio
            inside = (held >= lower - 1e-6) & (held <= upper + 1e-6)
            assert np.all(inside | (lower > upper))
        else:
            assert positions.band_lower is None and positions.band_upper is None
    np.testing.assert_array_equal(hedgers["no_hedge"].positions(SPOT).hedge_ratio, np.zeros(10))


def test_parameters_are_the_trained_ones(folder, hedgers):
    from dhlnn_jax.fitting import build_hedger

    config = hedgers["dhntb"].config
    fresh = build_hedger("dhntb", config).init(jax.random.fold_in(jax.random.key(config.seed), 0))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), hedgers["dhntb"].params, fresh)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert hedgers["bsdh"].params is None


def test_volatility_may_be_given(hedgers):
    given = hedgers["bsdh"].positions(SPOT, volatility=0.2).hedge_ratio
    np.testing.assert_allclose(given, hedgers["bsdh"].positions(SPOT).hedge_ratio, atol=1e-6)
    rough = hedgers["bsdh"].positions(SPOT, volatility=0.8).hedge_ratio
    assert float(rough[8]) > float(given[8])  # out of the money, more volatility is more delta
    assert float(hedgers["bsdh"].pnl(SPOT, volatility=0.8).pnl) != float(hedgers["bsdh"].pnl(SPOT).pnl)


def test_volatility_may_differ_by_path_and_by_price(hedgers):
    hedger, spot = hedgers["dhntb"], np.stack([SPOT, OTHER])
    each = [hedger.positions(row, volatility=v).hedge_ratio for row, v in zip(spot, (0.2, 0.6), strict=True)]
    assert np.abs(each[1] - hedger.positions(OTHER).hedge_ratio).max() > 1e-3
    by_path, by_price = np.array([0.2, 0.6]), np.broadcast_to([[0.2], [0.6]], spot.shape)
    for given in (by_path, by_price):
        held = hedger.positions(spot, volatility=given).hedge_ratio
        np.testing.assert_allclose(held, np.stack(each), atol=1e-5)
    money = hedger.pnl(spot, volatility=by_path).pnl
    alone = [hedger.pnl(row, volatility=v).pnl for row, v in zip(spot, by_path, strict=True)]
    np.testing.assert_allclose(money, np.stack(alone), atol=1e-6)
    # a square of paths and prices is read by path
    square = np.stack([SPOT[:4]] * 4)
    held = hedger.positions(square, volatility=np.array([0.2, 0.2, 0.6, 0.2])).hedge_ratio
    np.testing.assert_array_equal(held[0], held[3])
    assert np.abs(held[2] - held[0]).max() > 1e-3
    for wrong, said in (
        (np.nan, "finite and not negative"),
        (-0.2, "finite and not negative"),
        (np.array([0.2, np.inf]), "finite and not negative"),
        (np.full(3, 0.2), r"a number or of shape \(2,\) or \(2, 11\), got \(3,\)"),
    ):
        for apply in (hedger.positions, hedger.pnl):
            with pytest.raises(UsageError, match=said):
                apply(spot, volatility=wrong)


@pytest.mark.parametrize(
    "spot, said",
    [
        (np.where(SPOT > 1.025, np.nan, SPOT), "finite and positive"),
        (np.where(SPOT > 1.025, np.inf, SPOT), "finite and positive"),
        (np.where(SPOT > 1.025, 0.0, SPOT), "finite and positive"),
        (-SPOT, "finite and positive"),
        (np.append(SPOT, 1.0), "got 12"),
        (np.zeros((3, 0)), "got 0"),
        (1.0, "got 0"),
    ],
)
def test_prices_that_cannot_be_used_are_refused(hedgers, spot, said):
    for apply in (hedgers["bsdh"].positions, hedgers["bsdh"].pnl):
        with pytest.raises(UsageError, match=said):
            apply(spot)


def test_pnl_needs_whole_paths(hedgers):
    with pytest.raises(UsageError, match="spot must have 11 prices along its last axis, got 10"):
        hedgers["dhntb"].pnl(SPOT[:10])


def test_unknown_methods_and_folders_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match="has no method 'dhlmn'; it has optimal, dhlnn, dhlnn_newton"):
        load(folder, "dhlmn")
    with pytest.raises(UsageError, match="holds no finished run"):
        load(tmp_path, "dhlnn")


def test_package_offers_what_the_readme_names(folder):
    assert dhlnn_jax.load is load
    assert dhlnn_jax.load(str(folder), "bsdh").config == dhlnn_jax.load_config(folder / "config.toml")
    with pytest.raises(AttributeError, match="has no attribute 'simulate'"):
        _ = dhlnn_jax.simulate
