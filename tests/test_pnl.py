import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import hedge, market, pnl
from dhlnn_jax.market import MarketPath
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.settings import make_settings

# Holding 0.5 and then -0.25: bought 0.5 at 1.0, sold 0.75 at 1.2, 0.25 to buy back at 0.9.
SPOT, HELD = np.array([1.0, 1.2, 0.9]), np.array([0.5, -0.25])
TWO_STEPS = lambda: (jnp.asarray(SPOT), jnp.asarray(HELD))  # noqa: E731


# --- by hand ------------------------------------------------------------------------------------------


def test_gain_turnover_and_trades_by_hand(strict_x64):
    spot, held = TWO_STEPS()
    np.testing.assert_allclose(pnl.trades(held), [0.5, -0.75, 0.25], atol=1e-15)
    assert float(pnl.trading_gain(spot, held)) == pytest.approx(0.5 * 0.2 + 0.25 * 0.3)
    assert float(pnl.turnover(held)) == pytest.approx(1.25)


@pytest.mark.parametrize(
    "held, turned_back",
    [
        ([0.2, 0.5, 0.4, 0.6], 0.1),  # 0.7 bought, 0.1 sold
        ([0.5, 0.1, 0.1, 0.0], 0.5),  # all of it, before the end
        ([0.2, 0.5, 0.5, 0.9], 0.0),  # bought only; what is sold at the end is no turning back
        ([-0.2, -0.5, -0.1, -0.1], 0.4),  # sold 0.5, bought back 0.4
        ([0.0, 0.0, 0.0, 0.0], 0.0),
    ],
)
def test_round_trip_by_hand(strict_x64, held, turned_back):
    both = jnp.stack([jnp.array(held), jnp.array([0.3, 0.1, 0.1, 0.1])], axis=1)  # a second asset: 0.2
    assert float(pnl.round_trip(jnp.array(held))) == pytest.approx(turned_back, abs=1e-15)
    assert float(pnl.round_trip(both)) == pytest.approx(turned_back + 0.2, abs=1e-15)


@pytest.mark.parametrize(
    ("liquidate", "premium", "money"),
    [
        (False, 0.0, 0.131),  # -0.03 + 0.175 - 0.01 (0.5 + 1.2 0.75)
        (False, 0.02, 0.151),
        (True, 0.0, 0.12875),  # - 0.01 0.9 0.25
        (True, 0.02, 0.14875),
    ],
)
def test_hedged_pnl_two_steps_by_hand(strict_x64, liquidate, premium, money):
    cost = pnl.proportional_cost(0.01, liquidate=liquidate)
    value = pnl.hedged_pnl(*TWO_STEPS(), jnp.array(0.03), cost=cost, premium=premium)
    assert float(value) == pytest.approx(money, abs=1e-15)


COSTS = [
    # trades 0.5, -0.75, 0.25 at 1.0, 1.2, 0.9; positions 0 -> 0.5 -> -0.25 -> 0
    (pnl.proportional_cost, 0.01, False, 0.014),
    (pnl.proportional_cost, 0.01, True, 0.01625),
    (pnl.proportional_cost, [0.01, 0.02, 0.03], False, 0.023),  # 0.01 0.5 + 0.02 0.9
    (pnl.proportional_cost, [0.01, 0.02, 0.03], True, 0.02975),  # + 0.03 0.225
    (pnl.squared_difference_cost, 0.01, False, 0.00925),  # 0.25 + 1.2 0.5625 = 0.925
    (pnl.squared_difference_cost, 0.01, True, 0.0098125),  # + 0.9 0.0625
    (pnl.squared_difference_cost, [0.01, 0.02, 0.03], True, 0.0176875),  # 0.0025 + 0.0135 + 0.0016875
    (pnl.difference_of_squares_cost, 0.01, False, 0.00025),  # 0.25 + 1.2 (0.0625 - 0.25) = 0.025
    (pnl.difference_of_squares_cost, 0.01, True, -0.0003125),  # - 0.9 0.0625: negative
]


@pytest.mark.parametrize(("model", "rate", "liquidate", "money"), COSTS)
def test_cost_by_hand(strict_x64, model, rate, liquidate, money):
    spot, held = TWO_STEPS()
    rate = rate if isinstance(rate, float) else jnp.array(rate)
    cost = model(rate, liquidate=liquidate)(pnl.trades(held), spot)
    assert float(cost) == pytest.approx(money, abs=1e-15)


def test_difference_of_squares_pays_the_hedger_who_sells_after_a_rise(strict_x64):
    # 1 0.5^2 + 2 (0 - 0.5^2): the reason why Eq. (14) as printed is an ablation and no cost
    cost = pnl.difference_of_squares_cost(1.0)
    assert float(cost(pnl.trades(jnp.array([0.5, 0.0])), jnp.array([1.0, 2.0, 1.0]))) == -0.25


def test_hedged_pnl_zero_hedge_and_zero_cost(strict_x64):
    spot, held = TWO_STEPS()
    cost = pnl.proportional_cost(0.5, liquidate=True)
    idle = pnl.hedged_pnl(spot, jnp.zeros(2), jnp.array(0.07), cost=cost, premium=0.02)
    assert float(idle) == pytest.approx(-0.05)
    for model in pnl.COST_MODELS.values():
        free = pnl.hedged_pnl(spot, held, jnp.array(0.07), cost=model(0.0, liquidate=True))
        assert float(free) == pytest.approx(0.105)


def test_hedged_pnl_two_instruments_add_up(strict_x64):
    spots = jnp.array([[1.0, 2.0], [1.2, 1.7], [0.9, 2.4]])
    held = jnp.array([[0.5, -0.3], [-0.25, 0.8]])
    for rate in (0.01, jnp.array([0.01, 0.02, 0.03])):
        cost = pnl.proportional_cost(rate, liquidate=True)
        both = pnl.hedged_pnl(spots, held, jnp.array(0.03), cost=cost)
        alone = [pnl.hedged_pnl(spots[:, i], held[:, i], jnp.array(0.0), cost=cost) for i in (0, 1)]
        np.testing.assert_allclose(both, alone[0] + alone[1] - 0.03, rtol=1e-13)
    # and the second by hand: -0.3 (-0.3) + 0.8 0.7 - 0.01 (0.3 2.0 + 1.1 1.7 + 0.8 2.4)
    by_hand = pnl.hedged_pnl(
        spots[:, 1], held[:, 1], jnp.array(0.0), cost=pnl.proportional_cost(0.01, liquidate=True)
    )
    assert float(by_hand) == pytest.approx(0.65 - 0.01 * 4.39)


def test_custom_cost_receives_every_trade_and_the_sale_last(strict_x64):
    seen = {}

    def fixed_fee(trade, spot):
        seen.update(trade=np.asarray(trade), spot=np.asarray(spot))
        return 0.001 * jnp.sum(jnp.where(trade != 0, 1.0, 0.0))

    value = pnl.hedged_pnl(*TWO_STEPS(), jnp.array(0.0), cost=fixed_fee)
    np.testing.assert_allclose(seen["trade"], [0.5, -0.75, 0.25], atol=1e-15)
    np.testing.assert_array_equal(seen["spot"], SPOT)
    assert float(value) == pytest.approx(0.175 - 0.003)


@pytest.mark.parametrize(("n_times", "n_steps"), [(3, 3), (4, 2), (2, 2)])
def test_wrong_lengths_are_refused(strict_x64, n_times, n_steps):
    arguments = jnp.ones(n_times), jnp.ones(n_steps)
    with pytest.raises(ValueError, match=rf"one time more.*\({n_times},\).*\({n_steps},\)"):
        pnl.trading_gain(*arguments)
    with pytest.raises(ValueError, match="one time more"):
        pnl.hedged_pnl(*arguments, jnp.array(0.0), cost=pnl.proportional_cost(0.0))


def test_wrong_number_of_instruments_is_refused(strict_x64):
    with pytest.raises(
        Exception, match="one time more|assets"
    ):  # jaxtyping's refusal comes first under pytest
        pnl.trading_gain(jnp.ones((3, 2)), jnp.ones((2, 1)))


def test_proportional_cost_is_flat_where_nothing_trades(strict_x64):
    # Held from 0.5 to 0.5: the second trade is 0 and its |.| must not push (JAX's own derivative there is 1).
    cost = lambda h: pnl.proportional_cost(0.01)(pnl.trades(h), jnp.asarray(SPOT))  # noqa: E731
    np.testing.assert_allclose(jax.grad(cost)(jnp.array([0.5, 0.5])), [0.01, 0.0], atol=1e-15)
    np.testing.assert_allclose(jax.grad(cost)(jnp.array([0.0, 0.0])), [0.0, 0.0], atol=1e-15)
    np.testing.assert_allclose(jax.grad(pnl.turnover)(jnp.array([0.5, 0.5])), [1.0, 0.0], atol=1e-15)


def test_hedged_pnl_compiled_and_batched_equals_one_by_one_with_finite_slopes(strict_x64):
    rng = np.random.default_rng(0)
    spots, held = jnp.asarray(1 + 0.1 * rng.normal(size=(4, 3))), jnp.asarray(rng.normal(size=(4, 2)))
    one = lambda s, h: pnl.hedged_pnl(s, h, jnp.array(0.1), cost=pnl.proportional_cost(0.01))  # noqa: E731
    batched = jax.jit(jax.vmap(one))(spots, held)
    np.testing.assert_allclose(batched, [one(s, h) for s, h in zip(spots, held, strict=True)], rtol=1e-13)
    slope = np.asarray(jax.grad(one, 1)(*TWO_STEPS()))
    # d/dh_0: 0.2 - 0.01 (1.0 + 1.2), d/dh_1: -0.3 - 0.01 (-1.2)
    np.testing.assert_allclose(slope, [0.178, -0.288], rtol=1e-12)


# --- contracts ----------------------------------------------------------------------------------------


def test_contract_pnl_by_hand(strict_x64):
    contract = pnl.Contract(CLAIMS["lookback_call"], liquidate=True)
    settings = make_settings(n_steps=2, strike=1.15, cost_rate=0.01, premium=0.02)
    value = pnl.contract_pnl(contract, MarketPath(jnp.asarray(SPOT)), jnp.asarray(HELD), settings)
    assert float(value) == pytest.approx(0.02 - 0.05 + 0.175 - 0.01625)


def test_contract_charges_the_half_spread_of_the_path(strict_x64):
    contract = pnl.Contract(CLAIMS["european_call"], liquidate=True, charge_half_spread=True)
    settings = make_settings(n_steps=2, strike=1.0, cost_rate=77.0)
    quoted = MarketPath(jnp.asarray(SPOT), half_spread=jnp.array([0.01, 0.02, 0.03]))
    value = pnl.contract_pnl(contract, quoted, jnp.asarray(HELD), settings)
    assert float(value) == pytest.approx(0.175 - 0.02975)
    with pytest.raises(ValueError, match="charge_half_spread"):
        pnl.contract_pnl(contract, MarketPath(jnp.asarray(SPOT)), jnp.asarray(HELD), settings)


def test_contract_takes_any_cost_model(strict_x64):
    contract = pnl.Contract(CLAIMS["european_put"], cost_model=pnl.squared_difference_cost)
    settings = make_settings(n_steps=2, strike=1.0, cost_rate=0.01)
    value = pnl.contract_pnl(contract, MarketPath(jnp.asarray(SPOT)), jnp.asarray(HELD), settings)
    assert float(value) == pytest.approx(-0.1 + 0.175 - 0.00925)


# --- the Black-Scholes hedge in the limit of no cost --------------------------------------------------

N_PATHS = 8000


@pytest.fixture(scope="module")
def frictionless():
    """pnl [n_paths] of any rule on the same 8000 paths of 30 days at volatility 0.1, strike 1, no cost."""
    settings = make_settings(n_steps=30, volatility=0.1)
    sample = market.make_simulation_sampler(market.SIMULATORS["gbm"], n_steps=30)
    paths, _ = sample(jax.random.key(5), N_PATHS, settings)
    contract = pnl.Contract(CLAIMS["european_call"])

    def of(rule):
        def one(path):
            return pnl.contract_pnl(contract, path, rule(market.observed_path(path), settings), settings)

        return np.asarray(jax.jit(jax.vmap(one))(paths), dtype=float)

    return of


def is_a_delta_hedge(values):
    """Mean minus the price within 4 standard errors, and the spread of 30 rebalancings within 10 %."""
    stderr = values.std() / math.sqrt(N_PATHS)
    return abs(values.mean() + 0.011437) < 4 * stderr and abs(values.std() / 0.0018 - 1) < 0.1


IMPOSTORS = {
    "no_hedge": hedge.no_hedge,
    "untrained_like_constant": lambda path, s: 0.5 * jnp.ones_like(path.spot),
    "sign_flipped": lambda path, s: -hedge.delta_hedge(path, s),
    "one_step_stale": lambda path, s: jnp.roll(hedge.delta_hedge(path, s), 1).at[0].set(0.0),
}


def test_frictionless_delta_hedge_has_the_known_mean_and_spread(frictionless):
    assert is_a_delta_hedge(frictionless(hedge.delta_hedge))


@pytest.mark.parametrize("name", IMPOSTORS)
def test_frictionless_check_refuses_every_other_hedge(frictionless, name):
    assert not is_a_delta_hedge(frictionless(IMPOSTORS[name]))
