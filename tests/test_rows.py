import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax.model import BandNetwork
from dhlnn_jax.rows import in_chunks, linearize_rows

NETWORK = BandNetwork((8, 8))
apply = NETWORK.apply
N_ROWS = 53
LIVE = {  # which rows have a cotangent
    "all": np.ones(N_ROWS, bool),
    "none": np.zeros(N_ROWS, bool),
    "some": np.random.default_rng(1).random(N_ROWS) < 0.3,
    "one": np.arange(N_ROWS) == 17,
}


def problem(dtype, live="some"):
    """params, rows [n_rows, 3], cotangent of the outputs [n_rows, 2]."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(N_ROWS, 3)), dtype)
    cotangent = jnp.asarray(rng.normal(size=(N_ROWS, 2)) * LIVE[live][:, None], dtype)
    sizes = (3, 8, 8, 2)
    layers = {
        f"Dense_{i}": {"kernel": rng.normal(size=(m, n)) / np.sqrt(m), "bias": rng.normal(size=n)}
        for i, (m, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), {"params": {"Perceptron_0": layers}})
    return params, rows, cotangent


def value_and_gradient(fn):
    def both(params, rows, cotangent):
        value, pullback = jax.vjp(lambda w: fn(w, rows), params)
        return value, pullback(cotangent)[0]

    return both


def gradient(fn, params, rows, cotangent):
    return jax.jit(value_and_gradient(fn))(params, rows, cotangent)[1]


def assert_close(given, wanted, dtype):
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), given, wanted)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(given))


def has_nan(tree):
    return any(np.isnan(leaf).any() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("chunk_size", [7, 1000])  # does not divide the rows; more than there are
def test_in_chunks_has_the_values_and_gradient_of_plain_apply(dtype, chunk_size):
    with jax.enable_x64(dtype == "float64"):
        chunked = in_chunks(apply, chunk_size=chunk_size)
        by_chunks, at_once = jax.jit(value_and_gradient(chunked)), jax.jit(value_and_gradient(apply))
        for live in LIVE:
            given = by_chunks(*problem(dtype, live))
            assert_close(given, at_once(*problem(dtype, live)), dtype)
            assert live != "none" or not any(np.any(leaf) for leaf in jax.tree.leaves(given[1]))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_linearize_rows_is_linearize_at(chunk_size, x64):
    params, rows, cotangent = problem("float64")
    tangent = jax.tree.map(jnp.cos, params)
    fn = lambda w: apply(w, rows)  # noqa: E731

    @jax.jit
    def three(params, rows):
        at = linearize_rows(apply, params, rows, chunk_size=chunk_size)
        return at.value, at.jvp(tangent), at.vjp(cotangent)

    value, change, gradient = three(params, rows)
    assert_close((value, change), jax.jvp(fn, (params,), (tangent,)), "float64")
    assert_close(gradient, jax.vjp(fn, params)[1](cotangent)[0], "float64")


def test_chunk_size_none_is_apply_fn_itself():
    assert in_chunks(apply, chunk_size=None) is apply


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_rows_of_zero_cotangent_are_never_looked_at(chunk_size):
    params, rows, cotangent = problem("float32")
    poisoned = jnp.where(LIVE["some"][:, None], rows, jnp.nan)
    pull = jax.jit(lambda y: linearize_rows(apply, params, poisoned, chunk_size=chunk_size).vjp(y))
    assert_close(pull(cotangent), gradient(apply, params, rows, cotangent), "float32")
    assert has_nan(gradient(apply, params, poisoned, cotangent))
    # while a NaN that something depends on is passed on
    dependent = cotangent.at[np.flatnonzero(~LIVE["some"])[-1]].set(1.0)
    assert has_nan(pull(dependent))


def test_chunks_differentiated_are_those_of_live_rows():
    n_seen = []

    def counted(params, rows):
        jax.debug.callback(lambda x: n_seen.append(x), rows[0, 0])
        return apply(params, rows)

    params, rows, _ = problem("float32")
    pull = jax.jit(lambda y: linearize_rows(counted, params, rows, chunk_size=10).vjp(y))
    for live, wanted in (("all", 6), ("none", 0), ("one", 1), ("some", -(-LIVE["some"].sum() // 10))):
        n_seen.clear()
        jax.block_until_ready(pull(problem("float32", live)[2]))
        jax.effects_barrier()
        assert len(n_seen) == 6 + wanted, live  # `value` has looked at all six


def test_several_rows_arguments_and_outputs_without_a_further_axis():
    """A row may be a whole path, with an argument besides its features, and a scalar or a matrix out."""
    rng = np.random.default_rng(2)
    features, centre = (jnp.asarray(rng.normal(size=size), "float32") for size in ((11, 4, 3), (11, 4)))

    def on_paths(params, features, centre):
        return jnp.sum(apply(params, features["x"])[..., 0] * centre, axis=1)

    params = problem("float32")[0]
    cotangent = jnp.asarray(rng.normal(size=11), "float32")

    def both(fn):
        value, pullback = jax.vjp(lambda w: fn(w, {"x": features}, centre), params)
        return value, pullback(cotangent)[0]

    given = jax.jit(lambda: both(in_chunks(on_paths, chunk_size=3)))()
    assert_close(given, jax.jit(lambda: both(on_paths))(), "float32")


def test_vmap_over_params_equals_a_loop():
    params, rows, cotangent = problem("float32")
    both = jax.tree.map(lambda w: jnp.stack([w, 1.1 * w]), params)
    chunked = in_chunks(apply, chunk_size=7)
    power = lambda w: jnp.sum(chunked(w, rows) ** 2 * cotangent)  # noqa: E731
    one = jax.value_and_grad(power)
    batched = jax.jit(jax.vmap(one))(both)
    assert_close(batched, jax.jit(lambda both: jax.lax.map(one, both))(both), "float32")


def test_peak_memory_does_not_grow_with_the_rows():
    params = problem("float32")[0]
    rows, cotangent = jnp.ones((20_000, 3)), jnp.ones((20_000, 2))

    def temporaries(apply):
        fn = jax.jit(jax.grad(lambda w: jnp.sum(apply(w, rows) * cotangent)))
        return fn.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(in_chunks(apply, chunk_size=100)) < 0.4 * temporaries(apply)


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_only_the_first_rows_go_through(chunk_size):
    """Outputs of the first, tangents and gradients from them; how many may be traced."""
    params, rows, cotangent = problem("float32", "all")
    n_first, tangent = 20, jax.tree.map(jnp.cos, params)
    poisoned = rows.at[n_first + 8 :].set(jnp.nan)  # the chunk that they end in may go through
    seen = cotangent.at[n_first:].set(0.0)

    @jax.jit
    def four(n_first, rows):
        chunked = in_chunks(apply, chunk_size=chunk_size, n_first=n_first)
        at = linearize_rows(apply, params, rows, chunk_size=chunk_size, n_first=n_first)
        return *value_and_gradient(chunked)(params, rows, seen), at.jvp(tangent), at.vjp(seen)

    whole = chunk_size > N_ROWS
    value, from_value, change, from_vjp = four(n_first, rows if whole else poisoned)
    assert_close(value[:n_first], apply(params, rows)[:n_first], "float32")
    pushed = jax.jvp(lambda w: apply(w, rows), (params,), (tangent,))[1]
    assert_close(change[:n_first], pushed[:n_first], "float32")
    assert whole or (not np.any(value[-7:]) and not np.any(change[-7:]))
    wanted = gradient(apply, params, rows, seen)
    assert_close((from_value, from_vjp), (wanted, wanted), "float32")


def test_mistakes_are_named():
    params, rows, _ = problem("float32")
    mesh = jax.make_mesh((1,), ("paths",))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        in_chunks(apply, chunk_size=0)
    with pytest.raises(ValueError, match="mesh needs a chunk_size"):
        in_chunks(apply, chunk_size=None, mesh=mesh)
    with pytest.raises(ValueError, match="n_first needs a chunk_size"):
        in_chunks(apply, chunk_size=None, n_first=jnp.asarray(3))
    with pytest.raises(TypeError, match="rows .* have no gradient"):
        jax.grad(lambda x: jnp.sum(in_chunks(apply, chunk_size=7)(params, x)))(rows)


TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, sys
from jax.sharding import NamedSharding, PartitionSpec as P
sys.path.insert(0, "tests")
from test_rows import apply, assert_close, gradient, problem, value_and_gradient
from dhlnn_jax.rows import in_chunks, linearize_rows

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("paths",), axis_types=(jax.sharding.AxisType.Auto,))
chunked = in_chunks(apply, chunk_size=7, mesh=mesh)

def even(dtype):
    params, rows, cotangent = problem(dtype)
    return params, rows[1:], cotangent[1:], jax.tree.map(jnp.cos, params)

@jax.jit
def three(params, rows, cotangent, tangent):
    at = linearize_rows(apply, params, rows, chunk_size=7, mesh=mesh)
    return *value_and_gradient(chunked)(params, rows, cotangent), at.jvp(tangent)

def wanted(params, rows, cotangent, tangent):
    pushed = jax.jit(lambda x: jax.jvp(lambda w: apply(w, x), (params,), (tangent,)))(rows)
    return pushed[0], gradient(apply, params, rows, cotangent), pushed[1]

for dtype in ("float32", "float64"):
    with jax.enable_x64(dtype == "float64"):
        params, rows, cotangent, tangent = even(dtype)
        given = three(params, rows, cotangent, tangent)
        assert_close(given, wanted(params, rows, cotangent, tangent), dtype)
        assert not given[0].sharding.is_fully_replicated
        assert jax.tree.leaves(given[1])[0].sharding.is_fully_replicated
        half = cotangent * (np.arange(52) < 26)[:, None].astype(dtype)  # the second device has nothing to do
        on_mesh = jax.device_put((rows, half), NamedSharding(mesh, P("paths")))
        assert_close(three(params, *on_mesh, tangent), wanted(params, rows, half, tangent), dtype)
params, rows, cotangent, tangent = even("float32")
try: chunked(params, rows[:49])
except ValueError as error: assert "49 rows cannot be shared evenly by 2 devices" in str(error), error
else: raise AssertionError("49 rows went through")

# inside somebody else's shard_map, who sums
alone = in_chunks(apply, chunk_size=7)
local = lambda *a: jax.lax.psum(value_and_gradient(alone)(*a)[1], "paths")
specs = (P(), P("paths"), P("paths"))
by_hand = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
summed = jax.jit(by_hand)(params, rows, cotangent)
assert_close(summed, wanted(params, rows, cotangent, tangent)[1], "float32")
print("agrees")
"""


def test_two_devices_share_the_rows():
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "agrees" in done.stdout, done.stderr[-3000:]
