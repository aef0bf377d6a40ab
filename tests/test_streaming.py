"""Streaming statistics against `evaluate` and `risk` on the same paths held in memory."""

from functools import partial, reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import risk, streaming
from dhlnn_jax.evaluate import HedgedPaths, measure, metrics_of, standard_errors
from dhlnn_jax.settings import make_settings
from dhlnn_jax.streaming import make_grid, merge, summary

N_PATHS, N_HEDGERS = 12_000, 3
NUMBERS = {"risk_aversion": 50.0, "tail_prob": 0.1}
BINNED = ("expected_shortfall", "value_at_risk")

statistics, update = jax.jit(streaming.statistics), jax.jit(streaming.update)

pytestmark = pytest.mark.usefixtures("x64")


def money_of(pnl, n_hedgers=None):
    """Money with a given pnl [n_hedgers, n_paths] and nothing else."""
    pnl = jnp.atleast_2d(jnp.asarray(pnl, float))
    return HedgedPaths(*[jnp.zeros_like(pnl)] * 3, pnl, *[jnp.zeros_like(pnl)] * 3)


def sample():
    """Three hedgers: one, one much like it, and one whose gains are cut so that it has an atom."""
    rng = np.random.default_rng(3)
    pnl, cost, turnover = (
        rng.normal(mean, 0.02, (N_HEDGERS, N_PATHS)).astype(np.float32) for mean in (-0.02, 0.1, 0.7)
    )
    pnl[1] = pnl[0] + 1e-3 * pnl[1]
    pnl[2] = np.minimum(pnl[2], 0.0)
    pnl, cost, turnover = (jnp.asarray(x) for x in (pnl, cost, turnover))
    return HedgedPaths(0 * pnl, 0 * pnl, cost, pnl, turnover, 0.5 * turnover, 0.25 * turnover)


def rows(money, start, stop):
    return jax.tree.map(lambda x: x[:, start:stop], money)


def chunks(money, size):
    return [rows(money, start, start + size) for start in range(0, money.pnl.shape[1], size)]


def streamed(money, size, **numbers):
    numbers = NUMBERS | numbers
    grid = make_grid(rows(money, 0, 2000), **numbers)
    first, *others = chunks(money, size)
    total = reduce(lambda total, chunk: update(total, chunk, grid), others, statistics(first, grid))
    return summary(total, grid)


@pytest.fixture(scope="module")
def in_memory():
    """Measurements and standard errors of each hedger, from all paths at once."""
    with jax.enable_x64(True):
        settings = make_settings(n_steps=4, **NUMBERS)
        measured = []
        for i in range(N_HEDGERS):
            one = measure(jax.tree.map(lambda x, i=i: x[i].astype(float), sample()), settings)
            measured.append((one, standard_errors(one.influences, jnp.arange(N_PATHS))))
        return measured


@pytest.mark.parametrize("size", [1700, 4000, N_PATHS])
def test_every_metric_and_standard_error_is_that_of_all_paths_at_once(in_memory, size):
    got = streamed(sample(), size)
    assert list(got.values) == list(got.stderrs) == list(metrics_of(make_settings(n_steps=1)))
    for i, (wanted, stderrs) in enumerate(in_memory):
        for name in wanted.values:
            error = got.binning_errors[name][i] if name in BINNED else 0.0
            np.testing.assert_allclose(
                got.values[name][i], wanted.values[name], rtol=1e-9, atol=error, err_msg=name
            )
            # A density from quantiles that are known to a bin each is that much less exact.
            rtol = {"expected_shortfall": 1e-3, "value_at_risk": 5e-3}.get(name, 1e-8)
            np.testing.assert_allclose(got.stderrs[name][i], stderrs[name], rtol=rtol, err_msg=name)
        np.testing.assert_allclose(got.effective_sample_size[i], wanted.effective_sample_size, rtol=1e-9)
    # What the bins hide is far below the standard errors.
    assert np.all(got.binning_errors["expected_shortfall"] < 1e-4 * got.stderrs["expected_shortfall"])
    assert np.all(got.binning_errors["value_at_risk"] < 0.03 * got.stderrs["value_at_risk"])


def test_numbers_do_not_depend_on_the_chunks():
    chex.assert_trees_all_close(streamed(sample(), 1700), streamed(sample(), 4000), rtol=1e-9, atol=1e-15)


def test_merge_adds_in_any_order_and_keeps_the_size():
    money = sample()
    grid = make_grid(rows(money, 0, 2000), **NUMBERS)
    parts = [statistics(chunk, grid) for chunk in chunks(money, 3000)]
    left = reduce(merge, parts)
    right = merge(merge(parts[3], parts[1]), merge(parts[2], parts[0]))
    chex.assert_trees_all_close(left, right, rtol=1e-11)
    chex.assert_trees_all_equal_shapes_and_dtypes(left, parts[0])
    assert float(left.n_paths) == N_PATHS and np.all(left.bins[0].sum(axis=1) == N_PATHS)


def test_paired_standard_errors_are_those_of_the_risk_room():
    money, entropic = sample(), partial(risk.entropic_risk_measure, risk_aversion=50.0)
    got = streamed(money, 4000).paired_stderr
    pnl = money.pnl.astype(float)
    for i in range(N_HEDGERS):
        for j in range(N_HEDGERS):
            wanted = risk.paired_stderr(entropic, pnl[i], pnl[j])
            np.testing.assert_allclose(got[i, j], wanted, rtol=1e-7, atol=1e-12)
    assert got[0, 1] < 0.1 * got[0, 2]


@pytest.mark.parametrize("at", [0, 3500, 11_999])
def test_one_ruinous_path_overflows_nothing_wherever_it_comes(at):
    pnl = np.asarray(sample().pnl, float)
    pnl[0, at], pnl[1, at] = -1000.0, 1000.0
    got = streamed(money_of(pnl), 3000)
    for i in range(N_HEDGERS):
        log_weight = -50.0 * pnl[i]
        top = log_weight.max()
        wanted = (np.log(np.exp(log_weight - top).mean()) + top) / 50.0
        np.testing.assert_allclose(got.values["entropic_risk_measure"][i], wanted, rtol=1e-12)
    np.testing.assert_allclose(got.effective_sample_size[0], 1.0)
    np.testing.assert_allclose(got.stderrs["entropic_risk_measure"][0], 1 / 50.0, rtol=1e-4)
    np.testing.assert_allclose(got.paired_stderr[0, 2], 1 / 50.0, rtol=1e-3)
    assert all(np.isfinite(x).all() for x in (*got.values.values(), *got.stderrs.values()))


@pytest.mark.parametrize(
    "tail_prob, value_at_risk, shortfall", [(0.1, 91.0, 95.5), (0.25, 76.0, 88.0), (0.125, 88.0, 94.24)]
)
def test_tail_of_the_losses_1_to_100(tail_prob, value_at_risk, shortfall):
    # 12.5 paths: the worst twelve, 89 to 100, and half of 88: (12 * 94.5 + 0.5 * 88) / 12.5 = 94.24.
    losses = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    got = streamed(money_of(-losses), 7, tail_prob=tail_prob)
    for name, wanted in (("value_at_risk", value_at_risk), ("expected_shortfall", shortfall)):
        error = got.binning_errors[name][0]
        assert error < 0.05 and abs(got.values[name][0] - wanted) <= error + 1e-12


def test_a_pilot_that_misleads_costs_accuracy_and_says_so():
    money = money_of(np.random.default_rng(1).normal(size=(1, 5000)))
    grid = make_grid(money_of(np.linspace(7.0, 8.0, 1000)), **NUMBERS)  # all losses lie above its bins
    got = summary(statistics(money, grid), grid)
    settings = make_settings(n_steps=1, **NUMBERS)
    for name in BINNED:
        metric = metrics_of(settings)[name]
        error = abs(got.values[name][0] - float(metric.reduce(money.pnl[0])))
        assert 1e-3 < error <= got.binning_errors[name][0]
    np.testing.assert_allclose(got.values["pnl_mean"][0], money.pnl.mean(), atol=1e-13)
    np.testing.assert_allclose(got.values["pnl_std"][0], money.pnl.std(), rtol=1e-12)


def test_the_whole_sample_as_tail_is_the_mean():
    got = streamed(sample(), 4000, tail_prob=1.0)
    np.testing.assert_allclose(got.values["expected_shortfall"], -got.values["pnl_mean"], rtol=1e-9)
    np.testing.assert_allclose(got.stderrs["expected_shortfall"], got.stderrs["pnl_mean"], rtol=1e-6)
    assert np.isnan(got.stderrs["value_at_risk"]).all()  # the least loss has no density


def test_a_pnl_that_is_always_the_same():
    got = streamed(money_of(np.full((1, 3000), -0.25)), 1000)
    for name in ("entropic_risk_measure", *BINNED):
        np.testing.assert_allclose(got.values[name], 0.25, rtol=1e-12)
        np.testing.assert_allclose(got.stderrs[name], 0.0, atol=1e-9)
    assert got.values["pnl_std"] == got.stderrs["pnl_std"] == 0.0


def test_a_pnl_that_is_not_a_number_is_no_number_in_the_summary():
    got = streamed(money_of(np.where(np.arange(3000) == 1234, np.nan, 0.5)), 1000)
    for name in ("entropic_risk_measure", "pnl_mean", "pnl_std", *BINNED):
        assert np.isnan(got.values[name]).all(), name


def test_a_hundred_million_paths_do_not_drift():
    chunk = rows(sample(), 0, 10_000)
    grid = make_grid(chunk, **NUMBERS, n_bins=64)
    once = statistics(chunk, grid)
    total = jax.jit(lambda one: jax.lax.fori_loop(1, 10_000, lambda i, total: merge(total, one), one))(once)
    few, many = summary(once, grid), summary(total, grid)
    assert float(total.n_paths) == 1e8
    for name, value in few.values.items():
        np.testing.assert_allclose(many.values[name], value, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(100 * many.stderrs[name], few.stderrs[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(100 * many.paired_stderr, few.paired_stderr, rtol=1e-4, atol=1e-10)


def test_float32_is_refused():
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64: call them under"):
        money = money_of(np.zeros(10))
        statistics(money, make_grid(money, **NUMBERS))
