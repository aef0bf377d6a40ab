import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import market
from dhlnn_jax.market import MarketPath, Simulator, draw_normals, gbm_path, noise_groups
from dhlnn_jax.settings import make_settings

N_PATHS = 20_000
DRIFT, VOLATILITY, DT, N_STEPS = 0.3, 0.4, 0.25, 4

SAMPLE = jax.jit(market.make_simulation_sampler(market.SIMULATORS["gbm"], n_steps=N_STEPS), static_argnums=1)


def simulate(key, n_paths=N_PATHS, **settings):
    return SAMPLE(key, n_paths, make_settings(n_steps=N_STEPS, dt=DT, volatility=VOLATILITY, **settings))


# --- one path -----------------------------------------------------------------------------------------


def test_gbm_path_by_hand(strict_x64):
    # log returns: (0.08 - 0.02) 0.25 + 0.2 * 0.5 * z = 0.015 + 0.1 z
    path = gbm_path(jnp.array([1.0, -2.0]), spot0=50.0, volatility=0.2, drift=0.08, dt=0.25)
    expected = [50.0, 50.0 * math.exp(0.115), 50.0 * math.exp(0.115 - 0.185)]
    np.testing.assert_allclose(path.spot, expected, rtol=1e-14)
    assert path.variance is None and path.half_spread is None


def test_gbm_path_zero_noise_keeps_the_convexity_term(strict_x64):
    path = gbm_path(jnp.zeros(3), spot0=2.0, volatility=0.5, drift=0.0, dt=1.0)
    np.testing.assert_allclose(path.spot, [2.0 * math.exp(-0.125 * i) for i in range(4)], rtol=1e-14)


def test_gbm_path_zero_volatility_grows_at_the_drift(strict_x64):
    path = gbm_path(jnp.array([3.0, -7.0]), spot0=1.0, volatility=0.0, drift=0.1, dt=2.0)
    np.testing.assert_allclose(path.spot, [1.0, math.exp(0.2), math.exp(0.4)], rtol=1e-14)


def test_gbm_path_gradients_finite_and_jit_vmap_equal_loop(strict_x64, key):
    noise = draw_normals(key, 3, (2,))
    one = lambda z, v: gbm_path(z, spot0=1.0, volatility=v, drift=0.1, dt=0.5).spot  # noqa: E731
    batched = jax.jit(jax.vmap(one, (0, None)))(noise, 0.3)
    compiled = jax.jit(one)
    np.testing.assert_allclose(batched, np.stack([compiled(z, 0.3) for z in noise]), rtol=1e-13)
    # d S_1 / d volatility = S_1 (sqrt(dt) z - volatility dt)
    slope = jax.jit(jax.grad(lambda v: one(noise[0], v)[1]))(0.3)
    np.testing.assert_allclose(slope, batched[0, 1] * (math.sqrt(0.5) * noise[0, 0] - 0.15), rtol=1e-12)


# --- law ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", [1, N_STEPS])
def test_gbm_law_kolmogorov_smirnov(key, time):
    stats = pytest.importorskip("scipy.stats")
    log_spot = np.log(np.asarray(simulate(key, drift=DRIFT)[0].spot)[:, time], dtype=float)
    elapsed = time * DT
    mean, deviation = (DRIFT - VOLATILITY**2 / 2) * elapsed, VOLATILITY * math.sqrt(elapsed)
    assert stats.kstest(log_spot, stats.norm(mean, deviation).cdf).pvalue > 0.01
    # the same test refuses a volatility 10 % off, and a drift without its convexity term
    assert stats.kstest(log_spot, stats.norm(mean, 1.1 * deviation).cdf).pvalue < 1e-3
    assert stats.kstest(log_spot, stats.norm(DRIFT * elapsed, deviation).cdf).pvalue < 1e-3


def test_gbm_increments_are_uncorrelated(key):
    increments = np.diff(np.log(np.asarray(simulate(key)[0].spot, dtype=float)), axis=1)
    off_diagonal = np.corrcoef(increments.T)[np.triu_indices(N_STEPS, 1)]
    assert np.all(np.abs(off_diagonal) < 4 / math.sqrt(N_PATHS))


@pytest.mark.parametrize("drift", [0.0, DRIFT])
def test_gbm_is_a_martingale_after_drift_within_4_stderr(key, drift):
    spot = np.asarray(simulate(key, drift=drift, spot0=3.0)[0].spot, dtype=float)
    discounted = spot * np.exp(-drift * DT * np.arange(N_STEPS + 1))
    stderr = discounted.std(0) / math.sqrt(N_PATHS)
    assert np.all(discounted[:, 0] == 3.0)
    assert np.all(np.abs(discounted.mean(0) - 3.0)[1:] < 4 * stderr[1:])


# --- noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pseudo", "antithetic", "sobol"])
def test_draw_normals_shape_and_fresh_per_key(key, kind):
    if kind == "sobol":
        pytest.importorskip("scipy")
    draw = lambda k: draw_normals(k, 8, (3, 2), kind=kind)  # noqa: E731
    first, second = draw(key), draw(jax.random.fold_in(key, 1))
    assert first.shape == (8, 3, 2) and bool(jnp.isfinite(first).all())
    assert bool(jnp.all(first == draw(key)))
    assert not bool(jnp.any(first == second))


def test_draw_normals_pseudo_rows_are_independent(key):
    z = np.asarray(draw_normals(key, N_PATHS, (2,)), dtype=float)
    assert np.all(np.abs(z.mean(0)) < 4 / math.sqrt(N_PATHS))
    assert np.all(np.abs((z**2).mean(0) - 1) < 4 * math.sqrt(2 / N_PATHS))
    assert abs(np.mean(z[:-1] * z[1:])) < 4 / math.sqrt(N_PATHS)


def test_draw_normals_antithetic_mirror_and_groups(key):
    z = np.asarray(draw_normals(key, 10, (3,), kind="antithetic"))
    np.testing.assert_array_equal(z[5:], -z[:5])
    assert len(np.unique(np.abs(z))) == 15
    groups = np.asarray(noise_groups(10, kind="antithetic"))
    np.testing.assert_array_equal(groups[:5], groups[5:])
    assert sorted(groups[:5]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["pseudo", "sobol"])
def test_noise_groups_every_path_for_itself(kind):
    assert sorted(np.asarray(noise_groups(7, kind=kind))) == list(range(7))


def test_draw_normals_sobol_moments_far_tighter_than_pseudo(key):
    special = pytest.importorskip("scipy.special")
    n_paths = 1024
    uniform = special.ndtr(np.asarray(draw_normals(key, n_paths, (6,), kind="sobol"), dtype=float))
    pseudo_stderr = math.sqrt(1 / 12 / n_paths)  # 0.009
    assert np.all(np.abs(uniform.mean(0) - 1 / 2) < pseudo_stderr / 15)
    assert np.all(np.abs((uniform**2).mean(0) - 1 / 3) < pseudo_stderr / 15)
    products = (uniform.T @ uniform / n_paths)[np.triu_indices(6, 1)]
    assert np.all(np.abs(products - 1 / 4) < pseudo_stderr / 3)
    # each of the 1024 cells of length 1/1024 holds one point: a net, whatever the shift
    assert all(len(np.unique(np.floor(u * n_paths))) == n_paths for u in uniform.T)


@pytest.mark.filterwarnings("ignore:The balance properties")
def test_draw_normals_sobol_mean_over_keys_is_unbiased(key):
    # Three points are no net, so only the random shift can make the mean of their uniforms right.
    stats = pytest.importorskip("scipy.stats")
    keys = jax.random.split(key, 4000)
    draw = jax.jit(jax.vmap(lambda k: draw_normals(k, 3, (2,), kind="sobol")))
    uniform = stats.norm.cdf(np.asarray(draw(keys), dtype=float))
    assert stats.kstest(uniform[:, 2, 1], "uniform").pvalue > 0.01
    second_moment = (uniform**2).mean((1, 2))
    assert abs(second_moment.mean() - 1 / 3) < 4 * second_moment.std() / math.sqrt(4000)
    assert second_moment.std() > 0.01  # each key alone is off


@pytest.mark.parametrize(
    ("n_paths", "kind", "message"), [(7, "antithetic", "even number.*7"), (8, "halton", "pseudo.*halton")]
)
def test_draw_normals_bad_request_is_named(key, n_paths, kind, message):
    unchecked = getattr(draw_normals, "__wrapped__", draw_normals)  # without beartype's own refusal
    with pytest.raises(ValueError, match=message):
        unchecked(key, n_paths, (2,), kind=kind)


# --- samplers -----------------------------------------------------------------------------------------


def test_simulation_sampler_shapes_and_settings_reach_the_simulator(key):
    paths, groups = simulate(key, 6, spot0=7.0)
    assert paths.spot.shape == (6, N_STEPS + 1) and groups.shape == (6,)
    assert np.all(np.asarray(paths.spot[:, 0]) == 7.0)
    sample = market.make_simulation_sampler(market.SIMULATORS["gbm"], n_steps=2, noise="antithetic")
    mirrored, groups = sample(key, 6, make_settings(n_steps=2, drift=0.02, volatility=0.2))
    product = mirrored.spot[:3] * mirrored.spot[3:]  # drift - volatility^2/2 = 0: mirrored returns cancel
    np.testing.assert_allclose(product, 1.0, rtol=1e-5)
    np.testing.assert_array_equal(groups, [0, 1, 2, 0, 1, 2])


def stochastic_variance_path(noise, *, spot0, dt, long_variance, noise_of_variance):
    """A toy of two factors whose two numbers are no fields of `Settings`."""
    variance = long_variance * jnp.exp(noise_of_variance * jnp.cumsum(noise[:, 1]))
    variance = jnp.concatenate([jnp.full(1, long_variance), variance])
    spot = spot0 + jnp.cumsum(jnp.sqrt(variance[:-1] * dt) * noise[:, 0])
    return MarketPath(jnp.concatenate([jnp.full(1, spot0), spot]), variance=variance)


def test_simulator_with_its_own_numbers_registers_by_one_function(key, monkeypatch):
    toy = Simulator(stochastic_variance_path, lambda n_steps: (n_steps, 2))
    monkeypatch.setitem(market.SIMULATORS, "toy", toy)
    sample = market.make_simulation_sampler(market.SIMULATORS["toy"], n_steps=3)
    settings = make_settings(n_steps=3, dt=0.25, parameters={"long_variance": 0.16, "noise_of_variance": 0.5})
    paths, _ = jax.jit(lambda key, s: sample(key, 5000, s))(key, settings)
    assert paths.spot.shape == (5000, 4) and paths.variance.shape == (5000, 4)
    first_step = np.asarray(paths.spot[:, 1] - paths.spot[:, 0])
    assert first_step.std() == pytest.approx(math.sqrt(0.16 * 0.25), rel=0.04)
    one = jax.tree.map(lambda x: x[0], paths)
    np.testing.assert_allclose(market.path_volatility(one, settings) ** 2, one.variance, rtol=1e-5)
    with pytest.raises(KeyError, match="long_variance"):
        sample(key, 4, make_settings(n_steps=3))


RECORDED = MarketPath(
    spot=jnp.array([[1.0, 1.1], [1.0, 0.8], [1.0, 1.3]]),
    half_spread=jnp.array([[0.1, 0.11], [0.2] * 2, [0.3] * 2]),
)
GROUPS = jnp.array([4, 4, 9])


def test_bootstrap_sampler_draws_only_recorded_rows_with_their_groups(key):
    paths, groups = market.make_bootstrap_sampler(RECORDED, GROUPS)(key, 300, make_settings(n_steps=1))
    assert paths.spot.shape == (300, 2) and paths.variance is None
    rows = lambda path, group: np.column_stack([path.spot, path.half_spread, group])  # noqa: E731
    drawn = np.unique(rows(paths, groups), axis=0)
    np.testing.assert_array_equal(drawn, np.unique(rows(RECORDED, GROUPS), axis=0))
    share = np.mean(np.asarray(groups) == 9)
    assert abs(share - 1 / 3) < 4 * math.sqrt(2 / 9 / 300)


def test_recorded_sampler_first_rows_whatever_the_key(key):
    sample, settings = market.make_recorded_sampler(RECORDED, GROUPS), make_settings(n_steps=1)
    for k in (key, jax.random.fold_in(key, 1)):
        paths, groups = sample(k, 2, settings)
        np.testing.assert_array_equal(paths.spot, RECORDED.spot[:2])
        np.testing.assert_array_equal(paths.half_spread, RECORDED.half_spread[:2])
        np.testing.assert_array_equal(groups, GROUPS[:2])
    with pytest.raises(ValueError, match="4 paths asked for, 3 recorded"):
        sample(key, 4, settings)


def test_observed_path_drops_the_last_point_of_everything():
    path = MarketPath(jnp.arange(3.0), variance=jnp.arange(3.0) + 10.0, half_spread=jnp.arange(3.0) + 20.0)
    observed = market.observed_path(path)
    assert [x.tolist() for x in observed] == [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]
    assert market.observed_path(MarketPath(jnp.zeros((4, 2)))).spot.shape == (3, 2)


def test_path_volatility_known_variance_before_settings():
    settings = make_settings(n_steps=2, volatility=0.3)
    spot = jnp.ones(3)
    np.testing.assert_allclose(market.path_volatility(MarketPath(spot), settings), [0.3] * 3, rtol=1e-6)
    path = MarketPath(spot, variance=jnp.array([0.04, 0.09, 0.25]))
    np.testing.assert_allclose(market.path_volatility(path, settings), [0.2, 0.3, 0.5], rtol=1e-6)


def test_sobol_normals_are_the_middles_of_their_cells(key, monkeypatch):
    """All points of 8 bits: whatever the shift, each cell is hit once, and none at an end."""
    special = pytest.importorskip("scipy.special")
    monkeypatch.setattr(market, "_SOBOL_BITS", 8)
    monkeypatch.setattr(market, "_sobol_points", lambda n, dimension: np.arange(n, dtype=np.uint32)[:, None])
    z = np.sort(np.asarray(draw_normals(key, 256, (1,), kind="sobol"), dtype=float)[:, 0])
    np.testing.assert_allclose(special.ndtr(z), (np.arange(256) + 0.5) / 256, atol=1e-6)
