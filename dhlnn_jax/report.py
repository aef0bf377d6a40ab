"""Tables and figures of finished runs, from what their results folder holds and nothing else."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from dhlnn_jax.config import Config
from dhlnn_jax.methods import METHODS
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.results import Results

# Okabe and Ito's colours and three of Tol's, for any colour vision; line styles differ as well.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#332288"),
)
_LINES = (
    *("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (4, 2)), (0, (6, 2, 1, 2))),
    (0, (8, 3)),
)
_OPTIMUM = {"color": "0.45", "linestyle": "-"}

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
    from rich.console import Console
    from rich.table import Table

    # A pipe has no width: give the table what it needs instead of folding it at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 260)
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
    console.print(table)
    _print_seeds(console, results)
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
    if best is not None and len(reports) > 1:
        against = Table(
            title=f"{COLUMNS[metric]} less that of {label_of(best)} (paired)", title_justify="left"
        )
        against.add_column("method", no_wrap=True)
        against.add_column("difference ± standard error", justify="right")
        for name in reports:
            if name in (best, "optimal"):
                continue
            if metric == "entropic_risk_measure" and any(
                tail_not_estimable(reports[n]) for n in (name, best)
            ):
                against.add_row(label_of(name), "tail not estimable")
            else:
                against.add_row(label_of(name), _signed(*_paired(results, name, best, metric)))
        console.print(against)
    for note in results.meta["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"results: {results.folder}")
    for figure in sorted(results.folder.glob("*.png")):
        print(f"figure: {figure}")


def _print_seeds(console: Any, results: Results) -> None:
    """What the table leaves out where its rows are means over seeds: how far apart the seeds are."""
    from rich.table import Table

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
    console.print(table)


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


def write_figures(results: Results) -> list[Path]:
    """Draws every figure into the results folder; returns their paths."""
    figures = {
        "pnl_histogram.png": pnl_histogram(results),
        "risk_by_epoch.png": risk_by_epoch(results),
        "sample_path.png": sample_path(results),
        "bands.png": bands(results),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = results.folder / name
            figure.savefig(path, dpi=150)
            plt.close(figure)
            written.append(path)
    return written


def styles_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and label of each method, the same in every figure of every run."""
    order = [name for name in METHODS if name != "optimal"]
    styles = {}
    for name in names:
        i = order.index(name) if name != "optimal" else 0
        style = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _LINES[i % len(_LINES)],
        }
        styles[name] = {**(_OPTIMUM if name == "optimal" else style), "label": label_of(name)}
    return styles


def pnl_histogram(results: Results) -> Figure:
    """Distribution of the PnL of every method over shared bins; the right panel has a logarithmic density."""
    samples = {name: results.pnl[f"{name}/pnl"] for name in results.metrics["methods"]}
    hedged = [sample for name, sample in samples.items() if name != "no_hedge"] or list(samples.values())
    low = min(np.quantile(s, 0.001) for s in hedged)
    high = max(np.quantile(s, 0.999) for s in hedged)
    pad = 0.05 * (high - low) or 1e-3
    n_bins = int(np.clip(np.sqrt(len(hedged[0])), 20, 120))
    bins = np.linspace(low - pad, high + pad, n_bins + 1)
    # Clipping puts what lies beyond the ends into the end bins, so that every curve has mass one.
    densities = {
        name: np.histogram(np.clip(sample, bins[0], bins[-1]), bins)[0] / len(sample) / np.diff(bins)
        for name, sample in samples.items()
    }
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, scale in zip(axes, ("linear", "log"), strict=True):
        for name, style in styles_of(results.metrics["methods"]).items():
            axis.stairs(densities[name], bins, linewidth=1.6, **style)
        axis.set_yscale(scale)
        axis.set_xlabel(
            f"PnL of the seller (money, spot starts at {results.config.market.spot0:g}); end bins: all beyond"
        )
        axis.grid(alpha=0.3)
    # No hedge piles up in the end bins; the axis is for the others.
    tallest = [density.max() for name, density in densities.items() if name != "no_hedge"]
    axes[0].set_ylim(0, 1.1 * max(tallest or [densities["no_hedge"].max()]))
    axes[0].set_ylabel("density (1/money)")
    axes[0].set_title(f"{len(samples['no_hedge'])} test paths", fontsize=10)
    axes[1].set_title("the same, logarithmic", fontsize=10)
    axes[0].legend(fontsize=8)
    return figure


def risk_by_epoch(results: Results) -> Figure | None:
    """Risk against the epoch, and the levels of untrained methods; None if nothing was trained."""
    reports = results.metrics["methods"]
    metric = objective_metric(results.config)
    if not any("training" in report for report in reports.values()):
        return None
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    levels = []
    for name, style in styles_of(results.metrics["methods"]).items():
        report = reports[name]
        final = report["final"][metric]["value"]
        if "training" in report:
            curves = [own["training"] for own in report.get("by_seed", [report])]
            curve, validated = curves[0], np.array([own["validation_risk"] for own in curves])
            thin = {"linewidth": 0.8, "alpha": 0.45, "color": style["color"]}
            if len(curves) == 1:
                axis.plot(curve["epoch"], curve["risk"], **thin)
            else:
                axis.plot(curve["validation_epoch"], validated.T, **thin)
            axis.plot(curve["validation_epoch"], validated.mean(axis=0), marker="o", markersize=3, **style)
            measured = report["history"] if len(curves) == 1 else []
            if measured:
                axis.errorbar(
                    [m["epoch"] for m in measured],
                    [m[metric]["value"] for m in measured],
                    yerr=[2 * (m[metric]["stderr"] or 0.0) for m in measured],
                    fmt="s",
                    markersize=4,
                    color=style["color"],
                    capsize=3,
                )
            levels += validated.ravel().tolist()
        elif name != "no_hedge" and final is not None and results.config.risk.kind != "quadratic":
            if not tail_not_estimable(report) or metric != "entropic_risk_measure":
                axis.axhline(final, linewidth=1.2, **style)
                levels.append(final)
    low, high = min(levels), max(levels)
    unhedged = reports["no_hedge"]["final"][metric]["value"]
    if metric == "entropic_risk_measure" and tail_not_estimable(reports["no_hedge"]):
        unhedged = None
    # Far above everything else, no hedge would flatten the curves; it is then named instead of drawn.
    if unhedged is not None and unhedged > high + 3 * (high - low):
        axis.plot([], [], " ", label=f"(no hedge is at {unhedged:.4f}, above the figure)")
    elif unhedged is not None and results.config.risk.kind != "quadratic":
        axis.axhline(unhedged, linewidth=1.2, **styles_of(results.metrics["methods"])["no_hedge"])
        low, high = min(low, unhedged), max(high, unhedged)
    pad = 0.08 * (high - low) or 1e-4
    axis.set_ylim(low - pad, high + pad)
    axis.set_xlabel("epoch (one update on fresh paths each)")
    axis.set_ylabel(f"{OBJECTIVE_LABELS[results.config.risk.kind]} (money)")
    squares = "; squares: test paths ± 2 s.e." if results.config.evaluation.epochs else ""
    title = f"points: validation; thin lines: training batches{squares}"
    if results.config.seeds > 1:
        title = f"points: validation risk, mean over {results.config.seeds} seeds; thin lines: every seed"
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


OBJECTIVE_LABELS = {
    "entropic": "entropic risk",
    "expected_shortfall": "expected shortfall",
    "quadratic": "mean-variance risk",
}


_DRAWN_RULES = ("whalley_wilmott", "fixed_band")


def bands(results: Results) -> Figure | None:
    """Bands over spot at some times to maturity: trained hedgers', band rules' and the exact one."""
    arrays, config = results.bands, results.config
    drawn = {
        name: style
        for name, style in styles_of(results.metrics["methods"]).items()
        if name in _DRAWN_RULES or METHODS[name].trained
    }
    if not arrays or not drawn:
        return None
    left = config.market.n_steps - arrays["decision"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for axis, row, steps_left in zip(axes.flat, range(len(left)), left, strict=False):
        if "optimal/band_lower" in arrays:
            lower, upper = arrays["optimal/band_lower"][row], arrays["optimal/band_upper"][row]
            axis.fill_between(arrays["spot"], lower, upper, color="0.8", label="exact optimum")
        for name, style in drawn.items():
            for edge in ("lower", "upper"):
                values = arrays[f"{name}/band_{edge}"][row]
                label = style["label"] if not METHODS[name].recurrent else f"{style['label']} (effective)"
                axis.plot(
                    arrays["spot"],
                    values,
                    linewidth=1.4,
                    **{**style, "label": label if edge == "lower" else None},
                )
        axis.set_title(f"{steps_left} step{'s' if steps_left > 1 else ''} to maturity", fontsize=10)
        axis.grid(alpha=0.3)
    deltas = (-1.3, 0.3) if config.contract.kind == "european_put" else (-0.3, 1.3)
    axes[0, 0].set_ylim(*(deltas if CLAIMS[config.contract.kind].terminal else (-0.3, 2.3)))
    for axis in axes[1]:
        axis.set_xlabel("spot (money)")
    for axis in axes[:, 0]:
        axis.set_ylabel("hedge ratio (units of the underlying)")
    axes[0, 0].legend(fontsize=8)
    lookback = (
        "" if CLAIMS[config.contract.kind].terminal else f", maximum max(spot, {config.market.spot0:g})"
    )
    for axis in axes.flat[len(left) :]:
        axis.set_visible(False)
    effective = "; effective: trades less than 0.01" if any(METHODS[n].recurrent for n in drawn) else ""
    figure.suptitle(f"no trade between the edges{effective}{lookback}", fontsize=10)
    return figure


def sample_path(results: Results) -> Figure:
    """The first test path: the spot above, every method's hedge ratio and the trained bands below."""
    arrays, config = results.sample_path, results.config
    spot, steps = arrays["spot"], np.arange(len(arrays["spot"]))
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(1, 2), layout="constrained"
    )
    above.plot(steps, spot, color="black", linewidth=1.4)
    above.axhline(config.contract.strike, color="grey", linewidth=1, linestyle=":", label="strike")
    if config.contract.kind.startswith("lookback"):
        above.plot(steps, np.maximum.accumulate(spot), color="grey", linewidth=1, label="running maximum")
    above.set_ylabel("spot (money)")
    above.legend(fontsize=8)
    above.set_title("first test path", fontsize=10)
    shaded = 0
    for name, style in styles_of(results.metrics["methods"]).items():
        ratio = arrays[f"{name}/hedge_ratio"]
        below.step(steps, np.append(ratio, ratio[-1]), where="post", linewidth=1.5, **style)
        if f"{name}/band_lower" in arrays and METHODS[name].trained and shaded < 2:
            lower, upper = arrays[f"{name}/band_lower"], arrays[f"{name}/band_upper"]
            shaded += 1
            below.fill_between(
                steps,
                np.append(lower, lower[-1]),
                np.append(upper, upper[-1]),
                step="post",
                color=style["color"],
                alpha=0.13,
                label=f"band of {style['label']}",
            )
    below.set_xlabel("step (a hedge ratio is held until the next one)")
    below.set_ylabel("hedge ratio (units of the underlying)")
    below.grid(alpha=0.3)
    below.legend(fontsize=8, ncols=2)
    return figure
