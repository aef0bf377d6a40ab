import importlib.util
import runpy
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import dhlnn_jax.data
from dhlnn_jax import history, recorded
from dhlnn_jax.errors import UsageError

HERE = Path(dhlnn_jax.data.__file__).parent
# prices whose ratio tells which dates a window holds
CLOSE = np.stack([2.0 ** np.arange(10), 3.0 ** np.arange(10)], axis=1)


def usage_error(match):
    """One line, and the given text in it."""
    return pytest.raises(UsageError, match=rf"\A[^\n]*{match}[^\n]*\Z")


def table(close=CLOSE, names=("AA", "BB")):
    dates = [f"2020-01-{day + 1:02d}" for day in range(len(close))]
    rows = [
        (d, n, float(c)) for d, r in zip(dates, close, strict=True) for n, c in zip(names, r, strict=True)
    ]
    return pl.DataFrame(rows, schema=["date", "ticker", "close"], orient="row")


def write(folder, frame, name="closes.csv"):
    file = folder / name
    frame.write_csv(file) if file.suffix == ".csv" else frame.write_parquet(file)
    return file


def test_windows_by_hand_with_a_missing_close():
    close = np.array([[1.0, 5.0], [2.0, np.nan], [3.0, 7.0], [6.0, 14.0]])
    paths = history.windows(close, np.array([0, 1, 2]), np.array([4, 5, 6]), assets=("A", "B"), n_steps=1)
    np.testing.assert_allclose(paths.spot, [[1, 2], [1, 1.5], [1, 2], [1, 2]])
    np.testing.assert_array_equal(paths.asset, [0, 0, 0, 1])
    np.testing.assert_array_equal(paths.group, [4, 5, 6, 6])


def test_split_windows_train_overlap_test_do_not_and_straddling_ones_are_dropped():
    # one asset whose closes are 1 .. 10: the price level names the date
    close = np.arange(1.0, 11.0)[:, None]
    train, test, n_dropped = history.split_windows(close, assets=("A",), n_steps=2, split=4)
    np.testing.assert_allclose(train.spot, [[1, 2, 3], [1, 3 / 2, 4 / 2]])  # dates 0-2 and 1-3
    np.testing.assert_allclose(test.spot, [[1, 6 / 5, 7 / 5], [1, 9 / 8, 10 / 8]])  # dates 4-6 and 7-9
    np.testing.assert_array_equal(train.group, [0, 1])
    np.testing.assert_array_equal(test.group, [0, 1])
    assert n_dropped == 2  # those that start on dates 2 and 3


@pytest.mark.parametrize("n_dates, n_steps, split", [(3, 4, 2), (5, 4, 0), (5, 4, 5), (10, 1, 9), (9, 2, 1)])
def test_split_windows_at_the_edges(n_dates, n_steps, split):
    close = np.arange(1.0, n_dates + 1)[:, None]
    train, test, n_dropped = history.split_windows(close, assets=("A",), n_steps=n_steps, split=split)
    assert len(train.spot) == max(split - n_steps, 0)
    assert len(test.spot) == max(n_dates - split, 0) // (n_steps + 1)
    n_after = max(n_dates - n_steps - split, 0)
    assert n_dropped == max(n_dates - n_steps, 0) - len(train.spot) - n_after


@pytest.mark.parametrize("name", ["closes.csv", "closes.parquet"])
def test_load_history_by_hand(tmp_path, name):
    frame = table().sample(fraction=1.0, shuffle=True, seed=3)
    market = history.load_history(write(tmp_path, frame, name), n_steps=1, test_fraction=0.4)
    assert market.train.assets == ("AA", "BB")
    np.testing.assert_allclose(market.train.spot, [[1, 2], [1, 3]] * 5)
    np.testing.assert_allclose(market.test.spot, [[1, 2], [1, 3]] * 2)
    np.testing.assert_array_equal(market.test.group, [0, 0, 1, 1])
    assert market.notes == (
        f"{name}: AA, BB on 10 dates from 2020-01-01 to 2020-01-10, test part from 2020-01-07",
        "10 overlapping training windows on 5 start dates, 4 test windows at 2 separate times, "
        "2 windows across the split dropped",
    )


def test_calendar_is_the_union_and_a_gap_takes_a_ticker_out_of_its_windows(tmp_path):
    frame = table().filter((pl.col("ticker") != "BB") | (pl.col("date") != "2020-01-03"))
    market = history.load_history(write(tmp_path, frame), n_steps=1, test_fraction=0.4)
    assert (market.train.asset == 0).sum() == 5
    assert market.train.group[market.train.asset == 1].tolist() == [0, 3, 4]


def test_a_changed_test_close_leaves_training_unchanged(tmp_path):
    rng = np.random.default_rng(2)
    close = np.exp(0.01 * rng.normal(size=(28, 2)).cumsum(axis=0))
    other = close.copy()
    other[20:] **= 2
    loaded = [
        history.load_history(write(tmp_path, table(c)), n_steps=2, test_fraction=8 / 28)
        for c in (close, other)
    ]
    np.testing.assert_array_equal(loaded[0].train.spot, loaded[1].train.spot)
    assert not np.array_equal(loaded[0].test.spot, loaded[1].test.spot)
    outputs = [recorded.as_market_paths(market, dt=1 / 252) for market in loaded]
    np.testing.assert_array_equal(outputs[0][2].variance, outputs[1][2].variance)


def test_tickers_choose_and_order(tmp_path):
    file = write(tmp_path, table())
    assert history.load_history(file, n_steps=1, tickers=["BB", "AA", "BB"]).train.assets == ("BB", "AA")
    assert history.load_history(file, n_steps=1, tickers=["BB"]).train.assets == ("BB",)
    assert history.load_history(file, n_steps=1, tickers=[]).train.assets == ("AA", "BB")
    # a bad close of a ticker that is not asked for does no harm
    broken = table().with_columns(close=pl.when(pl.col("ticker") == "AA").then(-1.0).otherwise("close"))
    assert len(history.load_history(write(tmp_path, broken), n_steps=1, tickers=["BB"]).train.spot)


def test_mistakes_get_one_line(tmp_path):
    def load(frame, **kwargs):
        return history.load_history(write(tmp_path, frame), n_steps=1, **kwargs)

    frame = table()
    with usage_error("none.csv: no such file; market.path must name a CSV or Parquet of date, ticker, close"):
        history.load_history(tmp_path / "none.csv", n_steps=1)
    (tmp_path / "closes.xls").write_text("x")
    with usage_error("closes are read from .csv or .parquet, not .xls"):
        history.load_history(tmp_path / "closes.xls", n_steps=1)
    (tmp_path / "broken.parquet").write_bytes(b"no")
    with usage_error("broken.parquet: not readable as a table"):
        history.load_history(tmp_path / "broken.parquet", n_steps=1)
    with usage_error("no column close; found date, ticker, price"):
        load(frame.rename({"close": "price"}))
    with usage_error("no ticker 'AAB'; the nearest is 'AA'; there are AA, BB"):
        load(frame, tickers=["AAB"])
    with usage_error("no ticker 'bb'; the nearest is 'BB'"):
        load(frame, tickers=["bb"])
    with usage_error("AA on 2020-01-01 is given more than once"):
        load(pl.concat([frame, frame.head(1)]))
    for bad in (0.0, -1.0, float("nan"), float("inf"), None):
        one_bad = frame.with_columns(
            close=pl.when(pl.int_range(pl.len()) == 4).then(pl.lit(bad, pl.Float64)).otherwise("close")
        )
        with usage_error("1 of 20 rows without a finite and positive close, the first is row 5"):
            load(one_bad)
    with usage_error("20 of 20 rows without a finite and positive close"):
        load(frame.with_columns(close=pl.lit("dear")))
    with usage_error("20 of 20 rows without a date written as YYYY-MM-DD"):
        load(frame.with_columns(date=pl.lit("03/04/2020")))
    with usage_error("column date must hold dates or text like 2024-01-31, found Int"):
        file = write(tmp_path, frame.with_columns(date=pl.lit(20200102)), "closes.parquet")
        history.load_history(file, n_steps=1)
    with usage_error("no rows"):
        load(frame.head(0))
    with usage_error("market.n_steps must be at least 1 for this market, got 0"):
        history.load_history(n_steps=0)
    with usage_error("test_fraction must lie strictly between 0 and 1, got 1.5"):
        history.load_history(n_steps=30, test_fraction=1.5)
    with usage_error("too few windows: 0 training and 0 test windows of 3001 prices"):
        recorded.as_market_paths(history.load_history(n_steps=3000), dt=1 / 252)


def test_shipped_closes_at_thirty_steps():
    market = history.load_history(n_steps=30)
    assert market.train.assets == ("AAPL", "FB", "GOOG", "IBM", "MSFT")
    train, train_groups, test, test_groups, notes = recorded.as_market_paths(market, dt=1 / 252)
    assert train.spot.shape == (7262, 31) and test.spot.shape == (144, 31)
    assert int(train_groups.max()) + 1 == 2096 and int(test_groups.max()) + 1 == 36
    assert "5 test rows dropped, of assets without training rows: FB" in notes
    assert not any(note.startswith("too few") for note in notes)
    volatility = np.sqrt(np.asarray(train.variance))
    assert volatility.min() > 0.25 and volatility.max() < 0.6


def test_shipped_test_windows_share_no_close_with_each_other_or_with_training():
    dates, assets, close = history.close_table(HERE / "closes.parquet", tickers=["IBM"])
    market = history.load_history(n_steps=30, tickers=["IBM"])
    split = len(dates) - round(0.35 * len(dates))
    assert len(market.train.spot) == split - 30  # the last one ends on the close before the split
    np.testing.assert_allclose(market.train.spot[-1], close[split - 31 : split, 0] / close[split - 31, 0])
    for window, spot in enumerate(market.test.spot):
        start = split + 31 * window
        np.testing.assert_allclose(spot, close[start : start + 31, 0] / close[start, 0])


@pytest.mark.skipif(not importlib.util.find_spec("bokeh_sampledata"), reason="needs bokeh-sampledata")
def test_shipped_closes_are_those_of_the_package(tmp_path):
    runpy.run_path(str(HERE / "make_closes.py"))["main"](tmp_path / "closes.parquet")
    assert pl.read_parquet(tmp_path / "closes.parquet").equals(pl.read_parquet(HERE / "closes.parquet"))


def test_the_test_part_is_the_nearest_number_of_dates(tmp_path):
    """0.29 * 100 is a hair below 29."""
    days = [f"2020-{1 + i // 28:02d}-{1 + i % 28:02d}" for i in range(100)]
    frame = pl.DataFrame({"date": days, "ticker": ["AA"] * 100, "close": np.arange(1.0, 101.0)})
    note = history.load_history(write(tmp_path, frame), n_steps=1, test_fraction=0.29).notes[0]
    assert note.endswith(f"test part from {days[71]}")
