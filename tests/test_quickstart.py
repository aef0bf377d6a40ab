"""The evidence: configs/quickstart.toml with all its settings, judged against the exact optimum.

Every judgement is also made of no hedge, of untrained parameters and of the trained hedge with its sign
flipped, and must fail for each.
"""

import jax
import numpy as np
import pytest

from dhlnn_jax.fitting import build_hedger, evaluator, make_contract
from dhlnn_jax.hedger import policy_of
from dhlnn_jax.source import make_source

OPTIMUM = 0.025862  # exact, entropic risk at volatility 0.2, strike 1, cost 2e-3, lambda 50, 30 days
TRAINED = ("dhlnn", "dhntb", "dhmlp")


def entropic_risk(pnl, risk_aversion=50.0):
    """(risk, its standard error) of a sample, in float64."""
    scaled = -risk_aversion * np.asarray(pnl, float)
    weight = np.exp(scaled - scaled.max())
    value = (np.log(weight.mean()) + scaled.max()) / risk_aversion
    return value, weight.std() / weight.mean() / np.sqrt(len(weight)) / risk_aversion


def within_one_percent(pnl):
    """Whether a hedger's entropic risk is at most 1 % above the exact optimum, give or take 2 s.e."""
    value, error = entropic_risk(pnl)
    return OPTIMUM - 3 * error - 1e-7 <= value <= 1.01 * OPTIMUM + 2 * error and error < 1e-4


@pytest.fixture(scope="session")
def best(quickstart):
    """The trained method with the smallest risk."""
    finals = {name: quickstart.metrics["methods"][name]["final"] for name in TRAINED}
    return min(TRAINED, key=lambda name: finals[name]["entropic_risk_measure"]["value"])


def value_of(results, name):
    number = results.metrics["methods"][name]["final"]["entropic_risk_measure"]
    return number["value"], number["stderr"]


def test_problem_is_the_one_whose_optimum_is_known(quickstart):
    config = quickstart.config
    assert (config.contract.kind, config.contract.strike, config.maturity) == ("european_call", 1.0, 30 / 365)
    assert (config.market.volatility, config.market.drift, config.market.n_steps) == (0.2, 0.0, 30)
    assert (config.cost.rate, config.cost.liquidate, config.risk.risk_aversion) == (2e-3, False, 50.0)
    assert config.evaluation.n_paths == 100_000


def test_best_trained_hedger_is_within_one_percent_of_the_optimum(quickstart, best):
    pnl = quickstart.pnl[f"{best}/pnl"]
    value, error = entropic_risk(pnl)
    print(f"{best}: {value:.6f} ± {error:.6f}, regret {100 * (value / OPTIMUM - 1):.2f} %")
    assert within_one_percent(pnl)
    assert value_of(quickstart, best) == (pytest.approx(value, abs=2e-7), pytest.approx(error, rel=1e-2))
    assert quickstart.metrics["methods"][best]["effective_sample_size"] > 1000


def test_no_hedge_fails_the_same_check(quickstart):
    assert not within_one_percent(quickstart.pnl["no_hedge/pnl"])
    assert value_of(quickstart, "no_hedge") == (pytest.approx(0.10002, abs=5e-6), 0.0)
    assert quickstart.metrics["methods"]["no_hedge"]["estimator"] == "quadrature"


def test_flipped_sign_fails_the_same_check(quickstart, best):
    pnl = quickstart.pnl
    payoff, gain, cost = pnl["payoff"], pnl[f"{best}/trading_gain"], pnl[f"{best}/trading_cost"]
    np.testing.assert_allclose(pnl[f"{best}/pnl"], gain - payoff - cost, atol=1e-6)
    assert within_one_percent(gain - payoff - cost)
    assert not within_one_percent(-gain - payoff - cost)  # trades of the other sign cost the same


def test_untrained_parameters_fail_the_same_check(quickstart, tmp_path_factory):
    config = quickstart.config
    key_init, key_test = (jax.random.fold_in(jax.random.key(config.seed), role) for role in (0, 3))
    source, contract = make_source(config, key_test), make_contract(config)
    np.testing.assert_allclose(
        source.test.spot[:, -1], quickstart.pnl["final_spot"], rtol=1e-5
    )  # the same paths
    for name in ("dhlnn", "dhmlp"):  # dhntb starts from the same parameters as dhlnn
        hedger = build_hedger(name, config)
        money = evaluator(policy_of(hedger), contract)(
            hedger.init(key_init), source.test, source.test_settings
        )
        print(f"untrained {name}: {entropic_risk(money.pnl)[0]:.6f}")
        assert not within_one_percent(money.pnl)


def test_rules_are_where_they_should_be(quickstart):
    assert value_of(quickstart, "whalley_wilmott")[0] == pytest.approx(0.0261, abs=2e-4)
    assert value_of(quickstart, "bsdh")[0] == pytest.approx(0.0277, abs=2e-4)


def test_nobody_beats_the_optimum(quickstart):
    assert quickstart.metrics["optimum"]["value"] == pytest.approx(OPTIMUM, abs=5e-7)
    for name, report in quickstart.metrics["methods"].items():
        value, error = value_of(quickstart, name)
        assert value > OPTIMUM - 3 * error - 1e-7, name
        assert report["regret"]["value"] >= -3 * report["regret"]["stderr"] - 1e-7, name


def test_regret_is_the_paired_distance_to_the_optimal_policy(quickstart, best):
    rows, pnl = quickstart.metrics["methods"], quickstart.pnl
    weight = {n: np.exp(-50.0 * (pnl[f"{n}/pnl"].astype(float) + OPTIMUM)) for n in (best, "optimal")}
    influence = {n: w / w.mean() / 50.0 for n, w in weight.items()}
    regret = rows[best]["regret"]
    assert regret["value"] == pytest.approx(
        value_of(quickstart, best)[0] - value_of(quickstart, "optimal")[0], abs=1e-9
    )
    apart = influence[best] - influence["optimal"]
    assert regret["stderr"] == pytest.approx(apart.std() / np.sqrt(len(apart)), rel=2e-2)
    assert regret["stderr"] < 0.3 * value_of(quickstart, best)[1]  # what pairing is for
    assert regret["percent"] == pytest.approx(100 * regret["value"] / OPTIMUM, rel=1e-4)
    value, error = value_of(quickstart, "optimal")
    assert abs(value - OPTIMUM) < 3 * error
    assert rows["no_hedge"]["regret"]["value"] == pytest.approx(0.100024 - OPTIMUM, abs=2e-6)


def test_best_trained_hedger_beats_every_rule_on_the_same_paths(quickstart, best):
    for rule in ("whalley_wilmott", "bsdh", "no_hedge"):
        number = quickstart.metrics["paired"][f"{best}-{rule}"]["entropic_risk_measure"]
        assert number["value"] < -3 * number["stderr"], rule
