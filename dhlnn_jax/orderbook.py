"""Order books in Optiver's layout: weighted average prices on an even grid, read stock by stock, cached."""

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from dhlnn_jax.errors import UsageError
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.recorded import (
    RecordedMarket,
    normalised_paths,
    require_fraction,
    require_steps,
    split_by_group,
)

SECONDS_PER_YEAR = 252 * 6.5 * 3600  # of trading
LAST_SECOND = 599  # of a bucket of ten minutes, counted from 0
CACHE_VERSION = 1  # raise it when the cached paths of one and the same folder change

WAPS = ("auto", "level_average", "cross_weighted")
QUOTES = ("bid_price", "ask_price", "bid_size", "ask_size")


def sample_seconds(n_steps: int) -> Int[np.ndarray, " n_times"]:
    """n_steps + 1 whole seconds of a bucket, evenly from 0 to 599, rounded to the nearest (half to even)."""
    return np.rint(np.linspace(0, LAST_SECOND, n_steps + 1)).astype(np.int64)


def cross_weighted_wap(
    bid_price: Float[np.ndarray, "..."],
    ask_price: Float[np.ndarray, "..."],
    bid_size: Float[np.ndarray, "..."],
    ask_size: Float[np.ndarray, "..."],
) -> Float[np.ndarray, "..."]:
    """Optiver's weighted average price of the first level: (bid ask_size + ask bid_size) / (sum of sizes)."""
    return (bid_price * ask_size + ask_price * bid_size) / (bid_size + ask_size)


def level_average_wap(
    bid_price: Float[np.ndarray, "n_levels ..."],
    ask_price: Float[np.ndarray, "n_levels ..."],
    bid_size: Float[np.ndarray, "n_levels ..."],
    ask_size: Float[np.ndarray, "n_levels ..."],
) -> Float[np.ndarray, "..."]:
    """Mean of the size-weighted bid and the size-weighted ask over the levels; with one level it is the mid.

    A level without a finite, positive price and size is not there and has no weight.

    Source: paper Eq. (31)-(33).
    """

    def average(price: np.ndarray, size: np.ndarray) -> np.ndarray:
        there = np.isfinite(price) & (price > 0) & np.isfinite(size) & (size > 0)
        weight = np.where(there, size, 0.0)
        return (np.where(there, price, 0.0) * weight).sum(axis=0) / weight.sum(axis=0)

    return 0.5 * (average(bid_price, bid_size) + average(ask_price, ask_size))


def forward_filled(
    bucket: Int[np.ndarray, " n_rows"],
    second: Int[np.ndarray, " n_rows"],
    seconds: Int[np.ndarray, " n_times"],
) -> tuple[Int[np.ndarray, " n_buckets"], Int[np.ndarray, "n_buckets n_times"]]:
    """Buckets, and for each the index of its last row at or before each of the given seconds.

    Buckets without a row at or before the first of the seconds are left out: filling them backwards
    would look ahead.
    """
    key = bucket * (LAST_SECOND + 1) + second
    order = np.argsort(key, kind="stable")
    buckets = np.unique(bucket)
    wanted = buckets[:, None] * (LAST_SECOND + 1) + seconds
    found = np.searchsorted(key[order], wanted, side="right") - 1
    rows = order[np.maximum(found, 0)] if len(order) else found
    complete = (found[:, 0] >= 0) & (bucket[rows[:, 0]] == buckets)
    return buckets[complete], rows[complete]


def load_order_book(
    path: str | Path,
    *,
    n_steps: int,
    wap: str = "auto",
    test_fraction: float = 0.3,
    max_bad_fraction: float = 0.01,
    cache: str | Path | None = None,
) -> RecordedMarket:
    """Paths of weighted average prices, one for each ten-minute bucket of each stock, split by bucket.

    Rows hold from their second on (forward fill); the price is taken at `sample_seconds(n_steps)` and
    divided by its value at second 0. half_spread = (ask - bid) / (2 mid) of the first level. Crossed or
    empty rows are dropped, and a bucket without a row at second 0 is too. group is time_id, equal across
    stocks; in Kaggle's files its order is not the order of time, but its buckets are still separate times.

    Args:
      path: folder that holds book_train.parquet/ (else book_test.parquet/), or that folder itself, with
        stock_id=k/*.parquet of time_id, seconds_in_bucket, bid_price1, ask_price1, bid_size1, ask_size1 and,
        for the level average over two levels, the same four with 2.
      wap: level_average or cross_weighted; auto is the first where level 2 exists, else the second.
      test_fraction: of the buckets, with the highest time_id.
      max_bad_fraction: of the rows; more crossed or empty ones are refused.
      cache: .npz file to keep the paths in; None is one in the user's cache folder. It is rebuilt when
        the files, n_steps or wap change, or when it cannot be read.
    Raises: UsageError for a missing folder or column, seconds outside 0..599, or too many bad rows.
    """
    require_fraction(test_fraction)
    require_steps(n_steps, most=LAST_SECOND)
    if wap not in WAPS:
        raise UsageError(f"wap must be one of {', '.join(WAPS)}, got {wap!r}")
    if not 0 <= max_bad_fraction <= 1:
        raise UsageError(f"max_bad_fraction must lie in [0, 1], got {max_bad_fraction}")
    stocks = stock_files(Path(path).expanduser())
    n_levels = (
        2 if {f"{quote}2" for quote in QUOTES} <= set(_columns_of(next(iter(stocks.values()))[0])) else 1
    )
    used = wap if wap != "auto" else ("level_average" if n_levels == 2 else "cross_weighted")
    key = _cache_key(stocks, n_steps, used)
    cache_file = (
        _default_cache_folder() / f"order_book_{key[:24]}.npz" if cache is None else Path(cache).expanduser()
    )
    read = _read_cache(cache_file, key)
    cached = f"paths cached in {cache_file}"
    if read is None:
        read = _read_books(
            stocks, n_steps=n_steps, n_levels=n_levels if used == "level_average" else 1, wap=used
        )
        try:
            _write_cache(cache_file, key, read)
        except OSError as error:
            cached = f"paths could not be cached in {cache_file} ({error.strerror})"
    n_rows, n_bad = int(read["n_rows"].sum()), int(read["n_bad"].sum())
    worst = list(stocks)[int(np.argmax(read["n_bad"]))]
    bad = f"{n_bad} of {n_rows} book rows crossed (bid >= ask) or empty" + (
        f", most in {worst}" if n_bad else ""
    )
    if n_bad > max_bad_fraction * n_rows:
        raise UsageError(
            f"{path}: {bad}; at most a fraction {max_bad_fraction:g} is allowed (max_bad_fraction)"
        )
    paths = normalised_paths(
        read["price"],
        asset=read["asset"],
        group=read["group"],
        assets=tuple(stocks),
        half_spread=read["half_spread"],
    )
    levels = {
        "cross_weighted": "cross-weighted, level 1",
        "level_average": f"level average over {n_levels} level(s)",
    }
    mid = ", which is the mid" if used == "level_average" and n_levels == 1 else ""
    notes = (
        f"{len(paths.spot)} buckets of {len(stocks)} stocks at {len(np.unique(paths.group))} times",
        f"weighted average price: {levels[used]}{mid}",
        f"{bad}; dropped",
        f"{int(read['n_late'].sum())} buckets dropped, without a row at second 0",
        cached,
    )
    return RecordedMarket(*split_by_group(paths, test_fraction=test_fraction), notes)


def stock_files(path: Path) -> dict[str, list[Path]]:
    """Parquet files of each stock_id=k folder, in the order of k."""
    if not path.is_dir():
        raise UsageError(
            f"{path}: no such folder; market.path must hold book_train.parquet/stock_id=k/*.parquet"
        )
    for folder in (path, path / "book_train.parquet", path / "book_test.parquet"):
        found = {item.name: sorted(item.glob("*.parquet")) for item in folder.glob("stock_id=*")}
        if found:
            break
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        raise UsageError(f"{path}: no *.parquet in {empty[0] if empty else 'book_train.parquet/stock_id=k/'}")

    def number(name: str) -> tuple[int, str]:
        tail = name.removeprefix("stock_id=")
        return (int(tail) if tail.isdecimal() else -1, tail)

    return {name: found[name] for name in sorted(found, key=number)}


def _columns_of(file: Path) -> list[str]:
    import polars as pl

    try:
        return list(pl.read_parquet_schema(file))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UsageError(f"{file}: not readable as Parquet ({type(error).__name__})") from None


def _read_books(
    stocks: dict[str, list[Path]], *, n_steps: int, n_levels: int, wap: str
) -> dict[str, np.ndarray]:
    """Prices and half-spreads [n_paths, n_steps + 1] of all stocks, and the counts of each stock."""
    parts = []
    with progress_bar("reading order books", total=len(stocks)) as advance:
        for index, (name, files) in enumerate(stocks.items()):
            parts.append(_read_stock(files, n_steps=n_steps, n_levels=n_levels, wap=wap))
            parts[-1]["asset"] = np.full(len(parts[-1]["price"]), index)
            advance(note=name)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read_stock(files: list[Path], *, n_steps: int, n_levels: int, wap: str) -> dict[str, np.ndarray]:
    import polars as pl

    quotes = [f"{quote}{level}" for quote in QUOTES for level in range(1, n_levels + 1)]
    columns = ["time_id", "seconds_in_bucket", *quotes]
    for file in files:
        missing = [name for name in columns if name not in (found := _columns_of(file))]
        if missing:
            raise UsageError(f"{file}: no column {', '.join(missing)}; found {', '.join(found)}")
    try:
        frame = pl.concat(
            [
                pl.read_parquet(file, columns=columns, hive_partitioning=False).select(
                    pl.col(name).cast(pl.Float64) for name in columns
                )
                for file in files
            ]
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UsageError(f"{files[0].parent}: not readable as numbers ({type(error).__name__})") from None
    time_id, second = frame["time_id"].to_numpy(), frame["seconds_in_bucket"].to_numpy()
    outside = (second < 0) | (second > LAST_SECOND)
    if outside.any():
        raise UsageError(
            f"{files[0].parent}: seconds_in_bucket must be 0..{LAST_SECOND}, found {second[outside][0]:g}"
        )
    # [n_levels, n_rows] each
    table = {quote: frame.select(f"{quote}{i + 1}" for i in range(n_levels)).to_numpy().T for quote in QUOTES}
    good = np.isfinite(time_id) & np.isfinite(second) & _is_book({quote: table[quote][0] for quote in QUOTES})
    buckets, rows = forward_filled(
        time_id[good].astype(np.int64), second[good].astype(np.int64), sample_seconds(n_steps)
    )
    sampled = {quote: values[:, good][:, rows] for quote, values in table.items()}
    first = {quote: values[0] for quote, values in sampled.items()}
    bid, ask = first["bid_price"], first["ask_price"]
    return {
        "price": level_average_wap(**sampled) if wap == "level_average" else cross_weighted_wap(**first),
        "half_spread": (ask - bid) / (ask + bid),
        "group": buckets,
        "n_rows": np.array([len(good)]),
        "n_bad": np.array([(~good).sum()]),
        "n_late": np.array([len(np.unique(time_id[np.isfinite(time_id)])) - len(buckets)]),
    }


def _is_book(first: dict[str, np.ndarray]) -> Bool[np.ndarray, " n_rows"]:
    """Rows whose first level has finite positive prices and sizes, and the bid below the ask."""
    positive = [np.isfinite(values) & (values > 0) for values in first.values()]
    return np.logical_and.reduce(positive) & (first["bid_price"] < first["ask_price"])


def _default_cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dhlnn_jax"


def _cache_key(stocks: dict[str, list[Path]], n_steps: int, wap: str) -> str:
    files = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for f in stocks.values()
        for file in f
    ]
    return hashlib.sha256(json.dumps([CACHE_VERSION, files, n_steps, wap]).encode()).hexdigest()


def _read_cache(file: Path, key: str) -> dict[str, np.ndarray] | None:
    """The cached arrays, or None where they are missing, of other input or damaged (zip checks their CRC)."""
    if file.suffix != ".npz" or file.is_dir():
        raise UsageError(f"{file}: the cache must be a .npz file")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, KeyError, zipfile.BadZipFile, zlib.error):
        return None
    if "order_book_key" not in arrays:
        raise UsageError(f"{file}: not a cache of order-book paths, and not overwritten; name another file")
    return arrays if str(arrays.pop("order_book_key")) == key else None


def _write_cache(file: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Atomic: a reader sees the whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, order_book_key=np.array(key), **arrays)  # type: ignore[arg-type]
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
