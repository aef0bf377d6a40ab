"""Linearization errors, gradient drift and norms of any function of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dhlnn_jax import nonlinearity

RNG = np.random.default_rng(4)


def tanh_network(params):
    """Pytree in, pytree of 5 numbers out, smooth."""
    hidden = jnp.tanh(jnp.linspace(-1.0, 1.0, 4)[:, None] * params["in"] + params["shift"])
    return {"fit": hidden @ params["out"], "sum": jnp.sum(params["out"] ** 3)}


def tanh_params():
    return {name: jnp.asarray(RNG.normal(size=3)) for name in ("in", "shift", "out")}


# --- linearization error ------------------------------------------------------------------------------


def test_linearization_error_of_a_square_by_hand(x64):
    # f = (w^2, 10 w) at 3 along 2: f - f_lin = (4 h^2, 0), f - f_0 = (12 h + 4 h^2, 20 h)
    fn = lambda w: {"square": w**2, "line": 10.0 * w}  # noqa: E731
    h = np.array([0.1, 0.5, 2.0])
    found = nonlinearity.linearization_error(fn, jnp.array(3.0), jnp.array(2.0), h)
    square, line = 12 * h + 4 * h**2, 20 * h
    np.testing.assert_allclose(found.error, 4 * h**2 / np.sqrt(2), rtol=1e-12)
    np.testing.assert_allclose(found.mean_error, 2 * h**2, rtol=1e-12)
    np.testing.assert_allclose(found.change, np.sqrt((square**2 + line**2) / 2), rtol=1e-12)
    np.testing.assert_allclose(found.mean_change, (square + line) / 2, rtol=1e-12)
    np.testing.assert_allclose(found.ratio, found.error / found.change, rtol=1e-12)
    np.testing.assert_allclose(found.mean_ratio, 4 * h / (32 + 4 * h), rtol=1e-12)


def test_linearization_error_of_a_smooth_network_has_slope_2_and_its_ratio_slope_1(x64):
    h = 2.0 ** -np.arange(6, 12)
    measure = jax.jit(lambda w, d: nonlinearity.linearization_error(tanh_network, w, d, h))
    found = measure(tanh_params(), tanh_params())
    for error, ratio in ((found.error, found.ratio), (found.mean_error, found.mean_ratio)):
        assert nonlinearity.log_slope(h, error) == pytest.approx(2.0, abs=0.05)
        assert nonlinearity.log_slope(h, ratio) == pytest.approx(1.0, abs=0.05)


def test_linearization_error_over_kinks_has_slope_three_halves_in_root_mean_square(x64):
    # relu(w - u) for u spread evenly over (0, 1), from w = 0: errors (h - u)^+, whose root mean square is
    # sqrt(h^3 / 3) and whose mean is h^2 / 2.
    kinks = (np.arange(20_000) + 0.5) / 20_000
    h = 2.0 ** -np.arange(1, 7)
    found = nonlinearity.linearization_error(
        lambda w: jax.nn.relu(w - kinks), jnp.array(0.0), jnp.array(1.0), h
    )
    np.testing.assert_allclose(found.error, np.sqrt(h**3 / 3), rtol=1e-3)
    np.testing.assert_allclose(found.mean_error, h**2 / 2, rtol=1e-3)
    assert nonlinearity.log_slope(h, found.error) == pytest.approx(1.5, abs=0.01)


def test_no_step_leaves_no_error_no_ratio_and_no_slope(x64):
    h = np.array([0.5, 1.0])
    found = nonlinearity.linearization_error(jnp.square, jnp.ones(2), jnp.zeros(2), h)
    assert found.error.tolist() == [0.0, 0.0] and np.all(np.isnan(found.ratio))
    assert np.isnan(nonlinearity.log_slope(h, found.error))


# --- gradients and Hessians ---------------------------------------------------------------------------


def test_gradient_norms_and_drift_by_hand(x64):
    # f = (a b, a^2): gradients (2, 3) and (6, 0) at (3, 2), (2, 4) and (8, 0) at (4, 2)
    fn = lambda w: (w["a"] * w["b"], w["a"] ** 2)  # noqa: E731
    at, there = ({"a": jnp.array(a), "b": jnp.array(2.0)} for a in (3.0, 4.0))
    np.testing.assert_allclose(nonlinearity.gradient_norms(fn, at), [np.sqrt(13.0), 6.0])
    np.testing.assert_allclose(nonlinearity.gradient_drift(fn, at, there), [1.0, 2.0])
    # of a quadratic, (25) with the Hessian's norm (1 for ab, 2 for a^2) is attained
    bound = nonlinearity.gradient_drift_bound(np.array([1.0, 2.0]), 1.0)
    np.testing.assert_allclose(bound, [1.0, 2.0])
    np.testing.assert_allclose(nonlinearity.gradient_drift_bound(2.0, 3.0, tau=0.5), 3.0)


def test_hessian_norm_is_the_largest_eigenvalue_in_absolute_value_from_below(x64, key):
    basis = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    matrix = basis @ np.diag([-5.0, 4.0, 3.0, 0.5, 0.0, 0.0]) @ basis.T
    fn = lambda w: 0.5 * jnp.vdot(w["x"], matrix @ w["x"]) + jnp.sum(w["x"])  # noqa: E731

    def norm(n_iterations):
        return nonlinearity.hessian_norm(fn, {"x": jnp.ones(6)}, key, n_iterations=n_iterations)

    found = np.array(jax.jit(lambda: [norm(n) for n in (1, 3, 10, 100)])())
    assert np.all(np.diff(found) >= 0) and np.all(found <= 5.0 + 1e-12)
    assert found[-1] == pytest.approx(5.0, abs=1e-9) and found[0] < 4.9


def test_hessian_norms_against_the_whole_hessian(x64, key):
    params = tanh_params()
    flat, unravel = ravel_pytree(params)
    found = jax.jit(lambda w: nonlinearity.hessian_norms(tanh_network, w, key, n_iterations=300))(params)
    whole = jax.jit(jax.hessian(lambda w: ravel_pytree(tanh_network(unravel(w)))[0]))(flat)
    np.testing.assert_allclose(found, np.linalg.norm(whole, 2, axis=(1, 2)), rtol=1e-3)


def test_hessian_norm_of_an_affine_function_is_zero(x64, key):
    assert float(nonlinearity.hessian_norm(lambda w: 3.0 * jnp.sum(w), jnp.ones(4), key)) == 0.0
