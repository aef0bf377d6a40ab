import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax.model import BandNetwork, HedgeNetwork, Perceptron


def test_perceptron_by_hand():
    network = Perceptron((2,), 1)
    params = {
        "params": {
            "Dense_0": {"kernel": jnp.array([[1.0, -1.0], [2.0, 0.5]]), "bias": jnp.array([0.5, 0.25])},
            "Dense_1": {"kernel": jnp.array([[3.0], [10.0]]), "bias": jnp.array([-1.0])},
        }
    }
    # x = (1, -1): hidden (1 - 2 + 0.5, -1 - 0.5 + 0.25) -> both negative; x = (1, 2): (5.5, 0.25)
    output = network.apply(params, jnp.array([[1.0, -1.0], [1.0, 2.0]]))
    np.testing.assert_allclose(output, [[-1.0], [3 * 5.5 + 10 * 0.25 - 1.0]], rtol=1e-6)


@pytest.mark.parametrize("batch", [(), (5,), (7, 5)])
def test_perceptron_is_flax_dense_layers_with_their_params_and_gradients(key, batch):
    class Rows(nn.Module):
        @nn.compact
        def __call__(self, x):
            for size in (8, 6):
                x = nn.relu(nn.Dense(size)(x))
            return nn.Dense(2)(x)

    rows, network, x = Rows(), Perceptron((8, 6), 2), jax.random.normal(key, (*batch, 3))
    params = rows.init(key, x)
    assert jax.tree.structure(params) == jax.tree.structure(network.init(key, x))
    jax.tree.map(np.testing.assert_array_equal, params, network.init(key, x))
    gradient = lambda net: jax.grad(lambda w: jnp.sum(jnp.sin(net.apply(w, x))))(params)  # noqa: E731
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    close(network.apply(params, x), rows.apply(params, x))
    jax.tree.map(close, gradient(network), gradient(rows))


@pytest.mark.parametrize("batch", [(), (5,), (7, 5)])
def test_network_shapes(key, batch):
    features, previous = jnp.ones((*batch, 3)), jnp.ones(batch)
    band, hedge = BandNetwork((8,)), HedgeNetwork((8,))
    band_outputs, band_params = jax.eval_shape(band.init_with_output, key, features)
    hedge_outputs, _ = jax.eval_shape(hedge.init_with_output, key, features, previous)
    assert band_outputs.shape == (*batch, 2)
    assert hedge_outputs.shape == batch
    # parameters know the features but not the batch
    assert band_params == jax.eval_shape(band.init, key, jnp.ones((1, 3)))


def test_hidden_sizes_are_the_layers(key):
    params = jax.eval_shape(BandNetwork((5, 7, 4)).init, key, jnp.ones((1, 3)))
    kernels = sorted(x.shape for x in jax.tree.leaves(params) if x.ndim == 2)
    assert kernels == sorted([(3, 5), (5, 7), (7, 4), (4, 2)])
    default = jax.eval_shape(BandNetwork().init, key, jnp.ones((1, 3)))
    assert [x.shape for x in jax.tree.leaves(default) if x.ndim == 2].count((64, 64)) == 3


@pytest.mark.parametrize("network", [BandNetwork((64, 64)), HedgeNetwork((64, 64))])
def test_outputs_start_near_zero(key, network):
    features = jnp.asarray(np.random.default_rng(0).normal(size=(256, 3)), jnp.float32)
    inputs = (features,) if isinstance(network, BandNetwork) else (features, jnp.zeros(256))
    key_init = jax.random.fold_in(key, 1)
    outputs = network.init_with_output(key_init, *inputs)[0]
    assert 0 < float(jnp.std(outputs)) < 0.15
    # a tenth of what the usual initial weights give, exactly
    usual = network.clone(output_scale=1.0)
    unscaled = usual.init_with_output(key_init, *inputs)[0]
    np.testing.assert_allclose(10 * outputs, unscaled, rtol=1e-3, atol=1e-5)


def test_band_network_sees_one_decision_at_a_time(key):
    network, features = BandNetwork((8, 8)), jnp.arange(12.0).reshape(4, 3) / 12
    params = network.init(key, features)
    other = features.at[2].add(1.0)
    changed = np.any(np.asarray(network.apply(params, features) != network.apply(params, other)), axis=-1)
    assert changed.tolist() == [False, False, True, False]


def test_hedge_network_depends_on_previous(key):
    network, features = HedgeNetwork((8, 8)), jnp.ones((1, 3))
    params = network.init(key, features, jnp.zeros(1))
    slope = jax.grad(lambda h: network.apply(params, features, h)[0])(jnp.array([0.3]))
    assert abs(float(slope[0])) > 1e-4
    assert float(network.apply(params, features, jnp.array([0.3]))[0]) != float(
        network.apply(params, features, jnp.array([0.9]))[0]
    )
