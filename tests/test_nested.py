import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dhlnn_jax.nested import Problem, nested_update, optax_update

ETA = 0.01
RNG = np.random.default_rng(7)
INPUTS, TARGETS = RNG.normal(size=(20, 3)), RNG.normal(size=20)
PARAMS = {"in": RNG.normal(size=(3, 4)), "rest": (RNG.normal(size=4), np.array(0.3))}  # any pytree


def log_mean_exp(values):
    return jax.nn.logsumexp(-values) - math.log(values.shape[0])


def regression():
    """A user's own problem: fit TARGETS, judged by an entropic risk; nothing of it knows about hedging."""

    def outputs(params):
        return {"fit": jnp.tanh(INPUTS @ params["in"]) @ params["rest"][0] + params["rest"][1]}

    return Problem(outputs, lambda y: -jnp.abs(y["fit"] - TARGETS), log_mean_exp)


QUADRATIC = Problem(lambda w: w, lambda y: 0.5 * y**2, jnp.sum)  # its gradient is w
AFFINE = lambda w: jnp.array([[1.0, 2.0], [-0.5, 1.0], [0.3, 0.7]]) @ w + 0.2  # noqa: E731
PAIR = lambda: jnp.array([0.6, -0.8])  # noqa: E731


def params():
    return jax.tree.map(jnp.asarray, PARAMS)


def run(update, problem, n_times=3):
    """Parameters after each of n_times updates, as one list, and the last diagnostics."""
    apply = jax.jit(lambda w, state: update.apply(problem, w, state))
    w, state, history, info = params(), update.init(params()), [], None
    for _ in range(n_times):
        w, state, info = apply(w, state)
        history.append(w)
    return history, info


OPTIMIZERS = {
    "adam": optax.adam(ETA),
    "adam_without_momentum": optax.adam(ETA, b1=0.0),
    "momentum": optax.sgd(ETA, momentum=0.9),
    "rmsprop": optax.rmsprop(ETA),
}


@functools.cache
def plain_steps(name):
    """Parameters after each of 6 steps of optax on the exact gradient of `regression`, by jax.grad alone."""
    optimizer, problem = OPTIMIZERS[name], regression()
    gradient = jax.grad(lambda w: problem.risk(problem.value(problem.outputs(w))))

    @jax.jit
    def step(w, state):
        change, state = optimizer.update(gradient(w), state, w)
        return optax.apply_updates(w, change), state

    w, state, history = params(), optimizer.init(params()), []
    for _ in range(6):
        w, state = step(w, state)
        history.append(jax.tree.map(np.asarray, w))
    return history


def apply_once(update, problem, start):
    w, _, info = jax.jit(lambda w, state: update.apply(problem, w, state))(start, update.init(start))
    return w, info


def assert_same(a, b, rtol=1e-9):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in leaves:
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-12)


def gap(a, b):
    return max(
        float(np.max(np.abs(np.asarray(x) - y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- one inner step is a known optimizer --------------------------------------------------------------


def test_optax_update_is_the_optimizer_itself(x64):
    history, info = run(optax_update(optax.adam(ETA)), regression())
    expected = plain_steps("adam")
    assert_same(history, expected[:3])
    before = regression()
    values = before.value(before.outputs(expected[1]))
    assert float(info.risk) == pytest.approx(math.log(np.mean(np.exp(-np.asarray(values)))))
    assert int(info.n_gradients) == 1


@pytest.mark.parametrize("risk_weights", ["refreshed", "frozen"])  # at N = 1 there is nothing to refresh
@pytest.mark.parametrize("linearization", ["network", "none"])
def test_frozen_preconditioner_of_one_step_is_adam_without_momentum(x64, risk_weights, linearization):
    update = nested_update(
        optax.sgd(1.0), learning_rate=ETA, n_inner=1, risk_weights=risk_weights, linearization=linearization
    )
    history, _ = run(update, regression())
    assert_same(history, plain_steps("adam_without_momentum")[:3])
    assert gap(history[2], plain_steps("adam")[2]) > 1e-4


@pytest.mark.parametrize("name", ["adam", "momentum", "rmsprop"])
def test_frozen_state_of_one_step_is_the_optimizer(x64, name):
    update = nested_update(OPTIMIZERS[name], learning_rate=77.0, n_inner=1, inner_update="frozen_state")
    assert_same(run(update, regression())[0], plain_steps(name)[:3])


# --- several inner steps ------------------------------------------------------------------------------


def test_frozen_direction_is_the_same_step_n_times(x64):
    update = nested_update(optax.adam(ETA), learning_rate=77.0, n_inner=4, inner_update="frozen_direction")
    once = plain_steps("adam")[0]
    history, info = run(update, regression(), 1)
    expected = jax.tree.map(lambda w, v: w + 4 * (v - w), params(), once)
    assert_same(history[0], expected)
    assert int(info.n_gradients) == 1


def test_adam_without_linearization_is_plain_adam_on_the_same_batch(x64):
    update = nested_update(
        optax.adam(ETA), learning_rate=77.0, n_inner=3, inner_update="adam", linearization="none"
    )
    history, _ = run(update, regression(), 2)
    expected = plain_steps("adam")
    assert_same(history, [expected[2], expected[5]])


def test_frozen_state_advances_once_whatever_the_number_of_inner_steps(x64):
    states = []
    for n_inner in (1, 4):
        update = nested_update(
            optax.adam(ETA), learning_rate=77.0, n_inner=n_inner, inner_update="frozen_state"
        )
        states.append(
            jax.jit(lambda w, s, u=update: u.apply(QUADRATIC, w, s)[1])(PAIR(), update.init(PAIR()))
        )
    assert_same(states[0].optimizer, states[1].optimizer)
    assert states[1].optimizer[0].count == 1 and float(states[1].optimizer[0].mu[0]) == pytest.approx(0.06)


@pytest.mark.parametrize("inner_update", ["frozen_preconditioner", "frozen_state", "sgd", "adam"])
def test_linearization_of_an_affine_model_changes_nothing(x64, inner_update):
    affine, curved = (Problem(f, lambda y: -jnp.abs(y - 0.1), log_mean_exp) for f in (AFFINE, jnp.tanh))

    def end(problem, kind):
        update = nested_update(
            OPTIMIZERS["momentum"],
            learning_rate=0.1,
            n_inner=4,
            inner_update=inner_update,
            linearization=kind,
        )
        return lambda w: update.apply(problem, w, update.init(w))[0]

    kinds = ("network", "position", "none")
    all_ends = jax.jit(lambda w: [(end(affine, kind)(w), end(curved, kind)(w)) for kind in kinds])
    network, position, real = all_ends(PAIR())
    np.testing.assert_allclose([network[0], position[0]], [real[0]] * 2, rtol=1e-12)
    assert float(jnp.max(jnp.abs(network[1] - real[1]))) > 1e-6  # and of another model it does change


@pytest.mark.parametrize(("tolerance", "n_steps"), [(0.0, 5), (0.2, 3), (0.3, 2), (10.0, 1), (1e-9, 5)])
def test_tolerance_stops_after_the_first_small_step(x64, tolerance, n_steps):
    # |w|^2 / 2 with eta 1/2: from |w| = 1 the steps have norms 1/2, 1/4, 1/8, 1/16, ...
    update = nested_update(optax.sgd(1.0), learning_rate=0.5, tolerance=tolerance, inner_update="sgd")
    w, info = apply_once(update, QUADRATIC, PAIR())
    np.testing.assert_allclose(w, np.array([0.6, -0.8]) / 2**n_steps, rtol=1e-12)
    assert int(info.n_gradients) == n_steps
    assert float(info.gradient_norm) == pytest.approx(1.0) and float(info.risk) == pytest.approx(0.5)


# --- the objective of the inner steps -----------------------------------------------------------------


@pytest.mark.parametrize("risk_weights", ["frozen", "refreshed"])
def test_risk_weights_of_the_second_inner_step_by_hand(x64, risk_weights):
    # Two paths, V_p = -w_p^2 / 2, entropic risk: d rho / d V_p = -q_p with q = softmax(w^2 / 2), so the
    # gradient of Eq. (12) is q_p w_p, with q from w^r in both steps if frozen.
    problem = Problem(lambda w: w, lambda y: -0.5 * y**2, log_mean_exp)
    update = nested_update(
        optax.sgd(1.0), learning_rate=0.5, n_inner=2, inner_update="sgd", risk_weights=risk_weights
    )
    start = np.array([2.0, 1.0])
    q = lambda w: np.exp(w**2 / 2) / np.exp(w**2 / 2).sum()  # noqa: E731
    middle = start - 0.5 * q(start) * start
    end = middle - 0.5 * q(start if risk_weights == "frozen" else middle) * middle
    w, info = apply_once(update, problem, jnp.asarray(start))
    np.testing.assert_allclose(w, end, rtol=1e-12)
    assert float(info.gradient_norm) == pytest.approx(np.linalg.norm(q(start) * start))


@pytest.mark.parametrize("risk_weights", ["frozen", "refreshed"])
@pytest.mark.parametrize("inner_update", ["sgd", "frozen_preconditioner"])
def test_surrogate_moves_the_parameters_but_is_not_reported(x64, risk_weights, inner_update):
    # V_p = -3 w_p (slope -3) and its surrogate -w_p^2 (slope -2 w_p); weights q from V or from the surrogate.
    problem = Problem(lambda w: w, lambda y: -3.0 * y, log_mean_exp, lambda y: -(y**2))
    update = nested_update(
        optax.sgd(1.0), learning_rate=0.25, n_inner=1, inner_update=inner_update, risk_weights=risk_weights
    )
    start = np.array([0.5, 2.0])
    softmax = lambda x: np.exp(x) / np.exp(x).sum()  # noqa: E731
    exact = 3.0 * softmax(3.0 * start)
    moving = 2.0 * start * softmax(3.0 * start if risk_weights == "frozen" else start**2)
    if inner_update == "frozen_preconditioner":
        moving = moving / (exact + 1e-8)  # the second moment is that of the exact gradient
    w, info = apply_once(update, problem, jnp.asarray(start))
    np.testing.assert_allclose(w, start - 0.25 * moving, rtol=1e-7)
    assert float(info.risk) == pytest.approx(math.log(np.exp(3.0 * start).mean()))
    assert float(info.gradient_norm) == pytest.approx(np.linalg.norm(exact))
    assert int(info.n_gradients) == 2  # the exact gradient and that of the surrogate


@pytest.mark.parametrize(
    ("options", "with_surrogate", "n_gradients"),
    [
        ({}, False, 4),
        ({"risk_weights": "frozen"}, False, 4),
        ({"inner_update": "frozen_direction"}, False, 1),
        ({"linearization": "none"}, False, 4),
        ({}, True, 5),
        ({"inner_update": "frozen_direction"}, True, 2),
    ],
)
def test_n_gradients_counts_every_pull_back(x64, options, with_surrogate, n_gradients):
    surrogate = (lambda y: -(y**2)) if with_surrogate else None
    problem = Problem(lambda w: w, lambda y: -jnp.abs(y), log_mean_exp, surrogate)
    update = nested_update(optax.sgd(0.1), learning_rate=0.1, n_inner=4, **options)
    info = apply_once(update, problem, PAIR())[1]
    assert int(info.n_gradients) == n_gradients


def test_learning_rate_schedule_sees_outer_iterations(x64):
    seen = nested_update(
        optax.sgd(1.0),
        learning_rate=lambda count: jnp.where(count == 0, 0.0, 0.5),
        n_inner=2,
        inner_update="sgd",
    )
    apply, state = jax.jit(lambda w, state: seen.apply(QUADRATIC, w, state)[:2]), seen.init(PAIR())
    first, state = apply(PAIR(), state)
    second, _ = apply(first, state)
    # both inner steps of the first outer one at rate 0, then 1/2 twice
    np.testing.assert_allclose([first[0], second[0]], [0.6, 0.15], rtol=1e-12)


def test_update_says_where_to_cut():
    assert optax_update(optax.sgd(1.0)).cut == "raw"
    cuts = {
        kind: nested_update(optax.sgd(1.0), learning_rate=1.0, linearization=kind).cut
        for kind in ("network", "position", "none")
    }
    assert cuts == {"network": "raw", "position": "hedge_ratio", "none": "raw"}
    update = nested_update(optax.sgd(1.0), learning_rate=1.0, cost_surrogate="squared_difference")
    assert update.cost_surrogate == "squared_difference"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("risk_weights", "thawed"),
        ("cost_surrogate", "cubed"),
        ("inner_update", "adamw"),
        ("linearization", "layer"),
        ("n_inner", 0),
    ],
)
def test_bad_option_is_named(name, given):
    unchecked = getattr(nested_update, "__wrapped__", nested_update)  # without beartype's own refusal
    with pytest.raises(ValueError, match=rf"{name} must be .*{given}"):
        unchecked(optax.sgd(1.0), learning_rate=0.1, **{name: given})


# --- a user's own problem -----------------------------------------------------------------------------


@pytest.mark.parametrize("inner_update", ["frozen_preconditioner", "adam"])
def test_nested_training_fits_a_users_own_regression(inner_update):
    update = nested_update(optax.adam(ETA), learning_rate=ETA, n_inner=5, inner_update=inner_update)
    problem = regression()
    loss = jax.jit(lambda w: problem.risk(problem.value(problem.outputs(w))))
    history, _ = run(update, problem, 30)
    assert loss(history[-1]) < 0.5 * loss(params())
    assert jax.tree.structure(history[-1]) == jax.tree.structure(params())
