"""Bands over spot and time, given or swept, and what a policy does with a position that it did not choose."""

import jax
import jax.numpy as jnp
import numpy as np

from dhlnn_jax import hedge
from dhlnn_jax.bands import effective_band, respond
from dhlnn_jax.hedger import (
    Policy,
    make_recurrent_hedger,
    observed_path,
    policy_of,
    rule_policy,
)
from dhlnn_jax.market import MarketPath
from dhlnn_jax.methods import METHODS, RuleOptions
from dhlnn_jax.settings import make_settings

N_STEPS = 4
SETTINGS = make_settings(n_steps=N_STEPS, cost_rate=5e-3, risk_aversion=50.0)
SPOT = jnp.array([0.95, 1.0, 1.06])
WHALLEY_WILMOTT = METHODS["whalley_wilmott"].make_rule(RuleOptions("european_call"))


def stays_at(level):
    return MarketPath(jnp.array([1.0, *[level] * N_STEPS]))


def test_band_of_a_band_policy_is_its_own_at_every_spot():
    lower, upper = effective_band(WHALLEY_WILMOTT, None, SPOT, SETTINGS, N_STEPS)
    assert lower.shape == upper.shape == (N_STEPS, 3)
    for i, level in enumerate(SPOT):
        wanted = hedge.whalley_wilmott_band(observed_path(stays_at(level)), SETTINGS)
        np.testing.assert_allclose([lower[:, i], upper[:, i]], wanted, atol=1e-6)


def test_swept_band_is_the_given_one_and_as_wide_as_what_is_called_a_trade():
    unknown = Policy(
        WHALLEY_WILMOTT.hedge_ratio,
        response=lambda params, path, s, held: respond(WHALLEY_WILMOTT, params, path, s, held),
    )
    known = effective_band(WHALLEY_WILMOTT, None, SPOT, SETTINGS, N_STEPS)
    swept = effective_band(unknown, None, SPOT, SETTINGS, N_STEPS, tolerance=0.01, n_swept=3001)
    np.testing.assert_allclose(swept[0], known[0] - 0.01, atol=2e-3)
    np.testing.assert_allclose(swept[1], known[1] + 0.01, atol=2e-3)


def test_delta_has_no_band_and_periodic_delta_an_endless_one_between_its_trades():
    delta = METHODS["bsdh"].make_rule(RuleOptions("european_call"))
    lower, upper = effective_band(delta, None, SPOT, SETTINGS, N_STEPS)
    assert np.all(upper - lower <= 0.02 + 1e-6)
    middle = np.array([hedge.delta_hedge(observed_path(stays_at(s)), SETTINGS) for s in SPOT]).T
    np.testing.assert_allclose(0.5 * (lower + upper), middle, atol=6e-3)
    periodic = METHODS["periodic_delta"].make_rule(RuleOptions("european_call", rebalance_every=2))
    lower, upper = effective_band(periodic, None, SPOT, SETTINGS, N_STEPS)
    np.testing.assert_allclose(upper[1::2] - lower[1::2], 3.0, atol=1e-5)
    assert np.all(upper[::2] - lower[::2] <= 0.02 + 1e-6)


def test_policy_that_always_trades_has_no_band():
    restless = rule_policy(
        hedge.no_hedge, response=lambda path, settings, held: held + jnp.where(held > 0, -0.5, 0.5)
    )
    lower, upper = effective_band(restless, None, SPOT, SETTINGS, N_STEPS)
    assert np.isnan(lower).all() and np.isnan(upper).all()


def test_plain_network_responds_along_its_own_positions_as_it_did():
    made = make_recurrent_hedger(features=("log_moneyness", "time_to_maturity"), hidden_sizes=(8,))
    params = jax.tree.map(lambda x: 3.0 * x + 0.1, made.init(jax.random.key(0)))
    path = MarketPath(jnp.array([1.0, 1.02, 0.98, 1.05, 1.01]))
    policy = policy_of(made)
    held = policy.hedge_ratio(params, path, SETTINGS)
    before = jnp.concatenate([jnp.zeros(1), held[:-1]])
    np.testing.assert_allclose(respond(policy, params, path, SETTINGS, before), held, rtol=1e-5)
    other = respond(policy, params, path, SETTINGS, before + 0.5)
    assert float(jnp.abs(other - held).max()) > 1e-3
