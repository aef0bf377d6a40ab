import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax.payoff import CLAIMS, european_call, european_put, lookback_call

SPOT = [1.0, 1.3, 0.9, 1.1]


@pytest.mark.parametrize(
    ("payoff", "spot", "strike", "money"),
    [
        (european_call, SPOT, 1.05, 0.05),
        (european_call, SPOT, 1.2, 0.0),
        (european_put, SPOT, 1.05, 0.0),
        (european_put, SPOT, 1.25, 0.15),
        (lookback_call, SPOT, 1.05, 0.25),
        (lookback_call, SPOT, 1.4, 0.0),
        (lookback_call, [1.3, 1.0, 1.2], 1.05, 0.25),  # the first time counts
        (lookback_call, [1.0, 1.2, 1.3], 1.05, 0.25),  # and so does the last
        (european_call, [1.3], 1.0, 0.3),
        (european_put, [0.8], 1.0, 0.2),
        (lookback_call, [1.3], 1.0, 0.3),
    ],
)
def test_payoff_by_hand(strict_x64, payoff, spot, strike, money):
    np.testing.assert_allclose(payoff(jnp.array(spot), strike=strike), money, atol=1e-15)
    assert payoff(jnp.array(spot), strike=strike).shape == ()


def test_payoff_batched_and_compiled_equals_one_by_one(strict_x64, key):
    spots = jnp.exp(0.3 * jax.random.normal(key, (5, 4)))
    for payoff in (european_call, european_put, lookback_call):
        batched = jax.jit(jax.vmap(lambda s, f=payoff: f(s, strike=1.0)))(spots)
        np.testing.assert_allclose(batched, [payoff(s, strike=1.0) for s in spots], rtol=1e-14)


@pytest.mark.parametrize(
    ("payoff", "strike", "slope", "strike_slope"),
    [
        (european_call, 1.05, [0, 0, 0, 1], -1),
        (european_put, 1.25, [0, 0, 0, -1], 1),
        (lookback_call, 1.05, [0, 1, 0, 0], -1),
        (european_call, 2.0, [0, 0, 0, 0], 0),
    ],
)
def test_payoff_gradient_only_at_what_it_depends_on(strict_x64, payoff, strike, slope, strike_slope):
    by_spot, by_strike = jax.grad(lambda s, k: payoff(s, strike=k), (0, 1))(jnp.array(SPOT), strike)
    np.testing.assert_array_equal(by_spot, slope)
    assert float(by_strike) == strike_slope


def test_claims_say_what_they_depend_on(strict_x64):
    stated = {name: CLAIMS[name].depends_on for name in ("european_call", "european_put", "lookback_call")}
    assert stated == {"european_call": "terminal", "european_put": "terminal", "lookback_call": "maximum"}
    # The promise behind the word: a path of that one number is worth the same, for every registered claim.
    for claim in CLAIMS.values():
        number = {"terminal": SPOT[-1], "maximum": max(SPOT)}.get(claim.depends_on)
        if number is not None:
            for strike in (1.05, 1.25):
                whole = claim.payoff(jnp.array(SPOT), strike=strike)
                assert float(claim.payoff(jnp.array([number]), strike=strike)) == float(whole)
        assert claim.terminal == (claim.depends_on == "terminal")
