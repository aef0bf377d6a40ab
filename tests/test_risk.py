import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from dhlnn_jax import risk

entropic = partial(risk.entropic_risk_measure, risk_aversion=5.0)
shortfall = partial(risk.expected_shortfall, tail_prob=0.13)
threshold = partial(risk.value_at_risk, tail_prob=0.13)
quadratic = partial(risk.quadratic_risk, risk_aversion=5.0)


def exponential_oce(pnl, *, weights=None):
    loss = risk.exponential_loss(5.0)
    return risk.optimized_certainty_equivalent(pnl, loss=loss, weights=weights)[0]


MEASURES = {
    "entropic": entropic,
    "shortfall": shortfall,
    "threshold": threshold,
    "quadratic": quadratic,
    "exponential_oce": exponential_oce,
}
CONVEX = ("entropic", "shortfall", "exponential_oce")
every = lambda pnl, **weights: {name: measure(pnl, **weights) for name, measure in MEASURES.items()}  # noqa: E731
EVERY = jax.jit(every)  # one compilation for all of them; the tests share its shapes
EVERY_BATCHED = jax.jit(jax.vmap(every))
SHORTFALL, THRESHOLD = jax.jit(risk.expected_shortfall), jax.jit(risk.value_at_risk)
Z_TENTH, DENSITY_TENTH = 1.2815515655446004, 0.17549833193248685  # of a standard normal: quantile, density


def normals(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


# --- axioms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURES)
def test_risk_is_cash_invariant(strict_x64, name):
    pnl = normals(50)
    np.testing.assert_allclose(EVERY(pnl + 3.25)[name], EVERY(pnl)[name] - 3.25, atol=1e-12)
    np.testing.assert_allclose(
        EVERY(jnp.full(50, -2.0))[name], 2.0, atol=1e-12
    )  # a sure loss is worth itself


@pytest.mark.parametrize("name", CONVEX)
def test_risk_is_monotone(strict_x64, name):
    pnl, measure = normals(50), lambda x: EVERY(x)[name]
    worst = int(np.argmin(pnl))
    assert measure(pnl.at[worst].add(0.3)) < measure(pnl)
    assert measure(pnl + jnp.abs(normals(50, seed=1))) < measure(pnl)
    for i in range(0, 50, 10):  # nobody is better off by losing
        assert measure(pnl.at[i].add(-0.3)) >= measure(pnl) - 1e-12


@pytest.mark.parametrize("name", CONVEX)
def test_risk_is_convex(strict_x64, name):
    one, other = normals(2, 20, 50)
    of_one, of_other, of_mixed = (EVERY_BATCHED(x)[name] for x in (one, other, 0.3 * one + 0.7 * other))
    assert np.all(of_mixed < 0.3 * of_one + 0.7 * of_other - 1e-3)  # strictly: they do not move together


def test_expected_shortfall_is_positively_homogeneous(strict_x64):
    pnl = normals(50)
    of = lambda x: SHORTFALL(x, tail_prob=0.13)  # noqa: E731
    np.testing.assert_allclose(of(3.0 * pnl), 3.0 * of(pnl), rtol=1e-13)


# --- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail_prob", "shortfall_by_hand", "threshold_by_hand"),
    [(0.2, 3.0, 3.0), (0.3, 3.5 / 1.5, 1.0), (0.4, 2.0, 1.0), (0.5, 4.0 / 2.5, 0.0), (0.1, 3.0, 3.0)],
)
def test_tail_by_hand(strict_x64, tail_prob, shortfall_by_hand, threshold_by_hand):
    pnl = jnp.array([2.0, -1.0, 0.0, -3.0, 5.0])  # losses from the worst: 3, 1, 0, -2, -5
    assert float(SHORTFALL(pnl, tail_prob=tail_prob)) == pytest.approx(shortfall_by_hand, abs=1e-14)
    assert float(THRESHOLD(pnl, tail_prob=tail_prob)) == threshold_by_hand


def test_expected_shortfall_of_everything_is_minus_the_mean(strict_x64):
    pnl = normals(37)
    np.testing.assert_allclose(SHORTFALL(pnl, tail_prob=1.0), -np.mean(pnl), rtol=1e-12)


def test_mean_deviation_and_quadratic_by_hand(strict_x64):
    pnl = jnp.array([1.0, 2.0, 4.0])  # mean 7/3, variance 7 - 49/9 = 14/9
    assert float(risk.mean(pnl)) == pytest.approx(7 / 3)
    assert float(risk.standard_deviation(pnl)) == pytest.approx(math.sqrt(14) / 3)
    assert float(risk.quadratic_risk(pnl, risk_aversion=6.0)) == pytest.approx(-7 / 3 + 14 / 3)
    value, slope = jax.value_and_grad(risk.standard_deviation)(jnp.full(3, 0.5))
    assert float(value) == 0.0 and slope.tolist() == [0.0, 0.0, 0.0]


def test_entropic_risk_by_hand(strict_x64):
    pnl = jnp.array([0.0, -math.log(3.0) / 2.0])  # e^(-2 pnl) = 1, 3
    assert float(risk.entropic_risk_measure(pnl, risk_aversion=2.0)) == pytest.approx(math.log(2.0) / 2.0)


GAUSSIAN = {  # of a normal with mean 0.2 and deviation 0.5
    "entropic": (partial(risk.entropic_risk_measure, risk_aversion=2.0), -0.2 + 2.0 * 0.25 / 2),
    "quadratic": (partial(risk.quadratic_risk, risk_aversion=2.0), -0.2 + 2.0 * 0.25 / 2),
    "shortfall": (partial(risk.expected_shortfall, tail_prob=0.1), -0.2 + 0.5 * DENSITY_TENTH / 0.1),
    "threshold": (partial(risk.value_at_risk, tail_prob=0.1), -0.2 + 0.5 * Z_TENTH),
}


@cache
def gaussian_estimates():
    both = lambda x: {name: (f(x), risk.stderr(f, x)) for name, (f, _) in GAUSSIAN.items()}  # noqa: E731
    return jax.jit(both)(0.2 + 0.5 * normals(20_000))


@pytest.mark.parametrize("name", GAUSSIAN)
def test_risk_of_a_gaussian_within_4_stderr(x64, name):
    exact = GAUSSIAN[name][1]
    value, stderr = gaussian_estimates()[name]
    assert 0 < float(stderr) < 0.012
    assert abs(float(value) - exact) < 4 * float(stderr)


@pytest.mark.parametrize("name", MEASURES)
def test_weights_count_as_repetition(strict_x64, name):
    pnl, times = normals(12), np.array([2, 1, 3, 1, 2, 4] * 2)
    weighted = EVERY(pnl, weights=jnp.asarray(times, float))[name]
    np.testing.assert_allclose(weighted, EVERY(jnp.asarray(np.repeat(pnl, times)))[name], rtol=1e-12)
    scaled = EVERY(pnl, weights=jnp.asarray(times / 7.0))[name]  # they need not sum to anything
    np.testing.assert_allclose(scaled, weighted, rtol=1e-12)
    assert abs(float(weighted - EVERY(pnl)[name])) > 1e-3 or name == "threshold"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_pnl_finite_value_and_slope(dtype):
    with jax.enable_x64(dtype == "float64"):
        pnl = jnp.array([-1000.0, 0.0, 1000.0], dtype)
        measures = {
            "entropic": (partial(risk.entropic_risk_measure, risk_aversion=50.0), 1000 - math.log(3) / 50),
            "shortfall": (partial(risk.expected_shortfall, tail_prob=1 / 6), 1000.0),
            "threshold": (partial(risk.value_at_risk, tail_prob=1 / 6), 1000.0),
        }
        all_slopes = jax.jit(lambda x: [jax.value_and_grad(measure)(x) for measure, _ in measures.values()])
        for (_, expected), (value, slope) in zip(measures.values(), all_slopes(pnl), strict=True):
            assert float(value) == pytest.approx(expected, rel=1e-6)
            np.testing.assert_allclose(slope, [-1.0, 0.0, 0.0], atol=1e-6)


def test_entropic_risk_becomes_quadratic_for_small_risk_aversion(strict_x64):
    pnl = jnp.exp(normals(200))  # skewed, so that the next term, -lambda^2 kappa_3 / 6, is there to be seen
    difference = lambda a: float(  # noqa: E731
        risk.entropic_risk_measure(pnl, risk_aversion=a) - risk.quadratic_risk(pnl, risk_aversion=a)
    )
    third_cumulant = float(np.mean((pnl - np.mean(pnl)) ** 3))
    for risk_aversion in (1e-3, 2e-3):
        assert difference(risk_aversion) == pytest.approx(-(risk_aversion**2) * third_cumulant / 6, rel=0.05)


def test_slopes_are_minus_the_path_weights(strict_x64):
    pnl = np.asarray(normals(10))
    share = np.exp(-5.0 * pnl) / np.exp(-5.0 * pnl).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(entropic))(jnp.asarray(pnl)), -share, rtol=1e-12)
    # shortfall at p = 0.13 of 10: the worst whole, three tenths of the next
    worst = np.argsort(pnl)
    expected = np.zeros(10)
    expected[worst[:2]] = [-1 / 1.3, -0.3 / 1.3]
    np.testing.assert_allclose(jax.jit(jax.grad(shortfall))(jnp.asarray(pnl)), expected, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_risk_compiled_and_batched_equals_one_by_one(strict_x64, name):
    pnl = normals(20, 50)
    batched = EVERY_BATCHED(pnl)[name]
    np.testing.assert_allclose(batched, [EVERY(x)[name] for x in pnl], rtol=1e-12)
    if name != "exponential_oce":  # and neither of them as it is without compilation
        np.testing.assert_allclose(batched[0], MEASURES[name](pnl[0]), rtol=1e-12)


# --- optimized certainty equivalent -------------------------------------------------------------------


@pytest.mark.parametrize("risk_aversion", [0.5, 1.0, 20.0])
def test_oce_of_the_exponential_loss_is_entropic(strict_x64, risk_aversion):
    pnl = 0.3 * np.asarray(normals(40))
    entropic = math.log(np.mean(np.exp(-risk_aversion * pnl))) / risk_aversion
    value, theta = jax.jit(
        lambda x, a: risk.optimized_certainty_equivalent(x, loss=risk.exponential_loss(a))
    )(jnp.asarray(pnl), jnp.asarray(risk_aversion))
    stray = math.log(risk_aversion) / risk_aversion
    np.testing.assert_allclose(value, entropic, atol=1e-10)
    np.testing.assert_allclose(theta, entropic + stray, atol=1e-10)
    # Eq. (45) as printed is (1/lambda) log(lambda E e^(-lambda pnl)): too large by (log lambda) / lambda
    as_printed = math.log(risk_aversion * np.mean(np.exp(-risk_aversion * pnl))) / risk_aversion
    np.testing.assert_allclose(as_printed - value, stray, atol=1e-10)
    # and the minimum itself, on a grid of theta with Eq. (36) written out, is the entropic measure
    grid = np.linspace(entropic + stray - 1, entropic + stray + 1, 20_001)
    loss = np.exp(risk_aversion * (-pnl[:, None] - grid)) - (1 + math.log(risk_aversion)) / risk_aversion
    assert np.min(grid + loss.mean(0)) == pytest.approx(entropic, abs=1e-6)


@pytest.mark.parametrize("tail_prob", [0.1, 0.13, 0.5])
def test_oce_of_the_cvar_loss_is_expected_shortfall(strict_x64, tail_prob):
    pnl = normals(40)
    loss = lambda x: jnp.maximum(x, 0.0) / tail_prob  # noqa: E731
    value, theta = jax.jit(partial(risk.optimized_certainty_equivalent, loss=loss))(pnl)
    losses = np.sort(-np.asarray(pnl))[::-1]
    whole = int(round(tail_prob * 40, 9))
    tail = losses[:whole].sum() + (tail_prob * 40 - whole) * losses[whole]
    np.testing.assert_allclose(value, tail / (tail_prob * 40), rtol=1e-9)
    assert losses[whole] - 1e-6 <= float(theta) <= losses[whole - 1] + 1e-6  # theta is a value at risk


def test_oce_slope_is_that_of_the_entropic_measure(strict_x64):
    pnl = np.asarray(normals(10))
    share = np.exp(-5.0 * pnl) / np.exp(-5.0 * pnl).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(exponential_oce))(jnp.asarray(pnl)), -share, rtol=1e-8)


# --- standard errors ----------------------------------------------------------------------------------


def test_stderr_of_the_mean_is_the_textbook_one(strict_x64):
    pnl = normals(50)
    np.testing.assert_allclose(risk.stderr(risk.mean, pnl), np.std(pnl, ddof=1) / math.sqrt(50), rtol=1e-12)


REPLICATED = {
    "entropic": partial(risk.entropic_risk_measure, risk_aversion=1.0),
    "shortfall": shortfall,
    "quadratic": quadratic,
    "exponential_oce": lambda pnl, **weights: exponential_oce(0.2 * pnl, **weights),
}


@cache
def replications():
    """Each measure on 200 independent samples of 1000 normals, and the standard error that it claims."""
    both = lambda x: {name: (f(x), risk.stderr(f, x)) for name, f in REPLICATED.items()}  # noqa: E731
    return jax.jit(jax.vmap(both))(normals(200, 1000))


@pytest.mark.parametrize("name", REPLICATED)
def test_stderr_is_the_spread_of_independent_replications(x64, name):
    values, stderrs = map(np.asarray, replications()[name])
    assert stderrs.mean() == pytest.approx(values.std(), rel=0.2)  # 200 replications: 5 % at one sigma


def test_stderr_of_value_at_risk_is_the_known_one(x64):
    stderr = float(gaussian_estimates()["threshold"][1])  # tail 0.1 of 20,000 normals of deviation 0.5
    assert stderr == pytest.approx(0.5 * math.sqrt(0.1 * 0.9 / 20_000) / DENSITY_TENTH, rel=0.15)


def test_stderr_of_copies_is_honest_when_clustered(x64):
    pnl, pair = normals(400), {"entropic": entropic, "shortfall": shortfall}
    stderrs = jax.jit(lambda *a: {name: risk.stderr(f, a[0], group_ids=a[1]) for name, f in pair.items()})
    twice, ids = jnp.concatenate([pnl, pnl]), jnp.concatenate([7 * jnp.arange(400) + 3] * 2)
    clustered, taken_for_new = stderrs(twice, ids), stderrs(twice, jnp.arange(800))
    # names of the groups do not matter, nor does the order of the paths
    order = np.random.default_rng(2).permutation(800)
    shuffled = stderrs(twice[order], 10_000 - ids[order])
    for name, measure in pair.items():
        once = float(jax.jit(partial(risk.stderr, measure))(pnl))
        assert float(clustered[name]) == pytest.approx(once, rel=1e-6)
        assert float(shuffled[name]) == pytest.approx(once, rel=1e-6)
        assert float(taken_for_new[name]) == pytest.approx(once / math.sqrt(2), rel=0.05)


def test_clustered_stderr_by_hand(strict_x64):
    # group sums 1 + 2, -4, 2; mean 1/3; sqrt(3/2 ((8/3)^2 + (13/3)^2 + (5/3)^2))
    influences, groups = jnp.array([1.0, -4.0, 2.0, 2.0]), jnp.array([5, 0, 5, 2])
    expected = math.sqrt(1.5 * (64 + 169 + 25) / 9)
    assert float(jax.jit(risk.clustered_stderr)(influences, groups)) == pytest.approx(expected)


def test_stderr_of_one_group_is_unknown(strict_x64):
    assert math.isnan(jax.jit(risk.clustered_stderr)(normals(4), jnp.full(4, 3)))


def test_stderr_of_one_path_is_refused(strict_x64):
    with pytest.raises(ValueError, match="at least 2 paths, got 1"):
        risk.stderr(risk.mean, normals(1))


def test_paired_stderr_of_the_same_sample_and_of_a_difference(strict_x64):
    pnl, other = normals(50), normals(50) + 0.1 * normals(50, seed=1)
    assert float(jax.jit(partial(risk.paired_stderr, entropic))(pnl, pnl)) < 1e-15  # of 1e-2: roundings
    paired = jax.jit(partial(risk.paired_stderr, risk.mean))(pnl, other)
    np.testing.assert_allclose(paired, np.std(np.asarray(pnl - other), ddof=1) / math.sqrt(50), rtol=1e-10)
    assert float(paired) < 0.2 * float(risk.stderr(risk.mean, pnl))  # that is why the paths are shared


def test_jackknife_of_the_mean_of_few_paths_is_the_textbook_one(x64):
    pnl = normals(7)
    stderr = risk.stderr(lambda pnl: jnp.mean(pnl), pnl)
    np.testing.assert_allclose(stderr, np.std(pnl, ddof=1) / math.sqrt(7), rtol=1e-12)


@pytest.mark.parametrize("by_weights", [True, False])
def test_copies_are_worth_one_path_in_every_standard_error(x64, by_weights):
    """Pairs of the same path: the error is that of half as many, sqrt(2) of what it would seem."""
    measure = entropic if by_weights else lambda pnl: entropic(pnl)
    once, other = 0.1 * normals(1000), 0.1 * normals(1000, seed=1)
    twice, twice_other, ids = (jnp.repeat(x, 2) for x in (once, other, jnp.arange(1000)))
    for alone, clustered, taken_for_new in (
        (
            risk.stderr(measure, once),
            risk.stderr(measure, twice, group_ids=ids),
            risk.stderr(measure, twice),
        ),
        (
            risk.paired_stderr(measure, once, other),
            risk.paired_stderr(measure, twice, twice_other, group_ids=ids),
            risk.paired_stderr(measure, twice, twice_other),
        ),
    ):
        assert float(clustered) == pytest.approx(float(alone), rel=1e-9)
        # the jackknife is noisy; where it leaves out one copy of two it is far below
        assert float(taken_for_new) < 0.85 * float(alone)


def test_value_at_risk_rises_as_its_tail_shrinks_like_the_quantile(x64):
    slope = jax.grad(lambda p: risk.value_at_risk(normals(20_000), tail_prob=p))(0.1)
    assert float(slope) == pytest.approx(-1 / 0.17549833, rel=0.1)  # of the standard normal density there


@pytest.mark.parametrize("risk_aversion", [1e-3, 1e-2])
def test_oce_is_entropic_where_its_threshold_is_far_away(x64, risk_aversion):
    pnl, loss = normals(50), risk.exponential_loss(risk_aversion)
    value, theta = risk.optimized_certainty_equivalent(pnl, loss=loss)
    wanted = risk.entropic_risk_measure(pnl, risk_aversion=risk_aversion)
    assert abs(float(theta)) > 100
    np.testing.assert_allclose(value, wanted, atol=1e-9 / risk_aversion)


def ignoring(pnl, **ignored):
    return -jnp.mean(pnl)


def test_a_measure_that_swallows_the_weights_is_jackknifed_instead_of_certain(x64):
    pnl, other = normals(2000), normals(2000) + 0.1 * normals(2000, seed=1)
    textbook = float(risk.stderr(risk.mean, pnl))
    for measure in (ignoring, lambda pnl: -jnp.mean(pnl), lambda pnl, *, weights=None: -jnp.mean(pnl)):
        assert float(risk.stderr(measure, pnl)) == pytest.approx(textbook, rel=0.2)
        paired = float(risk.paired_stderr(measure, pnl, other))
        assert paired == pytest.approx(float(risk.paired_stderr(risk.mean, pnl, other)), rel=0.2)
    passed_on = lambda pnl, **how: -risk.mean(pnl, **how)  # noqa: E731
    assert float(jax.jit(partial(risk.stderr, passed_on))(pnl)) == pytest.approx(textbook, rel=1e-10)


@cache
def every_influence():
    of = lambda pnl: {name: risk.influence(measure, pnl) for name, measure in MEASURES.items()}  # noqa: E731
    return jax.jit(of)(normals(400))


@pytest.mark.parametrize("name", MEASURES)
def test_influence_sums_to_zero(x64, name):
    influence = np.asarray(every_influence()[name])
    slack = 0.02 if name == "threshold" else 1e-8  # a quantile's sums to the fraction missed by rounding
    assert abs(influence.sum()) < slack
    assert np.abs(influence).sum() > 0.05


def test_effective_sample_size_limits_and_by_hand(strict_x64):
    size = partial(risk.effective_sample_size, risk_aversion=1.0)
    assert float(size(jnp.full(12, -3.0))) == pytest.approx(12.0)
    assert float(size(jnp.array([-1000.0, 0.0, 1.0]))) == pytest.approx(1.0)
    assert float(size(jnp.array([0.0, -math.log(2.0)]))) == pytest.approx(9 / 5)  # weights 1, 2


# --- what is refused, and what is seen ----------------------------------------------------------------


@pytest.fixture
def as_for_users():
    """Without the type checks that only tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


OF_A_SAMPLE = {
    **MEASURES,
    "mean": risk.mean,
    "standard_deviation": risk.standard_deviation,
    "effective_sample_size": partial(risk.effective_sample_size, risk_aversion=5.0),
}


@pytest.mark.parametrize("name", OF_A_SAMPLE)
def test_a_sample_has_one_axis(as_for_users, name):
    for shape in ((), (4, 1), (1, 4), (2, 3)):
        with pytest.raises(ValueError, match=r"one number a path, \[n_paths\]; got shape"):
            OF_A_SAMPLE[name](jnp.ones(shape))
    assert np.isfinite(jax.vmap(OF_A_SAMPLE[name])(jnp.arange(6.0).reshape(2, 3))).all()


@pytest.mark.parametrize("name", OF_A_SAMPLE)
def test_one_path_that_is_no_number_is_seen(name):
    pnl = jnp.linspace(-1.0, 1.0, 101)
    for i in (0, 50, 100):
        assert np.isnan(OF_A_SAMPLE[name](pnl.at[i].set(jnp.nan))), i
    assert np.isfinite(OF_A_SAMPLE[name](pnl))


@pytest.mark.parametrize(
    "measure, option, wrong",
    [
        (risk.entropic_risk_measure, "risk_aversion", (0.0, -1.0, math.nan)),
        (risk.quadratic_risk, "risk_aversion", (0.0, -1.0)),
        (risk.effective_sample_size, "risk_aversion", (0.0, jnp.array(-1.0))),
        (risk.expected_shortfall, "tail_prob", (0.0, -0.1, 10.0, math.nan)),
        (risk.value_at_risk, "tail_prob", (0, 1.5, np.float32(2.0))),
    ],
)
def test_numbers_out_of_range_are_refused_where_they_are_known(measure, option, wrong):
    pnl = jnp.linspace(-1.0, 1.0, 11)
    for number in wrong:
        with pytest.raises(ValueError, match=f"{option} must be above 0"):
            measure(pnl, **{option: number})
    jax.jit(lambda number: measure(pnl, **{option: number}))(wrong[0])  # traced ones are not looked at
    assert np.isfinite(measure(pnl, **{option: 1.0}))


def test_pnl_of_numpy_is_taken_without_a_warning(as_for_users, recwarn):
    assert np.isfinite(entropic(np.linspace(-1.0, 1.0, 11)))
    assert np.isfinite(threshold(np.arange(-5, 6)))
    assert not recwarn
