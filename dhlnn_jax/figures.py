"""Figures of finished runs, from what their results folder holds and nothing else."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from dhlnn_jax.methods import METHODS
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.report import label_of, objective_metric, tail_not_estimable
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
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
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
    # Beside the panels: an end bin is as high as they are.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def risk_by_epoch(results: Results) -> Figure | None:
    """Risk against the epoch, and the levels of untrained methods; None if nothing was trained."""
    reports = results.metrics["methods"]
    metric = objective_metric(results.config)
    if not any("training" in report for report in reports.values()):
        return None
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
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
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
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
    limits = results.metrics.get("optimum", {}).get("hedge_ratio_limits")  # not in older results
    beyond = False
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, sharey=True, layout="constrained")
    for axis, row, steps_left in zip(axes.flat, range(len(left)), left, strict=False):
        if "optimal/band_lower" in arrays:
            lower, upper = arrays["optimal/band_lower"][row], arrays["optimal/band_upper"][row]
            if limits is not None:
                lower, upper, ended = _out_of_the_panel(lower, upper, *limits)
                beyond |= ended
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
    outside = "; grey out of the panel: an edge beyond the positions solved for" if beyond else ""
    figure.suptitle(f"no trade between the edges{effective}{outside}{lookback}", fontsize=10)
    return figure


def _out_of_the_panel(
    lower: np.ndarray, upper: np.ndarray, lowest: float, highest: float
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Edges of the exact band, moved far away where all that is known of them is that they lie beyond."""
    near = 1e-3 * (highest - lowest)
    below, above = lower <= lowest + near, upper >= highest - near
    return np.where(below, -99.0, lower), np.where(above, 99.0, upper), bool(below.any() or above.any())


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
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
