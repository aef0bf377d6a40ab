import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import black_scholes, hedge
from dhlnn_jax.market import MarketPath
from dhlnn_jax.settings import make_settings

SPOT = np.array([1.0, 1.02, 0.97, 1.01])

band_step = jax.jit(jax.value_and_grad(hedge.band_step, (0, 1, 2)))
band_hedge = jax.jit(hedge.band_hedge)


def observed(**others):
    return MarketPath(jnp.asarray(SPOT), **others)


def settings(**changes):
    numbers = dict(strike=1.0, volatility=0.2, cost_rate=5e-3, risk_aversion=50.0, dt=0.02)
    return make_settings(n_steps=4, **(numbers | changes))


# --- the band -----------------------------------------------------------------------------------------

BAND_STEPS = [
    # previous, lower, upper, position, and its derivative to (previous, lower, upper)
    (0.0, 0.2, 0.4, 0.2, (0, 1, 0)),  # below
    (0.5, 0.2, 0.4, 0.4, (0, 0, 1)),  # above
    (0.3, 0.2, 0.4, 0.3, (1, 0, 0)),  # inside
    (0.9, 0.6, 0.2, 0.4, (0, 0.5, 0.5)),  # crossed
    (0.3, 0.6, 0.2, 0.4, (0, 0.5, 0.5)),  # crossed around the position
    (0.2, 0.2, 0.4, 0.2, (1, 0, 0)),  # on the lower edge: inside
    (0.4, 0.2, 0.4, 0.4, (1, 0, 0)),  # on the upper edge: inside
    (0.3, 0.3, 0.3, 0.3, (1, 0, 0)),  # no width, and there already
    (0.1, 0.3, 0.3, 0.3, (0, 1, 0)),
    (-7.0, -1e9, 1e9, -7.0, (1, 0, 0)),
]


@pytest.mark.parametrize(("previous", "lower", "upper", "position", "slopes"), BAND_STEPS)
def test_band_step_position_and_one_sided_slopes(strict_x64, previous, lower, upper, position, slopes):
    arguments = (jnp.array(previous), jnp.array(lower), jnp.array(upper))
    value, given = band_step(*arguments)
    assert float(value) == pytest.approx(position, abs=1e-15)
    assert tuple(map(float, given)) == slopes


def test_band_hedge_by_hand(strict_x64):
    lower = jnp.array([0.1, 0.3, 0.2, -0.1, 0.5, -0.9])
    upper = jnp.array([0.4, 0.6, 0.25, 0.1, 0.3, 0.9])
    # up to 0.1, up to 0.3, down to 0.25, down to 0.1, crossed: 0.4, inside
    np.testing.assert_allclose(band_hedge(lower, upper), [0.1, 0.3, 0.25, 0.1, 0.4, 0.4], atol=1e-15)


CENTRE = np.array([0.3, -0.2, 0.9, 0.5, 0.45, 1.4])


def test_band_hedge_without_width_is_its_centre(strict_x64):
    np.testing.assert_array_equal(band_hedge(CENTRE, CENTRE), CENTRE)


@pytest.mark.parametrize("width", [1e9, math.inf])
def test_band_hedge_of_endless_width_never_trades(strict_x64, width):
    total = lambda w: jnp.sum(jnp.abs(hedge.band_hedge(CENTRE - w, CENTRE + w)))  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(total))(jnp.full(6, width))
    assert float(value) == 0.0
    np.testing.assert_array_equal(slope, np.zeros(6))  # a dead band: nothing to learn from


def random_band(shape):
    one, other = np.random.default_rng(1).normal(size=(2, *shape))
    return one, one + np.abs(other) - 0.2  # a few of them crossed


def test_band_hedge_compiled_and_batched_equals_a_loop(strict_x64):
    lower, upper = random_band((5, 7))
    batched = jax.jit(jax.vmap(hedge.band_hedge))(jnp.asarray(lower), jnp.asarray(upper))
    for lows, highs, given in zip(lower, upper, np.asarray(batched), strict=True):
        position = 0.0
        for low, high, h in zip(lows, highs, given, strict=True):
            position = (low + high) / 2 if low > high else min(max(low, position), high)
            assert h == pytest.approx(position, abs=1e-14)


def test_band_hedge_of_several_assets_is_each_for_itself(strict_x64):
    lower, upper = random_band((7, 2))
    both = band_hedge(lower, upper)
    assert both.shape == (7, 2)
    for i in range(2):
        np.testing.assert_array_equal(both[:, i], band_hedge(lower[:, i], upper[:, i]))


def test_band_hedge_gradient_flows_through_the_held_position(strict_x64):
    # Bought up to the first lower edge, then held: the last position moves with that edge alone.
    lower, upper = jnp.array([0.3, 0.1, 0.0]), jnp.array([0.9, 0.8, 0.7])
    by_lower, by_upper = jax.grad(lambda a, b: hedge.band_hedge(a, b)[-1], (0, 1))(lower, upper)
    assert by_lower.tolist() == [1.0, 0.0, 0.0] and by_upper.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("form", hedge.CLAMPS)
def test_an_edge_that_is_no_number_gives_no_position_and_an_infinite_one_never_trades(form):
    held = jax.jit(jax.value_and_grad(lambda lower, upper: hedge.CLAMPS[form](lower, upper).sum()))
    lower, upper = jnp.array([0.2, 0.3, 0.1]), jnp.array([0.4, 0.5, 0.2])
    assert np.isfinite(held(lower, upper)[0])
    for t in range(3):
        for edges in ((lower.at[t].set(jnp.nan), upper), (lower, upper.at[t].set(jnp.nan))):
            ratio = hedge.CLAMPS[form](*edges)
            assert np.isnan(ratio[t:]).all() and np.isfinite(ratio[:t]).all()
    wide = jnp.full(3, jnp.inf)
    value, slope = held(-wide, wide)
    assert value == 0.0 and not slope.any()


# --- rules --------------------------------------------------------------------------------------------


def test_no_hedge_holds_nothing(strict_x64):
    np.testing.assert_array_equal(hedge.no_hedge(observed(), settings()), np.zeros(4))
    assert hedge.no_hedge(MarketPath(jnp.ones((4, 2))), settings()).shape == (4, 2)


def test_delta_hedge_is_the_normal_law_of_d1(strict_x64):
    expected = []
    for i, spot in enumerate(np.asarray(SPOT)):
        deviation = 0.2 * math.sqrt(0.02 * (4 - i))
        d1 = math.log(spot / 1.1) / deviation + deviation / 2
        expected.append(0.5 * math.erfc(-d1 / math.sqrt(2)))
    path = observed()
    np.testing.assert_allclose(hedge.delta_hedge(path, settings(strike=1.1)), expected, rtol=1e-12)
    np.testing.assert_allclose(hedge.european_call_delta(path, settings(strike=1.1)), expected, rtol=1e-12)
    np.testing.assert_allclose(
        hedge.european_put_delta(path, settings(strike=1.1)), np.array(expected) - 1, rtol=1e-12
    )


def test_delta_hedge_goes_by_the_variance_of_the_path(strict_x64):
    known = observed(variance=jnp.full(4, 0.09))
    np.testing.assert_allclose(
        hedge.delta_hedge(known, settings(volatility=0.2)),
        hedge.delta_hedge(observed(), settings(volatility=0.3)),
        rtol=1e-12,
    )


def test_lookback_call_delta_is_the_slope_of_its_price_at_the_running_maximum(strict_x64):
    price = jax.jit(black_scholes.lookback_price)
    given = np.asarray(hedge.lookback_call_delta(observed(), settings(strike=1.01)))
    for i, maximum in enumerate([1.0, 1.02, 1.02, 1.02]):

        def quote(s, steps_left=4 - i, maximum=maximum):
            x, m = jnp.log(jnp.asarray(s) / 1.01), jnp.log(maximum / 1.01)
            return 1.01 * price(x, m, 0.02 * steps_left, 0.2, monitoring_dt=0.02)

        spot, h = float(SPOT[i]), 1e-5
        np.testing.assert_allclose(given[i], (quote(spot + h) - quote(spot - h)) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("name", hedge.DELTAS)
def test_every_delta_rule_compiles_batches_and_has_finite_slopes(strict_x64, name):
    rule = hedge.DELTAS[name]
    spots = jnp.stack([SPOT, 1.1 * SPOT[::-1]])
    one = jax.jit(lambda spot: rule(MarketPath(spot), settings()))
    batched = jax.vmap(one)(spots)
    np.testing.assert_allclose(batched, [one(s) for s in spots], rtol=1e-12)
    slopes = np.asarray(jax.grad(lambda s: jnp.sum(one(s)))(spots[0]))
    assert np.all(np.isfinite(slopes)) and np.any(slopes != 0)


# --- Whalley-Wilmott ----------------------------------------------------------------------------------


def test_whalley_wilmott_band_surrounds_the_delta(strict_x64):
    path = observed()
    lower, upper = hedge.whalley_wilmott_band(path, settings())
    centre = np.asarray(hedge.delta_hedge(path, settings()))
    assert np.all(lower < centre) and np.all(centre < upper)
    # at t = 0, at the money: s = 0.2 sqrt(0.08), gamma = phi(s/2) / s, (1.5 * 5e-3 / 50 gamma^2)^(1/3)
    s = 0.2 * math.sqrt(0.08)
    gamma = math.exp(-(s**2) / 8) / math.sqrt(2 * math.pi) / s
    assert float(upper[0] - lower[0]) == pytest.approx(2 * (1.5e-4 * gamma**2) ** (1 / 3), rel=1e-9)
    held = np.asarray(hedge.whalley_wilmott_hedge(path, settings()))
    assert np.all(lower <= held) and np.all(held <= upper)
    assert float(held[0]) == pytest.approx(float(lower[0]))  # bought from nothing to the near edge


def test_whalley_wilmott_hedge_without_cost_is_the_delta(strict_x64):
    path, free = observed(), settings(cost_rate=0.0)
    np.testing.assert_allclose(
        hedge.whalley_wilmott_hedge(path, free), hedge.delta_hedge(path, free), rtol=1e-14
    )


def test_whalley_wilmott_band_of_a_put_and_of_a_quoted_spread(strict_x64):
    path = observed()
    call = hedge.whalley_wilmott_band(path, settings())
    put = hedge.whalley_wilmott_band(path, settings(), delta=hedge.european_put_delta)
    np.testing.assert_allclose(put, np.asarray(call) - 1, atol=1e-14)
    spread = observed(half_spread=jnp.full(4, 8 * 5e-3))
    quoted = hedge.whalley_wilmott_band(spread, settings())
    width = lambda band: np.asarray(band[1] - band[0])  # noqa: E731
    np.testing.assert_allclose(width(quoted), 2 * width(call), rtol=1e-12)  # the cube root of 8


# --- other rules --------------------------------------------------------------------------------------


def test_leland_is_the_delta_at_a_higher_volatility(strict_x64):
    # sigma^2 (1 + sqrt(8/pi) c / (sigma sqrt(dt))) with sigma 0.2, c 5e-3, dt 0.02
    adjusted = 0.2 * math.sqrt(1 + math.sqrt(8 / math.pi) * 5e-3 / (0.2 * math.sqrt(0.02)))
    given = hedge.leland_hedge(observed(), settings(strike=1.05))
    wanted = hedge.delta_hedge(observed(), settings(strike=1.05, volatility=adjusted))
    np.testing.assert_allclose(given, wanted, rtol=1e-12)
    assert np.all(given > hedge.delta_hedge(observed(), settings(strike=1.05)))  # out of the money
    free = settings(cost_rate=0.0)
    np.testing.assert_allclose(
        hedge.leland_hedge(observed(), free), hedge.delta_hedge(observed(), free), rtol=1e-12
    )


def test_periodic_delta_holds_in_between(strict_x64):
    delta = np.asarray(hedge.delta_hedge(observed(), settings()))
    for every, at in ((1, [0, 1, 2, 3]), (2, [0, 0, 2, 2]), (3, [0, 0, 0, 3]), (9, [0, 0, 0, 0])):
        held = hedge.periodic_delta_hedge(observed(), settings(), every=every)
        np.testing.assert_array_equal(held, delta[at])


def test_fixed_band_is_as_wide_everywhere(strict_x64):
    lower, upper = hedge.fixed_band(observed(), settings(), half_width=0.07, delta=hedge.european_put_delta)
    np.testing.assert_allclose(upper - lower, 0.14, rtol=1e-12)
    np.testing.assert_allclose(0.5 * (lower + upper), hedge.european_put_delta(observed(), settings()))


# --- the recursion over the previous hedge ratio ------------------------------------------------------


def test_scan_hedge_by_hand(strict_x64):
    step = lambda previous, x: (0.5 * previous + x, 10.0 * previous)  # noqa: E731
    ratios, raw = hedge.scan_hedge(step, jnp.array([1.0, 2.0, 3.0]), jnp.array(4.0))
    assert ratios.tolist() == [3.0, 3.5, 4.75]
    assert raw.tolist() == [40.0, 30.0, 35.0]


# --- all times at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("n_steps", [1, 30, 200])
def test_band_hedge_parallel_is_band_hedge(strict_x64, n_steps, dtype, tolerance):
    rng = np.random.default_rng(n_steps)
    middle, width = np.cumsum(0.1 * rng.normal(size=n_steps)), rng.uniform(-0.05, 0.2, n_steps)
    lower, upper = jnp.asarray(middle - width, dtype), jnp.asarray(middle + width, dtype)  # a fifth crossed
    weight = jnp.asarray(rng.normal(size=n_steps), dtype)

    def judged(hedge_of):
        return jax.jit(jax.value_and_grad(lambda a, b: jnp.sum(weight * hedge_of(a, b)), (0, 1)))(
            lower, upper
        )

    np.testing.assert_array_equal(
        jax.jit(hedge.band_hedge_parallel)(lower, upper), jax.jit(hedge.band_hedge)(lower, upper)
    )
    (_, slopes), (_, wanted) = judged(hedge.band_hedge_parallel), judged(hedge.band_hedge)
    np.testing.assert_allclose(slopes, wanted, rtol=tolerance, atol=tolerance)


def test_band_hedge_parallel_has_finite_gradients_at_ties(strict_x64):
    level = jnp.array(
        [0.0, 0.3, 0.3, 0.3, 0.1]
    )  # edges that meet each other, the start and the last position
    for lower, upper in ((level, level), (level, level + 0.2), (level - 0.2, level)):
        slopes = jax.grad(lambda a, b: jnp.sum(hedge.band_hedge_parallel(a, b)), (0, 1))(lower, upper)
        assert np.all(np.isfinite(slopes)) and np.abs(slopes).max() <= 5


def test_bands_do_not_depend_on_the_unit_of_money():
    """A hundred times the spot, the strike and every sum of money: the same hedge ratios."""
    one, hundred = observed(), MarketPath(100.0 * jnp.asarray(SPOT))
    dear = settings(strike=103.0, risk_aversion=0.5)
    edges = (hedge.whalley_wilmott_band(*at) for at in ((one, settings(strike=1.03)), (hundred, dear)))
    for cheap_edge, dear_edge in zip(*edges, strict=True):
        np.testing.assert_allclose(dear_edge, cheap_edge, rtol=2e-5, atol=1e-6)
    width = hedge.whalley_wilmott_half_width(one, settings(strike=1.03))
    np.testing.assert_allclose(hedge.whalley_wilmott_half_width(hundred, dear), width, rtol=2e-5)
    assert float(width.min()) > 0.01
