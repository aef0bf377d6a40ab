"""Tables of finished runs, from what their results folder holds and nothing else."""

import sys
from typing import Any

from dhlnn_jax.config import Config
from dhlnn_jax.methods import METHODS
from dhlnn_jax.results import Results

COLUMNS = {
    "entropic_risk_measure": "entropic risk",
    "expected_shortfall": "expected shortfall",
    "value_at_risk": "value at risk",
    "pnl_mean": "mean PnL",
    "pnl_std": "st. dev. of PnL",
    "trading_cost_mean": "mean cost",
    "turnover_mean": "turnover (units)",
    "trade_frequency_mean": "trades at",
}


# Below this many effective paths an entropic estimate is not shown as a number.
MIN_EFFECTIVE_PATHS = 1_000


def objective_metric(config: Config) -> str:
    """The reported metric that corresponds to the objective (mean-variance: its entropic neighbour)."""
    return "expected_shortfall" if config.risk.kind == "expected_shortfall" else "entropic_risk_measure"


def label_of(name: str) -> str:
    return METHODS[name].label


def tail_not_estimable(report: dict[str, Any]) -> bool:
    """Whether too few effective paths carry a simulated entropic risk for it to be shown as a number."""
    ess = report["effective_sample_size"]
    return report["estimator"] == "simulation" and (ess is None or ess < MIN_EFFECTIVE_PATHS)


def cell(metric: str, report: dict[str, Any]) -> str:
    """A metric of a row as text, with its standard error."""
    number = report["final"][metric]
    if metric == "entropic_risk_measure" and tail_not_estimable(report):
        ess = report["effective_sample_size"]
        return f"tail not estimable (ESS {ess:.0f})" if ess is not None else "tail not estimable"
    if number["value"] is None:
        return "not finite"
    if report["estimator"] == "quadrature":
        return f"{number['value']:.6f} exact"
    error = "?" if number["stderr"] is None else _two_digits(number["stderr"])
    return f"{number['value']:.6f} ± {error}"


def regret_cells(report: dict[str, Any]) -> tuple[str, str]:
    """Regret in money, and in percent of the optimum."""
    number = report["regret"]
    if tail_not_estimable(report):
        return "not estimable", "–"
    if number["value"] is None or number["stderr"] is None:
        return "not finite", "–"
    money = f"{number['value']:.6f} ± {_two_digits(number['stderr'])}"
    if number["percent"] is None:
        return money, "–"
    return money, f"{number['percent']:.2f} ± {number['percent_stderr']:.2g}"


def _two_digits(error: float) -> str:
    return f"{error:.6f}" if error >= 1e-5 or error == 0 else f"{error:.1e}"


def print_report(results: Results) -> None:
    """The table, the paired differences and where everything lies on stdout; notes on stderr."""
    from rich.table import Table

    from dhlnn_jax.tables import print_table

    reports = results.metrics["methods"]
    metric = objective_metric(results.config)
    optimum = results.metrics.get("optimum")

    table = Table(title=_title(results), title_justify="left")
    table.add_column("method", no_wrap=True)
    for name, heading in COLUMNS.items():
        table.add_column(heading + (" ◂" if name == metric else ""), justify="right")
        if name == "entropic_risk_measure" and optimum is not None:
            table.add_column("regret", justify="right")
            table.add_column("regret, %", justify="right")
    table.add_column("ESS", justify="right")
    table.add_column("train s", justify="right")
    for name, report in reports.items():
        ess = report["effective_sample_size"]
        cells = [cell(column, report) for column in COLUMNS]
        if optimum is not None:
            cells[1:1] = regret_cells(report)
        table.add_row(
            label_of(name),
            *cells,
            "–" if ess is None else f"{ess:.0f}",
            f"{report['train_seconds']:.1f}" if report["paths_simulated"] else "–",
        )
    print_table(table)
    _print_seeds(results)
    if optimum is not None:
        print(
            f"exact optimum of the entropic risk: {optimum['value']:.7f} (numerical error "
            f"{optimum['error']:.1e}); regret is to its policy on the same paths\n"
        )

    best = min(
        (n for n in reports if reports[n]["final"][metric]["value"] is not None and n != "optimal"),
        key=lambda n: reports[n]["final"][metric]["value"],
        default=None,
    )
    others = [name for name in reports if name not in (best, "optimal")]
    if best is not None and others:
        against = Table(
            title=f"{COLUMNS[metric]} less that of {label_of(best)} (paired)", title_justify="left"
        )
        against.add_column("method", no_wrap=True)
        against.add_column("difference ± standard error", justify="right")
        for name in others:
            if metric == "entropic_risk_measure" and any(
                tail_not_estimable(reports[n]) for n in (name, best)
            ):
                against.add_row(label_of(name), "tail not estimable")
            else:
                against.add_row(label_of(name), _signed(*_paired(results, name, best, metric)))
        print_table(against)
        if any(reports[name]["estimator"] == "quadrature" for name in (best, *others)):
            print(
                "paired: on the same test paths, on which a row that is exact above is simulated too, unless "
                "too few of them carry it\n"
            )
    for note in results.meta["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"results: {results.folder}")
    for figure in sorted(results.folder.glob("*.png")):
        print(f"figure: {figure}")


def _print_seeds(results: Results) -> None:
    """What the table leaves out where its rows are means over seeds: how far apart the seeds are."""
    from rich.table import Table

    from dhlnn_jax.tables import print_table

    several = {name: r["by_seed"] for name, r in results.metrics["methods"].items() if "by_seed" in r}
    if not several:
        return
    print(
        f"trained methods: mean over {results.config.seeds} seeds ± 1 standard error from paths and seeds "
        "together (train s: all of them; ESS: the smallest)\n"
    )
    metric, by_regret = objective_metric(results.config), "optimum" in results.metrics
    what = "regret, %" if by_regret else COLUMNS[metric]

    def number_of(own: dict[str, Any]) -> float | None:
        return own["regret"]["percent"] if by_regret else own["final"][metric]["value"]

    table = Table(title=f"{what}, by seed", title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in ("smallest", "largest"):
        table.add_column(heading, justify="right")
    for name, seeds in several.items():
        known = sorted((x, own["seed"]) for own in seeds if (x := number_of(own)) is not None)
        digits = 2 if by_regret else 6
        ends = [f"{x:.{digits}f} (seed {seed})" for x, seed in (known[0], known[-1])] if known else ["–", "–"]
        table.add_row(label_of(name), *ends)
    print_table(table)


def _paired(results: Results, a: str, b: str, metric: str) -> tuple[float | None, float | None]:
    pairs = results.metrics["paired"]
    sign, pair = (1.0, pairs[f"{a}-{b}"]) if f"{a}-{b}" in pairs else (-1.0, pairs[f"{b}-{a}"])
    value, error = pair[metric]["value"], pair[metric]["stderr"]
    return (None if value is None else sign * value), error


def _signed(value: float | None, error: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:+.6f} ± {'?' if error is None else _two_digits(error)}"


def _title(results: Results) -> str:
    config, meta = results.config, results.meta
    volatility = f", volatility {config.market.volatility:g}" if not config.market.recorded else ""
    cost = "half-spread" if config.cost.charge == "half_spread" else f"{config.cost.rate:g}"
    paths = f"{meta['n_test_paths']} test paths"
    if config.market.recorded:
        paths += f" in {meta['n_test_groups']} time groups"
    return (
        f"{config.contract.kind}, strike {config.contract.strike:g}, {config.market.kind}{volatility}, "
        f"{config.market.n_steps} steps, cost {cost}, risk aversion {config.risk.risk_aversion:g}, "
        f"tail {config.risk.tail_prob:g}; {paths}; money, ± 1 standard error; ◂ what was minimized"
    )
