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


OPTIMIZERS = {
    "adam": optax.adam(ETA),
    "adam_without_momentum": optax.adam(ETA, b1=0.0),
    "momentum": optax.sgd(ETA, momentum=0.9),
    "rmsprop": optax.rmsprop(ETA),
    "adam_four_times_the_rate": optax.adam(4 * ETA),
}


def plain_steps(optimizer):
    """Parameters after each of 6 steps of optax on the exact gradient of `regression`, by jax.grad alone."""
    problem = regression()
    gradient = jax.grad(lambda w: problem.risk(problem.value(problem.outputs(w))))

    def step(carry, _):
        w, state = carry
        change, state = optimizer.update(gradient(w), state, w)
        w = optax.apply_updates(w, change)
        return (w, state), w

    return jax.lax.scan(step, (params(), optimizer.init(params())), length=6)[1]


def updated(update, n_times=3):
    """Parameters and diagnostics after each of n_times updates on `regression`."""

    def step(carry, _):
        w, state, info = update.apply(regression(), *carry)
        return (w, state), (w, info._replace(outputs=None))

    return jax.lax.scan(step, (params(), update.init(params())), length=n_times)[1]


OPTIONS = {
    "adam_without_momentum": dict(n_inner=1),
    "adam_without_momentum_frozen_weights": dict(n_inner=1, risk_weights="frozen"),
    "adam_without_momentum_real_network": dict(n_inner=1, linearization="none"),
    "frozen_state_adam": dict(optimizer="adam", n_inner=1, inner_update="frozen_state"),
    "frozen_state_momentum": dict(optimizer="momentum", n_inner=1, inner_update="frozen_state"),
    "frozen_state_rmsprop": dict(optimizer="rmsprop", n_inner=1, inner_update="frozen_state"),
    "frozen_direction": dict(optimizer="adam", n_inner=4, inner_update="frozen_direction"),
    "plain_adam": dict(optimizer="adam", n_inner=3, inner_update="adam", linearization="none"),
}


@functools.cache
def on_the_regression():
    """All that is compared on `regression`, by one compilation: (updates by name, plain steps by name)."""

    def update_of(optimizer=None, **options):
        rate = ETA if optimizer is None else 77.0  # that of the optimizer counts, where there is one
        return nested_update(OPTIMIZERS[optimizer or "momentum"], learning_rate=rate, **options)

    def everything():
        updates = {name: updated(update_of(**options)) for name, options in OPTIONS.items()}
        updates["optax"] = updated(optax_update(OPTIMIZERS["adam"]))
        return updates, {name: plain_steps(optimizer) for name, optimizer in OPTIMIZERS.items()}

    return jax.tree.map(np.asarray, jax.jit(everything)())


def first(n, history):
    return jax.tree.map(lambda x: x[:n], history)


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
    updates, plain = on_the_regression()
    history, info = updates["optax"]
    assert_same(history, first(3, plain["adam"]))
    assert info.n_gradients.tolist() == [1, 1, 1]
    fit = np.tanh(INPUTS @ PARAMS["in"]) @ PARAMS["rest"][0] + PARAMS["rest"][1]
    assert info.risk[0] == pytest.approx(math.log(np.mean(np.exp(np.abs(fit - TARGETS)))))


# at N = 1 there is nothing to refresh and nothing to linearize
@pytest.mark.parametrize("variant", ["", "_frozen_weights", "_real_network"])
def test_frozen_preconditioner_of_one_step_is_adam_without_momentum(x64, variant):
    updates, plain = on_the_regression()
    history, info = updates["adam_without_momentum" + variant]
    assert_same(history, first(3, plain["adam_without_momentum"]))
    assert gap(history, first(3, plain["adam"])) > 1e-4
    np.testing.assert_allclose(info.risk[0], updates["optax"][1].risk[0], rtol=1e-12)
    np.testing.assert_allclose(info.gradient_norm[0], updates["optax"][1].gradient_norm[0], rtol=1e-9)


@pytest.mark.parametrize("name", ["adam", "momentum", "rmsprop"])
def test_frozen_state_of_one_step_is_the_optimizer(x64, name):
    updates, plain = on_the_regression()
    assert_same(updates["frozen_state_" + name][0], first(3, plain[name]))


# --- several inner steps ------------------------------------------------------------------------------


def test_frozen_direction_is_the_same_step_n_times(x64):
    updates, plain = on_the_regression()
    history, info = updates["frozen_direction"]
    expected = jax.tree.map(lambda w, v: w + 4 * (v[0] - w), PARAMS, plain["adam"])
    assert_same(jax.tree.map(lambda x: x[0], history), expected)
    assert_same(
        jax.tree.map(lambda x: x[0], history),
        jax.tree.map(lambda x: x[0], plain["adam_four_times_the_rate"]),
    )
    assert info.n_gradients[0] == 1


def test_adam_without_linearization_is_plain_adam_on_the_same_batch(x64):
    updates, plain = on_the_regression()
    expected = jax.tree.map(lambda x: x[[2, 5]], plain["adam"])
    assert_same(first(2, updates["plain_adam"][0]), expected)


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


def test_frozen_state_inner_steps_use_the_state_before_the_outer_step(x64):
    # Momentum 0.9 at rate 0.1 on |w|^2 / 2: every step of outer iteration r adds 0.9 times the same trace,
    # which is 0 in the first one and g_0 of the first in the second.
    update = nested_update(
        optax.sgd(0.1, momentum=0.9), learning_rate=77.0, n_inner=3, inner_update="frozen_state"
    )
    apply = jax.jit(lambda w, state: update.apply(QUADRATIC, w, state)[:2])
    first, state = apply(PAIR(), update.init(PAIR()))
    second, _ = apply(first, state)
    start = np.array([0.6, -0.8])
    np.testing.assert_allclose(first, start * 0.9**3, rtol=1e-12)
    w = start * 0.9**3
    for _ in range(3):
        w = w - 0.1 * (w + 0.9 * start)
    np.testing.assert_allclose(second, w, rtol=1e-12)


INNER_UPDATES = ("frozen_preconditioner", "frozen_state", "sgd", "adam")


@functools.cache
def ends_of_an_affine_and_a_curved_model():
    """Parameters after one update, by (model, inner update, linearization)."""
    ends = {}
    for name, outputs in (("affine", AFFINE), ("curved", jnp.tanh)):
        problem = Problem(outputs, lambda y: -jnp.abs(y - 0.1), log_mean_exp)
        for inner_update in INNER_UPDATES:
            for kind in ("network", "position", "none"):
                update = nested_update(
                    OPTIMIZERS["momentum"],
                    learning_rate=0.1,
                    n_inner=4,
                    inner_update=inner_update,
                    linearization=kind,
                )
                ends[name, inner_update, kind] = lambda w, p=problem, u=update: u.apply(p, w, u.init(w))[0]
    return jax.jit(lambda w: [end(w) for end in ends.values()])(PAIR()), list(ends)


@pytest.mark.parametrize("inner_update", INNER_UPDATES)
def test_linearization_of_an_affine_model_changes_nothing(x64, inner_update):
    ends = {name: np.asarray(w) for w, name in zip(*ends_of_an_affine_and_a_curved_model(), strict=True)}
    real = ends["affine", inner_update, "none"]
    np.testing.assert_allclose(ends["affine", inner_update, "network"], real, rtol=1e-12)
    np.testing.assert_allclose(ends["affine", inner_update, "position"], real, rtol=1e-12)
    assert np.max(np.abs(real - [0.6, -0.8])) > 1e-3
    curved = ends["curved", inner_update, "network"] - ends["curved", inner_update, "none"]
    assert np.max(np.abs(curved)) > 1e-6  # and of another model it does change something


@pytest.mark.parametrize(("tolerance", "n_steps"), [(0.0, 5), (0.2, 3), (10.0, 1)])
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


def test_n_gradients_counts_every_pull_back(x64):
    cases = [
        ({}, False, 4),
        ({"risk_weights": "frozen"}, False, 4),
        ({"inner_update": "frozen_direction"}, False, 1),
        ({"linearization": "none"}, False, 4),
        ({}, True, 5),
        ({"inner_update": "frozen_direction"}, True, 2),
    ]

    def count(w, options, with_surrogate):
        surrogate = (lambda y: -(y**2)) if with_surrogate else None
        problem = Problem(lambda w: w, lambda y: -jnp.abs(y), log_mean_exp, surrogate)
        update = nested_update(optax.sgd(0.1), learning_rate=0.1, n_inner=4, **options)
        return update.apply(problem, w, update.init(w))[2].n_gradients

    counts = jax.jit(lambda w: [count(w, *case[:2]) for case in cases])(PAIR())
    assert [int(n) for n in counts] == [expected for _, _, expected in cases]


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
    update = nested_update(optax.adam(ETA), learning_rate=ETA, inner_update=inner_update)
    history, info = jax.jit(lambda: updated(update, 31))()
    assert float(info.risk[30]) < 0.5 * float(info.risk[0])
    assert jax.tree.structure(history) == jax.tree.structure(PARAMS)
    assert int(info.n_gradients[0]) == 5


@pytest.mark.parametrize(("rate", "rising"), [(1e-3, False), (10.0, True)])
def test_inner_steps_that_raise_the_linearized_objective_are_counted(rate, rising):
    """A parabola: SGD with a rate above 2 moves further away with every step."""
    problem = Problem(outputs=lambda w: w, value=lambda y: jnp.square(y), risk=lambda v: 0.5 * jnp.sum(v))
    update = nested_update(optax.sgd(rate), learning_rate=rate, n_inner=5, inner_update="sgd")
    params, state = jnp.ones(2), update.init(jnp.ones(2))
    for n in range(1, 4):
        params, state, info = update.apply(problem, params, state)
        assert info.n_rises == (4 * n if rising else 0)  # the last of the five is not looked at


def test_rises_are_counted_in_a_row():
    """Two parabolas in turn: SGD overshoots on the steep one and comes nearer on the flat one."""
    update = nested_update(optax.sgd(1.0), learning_rate=1.0, n_inner=3, inner_update="sgd")

    def problem(steepness):
        return Problem(lambda w: w, jnp.square, lambda v: 0.5 * steepness * jnp.sum(v))

    params, state = jnp.ones(2), update.init(jnp.ones(2))
    for steepness, wanted in ((3.0, 2), (3.0, 4), (1.5, 0), (3.0, 2)):
        params, state, info = update.apply(problem(steepness), params, state)
        assert info.n_rises == wanted
