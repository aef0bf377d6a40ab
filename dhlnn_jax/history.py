"""Daily closes: windows of n_steps + 1 closes, split at a date."""

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from dhlnn_jax.errors import UsageError
from dhlnn_jax.recorded import PathSet, RecordedMarket, normalised_paths, require_fraction, require_steps

COLUMNS = ("date", "ticker", "close")


def load_history(
    path: str | Path | None = None,
    *,
    n_steps: int,
    tickers: Sequence[str] | None = None,
    test_fraction: float = 0.35,
) -> RecordedMarket:
    """Windows of n_steps + 1 daily closes, each divided by its first.

    The calendar is the union of all dates; a ticker takes part in a window if it has every close in it.
    Training windows start on every date and end before the split date. Test windows start on or after
    it and are laid side by side, so that no two of them share a close. Windows that straddle the split
    are dropped.

    Args:
      path: CSV or Parquet with columns date, ticker, close; None is the shipped file (data/README.md).
      tickers: which to use; None or none is all.
      test_fraction: of the dates, at the end.
    Returns: group is the window's number for test rows and its start date's number for training rows,
      where windows overlap and groups are therefore not independent.
    Raises: UsageError for a missing file or column, an unknown ticker, a (date, ticker) given twice, a date
      that cannot be read, or a close that is not finite and positive.
    """
    require_steps(n_steps)
    require_fraction(test_fraction)
    if path is None:
        source = "the shipped closes"
        with resources.as_file(resources.files("dhlnn_jax.data") / "closes.parquet") as file:
            dates, assets, close = close_table(file, tickers=tickers)
    else:
        file = Path(path).expanduser()
        source = file.name
        dates, assets, close = close_table(file, tickers=tickers)
    split = len(dates) - round(test_fraction * len(dates))
    train, test, n_straddling = split_windows(close, assets=assets, n_steps=n_steps, split=split)
    split_date = dates[split] if split < len(dates) else "none"
    notes = (
        f"{source}: {', '.join(assets)} on {len(dates)} dates from {dates[0]} to {dates[-1]}, "
        f"test part from {split_date}",
        f"{len(train.spot)} overlapping training windows on {len(np.unique(train.group))} start dates, "
        f"{len(test.spot)} test windows at {len(np.unique(test.group))} separate times, "
        f"{n_straddling} windows across the split dropped",
    )
    return RecordedMarket(train, test, notes)


def split_windows(
    close: Float[np.ndarray, "n_dates n_assets"], *, assets: tuple[str, ...], n_steps: int, split: int
) -> tuple[PathSet, PathSet, int]:
    """Training and test windows on either side of a date, and how many across it were dropped.

    Training windows start at 0, 1, 2, ... and end at split - 1 at the latest; test windows start at
    split, split + n_steps + 1, ...; group is the start and the number of the window respectively.

    Args:
      close: money; NaN where an asset has no close.
      split: index of the first date of the test part.
    """
    n_dates = len(close)
    train_starts = np.arange(max(split - n_steps, 0))
    test_starts = np.arange(split, n_dates - n_steps, n_steps + 1)
    across = np.arange(max(split - n_steps, 0), min(split, n_dates - n_steps))
    train = windows(close, train_starts, train_starts, assets=assets, n_steps=n_steps)
    test = windows(close, test_starts, np.arange(len(test_starts)), assets=assets, n_steps=n_steps)
    dropped = windows(close, across, across, assets=assets, n_steps=n_steps)
    return train, test, len(dropped.spot)


def windows(
    close: Float[np.ndarray, "n_dates n_assets"],
    starts: Int[np.ndarray, " n_windows"],
    groups: Int[np.ndarray, " n_windows"],
    *,
    assets: tuple[str, ...],
    n_steps: int,
) -> PathSet:
    """One row for each window and asset that has all n_steps + 1 closes from the window's start on."""
    dates = starts[:, None] + np.arange(n_steps + 1)
    price = np.moveaxis(close[dates], 2, 1)  # [n_windows, n_assets, n_steps + 1]
    window, asset = np.nonzero(np.isfinite(price).all(axis=2))
    return normalised_paths(price[window, asset], asset=asset, group=groups[window], assets=assets)


def close_table(
    file: Path, *, tickers: Sequence[str] | None = None
) -> tuple[list[str], tuple[str, ...], np.ndarray]:
    """Dates (ISO), tickers and closes [n_dates, n_tickers] of a long table; NaN where there is no row."""
    import polars as pl

    if not file.is_file():
        raise UsageError(
            f"{file}: no such file; market.path must name a CSV or Parquet of {', '.join(COLUMNS)}"
        )
    if file.suffix not in (".csv", ".parquet"):
        raise UsageError(f"{file}: closes are read from .csv or .parquet, not {file.suffix or 'a bare name'}")
    try:
        frame = pl.read_parquet(file) if file.suffix == ".parquet" else pl.read_csv(file, infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UsageError(f"{file}: not readable as a table ({type(error).__name__})") from None
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise UsageError(f"{file}: no column {', '.join(missing)}; found {', '.join(frame.columns)}")
    kind = frame.schema["date"]
    if kind != pl.String and not kind.is_temporal():
        raise UsageError(f"{file}: column date must hold dates or text like 2024-01-31, found {kind}")
    date = pl.col("date").str.to_date("%Y-%m-%d", strict=False) if kind == pl.String else pl.col("date")
    try:
        frame = frame.select(
            date.cast(pl.Date, strict=False),
            pl.col("ticker").cast(pl.String),
            pl.col("close").cast(pl.Float64, strict=False),
        )
    except pl.exceptions.PolarsError as error:
        raise UsageError(f"{file}: date, ticker or close has a wrong type ({type(error).__name__})") from None
    _require_rows(file, frame["date"].is_not_null(), "a date written as YYYY-MM-DD")
    _require_rows(file, frame["ticker"].is_not_null(), "a ticker")
    known = frame["ticker"].unique().sort().to_list()
    assets = tuple(dict.fromkeys(tickers or known))
    for name in assets:
        if name not in known:
            nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
            hint = f"the nearest is {nearest[0]!r}; " if nearest else ""
            raise UsageError(f"{file}: no ticker {name!r}; {hint}there are {', '.join(known[:20])}")
    is_price = (frame["close"].is_finite() & (frame["close"] > 0)).fill_null(False)
    _require_rows(file, is_price | ~frame["ticker"].is_in(assets), "a finite and positive close")
    frame = frame.filter(pl.col("ticker").is_in(assets))
    if not len(frame):
        raise UsageError(f"{file}: no rows")
    twice = frame.filter(frame.select("date", "ticker").is_duplicated())
    if len(twice):
        raise UsageError(
            f"{file}: {twice['ticker'][0]} on {twice['date'][0]} is given more than once; "
            "one close for each date and ticker"
        )
    table = frame.pivot("ticker", index="date", values="close").sort("date")
    close = table.select(assets).to_numpy().astype(np.float64)
    return [date.isoformat() for date in table["date"]], assets, close


def _require_rows(file: Path, good, wanted: str) -> None:  # good: polars Series of bool
    if not good.all():
        first = good.arg_min() + 1
        raise UsageError(
            f"{file}: {(~good).sum()} of {len(good)} rows without {wanted}, the first is row {first}"
        )
