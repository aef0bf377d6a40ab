"""Training by pieces is training by rows; what cannot go by pieces goes by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dhlnn_jax import piece_network, train
from dhlnn_jax.ablation import seeing_noise
from dhlnn_jax.hedger import batched_inputs, make_band_hedger, make_recurrent_hedger
from dhlnn_jax.market import SIMULATORS, MarketPath, make_simulation_sampler
from dhlnn_jax.nested import nested_update, optax_update
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.piece_network import PieceNetwork, has_pieces
from dhlnn_jax.pnl import Contract
from dhlnn_jax.row_network import RowNetwork
from dhlnn_jax.settings import make_settings

N_STEPS, N_PATHS, CHUNK = 6, 300, 50
SAMPLE = make_simulation_sampler(SIMULATORS["gbm"], n_steps=N_STEPS)
SETTINGS = make_settings(n_steps=N_STEPS, cost_rate=5e-3, risk_aversion=50.0, dt=5 / 365, strike=1.1)
BENT = ("standardised_log_moneyness", "standardised_time_to_maturity", "deviations_from_strike")
HEDGERS = {
    "bent features": make_band_hedger(features=BENT, hidden_sizes=(8, 8)),
    "prior": make_band_hedger(features=BENT, hidden_sizes=(8,), prior="whalley_wilmott"),
    "plain features": make_band_hedger(
        features=("log_moneyness", "time_to_maturity", "volatility"), hidden_sizes=(12, 5, 8)
    ),
}
UPDATES = {
    "adam": optax_update(optax.adam(1e-3)),
    "nested": nested_update(optax.adam(1e-3), learning_rate=1e-3, n_inner=3),
    "as_printed": nested_update(
        optax.adam(1e-3), learning_rate=1e-3, n_inner=3, cost_surrogate="squared_difference",
        risk_weights="frozen",
    ),
    "position": nested_update(optax.adam(1e-3), learning_rate=1e-3, n_inner=3, linearization="position"),
    "none": nested_update(optax.adam(1e-3), learning_rate=1e-3, n_inner=3, linearization="none"),
}  # fmt: skip


def make_step(hedger, update, *, by_pieces, chunk_size=CHUNK):
    contract = Contract(CLAIMS["european_call"])
    return train.make_train_step(
        hedger, SAMPLE, contract, train.OBJECTIVES["entropic"], update, n_paths=N_PATHS,
        chunk_size=chunk_size, by_pieces=by_pieces,
    )  # fmt: skip


def perturbed(params):
    """Parameters without zeros, as after some training."""
    key = jax.random.key(7)
    flat, tree = jax.tree.flatten(params)
    noise = [0.1 * jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in enumerate(flat)]
    return jax.tree.unflatten(tree, [x + e.astype(x.dtype) for x, e in zip(flat, noise, strict=True)])


def steps_by_both(hedger, update, chunk_size=CHUNK):
    """(state, info) after two epochs by rows and by pieces, from perturbed parameters."""
    params = perturbed(hedger.init(jax.random.key(0)))
    both = []
    for by_pieces in (False, True):
        step = jax.jit(make_step(hedger, update, by_pieces=by_pieces, chunk_size=chunk_size))
        state = train.first_state(params, update)
        for epoch in range(2):
            state, info = step(state, jax.random.key(epoch), SETTINGS)
        both.append((state, info))
    return both


def assert_same(given, wanted, rtol, atol):
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def network_on_paths(hedger, chunk_size=CHUNK):
    paths = SAMPLE(jax.random.key(3), N_PATHS, SETTINGS)[0]
    rows = RowNetwork(hedger, *batched_inputs(hedger, paths, SETTINGS), chunk_size, None)
    return rows, PieceNetwork(rows, paths, SETTINGS), perturbed(hedger.init(jax.random.key(0)))


@pytest.mark.parametrize("update", UPDATES)
def test_steps_by_pieces_are_the_steps_by_rows(update):
    by_rows, by_pieces = steps_by_both(HEDGERS["bent features"], UPDATES[update])
    assert_same(by_pieces, by_rows, 2e-4, 2e-6)
    assert np.abs(by_rows[1].turnover) > 0.1  # somebody trades


@pytest.mark.parametrize("chunk_size", [CHUNK, 10_000])
@pytest.mark.parametrize("hedger", ["prior", "plain features"])
def test_steps_by_pieces_are_the_steps_by_rows_of_other_networks(hedger, chunk_size):
    by_rows, by_pieces = steps_by_both(HEDGERS[hedger], UPDATES["nested"], chunk_size)
    assert_same(by_pieces, by_rows, 2e-4, 2e-6)


@pytest.mark.parametrize("hedger", HEDGERS)
def test_values_tangents_and_gradients_in_float64(x64, hedger):
    rows, pieces, params = network_on_paths(HEDGERS[hedger])
    params = jax.tree.map(lambda x: x.astype("float64"), params)
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(N_PATHS, N_STEPS, 2)))
    tangent = jax.tree.map(jnp.cos, params)

    def four(network):
        at = network.linearize(params)
        of_outputs = jax.vjp(network.outputs, params)[1](cotangent)[0]
        return at.value, network.outputs(params), at.jvp(tangent), at.vjp(cotangent), of_outputs

    given, wanted = jax.jit(lambda: four(pieces))(), jax.jit(lambda: four(rows))()
    assert pieces._cut(params).fits
    assert_same(given, wanted, 1e-9, 1e-9)


def test_points_go_through_instead_of_paths():
    seen = []

    def counted(params, features, anchor):
        jax.debug.callback(lambda x: seen.append(len(x)), features)
        return hedger.outputs(params, features, anchor)

    hedger = HEDGERS["bent features"]
    rows, pieces, params = network_on_paths(hedger._replace(outputs=counted))
    for network, wanted in ((rows, N_PATHS), (pieces, 2 * (3 + 2 * 16))):  # three first pieces, two a unit
        seen.clear()
        jax.block_until_ready(jax.jit(network.outputs)(params))
        jax.effects_barrier()
        assert wanted * N_STEPS <= sum(seen) < wanted * N_STEPS + CHUNK, network


def test_memory_of_a_step_does_not_grow():
    peak, update = [], UPDATES["nested"]
    hedger = make_band_hedger(features=BENT, hidden_sizes=(64, 64))
    state = jax.eval_shape(lambda key: train.init_state(hedger, update, key), jax.random.key(0))
    for by_pieces in (False, True):
        step = train.make_train_step(
            hedger, SAMPLE, Contract(CLAIMS["european_call"]), train.OBJECTIVES["entropic"], update,
            n_paths=20_000, chunk_size=500, by_pieces=by_pieces,
        )  # fmt: skip
        compiled = jax.jit(step).lower(state, jax.random.key(1), SETTINGS).compile()
        peak.append(compiled.memory_analysis().temp_size_in_bytes)
    assert peak[1] < 1.5 * peak[0] and peak[1] < 40e6, peak


def test_without_room_for_all_pieces_rows_go_through(monkeypatch):
    """Knots that are wrong, but said not to be all."""
    wrong = lambda layers, first, features: (first, jnp.asarray(False))  # noqa: E731
    monkeypatch.setattr(piece_network, "find_knots", wrong)
    for update in ("adam", "nested"):
        by_rows, by_pieces = steps_by_both(HEDGERS["bent features"], UPDATES[update])
        assert_same(by_pieces, by_rows, 2e-5, 1e-7)
    # and were they believed, they would be seen
    monkeypatch.setattr(piece_network, "find_knots", lambda *of: (wrong(*of)[0], jnp.asarray(True)))
    rows, pieces, params = network_on_paths(HEDGERS["bent features"])
    assert np.abs(pieces.outputs(params) - rows.outputs(params)).max() > 1e-2


def test_what_has_pieces():
    n_points = 2 * (3 + 2 * 16)  # three first pieces, two a unit
    paths = MarketPath(jnp.ones((n_points, N_STEPS + 1)))
    band = HEDGERS["bent features"]
    assert has_pieces(band, paths, SETTINGS)
    assert not has_pieces(band, MarketPath(paths.spot[1:]), SETTINGS)
    assert not has_pieces(band, paths._replace(variance=paths.spot), SETTINGS)
    assert not has_pieces(band, paths._replace(half_spread=paths.spot), SETTINGS)
    assert not has_pieces(seeing_noise(band), paths, SETTINGS)
    assert not has_pieces(make_recurrent_hedger(features=BENT, hidden_sizes=(8, 8)), paths, SETTINGS)
    with_maximum = make_band_hedger(features=(*BENT, "max_log_moneyness"), hidden_sizes=(8, 8))
    assert not has_pieces(with_maximum, paths, SETTINGS)


def test_pieces_need_chunks():
    with pytest.raises(ValueError, match="by_pieces needs a chunk_size"):
        make_step(HEDGERS["prior"], UPDATES["adam"], by_pieces=True, chunk_size=None)


def test_vmap_over_settings_and_parameters_equals_a_loop():
    hedger, update = HEDGERS["bent features"], UPDATES["adam"]
    step = make_step(hedger, update, by_pieces=True)
    params = perturbed(hedger.init(jax.random.key(0)))
    states = [train.first_state(jax.tree.map(lambda x, f=f: f * x, params), update) for f in (1.0, 1.5)]
    costs, keys = jnp.array([1e-3, 5e-3]), jax.random.split(jax.random.key(1), 2)
    one = jax.jit(lambda state, key, cost: step(state, key, SETTINGS._replace(cost_rate=cost)))
    loop = jax.tree.map(lambda *x: jnp.stack(x), *map(one, states, keys, costs))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    assert_same(jax.jit(jax.vmap(one))(stacked, keys, costs), loop, 2e-4, 2e-6)


def test_hedgers_without_pieces_are_trained_by_rows():
    hedger = make_band_hedger(features=("log_moneyness", "max_log_moneyness"), hidden_sizes=(8,))
    by_rows, by_pieces = steps_by_both(hedger, UPDATES["adam"])
    for a, b in zip(jax.tree.leaves(by_rows), jax.tree.leaves(by_pieces), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_network_that_is_not_finite_is_seen():
    hedger, update = HEDGERS["bent features"], UPDATES["adam"]
    params = perturbed(hedger.init(jax.random.key(0)))
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), params)
    step = jax.jit(make_step(hedger, update, by_pieces=True))
    for these, finite in ((params, True), (broken, False)):
        info = step(train.first_state(these, update), jax.random.key(0), SETTINGS)[1]
        assert bool(info.finite) is finite
