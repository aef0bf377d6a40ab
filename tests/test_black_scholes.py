import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import black_scholes as bs
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.settings import make_settings
from dhlnn_jax.unhedged import unhedged_law

MONTH = 30 / 365
POINTS = [(0.0, MONTH, 0.1), (0.1, 0.5, 0.3), (-0.2, 1.0, 0.25), (0.02, 0.01, 0.4)]  # x, tau, volatility
STRIKE = 1.7

price, delta, gamma, lookback_price, lookback_delta = map(
    jax.jit, (bs.price, bs.delta, bs.gamma, bs.lookback_price, bs.lookback_delta)
)
whalley_wilmott_half_width = jax.jit(bs.whalley_wilmott_half_width)


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def numbers(*values):
    return [jnp.asarray(v, float) for v in values]


# --- European -----------------------------------------------------------------------------------------


def test_price_at_the_money_month(strict_x64):
    assert float(price(*numbers(0.0, MONTH, 0.1))) == pytest.approx(0.011437, abs=5e-7)


@pytest.mark.parametrize("point", POINTS)
def test_price_is_the_integral_of_the_payoff(strict_x64, point):
    x, time, volatility = point
    deviation = volatility * math.sqrt(time)
    z = np.linspace(-12, 12, 400_001)
    spot = STRIKE * np.exp(x - deviation**2 / 2 + deviation * z)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    integral = np.trapezoid(np.maximum(spot - STRIKE, 0) * density, z)
    np.testing.assert_allclose(price(*numbers(*point), strike=STRIKE), integral, rtol=1e-7)


@pytest.mark.parametrize("point", POINTS)
def test_price_parity_through_delta(strict_x64, point):
    # C = S N(d1) - K N(d2), and N(d2) = 1 - N(d1) at the mirrored moneyness;
    # put-call symmetry makes the put a call with spot and strike exchanged, so C - P = S - K.
    x, time, volatility = numbers(*point)
    spot = STRIKE * math.exp(point[0])
    call = price(x, time, volatility, strike=STRIKE)
    from_deltas = spot * delta(x, time, volatility) - STRIKE * (1 - delta(-x, time, volatility))
    np.testing.assert_allclose(call, from_deltas, atol=1e-14)
    np.testing.assert_allclose(call - price(-x, time, volatility, strike=spot), spot - STRIKE, atol=1e-14)


@pytest.mark.parametrize("point", POINTS)
def test_delta_is_the_derivative_of_price_to_spot(strict_x64, point):
    x, time, volatility = numbers(*point)
    price_of_spot = lambda s: price(jnp.log(s / STRIKE), time, volatility, strike=STRIKE)  # noqa: E731
    slope = jax.jit(jax.grad(price_of_spot))(STRIKE * jnp.exp(x))
    np.testing.assert_allclose(delta(x, time, volatility), slope, rtol=1e-12)


@pytest.mark.parametrize("point", POINTS)
def test_gamma_is_the_difference_quotient_of_delta(strict_x64, point):
    x, time, volatility = numbers(*point)
    spot, h = STRIKE * math.exp(point[0]), 1e-5
    up, down = (delta(jnp.log(s / STRIKE), time, volatility) for s in (spot + h, spot - h))
    np.testing.assert_allclose(gamma(x, time, volatility, strike=STRIKE), (up - down) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize(("x", "expired_delta"), [(-0.1, 0.0), (0.0, 0.5), (0.1, 1.0)])
@pytest.mark.parametrize(("time", "volatility"), [(0.0, 0.2), (1.0, 0.0)])
def test_european_without_randomness_is_its_payoff(strict_x64, x, expired_delta, time, volatility):
    arguments = numbers(x, time, volatility)
    np.testing.assert_allclose(
        price(*arguments, strike=STRIKE), max(STRIKE * math.exp(x) - STRIKE, 0), atol=1e-15
    )
    assert float(delta(*arguments)) == expired_delta
    assert float(gamma(*arguments)) == 0.0


def test_closed_forms_broadcast_and_compile(strict_x64):
    x, time, volatility = jnp.linspace(-0.1, 0.1, 3), jnp.array([0.0, 0.1, 0.2]), jnp.array(0.2)
    at_once = price(x, time, volatility)
    np.testing.assert_allclose(at_once, [bs.price(a, b, volatility) for a, b in zip(x, time, strict=True)])
    assert delta(x, jnp.array(0.1), jnp.array(0.2)).shape == (3,)


# --- Whalley-Wilmott ----------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
def test_whalley_wilmott_half_width_printed_formula(strict_x64, point):
    cost_rate, risk_aversion = 5e-3, 50.0
    curvature = float(gamma(*numbers(*point), strike=STRIKE))
    expected = (1.5 * cost_rate * STRIKE * math.exp(point[0]) * curvature**2 / risk_aversion) ** (1 / 3)
    half_width = whalley_wilmott_half_width(
        *numbers(*point), cost_rate=cost_rate, risk_aversion=risk_aversion, strike=STRIKE
    )
    np.testing.assert_allclose(half_width, expected, rtol=1e-12)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("cost_rate", [0.0, 2e-3])
def test_whalley_wilmott_half_width_finite_as_gamma_vanishes(x64, cost_rate):
    with jax.enable_x64(x64):
        width = lambda x, tau, cost: whalley_wilmott_half_width(  # noqa: E731
            x, tau, jnp.asarray(0.1), cost_rate=cost, risk_aversion=50.0
        )
        width_and_slopes = jax.jit(jax.value_and_grad(width, (0, 1, 2)))
        for x in (0.5, 5.0):  # log gamma is -1e5 and less
            value, slopes = width_and_slopes(*numbers(x, 1e-4, cost_rate))
            assert float(value) == 0.0
            assert all(math.isfinite(s) for s in slopes)
        value, slopes = width_and_slopes(*numbers(0.0, 0.1, cost_rate))
        assert (float(value) > 0) == (cost_rate > 0)
        assert all(math.isfinite(s) for s in slopes)


# --- lookback -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("monitoring_dt", "money", "tolerance"), [(0.0, 0.0231, 5e-5), (1 / 365, 0.0202, 1.5e-4)]
)
def test_lookback_price_at_the_money_month(strict_x64, monitoring_dt, money, tolerance):
    value = lookback_price(*numbers(0.0, 0.0, MONTH, 0.1), monitoring_dt=monitoring_dt)
    assert float(value) == pytest.approx(money, abs=tolerance)


def test_lookback_price_monitoring_shift_against_spitzer(strict_x64):
    # Exact at the money: Spitzer's identity makes a_n = E exp(max of n looks at log S) a recursion,
    # n a_n = sum_k b_k a_{n-k}, b_k = E exp(max(log S_k, 0)) = 2 N(volatility sqrt(k dt) / 2).
    b = [2 * normal_cdf(0.1 * math.sqrt(k / 365) / 2) for k in range(1, 31)]
    a = [1.0]
    for n in range(1, 31):
        a.append(sum(b[k - 1] * a[n - k] for k in range(1, n + 1)) / n)
    discrete = a[-1] - 1.0
    assert discrete == pytest.approx(0.0202, abs=5e-5)
    shifted = float(lookback_price(*numbers(0.0, 0.0, MONTH, 0.1), monitoring_dt=1 / 365))
    continuous = float(lookback_price(*numbers(0.0, 0.0, MONTH, 0.1)))
    # the shift takes away all but a fortieth of the error: it is asymptotic, 6e-5 low with 30 looks
    assert abs(shifted - discrete) < (continuous - discrete) / 40


@pytest.mark.parametrize(
    ("x", "maximum"), [(0.0, 0.0), (-0.1, -0.05), (-0.05, 0.02), (0.03, 0.05), (0.04, 0.04)]
)
def test_lookback_price_is_the_integral_of_the_law_of_the_maximum(strict_x64, x, maximum):
    integrate = pytest.importorskip("scipy.integrate")
    time, volatility = 0.4, 0.3
    spot, deviation, drift = STRIKE * math.exp(x), volatility * math.sqrt(time), -(volatility**2) / 2

    def exceeds(y):  # P(max of the path > y), by the reflection principle
        b = math.log(y / spot)
        return normal_cdf((drift * time - b) / deviation) + math.exp(
            2 * drift * b / volatility**2
        ) * normal_cdf((-b - drift * time) / deviation)

    barrier = STRIKE * max(math.exp(maximum), 1.0)
    future = integrate.quad(exceeds, barrier, 20 * STRIKE, epsabs=1e-13, limit=200)[0]
    value = lookback_price(*numbers(x, maximum, time, volatility), strike=STRIKE)
    np.testing.assert_allclose(value, barrier - STRIKE + future, rtol=1e-9)


@pytest.mark.parametrize("monitoring_dt", [0.0, 1 / 365])
@pytest.mark.parametrize(("x", "maximum"), [(-0.1, -0.05), (-0.05, 0.02), (0.03, 0.05)])
def test_lookback_delta_is_the_derivative_at_a_fixed_maximum(strict_x64, x, maximum, monitoring_dt):
    maximum, time, volatility, dt = numbers(maximum, 0.2, 0.3, monitoring_dt)

    def price_of_spot(spot):
        return lookback_price(
            jnp.log(spot / STRIKE), maximum, time, volatility, strike=STRIKE, monitoring_dt=dt
        )

    slope = jax.grad(price_of_spot)(jnp.array(STRIKE * math.exp(x)))
    value = lookback_delta(jnp.array(x), maximum, time, volatility, monitoring_dt=dt)
    np.testing.assert_allclose(value, slope, rtol=1e-11)


@pytest.mark.parametrize("maximum", [-0.1, 0.0, 0.2])
def test_lookback_at_expiry_is_its_payoff(strict_x64, maximum):
    arguments = numbers(-0.2, maximum, 0.0, 0.2)
    np.testing.assert_allclose(
        lookback_price(*arguments, strike=STRIKE),
        max(STRIKE * math.exp(maximum) - STRIKE, 0.0),
        atol=1e-15,
    )
    assert float(lookback_delta(*arguments)) == 0.0


# --- finite everywhere --------------------------------------------------------------------------------

CLOSED_FORMS = {
    "price": lambda x, tau, sigma, strike, dt: bs.price(x, tau, sigma, strike=strike),
    "delta": lambda x, tau, sigma, strike, dt: bs.delta(x, tau, sigma),
    "gamma": lambda x, tau, sigma, strike, dt: bs.gamma(x, tau, sigma, strike=strike),
    "whalley_wilmott_half_width": lambda x, tau, sigma, strike, dt: bs.whalley_wilmott_half_width(
        x, tau, sigma, cost_rate=dt, risk_aversion=50.0, strike=strike
    ),
    "lookback_price": lambda x, tau, sigma, strike, dt: bs.lookback_price(
        x, x + 0.1, tau, sigma, strike=strike, monitoring_dt=dt
    ),
    "lookback_price_at_its_maximum": lambda x, tau, sigma, strike, dt: bs.lookback_price(
        x, x, tau, sigma, strike=strike, monitoring_dt=dt
    ),
    "lookback_delta": lambda x, tau, sigma, strike, dt: bs.lookback_delta(
        x, x + 0.1, tau, sigma, monitoring_dt=dt
    ),
}


@functools.cache
def values_and_slopes(dtype):
    """Every closed form on the grid with its slopes to x, tau, sigma, strike and dt, by one compilation."""
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        times, xs = jnp.array([0.0, 1e-12, 1e-4, 0.1]), jnp.array([-5.0, 0.0, 5.0, 1e-9])
        x, time = (g.ravel() for g in jnp.meshgrid(xs, times))
        rest = [jnp.full(x.shape, v) for v in (0.1, 1.3, 1 / 365)]
        of_all = lambda *a: {n: jax.value_and_grad(f, (0, 1, 2, 3, 4))(*a) for n, f in CLOSED_FORMS.items()}  # noqa: E731
        return jax.jit(jax.vmap(of_all))(x, time, *rest)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form_value_and_every_gradient_finite(name, dtype):
    value, slopes = values_and_slopes(dtype)[name]
    assert value.dtype == dtype and value.shape == (16,)
    assert np.all(np.isfinite(value)) and np.all(np.asarray(value) >= 0)
    for argument, slope in zip(("x", "tau", "sigma", "strike", "dt"), slopes, strict=True):
        assert np.all(np.isfinite(slope)), argument


@pytest.mark.parametrize(
    "name", ["price", "delta", "gamma", "lookback_price", "lookback_delta", "half_width"]
)
def test_what_is_no_number_gives_none_instead_of_the_value_at_expiry(name):
    lookback = name.startswith("lookback")
    fn = {"half_width": functools.partial(bs.whalley_wilmott_half_width, cost_rate=2e-3, risk_aversion=50.0)}
    given = [0.05, *([0.1] if lookback else []), MONTH, 0.2]
    fn = jax.jit(fn.get(name) or getattr(bs, name))
    assert np.isfinite(fn(*numbers(*given)))
    for i in range(len(given)):
        assert np.isnan(fn(*numbers(*given[:i], math.nan, *given[i + 1 :]))), i
    for i in (-1, -2):  # no volatility, no time left
        assert np.isfinite(fn(*numbers(*(0.0 if j == i % len(given) else x for j, x in enumerate(given)))))


@pytest.mark.parametrize("strike", [0.97, 1.0, 1.03])
def test_lookback_looked_at_daily_is_the_mean_of_the_exact_law_also_above_the_maximum(strike):
    """Good to the o(sqrt(dt)) of the shift; without it, or moved from the maximum instead, it is far off."""
    law = unhedged_law(
        CLAIMS["lookback_call"], make_settings(n_steps=30, strike=strike, volatility=0.2), n_steps=30
    )
    x = -math.log(strike)
    daily = lookback_price(*numbers(x, x, MONTH, 0.2), strike=strike, monitoring_dt=1 / 365)
    assert float(daily) == pytest.approx(law.payoff @ law.probability, abs=2.5e-4)
    assert float(lookback_price(*numbers(x, x, MONTH, 0.2), strike=strike)) > float(daily) + 1e-3


def test_little_randomness_is_still_some():
    """x / s = 1 at a deviation of a thousandth of a percent."""
    assert float(delta(*numbers(1e-5, 1.0, 1e-5))) == pytest.approx(normal_cdf(1.0), abs=1e-3)


@pytest.mark.parametrize("cost_rate, risk_aversion", [(math.nan, 50.0), (2e-3, math.nan)])
def test_half_width_of_a_cost_or_risk_aversion_that_is_no_number(cost_rate, risk_aversion):
    at = functools.partial(whalley_wilmott_half_width, *numbers(0.05, MONTH, 0.2))
    assert np.isnan(at(cost_rate=jnp.array(cost_rate), risk_aversion=jnp.array(risk_aversion)))
    assert float(at(cost_rate=jnp.array(0.0), risk_aversion=jnp.array(50.0))) == 0.0
