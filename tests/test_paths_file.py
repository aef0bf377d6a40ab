from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dhlnn_jax import paths_file, recorded
from dhlnn_jax.errors import UsageError

RVP = Path(__file__).parents[2] / "shared/data/rvp_trade_prices/rvp_trade_prices_20s.npz"
DT = 1 / 252


def usage_error(match):
    """One line, and the given text in it."""
    return pytest.raises(UsageError, match=rf"\A[^\n]*{match}[^\n]*\Z")


SPOT = np.array([[2.0, 2.2, 2.1], [4.0, 4.4, 4.0], [1.0, 0.9, 1.1], [1.0, 1.2, 1.3]])


def npz(folder, **arrays):
    np.savez(folder / "paths.npz", **arrays)
    return folder / "paths.npz"


def long_table(folder, spot=SPOT, **columns):
    n_rows, n_times = spot.shape
    table = {
        "path_id": np.repeat(np.arange(n_rows), n_times),
        "step": np.tile(np.arange(n_times), n_rows),
        "spot": spot.ravel(),
        **{name: np.repeat(v, n_times) if np.ndim(v) == 1 else np.ravel(v) for name, v in columns.items()},
    }
    rows = np.random.default_rng(1).permutation(spot.size)  # the order of the rows must not matter
    pl.DataFrame({name: np.asarray(values)[rows] for name, values in table.items()}).write_parquet(
        folder / "paths.parquet"
    )
    return folder / "paths.parquet"


@pytest.mark.parametrize("write", [npz, long_table])
def test_paths_file_is_normalised_and_split_by_group(tmp_path, write):
    columns = {"group_id": np.array([5, 9, 5, 7]), "asset": np.array(["x", "y", "y", "x"])}
    file = write(tmp_path, spot=SPOT, half_spread=SPOT / 1e4, **columns)
    market = paths_file.load_paths_file(file, n_steps=2, test_fraction=0.34)
    np.testing.assert_allclose(market.test.spot, [[1, 1.1, 1.0]])
    np.testing.assert_allclose(market.test.half_spread, [[4e-4, 4.4e-4, 4e-4]])
    np.testing.assert_allclose(market.train.spot, [[1, 1.1, 1.05], [1, 0.9, 1.1], [1, 1.2, 1.3]])
    assert market.train.assets == ("x", "y")
    np.testing.assert_array_equal(market.train.asset, [0, 1, 0])
    assert market.notes == (f"{file.name}: 4 paths of 2 assets in 3 time groups",)


@pytest.mark.parametrize("write", [npz, long_table])
def test_paths_file_without_groups_counts_each_path_and_may_be_longer(tmp_path, write):
    file = write(tmp_path, spot=SPOT)
    market = paths_file.load_paths_file(file, n_steps=1, test_fraction=0.5)
    np.testing.assert_allclose(market.train.spot, [[1, 1.1], [1, 1.1]])
    np.testing.assert_allclose(market.test.spot, [[1, 0.9], [1, 1.2]])
    assert len(np.unique(np.concatenate([market.train.group, market.test.group]))) == 4
    assert market.notes[1] == "only the first 2 points of each path are used, up to 3 are there"


@pytest.mark.parametrize("write", [npz, long_table])
def test_paths_file_takes_is_test_and_the_aliases(tmp_path, write):
    is_test = np.array([True, False, True, False])
    file = write(
        tmp_path, spot=SPOT, time_id=np.array([1, 2, 1, 3]), stock_id=np.array([4, 4, 7, 7]), is_test=is_test
    )
    market = paths_file.load_paths_file(file, n_steps=2, test_fraction=0.5)
    np.testing.assert_allclose(market.test.spot, SPOT[is_test] / SPOT[is_test][:, :1])
    np.testing.assert_allclose(market.train.spot, SPOT[~is_test] / SPOT[~is_test][:, :1])
    assert market.train.assets == ("4", "7")


def test_paths_file_refuses_what_it_cannot_use(tmp_path):
    def load(file, n_steps=2):
        return paths_file.load_paths_file(file, n_steps=n_steps, test_fraction=0.5)

    with usage_error("none.npz: no such file"):
        load(tmp_path / "none.npz")
    (tmp_path / "paths.txt").write_text("1")
    with usage_error(r"paths are read from .npz or .parquet, not .txt"):
        load(tmp_path / "paths.txt")
    for name in ("broken.npz", "broken.parquet"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not really")
        with usage_error(f"{name}: not .*readable"):
            load(tmp_path / name)
    np.save(tmp_path / "single.npy", SPOT)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with usage_error("single.npz: not a readable .npz"):
        load(tmp_path / "single.npz")
    with usage_error("not a readable .npz of plain arrays"):
        load(npz(tmp_path, spot=np.array([{"a": 1}], object)))
    with usage_error(r"no array 'spot' \[n_paths, n_times\], found prices"):
        load(npz(tmp_path, prices=SPOT))
    with usage_error(r"spot must be \[n_paths, n_times\], its shape is \[4\]"):
        load(npz(tmp_path, spot=SPOT[:, 0]))
    for write in (npz, long_table):
        with usage_error(r"3 points in a path, but market.n_steps = 5 needs 6"):
            load(write(tmp_path, spot=SPOT), n_steps=5)
        with usage_error("market.n_steps must be at least 1 for this market, got 0"):
            load(write(tmp_path, spot=SPOT), n_steps=0)
        for bad in (np.nan, -1.0, 0.0, np.inf):
            spot = SPOT.copy()
            spot[2, 1] = spot[3, 0] = bad
            with usage_error(rf"spot must be finite and positive: 2 of 12 .* {bad} at row 2, column 1"):
                load(write(tmp_path, spot=spot))
        with usage_error(r"half_spread must lie in \[0, 1\): 12 of 12"):
            load(write(tmp_path, spot=SPOT, half_spread=-SPOT))
        with usage_error("is_test splits 1 time groups; split by time, never by row"):
            load(
                write(
                    tmp_path,
                    spot=SPOT,
                    group_id=np.array([1, 1, 2, 2]),
                    is_test=np.array([True, False, True, True]),
                )
            )
        with usage_error("is_test must be one true or false"):
            load(write(tmp_path, spot=SPOT, is_test=np.array([0, 2, 1, 0])))
        with usage_error("group_id must hold one number or text for each of 4 paths"):
            load(write(tmp_path, spot=SPOT, group_id=np.array([0.0, 2.0, np.inf, 0.0])))
    with usage_error("group_id must hold one number or text for each of 4 paths"):
        load(npz(tmp_path, spot=SPOT, group_id=np.arange(3)))
    with usage_error(r"half_spread must be numbers of shape \[4, 3\]"):
        load(npz(tmp_path, spot=SPOT, half_spread=SPOT[:, :2]))


def test_long_table_refuses_missing_columns_gaps_and_changing_groups(tmp_path):
    def load(table):
        table.write_parquet(tmp_path / "paths.parquet")
        return paths_file.load_paths_file(tmp_path / "paths.parquet", n_steps=2, test_fraction=0.5)

    table = pl.read_parquet(long_table(tmp_path)).sort("path_id", "step")
    with usage_error("no column 'step', found path_id, spot"):
        load(table.drop("step"))
    with usage_error(r"steps of path 1 are not 0, 1, 2, ... once each"):
        load(table.filter((pl.col("path_id") != 1) | (pl.col("step") != 1)))
    with usage_error(r"steps of path 0 are not 0, 1, 2"):
        load(pl.concat([table, table.head(1)]))
    with usage_error("group_id changes within a path"):
        load(table.with_columns(group_id=pl.col("step")))
    with usage_error("column 'spot' is empty in 1 of 12 rows"):
        load(table.with_columns(spot=pl.when(pl.int_range(pl.len()) > 0).then("spot")))
    with usage_error("column 'spot' must hold numbers, found String"):
        load(table.with_columns(pl.col("spot").cast(pl.String)))
    with usage_error("0 points in a path"):
        load(table.head(0))


@pytest.mark.skipif(not RVP.exists(), reason="needs ../shared/data/rvp_trade_prices")
def test_real_trade_prices_load_with_their_own_names():
    market = paths_file.load_paths_file(RVP, n_steps=30, test_fraction=0.3)
    assert len(market.train.spot) + len(market.test.spot) == 76_589
    assert not np.intersect1d(market.train.group, market.test.group).size
    assert len(market.train.assets) == 20
    volatility = recorded.asset_volatility(market.train, dt=20 / (252 * 6.5 * 3600))
    assert (volatility > 0.1).all() and (volatility < 1.5).all()
    assert (market.test.spot[:, 0] == 1).all()
