import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dhlnn_jax import orderbook, recorded
from dhlnn_jax.errors import UsageError

SHARED = Path(__file__).parents[2] / "shared/data"
ORDER_BOOK = SHARED / "order_book"
SCHEMA = SHARED / "optiver_schema"
needs_order_book = pytest.mark.skipif(not ORDER_BOOK.exists(), reason="needs ../shared/data/order_book")
needs_schema = pytest.mark.skipif(not SCHEMA.exists(), reason="needs ../shared/data/optiver_schema")


def usage_error(match):
    """One line, and the given text in it."""
    return pytest.raises(UsageError, match=rf"\A[^\n]*{match}[^\n]*\Z")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dhlnn_jax"


def book(rows, columns=("time_id", "seconds_in_bucket", *(f"{quote}1" for quote in orderbook.QUOTES))):
    return pl.DataFrame(rows, schema=list(columns), orient="row")


def write(folder, *stocks, name="book_train.parquet"):
    for number, frame in enumerate(stocks):
        (folder / name / f"stock_id={number}").mkdir(parents=True, exist_ok=True)
        frame.write_parquet(folder / name / f"stock_id={number}" / "part-0.parquet")
    return folder


# time_id, second, bid, ask, bid size, ask size; WAP = (bid ask_size + ask bid_size) / sizes
ROWS = [
    (5, 0, 99.0, 101.0, 1, 1),  # WAP 100, half-spread 0.01
    (5, 250, 99.0, 103.0, 1, 3),  # 100, 2 / 101
    (5, 301, 90.0, 130.0, 1, 1),  # after the middle sample
    (5, 598, 104.0, 106.0, 3, 1),  # 105.5, 1 / 105
    (7, 0, 49.0, 51.0, 1, 1),  # 50, 0.02
    (7, 300, 50.0, 54.0, 1, 1),  # 52, 2 / 52
]


def test_sample_seconds_span_the_bucket():
    np.testing.assert_array_equal(orderbook.sample_seconds(2), [0, 300, 599])  # 299.5 to the even 300
    np.testing.assert_array_equal(orderbook.sample_seconds(599), np.arange(600))
    thirty = orderbook.sample_seconds(30)
    assert len(thirty) == 31 and thirty[0] == 0 and thirty[-1] == 599
    assert set(np.diff(thirty)) <= {19, 20, 21}


def test_weighted_average_prices_by_hand():
    levels = {
        "bid_price": np.array([[10.0], [9.0]]),
        "ask_price": np.array([[11.0], [13.0]]),
        "bid_size": np.array([[3.0], [1.0]]),
        "ask_size": np.array([[1.0], [1.0]]),
    }
    first = {name: values[0] for name, values in levels.items()}
    # bids (30 + 9) / 4 = 9.75, asks (11 + 13) / 2 = 12
    np.testing.assert_allclose(orderbook.level_average_wap(**levels), [10.875])
    np.testing.assert_allclose(orderbook.level_average_wap(**{n: v[None] for n, v in first.items()}), [10.5])
    np.testing.assert_allclose(orderbook.cross_weighted_wap(**first), [(10 * 1 + 11 * 3) / 4])


@pytest.mark.parametrize("price, size", [(np.nan, 1.0), (9.0, 0.0), (9.0, np.nan), (0.0, 5.0)])
def test_level_that_is_not_there_has_no_weight(price, size):
    wap = orderbook.level_average_wap(
        np.array([[10.0], [price]]), np.array([[11.0], [13.0]]), np.array([[3.0], [size]]), np.ones((2, 1))
    )
    np.testing.assert_allclose(wap, [(10 + 12) / 2])


def test_forward_fill_by_hand():
    buckets, rows = orderbook.forward_filled(
        np.array([3, 3, 3, 3, 8, 8, 9]), np.array([0, 4, 4, 9, 1, 5, 0]), np.array([0, 3, 4, 8, 9])
    )
    np.testing.assert_array_equal(buckets, [3, 9])  # bucket 8 starts after the first sample
    np.testing.assert_array_equal(rows, [[0, 0, 2, 2, 3], [6, 6, 6, 6, 6]])
    buckets, rows = orderbook.forward_filled(np.zeros(0, int), np.zeros(0, int), np.array([0, 3]))
    assert buckets.shape == (0,) and rows.shape == (0, 2)


def test_order_book_by_hand(tmp_path):
    path = write(tmp_path, book(ROWS[::-1]))
    market = orderbook.load_order_book(path, n_steps=2, test_fraction=0.5)
    np.testing.assert_allclose(market.train.spot, [[1, 1.0, 1.055]])
    np.testing.assert_allclose(market.test.spot, [[1, 52 / 50, 52 / 50]])
    np.testing.assert_allclose(market.train.half_spread, [[0.01, 2 / 101, 1 / 105]])
    np.testing.assert_allclose(market.test.half_spread, [[0.02, 2 / 52, 2 / 52]])
    assert market.train.group.tolist() == [5] and market.test.group.tolist() == [7]
    assert market.notes[:4] == (
        "2 buckets of 1 stocks at 2 times",
        "weighted average price: cross-weighted, level 1",
        "0 of 6 book rows crossed (bid >= ask) or empty; dropped",
        "0 buckets dropped, without a row at second 0",
    )


def test_mid_with_one_level_is_said(tmp_path):
    market = orderbook.load_order_book(
        write(tmp_path, book(ROWS)), n_steps=2, wap="level_average", test_fraction=0.5
    )
    np.testing.assert_allclose(market.train.spot, [[1, 1.01, 1.05]])
    assert market.notes[1] == "weighted average price: level average over 1 level(s), which is the mid"


def test_two_levels_by_hand(tmp_path):
    columns = ["time_id", "seconds_in_bucket", *(f"{q}{level}" for level in (1, 2) for q in orderbook.QUOTES)]
    rows = [
        (5, 0, 10.0, 11.0, 3, 1, 9.0, 13.0, 1, 1),  # bids 9.75, asks 12: 10.875
        (5, 2, 10.0, 12.0, 1, 1, 8.0, 14.0, 1, 3),  # bids 9, asks 13.5: 11.25
    ]
    path = write(tmp_path, book(rows, columns))
    market = orderbook.load_order_book(path, n_steps=1)
    np.testing.assert_allclose(market.train.spot, [[1, 11.25 / 10.875]])
    assert market.notes[1] == "weighted average price: level average over 2 level(s)"
    market = orderbook.load_order_book(path, n_steps=1, wap="cross_weighted")
    np.testing.assert_allclose(market.train.spot, [[1, 11 / 10.75]])
    np.testing.assert_allclose(market.train.half_spread, [[0.5 / 10.5, 1 / 11]])


def test_stocks_share_groups_and_are_ordered_by_number(tmp_path):
    frame = book(ROWS)
    path = write(tmp_path, *[frame] * 11)
    (path / "book_train.parquet" / "notes.txt").write_text("not a stock")
    market = orderbook.load_order_book(path, n_steps=2, test_fraction=0.5)
    assert market.train.assets == tuple(f"stock_id={k}" for k in range(11))
    assert market.train.asset.tolist() == list(range(11)) and set(market.train.group) == {5}
    again = orderbook.load_order_book(path / "book_train.parquet", n_steps=2, test_fraction=0.5)
    np.testing.assert_array_equal(again.test.spot, market.test.spot)


def test_several_files_of_a_stock_are_one_book(tmp_path):
    path = write(tmp_path, book(ROWS[:2]))
    book(ROWS[2:]).write_parquet(path / "book_train.parquet" / "stock_id=0" / "part-1.parquet")
    market = orderbook.load_order_book(path, n_steps=2, test_fraction=0.5)
    np.testing.assert_allclose(market.train.spot, [[1, 1.0, 1.055]])


def test_book_test_folder_is_read_too(tmp_path):
    path = write(tmp_path, book(ROWS), name="book_test.parquet")
    assert len(orderbook.load_order_book(path, n_steps=2, test_fraction=0.5).train.spot) == 1


def test_later_rows_leave_earlier_samples_unchanged(tmp_path):
    rng = np.random.default_rng(4)
    seconds = np.sort(rng.choice(np.arange(1, 600), 200, replace=False))
    rows = [
        (1, int(s), *map(float, 100 + rng.normal() + np.array([-0.5, 0.5])), *map(int, rng.integers(1, 9, 2)))
        for s in (0, *seconds)
    ]
    early = orderbook.load_order_book(write(tmp_path / "a", book(rows)), n_steps=30).train
    for second in (100, 311, 580):
        changed = [(r[0], r[1], r[2] + 5, r[3] + 5, *r[4:]) if r[1] > second else r for r in rows]
        late = orderbook.load_order_book(write(tmp_path / str(second), book(changed)), n_steps=30).train
        known = orderbook.sample_seconds(30) <= second
        np.testing.assert_array_equal(late.spot[:, known], early.spot[:, known])
        np.testing.assert_array_equal(late.half_spread[:, known], early.half_spread[:, known])
        assert (late.spot[:, ~known] != early.spot[:, ~known]).all()


def test_bucket_without_second_zero_is_dropped_not_filled_backwards(tmp_path):
    rows = [*ROWS, (6, 1, 99.0, 101.0, 1, 1), (6, 400, 99.0, 101.0, 1, 1)]
    market = orderbook.load_order_book(write(tmp_path, book(rows)), n_steps=2, test_fraction=0.5)
    assert market.train.group.tolist() == [5] and market.test.group.tolist() == [7]
    assert market.notes[3] == "1 buckets dropped, without a row at second 0"


BAD = [
    (5, 260, 101.0, 101.0, 1, 1),
    (5, 261, 102.0, 101.0, 1, 1),
    (5, 262, None, 101.0, 1, 1),
    (5, 263, float("nan"), 101.0, 1, 1),
    (5, 264, 99.0, -1.0, 1, 1),
    (5, 265, 99.0, 101.0, 0, 1),
    (5, 266, 99.0, 101.0, 1, None),
    (None, 267, 99.0, 101.0, 1, 1),
    (5, 268, 0.0, 101.0, 1, 1),
    (5, 269, 99.0, float("inf"), 1, 1),
]


def test_crossed_and_empty_rows_are_dropped_counted_and_refused_above_a_fraction(tmp_path):
    path = write(tmp_path, book(ROWS), book([*ROWS, *BAD]))
    market = orderbook.load_order_book(path, n_steps=2, test_fraction=0.5, max_bad_fraction=10 / 22)
    np.testing.assert_allclose(market.train.spot, [[1, 1.0, 1.055]] * 2)
    assert market.notes[2] == "10 of 22 book rows crossed (bid >= ask) or empty, most in stock_id=1; dropped"
    for _ in range(2):  # the second time from the cache
        with usage_error(
            r"10 of 22 book rows crossed .* most in stock_id=1; at most a fraction 0.01 is allowed"
        ):
            orderbook.load_order_book(path, n_steps=2, test_fraction=0.5)


def test_mistakes_get_one_line(tmp_path):
    path = write(tmp_path, book(ROWS))

    def load(path=path, n_steps=2, **kwargs):
        return orderbook.load_order_book(path, n_steps=n_steps, **kwargs)

    with usage_error("nowhere: no such folder; market.path must hold book_train.parquet/stock_id=k"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with usage_error(r"empty: no \*.parquet in book_train.parquet/stock_id=k/"):
        load(tmp_path / "empty")
    (tmp_path / "hollow" / "stock_id=3").mkdir(parents=True)
    with usage_error(r"hollow: no \*.parquet in stock_id=3"):
        load(tmp_path / "hollow")
    with usage_error("wap must be one of auto, level_average, cross_weighted, got 'mid'"):
        load(wap="mid")
    with usage_error("market.n_steps must be from 1 to 599 for this market, got 600"):
        load(n_steps=600)
    with usage_error("test_fraction must lie strictly between 0 and 1, got 0.0"):
        load(test_fraction=0.0)
    with usage_error(r"max_bad_fraction must lie in \[0, 1\], got 2.0"):
        load(max_bad_fraction=2.0)
    with usage_error("no column ask_size1; found time_id, seconds_in_bucket"):
        load(write(tmp_path / "missing", book(ROWS).drop("ask_size1")))
    with usage_error("seconds_in_bucket must be 0..599, found 600"):
        load(write(tmp_path / "late", book([*ROWS, (7, 600, 1.0, 2.0, 1, 1)])))
    with usage_error("not readable as numbers"):
        load(write(tmp_path / "text", book(ROWS).with_columns(bid_price1=pl.lit("dear"))))
    (tmp_path / "broken" / "stock_id=0").mkdir(parents=True)
    (tmp_path / "broken" / "stock_id=0" / "part.parquet").write_bytes(b"no")
    with usage_error("part.parquet: not readable as Parquet"):
        load(tmp_path / "broken")
    with usage_error("the cache must be a .npz file"):
        load(cache=tmp_path)
    with usage_error("too few windows: 1 training and 1 test windows of 3 prices"):
        recorded.as_market_paths(load(test_fraction=0.5), dt=1e-3)


def assert_same(a, b):
    for x, y in zip((a.train, a.test), (b.train, b.test), strict=True):
        for name in ("spot", "half_spread", "asset", "group"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
    assert a.train.assets == b.train.assets and a.notes == b.notes


def no_reading(*args, **kwargs):
    raise AssertionError("the books were read again")


def test_cache_hit_gives_the_same_and_reads_no_book(tmp_path, cache_folder, monkeypatch):
    path = write(tmp_path, book(ROWS), book(ROWS))
    first = orderbook.load_order_book(path, n_steps=2)
    (file,) = cache_folder.iterdir()
    assert file.suffix == ".npz" and first.notes[4] == f"paths cached in {file}"
    with monkeypatch.context() as patch:
        patch.setattr(orderbook, "_read_books", no_reading)
        assert_same(orderbook.load_order_book(path, n_steps=2), first)
        with pytest.raises(AssertionError, match="read again"):
            orderbook.load_order_book(path, n_steps=3)
        with pytest.raises(AssertionError, match="read again"):
            orderbook.load_order_book(path, n_steps=2, wap="level_average")
    # a changed book is read again
    write(tmp_path, book([*ROWS[:-1], (7, 300, 50.0, 55.0, 1, 1)]))
    changed = orderbook.load_order_book(path, n_steps=2)
    assert not np.array_equal(changed.test.spot, first.test.spot)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    path, cache = write(tmp_path, book(ROWS)), tmp_path / "mine" / "paths.npz"
    first = orderbook.load_order_book(path, n_steps=2, cache=cache)
    good = cache.read_bytes()
    at = good.index(b"half_spread.npy") + 200
    bad = {
        "truncated": good[: len(good) // 2],
        "flipped": good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :],
        "empty": b"",
        "text": b"hello",
    }[damage]
    cache.write_bytes(bad)
    assert_same(orderbook.load_order_book(path, n_steps=2, cache=cache), first)
    assert cache.read_bytes() != bad
    assert [file.name for file in cache.parent.iterdir()] == ["paths.npz"]


def test_cache_of_other_books_is_rebuilt_and_a_strange_file_is_left_alone(tmp_path):
    one, two = write(tmp_path / "a", book(ROWS)), write(tmp_path / "b", book(ROWS[:4]))
    cache = tmp_path / "paths.npz"
    orderbook.load_order_book(one, n_steps=2, cache=cache)
    assert len(orderbook.load_order_book(two, n_steps=2, cache=cache).train.spot) == 1
    np.savez(cache, spot=np.ones((2, 3)))
    before = cache.read_bytes()
    with usage_error("not a cache of order-book paths, and not overwritten"):
        orderbook.load_order_book(one, n_steps=2, cache=cache)
    assert cache.read_bytes() == before


def test_cache_that_cannot_be_written_is_only_noted(tmp_path):
    path = write(tmp_path, book(ROWS))
    (tmp_path / "file").write_text("in the way")
    market = orderbook.load_order_book(path, n_steps=2, cache=tmp_path / "file" / "paths.npz")
    assert len(market.train.spot) == 1
    assert market.notes[4].startswith("paths could not be cached in")


@needs_order_book
def test_real_order_books():
    market = orderbook.load_order_book(ORDER_BOOK, n_steps=30)
    assert len(market.train.spot) + len(market.test.spot) == 780
    assert not np.intersect1d(market.train.group, market.test.group).size
    dt = 600 / 30 / orderbook.SECONDS_PER_YEAR
    volatility = recorded.asset_volatility(market.train, dt=dt)
    assert (volatility > 0.05).all() and (volatility < 0.5).all()
    half_spread_bp = [1e4 * market.train.half_spread[market.train.asset == k].mean() for k in range(4)]
    np.testing.assert_allclose(half_spread_bp, [1.07, 3.58, 1.32, 0.30], rtol=0.05)
    train, _, test, test_groups, notes = recorded.as_market_paths(market, dt=dt)
    assert train.spot.shape[1:] == (31,) and test.half_spread.shape == test.spot.shape
    assert int(test_groups.max()) + 1 == 58
    assert "0 of 338024 book rows crossed (bid >= ask) or empty; dropped" in notes


@needs_order_book
def test_real_order_book_samples_are_the_last_known_rows():
    frame = pl.read_parquet(ORDER_BOOK / "book_train.parquet/stock_id=2/*.parquet", hive_partitioning=False)
    market = orderbook.load_order_book(ORDER_BOOK, n_steps=30)
    row = 4 * 10 + 2  # the eleventh time, the third stock
    bucket = frame.filter(pl.col("time_id") == market.train.group[row])
    wap = []
    for second in orderbook.sample_seconds(30):
        last = bucket.filter(pl.col("seconds_in_bucket") <= int(second)).tail(1).to_dicts()[0]
        sizes = last["bid_size1"] + last["ask_size1"]
        wap.append((last["bid_price1"] * last["ask_size1"] + last["ask_price1"] * last["bid_size1"]) / sizes)
    np.testing.assert_allclose(market.train.spot[row], np.array(wap) / wap[0], rtol=1e-12)


@needs_schema
def test_real_optiver_columns_use_level_two():
    market = orderbook.load_order_book(SCHEMA, n_steps=30)
    assert market.notes[1] == "weighted average price: level average over 2 level(s)"
    file = next((SCHEMA / "book_test.parquet/stock_id=0").glob("*.parquet"))
    rows = pl.read_parquet(file, hive_partitioning=False).cast(pl.Float64).to_dicts()

    def by_hand(row):
        sides = [
            (row[f"{s}_price1"] * row[f"{s}_size1"] + row[f"{s}_price2"] * row[f"{s}_size2"])
            / (row[f"{s}_size1"] + row[f"{s}_size2"])
            for s in ("bid", "ask")
        ]
        return sum(sides) / 2

    np.testing.assert_allclose(market.train.spot[0, 1:], by_hand(rows[2]) / by_hand(rows[0]), rtol=1e-12)


def test_default_cache_is_in_the_home_folder_without_xdg(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setitem(os.environ, "HOME", "/somewhere")
    assert orderbook._default_cache_folder() == Path("/somewhere/.cache/dhlnn_jax")
