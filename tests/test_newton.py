import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dhlnn_jax import make_settings, newton
from dhlnn_jax.hedger import make_band_hedger, make_recurrent_hedger, policy_of
from dhlnn_jax.linearize import OutputLayer
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.model import BandNetwork, band_output_layer
from dhlnn_jax.nested import Problem, optax_update
from dhlnn_jax.newton import newton_update
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract, contract_pnl
from dhlnn_jax.rows import sum_over_live_rows
from dhlnn_jax.train import CURVATURES, OBJECTIVES, fit, init_state, make_train_step

# A user's own model outside finance: params["v"] in front of what "w" and "b" make of x.
LAYER = OutputLayer(
    inputs=lambda params, x: jnp.tanh(x[:, None] * params["w"] + params["b"]),
    weights=lambda params: params["v"],
    replace=lambda params, v: {**params, "v": v},
)


def own_params(dtype="float64"):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(3 * rng.normal(size=5), dtype),
        "b": jnp.linspace(-2, 2, 5, dtype=dtype),
        "v": jnp.zeros((5, 1), dtype),
    }


def regression(x, y):
    """Half the mean squared error: values linear in the output layer, curvature 1 / n."""

    def moments(inputs, a, b):
        return a.T @ inputs, jnp.einsum("ne,nf,ng->efg", b, inputs, inputs)

    return Problem(
        outputs=lambda params: LAYER.inputs(params, x) @ params["v"],
        value=lambda outputs: y - outputs[:, 0],
        risk=lambda values: 0.5 * jnp.mean(jnp.square(values)),
        risk_curvature=lambda values: jnp.full_like(values, 1 / len(values)),
        inputs=lambda params: LAYER.inputs(params, x),
        row_moments=moments,
    )


def batch(seed, n=40):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=n))
    return x, jnp.sin(3 * x) + 0.1 * jnp.asarray(rng.normal(size=n))


def test_one_step_solves_a_regression(x64):
    x, y = batch(0)
    update, params = newton_update(LAYER, damping=1e-12), own_params()
    moved, _, info = jax.jit(lambda w: update.apply(regression(x, y), w, update.init(w)))(params)
    inputs = np.asarray(LAYER.inputs(params, x))
    residual = np.asarray(y) - inputs @ np.asarray(moved["v"][:, 0])
    np.testing.assert_allclose(inputs.T @ residual, 0.0, atol=1e-8)  # the normal equations
    np.testing.assert_allclose(info.risk, 0.5 * np.mean(np.square(y)))
    np.testing.assert_array_equal(moved["w"], params["w"])  # hidden layers stay


@pytest.mark.parametrize("n_inner", [1, 2])
def test_batches_are_averaged_as_documented(n_inner, x64):
    update = newton_update(LAYER, n_inner=n_inner, damping=0.1, burn_in=1)
    params = own_params()
    state, v, mean = update.init(params), np.zeros(5), np.zeros((5, 5))
    for r in range(4):
        x, y = batch(r)
        inputs, gain = np.asarray(LAYER.inputs(params, x)), [1, 1, 1 / 2, 1 / 3][r]
        old = mean
        for _ in range(n_inner):
            mean = old + gain * (inputs.T @ inputs / len(x) - old)
            gradient = -inputs.T @ (np.asarray(y) - inputs @ v) / len(x)
            shifted = mean + 0.1 * gain * np.trace(mean) / 5 * np.eye(5)
            v = v - gain * np.linalg.solve(shifted, gradient)
        params, state, info = update.apply(regression(x, y), params, state)
        np.testing.assert_allclose(params["v"][:, 0], v, rtol=1e-8)
    assert info.n_gradients == n_inner and state.n_outer == 4


def test_nothing_moves_where_no_row_is_live(x64):
    x, y = batch(0)
    dead = regression(x, y)._replace(value=lambda outputs: 0.0 * outputs[:, 0])
    update, params = newton_update(LAYER), own_params()
    moved, _, _ = update.apply(dead, params, update.init(params))
    np.testing.assert_array_equal(moved["v"], params["v"])


def test_a_step_leaves_every_output_rows_to_learn_from(x64):
    """Beyond 1 the risk is lowest and nothing has a gradient; the whole step would end at 10."""
    x, y = batch(0)
    params = own_params() | {"v": jnp.zeros((5, 1))}
    params["w"], params["b"] = jnp.zeros(5), jnp.ones(5)  # inputs alike in all rows

    problem = regression(x, y)._replace(
        value=lambda outputs: jnp.square(jnp.maximum(1.0 - outputs[:, 0], 0.0)),
        risk=jnp.mean,
        risk_curvature=lambda values: jnp.full_like(values, 0.05 / len(values)),
    )
    update = newton_update(LAYER, damping=1e-9)
    moved, _, _ = update.apply(problem, params, update.init(params))
    output = float((LAYER.inputs(moved, x) @ moved["v"])[0, 0])
    np.testing.assert_allclose(output, 10 / 16, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_inner": 0}, "n_inner"), ({"damping": 0.0}, "damping"), ({"burn_in": -1}, "burn_in")],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        newton_update(LAYER, **options)


def test_a_problem_without_curvature_is_refused():
    x, y = batch(0)
    update, params = newton_update(LAYER), own_params("float32")
    with pytest.raises(ValueError, match="risk_curvature"):
        update.apply(regression(x, y)._replace(risk_curvature=None), params, update.init(params))


@pytest.mark.parametrize("name", CURVATURES)
def test_curvature_is_the_hessian_but_for_its_rank_one_part(name, x64):
    settings = make_settings(n_steps=3, risk_aversion=4.0)
    pnl = 0.3 * jax.random.normal(jax.random.key(0), (6,))
    hessian = np.asarray(jax.hessian(OBJECTIVES[name])(pnl, settings))
    diagonal = np.diag(CURVATURES[name](pnl, settings))
    weights = np.asarray(jax.nn.softmax(-4.0 * pnl)) if name == "entropic" else np.full(6, 1 / 6)
    np.testing.assert_allclose(hessian, diagonal - 4.0 * np.outer(weights, weights), atol=1e-12)


def test_output_layer_of_the_band_network():
    network = BandNetwork((8, 6))
    params, x = network.init(jax.random.key(0), jnp.zeros((1, 3))), jnp.cos(jnp.arange(12.0)).reshape(4, 3)
    layer = band_output_layer(network)
    weights = layer.weights(params)
    assert weights.shape == (7, 2)
    inputs = layer.inputs(params, x)
    np.testing.assert_allclose(inputs @ weights, network.apply(params, x), rtol=1e-6)
    other = layer.replace(params, weights + 1.0)
    np.testing.assert_allclose(inputs @ (weights + 1.0), network.apply(other, x), rtol=1e-5)
    assert jax.tree.structure(other) == jax.tree.structure(params)
    assert make_recurrent_hedger(features=("log_moneyness",)).output_layer is None  # its outputs feed back


def own_moments(x, both):
    inputs = jnp.cos(x)
    return both[:, 0] @ inputs, (both[:, 1:] * inputs).T @ inputs


@pytest.mark.parametrize("chunk_size", [None, 4, 1000])
def test_sums_over_live_rows_are_those_over_all_rows(chunk_size, x64):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(23, 3)))
    both = jnp.asarray(rng.normal(size=(23, 2)) * (rng.random(23) < 0.4)[:, None])
    how = {"cotangent": both, "chunk_size": chunk_size}
    given = jax.jit(lambda: sum_over_live_rows(own_moments, rows, **how))
    x = np.cos(np.asarray(rows))
    np.testing.assert_allclose(given()[0], np.asarray(both[:, 0]) @ x)
    np.testing.assert_allclose(given()[1], np.einsum("n,nf,ng->fg", both[:, 1], x, x))


SETTINGS = make_settings(n_steps=10, volatility=0.2, cost_rate=5e-3, risk_aversion=50.0)
CONTRACT = Contract(CLAIMS["european_call"])
SAMPLE = make_simulation_sampler(SIMULATORS["gbm"], n_steps=10)
FEATURES = ("standardised_log_moneyness", "standardised_time_to_maturity", "deviations_from_strike")
HEDGER = make_band_hedger(features=FEATURES, hidden_sizes=(16, 16))


def step_with(update, **how):
    options = {"n_paths": 1000, "curvature": CURVATURES["entropic"], **how}
    return jax.jit(make_train_step(HEDGER, SAMPLE, CONTRACT, OBJECTIVES["entropic"], update, **options))


def test_chunks_give_the_step_of_all_rows_at_once():
    update = newton_update(HEDGER.output_layer)
    state = init_state(HEDGER, update, jax.random.key(0))
    plain, chunked = (
        step_with(update, chunk_size=size)(state, jax.random.key(1), SETTINGS) for size in (None, 300)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), chunked, plain)


def risk_of(params, sign=1.0):
    paths = SAMPLE(jax.random.key(99), 20_000, SETTINGS)[0]

    def pnl(path):
        held = policy_of(HEDGER).hedge_ratio(params, path, SETTINGS)
        return contract_pnl(CONTRACT, path, sign * held, SETTINGS)

    return float(OBJECTIVES["entropic"](jax.jit(jax.vmap(pnl))(paths), SETTINGS))


def test_a_few_steps_hedge_better_than_many_of_adam():
    """The check fails for no hedge, untrained parameters and the flipped sign."""

    def trained(update, n_epochs):
        state = init_state(HEDGER, update, jax.random.key(0))
        return fit(step_with(update, chunk_size=500), state, jax.random.key(1), SETTINGS, n_epochs=n_epochs)

    adam = risk_of(trained(optax_update(optax.adam(1e-2)), 8).state.params)
    result = trained(newton_update(HEDGER.output_layer), 8)
    untrained = HEDGER.init(jax.random.key(0))
    assert risk_of(result.state.params) < adam
    for params, sign in ((untrained, 1.0), (untrained, 0.0), (result.state.params, -1.0)):
        assert not risk_of(params, sign) < adam


def test_damping_is_relative_to_the_mean_curvature_over_all_outputs(x64):
    rng = np.random.default_rng(0)
    roots, gradient = rng.normal(size=(2, 6, 3)), jnp.asarray(rng.normal(size=(2, 3)))
    curvature = jnp.asarray(np.einsum("oij,oik->ojk", roots, roots) * np.array([1.0, 9.0])[:, None, None])
    scale = np.mean([np.diag(matrix) for matrix in curvature])
    wanted = [
        np.linalg.solve(matrix + 0.1 * scale * np.eye(3), g)
        for matrix, g in zip(curvature, gradient, strict=True)
    ]
    np.testing.assert_allclose(newton._solve(curvature, gradient, jnp.array(0.1)), wanted, rtol=1e-10)


@pytest.mark.parametrize("longest, taken", [(1.0, 1.0), (0.5, 0.5), (1 / 64, 1 / 64), (1 / 128, 0.0)])
def test_steps_are_halved_down_to_a_sixty_fourth(longest, taken):
    fraction = newton._backtracked(lambda t: jnp.where(t <= longest, 0.5, 2.0), jnp.array(1.0))
    assert float(fraction) == taken


def test_a_step_leaves_a_quarter_of_the_rows_alive(x64):
    """A step that leaves a fifth of them is halved, though its risk is lower."""
    ends = jnp.where(jnp.arange(100) < 20, 3.0, 1.0)
    params = own_params() | {"w": jnp.zeros(5), "b": jnp.ones(5)}
    problem = regression(jnp.zeros(100), ends)._replace(
        value=lambda outputs: jnp.square(jnp.maximum(ends - outputs[:, 0], 0.0)),
        risk=jnp.mean,
        risk_curvature=lambda values: jnp.full_like(values, 0.05 / len(values)),
    )
    update = newton_update(LAYER, damping=1e-9)
    moved, _, _ = update.apply(problem, params, update.init(params))
    output = (LAYER.inputs(moved, jnp.zeros(1)) @ moved["v"])[0, 0]
    whole = 2 * (0.8 * 1 + 0.2 * 3) / (0.05 * 4 * (0.8 * 1 + 0.2 * 9))  # gradient / curvature
    fraction = next(t for t in 0.5 ** np.arange(7) if np.mean(np.asarray(ends) > t * whole) >= 0.25)
    assert (
        np.mean(np.asarray(ends) > 2 * fraction * whole) == 0.2
    )  # the step before was refused for nothing else
    np.testing.assert_allclose(output, fraction * whole, rtol=1e-6)
