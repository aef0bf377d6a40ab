"""The exact law of an unhedged claim against closed forms, independent integrals and simulation."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from dhlnn_jax.evaluate import unhedged_values
from dhlnn_jax.payoff import CLAIMS, Claim
from dhlnn_jax.settings import make_settings
from dhlnn_jax.unhedged import unhedged_law

N_STEPS, T = 30, 30 / 365


def law_of(claim, n_steps=N_STEPS, **numbers):
    return unhedged_law(CLAIMS[claim], make_settings(n_steps=n_steps, **numbers), n_steps=n_steps)


def values_of(claim, **numbers):
    law = law_of(claim, **numbers)
    return unhedged_values(law.payoff, law.probability, make_settings(n_steps=N_STEPS, **numbers))


def black_scholes(spot, strike, volatility, maturity):
    d1 = (np.log(spot / strike) + 0.5 * volatility**2 * maturity) / (volatility * np.sqrt(maturity))
    return spot * norm.cdf(d1) - strike * norm.cdf(d1 - volatility * np.sqrt(maturity))


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("strike", [0.9, 1.0, 1.2])
def test_probabilities_are_those_of_a_law(claim, strike):
    law = law_of(claim, strike=strike)
    assert law.payoff.shape == law.probability.shape and law.payoff.dtype == np.float64
    assert np.all(law.probability >= 0) and np.all(law.payoff >= 0)
    assert law.probability.sum() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("strike, volatility, spot0", [(1.0, 0.1, 1.0), (1.2, 0.4, 1.0), (95.0, 0.2, 100.0)])
def test_mean_of_the_european_call_is_the_black_scholes_price(strike, volatility, spot0):
    law = law_of("european_call", strike=strike, volatility=volatility, spot0=spot0)
    price = black_scholes(spot0, strike, volatility, T)
    assert law.payoff @ law.probability == pytest.approx(price, rel=1e-6)


def test_mean_at_the_printed_setting():
    law = law_of("european_call", volatility=0.1)
    assert law.payoff @ law.probability == pytest.approx(0.011437, abs=5e-7)


def test_drift_moves_the_forward():
    law = law_of("european_call", drift=0.5, volatility=0.2)
    assert law.payoff @ law.probability == pytest.approx(
        black_scholes(np.exp(0.5 * T), 1.0, 0.2, T), rel=1e-6
    )


def test_put_and_call_differ_by_the_forward():
    call, put = (law_of(f"european_{kind}", strike=1.03, drift=0.3) for kind in ("call", "put"))
    difference = call.payoff @ call.probability - put.payoff @ put.probability
    assert difference == pytest.approx(np.exp(0.3 * T) - 1.03, abs=1e-7)  # settings are float32


@pytest.mark.parametrize(
    "claim, payoff", [("european_call", 0.05), ("european_put", 0.0), ("lookback_call", 0.05)]
)
def test_without_volatility_or_drift_the_spot_stands_still(claim, payoff):
    law = law_of(claim, volatility=0.0, strike=0.95)
    assert law.payoff @ law.probability == pytest.approx(payoff, abs=1e-7)
    assert np.ptp(law.payoff) < 1e-12


def test_without_volatility_the_maximum_is_at_the_end_that_drift_leads_to():
    for drift in (0.5, -0.5):
        law = law_of("lookback_call", volatility=0.0, strike=0.95, drift=drift)
        assert law.payoff @ law.probability == pytest.approx(max(np.exp(drift * T), 1.0) - 0.95, abs=1e-7)


@pytest.mark.parametrize(
    "volatility, risk_aversion, wanted, digits", [(0.2, 50.0, 0.10002, 5e-6), (0.1, 1.0, 0.01158, 5e-6)]
)
def test_entropic_risk_of_the_bare_call_is_the_printed_one(volatility, risk_aversion, wanted, digits):
    numbers = dict(volatility=volatility, risk_aversion=risk_aversion)
    values = values_of("european_call", **numbers)
    assert values["entropic_risk_measure"] == pytest.approx(wanted, abs=digits)
    # and that of an independent adaptive integral of the same normals
    mean, deviation = -0.5 * volatility**2 * T, volatility * np.sqrt(T)

    def integrand(z):
        return np.exp(risk_aversion * max(np.exp(mean + deviation * z) - 1.0, 0.0)) * norm.pdf(z)

    total = quad(integrand, -10, 10, points=[-mean / deviation, 3.0], epsabs=0, epsrel=1e-12, limit=500)[0]
    assert values["entropic_risk_measure"] == pytest.approx(np.log(total) / risk_aversion, rel=1e-6)


def test_tail_metrics_of_the_bare_call_against_their_formulas():
    values = values_of("european_call", volatility=0.2, tail_prob=0.1)
    mean, deviation = -0.5 * 0.2**2 * T, 0.2 * np.sqrt(T)
    z = norm.isf(0.1)
    threshold = np.exp(mean + deviation * z) - 1.0
    shortfall = norm.sf(z - deviation) / 0.1 - 1.0  # E[S; Z > z] / p - K
    assert values["value_at_risk"] == pytest.approx(threshold, rel=2e-3)  # as fine as the nodes are dense
    assert values["expected_shortfall"] == pytest.approx(shortfall, rel=1e-5)
    assert values["trading_cost_mean"] == values["turnover_mean"] == 0.0


def test_premium_shifts_every_money_metric():
    bare, paid = (values_of("lookback_call", premium=premium) for premium in (0.0, 0.03))
    for name, sign in {
        "entropic_risk_measure": -1,
        "expected_shortfall": -1,
        "value_at_risk": -1,
        "pnl_mean": 1,
        "pnl_std": 0,
        "trading_cost_mean": 0,
    }.items():
        assert paid[name] - bare[name] == pytest.approx(0.03 * sign, abs=1e-7), name


def test_maximum_over_one_step_against_its_integral():
    mean, deviation = (0.3 - 0.5 * 0.2**2) / 365, 0.2 / np.sqrt(365)
    # max(S_1, 1) - 0.95 = 0.05 + (S_1 - 1)^+
    wanted = 0.05 + np.exp(0.3 / 365) * norm.cdf(mean / deviation + deviation) - norm.cdf(mean / deviation)
    law = law_of("lookback_call", n_steps=1, strike=0.95, drift=0.3)
    assert law.payoff @ law.probability == pytest.approx(wanted, rel=1e-6)
    never_above = law.probability[np.isclose(law.payoff, 0.05, atol=1e-9)].sum()
    assert never_above == pytest.approx(norm.cdf(-mean / deviation), abs=1e-6)


def test_maximum_over_two_steps_against_its_integral():
    mean, deviation = -0.5 * 0.4**2 / 365, 0.4 / np.sqrt(365)
    law = law_of("lookback_call", n_steps=2, strike=1.01, volatility=0.4)

    def exceed(level):
        """P(max(X_1, X_2) > level), by conditioning on the first step."""
        stay = quad(
            lambda x: norm.pdf(x, mean, deviation) * norm.cdf(level - x, mean, deviation),
            -np.inf, level, epsabs=1e-13,
        )[0]  # fmt: skip
        return 1.0 - stay

    for level in (0.01, 0.02, 0.04):
        above = law.probability[law.payoff > np.exp(level) - 1.01 + 1e-12].sum()
        assert above == pytest.approx(exceed(level), abs=2e-3)  # one node's weight
    # E (e^M - K)^+ = int_{log K}^inf P(M > m) e^m dm
    wanted = quad(lambda m: exceed(m) * np.exp(m), np.log(1.01), 12 * deviation, epsabs=1e-10)[0]
    assert law.payoff @ law.probability == pytest.approx(wanted, rel=1e-5)


def test_lookback_against_a_large_simulation():
    law_values = values_of("lookback_call", volatility=0.1, tail_prob=0.1)
    assert -law_values["pnl_mean"] == pytest.approx(0.0202, abs=5e-5)
    n_paths, dt = 400_000, 1 / 365
    steps = np.random.default_rng(5).standard_normal((n_paths, N_STEPS))
    paths = np.cumsum(0.1 * np.sqrt(dt) * steps - 0.5 * 0.1**2 * dt, axis=1)
    loss = np.exp(np.maximum(paths.max(axis=1), 0.0)) - 1.0
    assert -law_values["pnl_mean"] == pytest.approx(loss.mean(), abs=4 * loss.std() / np.sqrt(n_paths))
    beyond = (loss > law_values["value_at_risk"]).mean()
    assert beyond == pytest.approx(0.1, abs=4 * np.sqrt(0.1 * 0.9 / n_paths))
    threshold = np.quantile(loss, 0.9)
    excess = threshold + np.maximum(loss - threshold, 0.0) / 0.1
    assert law_values["expected_shortfall"] == pytest.approx(
        excess.mean(), abs=4 * excess.std() / np.sqrt(n_paths)
    )
    assert law_values["pnl_std"] == pytest.approx(loss.std(), rel=0.01)


def test_claim_on_the_whole_path_is_refused():
    asian = Claim(lambda spot, *, strike: spot.mean() - strike, "path")
    with pytest.raises(ValueError, match="last spot or the maximum"):
        unhedged_law(asian, make_settings(n_steps=3), n_steps=3)


@pytest.mark.parametrize("drift", [2.0, -2.0])
def test_drift_carries_the_maximum_and_the_kink_along(drift):
    """With a drift of many deviations the maximum is the end, or the start; the strike keeps its panel."""
    numbers = dict(volatility=0.02, drift=drift, strike=1.0)
    law = law_of("lookback_call", **numbers)
    end = black_scholes(np.exp(drift * T), 1.0, 0.02, T)
    assert law.payoff @ law.probability == pytest.approx(end if drift > 0 else 0.0, abs=2e-4)
    law, maturity = law_of("european_call", volatility=0.25, drift=0.5), 30 * float(np.float32(1 / 365))
    price = black_scholes(np.exp(0.5 * maturity), 1.0, 0.25, maturity)
    assert law.payoff @ law.probability == pytest.approx(price, rel=1e-12)
