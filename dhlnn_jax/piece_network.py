"""A hedger's network on paths that differ in the spot alone: from two points of every piece (`pieces`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dhlnn_jax.features import log_moneyness
from dhlnn_jax.hedger import Hedger, Piecewise
from dhlnn_jax.linearize import Linearization
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.pieces import Places, find_knots, interpolated, places_of, room_for_pieces, two_points
from dhlnn_jax.row_network import RowNetwork, held_by_all, shared
from dhlnn_jax.settings import Settings

Params = Any


def has_pieces(hedger: Hedger, paths: MarketPath, settings: Settings) -> bool:
    """Whether these paths, batched and whole, go through the hedger's network by its pieces.

    Not if more than the spot differs between them, or if they are fewer than the points.
    """
    only_spots = paths.variance is None and paths.half_spread is None and paths.spot.ndim == 2
    if hedger.piecewise is None or not only_spots:
        return False
    first = _first_knots(hedger.piecewise, _observed_log_moneyness(paths, settings), settings)
    return 2 * room_for_pieces(len(first), hedger.piecewise.n_units) <= len(paths.spot)


class PieceNetwork(NamedTuple):
    """What a `RowNetwork` gives, by the network's pieces.

    Two points of every piece go through in the place of the first paths. Where there is no room for all
    pieces, as `pieces.find_knots` says, the paths themselves go through.

    Attributes:
      rows: the network on these paths, in chunks. paths: whole ones, for which `has_pieces` is true.
    """

    rows: RowNetwork
    paths: MarketPath
    settings: Settings

    def outputs(self, params: Params) -> Array:
        """[n_paths, n_steps, ...]."""
        cut = self._cut(params)
        return cut.of_paths(cut.network.outputs(params))

    def linearize(self, params: Params) -> Linearization:
        """`outputs` at params with its derivatives in both directions."""
        cut = self._cut(params)
        network = cut.network.linearize(params)
        of_network = jax.linear_transpose(cut.of_paths, network.value)
        return Linearization(
            cut.of_paths(network.value),
            lambda tangent: cut.of_paths(network.jvp(tangent)),
            lambda cotangent: network.vjp(*of_network(cotangent)),
        )

    def _cut(self, params: Params) -> "_Cut":
        """The pieces of the network at params, constants to every derivative."""
        rows, settings, mesh = self.rows, self.settings, self.rows.mesh
        piecewise = rows.hedger.piecewise
        assert piecewise is not None

        def features_at(x: Array) -> Array:  # log-moneyness, [n, n_steps]
            spot = settings.strike * jnp.exp(x)
            return jax.vmap(lambda spot: rows.hedger.inputs(MarketPath(spot), settings)[0])(spot)

        x = _observed_log_moneyness(self.paths, settings)
        first = _first_knots(piecewise, x, settings)
        layers = piecewise.layers(jax.lax.stop_gradient(params))
        find = jax.vmap(lambda first, features: find_knots(layers, first, features))
        by_time = shared((first.T, jnp.moveaxis(features_at(first), 1, 0)), mesh)  # each device has its times
        knots, fits = held_by_all(find(*by_time), mesh)
        fits, points = jnp.all(fits), jax.vmap(two_points)(knots)  # [n_steps, n_pieces, 2]
        places = jax.vmap(places_of, (1, 0, 0), 1)(x, knots, points)

        dealt = _dealt(jnp.moveaxis(points, 0, -1).reshape(-1, len(points)), rows.n_devices)
        of_points = _by_device(features_at(dealt.reshape(-1, len(points))), rows.n_devices)
        of_paths, n_each = _by_device(rows.features, rows.n_devices), dealt.shape[1]
        features = of_paths.at[:, :n_each].set(jnp.where(fits, of_points, of_paths[:, :n_each]))
        network = rows._replace(
            features=shared(features.reshape(rows.features.shape), mesh),
            n_first=jnp.where(fits, n_each, of_paths.shape[1]),
        )
        return _Cut(network, places, fits, points.shape[1])


class _Cut(NamedTuple):
    """A network cut into its pieces.

    Attributes:
      network: on the points, dealt to the devices, in the place of the first paths of each; on the paths if
        there is no room for all pieces.
      places: of all paths, [n_paths, n_steps].
      fits: whether there is room. n_pieces: for so many.
    """

    network: RowNetwork
    places: Places
    fits: Bool[Array, ""]
    n_pieces: int

    def of_paths(self, outputs: Array) -> Array:
        """Outputs of all paths, [n_paths, n_steps, ...], from those of the network; linear in them."""
        n_devices, mesh = self.network.n_devices, self.network.mesh
        n_each = -(-2 * self.n_pieces // n_devices)
        dealt = held_by_all(_by_device(outputs, n_devices)[:, :n_each], mesh)
        at_points = dealt.swapaxes(0, 1).reshape(-1, *outputs.shape[1:])[: 2 * self.n_pieces]
        by_piece = at_points.reshape(self.n_pieces, 2, *outputs.shape[1:])  # [n_pieces, 2, n_steps, ...]
        return jnp.where(
            self.fits, shared(jax.vmap(interpolated, (2, 1), 1)(by_piece, self.places), mesh), outputs
        )


def _observed_log_moneyness(paths: MarketPath, settings: Settings) -> Float[Array, "n_paths n_steps"]:
    return jax.vmap(lambda path: log_moneyness(observed_path(path), settings))(paths)


def _first_knots(
    piecewise: Piecewise, x: Float[Array, "n_paths n_steps"], settings: Settings
) -> Float[Array, "n_first n_steps"]:
    """The ends of all paths' log-moneyness, and where the features bend between them."""
    low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)
    bends = piecewise.bends(MarketPath(settings.strike * jnp.exp(low)), settings)
    return jnp.sort(jnp.stack([low, *(jnp.clip(bend, low, high) for bend in bends), high]), axis=0)


def _by_device(batch: Float[Array, " n *rest"], n_devices: int) -> Float[Array, " n_devices n_each *rest"]:
    return batch.reshape(n_devices, -1, *batch.shape[1:])


def _dealt(
    points: Float[Array, "n_points n_steps"], n_devices: int
) -> Float[Array, "n_devices n_each n_steps"]:
    """Points by device, dealt like cards: real ones come first, and no device is to have them all.

    What is left over is made up with copies of the last one.
    """
    full = jnp.pad(points, ((0, -len(points) % n_devices), (0, 0)), mode="edge")
    return full.reshape(-1, n_devices, points.shape[1]).swapaxes(0, 1)
