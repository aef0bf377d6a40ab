"""How the rows of a batch go through a network: at once, or a few at a time with nothing stored.

A row is whatever the leading axis counts: one decision for a network that sees no previous hedge, one path
for a recurrent one. On a CPU a few hundred rows stay in the cache where all of them would be written to
memory and read back, and the rows whose outputs nothing depends on (inside a no-trade band nothing depends
on its edges) are not differentiated at all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dhlnn_jax.linearize import Linearization, linearize_at

Params = Any
Rows = Any  # pytree of arrays [n_rows, ...]
ApplyRows = Callable[..., Array]  # (params, *rows [n_rows, ...]) -> [n_rows, ...]


def in_chunks(
    apply_fn: ApplyRows, *, chunk_size: int | None, mesh: Mesh | None = None, n_first: Array | None = None
) -> ApplyRows:
    """`apply_fn` a chunk of rows at a time: same outputs, same gradient to params, a fraction of the memory.

    Forward keeps the outputs only. Backward gathers the rows whose output cotangent is not exactly zero,
    runs them forward again a chunk at a time, and adds up their gradients.

    Args:
      apply_fn: `(params, *rows) -> outputs`, every row by itself.
      chunk_size: rows at a time, about; 300 to 2000 serve a CPU. None: `apply_fn` itself, for an accelerator.
      mesh: devices that share the rows, over its one axis; each has its own chunks, and their gradients are
        summed. The arguments may live anywhere; None leaves the rows where they are.
      n_first: only so many rows of every device go through at all, rounded up to whole chunks; behind them
        outputs are zero or those of the row. None: all.
    Returns: a function like `apply_fn`, but reverse-mode only (see `linearize_rows` for tangents). Works
      under jit, under vmap over params, and in a `shard_map` with check_vma=False, whose caller then sums
      the gradients.
    Raises: ValueError for a chunk_size below 1, a mesh without chunks, and rows that the mesh cannot share
      evenly; TypeError if rows are differentiated.
    Numerics: sums over rows in another order than `apply_fn`'s, so gradients agree to rounding. Rows of zero
      cotangent are never looked at: unlike in plain autodiff, their NaNs and infinities go nowhere.
    Source: recomputation as in Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost.
    """
    if chunk_size is None:
        if mesh is not None:
            raise ValueError("mesh needs a chunk_size: without one the compiler shares the rows out itself")
        if n_first is not None:
            raise ValueError("n_first needs a chunk_size: without one all rows go through")
        return apply_fn
    values, _, pullback = _kernels(apply_fn, chunk_size, mesh, n_first)

    @jax.custom_vjp
    def chunked(params: Params, *rows: Rows) -> Array:
        return values(params, rows)

    def forward(params, *rows):
        if any(leaf.perturbed for leaf in jax.tree.leaves(rows, is_leaf=_is_primal)):
            raise TypeError("rows that go through in chunks have no gradient, only params do")
        params, rows = jax.tree.map(lambda leaf: leaf.value, (params, rows), is_leaf=_is_primal)
        return values(params, rows), (params, rows)

    def backward(residuals, cotangent):
        params, rows = residuals
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return (None,) * (1 + len(rows))
        return pullback(params, rows, cotangent), *(None for _ in rows)

    chunked.defvjp(forward, backward, symbolic_zeros=True)
    return chunked


def linearize_rows(
    apply_fn: ApplyRows,
    params0: Params,
    *rows: Rows,
    chunk_size: int | None,
    mesh: Mesh | None = None,
    n_first: Array | None = None,
) -> Linearization:
    """`linearize_at` of `params -> apply_fn(params, *rows)`, a chunk of rows at a time.

    Args and Numerics: as for `in_chunks`; chunk_size None is `linearize_at` itself.
    Returns: jvp and vjp run the rows forward again at every call (three and, for the rows of non-zero
      cotangent, three products a layer instead of two) where `linearize_at` reads stored activations.
    Source: paper Eq. (9).
    """
    if chunk_size is None:
        plain = in_chunks(apply_fn, chunk_size=None, mesh=mesh, n_first=n_first)
        return linearize_at(lambda params: plain(params, *rows), params0)
    values, pushforward, pullback = _kernels(apply_fn, chunk_size, mesh, n_first)
    return Linearization(
        value=values(params0, rows),
        jvp=lambda tangent: pushforward(params0, rows, tangent),
        vjp=lambda cotangent: pullback(params0, rows, cotangent),
    )


def sum_over_live_rows(
    fn: Callable[..., Any],
    *rows: Rows,
    cotangent: Array,
    chunk_size: int | None,
    mesh: Mesh | None = None,
) -> Any:
    """`fn(*rows, cotangent)` for an fn that is a sum over rows, from those of non-zero cotangent.

    Args:
      fn: its value, any pytree, is a sum over rows in which a row of zero cotangent counts nothing.
      cotangent: [n_rows, ...]. chunk_size, mesh: as for `in_chunks`.
    """
    if chunk_size is None:
        return fn(*rows, cotangent)

    def total(_: None, rows: tuple, cotangent: Array) -> Any:
        return _sum_live_chunks(lambda _, *chunk: fn(*chunk), None, rows, cotangent, chunk_size)

    if mesh is None:
        return total(None, rows, cotangent)
    every, shared = PartitionSpec(), PartitionSpec(*mesh.axis_names)

    def summed(_: None, rows: tuple, cotangent: Array) -> Any:
        return jax.lax.psum(total(None, rows, cotangent), mesh.axis_names)

    return _on_mesh(summed, mesh, (every, shared, shared), every)(None, rows, cotangent)


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _kernels(
    apply_fn: ApplyRows, chunk_size: int, mesh: Mesh | None, n_first: Array | None
) -> tuple[Callable, Callable, Callable]:
    """Value (params, rows), tangent (params, rows, tangent), pullback (params, rows, cotangent)."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    def values(params: Params, rows: tuple, n_first: Array | None = n_first) -> Array:
        return _map_chunks(lambda *chunk: apply_fn(params, *chunk), rows, chunk_size, n_first)

    def pushforward(params: Params, rows: tuple, tangent: Params, n_first: Array | None = n_first) -> Array:
        def change(*chunk):
            return jax.jvp(lambda w: apply_fn(w, *chunk), (params,), (tangent,))[1]

        return _map_chunks(change, rows, chunk_size, n_first)

    def pullback(params: Params, rows: tuple, cotangent: Array) -> Params:
        def of_chunk(params: Params, *chunk: Any) -> Params:
            return jax.vjp(lambda w: apply_fn(w, *chunk[:-1]), params)[1](chunk[-1])[0]

        return _sum_live_chunks(of_chunk, params, rows, cotangent, chunk_size)

    if mesh is None:
        return values, pushforward, pullback
    if len(mesh.axis_names) != 1:
        raise ValueError(f"mesh must have one axis, got {mesh.axis_names}")
    (axis,) = mesh.axis_names
    every, shared = PartitionSpec(), PartitionSpec(axis)

    def summed_pullback(params: Params, rows: tuple, cotangent: Array) -> Params:
        return jax.lax.psum(pullback(params, rows, cotangent), axis)

    on_mesh_values = _on_mesh(values, mesh, (every, shared, every), shared)
    on_mesh_pushforward = _on_mesh(pushforward, mesh, (every, shared, every, every), shared)
    return (
        lambda params, rows: on_mesh_values(params, rows, n_first),
        lambda params, rows, tangent: on_mesh_pushforward(params, rows, tangent, n_first),
        _on_mesh(summed_pullback, mesh, (every, shared, shared), every),
    )


def _on_mesh(kernel: Callable, mesh: Mesh, in_specs: tuple, out_specs: PartitionSpec) -> Callable:
    """`kernel(params, rows, ...)` by every device on its own rows."""
    sharded = jax.shard_map(kernel, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def checked(params: Params, rows: tuple, *rest: Any) -> Any:
        n_rows = _n_rows(rows)
        if n_rows % mesh.size:
            raise ValueError(f"{n_rows} rows cannot be shared evenly by {mesh.size} devices")
        return sharded(params, rows, *rest)

    return checked


def _n_rows(rows: tuple) -> int:
    return jax.tree.leaves(rows)[0].shape[0]


def _chunks(n_rows: int, chunk_size: int) -> tuple[int, int]:
    """Number of chunks, and the equal size of each; the last one may overlap the one before."""
    n_chunks = -(-n_rows // chunk_size)
    return n_chunks, -(-n_rows // n_chunks)


def _map_chunks(fn: Callable[..., Array], rows: tuple, chunk_size: int, n_first: Array | None) -> Array:
    """`fn(*rows)` from its values on chunks. Numerics: overlapping rows are computed twice, not added."""
    n_rows = _n_rows(rows)
    if n_rows <= chunk_size:
        return fn(*rows)
    n_chunks, size = _chunks(n_rows, chunk_size)
    fn = _traced_once(fn)

    def chunk(i: Array) -> tuple:  # a slice that would stick out is moved back by JAX, and so is its update
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), rows)

    like = jax.eval_shape(lambda: fn(*chunk(jnp.asarray(0))))

    def fill(i: Array, outputs: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(outputs, fn(*chunk(i)), i * size, 0)

    n_used = n_chunks if n_first is None else jnp.minimum((n_first + size - 1) // size, n_chunks)
    return jax.lax.fori_loop(0, n_used, fill, jnp.zeros((n_rows, *like.shape[1:]), like.dtype))


def _sum_live_chunks(
    fn: Callable[..., Any],
    params: Params,
    rows: tuple,
    cotangent: Float[Array, " n_rows *shape"],
    chunk_size: int,
) -> Any:
    """Sum of `fn(params, *chunk, its cotangent)` over ceil(n_live / chunk_size) chunks of live rows."""
    n_rows, fn = cotangent.shape[0], _traced_once(fn)
    size = min(chunk_size, n_rows)
    chunk_like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), (*rows, cotangent)
    )
    like = jax.eval_shape(fn, params, *chunk_like)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    if n_rows == 0:
        return zeros
    live, n_live = _live_first(jnp.any(cotangent.reshape(n_rows, -1) != 0, axis=1), size)

    def add(i: Array, total: Any) -> Any:
        taken = jax.lax.dynamic_slice_in_dim(live, i * size, size)
        chunk, y_bar = jax.tree.map(lambda x: x.at[taken].get(mode="promise_in_bounds"), (rows, cotangent))
        padding = i * size + jnp.arange(size) >= n_live
        y_bar = jnp.where(padding.reshape(size, *(1,) * (y_bar.ndim - 1)), 0, y_bar)
        return jax.tree.map(jnp.add, total, fn(params, *chunk, y_bar))

    return jax.lax.fori_loop(0, (n_live + size - 1) // size, add, zeros)


def _traced_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, for callers that ask for its shapes before they call it."""
    return jax.jit(fn, inline=True)


def _live_first(alive: Array, padding: int) -> tuple[Array, Array]:
    """Indices of the true entries in order, then any one of them over again; and how many are true."""
    n_rows = alive.shape[0]
    rank = jnp.cumsum(alive, dtype=jnp.int32)
    slot = jnp.where(alive, rank - 1, n_rows + padding)
    anywhere = jnp.full(n_rows + padding, jnp.argmax(alive), jnp.int32)
    order = anywhere.at[slot].set(jnp.arange(n_rows, dtype=jnp.int32), mode="drop")
    return order, rank[-1]
