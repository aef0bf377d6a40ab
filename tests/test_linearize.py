import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax.linearize import linearize_apply, linearize_at
from dhlnn_jax.model import BandNetwork


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


def tanh_network(params, x, *, scale=1.0):
    """Pytree of parameters in, pytree of outputs out; nothing about it is affine in the parameters."""
    hidden = jnp.tanh(x @ params["in"] + params["shift"])
    return {"sum": scale * hidden @ params["out"], "parts": (jnp.exp(-hidden), jnp.sin(params["out"]))}


@pytest.fixture
def problem(strict_x64):
    rng, shapes = np.random.default_rng(0), {"in": (3, 4), "out": (4,), "shift": (4,)}
    draw = lambda: {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}  # noqa: E731
    with jax.numpy_rank_promotion("allow"):
        yield draw(), draw(), jnp.asarray(rng.normal(size=(5, 3)))


def moved(params, direction, step):
    return jax.tree.map(lambda w, d: w + step * d, params, direction)


def distance(a, b):
    differences = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)
    return float(np.sqrt(sum(np.sum(d**2) for d in jax.tree.leaves(differences))))


def test_linearize_apply_exact_for_a_function_affine_in_params(strict_x64):
    with jax.numpy_rank_promotion("allow"):
        x = jnp.arange(15.0).reshape(5, 3)
        params0 = {"kernel": jnp.ones((3, 2)), "bias": jnp.array([0.3, -0.4])}
        far = {"kernel": -50.0 * jnp.ones((3, 2)), "bias": jnp.array([700.0, 1.0])}
        np.testing.assert_allclose(linearize_apply(affine, params0)(far, x), affine(far, x), rtol=1e-12)


def test_linearize_apply_value_and_gradient_equal_at_params0(problem):
    params0, _, x = problem
    linear, network = linearize_apply(tanh_network, params0), jax.jit(tanh_network)
    assert distance(jax.jit(linear)(params0, x), network(params0, x)) < 1e-14

    def slope(f, params, power):
        loss = lambda w: jnp.sum(f(w, x)["sum"] ** power) + jnp.sum(f(w, x)["parts"][0])  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    assert distance(slope(linear, params0, 2), slope(tanh_network, params0, 2)) < 1e-12
    # elsewhere its derivative is still that of params0, so the gradient of an affine loss does not move
    elsewhere = moved(params0, params0, 0.7)
    assert distance(slope(linear, elsewhere, 1), slope(tanh_network, params0, 1)) < 1e-12
    assert distance(slope(tanh_network, elsewhere, 1), slope(tanh_network, params0, 1)) > 0.1


def test_linearize_apply_error_is_second_order(problem):
    params0, direction, x = problem
    linear = jax.jit(linearize_apply(tanh_network, params0))
    steps = 2.0 ** -np.arange(6, 12)
    exact = jax.jit(tanh_network)
    errors = [distance(linear(w, x), exact(w, x)) for w in (moved(params0, direction, h) for h in steps)]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(2.0, abs=0.03)


def test_linearize_apply_has_the_signature_of_apply_fn(problem):
    params0, direction, x = problem
    linear = linearize_apply(tanh_network, params0)
    near = moved(params0, direction, 1e-4)
    given = linear(near, x, scale=3.0)
    assert jax.tree.structure(given) == jax.tree.structure(tanh_network(near, x, scale=3.0))
    np.testing.assert_allclose(given["sum"], 3.0 * linear(near, x)["sum"], rtol=1e-12)


def test_linearize_apply_of_a_linen_network_compiled_and_batched(key):
    network, x = BandNetwork((8,)), jnp.arange(12.0).reshape(4, 3) / 12
    params0 = network.init(key, x)
    linear = linearize_apply(network.apply, params0)
    near = jax.tree.map(lambda w: w + 1e-3, params0)
    at_once = jax.jit(linear)(near, x)
    by_row = jax.jit(jax.vmap(linear, (None, 0)))(near, x)
    np.testing.assert_allclose(at_once, by_row, atol=1e-6)
    np.testing.assert_allclose(at_once, network.apply(near, x), atol=1e-4)
    assert float(jnp.max(jnp.abs(at_once - network.apply(params0, x)))) > 1e-3


def test_linearize_at_against_the_explicit_jacobian(strict_x64):
    # f(a, b) = (a b, a^2): at (3, 2) the Jacobian is [[2, 3], [6, 0]]
    fn = lambda w: (w["a"] * w["b"], w["a"] ** 2)  # noqa: E731
    at = linearize_at(fn, {"a": jnp.array(3.0), "b": jnp.array(2.0)})
    assert [float(v) for v in at.value] == [6.0, 9.0]
    tangent = at.jvp({"a": jnp.array(10.0), "b": jnp.array(-1.0)})
    assert [float(v) for v in tangent] == [17.0, 60.0]
    cotangent = at.vjp((jnp.array(1.0), jnp.array(-2.0)))
    assert {name: float(v) for name, v in cotangent.items()} == {"a": -10.0, "b": 3.0}


def test_linearize_at_against_differences_and_inner_products(problem):
    params0, direction, x = problem
    fn = jax.jit(lambda w: tanh_network(w, x))
    value, jvp, vjp = linearize_at(fn, params0)
    assert distance(value, fn(params0)) < 1e-14
    h = 1e-5
    quotient = jax.tree.map(
        lambda up, down: (up - down) / (2 * h),
        fn(moved(params0, direction, h)),
        fn(moved(params0, direction, -h)),
    )
    assert distance(jvp(direction), quotient) < 1e-8
    cotangent = jax.tree.map(jnp.cos, value)

    def inner(a, b):
        return sum(np.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    np.testing.assert_allclose(inner(jvp(direction), cotangent), inner(direction, vjp(cotangent)), rtol=1e-12)
    assert distance(vjp(cotangent), jax.vjp(fn, params0)[1](cotangent)[0]) < 1e-12
