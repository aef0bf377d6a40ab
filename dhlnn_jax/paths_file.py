"""The user's own paths, from a .npz or .parquet file."""

from pathlib import Path

import numpy as np

from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import read_arrays
from dhlnn_jax.recorded import (
    RecordedMarket,
    normalised_paths,
    require_fraction,
    require_steps,
    split_by_group,
    take_rows,
)


def load_paths_file(path: str | Path, *, n_steps: int, test_fraction: float) -> RecordedMarket:
    """The user's own paths with their groups, divided by their first price.

    `.npz`: `spot` [n_rows, >= n_steps + 1], and optionally per row `group_id` (or `time_id`: when it was
    recorded), `asset` (or `stock_id`), `is_test` (bool, else the last groups are the test part), and
    `half_spread` like `spot`. `.parquet`: one price a row with columns `path_id`, `step` (0, 1, ...),
    `spot` and the same optional columns. Without a group every path is its own. Points after the first
    n_steps + 1 of a path are left out, and this is noted.

    Raises: UsageError for a missing or unreadable file, a missing column, too short paths, a price that is
      not finite and positive, a half-spread outside [0, 1), or a group on both sides of `is_test`.
    """
    file = Path(path).expanduser()
    require_steps(n_steps)
    require_fraction(test_fraction)
    if not file.is_file():
        raise UsageError(f"{file}: no such file; market.path must name a .npz or .parquet file of paths")
    if file.suffix not in (".npz", ".parquet"):
        raise UsageError(f"{file}: paths are read from .npz or .parquet, not {file.suffix or 'a bare name'}")
    arrays, n_times = (_read_npz if file.suffix == ".npz" else _read_long)(file, n_steps + 1)
    price = arrays["spot"]
    _require(np.isfinite(price) & (price > 0), price, f"{file}: spot", "must be finite and positive")
    half_spread = arrays.get("half_spread")
    if half_spread is not None:
        good = (half_spread >= 0) & (half_spread < 1)
        _require(good, half_spread, f"{file}: half_spread", "must lie in [0, 1)")
    group, _ = _labels(file, arrays, ("group_id", "time_id"), np.arange(len(price)))
    asset, assets = _labels(file, arrays, ("asset", "stock_id"), np.full(len(price), "asset"))
    paths = normalised_paths(price, asset=asset, group=group, assets=assets, half_spread=half_spread)
    notes: tuple[str, ...] = (
        f"{file.name}: {len(price)} paths of {len(assets)} assets in {len(np.unique(group))} time groups",
    )
    if n_times > n_steps + 1:
        notes += (f"only the first {n_steps + 1} points of each path are used, up to {n_times} are there",)
    if "is_test" not in arrays:
        return RecordedMarket(*split_by_group(paths, test_fraction=test_fraction), notes)
    is_test = arrays["is_test"]
    if is_test.dtype != bool or is_test.shape != group.shape:
        raise UsageError(f"{file}: is_test must be one true or false (bool) for each of {len(price)} paths")
    test_groups = np.unique(group[is_test])
    n_shared = len(np.intersect1d(test_groups, group[~is_test]))
    if n_shared:
        raise UsageError(f"{file}: is_test splits {n_shared} time groups; split by time, never by row")
    in_test = np.isin(paths.group, test_groups)
    return RecordedMarket(take_rows(paths, ~in_test), take_rows(paths, in_test), notes)


def _require(good: np.ndarray, values: np.ndarray, what: str, wanted: str) -> None:
    if not good.all():
        row, column = np.argwhere(~good)[0]
        raise UsageError(
            f"{what} {wanted}: {(~good).sum()} of {good.size} values are not, the first is "
            f"{values[row, column]} at row {row}, column {column} (counted from 0)"
        )


def _labels(
    file: Path, arrays: dict[str, np.ndarray], names: tuple[str, ...], default: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Index of each row's label among the sorted labels, and the labels."""
    name = next((name for name in names if name in arrays), None)
    values = default if name is None else arrays[name]
    whole = values.dtype.kind in "iubUM" or (values.dtype.kind == "f" and bool(np.isfinite(values).all()))
    if values.shape != arrays["spot"].shape[:1] or not whole:
        raise UsageError(
            f"{file}: {name} must hold one number or text for each of {len(arrays['spot'])} paths"
        )
    labels, index = np.unique(values, return_inverse=True)
    return index, tuple(str(label) for label in labels)


def _read_npz(file: Path, n_points: int) -> tuple[dict[str, np.ndarray], int]:
    arrays = read_arrays(file)
    if "spot" not in arrays:
        raise UsageError(
            f"{file}: no array 'spot' [n_paths, n_times], found {', '.join(sorted(arrays)) or 'none'}"
        )
    shape = arrays["spot"].shape
    if len(shape) != 2:
        raise UsageError(f"{file}: spot must be [n_paths, n_times], its shape is {list(shape)}")
    _require_points(file, shape[1], n_points)
    for name in ("spot", "half_spread"):
        if name in arrays:
            if arrays[name].shape != shape or arrays[name].dtype.kind not in "iuf":
                raise UsageError(f"{file}: {name} must be numbers of shape {list(shape)}")
            arrays[name] = arrays[name][:, :n_points].astype(np.float64)
    return arrays, shape[1]


def _require_points(file: Path, n_there: int, n_points: int) -> None:
    if n_there < n_points:
        raise UsageError(
            f"{file}: {n_there} points in a path, but market.n_steps = {n_points - 1} needs {n_points} "
            "(n_steps + 1); set a smaller market.n_steps"
        )


def _read_long(file: Path, n_points: int) -> tuple[dict[str, np.ndarray], int]:
    import polars as pl

    try:
        frame = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UsageError(f"{file}: not readable as Parquet ({type(error).__name__})") from None
    for name in ("path_id", "step", "spot"):
        if name not in frame.columns:
            raise UsageError(f"{file}: no column {name!r}, found {', '.join(frame.columns)}")
    known = ("group_id", "time_id", "asset", "stock_id", "is_test", "half_spread")
    frame = frame.select("path_id", "step", "spot", *(name for name in known if name in frame.columns))
    for name in frame.columns:
        if frame[name].null_count():
            raise UsageError(
                f"{file}: column {name!r} is empty in {frame[name].null_count()} of {len(frame)} rows"
            )
        if name in ("step", "spot", "half_spread") and not frame.schema[name].is_numeric():
            raise UsageError(f"{file}: column {name!r} must hold numbers, found {frame.schema[name]}")
    frame = frame.sort("path_id", "step").with_columns(point=pl.int_range(pl.len()).over("path_id"))
    jump = frame.filter(pl.col("point") != pl.col("step"))
    if len(jump):
        raise UsageError(f"{file}: steps of path {jump['path_id'][0]} are not 0, 1, 2, ... once each")
    n_times = frame.group_by("path_id").len()["len"]
    _require_points(file, int(n_times.min() or 0), n_points)  # type: ignore[arg-type]
    arrays = {}
    for name in frame.columns[2:-1]:
        values = frame.filter(pl.col("point") < n_points)[name]
        flat = np.array(values.to_list()) if values.dtype == pl.String else values.to_numpy()
        table = flat.reshape(-1, n_points)
        if name in ("spot", "half_spread"):
            arrays[name] = table.astype(np.float64)
        elif (table != table[:, :1]).any():
            raise UsageError(f"{file}: {name} changes within a path, it must be one value a path")
        else:
            arrays[name] = table[:, 0]
    return arrays, int(n_times.max())  # type: ignore[arg-type]
