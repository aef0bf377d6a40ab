"""Indifference prices against lattices by hand, Black-Scholes and each other: solved and trained."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from dhlnn_jax import price, risk
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import hedged_paths
from dhlnn_jax.hedge import european_call_delta
from dhlnn_jax.hedger import make_band_hedger, policy_of
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.nested import Problem, nested_update, optax_update
from dhlnn_jax.payoff import CLAIMS, Claim
from dhlnn_jax.pnl import Contract
from dhlnn_jax.price import Estimate, exact_risk, indifference_price, oce_update, trained_risk
from dhlnn_jax.settings import make_settings
from dhlnn_jax.train import init_state, make_train_step
from dhlnn_jax.unhedged import unhedged_law

N_STEPS, DT = 5, 6 / 365
T = N_STEPS * DT
CALL = CLAIMS["european_call"]
SHARE = Claim(lambda spot, *, strike: jnp.asarray(spot)[-1], "terminal")
D1 = 0.5 * 0.2 * np.sqrt(T)  # at the money
BLACK_SCHOLES = norm.cdf(D1) - norm.cdf(-D1)
SIDES = ("seller", "buyer")


def exact(claim=CALL, **numbers):
    usual = dict(
        strike=1.0,
        volatility=0.2,
        n_steps=N_STEPS,
        dt=DT,
        cost_rate=5e-3,
        risk_aversion=50.0,
        resolution=0.4,
    )
    return exact_risk(claim, **(usual | numbers))


def exact_prices(claim=CALL, **numbers):
    return [indifference_price(exact(claim, **numbers), side=side) for side in SIDES]


# --- the difference of two optima ---------------------------------------------------------------------


def test_price_by_hand_from_three_risks():
    risks = {
        1: Estimate(0.5, 0.01, notes=("a", "b")),
        0: Estimate(-0.2, 0.03, notes=("b",)),
        -1: Estimate(-0.6, 0.04),
    }
    seller, buyer = (indifference_price(risks.get, side=side) for side in SIDES)
    assert seller[:-1] == pytest.approx((0.7, 0.0, 0.04, 0.5, -0.2)) and seller.notes == ("a", "b")
    assert buyer[:-1] == pytest.approx((0.4, 0.0, 0.07, -0.6, -0.2)) and buyer.notes == ("b",)


def test_standard_error_is_paired_and_clustered():
    influences, groups = jnp.array([0.3, -0.1, 0.2, -0.4]), jnp.array([0, 0, 1, 1])
    risks = {1: Estimate(1.0, 0.0, influences + 0.05, groups), -1: Estimate(1.0, 0.0, -influences, groups)}
    risks[0] = Estimate(0.0, 0.0, influences, groups)
    assert indifference_price(risks.get).stderr == pytest.approx(0.0, abs=1e-7)
    # buyer: -2 influences, summed by group: -0.4 and 0.4, each 0.4 from their mean
    assert indifference_price(risks.get, side="buyer").stderr == pytest.approx(math.sqrt(2 * 2 * 0.4**2))
    risks[0] = price.NOTHING
    assert indifference_price(risks.get, side="buyer").stderr == pytest.approx(math.sqrt(2 * 2 * 0.2**2))


def test_unknown_side_is_refused():
    unchecked = getattr(indifference_price, "__wrapped__", indifference_price)  # without beartype's refusal
    with pytest.raises(ValueError, match="side must be seller or buyer"):
        unchecked(lambda position: price.NOTHING, side="market maker")


# --- solved -------------------------------------------------------------------------------------------


def test_without_costs_and_risk_aversion_both_sides_pay_black_scholes():
    # 5 steps leave a variance of about pi/4 (vega sigma)^2 / 5, that is lambda/2 of it in risk: 2e-8
    for found in exact_prices(cost_rate=0.0, risk_aversion=1e-3):
        assert found.value == pytest.approx(BLACK_SCHOLES, abs=1e-7)
        assert found.risk_without == 0.0 and found.stderr == 0.0 and found.error < 1e-8


def test_costs_drive_buyer_and_seller_apart_around_black_scholes():
    free, cheap, dear = (exact_prices(cost_rate=c) for c in (0.0, 2e-3, 5e-3))
    asks, bids = zip(*[[x.value for x in both] for both in (free, cheap, dear)], strict=True)
    assert BLACK_SCHOLES + 1e-3 < asks[0] and np.all(np.diff(asks) > 1e-3)
    assert bids[0] < BLACK_SCHOLES - 1e-3 and np.all(np.diff(bids) < -1e-3)


@pytest.mark.parametrize("cost_rate", [0.0, 1e-3, 2e-2])
def test_a_share_owed_or_held_over_one_fair_step(cost_rate):
    """Up or down by a = 0.1, evenly: the part x of the share left open costs log cosh(lambda a x) / lambda.

    The optimum has cost_rate = a tanh(lambda a x), and both sides lose the same around spot0.
    """
    found = exact_prices(
        SHARE, n_steps=1, cost_rate=cost_rate, increments=(np.log([0.9, 1.1]), [0.5, 0.5]), resolution=1.0
    )
    x = math.atanh(cost_rate / 0.1) / (50 * 0.1)
    lost = cost_rate * (1 - x) + math.log(math.cosh(50 * 0.1 * x)) / 50
    assert [p.value for p in found] == pytest.approx([1 + lost, 1 - lost], abs=1e-8)


def test_complete_lattice_has_one_price_whatever_the_odds():
    """Two steps of 1.1 or 1/1.1; not to trade is not optimal at odds of 0.6, but for both sides alike."""
    up, down, odds, scale = 1.1, 1 / 1.1, 0.6, 50.0
    fair = (1 - down) / (up - down)
    replication = fair**2 * (up**2 - 1)  # the call at the money pays after two rises only
    # the best of exponential utility alone: minus the relative entropy of the fair odds, each step
    entropy = fair * math.log(fair / odds) + (1 - fair) * math.log((1 - fair) / (1 - odds))
    for found in exact_prices(
        n_steps=2, cost_rate=0.0, increments=(np.log([down, up]), [1 - odds, odds]), resolution=1.0
    ):
        assert found.risk_without == pytest.approx(-2 * entropy / scale, abs=1e-9)
        assert found.value == pytest.approx(replication, abs=1e-8)
    assert 2 * entropy / scale > 1e-3  # what is at stake


def test_drift_is_in_both_terms_and_leaves_the_price():
    """Without costs the drift is worth (mu / sigma)^2 T / 2 lambda (Merton), with the claim or without."""
    numbers = dict(cost_rate=0.0, risk_aversion=5.0, n_steps=12, dt=T / 12)
    level, drifting = (indifference_price(exact(drift=drift, **numbers)) for drift in (0.0, 0.2))
    merton = 0.5 * (0.2 / 0.2) ** 2 * T / 5.0
    assert drifting.risk_without == pytest.approx(-merton, rel=0.02)
    assert level.risk_without == 0.0
    assert drifting.value == pytest.approx(level.value, abs=2e-4)
    assert drifting.value == pytest.approx(BLACK_SCHOLES, abs=4e-4)


def test_zero_claim_is_solved_only_where_it_pays_to_trade(monkeypatch):
    even = (np.log([0.9, 1.1]), [0.5, 0.5])
    solving = {"drift": 0.1}, {"increments": (even[0], [0.4, 0.6])}
    for market in solving:
        assert exact(n_steps=1, cost_rate=0.0, **market)(0).value < -1e-5
    monkeypatch.setattr(price, "solve_european", lambda *_, **__: pytest.fail("solved"))
    for market in {}, {"increments": even}:
        assert exact(**market)(0) == price.NOTHING
    for market in solving:
        with pytest.raises(pytest.fail.Exception, match="solved"):
            exact(**market)(0)


def test_lookback_call_has_a_seller_and_no_buyer():
    lookback = CLAIMS["lookback_call"]
    numbers = dict(risk_aversion=20.0, n_steps=2)
    law = unhedged_law(lookback, make_settings(n_steps=2, dt=DT), n_steps=2)
    unhedged = math.log(law.probability @ np.exp(20.0 * law.payoff)) / 20.0
    too_dear_to_hedge = indifference_price(exact(lookback, cost_rate=5.0, **numbers))
    assert too_dear_to_hedge.value == pytest.approx(unhedged, abs=1e-5)
    assert exact(lookback, drift=0.3, **numbers)(0) == exact(drift=0.3, **numbers)(0)
    for refused in (
        lambda: exact(lookback, **numbers)(-1),
        lambda: exact(lookback, increments=([-0.1, 0.1], [0.5, 0.5]))(1),
        lambda: exact(Claim(lambda spot, *, strike: jnp.mean(spot), "path"))(1),
    ):
        with pytest.raises(UsageError, match="trained_risk"):
            refused()


# --- trained ------------------------------------------------------------------------------------------

ENTROPIC = partial(risk.entropic_risk_measure, risk_aversion=50.0)
SAMPLE = make_simulation_sampler(SIMULATORS["gbm"], n_steps=N_STEPS)
N_EPOCHS, N_TEST = 100, 50_000


def hedger_of(position):
    return make_band_hedger(
        features=("standardised_log_moneyness", "standardised_time_to_maturity"),
        hidden_sizes=(16,),
        centre=lambda path, settings: position * european_call_delta(path, settings),
    )


def settings_of(**numbers):
    return make_settings(n_steps=N_STEPS, **(dict(dt=DT, risk_aversion=50.0, cost_rate=5e-3) | numbers))


def adam(learning_rate=1e-2):
    return optax_update(optax.adam(optax.cosine_decay_schedule(learning_rate, N_EPOCHS)))


def trained(make_hedger=hedger_of, *, update=None, martingale=True, **numbers):
    return trained_risk(
        jax.random.key(2),
        make_hedger,
        SAMPLE,
        Contract(CALL),
        settings_of(premium=0.5, **numbers),  # which a price leaves out
        update or adam(),
        risk_fn=ENTROPIC,
        martingale=martingale,
        n_epochs=N_EPOCHS,
        n_paths=1_000,
        n_test_paths=N_TEST,
    )


@pytest.mark.parametrize("side", SIDES)
def test_trained_price_is_the_solved_one(side):
    """Within 4 standard errors and what 100 epochs leave (1e-4), on the side of the worse hedge."""
    found, solved = (indifference_price(risks, side=side) for risks in (trained(), exact()))
    assert 1e-5 < found.stderr < 1e-4 and math.isnan(found.error) and found.risk_without == 0.0
    sign = 1 if side == "seller" else -1
    assert -4 * found.stderr < sign * (found.value - solved.value) < 4 * found.stderr + 1e-4
    # nobody who does not hedge comes near
    law = unhedged_law(CALL, settings_of(), n_steps=N_STEPS)
    unhedged = sign * math.log(law.probability @ np.exp(sign * 50.0 * law.payoff)) / 50
    assert sign * (unhedged - found.value) > 40 * found.stderr


def test_trained_hedgers_are_measured_on_paths_that_they_were_not_trained_on():
    trained_on, tested_on = [], []

    def spied(key, n_paths, settings):
        seen = trained_on if n_paths == 100 else tested_on
        jax.debug.callback(lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key))
        return SAMPLE(key, n_paths, settings)

    risk_of = trained_risk(
        jax.random.key(2),
        lambda position: make_band_hedger(features=("log_moneyness",), hidden_sizes=(4,)),
        spied,
        Contract(CALL),
        settings_of(),
        adam(),
        risk_fn=ENTROPIC,
        martingale=True,
        n_epochs=3,
        n_paths=100,
        n_test_paths=200,
    )
    assert np.isfinite(risk_of(1).value)
    jax.effects_barrier()
    assert len(set(trained_on)) == 3 and len(set(tested_on)) == 1
    assert not set(trained_on) & set(tested_on)


def test_hedger_without_a_claim_is_trained_where_prices_drift():
    numbers = dict(drift=0.3, cost_rate=1e-3)
    found = trained(update=adam(3e-2), martingale=False, **numbers)(0)
    solved = exact(**numbers)(0)
    assert solved.value < -1e-3
    assert found.value == pytest.approx(solved.value, abs=2e-4)


def test_nothing_is_trained_without_a_claim_where_prices_are_martingales():
    def refuse(position):
        raise AssertionError(f"a hedger for position {position}")

    assert trained(refuse)(0) == price.NOTHING
    with pytest.raises(AssertionError, match="position 0"):
        trained(refuse, martingale=False)(0)


# --- theta trained along ------------------------------------------------------------------------------


def shortfall_loss(x):
    """Rockafellar and Uryasev's for expected shortfall at 0.1, where theta is the value at risk."""
    return jnp.maximum(x, 0.0) / 0.1


# name -> (loss, the measure that it stands for, theta before training)
LOSSES = {
    "exponential": (risk.exponential_loss(50.0), ENTROPIC, 0.15),
    "shortfall": (shortfall_loss, partial(risk.expected_shortfall, tail_prob=0.1), 0.1),
}


@cache
def trained_thetas():
    """Name of the loss -> theta and the hedger's pnl on test paths; one program trains for all losses."""
    hedger, settings, contract = hedger_of(1), settings_of(), Contract(CALL)
    losses, _, thetas = zip(*LOSSES.values(), strict=True)

    def one(which, theta0, key):
        key_init, key_train, key_test = jax.random.split(key, 3)
        update = oce_update(adam(), loss=lambda x: jax.lax.switch(which, losses, x), theta0=theta0)
        not_looked_at = lambda pnl, settings: jnp.nan  # noqa: E731
        step = make_train_step(hedger, SAMPLE, contract, not_looked_at, update, n_paths=1_000)
        state = init_state(hedger, update, key_init)
        epochs = jax.random.split(key_train, N_EPOCHS)
        state = jax.lax.scan(lambda s, k: (step(s, k, settings)[0], None), state, epochs)[0]
        paths, _ = SAMPLE(key_test, N_TEST, settings)
        pnl = hedged_paths(policy_of(hedger), state.params, paths, contract, settings).pnl
        return state.update.theta, pnl

    together = jax.jit(jax.vmap(one, (0, 0, None)))
    found = together(jnp.arange(len(losses)), jnp.array(thetas), jax.random.key(5))
    return dict(zip(LOSSES, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_theta_trained_along_is_the_inner_minimiser(name):
    loss, measure, theta0 = LOSSES[name]
    found, pnl = trained_thetas()[name]
    best, theta = risk.optimized_certainty_equivalent(pnl, loss=loss)
    assert float(found) == pytest.approx(float(theta), abs=1e-3) and abs(theta0 - theta) > 0.02
    reached = float(found) + np.mean(np.asarray(loss(-pnl - found), float))
    assert -1e-6 < reached - float(best) < 2e-5
    assert reached == pytest.approx(float(measure(pnl)), abs=2e-5)
    if name == "exponential":  # the hedger is as good as one trained on the measure
        stderr = float(risk.stderr(measure, pnl))
        assert reached == pytest.approx(exact()(1).value, abs=4 * stderr + 1e-4) and stderr < 1e-4


def toy_problem(surrogate=False):
    """Three samples of pnl = w (1, -2, 3): at w = 0.5 the losses are (-0.5, 1, -1.5)."""
    slopes = jnp.array([1.0, -2.0, 3.0])
    return Problem(
        outputs=lambda w: w * slopes,
        value=lambda y: y,
        risk=lambda _: jnp.nan,
        surrogate_value=(lambda y: y - 0.5) if surrogate else None,
    )


def test_one_step_moves_hedger_and_theta_by_hand():
    """theta + E (x - theta)^2 at theta = 1/4: x - theta = (-3/4, 3/4, -7/4)."""
    update = oce_update(optax_update(optax.sgd(0.1)), loss=jnp.square, theta0=0.25)
    w = jnp.asarray(0.5)
    after, state, info = update.apply(toy_problem(), w, update.init(w))
    assert float(info.risk) == pytest.approx(0.25 + (9 + 9 + 49) / 16 / 3)
    # d/dtheta: 1 - 2 mean(x - theta); d/dw: -2 mean(slope (x - theta)) = -2 (-3/4 - 3/2 - 21/4) / 3
    assert float(state.theta) == pytest.approx(0.25 - 0.1 * (1 + 2 * 1.75 / 3))
    assert float(after) == pytest.approx(0.5 - 0.1 * 5.0)
    np.testing.assert_array_equal(info.outputs, [0.5, -1.0, 1.5])


@pytest.mark.parametrize("surrogate", [False, True])
def test_nested_steps_keep_theta_and_see_the_surrogate(surrogate):
    """One inner step of plain descent: as above, with losses 1/2 larger under the surrogate."""
    update = oce_update(
        nested_update(optax.sgd(0.1), learning_rate=0.1, n_inner=1, inner_update="sgd"),
        loss=jnp.square,
        theta0=0.25,
    )
    w = jnp.asarray(0.5)
    after, state, info = update.apply(toy_problem(surrogate), w, update.init(w))
    shift = 0.5 if surrogate else 0.0
    assert float(state.theta) == pytest.approx(0.25 - 0.1 * (1 + 2 * 1.75 / 3 - 2 * shift))
    assert float(after) == pytest.approx(0.5 - 0.1 * (5.0 - 2 * shift * 2 / 3))
    assert float(info.risk) == pytest.approx(0.25 + (9 + 9 + 49) / 16 / 3)
    assert update.cut == "raw"
