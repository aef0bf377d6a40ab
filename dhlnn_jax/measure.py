"""Measures the hedgers of a finished run on any number of fresh paths, in constant memory.

Block i of the paths is always the same `BLOCK_PATHS` plain draws with `fold_in(key, i)`, and what is computed
together is a whole number of blocks: the paths depend on the seed and not on the chunk, and the table only by
what a program for other shapes rounds differently in float32 (below a thousandth of a standard error at 3e5
paths). The key is `fold_in(jax.random.key(seed), 4)`; runs fold 0 to 3 into theirs (model, training,
validation, test), so that no seed brings back a path that a hedger was trained, chosen or measured on, while
runs measured with one seed see the same paths. Statistics are those of `streaming`, in float64; paths and
their money are float32 as in training, good to about 1e-7 of the spot.
"""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from dhlnn_jax import streaming
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import HedgedPaths, Regret, as_report, hedged_paths, regret_report
from dhlnn_jax.files import write_json
from dhlnn_jax.fitting import make_contract
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.report import label_of, tail_not_estimable
from dhlnn_jax.results import Results, machine, read_results
from dhlnn_jax.script import Parser, exit_code, show_help
from dhlnn_jax.settings import Settings, make_settings
from dhlnn_jax.trained import TrainedHedger, load

BLOCK_PATHS = 10_000
_ROLE = 4
_RISK = "entropic_risk_measure"

Params = Any
DrawMoney = Callable[[list[Params], PRNGKeyArray, Array, Settings, Settings], HedgedPaths]


def measure_run(
    folder: str | Path,
    methods: Sequence[str] = (),
    *,
    n_paths: int,
    seed: int = 1,
    chunk_paths: int = 100_000,
) -> dict[str, Any]:
    """Measures methods of a finished run on the same fresh paths of the market it was tested in.

    Args:
      methods: of the run, all if none are named; where the run has the exact optimum it comes first.
      n_paths: a multiple of `BLOCK_PATHS`. chunk_paths: paths at a time, likewise: a matter of
        memory, some 150 bytes a path and method.
    Returns: what `--json` writes: "methods" as in metrics.json, each with its "binning_error"; "paired",
      differences of the entropic risk. A method whose values the run has by quadrature (no hedge under
      geometric Brownian motion) is not simulated: its row is the run's.
    Raises: UsageError for a folder without a finished run, a recorded market, unknown methods, numbers of
      paths that are not whole blocks, or a seed out of range.
    """
    for name, number in (("n_paths", n_paths), ("chunk_paths", chunk_paths)):
        if number < BLOCK_PATHS or number % BLOCK_PATHS:
            raise UsageError(f"{name} must be a multiple of {BLOCK_PATHS}, got {number}")
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed must be from 0 to 2147483647, got {seed}")
    began = time.perf_counter()
    results = read_results(folder)
    if results.config.market.recorded:
        raise UsageError(
            f"the market of {str(folder)!r} is recorded: there are no fresh paths to draw from it"
        )
    table = results.metrics["methods"]
    first = ("optimal",) if "optimum" in results.metrics else ()
    names = list(dict.fromkeys((*first, *(methods or table))))
    simulated = [name for name in names if name not in table or table[name]["estimator"] == "simulation"]
    if not simulated:
        raise UsageError(f"{', '.join(names)}: known exactly, see the table of {str(folder)!r}")
    hedgers = [load(folder, name) for name in simulated]
    summary = _stream(hedgers, results, n_paths, seed, chunk_paths)

    optimum = results.metrics.get("optimum")
    reports = {
        name: _method_report(summary, i, None if optimum is None else optimum["value"])
        for i, name in enumerate(simulated)
    }
    copied = ("final", "effective_sample_size", "estimator", "regret")
    for name in names:
        if name not in reports:
            reports[name] = {key: table[name][key] for key in copied if key in table[name]}
    return {
        "schema": 1,
        "results": str(folder),
        "n_paths": n_paths,
        "seed": seed,
        "methods": {name: reports[name] for name in names},
        "paired": _paired(summary, simulated),
        **({} if optimum is None else {"optimum": optimum}),
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": _peak_memory(),
        "machine": machine(),
    }


def _stream(
    hedgers: list[TrainedHedger], results: Results, n_paths: int, seed: int, chunk_paths: int
) -> streaming.Summary:
    config, settings = results.config, hedgers[0].settings
    market_settings = make_settings(n_steps=config.market.n_steps, **results.meta["market_settings"])
    if config.evaluation.volatility_seen == "refreshed":
        settings = settings._replace(volatility=market_settings.volatility)
    key = jax.random.fold_in(jax.random.key(seed), _ROLE)
    params = [hedger.params for hedger in hedgers]
    n_blocks = min(chunk_paths, n_paths) // BLOCK_PATHS
    draw_money = jax.jit(make_draw_money(hedgers))
    statistics, update = jax.jit(streaming.statistics), jax.jit(streaming.update)
    grid = total = None
    with progress_bar("measuring", n_paths) as advance:
        for start in range(0, n_paths, n_blocks * BLOCK_PATHS):
            blocks = start // BLOCK_PATHS + jnp.arange(n_blocks)
            money = draw_money(params, key, blocks, settings, market_settings)
            # The last chunk has blocks too many, so that there is one program; they are left out here.
            size = min(n_blocks * BLOCK_PATHS, n_paths - start)
            money = jax.tree.map(lambda x, size=size: x[:, :size], money)
            with jax.enable_x64(True):
                if grid is None or total is None:
                    # The first block alone decides on the bins, or they would depend on the chunk.
                    grid = streaming.make_grid(
                        jax.tree.map(lambda x: x[:, :BLOCK_PATHS], money),
                        risk_aversion=config.risk.risk_aversion,
                        tail_prob=config.risk.tail_prob,
                    )
                    total = statistics(money, grid)
                else:
                    total = update(total, money, grid)
                # Without waiting, chunks would queue up in memory.
                jax.block_until_ready(total)
            advance(size)
    assert grid is not None and total is not None
    return streaming.summary(total, grid)


def make_draw_money(hedgers: Sequence[TrainedHedger]) -> DrawMoney:
    """Money of all hedgers on the same fresh paths, a block at a time: one program for the whole table.

    Returns: `(params of each, key, blocks [n_blocks], settings, market_settings) -> money`, each array
      [n_hedgers, n_blocks * BLOCK_PATHS]; pure, the caller jits it.
    """
    config = hedgers[0].config
    sample = make_simulation_sampler(SIMULATORS[config.market.kind], n_steps=config.market.n_steps)
    contract = make_contract(config)
    # On a CPU the activations of a thousand paths stay in the cache; an accelerator wants them all at once.
    batch_size = 1_000 if jax.default_backend() == "cpu" else BLOCK_PATHS

    def draw_money(params, key, blocks, settings, market_settings):
        def block(i: Array) -> HedgedPaths:
            paths, _ = sample(jax.random.fold_in(key, i), BLOCK_PATHS, market_settings)
            each = [
                hedged_paths(hedger.policy, own, paths, contract, settings, batch_size=batch_size)
                for hedger, own in zip(hedgers, params, strict=True)
            ]
            return jax.tree.map(lambda *columns: jnp.stack(columns), *each)

        money = jax.lax.map(block, blocks)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).reshape(len(hedgers), -1), money)

    return draw_money


def _method_report(summary: streaming.Summary, i: int, optimum: float | None) -> dict[str, Any]:
    """One entry of "methods"; the first hedger is the optimum where there is one."""
    values, stderrs = (
        {name: x[i] for name, x in numbers.items()} for numbers in (summary.values, summary.stderrs)
    )
    report: dict[str, Any] = {
        "final": as_report(values, stderrs),
        "binning_error": {name: _plain(x[i]) for name, x in summary.binning_errors.items()},
        "effective_sample_size": _plain(summary.effective_sample_size[i]),
        "estimator": "simulation",
    }
    if optimum is not None:
        difference = jnp.asarray(values[_RISK] - summary.values[_RISK][0])
        report["regret"] = regret_report(
            Regret(difference, jnp.asarray(summary.paired_stderr[i, 0])), optimum
        )
    return report


def _plain(x: Any) -> float | None:
    return float(x) if np.isfinite(x) else None


def _paired(summary: streaming.Summary, names: Sequence[str]) -> dict[str, Any]:
    """Differences of the entropic risk of every two methods that were simulated."""
    risk = summary.values[_RISK]
    return {
        f"{a}-{b}": as_report({_RISK: risk[i] - risk[j]}, {_RISK: summary.paired_stderr[i, j]})
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)
    }


def _peak_memory() -> int:
    """Most bytes that this process has had in memory."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_HEADINGS = {
    _RISK: "entropic risk",
    "expected_shortfall": "expected shortfall",
    "value_at_risk": "value at risk",
    "pnl_mean": "mean PnL",
    "pnl_std": "st. dev. of PnL",
    "trading_cost_mean": "mean cost",
    "turnover_mean": "turnover (units)",
    "trade_frequency_mean": "trades at",
}


def print_measurement(report: dict[str, Any]) -> None:
    """The table of `measure_run` on stdout."""
    from rich.console import Console
    from rich.table import Table

    optimum, binned = report.get("optimum"), ("expected_shortfall", "value_at_risk")
    table = Table(
        title=f"{report['results']} on {report['n_paths']} fresh paths, seed {report['seed']}; money, "
        "± 1 standard error; bins: at most what the histogram hides",
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for metric, heading in _HEADINGS.items():
        table.add_column(heading, justify="right")
        if metric == _RISK and optimum is not None:
            table.add_column("regret", justify="right")
            table.add_column("regret, %", justify="right")
        if metric in binned:
            table.add_column("bins", justify="right")
    table.add_column("ESS", justify="right")
    for name, row in report["methods"].items():
        cells = [label_of(name)]
        for metric in _HEADINGS:
            number, exact = row["final"][metric], row["estimator"] == "quadrature"
            if metric == _RISK and tail_not_estimable(row):
                cells.append("tail not estimable")
            else:
                cells.append(f"{number['value']:.6f} exact" if exact else _number(**number))
            if metric == _RISK and optimum is not None:
                cells += _regret_cells(row)
            if metric in binned:
                error = row["binning_error"][metric] if "binning_error" in row else None
                cells.append("–" if error is None else f"{error:.1e}")
        ess = row["effective_sample_size"]
        table.add_row(*cells, "–" if ess is None else f"{ess:.0f}")
    # A pipe has no width: give the table what it needs instead of folding it at 80 columns.
    Console(width=None if sys.stdout.isatty() else 320).print(table)
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
