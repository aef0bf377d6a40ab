"""The table and the figure of a sweep, from the contents of its sweep.json."""

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dhlnn_jax.config import make_config
from dhlnn_jax.figures import OBJECTIVE_LABELS, plt, styles_of
from dhlnn_jax.fleet import TRACED_OPTIONS
from dhlnn_jax.report import COLUMNS, cell, label_of, objective_metric, regret_cells, tail_not_estimable
from dhlnn_jax.sweep import SweepResults, label_of_point

Point = dict[str, Any]


def print_sweep(results: SweepResults) -> None:
    """Every method at every point, on stdout; notes on stderr."""
    from rich.table import Table

    from dhlnn_jax.tables import print_table

    config = make_config(results["config"])
    metric, points = objective_metric(config), results["points"]
    with_regret = any("optimum" in point for point in points)
    table = Table(title=_title(results), title_justify="left")
    for name in results["over"]:
        table.add_column(name, justify="right")
    table.add_column("method", no_wrap=True)
    table.add_column(f"{COLUMNS[metric]} ◂", justify="right")
    if with_regret:
        table.add_column("regret, %", justify="right")
    columns = ("trading_cost_mean", "turnover_mean")
    for name in columns:
        table.add_column(COLUMNS[name], justify="right")
    for point in points:
        for name, report in point["methods"].items():
            regret = [regret_cells(report)[1] if "regret" in report else "–"] if with_regret else []
            at = [f"{value:g}" for value in point["at"].values()]
            shown = (cell(column, report) for column in columns)
            table.add_row(*at, label_of(name), cell(metric, report), *regret, *shown)
        table.add_section()
    print_table(table, n_keys=1 + len(results["over"]))
    seconds = results["seconds"]
    for name in seconds["train"]:
        print(
            f"{label_of(name)}: {len(points) * config.seeds} hedgers in one program, compiled in "
            f"{seconds['compile'][name]:.1f} s, trained in {seconds['train'][name]:.1f} s"
        )
    for note in results["notes"]:
        print(f"note: {note}", file=sys.stderr)
    where: dict[str, list[str]] = {}
    for point in points:
        for note in point["notes"]:
            where.setdefault(note, []).append(label_of_point(point["at"]))
    for note, at_points in where.items():
        at_all = "every point" if len(at_points) == len(points) else "; ".join(at_points)
        print(f"note: at {at_all}: {note}", file=sys.stderr)


def _title(results: SweepResults) -> str:
    config, over = make_config(results["config"]), results["over"]
    numbers = {
        "contract.strike": f"strike {config.contract.strike:g}",
        "market.volatility": f"volatility {config.market.volatility:g}",
        "cost.rate": f"cost {config.cost.rate:g}",
        "risk.risk_aversion": f"risk aversion {config.risk.risk_aversion:g}",
    }
    if config.market.recorded:
        del numbers["market.volatility"]
    fixed = ", ".join(text for name, text in numbers.items() if name not in over)
    seeds = f"; mean over {config.seeds} seeds" if config.seeds > 1 else ""
    return (
        f"{config.contract.kind}, {config.market.kind}, {config.market.n_steps} steps, {fixed}; "
        f"{config.training.epochs} epochs; {results['n_test_paths']} test paths{seeds}; money, "
        "± 1 standard error"
    )


def write_figure(results: SweepResults, folder: Path) -> Path:
    """Draws sweep.png into `folder`; its path."""
    path = folder / "sweep.png"
    figure = sweep_figure(results)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def sweep_figure(results: SweepResults) -> Figure:
    """Objective risk, and regret where there is an optimum, against the first swept option.

    One line a method, one row of panels for each combination of the other swept options.
    """
    config = make_config(results["config"])
    first, *others = results["over"]
    rows: dict[str, list[Point]] = {}
    for point in sorted(results["points"], key=lambda point: point["at"][first]):
        rows.setdefault(label_of_point({name: point["at"][name] for name in others}), []).append(point)
    risk = _risk_of(objective_metric(config), config.contract.premium)
    panels = {f"{OBJECTIVE_LABELS[config.risk.kind]} (money)": risk}
    if any(not np.isnan(_percent(point, "no_hedge")[0]) for point in results["points"]):
        panels["regret (% of the exact optimum)"] = _percent
    figure, axes = plt.subplots(
        len(rows),
        len(panels),
        figsize=(6.0 * len(panels) + 0.5, 1.4 + 3.6 * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for (label, points), row in zip(rows.items(), axes, strict=True):
        for axis, (what, number) in zip(row, panels.items(), strict=True):
            _draw(axis, points, first, number)
            axis.set_ylabel(what)
        heading = "; ".join(part for part in (label, _warning(points, first)) if part)
        row[0].set_title(fill(heading, 90 * len(panels)), fontsize=9, loc="left", fontweight="bold")
    axes[0, 0].legend(fontsize=8)
    title = _title(results).replace("± 1 standard error", "± 2 standard errors")
    figure.suptitle(fill(title, 75 * len(panels)), fontsize=9)
    return figure


Number = Callable[[Point, str], tuple[float, float]]  # (point, method) -> value and standard error, or NaN


def _risk_of(metric: str, premium: float) -> Number:
    def number(point: Point, name: str) -> tuple[float, float]:
        if name == "optimal" and "optimum" in point:  # known better than any paths can tell
            return point["optimum"]["value"] - premium, 0.0
        report = point["methods"].get(name)
        if report is None or (metric == "entropic_risk_measure" and tail_not_estimable(report)):
            return np.nan, np.nan
        return _plain(report["final"][metric]["value"], report["final"][metric]["stderr"])

    return number


def _percent(point: Point, name: str) -> tuple[float, float]:
    report = point["methods"].get(name, {})
    if "regret" not in report or tail_not_estimable(report):
        return np.nan, np.nan
    return _plain(report["regret"]["percent"], report["regret"]["percent_stderr"])


def _plain(value: float | None, error: float | None) -> tuple[float, float]:
    return (np.nan if value is None else value), (0.0 if error is None else error)


def _draw(axis: Any, points: list[Point], first: str, number: Number) -> None:
    """All methods against the first option, with bars of two standard errors."""
    x = np.array([point["at"][first] for point in points])
    names = list(dict.fromkeys(name for point in points for name in point["methods"]))
    drawn = {name: np.array([number(point, name) for point in points]).T for name in names}
    others = [values for name, (values, _) in drawn.items() if name != "no_hedge"]
    known = np.concatenate([*others, [np.nan]])
    known = known[np.isfinite(known)]
    for name, style in styles_of(names).items():
        values, errors = drawn[name]
        above = len(known) > 0 and np.nanmin(values, initial=np.inf) > known.max() + 3 * np.ptp(known)
        if name == "no_hedge" and above:
            # Far above everything else it would flatten the other lines: it is named instead of drawn.
            axis.plot([], [], " ", label=f"(no hedge: {values.min():.3g} and more, above the figure)")
            continue
        exact = name in ("no_hedge", "optimal") and not np.any(errors)
        bars = None if exact else 2 * errors
        axis.errorbar(x, values, yerr=bars, marker="o", markersize=4, capsize=3, linewidth=1.6, **style)
    if x.min() > 0 and x.max() / x.min() >= 10:
        axis.set_xscale("log")
    if len(x) <= 8:
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
    axis.set_xlabel(TRACED_OPTIONS[first])
    axis.grid(alpha=0.3)


def _warning(points: list[Point], first: str) -> str:
    """What the figure must not be mistaken for."""
    said = []
    for flag, what in (
        ("no_liability", "there is no liability"),
        ("not_trading_is_optimal", "not trading is optimal"),
    ):
        where = [f"{point['at'][first]:g}" for point in points if point[flag]]
        if len(where) == len(points):
            said.append(f"{what} at every point")
        elif where:
            said.append(f"{what} at {first} {', '.join(where)}")
    return "; ".join(said)
