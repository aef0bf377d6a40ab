"""The exact optimum against hand-solved lattices, closed forms, an independent law and simulation."""

import tracemalloc
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from dhlnn_jax import bellman, optimal
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import hedged_paths
from dhlnn_jax.hedger import rule_policy
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.optimal import optimal_policy, solve_european
from dhlnn_jax.payoff import CLAIMS, european_call, european_put, lookback_call
from dhlnn_jax.pnl import Contract
from dhlnn_jax.settings import make_settings
from dhlnn_jax.unhedged import unhedged_law

N_STEPS, DT = 30, 1 / 365
T = N_STEPS * DT
CALL = partial(european_call, strike=1.0)
PUT = partial(european_put, strike=1.0)
UP, DOWN = 1.1, 1 / 1.1
EVEN = ([np.log(DOWN), np.log(UP)], [0.5, 0.5])
FAIR_UP = (1 - DOWN) / (UP - DOWN)  # the probability that makes the price a martingale


def holds_a_call(spot):
    return -european_call(spot, strike=1.0)


def solve(payoff=CALL, **numbers):
    usual = dict(volatility=0.2, n_steps=N_STEPS, dt=DT, cost_rate=5e-3, risk_aversion=50.0)
    return solve_european(payoff, **{**usual, **numbers})


solved = cache(solve)  # the benchmark setting and its neighbours, solved once for all tests


def on_lattice(payoff=CALL, *, n_steps, cost_rate, risk_aversion=50.0, increments=EVEN, **options):
    return solve(
        payoff,
        n_steps=n_steps,
        cost_rate=cost_rate,
        risk_aversion=risk_aversion,
        increments=increments,
        **options,
    )


def black_scholes(volatility=0.2):
    d1 = 0.5 * volatility * np.sqrt(T)  # at the money
    return norm.cdf(d1) - norm.cdf(-d1)


def unhedged_risk(claim="european_call", *, sign=1, **numbers):
    law = unhedged_law(CLAIMS[claim], make_settings(n_steps=N_STEPS, **numbers), n_steps=N_STEPS)
    scale = numbers["risk_aversion"]
    return np.log(law.probability @ np.exp(sign * scale * law.payoff)) / scale


# Known numbers.


@pytest.mark.parametrize("cost_rate, value, digits", [(2e-3, 0.025862, 5e-7), (5e-3, 0.0287196, 5e-8)])
def test_value_at_the_benchmark_is_the_printed_one(cost_rate, value, digits):
    solution = solved(cost_rate=cost_rate)
    assert solution.value == pytest.approx(value, abs=digits)
    assert solution.error < 1e-6 and solution.notes == ()


@pytest.mark.parametrize("cost_rate", [2e-3, 8e-3])
def test_in_the_papers_setting_the_optimum_never_trades(cost_rate):
    numbers = dict(volatility=0.1, risk_aversion=1.0, cost_rate=cost_rate)
    solution = solve(**numbers)
    assert solution.value == pytest.approx(0.0115832, abs=5e-8)
    assert solution.value == pytest.approx(unhedged_risk(**numbers), rel=1e-6)  # settings are float32
    within = np.abs(np.log(solution.spot)) < 6 * 0.1 * np.sqrt(T)
    assert np.all(solution.band_lower[:, within] <= 0) and np.all(solution.band_upper[:, within] >= 0)


@pytest.mark.parametrize("claim, sign", [("european_call", 1), ("european_put", 1), ("european_call", -1)])
def test_prohibitive_costs_leave_the_unhedged_risk(claim, sign):
    payoff = {("european_call", 1): CALL, ("european_put", 1): PUT}.get((claim, sign), holds_a_call)
    solution = solve(payoff, cost_rate=5.0)
    assert solution.value == pytest.approx(
        unhedged_risk(claim, sign=sign, volatility=0.2, risk_aversion=50.0), abs=2e-7
    )


def test_without_costs_or_risk_aversion_the_value_is_the_black_scholes_price():
    solution = solve(cost_rate=0.0, risk_aversion=1e-3)
    assert solution.value == pytest.approx(black_scholes(), abs=1e-7)
    # n steps leave a variance of pi/4 (vega sigma)^2 / n (Kamal and Derman), that is lambda/2 of it in risk
    hedged_daily = solve(cost_rate=0.0, risk_aversion=2.0, resolution=0.5)
    variance = np.pi / 4 * (norm.pdf(0.5 * 0.2 * np.sqrt(T)) * 0.2 * np.sqrt(T)) ** 2 / N_STEPS
    assert hedged_daily.value - black_scholes() == pytest.approx(0.5 * 2.0 * variance, rel=0.1)


def test_put_and_call_are_the_same_without_costs_and_drift():
    # the put is the call, less a share sold for good at no cost
    call, put = (solve(payoff, cost_rate=0.0, resolution=0.5) for payoff in (CALL, PUT))
    assert put.value == pytest.approx(call.value, abs=1e-7)
    near = np.abs(np.log(call.spot)) < 0.15
    np.testing.assert_allclose(put.band_lower[:, near], call.band_lower[:, near] - 1.0, atol=1e-3)


def test_money_and_risk_aversion_scale_together():
    one, hundred = (
        solve(partial(european_call, strike=p), spot0=p, risk_aversion=50.0 / p, n_steps=8, resolution=0.5)
        for p in (1.0, 100.0)
    )
    assert hundred.value == pytest.approx(100 * one.value, rel=1e-8)


# Shape.


def test_value_rises_with_costs_and_stays_below_the_unhedged_risk():
    values = [solve(cost_rate=c, n_steps=12, resolution=0.5).value for c in (0.0, 1e-3, 2e-3, 5e-3, 1.0)]
    assert np.all(np.diff(values) > 1e-4)
    assert solve(cost_rate=9.0, n_steps=12, resolution=0.5).value == pytest.approx(values[-1], abs=1e-9)


def test_value_rises_with_risk_aversion():
    values = [solve(risk_aversion=a, n_steps=12, resolution=0.5).value for a in (1.0, 10.0, 20.0, 50.0)]
    assert np.all(np.diff(values) > 1e-5)


def test_selling_what_is_left_costs_at_most_one_share():
    bare, sold = solved().value, solve(liquidate=True).value
    assert bare + 1e-4 < sold < bare + 5e-3


def test_a_claim_held_is_worth_less_than_what_the_seller_needs():
    """Bid below price below ask: minus the holder's risk is what the claim is worth to the holder."""
    assert -solve(holds_a_call, resolution=0.5).value < black_scholes() < solved().value


def test_drift_pays_whoever_may_trade():
    nothing_owed = solve(lambda spot: 0.0 * spot[-1], drift=0.3, cost_rate=0.0)
    # one step: the best exponential utility of a normal return; lognormal here, to first order in dt
    merton = 0.5 * (0.3 / 0.2) ** 2 * T / 50.0
    assert -nothing_owed.value == pytest.approx(merton, rel=0.02)
    idle = solve(lambda spot: 0.0 * spot[-1], n_steps=5, resolution=0.5)
    assert idle.value == pytest.approx(0.0, abs=1e-12)
    rising, level = (solve(drift=drift, n_steps=12, resolution=0.5) for drift in (0.3, 0.0))
    assert rising.value < level.value - 1e-5  # who hedges holds the share anyway


@pytest.mark.parametrize(
    "payoff, numbers",
    [
        (CALL, {}),
        (CALL, {"cost_rate": 2e-3}),
        (CALL, {"cost_rate": 1e-4}),
        (CALL, {"liquidate": True}),
        (CALL, {"risk_aversion": 100.0}),
        (CALL, {"drift": 0.3}),
        (PUT, {}),
        (lambda spot: 0.05 * (spot[-1] > 1.0), {}),
    ],
)
def test_error_covers_the_distance_to_a_finer_solve(payoff, numbers):
    usual, fine = (solve(payoff, **numbers, n_steps=10, resolution=r) for r in (1.0, 1.5))
    assert abs(usual.value - fine.value) < usual.error
    if payoff in (CALL, PUT):
        assert usual.error < 1e-6


def test_a_jump_is_found_to_rounding():
    """One step, too dear to hedge: log(1 + P(S > K) (e^lambda - 1)) / lambda."""
    solution = solve(lambda spot: 1.0 * (spot[-1] > 1.003), n_steps=1, cost_rate=9.0, risk_aversion=2.0)
    deviation = 0.2 * np.sqrt(DT)
    exercised = norm.sf((np.log(1.003) + 0.5 * deviation**2) / deviation)
    assert solution.value == pytest.approx(np.log1p(exercised * np.expm1(2.0)) / 2.0, abs=1e-9)


def test_band_contains_the_hedge_ratio_of_zero_cost_and_narrows_to_it():
    free, cheap, dear = (solve(cost_rate=c, risk_aversion=10.0) for c in (0.0, 1e-6, 2e-3))
    within = np.abs(np.log(free.spot)) < 3 * 0.2 * np.sqrt(T)
    np.testing.assert_allclose(free.band_lower, free.band_upper, atol=1e-6)
    centre = free.band_lower[:, within]
    for solution in (cheap, dear):
        assert np.all(solution.band_lower[:, within] < centre)
        assert np.all(solution.band_upper[:, within] > centre)
    # next to no costs: one step ahead all is free, and risk curves by lambda^2 Var(P') in the hedge ratio
    at_the_money = np.argmin(np.abs(np.log(free.spot)))
    half_width = 0.5 * (cheap.band_upper - cheap.band_lower)[0, at_the_money]
    assert half_width == pytest.approx(1e-6 / (10 * 0.2**2 * DT), rel=0.03)
    # which is centred on the delta, to the order of one step
    d1 = 0.5 * 0.2 * np.sqrt(T)
    assert free.band_lower[0, at_the_money] == pytest.approx(norm.cdf(d1), abs=2e-3)


# Lattices solved by hand.


@pytest.mark.parametrize("risk_aversion", [0.5, 50.0])
def test_one_step_up_or_down_is_replicated_without_costs(risk_aversion):
    """Two outcomes: delta = (0.1 - 0) / (1.1 - 1/1.1), price = delta (1 - 1/1.1), and no risk is left."""
    fair = ([np.log(DOWN), np.log(UP)], [1 - FAIR_UP, FAIR_UP])
    solution = on_lattice(n_steps=1, cost_rate=0.0, risk_aversion=risk_aversion, increments=fair)
    delta = 0.1 / (UP - DOWN)
    assert solution.value == pytest.approx(delta * (1 - DOWN), abs=1e-10)
    assert solution.spot == pytest.approx([1.0])
    np.testing.assert_allclose([solution.band_lower, solution.band_upper], delta, atol=1e-5)


@pytest.mark.parametrize("cost_rate", [1e-3, 1e-2, 2e-2])
@pytest.mark.parametrize("liquidate", [False, True])
def test_one_step_with_costs_against_a_minimisation(cost_rate, liquidate):
    """min over delta of c |delta| + 1/50 log(1/2 e^{50 (0.1 - 0.1 delta)} + 1/2 e^{50 delta (1 - 1/1.1)})."""

    def risk(delta):
        sale_up, sale_down = (liquidate * cost_rate * price * abs(delta) for price in (UP, DOWN))
        up, down = 0.1 - (UP - 1) * delta + sale_up, -(DOWN - 1) * delta + sale_down
        return cost_rate * abs(delta) + np.log(0.5 * np.exp(50 * up) + 0.5 * np.exp(50 * down)) / 50

    best = minimize_scalar(risk, bounds=(0, 1), method="bounded", options={"xatol": 1e-12})
    solution = on_lattice(n_steps=1, cost_rate=cost_rate, liquidate=liquidate)
    assert solution.value == pytest.approx(best.fun, abs=1e-9)
    assert solution.band_lower[0, 0] == pytest.approx(best.x, abs=1e-5)  # one buys up to the lower edge


def nested_risk(n_steps, cost_rate, liquidate, owed, moves):
    """The same problem by brute force: a minimisation inside the expectation inside a minimisation.

    With d = the position held before, at p, i steps done (lambda = 50):
      risk_i(p, d) = min_delta c p |delta - d| + 1/50 log E exp(50 (risk_{i+1}(P', delta) - delta (P' - p))).
    """

    def risk(i, price, held):
        if i == n_steps:
            return owed(price) + liquidate * cost_rate * price * abs(held)

        def after(delta):
            tail = [
                chance * np.exp(50 * (risk(i + 1, price * move, delta) - delta * price * (move - 1)))
                for move, chance in moves
            ]
            return cost_rate * price * abs(delta - held) + np.log(sum(tail)) / 50

        # the kinks, and the smooth pieces between them
        corners = sorted({-1.5, 0.0, held, 1.5})
        found = [after(x) for x in (0.0, held)]
        for low, high in zip(corners[:-1], corners[1:], strict=True):
            found.append(
                minimize_scalar(after, bounds=(low, high), method="bounded", options={"xatol": 1e-7}).fun
            )
        return min(found)

    return risk(0, 1.0, 0.0)


@pytest.mark.parametrize("cost_rate", [1e-3, 1e-2])
@pytest.mark.parametrize("liquidate", [False, True])
def test_two_steps_up_or_down_against_nested_minimisation(cost_rate, liquidate):
    wanted = nested_risk(2, cost_rate, liquidate, lambda p: max(p - 1, 0), [(UP, 0.5), (DOWN, 0.5)])
    solution = on_lattice(n_steps=2, cost_rate=cost_rate, liquidate=liquidate)
    assert solution.value == pytest.approx(wanted, abs=2e-9)
    np.testing.assert_allclose(solution.spot, [DOWN, 1.0, UP])


def test_two_steps_of_three_uneven_moves_against_nested_minimisation():
    moves = [(0.93, 0.2), (1.02, 0.5), (1.04, 0.3)]
    increments = (np.log([move for move, _ in moves]), [chance for _, chance in moves])
    wanted = nested_risk(2, 4e-3, False, lambda p: max(0.99 - p, 0), moves)
    solution = on_lattice(
        partial(european_put, strike=0.99), n_steps=2, cost_rate=4e-3, increments=increments
    )
    assert solution.value == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("liquidate", [False, True])
def test_policy_attains_the_value_over_every_path_of_a_lattice(x64, liquidate):
    """E exp(-lambda PnL) summed over all 2^7 paths, without any sampling."""
    n, cost_rate = 7, 4e-3
    up, down = 1.02, 1 / 1.02
    solution = on_lattice(
        n_steps=n, cost_rate=cost_rate, increments=(np.log([down, up]), [0.45, 0.55]), liquidate=liquidate
    )
    ups = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
    spot = np.cumprod(np.c_[np.ones(2**n), np.where(ups, up, down)], axis=1)
    chance = 0.55 ** ups.sum(axis=1) * 0.45 ** (n - ups.sum(axis=1))
    settings = make_settings(n_steps=n, cost_rate=cost_rate, strike=1.0)
    contract = Contract(CLAIMS["european_call"], liquidate=liquidate)
    money = hedged_paths(optimal_policy(solution), None, MarketPath(jnp.asarray(spot)), contract, settings)
    risk = np.log(chance @ np.exp(-50 * np.asarray(money.pnl))) / 50
    assert risk == pytest.approx(solution.value, abs=1e-8)
    assert float(money.turnover.mean()) > 0.3  # it does hedge


# The policy on paths.


@cache
def simulated_paths(n_paths=200_000, n_steps=N_STEPS):
    normals = jax.random.normal(jax.random.key(7), (n_paths, n_steps))
    log_spot = jnp.cumsum(0.2 * np.sqrt(DT) * normals - 0.5 * 0.2**2 * DT, axis=1)
    return MarketPath(jnp.exp(jnp.pad(log_spot, ((0, 0), (1, 0)))))


def simulated_risk(policy, cost_rate):
    """Entropic risk at lambda 50 and its standard error."""
    settings = make_settings(n_steps=N_STEPS, cost_rate=cost_rate, strike=1.0, risk_aversion=50.0)
    money = hedged_paths(policy, None, simulated_paths(), Contract(CLAIMS["european_call"]), settings)
    weight = np.exp(-50 * np.asarray(money.pnl, float))
    return np.log(weight.mean()) / 50, weight.std() / weight.mean() / np.sqrt(len(weight)) / 50


def test_simulated_risk_of_the_policy_is_the_value_and_that_of_others_is_not():
    solution = solved()
    policy = optimal_policy(solution)
    risk, stderr = simulated_risk(policy, 5e-3)
    assert stderr < 2e-4 and abs(risk - solution.value) < 3 * stderr
    flipped = rule_policy(lambda path, settings: -policy.hedge_ratio(None, extended(path), settings))
    nothing = rule_policy(lambda path, settings: jnp.zeros_like(path.spot))
    for other in (flipped, nothing):
        risk, stderr = simulated_risk(other, 5e-3)
        assert risk - solution.value > 3 * stderr


def extended(path):
    """An observed path as a whole one: its last point, which no policy sees, repeated."""
    return MarketPath(jnp.append(path.spot, path.spot[-1]))


def test_policy_reads_the_band_between_the_spots_and_clamps_beyond():
    solution = solved()
    at = np.array([400, 441, 480])
    between = np.sqrt(solution.spot[at] * solution.spot[at + 1])
    for spots, wanted in (
        (solution.spot[at], lambda edge: edge[:, at]),
        (between, lambda edge: 0.5 * (edge[:, at] + edge[:, at + 1])),
        (np.array([1e-3, 1e3]), lambda edge: edge[:, [0, -1]]),
    ):
        for column, spot in enumerate(spots):
            path = MarketPath(jnp.full(N_STEPS, spot))
            for edge, solved_edge in zip(
                solution.band(path, make_settings(n_steps=N_STEPS)),
                (solution.band_lower, solution.band_upper),
                strict=True,
            ):
                np.testing.assert_allclose(edge, wanted(solved_edge)[:, column], atol=2e-4)  # float32 spots


def test_policy_is_the_same_under_jit_vmap_and_one_by_one_and_does_not_look_ahead():
    policy, paths = optimal_policy(solved()), MarketPath(simulated_paths().spot[:5])
    settings = make_settings(n_steps=N_STEPS)
    together = jax.jit(jax.vmap(lambda path: policy.hedge_ratio(None, path, settings)))(paths)
    assert together.shape == (5, N_STEPS)
    for i in range(5):
        path = MarketPath(paths.spot[i])
        np.testing.assert_allclose(policy.hedge_ratio(None, path, settings), together[i], atol=1e-6)
        lower, upper = policy.band(None, path, settings)
        assert np.all((lower - 1e-6 <= together[i]) & (together[i] <= upper + 1e-6))
        late = MarketPath(path.spot.at[10:].multiply(1.1))
        np.testing.assert_array_equal(
            policy.hedge_ratio(None, late, settings)[:10], policy.hedge_ratio(None, path, settings)[:10]
        )


def test_policy_of_another_number_of_steps_is_refused():
    path = MarketPath(jnp.ones(8))
    with pytest.raises(ValueError, match="solved for 30 steps, the path has 7"):
        optimal_policy(solved()).hedge_ratio(None, path, make_settings(n_steps=7))
    assert observed_path(path).spot.shape == (7,)


# Precision, limits, bad input.


def test_float64_inside_whatever_the_caller_chose():
    narrow = solve(n_steps=5)
    with jax.enable_x64(True):
        wide = solve(n_steps=5)
    assert narrow.value == wide.value and narrow.band_lower.dtype == np.float64
    np.testing.assert_array_equal(narrow.band_lower, wide.band_lower)


def test_no_plateau_is_noted():
    assert "depends on where normals are cut" in solve(risk_aversion=100.0, resolution=0.3).notes[0]
    assert solve(risk_aversion=80.0, resolution=0.3).notes == ()


def test_extreme_risk_aversion_stays_finite():
    solution = solve(risk_aversion=3000.0, n_steps=3, resolution=0.5)
    assert black_scholes() * 0.2 < solution.value < 0.1 and np.all(np.isfinite(solution.band_lower))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"n_steps": 0}, "n_steps must be positive"),
        ({"dt": 0.0}, "dt must be positive"),
        ({"volatility": -0.2}, "volatility must be positive"),
        ({"volatility": float("nan")}, "volatility must be positive and finite"),
        ({"risk_aversion": 0.0}, "risk_aversion must be positive"),
        ({"spot0": 0.0}, "spot0 must be positive"),
        ({"cost_rate": -1e-3}, "cost_rate must be 0 or more"),
        ({"increments": ([-0.1, 0.1], [0.5, 0.4])}, "sum to 1"),
        ({"increments": ([-0.1, 0.1], [1.5, -0.5])}, "must be positive"),
        ({"increments": ([-0.1, 0.1], [1.0])}, "as many probabilities"),
        ({"increments": ([0.1, 0.2], [0.5, 0.5])}, "arbitrage"),
        ({"increments": EVEN, "drift": 0.1}, "drift belongs to the normal law"),
        ({"payoff": partial(partial(lookback_call), strike=1.0)}, "lookback_call depends on the maximum"),
        ({"payoff": lambda spot: jnp.max(spot)}, "differs on paths of the same end"),
        ({"payoff": lambda spot: jnp.maximum(jnp.mean(spot) - 1.0, 0.0)}, "differs on paths of the same end"),
        ({"payoff": lambda spot: 1.0 / (spot[-1] - spot[-1])}, "payoff must be finite"),
    ],
)
def test_bad_input_is_refused_in_one_line(changed, message):
    with pytest.raises(UsageError, match=message) as error:
        solve(**changed)
    assert "\n" not in str(error.value)


def test_too_much_memory_is_refused_before_it_is_taken():
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=r"would take [0-9.e+]+ GiB .* memory_limit_gib = 4"):
            solve(n_steps=1_000_000)
        with pytest.raises(UsageError, match="GiB"):  # moves that seldom meet again
            on_lattice(
                n_steps=40,
                cost_rate=0.0,
                increments=(np.sqrt([2, 3, 5, 7, 11, 13, 17, 19]) - 3, np.full(8, 0.125)),
            )
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()


def test_memory_taken_is_within_what_is_announced():
    tracemalloc.start()
    try:
        solve(resolution=2.0, n_steps=5)
        taken = tracemalloc.get_traced_memory()[1] / 2**30
    finally:
        tracemalloc.stop()
    with pytest.raises(UsageError):
        solve(resolution=2.0, n_steps=5, memory_limit_gib=taken)
    assert optimal.solve_european is solve_european


def test_the_error_is_the_larger_distance_to_two_coarser_solves():
    values = {12: 5.0, 6: 5.5, 4: 3.0}  # by ten times the resolution

    def solve_at(resolution, ratios):
        return bellman.Solved(values.pop(round(10 * resolution)), None, np.array([0.1]), np.array([0.9]))

    solved, error, limits = bellman.refined(solve_at, (0.0, 1.0), 1.2)
    assert (solved.value, error) == (5.0, 2.0) and not values
    assert limits[0] < 0 < 1 < limits[1]


@dataclass
class Digital:
    """A payoff that cannot be hashed."""

    strike: float

    def __call__(self, spot):
        return 0.05 * (spot[-1] > self.strike)


def test_a_payoff_may_be_an_object_of_the_users():
    owed = solve(Digital(1.0), n_steps=3, resolution=0.4).value
    assert owed == solve(lambda spot: 0.05 * (spot[-1] > 1.0), n_steps=3, resolution=0.4).value


def test_values_go_on_in_a_straight_line_beyond_the_grid():
    spot, values = np.array([1.0, 2.0, 4.0]), np.array([[3.0, 1.0], [5.0, 1.5], [6.0, 9.5]])
    below = bellman.linear_tail(values, spot, np.array([0.5, 1.0]), end=0)
    np.testing.assert_allclose(below, [[2.0, 0.75], [3.0, 1.0]])
    above = bellman.linear_tail(values, spot, np.array([4.0, 6.0]), end=-1)
    np.testing.assert_allclose(above, [[6.0, 9.5], [7.0, 17.5]])
