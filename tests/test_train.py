import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dhlnn_jax import hedge, train
from dhlnn_jax.evaluate import hedged_paths
from dhlnn_jax.hedger import make_band_hedger, make_recurrent_hedger, policy_of, rule_policy
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.nested import nested_update, optax_update
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract, contract_pnl, round_trip
from dhlnn_jax.settings import Settings, make_settings

N_STEPS, N_PATHS = 5, 256
HEDGER = make_band_hedger(
    features=("standardised_log_moneyness", "standardised_time_to_maturity"), hidden_sizes=(8,)
)
SAMPLE = make_simulation_sampler(SIMULATORS["gbm"], n_steps=N_STEPS)
CONTRACT = Contract(CLAIMS["european_call"])
ADAM = optax_update(optax.adam(1e-2))


def settings(**changes):
    return make_settings(n_steps=N_STEPS, **(dict(cost_rate=5e-3, risk_aversion=50.0, dt=6 / 365) | changes))


TRACES = []


def make_step(update=ADAM, *, hedger=HEDGER, objective="entropic", contract=CONTRACT):
    return train.make_train_step(
        hedger, SAMPLE, contract, train.OBJECTIVES[objective], update, n_paths=N_PATHS
    )


@functools.cache
def adam_step():
    step = make_step()

    def counted(state, key, settings):
        TRACES.append(1)
        return step(state, key, settings)

    return jax.jit(counted)


@functools.cache
def initial():
    return jax.jit(lambda key: train.init_state(HEDGER, ADAM, key))(jax.random.key(0))


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_identical(a, b):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def differ(a, b):
    return any(np.any(x != y) for x, y in zip(leaves(a), leaves(b), strict=True))


# --- one step -----------------------------------------------------------------------------------------


def test_step_is_reproducible_and_fresh_per_key(key):
    first, info = adam_step()(initial(), key, settings())
    assert_identical((first, info), adam_step()(initial(), key, settings()))
    other, other_info = adam_step()(initial(), jax.random.fold_in(key, 1), settings())
    assert float(info.risk) != float(other_info.risk) and differ(first.params, other.params)
    assert int(first.epoch) == 1 and int(info.n_gradients) == 1


def test_step_is_traced_once_whatever_the_numbers(key):
    adam_step()(initial(), key, settings())
    before = len(TRACES)
    state = initial()
    for epoch, changed in enumerate(
        (settings(), settings(cost_rate=0.1), settings(strike=0.9, volatility=0.4))
    ):
        state, _ = adam_step()(state, jax.random.fold_in(key, epoch), changed)
    assert len(TRACES) == before == 1


NESTED = {
    "default": ({}, 3),
    "as_printed_at_the_position": (
        {"linearization": "position", "cost_surrogate": "squared_difference", "risk_weights": "frozen"},
        4,
    ),
}


@functools.cache
def one_step_of_everything():
    """One step from `initial()` of each objective, each nested update and the recurrent hedger, at once."""

    def nested(**options):
        return nested_update(optax.adam(1e-2), learning_rate=1e-2, n_inner=3, **options)

    def step_of(update, **others):
        def stepped(key, numbers):
            hedger = others.get("hedger", HEDGER)
            w = initial().params if hedger is HEDGER else hedger.init(key)
            state = train.TrainState(w, update.init(w), jnp.asarray(0))
            after, info = make_step(update, **others)(state, key, numbers)
            return after.params, w, info

        return stepped

    steps = {name: step_of(ADAM, objective=name) for name in train.OBJECTIVES}
    steps |= {name: step_of(nested(**options)) for name, (options, _) in NESTED.items()}
    recurrent = make_recurrent_hedger(features=("log_moneyness",), hidden_sizes=(4,))
    steps["recurrent"] = step_of(nested(linearization="position"), hedger=recurrent)

    def everything(key, numbers):
        paths, _ = SAMPLE(key, N_PATHS, numbers)
        ratios = jax.vmap(policy_of(HEDGER).hedge_ratio, (None, 0, None))(initial().params, paths, numbers)
        return {name: step(key, numbers) for name, step in steps.items()}, paths.spot, ratios

    initial()  # kept for all tests, so not to be made while tracing
    results, *paths = jax.jit(everything)(jax.random.key(8), settings(tail_prob=0.25))
    return results, *(np.asarray(x, float) for x in paths)


@pytest.mark.parametrize("objective", ["entropic", "expected_shortfall", "quadratic"])
def test_step_reports_the_chosen_risk_of_its_own_paths(objective):
    results, spot, held = one_step_of_everything()
    trades = np.abs(np.diff(held, axis=1, prepend=0.0))
    gain = (held * np.diff(spot, axis=1)).sum(1) - 5e-3 * (spot[:, :-1] * trades).sum(1)
    pnl = gain - np.maximum(spot[:, -1] - 1, 0)
    expected = {
        "entropic": math.log(np.mean(np.exp(-50 * pnl))) / 50,
        "expected_shortfall": -np.sort(pnl)[:64].mean(),
        "quadratic": -pnl.mean() + 25 * pnl.var(),
    }
    info = results[objective][2]
    assert float(info.risk) == pytest.approx(expected[objective], rel=1e-3)
    assert float(info.turnover) == pytest.approx(trades.sum(1).mean(), rel=1e-4)
    assert float(info.gradient_norm) > 0
    assert len({round(risk, 5) for risk in expected.values()}) == 3  # the three can be told apart


def test_step_sweeps_settings_by_vmap(key):
    rates = (0.0, 2e-2)
    axes = jax.tree.map(lambda _: None, settings())._replace(cost_rate=0)
    both = settings()._replace(cost_rate=jnp.array(rates))
    swept, info = jax.jit(jax.vmap(make_step(), in_axes=(None, None, axes)))(initial(), key, both)
    for i, rate in enumerate(rates):
        alone, alone_info = adam_step()(initial(), key, settings(cost_rate=rate))
        np.testing.assert_allclose(info.risk[i], alone_info.risk, rtol=1e-5)
        for x, y in zip(leaves(swept.params), leaves(alone.params), strict=True):
            np.testing.assert_allclose(x[i], y, atol=2e-5)
    assert info.risk[1] > info.risk[0] + 1e-3 and isinstance(axes, Settings)


def test_dead_band_neither_trades_nor_learns(key):
    state = initial()
    params = jax.tree.map(lambda w: w, state.params)
    params["params"]["Perceptron_0"]["Dense_1"]["bias"] = jnp.array([50.0, 50.0])
    dead, info = adam_step()(state._replace(params=params), key, settings())
    assert float(info.turnover) == 0.0 and float(info.gradient_norm) == 0.0
    assert_identical(dead.params, params)
    alive = adam_step()(state, key, settings())[1]
    assert float(alive.turnover) > 0.1 and float(alive.gradient_norm) > 0


def test_dead_edge_only_buys_and_does_not_learn_to_sell(key):
    """The upper edge out of reach: what the notes of a run call trading one way only."""
    state = initial()
    params = jax.tree.map(lambda w: w, state.params)
    params["params"]["Perceptron_0"]["Dense_1"]["bias"] = jnp.array([0.0, 50.0])
    step, of_layer = adam_step(), lambda params: params["params"]["Perceptron_0"]["Dense_1"]
    half_dead, info = step(state._replace(params=params), key, settings())
    assert float(info.turnover) > 0.1 and float(info.gradient_norm) > 0
    for before, after in zip(leaves(of_layer(params)), leaves(of_layer(half_dead.params)), strict=True):
        assert np.array_equal(before[..., 1], after[..., 1]) and not np.any(before[..., 0] == after[..., 0])
    paths = SAMPLE(key, 100, settings())[0]
    for own, turns_back in ((params, False), (state.params, True)):
        held = jax.vmap(lambda path, own=own: policy_of(HEDGER).hedge_ratio(own, path, settings()))(paths)
        assert (float(jnp.mean(jax.vmap(round_trip)(held))) > 0.01) == turns_back


@pytest.mark.parametrize("linearization", ["network", "position", "none"])
def test_outputs_that_are_not_numbers_are_seen_wherever_the_problem_is_cut(key, linearization):
    update = nested_update(optax.adam(1e-2), learning_rate=1e-2, linearization=linearization)
    step, params = jax.jit(make_step(update)), initial().params
    assert bool(step(train.first_state(params, update), key, settings())[1].finite)
    broken = jax.tree.map(lambda w: w * jnp.nan, params)
    info = step(train.first_state(broken, update), key, settings())[1]
    assert not bool(info.finite) and bool(jnp.isnan(info.risk))


# --- nested -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NESTED)
def test_nested_step_reports_the_true_risk_and_moves(name):
    results = one_step_of_everything()[0]
    (after, before, info), (_, _, plain) = results[name], results["entropic"]
    for field in ("risk", "gradient_norm", "turnover"):  # those of the same batch before the update
        assert float(getattr(info, field)) == pytest.approx(float(getattr(plain, field)), rel=1e-3), field
    assert int(info.n_gradients) == NESTED[name][1]
    assert differ(after, before) and all(np.all(np.isfinite(x)) for x in leaves(after))


def test_nested_step_of_the_recurrent_hedger_cut_at_the_position():
    after, before, info = one_step_of_everything()[0]["recurrent"]
    assert float(info.gradient_norm) > 0 and float(info.turnover) > 0.1
    assert differ(after, before) and all(np.all(np.isfinite(x)) for x in leaves(after))


# --- the loop -----------------------------------------------------------------------------------------


def test_fit_resumes_where_it_stopped(key):
    fit = functools.partial(train.fit, adam_step(), key=key, settings=settings())
    at_once = fit(state=initial(), n_epochs=5)
    halfway = fit(state=initial(), n_epochs=2)
    assert int(halfway.state.epoch) == 2 and differ(halfway.state.params, at_once.state.params)
    assert_identical(fit(state=halfway.state, n_epochs=5).state, at_once.state)


def test_fit_keeps_the_best_epoch_and_the_last(key):
    seen = {}

    def on_epoch(epoch, state, info):
        seen[epoch] = (state, info)
        return {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0}[epoch]

    result = train.fit(adam_step(), initial(), key, settings(), n_epochs=4, on_epoch=on_epoch)
    assert sorted(seen) == [1, 2, 3, 4] and [int(s.epoch) for s, _ in seen.values()] == [1, 2, 3, 4]
    assert result.best_epoch == 2 and result.best_risk == 1.0
    assert_identical(result.best_params, seen[2][0].params)
    assert_identical(result.state, seen[4][0])


def test_fit_gives_every_epoch_its_own_key(key):
    def keys_of(state, n_epochs):
        keys = []

        def step(state, key, settings):
            keys.append(tuple(jax.random.key_data(key).tolist()))
            return state._replace(epoch=state.epoch + 1), SimpleNamespace(finite=True)

        train.fit(step, state, key, settings(), n_epochs=n_epochs)
        return keys

    keys = keys_of(initial(), 5)
    assert len(set(keys)) == 5
    assert keys_of(initial()._replace(epoch=jnp.asarray(2)), 5) == keys[2:]  # by epoch, not by call


def test_fit_without_validation_keeps_the_last(key):
    result = train.fit(adam_step(), initial(), key, settings(), n_epochs=2, on_epoch=lambda *_: None)
    assert result.best_epoch == 2
    assert_identical(result.best_params, result.state.params)


@pytest.mark.parametrize("risk", [math.nan, math.inf])
def test_fit_stops_at_a_validation_risk_that_is_no_number(key, risk):
    on_epoch = lambda epoch, *_: risk if epoch == 2 else 0.1  # noqa: E731
    with pytest.raises(FloatingPointError, match="epoch 2"):
        train.fit(adam_step(), initial(), key, settings(), n_epochs=3, on_epoch=on_epoch)


@pytest.mark.parametrize("n_epochs, said", [(1, "after epoch 1"), (3, "in epoch 2")])
def test_fit_stops_where_parameters_are_no_numbers_and_so_is_what_they_hedge(key, n_epochs, said):
    """After the first step they are not; the second one sees it in the outputs, and no step the last time."""
    broken = jax.jit(make_step(optax_update(optax.adam(float("nan")))))
    with pytest.raises(FloatingPointError, match=f"not finite {said}"):
        train.fit(broken, initial(), key, settings(), n_epochs=n_epochs)
    paths = SAMPLE(key, 100, settings())[0]
    for params, sound in ((initial().params, True), (broken(initial(), key, settings())[0].params, False)):
        money = hedged_paths(policy_of(HEDGER), params, paths, CONTRACT, settings())
        assert bool(jnp.isfinite(train.OBJECTIVES["entropic"](money.pnl, settings()))) == sound


def test_fit_stops_at_outputs_of_the_last_epoch_that_are_no_numbers(key):
    def step(state, key, settings):
        return state._replace(epoch=state.epoch + 1), SimpleNamespace(finite=state.epoch < 1)

    train.fit(step, initial(), key, settings(), n_epochs=1)
    with pytest.raises(FloatingPointError, match="after epoch 2"):
        train.fit(step, initial(), key, settings(), n_epochs=2)


def test_training_beats_every_hedger_that_it_must_beat(key):
    # expensive trading: the band must widen to beat the delta, and must not die to beat no hedge
    numbers = settings(cost_rate=1e-2)
    trained = train.fit(adam_step(), initial(), key, numbers, n_epochs=80).state.params
    paths, _ = SAMPLE(jax.random.key(99), 4000, numbers)

    def entropic(policy, params=None, sign=1.0):
        one = lambda path: contract_pnl(  # noqa: E731
            CONTRACT, path, sign * policy.hedge_ratio(params, path, numbers), numbers
        )
        pnl = np.asarray(jax.jit(jax.vmap(one))(paths), float)
        return math.log(np.mean(np.exp(-50 * pnl))) / 50

    policy = policy_of(HEDGER)
    risk = entropic(policy, trained)
    assert risk < entropic(policy, initial().params) - 1e-3  # untrained
    assert risk < entropic(rule_policy(hedge.delta_hedge)) - 1e-3
    assert risk < entropic(rule_policy(hedge.no_hedge)) - 1e-2
    assert risk < entropic(policy, trained, sign=-1.0) - 1e-2


def test_block_is_the_loop_and_is_traced_once_whatever_its_length(key):
    at_once = train.fit(adam_step(), initial(), key, settings(), n_epochs=4)
    whole, traces = train.make_train_block(make_step(), max_epochs=3), []

    def counted(*arguments):
        traces.append(1)
        return whole(*arguments)

    block, infos, state = jax.jit(counted), [], initial()
    for n_epochs in (3, 0, 1):
        state, info = block(state, key, settings(), n_epochs)
        infos.append(jax.tree.map(lambda rows, n=n_epochs: rows[:n], info))
        assert info.risk.shape == (3,) and not info.finite[n_epochs:].any()
    assert len(traces) == 1 and int(state.epoch) == 4
    for x, y in zip(leaves(state.params), leaves(at_once.state.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    risks = []
    train.fit(
        adam_step(), initial(), key, settings(), n_epochs=4,
        on_epoch=lambda epoch, state, info: risks.append(float(info.risk)),
    )  # fmt: skip
    np.testing.assert_allclose(np.concatenate([info.risk for info in infos]), risks, rtol=1e-5)


def test_block_stops_at_its_most_epochs(key):
    block = jax.jit(train.make_train_block(make_step(), max_epochs=2))
    assert int(block(initial(), key, settings(), 5)[0].epoch) == 2


# --- rows in chunks, paths shared by devices ----------------------------------------------------------

RECURRENT = make_recurrent_hedger(features=("log_moneyness", "time_to_maturity"), hidden_sizes=(8,))
UPDATES = {
    "adam": ADAM,
    "nested": nested_update(optax.adam(1e-3), learning_rate=1e-3, n_inner=3),
    "position": nested_update(optax.adam(1e-3), learning_rate=1e-3, n_inner=3, linearization="position"),
    "as_printed": nested_update(
        optax.adam(1e-3), learning_rate=1e-3, n_inner=2, cost_surrogate="squared_difference",
        risk_weights="frozen",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "hedger, update",
    [(HEDGER, "adam"), (HEDGER, "nested"), (HEDGER, "as_printed"), (RECURRENT, "position")],
    ids=["adam", "nested", "as_printed", "recurrent"],
)
def test_step_in_chunks_is_the_step_at_once(x64, hedger, update):
    after = []
    for chunk_size in (None, 96):  # neither divides 256 paths nor 1,280 decisions
        step = train.make_train_step(
            hedger, SAMPLE, CONTRACT, train.OBJECTIVES["entropic"], UPDATES[update], n_paths=N_PATHS,
            chunk_size=chunk_size,
        )  # fmt: skip
        state = train.init_state(hedger, UPDATES[update], jax.random.key(0))
        after.append(jax.jit(step)(state, jax.random.key(1), settings()))
    for plain, chunked in zip(leaves(after[0]), leaves(after[1]), strict=True):
        np.testing.assert_allclose(chunked, plain, rtol=1e-5, atol=1e-7)  # Linen keeps float32


def test_step_in_chunks_needs_a_fraction_of_the_memory():
    wide = make_band_hedger(features=("log_moneyness", "time_to_maturity"), hidden_sizes=(64, 64))
    peak = []
    for chunk_size in (None, 500):
        step = train.make_train_step(
            wide, SAMPLE, CONTRACT, train.OBJECTIVES["entropic"], ADAM, n_paths=10_000, chunk_size=chunk_size
        )
        state = jax.eval_shape(lambda key: train.init_state(wide, ADAM, key), jax.random.key(0))
        compiled = jax.jit(step).lower(state, jax.random.key(1), settings()).compile()
        peak.append(compiled.memory_analysis().temp_size_in_bytes)
    assert peak[1] < 0.3 * peak[0] and peak[1] < 8e6
