"""The exact lookback optimum against the European one, the unhedged law and simulation."""

import tracemalloc
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import optimal
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import hedged_paths
from dhlnn_jax.hedger import rule_policy
from dhlnn_jax.market import MarketPath
from dhlnn_jax.optimal import optimal_policy, solve_european
from dhlnn_jax.optimal_lookback import solve_lookback
from dhlnn_jax.payoff import CLAIMS, european_call
from dhlnn_jax.pnl import Contract
from dhlnn_jax.settings import make_settings
from dhlnn_jax.unhedged import unhedged_law

N_STEPS, DT = 30, 1 / 365


def solve(**numbers):
    usual = dict(strike=1.0, volatility=0.2, n_steps=N_STEPS, dt=DT, cost_rate=5e-3, risk_aversion=50.0)
    return solve_lookback(**{**usual, **numbers})


solved = cache(solve)  # the benchmark setting, solved once for all tests


def law(*, strike=1.0, n_steps):
    return unhedged_law(
        CLAIMS["lookback_call"],
        make_settings(n_steps=n_steps, volatility=0.2, strike=strike),
        n_steps=n_steps,
    )


def test_error_at_the_benchmark_is_small_and_covers_a_finer_solve():
    assert solved().error < 1e-5 and solved().notes == ()
    usual, fine = (solve(n_steps=10, resolution=r) for r in (0.7, 1.2))
    assert 1e-8 < abs(usual.value - fine.value) < usual.error < 5e-5


@pytest.mark.parametrize("liquidate", [False, True])
def test_one_step_from_the_maximum_is_a_european_call(liquidate):
    """max(P_0, P_1) - 0.97 = (P_0 - 0.97) + (P_1 - P_0)^+ at P_0 = 1."""
    numbers = dict(
        volatility=0.2, drift=0.1, n_steps=1, dt=DT, cost_rate=1e-3, risk_aversion=50.0, liquidate=liquidate
    )
    lookback = solve_lookback(strike=0.97, **numbers)
    european = solve_european(partial(european_call, strike=1.0), **numbers)
    assert lookback.value == pytest.approx(0.03 + european.value, abs=1e-8)
    at_the_money = np.argmin(np.abs(european.spot - 1.0))
    for edge in ("band_lower", "band_upper"):
        lookback_edge = getattr(lookback, edge)[0, 0, -1]
        assert lookback_edge == pytest.approx(getattr(european, edge)[0, at_the_money], abs=1e-4)


def test_two_steps_against_the_european_recursion_with_the_maximum_split_by_hand():
    """After one step to p the rest is a call struck at max(p, 1): solved for each p by `solve_european`.

    Without costs, value = min over delta of 1/50 log E exp(50 (m_1 - 1 + call(p_1, m_1) - delta (p_1 - 1))).
    """
    numbers = dict(volatility=0.2, dt=DT, cost_rate=0.0, risk_aversion=50.0)
    deviation = 0.2 * np.sqrt(DT)
    # split at the kink p = 1: 16 Gauss-Legendre nodes on either side
    kink = 0.5 * deviation
    x, w = np.polynomial.legendre.leggauss(16)
    z = np.concatenate([kink - 4.0 * (1 + x), kink + 4.0 * (1 + x)])
    weight = np.tile(4.0 * w, 2) * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    price = np.exp(deviation * z - 0.5 * deviation**2)
    owed = np.maximum(price, 1.0)
    later = [
        solve_european(
            partial(european_call, strike=float(m)), spot0=p, n_steps=1, resolution=0.5, **numbers
        ).value
        for p, m in zip(price, owed, strict=True)
    ]
    deltas = np.linspace(0, 1, 4001)
    exponent = 50 * (owed - 1 + later - deltas[:, None] * (price - 1))
    wanted = np.log(np.exp(exponent) @ weight).min() / 50
    assert solve(n_steps=2, cost_rate=0.0).value == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("strike", [1.0, 1.04])
def test_prohibitive_costs_leave_the_unhedged_risk(strike):
    solution = solve(strike=strike, cost_rate=5.0, n_steps=12, resolution=0.8)
    bare = law(strike=strike, n_steps=12)
    risk = np.log(bare.probability @ np.exp(50 * bare.payoff)) / 50
    assert solution.value == pytest.approx(risk, abs=1e-6)


def test_without_costs_or_risk_aversion_the_value_is_the_expected_payoff():
    solution = solve(cost_rate=0.0, risk_aversion=1e-3, n_steps=12, resolution=0.8)
    bare = law(n_steps=12)
    assert solution.value == pytest.approx(bare.probability @ bare.payoff, abs=1e-6)


def test_what_is_owed_already_is_added():
    """Below spot0 the strike only adds a constant: the maximum is at least spot0."""
    low, at = (solve(strike=strike, n_steps=4, resolution=0.6) for strike in (0.9, 1.0))
    assert low.value - 0.1 == pytest.approx(at.value, abs=1e-12)
    np.testing.assert_allclose(low.band_lower, at.band_lower, atol=1e-9)


def test_money_and_risk_aversion_scale_together():
    one, hundred = (
        solve(spot0=p, strike=1.02 * p, risk_aversion=50.0 / p, n_steps=6, resolution=0.6)
        for p in (1.0, 100.0)
    )
    assert hundred.value == pytest.approx(100 * one.value, rel=1e-8)


def test_lookback_costs_more_than_the_call_and_rises_with_costs():
    values = [solve(cost_rate=c, n_steps=6, resolution=0.6).value for c in (0.0, 2e-3, 5e-3, 2e-2)]
    call = solve_european(
        partial(european_call, strike=1.0),
        volatility=0.2, n_steps=6, dt=DT, cost_rate=0.0, risk_aversion=50.0,
    )  # fmt: skip
    assert np.all(np.diff(values) > 1e-4) and values[0] > call.value + 5e-3


def test_band_looks_like_a_lookback_one():
    solution = solved()
    assert solution.band_lower.shape == (N_STEPS, len(solution.maximum), len(solution.log_drawdown))
    assert solution.log_drawdown[-1] == 0 and np.all(np.diff(solution.log_drawdown) > 0)
    assert np.all(solution.band_lower <= solution.band_upper)
    # at the maximum one holds close to a share, deep below it nothing, with the strike on the spot
    at_maximum, deep = solution.band_lower[0, 0, -1], np.searchsorted(solution.log_drawdown, -0.3)
    assert 0.5 < at_maximum < 1.0
    assert solution.band_lower[0, 0, deep] <= 0 <= solution.band_upper[0, 0, deep]


@cache
def simulated_paths(n_paths=200_000):
    normals = jax.random.normal(jax.random.key(11), (n_paths, N_STEPS))
    log_spot = jnp.cumsum(0.2 * np.sqrt(DT) * normals - 0.5 * 0.2**2 * DT, axis=1)
    return MarketPath(jnp.exp(jnp.pad(log_spot, ((0, 0), (1, 0)))))


def test_simulated_risk_of_the_policy_is_the_value_and_that_of_others_is_not():
    solution = solved()
    policy = optimal_policy(solution)
    no_maximum = rule_policy(  # the same band, as if every spot were the maximum
        lambda path, settings: jnp.clip(jnp.zeros_like(path.spot), *at_the_maximum(solution, path))
    )
    flipped = rule_policy(
        lambda path, settings: (
            -policy.hedge_ratio(None, MarketPath(jnp.append(path.spot, path.spot[-1])), settings)
        )
    )
    settings = make_settings(n_steps=N_STEPS, cost_rate=5e-3, strike=1.0, risk_aversion=50.0)
    for rule in (policy, no_maximum, flipped):
        money = hedged_paths(rule, None, simulated_paths(), Contract(CLAIMS["lookback_call"]), settings)
        weight = np.exp(-50 * np.asarray(money.pnl, float))
        stderr = weight.std() / weight.mean() / np.sqrt(len(weight)) / 50
        excess = np.log(weight.mean()) / 50 - solution.value
        if rule is policy:
            assert stderr < 2e-4 and abs(excess) < 3 * stderr
        else:
            assert excess > 3 * stderr


def at_the_maximum(solution, path):
    edges = (
        jnp.asarray(edge[:, 0, -1], path.spot.dtype) for edge in (solution.band_lower, solution.band_upper)
    )
    return tuple(edges)


def test_policy_reads_the_band_at_the_drawdown_and_clamps_beyond():
    solution, settings = solved(), make_settings(n_steps=N_STEPS)
    j, k = 5, len(solution.log_drawdown) - 40
    top = solution.maximum[j]
    path = MarketPath(jnp.asarray(np.r_[top, np.full(N_STEPS - 1, top * np.exp(solution.log_drawdown[k]))]))
    below = MarketPath(jnp.full(N_STEPS, 0.9))  # under the strike, which counts as the maximum
    drawdown = np.interp(np.log(0.9), solution.log_drawdown, np.arange(len(solution.log_drawdown)))
    floor, share = int(drawdown), drawdown % 1
    far = MarketPath(jnp.full(N_STEPS, 1e3))
    for index, name in enumerate(("band_lower", "band_upper")):
        edge = getattr(solution, name)
        np.testing.assert_allclose(solution.band(path, settings)[index][1:], edge[1:, j, k], atol=2e-4)
        between = (1 - share) * edge[:, 0, floor] + share * edge[:, 0, floor + 1]
        np.testing.assert_allclose(solution.band(below, settings)[index], between, atol=2e-4)
        np.testing.assert_allclose(solution.band(far, settings)[index], edge[:, -1, -1], atol=1e-6)
    with pytest.raises(ValueError, match="solved for 30 steps"):
        solution.band(MarketPath(jnp.ones(7)), settings)


def test_policy_is_the_same_under_jit_vmap_and_one_by_one():
    policy, spot = optimal_policy(solved()), simulated_paths().spot[:4]
    settings = make_settings(n_steps=N_STEPS)
    together = jax.jit(jax.vmap(lambda s: policy.hedge_ratio(None, MarketPath(s), settings)))(spot)
    for path, wanted in zip(spot, together, strict=True):
        np.testing.assert_allclose(policy.hedge_ratio(None, MarketPath(path), settings), wanted, atol=1e-5)


def test_float64_inside_whatever_the_caller_chose():
    narrow = optimal.solve_lookback(
        strike=1.0, volatility=0.2, n_steps=4, dt=DT, cost_rate=5e-3, risk_aversion=50.0
    )
    with jax.enable_x64(True):
        assert solve(n_steps=4).value == narrow.value
    assert narrow.band_lower.dtype == np.float64


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"strike": 0.0}, "strike must be positive"),
        ({"n_steps": 0}, "n_steps must be positive"),
        ({"cost_rate": -1.0}, "cost_rate must be 0 or more"),
        ({"n_steps": 500_000}, "would take .* GiB"),
    ],
)
def test_bad_input_is_refused_in_one_line(changed, message):
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=message) as error:
            solve(**changed)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value)


def test_no_plateau_is_noted_and_memory_taken_is_within_what_is_announced():
    numbers = dict(risk_aversion=300.0, n_steps=5, resolution=0.5)
    tracemalloc.start()
    try:
        assert "depends on where normals are cut" in solve(**numbers).notes[0]
        taken = tracemalloc.get_traced_memory()[1] / 2**30
    finally:
        tracemalloc.stop()
    with pytest.raises(UsageError):
        solve(**numbers, memory_limit_gib=taken)
