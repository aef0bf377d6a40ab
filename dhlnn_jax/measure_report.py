"""The table of a finished run on fresh paths, and the command line of `measure`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import write_json
from dhlnn_jax.measure import BLOCK_PATHS, RISK, measure_run
from dhlnn_jax.report import COLUMNS, label_of, tail_not_estimable
from dhlnn_jax.script import Parser, exit_code, show_help


def print_measurement(report: dict[str, Any]) -> None:
    """The table of `measure_run` on stdout."""
    from rich.table import Table

    from dhlnn_jax.tables import print_table

    optimum, binned = report.get("optimum"), ("expected_shortfall", "value_at_risk")
    table = Table(
        title=f"{report['results']} on {report['n_paths']} fresh paths, seed {report['seed']}; money, "
        "± 1 standard error; bins: at most what the histogram hides",
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for metric, heading in COLUMNS.items():
        table.add_column(heading, justify="right")
        if metric == RISK and optimum is not None:
            table.add_column("regret", justify="right")
            table.add_column("regret, %", justify="right")
        if metric in binned:
            table.add_column("bins", justify="right")
    table.add_column("ESS", justify="right")
    for name, row in report["methods"].items():
        cells = [label_of(name)]
        for metric in COLUMNS:
            number, exact = row["final"][metric], row["estimator"] == "quadrature"
            if metric == RISK and tail_not_estimable(row):
                cells.append("tail not estimable")
            else:
                cells.append(f"{number['value']:.6f} exact" if exact else _number(**number))
            if metric == RISK and optimum is not None:
                cells += _regret_cells(row)
            if metric in binned:
                error = row["binning_error"][metric] if "binning_error" in row else None
                cells.append("–" if error is None else f"{error:.1e}")
        ess = row["effective_sample_size"]
        table.add_row(*cells, "–" if ess is None else f"{ess:.0f}")
    print_table(table)
    if optimum is not None:
        print(
            f"exact optimum of the entropic risk: {optimum['value']:.7f} (numerical error "
            f"{optimum['error']:.1e}); regret is to its policy on the same paths"
        )
    print(f"{report['seconds']:.0f} s, peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB")


def _regret_cells(row: dict[str, Any]) -> tuple[str, str]:
    if tail_not_estimable(row):
        return "not estimable", "–"
    number = row["regret"]
    return (
        _number(number["value"], number["stderr"]),
        "–" if number["percent"] is None else _number(number["percent"], number["percent_stderr"], least=2),
    )


def _number(value: float | None, stderr: float | None, *, least: int = 6) -> str:
    """With as many decimals as two digits of the standard error ask for, but at least some."""
    if value is None:
        return "not finite"
    if stderr is None:
        return f"{value:.{least}f} ± ?"
    decimals = max(least, 1 - int(np.floor(np.log10(stderr)))) if stderr > 0 else least
    return f"{value:.{decimals}f} ± {stderr:.{decimals}f}"


def _parser() -> Parser:
    parser = Parser(
        prog="python scripts/measure.py",
        description="Measures the methods of a finished run on fresh simulated paths, as many as you like: "
        "memory does not grow with them, and the numbers do not depend on --chunk.",
    )
    parser.add_argument("results", nargs="?", metavar="RESULTS", help="results folder of scripts/run.py")
    parser.add_argument(
        "--n-paths", type=int, default=1_000_000, help=f"a multiple of {BLOCK_PATHS} (default: 1000000)"
    )
    parser.add_argument(
        "--methods", nargs="+", default=(), metavar="METHOD", help="of the run (default: all of them)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the paths, none of a run's (default: 1)")
    parser.add_argument("--chunk", type=int, default=100_000, help="paths at a time (default: 100000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file as well")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier FILE")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the script; returns its exit code, that of `script.exit_code`."""
    return exit_code("measure.py", lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = _parser()
    show_help(parser.format_help, arguments)
    options = parser.parse_args(arguments)
    if options.results is None:
        raise UsageError("the results folder is missing: measure.py RESULTS [--n-paths 1000000]; see --help")
    if options.json is not None:  # before the work, which may take an hour
        if options.json.exists() and not options.overwrite:
            raise UsageError(f"{str(options.json)!r} exists; give another --json, or --overwrite")
        if not options.json.parent.is_dir():
            raise UsageError(f"--json: there is no folder {str(options.json.parent)!r}")
    report = measure_run(
        options.results,
        options.methods,
        n_paths=options.n_paths,
        seed=options.seed,
        chunk_paths=options.chunk,
    )
    print_measurement(report)
    if options.json is not None:
        write_json(options.json, report)
        print(f"numbers: {options.json}")
