"""The registry of methods: what each covers, and that each makes what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax.hedge import DELTAS
from dhlnn_jax.market import MarketPath
from dhlnn_jax.methods import METHODS, RuleOptions
from dhlnn_jax.optimal import solve_contract
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract
from dhlnn_jax.settings import make_settings

N_STEPS = 3
PATH = MarketPath(jnp.array([1.0, 1.02, 0.97, 1.01]))


def rule(name, claim, at):
    """The policy of a rule; the optimum solved for the settings."""
    optimum = None
    if name == "optimal":
        optimum = solve_contract(Contract(CLAIMS[claim]), at, n_steps=N_STEPS)
    return METHODS[name].make_rule(RuleOptions(claim, rebalance_every=2, half_width=0.05, optimum=optimum))


def ratios_of(name, claim, settings):
    policy = rule(name, claim, settings)
    return jax.jit(lambda path, at: policy.hedge_ratio(None, path, at))(PATH, settings)


RULES = [name for name, method in METHODS.items() if not method.trained]
TRAINED = [name for name, method in METHODS.items() if method.trained]


def settings(**changes):
    return make_settings(n_steps=N_STEPS, **({"cost_rate": 2e-3, "risk_aversion": 50.0} | changes))


def test_names_and_labels_are_those_of_the_issue():
    of_the_issues = {"dhlnn", "dhntb", "dhmlp", "bsdh", "whalley_wilmott", "no_hedge", "optimal"}
    assert set(METHODS) == of_the_issues | {"dhlnn_newton", "leland", "fixed_band", "periodic_delta"}
    labels = [method.label for method in METHODS.values()]
    assert len(set(labels)) == len(labels) and all(labels)


def test_every_method_is_either_a_rule_or_trained():
    for method in METHODS.values():
        assert (method.make_rule is None) != (method.make_hedger is None)
        assert method.covers is None or (method.covers and set(method.covers) <= set(CLAIMS) & set(DELTAS))
    assert set(TRAINED) == {"dhlnn", "dhlnn_newton", "dhntb", "dhmlp"}
    updates = {name: METHODS[name].update for name in TRAINED if METHODS[name].update != "optimizer"}
    assert updates == {"dhlnn": "nested", "dhlnn_newton": "newton"}
    assert [name for name in TRAINED if METHODS[name].recurrent] == ["dhmlp"]


@pytest.mark.parametrize("name", RULES)
def test_rule_covers_the_claims_that_it_says(name):
    for claim in METHODS[name].covers or CLAIMS:
        ratios = ratios_of(name, claim, settings())
        assert ratios.shape == (N_STEPS,) and bool(jnp.isfinite(ratios).all())
        sign = {"no_hedge": 0, "european_put": -1}.get(name if name == "no_hedge" else claim, 1)
        assert np.all(np.sign(ratios) == sign)  # a short call is hedged long, a short put short


def test_closed_forms_for_a_put_are_those_of_the_call_less_one():
    at = settings(cost_rate=0.0)
    held = {claim: ratios_of("bsdh", claim, at) for claim in DELTAS}
    np.testing.assert_allclose(held["european_put"], held["european_call"] - 1.0, atol=1e-6)
    # without costs the band has no width
    banded = ratios_of("whalley_wilmott", "european_put", at)
    np.testing.assert_allclose(banded, held["european_put"], atol=1e-6)


def test_whalley_wilmott_stays_inside_its_band_around_the_delta():
    policy = rule("whalley_wilmott", "european_call", settings())
    lower, upper = jax.jit(lambda path, at: policy.band(None, path, at))(PATH, settings())
    held = ratios_of("whalley_wilmott", "european_call", settings())
    delta = ratios_of("bsdh", "european_call", settings())
    assert np.all(lower < delta) and np.all(delta < upper)
    assert np.all(held >= lower) and np.all(held <= upper)
    assert float(held[0]) == float(lower[0])  # buys no more than it must


@pytest.mark.parametrize("name", TRAINED)
def test_trained_method_makes_a_hedger_of_the_asked_size(name):
    made = METHODS[name].make_hedger(
        features=("log_moneyness", "time_to_maturity"), hidden_sizes=(5, 3), centre=DELTAS["european_call"]
    )
    params = jax.eval_shape(made.init, jax.random.key(0))
    widths = sorted(leaf.shape[0] for leaf in jax.tree.leaves(params) if leaf.ndim == 1)
    n_inputs, n_outputs = (3, 1) if METHODS[name].recurrent else (2, 2)
    assert widths == sorted([5, 3, n_outputs])
    first = max(leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2 and leaf.shape[1] == 5)
    assert first == (n_inputs, 5)
    assert (made.band is None) == METHODS[name].recurrent
