"""A hedger's network on paths that differ in the spot alone: from two points of every piece (`pieces`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dhlnn_jax.features import log_moneyness
from dhlnn_jax.hedger import Anchor, Hedger
from dhlnn_jax.linearize import Linearization
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.pieces import Places, find_knots, interpolated, places_of, two_points
from dhlnn_jax.row_network import RowNetwork, held_by_all, shared
from dhlnn_jax.settings import Settings

Params = Any


def has_pieces(hedger: Hedger, paths: MarketPath) -> bool:
    """Whether these paths can go through the hedger's network by its pieces."""
    only_spots = paths.variance is None and paths.half_spread is None and paths.spot.ndim == 2
    return hedger.piecewise is not None and only_spots


class PieceNetwork(NamedTuple):
    """What a `RowNetwork` gives, by the network's pieces; by its rows where there is no room for the pieces.

    Attributes:
      rows: the same network on the same paths. paths: whole ones, for which `has_pieces` is true.
    """

    rows: RowNetwork
    paths: MarketPath
    settings: Settings

    def outputs(self, params: Params) -> Array:
        """[n_paths, n_steps, ...]."""
        cut = self._cut(params)
        return jax.lax.cond(cut.fits, lambda w: cut.spread(cut.points.outputs(w)), self.rows.outputs, params)

    def linearize(self, params: Params) -> Linearization:
        """`outputs` at params with its derivatives in both directions."""
        cut, rows = self._cut(params), self.rows.linearize(params)
        points = cut.points.linearize(params)
        collected = jax.linear_transpose(cut.spread, points.value)
        return Linearization(
            jax.lax.cond(cut.fits, lambda: cut.spread(points.value), lambda: rows.value),
            lambda tangent: jax.lax.cond(cut.fits, lambda t: cut.spread(points.jvp(t)), rows.jvp, tangent),
            lambda cotangent: jax.lax.cond(
                cut.fits, lambda c: points.vjp(*collected(c)), rows.vjp, cotangent
            ),
        )

    def _cut(self, params: Params) -> "_Cut":
        """The pieces of the network at params, constants to every derivative."""
        hedger, settings, mesh = self.rows.hedger, self.settings, self.rows.mesh
        assert hedger.piecewise is not None

        def inputs_at(x: Array) -> tuple[Array, Anchor]:  # log-moneyness, [n, n_steps]
            spot = settings.strike * jnp.exp(x)
            return jax.vmap(lambda spot: hedger.inputs(MarketPath(spot), settings))(spot)

        x = jax.vmap(lambda path: log_moneyness(observed_path(path), settings))(self.paths)
        low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)
        bends = hedger.piecewise.bends(MarketPath(settings.strike * jnp.exp(low)), settings)
        first = jnp.sort(jnp.stack([low, *(jnp.clip(bend, low, high) for bend in bends), high]), axis=0)
        by_time = (first.T, jnp.moveaxis(inputs_at(first)[0], 1, 0))
        layers = hedger.piecewise.layers(jax.lax.stop_gradient(params))
        find = jax.vmap(lambda first, features: find_knots(layers, first, features))
        knots, fits = held_by_all(
            find(*shared(by_time, mesh)), mesh
        )  # each device has found those of some times
        points = jax.vmap(two_points)(knots)
        places = jax.vmap(places_of, (1, 0, 0), 1)(x, knots, points)
        dealt = _dealt(jnp.moveaxis(points, 0, -1).reshape(-1, len(points)), self.rows.n_devices)
        features, anchor = shared(inputs_at(dealt), mesh)
        network = RowNetwork(hedger, features, anchor, self.rows.chunk_size, mesh)
        return _Cut(network, places, jnp.all(fits), points.shape[1])


class _Cut(NamedTuple):
    """A network cut into its pieces.

    Attributes:
      points: the network on paths that at every time go through all the points, dealt to the devices.
      places: of all paths, [n_paths, n_steps].
      fits: whether there was room for all pieces. n_pieces: room for so many.
    """

    points: RowNetwork
    places: Places
    fits: Bool[Array, ""]
    n_pieces: int

    def spread(self, outputs: Array) -> Array:
        """Outputs of the paths, [n_paths, n_steps, ...], from those at the points; linear in them."""
        mesh, n_devices = self.points.mesh, self.points.n_devices
        at_points = _collected(held_by_all(outputs, mesh), n_devices)[: 2 * self.n_pieces]
        by_piece = at_points.reshape(self.n_pieces, 2, *outputs.shape[1:])
        return shared(jax.vmap(interpolated, (2, 1), 1)(by_piece, self.places), mesh)


def _dealt(points: Float[Array, "n_points n_steps"], n_devices: int) -> Float[Array, "n_dealt n_steps"]:
    """Points in the order in which devices share them evenly: real ones come first, and none is to have all.

    What is left over is made up with copies of the last one.
    """
    full = jnp.pad(points, ((0, -len(points) % n_devices), (0, 0)), mode="edge")
    return full.reshape(-1, n_devices, points.shape[1]).swapaxes(0, 1).reshape(full.shape)


def _collected(dealt: Float[Array, " n_dealt *rest"], n_devices: int) -> Float[Array, " n_dealt *rest"]:
    """What has been dealt, in the points' own order."""
    return dealt.reshape(n_devices, -1, *dealt.shape[1:]).swapaxes(0, 1).reshape(dealt.shape)
