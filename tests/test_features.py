import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax.features import BENDS, FEATURES, feature_matrix
from dhlnn_jax.hedger import make_band_hedger, make_recurrent_hedger
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.settings import make_settings

SPOT = [1.0, 1.2, 0.9]

# strike 1.1, volatility 0.3, dt 0.1, maturity 0.5: 0.3 sqrt(0.5) = 0.2121320
BY_HAND = {
    "log_spot": [0.0, 0.1823216, -0.1053605],
    "log_moneyness": [-0.0953102, 0.0870114, -0.2006707],
    "max_log_moneyness": [-0.0953102, 0.0870114, 0.0870114],
    "time_to_maturity": [0.5, 0.4, 0.3],
    "volatility": [0.3, 0.3, 0.3],
    "standardised_log_moneyness": [-0.4492966, 0.4101755, -0.9459706],
    "standardised_max_log_moneyness": [-0.4492966, 0.4101755, 0.4101755],
    "standardised_time_to_maturity": [1.0, 0.6, 0.2],
    "deviations_from_strike": [-0.4492966, 0.4585902, -1.2212430],
    "cost_rate": [0.002, 0.002, 0.002],
    "risk_aversion": [7.0, 7.0, 7.0],
    "strike": [1.1, 1.1, 1.1],
}


def settings(**changes):
    numbers = dict(strike=1.1, volatility=0.3, dt=0.1, maturity=0.5, cost_rate=0.002, risk_aversion=7.0)
    return make_settings(n_steps=3, **(numbers | changes))


@pytest.mark.parametrize("name", BY_HAND)
def test_feature_by_hand(strict_x64, name):
    value = FEATURES[name](MarketPath(jnp.array(SPOT)), settings())
    np.testing.assert_allclose(value, BY_HAND[name], atol=1e-7)


def full_path(spot, variance, half_spread):
    return observed_path(MarketPath(spot, variance=variance, half_spread=half_spread))


N_STEPS = 4
WHOLE = (
    jnp.array([1.0, 1.2, 0.9, 1.3, 0.8]),
    jnp.array([0.04, 0.09, 0.01, 0.05, 0.02]),
    jnp.array([0.01, 0.02, 0.03, 0.04, 0.05]),
)


@pytest.fixture(scope="module")
def matrix_of():
    return jax.jit(lambda *path: feature_matrix(sorted(FEATURES), full_path(*path), settings()))


def test_every_feature_is_blind_to_the_future_by_gradient(x64):
    matrix = lambda *path: feature_matrix(sorted(FEATURES), full_path(*path), settings())  # noqa: E731
    slopes = jax.jit(jax.jacrev(matrix, (0, 1, 2)))(*WHOLE)
    later = np.arange(N_STEPS + 1)[None] > np.arange(N_STEPS)[:, None]  # [t, s]
    sees = {name: False for name in FEATURES}
    for slope in map(np.asarray, slopes):
        for column, name in enumerate(sorted(FEATURES)):
            assert np.all(slope[:, column][later] == 0), name
            sees[name] |= bool(np.any(slope[:, column] != 0))
    blind = {name for name, value in sees.items() if not value}
    constants = {"time_to_maturity", "standardised_time_to_maturity", "risk_aversion", "strike"}
    assert blind == constants  # everything else does depend on the path up to t


def test_every_feature_is_blind_to_the_future_by_change(matrix_of):
    before = np.asarray(matrix_of(*WHOLE))
    for t in range(N_STEPS):
        changed = [x.at[t + 1 :].multiply(1.7) for x in WHOLE]
        after = np.asarray(matrix_of(*changed))
        np.testing.assert_array_equal(after[: t + 1], before[: t + 1])
        assert t == N_STEPS - 1 or np.any(after[t + 1 :] != before[t + 1 :])


def test_market_quotes_come_before_settings():
    path = full_path(*WHOLE)
    np.testing.assert_allclose(
        FEATURES["volatility"](path, settings()), [0.2, 0.3, 0.1, 0.05**0.5], rtol=1e-6
    )
    np.testing.assert_allclose(FEATURES["cost_rate"](path, settings()), [0.01, 0.02, 0.03, 0.04], rtol=1e-6)
    # deviations use the volatility of their own time: log(1.2 / 1.1) / (0.3 sqrt(0.4))
    deviations = FEATURES["deviations_from_strike"](path, settings())
    assert float(deviations[1]) == pytest.approx(0.4585902, abs=1e-6)


def test_standardised_features_ranges():
    spot = jnp.asarray(np.exp(np.cumsum(0.3 * np.random.default_rng(0).normal(size=50))), jnp.float32)
    path, numbers = MarketPath(spot), settings(maturity=5.0, volatility=0.05)
    time = np.asarray(FEATURES["standardised_time_to_maturity"](path, numbers))
    assert time[0] == 1.0 and np.all(np.diff(time) < 0) and -1.0 <= time[-1] < -0.9
    deviations = np.asarray(FEATURES["deviations_from_strike"](path, numbers))
    assert np.max(np.abs(deviations)) == 10.0  # cut
    # one unit of standardised log-moneyness is one standard deviation over the whole maturity
    one_up = MarketPath(jnp.array([1.1 * np.exp(0.05 * 5.0**0.5)]))
    for name in ("standardised_log_moneyness", "standardised_max_log_moneyness", "deviations_from_strike"):
        assert float(FEATURES[name](one_up, numbers)[0]) == pytest.approx(1.0, rel=1e-5)


def test_features_finite_without_time_or_volatility():
    path = MarketPath(jnp.array(SPOT))
    expired = settings(maturity=0.1)
    np.testing.assert_allclose(FEATURES["time_to_maturity"](path, expired), [0.1, 0.0, 0.0], atol=1e-7)
    np.testing.assert_array_equal(FEATURES["standardised_time_to_maturity"](path, expired)[1:], -1.0)
    assert FEATURES["deviations_from_strike"](path, expired)[1:].tolist() == [0.0, 0.0]
    for numbers in (expired, settings(volatility=0.0)):
        total = lambda spot, numbers=numbers: jnp.sum(  # noqa: E731
            feature_matrix(sorted(FEATURES), MarketPath(spot), numbers)
        )
        value, slope = jax.jit(jax.value_and_grad(total))(path.spot)
        assert np.isfinite(value) and np.all(np.isfinite(slope))


def test_a_variance_below_zero_is_not_taken_for_expiry():
    path = observed_path(MarketPath(jnp.array(SPOT), variance=jnp.array([0.09, -0.01, 0.09])))
    for name in ("volatility", "standardised_log_moneyness", "deviations_from_strike"):
        np.testing.assert_array_equal(np.isfinite(FEATURES[name](path, settings())), [True, False])


def test_feature_matrix_columns_in_the_order_of_names():
    matrix = feature_matrix(("strike", "time_to_maturity"), MarketPath(jnp.array(SPOT)), settings())
    np.testing.assert_allclose(matrix, [[1.1, 0.5], [1.1, 0.4], [1.1, 0.3]], rtol=1e-6)
    batched = jax.vmap(lambda s: feature_matrix(("log_spot",), MarketPath(s), settings()))(jnp.ones((7, 3)))
    assert batched.shape == (7, 3, 1)


def test_feature_matrix_unknown_name_is_named():
    with pytest.raises(ValueError, match="got 'moneynes'"):
        feature_matrix(("moneynes",), MarketPath(jnp.array(SPOT)), settings())
    for make in (make_band_hedger, make_recurrent_hedger):
        for names in ("log_moneyness", ("log_moneyness", "moneynes")):
            with pytest.raises(ValueError, match="features must be several of log_spot, "):
                make(features=names)


def test_feature_of_one_function_registers_by_name(monkeypatch):
    def last_return(path, settings):
        return jnp.diff(jnp.log(path.spot), prepend=jnp.log(path.spot[:1])) / settings.volatility

    monkeypatch.setitem(FEATURES, "last_return", last_return)
    matrix = feature_matrix(("last_return", "strike"), MarketPath(jnp.array(SPOT)), settings())
    np.testing.assert_allclose(matrix[:, 0], [0.0, 0.1823216 / 0.3, -0.2876821 / 0.3], atol=1e-6)


# --- features that are straight in the log-moneyness ---------------------------------------------------


def straightness(name):
    """The feature on a grid of log-moneyness [n_grid, n_times], the grid, its bends [n_times, n_bends]."""
    grid = jnp.linspace(-2.0, 2.0, 4001)
    numbers = settings()
    spots = numbers.strike * jnp.exp(jnp.broadcast_to(grid[:, None], (grid.shape[0], 3)))
    value = jax.jit(jax.vmap(lambda spot: FEATURES[name](MarketPath(spot), numbers)))(spots)
    bends = BENDS[name](MarketPath(spots[0]), numbers)
    return np.asarray(value), np.asarray(grid), np.stack([*bends, np.full(3, 99.0)], axis=-1)


@pytest.mark.parametrize("name", sorted(BENDS))
def test_features_are_straight_between_their_bends(x64, name):
    value, grid, bends = straightness(name)
    bent = np.abs(np.diff(value, 2, axis=0)) > 1e-9  # at each inner point of the grid
    near = np.min(np.abs(grid[1:-1, None, None] - bends), axis=-1) < grid[1] - grid[0]
    assert not (bent & ~near).any()
    assert (bent.sum() > 0) == (bends.shape[1] > 1)  # what is called a bend is one


@pytest.mark.parametrize("name", sorted(BENDS))
def test_features_with_bends_named_see_the_present_spot_alone(x64, name):
    slope = jax.jacrev(lambda spot: FEATURES[name](MarketPath(spot), settings()))(jnp.array(SPOT))
    np.testing.assert_array_equal(slope - np.diag(np.diag(slope)), 0.0)


def test_features_of_the_maximum_have_no_bends_named():
    assert FEATURES.keys() - BENDS.keys() == {"max_log_moneyness", "standardised_max_log_moneyness"}
