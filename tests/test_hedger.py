import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import hedge, hedger
from dhlnn_jax.features import FEATURES
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.settings import make_settings

N_STEPS = 5
NAMES = ("standardised_log_moneyness", "max_log_moneyness", "standardised_time_to_maturity")
SPOT = np.array([1.0, 1.03, 0.98, 0.99, 1.05, 0.96])
OTHER_SPOT = np.array([1.01, 0.97, 1.04, 1.08, 0.93, 1.07])


def settings(**changes):
    numbers = dict(strike=1.0, volatility=0.2, cost_rate=2e-3, risk_aversion=50.0)
    return make_settings(n_steps=N_STEPS, **(numbers | changes))


TRAINED = {
    "band": functools.partial(hedger.make_band_hedger, hidden_sizes=(8,)),
    "band_of_the_lookback": functools.partial(
        hedger.make_band_hedger, hidden_sizes=(8,), centre=hedge.lookback_call_delta
    ),
    "delta_plus_tanh": functools.partial(
        hedger.make_recurrent_hedger, hidden_sizes=(8,), form="delta_plus_tanh"
    ),
    "direct": functools.partial(hedger.make_recurrent_hedger, hidden_sizes=(8,), form="direct"),
}
RULES = {
    "no_hedge": hedge.no_hedge,
    "delta": hedge.delta_hedge,
    "put_delta": hedge.european_put_delta,
    "lookback_delta": hedge.lookback_call_delta,
    "whalley_wilmott": hedge.whalley_wilmott_hedge,
    "leland": hedge.leland_hedge,
    "periodic_delta": functools.partial(hedge.periodic_delta_hedge, every=2),
}


def params_of(made, scale=1.0):
    """Random parameters with outputs of size one, as after training (and no time spent in `init`)."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    fill = lambda x: jnp.asarray(scale * rng.normal(size=x.shape) / x.shape[0] ** 0.5, float)  # noqa: E731
    return jax.tree.map(fill, shapes)


def policy_and_params(name, features=NAMES, scale=1.0):
    if name in RULES:
        return hedger.rule_policy(RULES[name]), None
    made = TRAINED[name](features=features)
    return hedger.policy_of(made), params_of(made, scale)


# --- causality ----------------------------------------------------------------------------------------


LATER = np.arange(N_STEPS + 1)[None] > np.arange(N_STEPS)[:, None]  # [t, s]
# Row t has everything after t replaced; then nothing, and everything.
CHANGED = np.stack([*np.where(LATER, OTHER_SPOT, SPOT), SPOT, OTHER_SPOT])


@functools.cache
def slopes_and_ratios():
    """d hedge_ratio[t] / d spot[s] and the ratios on the changed paths, of every hedger at once."""

    def of(name):
        policy, params = policy_and_params(name, tuple(sorted(FEATURES)), scale=0.3)
        ratios = lambda spot: policy.hedge_ratio(params, MarketPath(spot), settings())  # noqa: E731
        return lambda spots: (jax.jacrev(ratios)(spots[-2]), jax.vmap(ratios)(spots))

    every = {name: of(name) for name in (*RULES, *TRAINED)}
    return jax.jit(lambda spots: {name: f(spots) for name, f in every.items()})(jnp.asarray(CHANGED))


@pytest.mark.parametrize("name", [*RULES, *TRAINED])
def test_hedge_ratio_is_blind_to_the_future(x64, name):
    slopes, ratios = map(np.asarray, slopes_and_ratios()[name])
    assert slopes.shape == LATER.shape and ratios.shape == (N_STEPS + 2, N_STEPS)
    assert np.all(np.isfinite(slopes))
    assert np.all(slopes[LATER] == 0)
    assert np.any(slopes[~LATER] != 0) == (name != "no_hedge")
    *changed, unchanged, others = ratios
    for t in range(N_STEPS):
        np.testing.assert_allclose(changed[t][: t + 1], unchanged[: t + 1], rtol=1e-13, atol=1e-15)
    if name != "no_hedge":
        assert np.any(np.abs(others - unchanged) > 1e-6)  # all of them changed do matter


def test_last_point_of_everything_never_reaches_a_hedger(x64):
    def poison(path, settings):  # a rule that uses all that it is given
        total = jnp.sum(path.spot) + jnp.sum(path.variance) + jnp.sum(path.half_spread)
        return jnp.full(path.spot.shape, total)

    policy = hedger.rule_policy(poison, lambda path, s: (poison(path, s), poison(path, s)))
    path = MarketPath(*(jnp.array([1.0, 2.0, jnp.nan]) for _ in range(3)))
    assert policy.hedge_ratio(None, path, settings()).tolist() == [9.0, 9.0]
    assert policy.band(None, path, settings())[0].tolist() == [9.0, 9.0]


# --- pieces -------------------------------------------------------------------------------------------


def test_band_hedger_edges_by_hand():
    made = hedger.make_band_hedger(features=NAMES)
    raw = jnp.array([[0.1, 0.2], [-0.1, -0.2], [3.0, -500.0]])
    anchor = hedger.Anchor(jnp.array([0.5, 0.4, 0.9]), jnp.zeros(3))
    lower, upper = made.band(raw, anchor)  # leaky ReLU of slope 0.01 on both
    np.testing.assert_allclose(lower, [0.4, 0.401, -2.1], rtol=1e-5)
    np.testing.assert_allclose(upper, [0.7, 0.398, -4.1], rtol=1e-5)
    # buys to 0.4, the second band is crossed and so is the third: midpoints
    np.testing.assert_allclose(made.position(raw, anchor), [0.4, 0.3995, -3.1], rtol=1e-5)


def test_prior_starts_training_at_the_whalley_wilmott_band(x64):
    path = MarketPath(jnp.asarray(SPOT))
    made = hedger.make_band_hedger(features=NAMES, hidden_sizes=(8,), prior="whalley_wilmott")
    params = made.init(jax.random.key(1))
    band = jax.jit(hedger.policy_of(made).band)
    np.testing.assert_allclose(
        band(params, path, settings()),
        hedge.whalley_wilmott_band(observed_path(path), settings()),
        rtol=1e-12,
    )
    # the correction moves either edge out and in
    moved = jax.tree.map(lambda x: x + 0.05 * (x.shape == (2,)), params)
    wider, plain = band(moved, path, settings()), band(params, path, settings())
    np.testing.assert_allclose(wider[1] - plain[1], 0.05, rtol=1e-6)
    np.testing.assert_allclose(plain[0] - wider[0], 0.05, rtol=1e-6)


def test_prior_has_finite_gradients_where_gamma_vanishes():
    far = MarketPath(jnp.array([1.0, 5.0, 30.0, 1e-3, 1e-6, 1.0]))  # gamma is 0 in float32 at all but two
    made = hedger.make_band_hedger(features=NAMES, hidden_sizes=(8,), prior="whalley_wilmott")
    policy, params = hedger.policy_of(made), made.init(jax.random.key(1))
    gradient = jax.grad(lambda p: jnp.sum(jnp.square(policy.hedge_ratio(p, far, settings()))))(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", TRAINED)
def test_hedger_shapes_are_flat(name):
    made = TRAINED[name](features=NAMES)

    def pieces(key, spot):
        features, anchor = made.inputs(observed_path(MarketPath(spot)), settings())
        raw = made.outputs(made.init(key), features, anchor)
        edges = () if made.band is None else made.band(raw, anchor)
        return features, anchor, raw, made.position(raw, anchor), edges

    features, anchor, raw, held, edges = jax.eval_shape(pieces, jax.random.key(0), jnp.asarray(SPOT))
    assert features.shape == (N_STEPS, 3) and anchor.centre.shape == anchor.half_width.shape == (N_STEPS,)
    assert raw.shape == ((N_STEPS, 2) if "band" in name else (N_STEPS,))
    assert held.shape == (N_STEPS,)
    assert [edge.shape for edge in edges] == ([(N_STEPS,)] * 2 if "band" in name else [])


@pytest.mark.parametrize("name", TRAINED)
def test_policy_is_inputs_outputs_position_put_together(x64, name):
    made = TRAINED[name](features=NAMES)
    policy, params = policy_and_params(name)

    @jax.jit
    def both(params, path):
        features, centre = made.inputs(MarketPath(path.spot[:-1]), settings())
        by_hand = made.position(made.outputs(params, features, centre), centre)
        return policy.hedge_ratio(params, path, settings()), by_hand

    np.testing.assert_allclose(*both(params, MarketPath(jnp.asarray(SPOT))), rtol=1e-12)
    assert (policy.band is None) == (made.band is None)


def test_clamp_in_parallel_holds_the_same():
    path = MarketPath(jnp.asarray(SPOT, jnp.float32))
    held = []
    for clamp in ("scan", "parallel"):
        own = hedger.make_band_hedger(features=NAMES, hidden_sizes=(8,), clamp=clamp)
        params = own.init(jax.random.key(0))
        held.append(jax.jit(hedger.policy_of(own).hedge_ratio)(params, path, settings()))
    np.testing.assert_array_equal(*held)


@pytest.mark.parametrize("name", ["band", "band_of_the_lookback"])
def test_band_policy_clamps_to_its_own_band(x64, name):
    policy, params = policy_and_params(name)
    path = MarketPath(jnp.asarray(SPOT))
    both = jax.jit(lambda p: (policy.band(p, path, settings()), policy.hedge_ratio(p, path, settings())))
    (lower, upper), ratios = jax.tree.map(np.asarray, both(params))
    assert np.ptp(upper - lower) > 0.01  # some of them crossed, some not, all different
    held, expected = 0.0, []
    for low, high in zip(lower, upper, strict=True):
        held = (low + high) / 2 if low > high else min(max(low, held), high)
        expected.append(held)
    np.testing.assert_allclose(ratios, expected, rtol=1e-12)


@pytest.mark.parametrize("form", ["delta_plus_tanh", "direct"])
def test_recurrent_hedger_feeds_its_position_back(x64, form):
    made = TRAINED[form](features=NAMES)
    policy, params = policy_and_params(form)
    weights = [
        {k: np.asarray(v, float) for k, v in params["params"]["Perceptron_0"][f"Dense_{i}"].items()}
        for i in (0, 1)
    ]
    path = MarketPath(jnp.asarray(SPOT))
    features, anchor = made.inputs(observed_path(path), settings())
    previous, expected = 0.0, []
    for x, around in zip(np.asarray(features), np.asarray(anchor.centre), strict=True):
        hidden = np.maximum(np.append(x, previous) @ weights[0]["kernel"] + weights[0]["bias"], 0)
        raw = (hidden @ weights[1]["kernel"] + weights[1]["bias"])[0]
        previous = around + np.tanh(raw) if form == "delta_plus_tanh" else raw
        expected.append(previous)
    ratios = jax.jit(policy.hedge_ratio)(params, path, settings())
    np.testing.assert_allclose(ratios, expected, rtol=1e-10)


@pytest.mark.parametrize("make", [hedger.make_band_hedger, hedger.make_recurrent_hedger])
def test_centre_strike_changes_the_centre_only(x64, make):
    observed, contract = observed_path(MarketPath(jnp.asarray(SPOT))), settings(strike=0.97)
    plain, moved = make(features=NAMES), make(features=NAMES, centre_strike=1.04)
    features, (centre, _) = plain.inputs(observed, contract)
    moved_features, (moved_centre, _) = moved.inputs(observed, contract)
    np.testing.assert_array_equal(features, moved_features)
    assert np.all(moved_centre < centre)  # a higher strike has a lower delta
    np.testing.assert_allclose(
        moved_centre, plain.inputs(observed, settings(strike=1.04))[1].centre, rtol=1e-12
    )


def test_rule_policy_band_and_its_absence(x64):
    path = MarketPath(jnp.asarray(SPOT))
    assert hedger.rule_policy(hedge.delta_hedge).band is None
    policy = hedger.rule_policy(hedge.whalley_wilmott_hedge, hedge.whalley_wilmott_band)
    lower, upper = policy.band(None, path, settings())
    held = policy.hedge_ratio(None, path, settings())
    assert lower.shape == upper.shape == held.shape == (N_STEPS,)
    assert np.all(lower <= held) and np.all(held <= upper)


@pytest.mark.parametrize("name", ["band", "delta_plus_tanh", "direct"])
def test_hedger_with_zero_outputs_holds_its_centre(x64, name):
    path = MarketPath(jnp.asarray(SPOT))
    made = TRAINED[name](features=NAMES)
    held = jax.jit(hedger.policy_of(made).hedge_ratio)(params_of(made, scale=0.0), path, settings())
    centre = 0.0 if name == "direct" else hedge.delta_hedge(observed_path(path), settings())
    np.testing.assert_allclose(held, centre + np.zeros(N_STEPS), rtol=1e-12)


def test_batched_inputs_equal_one_by_one(x64):
    made = TRAINED["band"](features=NAMES)
    paths = MarketPath(jnp.stack([SPOT, OTHER_SPOT]))
    features, (centre, _) = hedger.batched_inputs(made, paths, settings())
    assert features.shape == (2, N_STEPS, 3) and centre.shape == (2, N_STEPS)
    for i, spot in enumerate((SPOT, OTHER_SPOT)):
        one = made.inputs(MarketPath(jnp.asarray(spot[:-1])), settings())
        np.testing.assert_allclose(features[i], one[0], rtol=1e-12)
        np.testing.assert_allclose(centre[i], one[1].centre, rtol=1e-12)


@pytest.mark.parametrize("name", TRAINED)
def test_parameter_gradients_finite_and_not_all_zero(name):
    policy, params = policy_and_params(name)
    path = MarketPath(jnp.asarray(SPOT, jnp.float32))
    total = lambda p: jnp.sum(policy.hedge_ratio(p, path, settings()))  # noqa: E731
    slopes = jax.tree.leaves(jax.jit(jax.grad(total))(params))
    assert all(np.all(np.isfinite(x)) for x in slopes) and any(np.any(x != 0) for x in slopes)
