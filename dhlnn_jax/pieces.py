"""A ReLU network of one number is piecewise linear: all its rows from two points of every piece.

Where all features of a decision follow from the log-moneyness and the time, the network at one time is a few
hundred straight pieces, however many paths there are. Outputs, tangents and gradients of all paths then are
sums over two points of each piece: the same mathematics with far fewer rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_ROOM = 2  # knots a unit; up to 1.3 were seen before, during and after training (docs/performance.md)


def room_for_pieces(n_first: int, n_units: int) -> int:
    """Pieces between the knots of `find_knots`, those that are not used included."""
    return n_first - 1 + _ROOM * n_units


class HiddenLayer(NamedTuple):
    """A dense ReLU layer: kernel [n_inputs, n_outputs], bias [n_outputs]."""

    kernel: Array
    bias: Array


def find_knots(
    layers: Sequence[HiddenLayer],
    first: Float[Array, " n_first"],
    features: Float[Array, "n_first n_features"],
) -> tuple[Float[Array, " n_knots"], Bool[Array, ""]]:
    """Where the derivative of a network of one number jumps, from the first to the last of its first knots.

    Layer by layer: between two knots every unit is linear, so that one which changes its sign does so at one
    point, which is a knot for the next layer.

    Args:
      layers: the hidden ones.
      first: in ascending order, both ends of the domain and all points at which a feature bends.
      features: at each of them; affine in between.
    Returns: knots in ascending order, infinite behind the last one (see `room_for_pieces`); and whether
      that was enough.
    Numerics: a knot is off by rounding; from there to the true one outputs are, too, and gradients are those
      of the other side, as at a kink. In full float32 on every device. Not differentiable.
    Source: networks as splines, Balestriero and Baraniuk (2018), A Spline Theory of Deep Learning.
    """
    knots, inputs, fits = first, features, jnp.asarray(True)
    for layer in layers:
        before = jnp.matmul(inputs, layer.kernel, precision="highest") + layer.bias[None]
        knots, before, enough = _with_sign_changes(knots, before, n_new=_ROOM * layer.bias.shape[0])
        inputs, fits = jax.nn.relu(before), fits & enough
    return knots, fits


def _with_sign_changes(
    knots: Float[Array, " n"], values: Float[Array, "n n_units"], *, n_new: int
) -> tuple[Float[Array, " n_all"], Float[Array, "n_all n_units"], Bool[Array, ""]]:
    """The knots and the points between them at which a unit changes its sign, with all values there."""
    left, right = values[:-1], values[1:]
    changes = ((left < 0) != (right < 0)) & jnp.isfinite(knots[1:, None])
    n_changes = jnp.sum(changes, axis=1)
    until = jnp.cumsum(n_changes)
    slot = jnp.arange(n_new)
    filled = slot < until[-1]
    # Slot i takes the i-th change of all: in this interval, of the first unit up to which there are enough.
    interval = jnp.minimum(jnp.searchsorted(until, slot, side="right"), len(knots) - 2)
    rank = (slot - (until - n_changes)[interval]).astype(values.dtype)
    here = changes[interval].astype(values.dtype)
    up_to = here @ jnp.triu(jnp.ones_like(here, shape=(here.shape[1],) * 2))  # faster than a cumsum on a CPU
    unit = jnp.minimum(jnp.sum(up_to <= rank[:, None], axis=1), here.shape[1] - 1)
    a, b = left[interval], right[interval]
    a_unit, b_unit = (jnp.take_along_axis(x, unit[:, None], axis=1)[:, 0] for x in (a, b))
    share = a_unit / jnp.where(filled, a_unit - b_unit, 1.0)
    start, end = knots[:-1][interval], knots[1:][interval]
    new = jnp.where(filled, start + share * (end - start), jnp.inf)
    knots = jnp.concatenate([knots, new])
    values = jnp.concatenate([values, a + share[:, None] * (b - a)])
    order = jnp.argsort(knots)
    return knots[order], values[order], until[-1] <= n_new


def two_points(knots: Float[Array, " n_knots"]) -> Float[Array, "n_pieces 2"]:
    """Two points inside of every piece, a quarter of it from its ends; the first knot where there is none."""
    start, end = knots[:-1], knots[1:]
    width = jnp.where(jnp.isfinite(end), end - start, 0.0)
    points = start[:, None] + width[:, None] * jnp.array([[0.25, 0.75]], knots.dtype)
    return jnp.where(jnp.isfinite(end)[:, None], points, knots[0])


class Places(NamedTuple):
    """Where numbers lie: the piece of each, and how far from its first point to its second (or beyond)."""

    piece: Int[Array, "..."]
    share: Float[Array, "..."]


def places_of(
    x: Float[Array, " n"], knots: Float[Array, " n_knots"], points: Float[Array, "n_pieces 2"]
) -> Places:
    """The places of numbers between the first and the last knot."""
    piece = jnp.searchsorted(knots[1:-1], x, side="left")
    first, second = points[piece, 0], points[piece, 1]
    width = second - first
    wide = width > 0
    return Places(piece, jnp.where(wide, (x - first) / jnp.where(wide, width, 1.0), 0.0))


def interpolated(
    outputs: Float[Array, "n_pieces 2 n_outputs"], places: Places
) -> Float[Array, "n n_outputs"]:
    """Outputs at all places from those at the points; linear in outputs."""
    table = jnp.concatenate([outputs[:, 0], outputs[:, 1] - outputs[:, 0]], axis=-1)
    at_places = table.at[places.piece].get(mode="promise_in_bounds")
    constant, slope = jnp.split(at_places, 2, axis=-1)
    return constant + places.share[:, None] * slope
