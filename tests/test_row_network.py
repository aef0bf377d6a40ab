"""A network on a batch: rows that are added where all go at once change nothing, and make their sums even."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import make_settings
from dhlnn_jax.hedger import batched_inputs, make_band_hedger, make_recurrent_hedger
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.row_network import RowNetwork

FEATURES = ("log_moneyness", "time_to_maturity")
BAND = make_band_hedger(features=FEATURES, hidden_sizes=(8,))
RECURRENT = make_recurrent_hedger(features=FEATURES, hidden_sizes=(8,))
N_PATHS, N_STEPS = 30, 5
SETTINGS = make_settings(n_steps=N_STEPS, cost_rate=5e-3, dt=6 / 365)


def network_of(hedger, n_paths=N_PATHS):
    sample = make_simulation_sampler(SIMULATORS["gbm"], n_steps=N_STEPS)
    paths = sample(jax.random.key(0), n_paths, SETTINGS)[0]
    features, anchor = batched_inputs(hedger, paths, SETTINGS)
    return RowNetwork(hedger, features, anchor, None, None), hedger.init(jax.random.key(1))


def plain(network, params):
    return jax.vmap(network.hedger.outputs, (None, 0, 0))(params, network.features, network.anchor)


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("hedger", [BAND, RECURRENT], ids=["band", "recurrent"])
def test_all_at_once_is_the_network_with_its_derivatives(hedger):
    network, params = network_of(hedger)
    outputs = plain(network, params)
    tangent = jax.tree.map(jnp.ones_like, params)
    cotangent = jax.random.normal(jax.random.key(2), outputs.shape)
    wanted_jvp = jax.jvp(lambda w: plain(network, w), (params,), (tangent,))[1]
    wanted_vjp = jax.vjp(lambda w: plain(network, w), params)[1](cotangent)[0]
    assert max(float(jnp.abs(x).max()) for x in (wanted_jvp, *jax.tree.leaves(wanted_vjp))) > 0.1

    assert_close(network.outputs(params), outputs)
    assert_close(jax.vjp(network.outputs, params)[1](cotangent)[0], wanted_vjp)
    at = network.linearize(params)
    assert_close((at.value, at.jvp(tangent), at.vjp(cotangent)), (outputs, wanted_jvp, wanted_vjp))


def test_moments_are_sums_over_the_decisions():
    network, params = network_of(BAND)
    x = network.inputs(params)
    a, b = jax.random.normal(jax.random.key(3), (2, N_PATHS, N_STEPS, 2))
    linear, quadratic = network.row_moments(x, a, b)
    assert_close(linear, np.einsum("pto,pti->oi", a, x))
    assert_close(quadratic, np.einsum("pto,pti,ptj->oij", b, x, x))


def test_moments_are_summed_in_full_precision_on_every_device():
    network, params = network_of(BAND)
    x, ones = network.inputs(params), jnp.ones((N_PATHS, N_STEPS, 2))
    products = str(jax.make_jaxpr(network.row_moments)(x, ones, ones)).split("dot_general[")[1:]
    assert len(products) == 2
    for product in products:
        assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in product.split("\n    ]")[0]


@pytest.mark.parametrize("n_paths, n_rows", [(30, 1024), (205, 2048)], ids=["150", "1025"])
def test_rows_at_once_are_made_up_to_a_multiple(n_paths, n_rows):
    seen = []

    def outputs(params, features, anchor):
        seen.append(features.shape)
        return BAND.outputs(params, features, anchor)

    network, params = network_of(BAND, n_paths)
    spied = network._replace(hedger=BAND._replace(outputs=outputs))
    assert jax.eval_shape(spied.outputs, params).shape == (n_paths, N_STEPS, 2)
    assert seen == [(n_rows, len(FEATURES))]
