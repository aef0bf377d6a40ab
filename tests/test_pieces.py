"""Networks of one number as straight pieces: knots by hand, and the network itself as the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax.pieces import HiddenLayer, find_knots, interpolated, places_of, two_points

SIZES = {"one layer": (5,), "four": (16, 16, 16, 16), "uneven": (7, 20, 3)}


def layer(kernel, bias):
    return HiddenLayer(jnp.asarray(kernel), jnp.asarray(bias))


def real(knots):
    return np.asarray(knots)[np.isfinite(knots)]


def random_network(sizes, dtype, n_features=2, seed=0):
    """Hidden layers and an output layer of two outputs, as a list of `HiddenLayer`."""
    rng = np.random.default_rng(seed)
    sizes = (n_features, *sizes, 2)
    draw = lambda m, n: layer(  # noqa: E731
        np.asarray(rng.normal(size=(m, n)) * np.sqrt(2 / m), dtype),
        np.asarray(0.5 * rng.normal(size=n), dtype),
    )
    return [draw(m, n) for m, n in zip(sizes[:-1], sizes[1:], strict=True)]


def network(layers, features):
    for hidden in layers[:-1]:
        features = jax.nn.relu(features @ hidden.kernel + hidden.bias[None])
    return features @ layers[-1].kernel + layers[-1].bias[None]


def straight(x):
    return jnp.stack([x, 1.0 - 0.5 * x], axis=-1)


def cut_off(x):
    """Bends at -0.7 and 0.4."""
    return jnp.stack([jnp.clip(x, -0.7, 0.4), x], axis=-1)


def by_pieces(layers, x, features=straight, bends=()):
    first = jnp.array([jnp.min(x), *bends, jnp.max(x)], x.dtype)
    knots, fits = find_knots(layers[:-1], first, features(first))
    points = two_points(jax.lax.stop_gradient(knots))
    at_points = network(layers, features(points.reshape(-1))).reshape(*points.shape, -1)
    return interpolated(at_points, places_of(x, knots, points)), fits


# --- knots --------------------------------------------------------------------------------------------


def test_knots_of_one_layer_by_hand(strict_x64):
    """Units x - 0.3, 0.5 - x and x + 9, the last of which changes its sign outside."""
    hidden = layer([[1.0, -1.0, 1.0]], [-0.3, 0.5, 9.0])
    ends = jnp.array([-1.0, 1.0])
    knots, fits = find_knots([hidden], ends, ends[:, None])
    np.testing.assert_allclose(real(knots), [-1.0, 0.3, 0.5, 1.0], rtol=1e-15)
    assert bool(fits) and knots.shape == (2 + 2 * 3,)


def test_knots_of_two_layers_by_hand(strict_x64):
    """|x| - 1/4 from relu(x) + relu(-x): two knots of the second layer beside that at 0."""
    layers = [layer([[1.0, -1.0]], [0.0, 0.0]), layer([[1.0], [1.0]], [-0.25])]
    ends = jnp.array([-1.0, 2.0])
    knots, fits = find_knots(layers, ends, ends[:, None])
    np.testing.assert_allclose(np.unique(real(knots)), [-1.0, -0.25, 0.0, 0.25, 2.0], atol=1e-15)
    assert bool(fits)


def zigzag():
    """A second layer of one unit, with room for two knots, that changes its sign twice a tooth, 16 times."""
    teeth = jnp.arange(16.0)
    slopes = jnp.where(jnp.arange(16) % 2 == 0, 2.0, -2.0).at[0].set(1.0)
    layers = [layer(jnp.ones((1, 16)), -teeth), layer(slopes[:, None], jnp.array([-0.5]))]
    return layers, jnp.array([0.0, 16.0])


def test_no_room_for_all_knots_is_said(strict_x64):
    layers, ends = zigzag()
    assert not find_knots(layers, ends, ends[:, None])[1]
    assert find_knots(layers, ends / 16, ends[:, None] / 16)[1]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_knots_are_all_places_where_a_unit_changes_its_sign(strict_x64, sizes):
    layers = random_network(sizes, "float64")
    ends = jnp.array([-2.0, 2.0])
    knots = np.unique(real(find_knots(layers[:-1], ends, straight(ends))[0]))
    grid = jnp.linspace(-2.0, 2.0, 20_001)
    before, x = [], straight(grid)
    for hidden in layers[:-1]:
        before.append(np.asarray(x @ hidden.kernel + hidden.bias[None]))
        x = jax.nn.relu(before[-1])
    # A unit that is zero on a whole interval (behind dead ones) changes no sign there.
    changes = np.concatenate([np.diff(np.sign(values), axis=0) != 0 for values in before], axis=1)
    cell = np.flatnonzero(changes.any(axis=1))
    assert len(cell) > len(sizes)
    found = np.digitize(knots[1:-1], np.asarray(grid)) - 1
    assert set(cell) <= set(found)
    assert len(set(found) - set(cell)) == 0


# --- outputs and gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 3e-5)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "features, bends", [(straight, ()), (cut_off, (-0.7, 0.4))], ids=["straight", "bent"]
)
def test_outputs_tangents_and_gradients_are_those_of_the_network(sizes, dtype, tolerance, features, bends):
    with jax.enable_x64(dtype == "float64"):
        layers = random_network(sizes, dtype)
        rng = np.random.default_rng(1)
        x = jnp.asarray(rng.normal(size=500), dtype)
        tangent = random_network(sizes, dtype, seed=2)
        cotangent = jnp.asarray(rng.normal(size=(500, 2)), dtype)

        def three(fn):
            value, change = jax.jvp(fn, (layers,), (tangent,))
            return value, change, jax.vjp(fn, layers)[1](cotangent)[0]

        given = jax.jit(lambda: three(lambda w: by_pieces(w, x, features, bends)[0]))()
        wanted = jax.jit(lambda: three(lambda w: network(w, features(x))))()
        assert by_pieces(layers, x, features, bends)[1]
        for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())
            assert a.dtype == dtype


def test_a_bend_that_is_not_named_is_missed(strict_x64):
    """The check above can fail: without the bends of its features a network is not the same."""
    layers, x = random_network((16, 16), "float64"), jnp.linspace(-2.0, 2.0, 500)
    wrong = by_pieces(layers, x, cut_off)[0]
    assert np.abs(wrong - network(layers, cut_off(x))).max() > 1e-2


def test_numbers_that_are_all_the_same(strict_x64):
    layers, x = random_network((5, 5), "float64"), jnp.full(7, 0.3)
    value, gradient = jax.value_and_grad(lambda w: jnp.sum(by_pieces(w, x)[0] ** 2))(layers)
    wanted, its_gradient = jax.value_and_grad(lambda w: jnp.sum(network(w, straight(x)) ** 2))(layers)
    np.testing.assert_allclose(value, wanted, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(its_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_network_that_is_not_finite_is_not_finite_by_pieces():
    layers, x = random_network((5, 5), "float32"), jnp.linspace(-1.0, 1.0, 20)
    layers[0] = layers[0]._replace(bias=layers[0].bias.at[2].set(jnp.nan))
    assert not np.isfinite(by_pieces(layers, x)[0]).any()


def test_places_by_hand(strict_x64):
    knots = jnp.array([0.0, 1.0, 3.0, jnp.inf, jnp.inf])
    points = two_points(knots)
    np.testing.assert_allclose(points, [[0.25, 0.75], [1.5, 2.5], [0.0, 0.0], [0.0, 0.0]])
    places = places_of(jnp.array([0.0, 0.5, 1.0, 2.5, 3.0]), knots, points)
    np.testing.assert_array_equal(places.piece, [0, 0, 0, 1, 1])
    np.testing.assert_allclose(places.share, [-0.5, 0.5, 1.5, 1.0, 1.5])
    outputs = jnp.array([[[1.0], [2.0]], [[5.0], [3.0]], [[jnp.nan]] * 2, [[jnp.nan]] * 2])
    np.testing.assert_allclose(interpolated(outputs, places)[:, 0], [0.5, 1.5, 2.5, 3.0, 2.0])


def test_vmap_equals_a_loop(strict_x64):
    layers, x = random_network((6, 6), "float64"), jnp.asarray(np.random.default_rng(3).normal(size=(4, 30)))
    many = jax.jit(jax.vmap(lambda x: by_pieces(layers, x)[0]))(x)
    np.testing.assert_allclose(many, jnp.stack([by_pieces(layers, one)[0] for one in x]), rtol=1e-12)
