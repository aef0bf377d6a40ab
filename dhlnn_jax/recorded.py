"""What all recorded prices share: rows split by time, training volatility, rescaling."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dhlnn_jax.errors import UsageError
from dhlnn_jax.market import MarketPath

FEW_GROUPS = 30  # fewer independent test times than this make a standard error unreliable


class PathSet(NamedTuple):
    """Recorded paths on the host, one a row, ordered by group and then by asset.

    Attributes:
      spot: price over the first price of the row, float64 [n_rows, n_steps + 1].
      half_spread: half the quoted spread as a fraction of the price, [n_rows, n_steps + 1], or None.
      asset: index into `assets`, [n_rows].
      group: when the row was recorded, [n_rows]; rows of different groups are independent in time.
      assets: names.
    """

    spot: np.ndarray
    half_spread: np.ndarray | None
    asset: np.ndarray
    group: np.ndarray
    assets: tuple[str, ...]


class RecordedMarket(NamedTuple):
    """Recorded paths to train on, to test on, and one line for each thing a reader must know of them."""

    train: PathSet
    test: PathSet
    notes: tuple[str, ...]


def normalised_paths(
    price: Float[np.ndarray, "n_rows n_times"],
    *,
    asset: Int[np.ndarray, " n_rows"],
    group: Int[np.ndarray, " n_rows"],
    assets: tuple[str, ...],
    half_spread: Float[np.ndarray, "n_rows n_times"] | None = None,
) -> PathSet:
    """Paths divided by their first price, ordered by group and then by asset."""
    spot = np.asarray(price, np.float64) / price[:, :1]
    return take_rows(PathSet(spot, half_spread, asset, group, assets), np.lexsort((asset, group)))


def take_rows(paths: PathSet, rows: np.ndarray) -> PathSet:
    """The rows that an index or a mask selects."""
    half_spread = None if paths.half_spread is None else paths.half_spread[rows]
    return paths._replace(
        spot=paths.spot[rows], half_spread=half_spread, asset=paths.asset[rows], group=paths.group[rows]
    )


def split_by_group(paths: PathSet, *, test_fraction: float) -> tuple[PathSet, PathSet]:
    """Training and test rows: the last `test_fraction` of the sorted groups is the test part.

    Never by row: rows of one group saw the same market at the same time. With two groups or more each
    part gets at least one; a single group is all training.

    Raises: UsageError unless 0 < test_fraction < 1.
    """
    require_fraction(test_fraction)
    groups = np.unique(paths.group)
    n_test = min(max(round(test_fraction * len(groups)), 1), max(len(groups) - 1, 0))
    is_test = np.isin(paths.group, groups[len(groups) - n_test :])
    return take_rows(paths, ~is_test), take_rows(paths, is_test)


def require_fraction(test_fraction: float) -> None:
    """Raises: UsageError unless 0 < test_fraction < 1."""
    if not 0 < test_fraction < 1:
        raise UsageError(f"test_fraction must lie strictly between 0 and 1, got {test_fraction}")


def require_steps(n_steps: int, *, most: int | None = None) -> None:
    """Raises: UsageError unless 1 <= n_steps (<= most)."""
    if n_steps < 1 or (most is not None and n_steps > most):
        allowed = "at least 1" if most is None else f"from 1 to {most}"
        raise UsageError(f"market.n_steps must be {allowed} for this market, got {n_steps}")


def asset_volatility(paths: PathSet, *, dt: float) -> Float[np.ndarray, " n_assets"]:
    """Standard deviation of each asset's log returns per square root of a year; NaN for assets without rows.

    sqrt(mean (r - mean r)^2 / dt) over all log returns r of the asset's rows.

    Args:
      paths: training rows; the estimate must not see the others.
      dt: years between two prices.
    """
    log_return = np.diff(np.log(paths.spot), axis=1)
    rows_of = [paths.asset == index for index in range(len(paths.assets))]
    deviation = [log_return[rows].std() if rows.any() else np.nan for rows in rows_of]
    return np.array(deviation, np.float64) / np.sqrt(dt)


def rescale(market: RecordedMarket, *, dt: float, target_volatility: float) -> RecordedMarket:
    """Log returns of each asset times target_volatility / its training volatility, train and test alike.

    A half-spread is a distance in log price and is multiplied by the same factor. Rows of assets that
    are not in the training part have no factor and are dropped.

    Args:
      dt: years between two prices.
      target_volatility: per square root of a year, reached exactly by the training part of each asset.
    Raises: UsageError for a target that is not positive, or an asset whose training prices never move.
    """
    if not 0 < target_volatility < np.inf:
        raise UsageError(f"the target volatility must be positive and finite, got {target_volatility}")
    market, volatility = _seen_in_training(market, dt=dt)
    factor = target_volatility / volatility

    def scaled(paths: PathSet) -> PathSet:
        by_row = factor[paths.asset][:, None]
        half_spread = None if paths.half_spread is None else paths.half_spread * by_row
        return paths._replace(spot=paths.spot**by_row, half_spread=half_spread)

    factors = _listed(market.train.assets, factor, "{:.4g}")
    what = "log returns" if market.train.half_spread is None else "log returns and half-spreads"
    note = f"{what} multiplied, to reach volatility {target_volatility:g} on the training part, by: {factors}"
    return RecordedMarket(scaled(market.train), scaled(market.test), (*market.notes, note))


def as_market_paths(
    market: RecordedMarket, *, dt: float
) -> tuple[MarketPath, Int[Array, " n_train"], MarketPath, Int[Array, " n_test"], tuple[str, ...]]:
    """Training paths and groups, test paths and groups, and the notes; float32, groups counted from 0.

    `variance` is the asset's training estimate in every row and at every time, never the window's own.
    Rows of assets that are not in the training part are dropped.

    Args:
      dt: years between two prices.
    Raises: UsageError for fewer than 2 windows in either part, or training prices that never move.
    """
    _require_windows(market)
    market, volatility = _seen_in_training(market, dt=dt)
    _require_windows(market)
    notes = [*market.notes, f"training volatility: {_listed(market.train.assets, volatility, '{:.3g}')}"]
    if market.test.half_spread is not None:
        notes.append(f"mean half-spread of the test part: {1e4 * market.test.half_spread.mean():.3g} bp")
    n_groups = len(np.unique(market.test.group))
    if n_groups < FEW_GROUPS:
        notes.append(
            f"too few test time groups ({n_groups}, want {FEW_GROUPS}): the standard errors are unreliable"
        )

    def converted(paths: PathSet) -> tuple[MarketPath, Array]:
        variance = np.broadcast_to(np.square(volatility)[paths.asset][:, None], paths.spot.shape)
        half_spread = None if paths.half_spread is None else jnp.asarray(paths.half_spread, jnp.float32)
        path = MarketPath(
            jnp.asarray(paths.spot, jnp.float32), jnp.asarray(variance, jnp.float32), half_spread
        )
        return path, jnp.asarray(np.unique(paths.group, return_inverse=True)[1], jnp.int32)

    return (*converted(market.train), *converted(market.test), tuple(notes))


def _require_windows(market: RecordedMarket) -> None:
    n_train, n_test, n_times = len(market.train.spot), len(market.test.spot), market.train.spot.shape[1]
    if min(n_train, n_test) < 2:
        raise UsageError(
            f"too few windows: {n_train} training and {n_test} test windows of {n_times} prices, at least "
            "2 of each are needed; give more data, shorten market.n_steps or change the test fraction"
        )


def _seen_in_training(market: RecordedMarket, *, dt: float) -> tuple[RecordedMarket, np.ndarray]:
    """The market without rows of assets that training never saw, and each asset's training volatility."""
    volatility = asset_volatility(market.train, dt=dt)
    still = [name for name, value in zip(market.train.assets, volatility, strict=True) if value == 0]
    if still:
        raise UsageError(f"training prices never move for {', '.join(still)}: leave them out of the data")
    unseen = np.isnan(volatility)[market.test.asset]
    if not unseen.any():
        return market, volatility
    names = ", ".join(market.test.assets[index] for index in np.unique(market.test.asset[unseen]))
    note = f"{unseen.sum()} test rows dropped, of assets without training rows: {names}"
    return market._replace(test=take_rows(market.test, ~unseen), notes=(*market.notes, note)), volatility


def _listed(names: tuple[str, ...], values: np.ndarray, form: str) -> str:
    """'A 0.2, B 0.3' of the assets that have a value, or the range where they are many."""
    known = [(name, value) for name, value in zip(names, values, strict=True) if np.isfinite(value)]
    if len(known) <= 8:
        return ", ".join(f"{name} {form.format(value)}" for name, value in known)
    low, high = min(value for _, value in known), max(value for _, value in known)
    return f"{form.format(low)} to {form.format(high)} over {len(known)} assets"
