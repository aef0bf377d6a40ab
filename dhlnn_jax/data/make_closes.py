"""Remakes closes.parquet: `pip install bokeh-sampledata polars && python make_closes.py [OUT]`."""

import gzip
import sys
from importlib import metadata, resources
from pathlib import Path

import polars as pl


def closes_from(text: bytes) -> pl.DataFrame:
    """date, ticker, close (adjusted) from bokeh-sampledata's stocks.csv, ordered by ticker and date."""
    return (
        pl.read_csv(text, try_parse_dates=True)
        .select(
            date=pl.col("Date").cast(pl.Date),
            ticker=pl.col("Ticker"),
            close=pl.col("Adj Close").cast(pl.Float64),
        )
        .sort("ticker", "date")
    )


def main(out: Path) -> None:
    source = resources.files("bokeh_sampledata") / "_data" / "stocks.csv.gz"
    closes = closes_from(gzip.decompress(source.read_bytes()))
    closes.write_parquet(out, compression="zstd", compression_level=19)
    print(f"bokeh-sampledata {metadata.version('bokeh-sampledata')} -> {out}: {len(closes)} rows")
    print(
        closes.group_by("ticker", maintain_order=True).agg(
            rows=pl.len(), first=pl.col("date").min(), last=pl.col("date").max()
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("closes.parquet"))
