"""The bounds of appendix D beside what they are meant to bound, by hand and measured."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import appendix_d, nonlinearity
from dhlnn_jax.model import BandNetwork

RNG = np.random.default_rng(4)


def one_unit_layers(a, w1, w2):
    """a (w2 (w1 x + b1)^+ + b2)^+, twice, with b1 = b2 = 0."""
    layer = lambda k, n: {"kernel": jnp.full((1, n), k), "bias": jnp.zeros(n)}  # noqa: E731
    return {
        "params": {"Perceptron_0": {"Dense_0": layer(w1, 1), "Dense_1": layer(w2, 1), "Dense_2": layer(a, 2)}}
    }


@functools.partial(jax.jit, static_argnums=3)
def measured_and_printed(params, x, key, hidden_sizes=(1, 1)):
    """Gradient and Hessian norms of the hidden layers beside (66) and (93), on the rows x."""
    outputs = lambda w: BandNetwork(hidden_sizes).apply(w, x)  # noqa: E731
    fn, hidden = appendix_d.output_layer_fixed(outputs, params)
    constants = appendix_d.perceptron_constants(params, x)
    return (
        nonlinearity.gradient_norms(fn, hidden),
        nonlinearity.hessian_norms(fn, hidden, key),
        constants,
        appendix_d.gradient_bound(constants),
        appendix_d.hessian_bound(constants),
    )


def test_93_is_no_bound_by_hand(x64, key):
    # f = a w2 (w1 x + b1) + a b2 where positive: the second derivatives are a x for (w1, w2) and a for
    # (b1, w2), all others 0, so the norm is a sqrt(x^2 + 1) = 0.5 sqrt(10) > 0.5 = A.
    params, x = one_unit_layers(0.5, 1.0, 1.0), jnp.array([[3.0]])
    gradients, hessians, constants, _, printed = measured_and_printed(params, x, key)
    assert printed == 0.5 and constants.n_hidden == 2
    np.testing.assert_allclose(hessians, 0.5 * np.sqrt(10.0), rtol=1e-6)
    # df/dw1 = a w2 x, df/db1 = a w2, df/dw2 = a w1 x, df/db2 = a
    np.testing.assert_allclose(gradients, 0.5 * np.sqrt(9 + 1 + 9 + 1), rtol=1e-12)


def test_66_is_no_bound_by_hand(x64, key):
    # with w2 = 10 and w1 = 0.1: df/dw1 = 0.5 10 3 = 15, while A (H + 1) = 0.5 (3 + 1) = 2
    params, x = one_unit_layers(0.5, 0.1, 10.0), jnp.array([[3.0]])
    gradients, _, constants, printed, _ = measured_and_printed(params, x, key)
    assert float(constants.activation_norm) == 3.0 and printed == 2.0
    np.testing.assert_allclose(gradients, 0.5 * np.sqrt(30**2 + 10**2 + 0.3**2 + 1), rtol=1e-12)


def test_93_fails_for_the_band_network_as_it_is_initialized(x64, key):
    network, x = BandNetwork((8, 8)), jnp.asarray(4.0 * RNG.normal(size=(6, 3)))
    params = jax.tree.map(lambda w: w.astype(float), jax.jit(network.init)(key, x))
    _, hessians, _, _, printed = measured_and_printed(params, x, key, (8, 8))
    assert np.max(hessians) > 1.2 * printed


def test_92_fails_within_one_layer(x64):
    # f = tanh(w x + b): d2f / dw db = tanh''(w x + b) x
    second = jax.jit(jax.hessian(lambda wb: jnp.tanh(wb[0] * 2.0 + wb[1])))(jnp.array([0.3, 0.1]))
    t = np.tanh(0.7)
    assert float(second[0, 1]) == pytest.approx(-2 * t * (1 - t**2) * 2.0) and abs(second[0, 1]) > 1.0


def test_perceptron_constants_by_hand(strict_x64):
    # rows (3, 4) and (0, 1); the first layer gives (7, 0) and (1, 0), so H = 7; A = sqrt(2) 0.3
    with jax.numpy_rank_promotion("allow"):
        kernels = ([[1.0, -1.0], [1.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.1, -0.3], [0.2, 0.0]])
        layers = {f"Dense_{i}": {"kernel": jnp.array(k), "bias": jnp.zeros(2)} for i, k in enumerate(kernels)}
        params = {"params": {"Perceptron_0": layers}}
        found = appendix_d.perceptron_constants(params, jnp.array([[3.0, 4.0], [0.0, 1.0]]))
        assert float(found.output_weight) == pytest.approx(0.3 * np.sqrt(2)) and found.n_hidden == 2
        assert float(found.activation_norm) == 7.0
        # the printed expressions in full, with a curvature
        curved = found._replace(output_weight=jnp.array(2.0), slope=3.0, curvature=0.5)
        assert float(appendix_d.gradient_bound(curved)) == 2.0 * 9.0 * 8.0
        assert float(appendix_d.hessian_bound(curved)) == 2.0 * (0.5 * 49.0 + 3.0) ** 2
