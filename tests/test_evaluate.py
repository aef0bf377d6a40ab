"""Measuring a hedger: money per path, metrics and their standard errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import risk
from dhlnn_jax.evaluate import (
    HedgedPaths,
    Regret,
    as_report,
    hedged_paths,
    measure,
    metrics_of,
    regret,
    regret_report,
    standard_errors,
    unhedged_values,
)
from dhlnn_jax.hedger import rule_policy
from dhlnn_jax.market import MarketPath, gbm_path
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract, contract_pnl
from dhlnn_jax.settings import make_settings

SETTINGS = make_settings(n_steps=4, cost_rate=2e-3, risk_aversion=20.0, tail_prob=0.2, premium=0.01)
CONTRACT = Contract(CLAIMS["european_call"], liquidate=True)
METRICS = (
    "entropic_risk_measure",
    "expected_shortfall",
    "value_at_risk",
    "pnl_mean",
    "pnl_std",
    "trading_cost_mean",
    "turnover_mean",
    "trade_frequency_mean",
    "round_trip_mean",
)


def draw(n_paths, seed=1):
    noise = jax.random.normal(jax.random.key(seed), (n_paths, 4))
    return jax.vmap(lambda z: gbm_path(z, spot0=1.0, volatility=0.2, drift=0.0, dt=1 / 365))(noise)


def test_hedged_paths_by_hand():
    policy = rule_policy(lambda path, settings: jnp.array([0.5, 0.2]))
    paths = MarketPath(jnp.array([[1.0, 1.1, 1.3], [1.0, 0.9, 0.8]]))
    settings = make_settings(n_steps=2, cost_rate=0.1, premium=0.05)
    money = hedged_paths(policy, None, paths, Contract(CLAIMS["european_call"]), settings)
    np.testing.assert_allclose(money.payoff, [0.3, 0.0], atol=1e-6)
    np.testing.assert_allclose(money.trading_gain, [0.05 + 0.04, -0.05 - 0.02], atol=1e-6)
    np.testing.assert_allclose(money.trading_cost, [0.1 * (0.5 + 0.33), 0.1 * (0.5 + 0.27)], atol=1e-6)
    np.testing.assert_allclose(money.turnover, [0.8, 0.8], atol=1e-6)
    np.testing.assert_allclose(money.round_trip, [0.3, 0.3], atol=1e-6)
    np.testing.assert_allclose(money.pnl, [0.05 - 0.3 + 0.09 - 0.083, 0.05 - 0.07 - 0.077], atol=1e-6)


@pytest.mark.parametrize("liquidate", [False, True])
def test_the_sale_at_the_end_is_no_decision_to_trade(liquidate):
    """Bought once in two decisions; what is left is sold or settled, whoever decided."""
    policy = rule_policy(lambda path, settings: jnp.array([0.5, 0.5]))
    money = hedged_paths(
        policy, None, MarketPath(jnp.ones((1, 3))), CONTRACT._replace(liquidate=liquidate), SETTINGS
    )
    assert money.trade_frequency.tolist() == [0.5]


def test_regret_has_no_percent_where_nothing_is_owed():
    for optimum, percent in ((2e-2, 5.0), (1e-7, None), (0.0, None), (-1e-2, None)):
        report = regret_report(Regret(np.array(1e-3), np.array(1e-4)), optimum)
        assert report["percent"] == (percent if percent is None else pytest.approx(percent))
        assert report["value"] == pytest.approx(1e-3) and report["stderr"] == pytest.approx(1e-4)


def test_regret_is_paired_with_the_optimum_on_its_paths():
    """A hedger that is the optimum plus a little noise of its own: the error is the noise's alone."""
    common, own = np.random.default_rng(0).normal(size=(2, 4000)) * np.array([[0.05], [0.001]])
    groups = jnp.arange(4000)
    best, near = (
        measure(HedgedPaths(*[jnp.asarray(pnl, float)] * 7), SETTINGS) for pnl in (common, common + own)
    )
    found = regret(near, best, groups)
    alone = standard_errors(near.influences, groups)["entropic_risk_measure"]
    np.testing.assert_allclose(
        found.value, near.values["entropic_risk_measure"] - best.values["entropic_risk_measure"]
    )
    assert 0 < float(found.stderr) < 0.1 * float(alone)


POLICY = rule_policy(lambda path, settings: 0.5 * path.spot + 10.0 * (path.spot - settings.strike))


def test_hedged_paths_is_contract_pnl_of_each_path():
    policy, paths = POLICY, draw(7)
    money = hedged_paths(policy, None, paths, CONTRACT, SETTINGS)

    def one(path):
        return contract_pnl(CONTRACT, path, policy.hedge_ratio(None, path, SETTINGS), SETTINGS)

    np.testing.assert_allclose(money.pnl, jax.jit(jax.vmap(one))(paths), atol=1e-7)
    assert np.ptp(np.asarray(money.pnl)) > 1e-3


@pytest.mark.parametrize("batch_size", [3, 7])  # a remainder of one path, and none
def test_batch_size_does_not_matter(batch_size):
    paths = draw(7)
    whole = hedged_paths(POLICY, None, paths, CONTRACT, SETTINGS)
    parts = hedged_paths(POLICY, None, paths, CONTRACT, SETTINGS, batch_size=batch_size)
    for name in HedgedPaths._fields:
        assert getattr(parts, name).shape == (7,)
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), atol=1e-7)


def columns(n=600):
    rng = np.random.default_rng(3)
    pnl, cost, turnover = (jnp.asarray(rng.normal(m, 0.02, n), jnp.float32) for m in (-0.02, 0.1, 0.7))
    return HedgedPaths(jnp.zeros(n), jnp.zeros(n), cost, pnl, turnover, 0.5 * turnover, 0.25 * turnover)


def test_measure_agrees_with_numpy_on_each_metric():
    money = columns()
    pnl = np.asarray(money.pnl, float)
    worst = np.sort(pnl)[: len(pnl) // 5]
    weight = np.exp(-20.0 * pnl)
    wanted = {
        "entropic_risk_measure": np.log(weight.mean()) / 20.0,
        "expected_shortfall": -worst.mean(),
        "value_at_risk": -worst[-1],
        "pnl_mean": pnl.mean(),
        "pnl_std": pnl.std(),
        "trading_cost_mean": np.asarray(money.trading_cost, float).mean(),
        "turnover_mean": np.asarray(money.turnover, float).mean(),
        "trade_frequency_mean": 0.5 * np.asarray(money.turnover, float).mean(),
        "round_trip_mean": 0.25 * np.asarray(money.turnover, float).mean(),
    }
    measured = measure(money, SETTINGS)
    assert set(measured.values) == set(METRICS) == set(wanted)
    for name in METRICS:
        np.testing.assert_allclose(measured.values[name], wanted[name], rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(
        measured.effective_sample_size, weight.sum() ** 2 / (weight**2).sum(), rtol=1e-4
    )


def test_standard_errors_are_those_of_the_risk_room():
    money, groups = columns(), jnp.arange(600) // 3
    errors = standard_errors(measure(money, SETTINGS).influences, groups)

    @jax.jit
    def one_by_one(money):
        return {
            name: risk.stderr(metric.reduce, getattr(money, metric.column), group_ids=groups)
            for name, metric in metrics_of(SETTINGS).items()
        }

    for name, wanted in one_by_one(money).items():
        np.testing.assert_allclose(errors[name], wanted, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        standard_errors(measure(money, SETTINGS).influences, jnp.arange(600))["pnl_mean"],
        np.asarray(money.pnl).std(ddof=1) / np.sqrt(600),
        rtol=1e-4,
    )


def test_report_holds_plain_numbers_and_none_for_what_is_not_finite():
    report = as_report(
        {"a": jnp.asarray(1.5), "b": np.nan, "c": jnp.inf}, {"a": jnp.asarray(np.nan), "b": 0.25, "c": 0}
    )
    assert report == {
        "a": {"value": 1.5, "stderr": None},
        "b": {"value": None, "stderr": 0.25},
        "c": {"value": None, "stderr": 0.0},
    }
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_unhedged_values_of_a_coin():
    settings = make_settings(n_steps=2, risk_aversion=2.0, tail_prob=0.25, premium=0.5)
    values = unhedged_values(np.array([0.0, 1.0]), np.array([0.75, 0.25]), settings)
    assert set(values) == set(METRICS)
    assert all(isinstance(value, float) for value in values.values())
    assert values["pnl_mean"] == pytest.approx(0.25)
    assert values["pnl_std"] == pytest.approx(np.sqrt(0.75 * 0.25))
    assert values["expected_shortfall"] == pytest.approx(0.5)  # the worst quarter loses 1 - 0.5
    assert values["entropic_risk_measure"] == pytest.approx(np.log(0.75 + 0.25 * np.exp(2.0)) / 2.0 - 0.5)
    assert values["trading_cost_mean"] == values["turnover_mean"] == values["trade_frequency_mean"] == 0.0
