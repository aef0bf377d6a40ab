"""A hedger's network on a batch of paths, as rows that go through it in chunks and over devices (`rows`)."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dhlnn_jax.hedger import Anchor, Hedger
from dhlnn_jax.linearize import Linearization
from dhlnn_jax.rows import in_chunks, linearize_rows, sum_over_live_rows

Params = Any

# Where all rows go at once, XLA's GPU backend sums a kernel's gradient over them in up to 256 parts, and
# copies every activation unless the parts are equal and a multiple of 16 bytes (docs/performance.md). Rows
# added to the network's few inputs cost next to nothing.
_MULTIPLE = 1024


class RowNetwork(NamedTuple):
    """A hedger's outputs on a batch: a row is a decision, or a whole path if the hedger has a memory.

    Attributes:
      features, anchor: its inputs, [n_paths, n_steps, ...]. chunk_size, mesh: see `rows.in_chunks`.
      n_first: so many paths of every device go through, for `PieceNetwork`; None: all.
    """

    hedger: Hedger
    features: Array
    anchor: Anchor
    chunk_size: int | None
    mesh: Mesh | None
    n_first: Array | None = None

    @property
    def _rows(self) -> tuple[Array, Anchor]:
        rows = (self.features, self.anchor)
        if not self.hedger.memoryless:
            return rows
        return jax.tree.map(lambda x: self._filled_up(_merge(x), mode="edge"), rows)

    def _apply(self, params: Params, features: Array, anchor: Anchor) -> Array:
        if self.hedger.memoryless:
            return self.hedger.outputs(params, features, anchor)
        return jax.vmap(self.hedger.outputs, (None, 0, 0))(params, features, anchor)

    def _by_path(self, outputs: Array) -> Array:
        if self.hedger.memoryless:
            outputs = self._cut_off(outputs).reshape(*self.features.shape[:2], *outputs.shape[1:])
        return shared(outputs, self.mesh)

    def _by_row(self, outputs: Array) -> Array:
        """What `_by_path` takes from what it returns: cotangents, or anything that goes with them."""
        return self._filled_up(_merge(outputs)) if self.hedger.memoryless else outputs

    def _filled_up(self, rows: Array, **how: Any) -> Array:
        """Rows made up to a multiple of `_MULTIPLE` on every device, where all go at once."""
        if self.chunk_size is not None:
            return rows
        by_device = rows.reshape(self.n_devices, -1, *rows.shape[1:])
        added = (0, -by_device.shape[1] % _MULTIPLE)
        filled = jnp.pad(by_device, ((0, 0), added, *((0, 0),) * (rows.ndim - 1)), **how)
        return filled.reshape(-1, *rows.shape[1:])

    def _cut_off(self, rows: Array) -> Array:
        """Without the rows that `_filled_up` has added."""
        if self.chunk_size is not None:
            return rows
        by_device = rows.reshape(self.n_devices, -1, *rows.shape[1:])
        n_paths, n_steps = self.features.shape[:2]
        return by_device[:, : n_paths * n_steps // self.n_devices].reshape(-1, *rows.shape[1:])

    @property
    def n_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def _chunk_mesh(self) -> Mesh | None:
        """Chunks are shared out by hand; without them the compiler shares the work along the paths."""
        return None if self.chunk_size is None else self.mesh

    @property
    def _options(self) -> dict[str, Any]:
        n_first = self.n_first
        if n_first is not None and self.hedger.memoryless:
            n_first = n_first * self.features.shape[1]
        return {"chunk_size": self.chunk_size, "mesh": self._chunk_mesh, "n_first": n_first}

    def outputs(self, params: Params) -> Array:
        """[n_paths, n_steps, ...]."""
        apply = in_chunks(self._apply, **self._options)
        return self._by_path(apply(params, *self._rows))

    def linearize(self, params: Params) -> Linearization:
        """`outputs` at params with its derivatives in both directions."""
        rows = linearize_rows(self._apply, params, *self._rows, **self._options)
        return Linearization(
            self._by_path(rows.value),
            lambda tangent: self._by_path(rows.jvp(tangent)),
            lambda cotangent: rows.vjp(self._by_row(cotangent)),
        )

    def inputs(self, params: Params) -> Array:
        """Inputs of the output layer, [n_paths, n_steps, n_inputs]."""
        layer = self.hedger.output_layer
        assert layer is not None and self.hedger.memoryless
        apply = in_chunks(layer.inputs, chunk_size=self.chunk_size, mesh=self._chunk_mesh)
        return self._by_path(apply(params, *self._rows))

    def row_moments(self, x: Array, linear: Array, quadratic: Array) -> tuple[Array, Array]:
        """See `nested.Problem`; a row without a linear part has no quadratic one.

        Numerics: in full float32 on every device, since a matrix is made of them that is solved with, which
          rounded factors can leave indefinite.
        """

        def moments(x: Array, both: Array) -> tuple[Array, Array]:
            exactly = partial(jnp.matmul, precision="highest")
            a, b = both.T
            return exactly(a, x), jax.vmap(lambda b: exactly((b[:, None] * x).T, x))(b)

        both = jnp.stack([self._by_row(linear), self._by_row(quadratic)], axis=-1)
        return sum_over_live_rows(
            moments, self._by_row(x), cotangent=both, chunk_size=self.chunk_size, mesh=self._chunk_mesh
        )


def _merge(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def shared(batch: Any, mesh: Mesh | None) -> Any:
    """Lays the leading axis of all arrays over the devices of the mesh's one axis (under jit)."""
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


def held_by_all(batch: Any, mesh: Mesh | None) -> Any:
    """Gives every device of the mesh all of the arrays (under jit)."""
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, PartitionSpec()))
