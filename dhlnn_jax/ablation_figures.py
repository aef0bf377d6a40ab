"""Figures of an ablation, from the contents of its ablation.json alone."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from dhlnn_jax.ablation_study import DIVERGED, last_within
from dhlnn_jax.ablation_trainer import Point

Results = dict[str, Any]

# Okabe and Ito's colours, distinguishable with any colour vision; line styles and markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#777777")
_LINES = ("-", "--", "-.", ":", (0, (7, 2)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2)), (0, (4, 4)))
_MARKERS = "osD^vP*Xh"
_GROUPS = ("controls", "objective", "inner")
_SPENT = {
    "epochs": "epochs",
    "gradients": "gradient evaluations (VJP passes over a batch)",
    "seconds": "seconds of training, a seed (compilation apart)",
    "cpu_seconds": "CPU seconds of training, a seed (compilation apart)",
}


def figures_of(results: Results) -> dict[str, Figure]:
    """The figures of a study by file name; intervals reach over all seeds."""
    if results["study"] == "optimizers":
        drawn = {group: _against_budgets(results, group) for group in _GROUPS}
    elif results["study"] == "noise":
        drawn = {"noise": _against_paths(results)}
    else:
        drawn = {"fixed_data": _fixed_data(results), "price_noise": _price_noise(results)}
    return {f"ablation_{name}.png": figure for name, figure in drawn.items() if figure is not None}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws all figures into a folder; returns their paths."""
    paths = []
    for name, figure in figures_of(results).items():
        paths.append(folder / name)
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths


def diverged(results: Results, values: Iterable[float | None]) -> int:
    """How many seeds are not finite or, in percent, beyond `DIVERGED`."""
    percent = results["unit"] == "percent"
    return sum(x is None or (percent and x > DIVERGED) for x in values)


def value_label(results: Results) -> str:
    if results["optimum"] is None:
        return f"{results['metric'].replace('_', ' ')} (money)"
    return "regret (% of the exact optimum)" if results["unit"] == "percent" else "regret (money)"


def _style(i: int, label: str) -> dict[str, Any]:
    i %= len(_COLOURS)
    return {
        "color": _COLOURS[i],
        "linestyle": _LINES[i],
        "marker": _MARKERS[i],
        "markersize": 4,
        "label": label,
    }


def _spread(results: Results, points: list[Point], key: str = "value") -> np.ndarray:
    """[lowest, median, highest] over seeds of each point; what diverges stands at `DIVERGED`."""
    percent = results["unit"] == "percent"
    worst = DIVERGED if percent else np.nan
    values = np.array([[worst if x is None else x for x in point[key]] for point in points], float)
    if percent:
        values = np.minimum(values, DIVERGED)
    return np.stack([np.min(values, 1), np.median(values, 1), np.max(values, 1)])


def _curve(axis: Axes, x: Sequence[int | float], spread: np.ndarray, style: dict[str, Any]) -> None:
    """The median, with bars over all seeds."""
    low, middle, high = spread
    axis.plot(x, middle, linewidth=1.7, **style)
    axis.errorbar(
        x,
        middle,
        yerr=[middle - low, high - middle],
        fmt="none",
        ecolor=style["color"],
        elinewidth=1,
        capsize=2.5,
        alpha=0.5,
    )


def _scale(axis: Axes, results: Results, lowest: float) -> None:
    """Logarithmic values where they can be; `lowest` is the lowest one that is drawn."""
    if results["optimum"] is not None and lowest > 0:
        axis.set_yscale("log")
        _name_ticks(axis.yaxis)
    elif results["unit"] == "percent":
        axis.set_yscale("symlog", linthresh=1.0)
        axis.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.grid(alpha=0.3, which="both")


def _log_x(axis: Axes, label: str) -> None:
    axis.set_xscale("log")
    _name_ticks(axis.xaxis)
    axis.set_xlabel(label)


def _name_ticks(scale: Axis) -> None:
    """Plain numbers on a logarithmic scale."""
    low, high = scale.get_view_interval()
    few = high < 100 * low  # less than two decades: name 2, 5, ... as well
    scale.set_major_formatter(lambda x, _: f"{x:g}")
    scale.set_minor_formatter(lambda x, _: f"{x:g}" if few and f"{x:e}"[0] in "25" else "")


def _said(results: Results, variant: dict[str, Any], label: str) -> str:
    wrong = diverged(results, variant["points"][-1]["value"])
    return f"{label} (diverges in {wrong} of {len(results['seeds'])} seeds)" if wrong else label


def _against_budgets(results: Results, group: str) -> Figure | None:
    """Value against each budget, one line a variant of the group."""
    shown = [variant for variant in results["variants"].values() if group in variant["groups"]]
    if len(shown) < 2:
        return None
    budgets = ("epochs", "gradients", results["clock"])
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.4), sharey=True, layout="constrained")
    lowest = np.inf
    for i, variant in enumerate(shown):
        spread = _spread(results, variant["points"])
        lowest = min(lowest, float(np.nanmin(spread, initial=np.inf)))
        for axis, budget in zip(axes, budgets, strict=True):
            spent = [point[budget] for point in variant["points"]]
            _curve(axis, spent, spread, _style(i, _said(results, variant, variant["label"])))
    for axis, budget in zip(axes, budgets, strict=True):
        _log_x(axis, _SPENT[budget])
        _scale(axis, results, lowest)
    axes[0].set_ylabel(value_label(results))
    figure.suptitle(f"same test paths; line: median, bars: all of {len(results['seeds'])} seeds", fontsize=10)
    _legend(figure, axes[0], 4)
    return figure


def _levels(results: Results) -> dict[str, dict[str, dict[str, Any]]]:
    """level -> method -> variant, from names "method @ level"."""
    levels: dict[str, dict[str, dict[str, Any]]] = {}
    for name, variant in results["variants"].items():
        method, _, level = name.partition(" @ ")
        levels.setdefault(level, {})[method] = variant
    return levels


def _method_label(variant: dict[str, Any]) -> str:
    return variant["label"].rpartition("; ")[0]


def _against_paths(results: Results) -> Figure:
    """Value at equal budgets against the paths of an epoch, one line a method."""
    budgets = ("epochs", "gradients", results["clock"])
    levels = _levels(results)
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.2), sharey=True, layout="constrained")
    lowest = np.inf
    for axis, budget in zip(axes, budgets, strict=True):
        for i, (method, first) in enumerate(next(iter(levels.values())).items()):
            points = []
            for rows in levels.values():
                most = min(variant["points"][-1][budget] for variant in rows.values())
                own = rows[method]["points"]
                points.append(own[last_within(own, budget, most)])
            spread = _spread(results, points)
            lowest = min(lowest, float(np.nanmin(spread, initial=np.inf)))
            _curve(axis, [float(level) for level in levels], spread, _style(i, _method_label(first)))
        _log_x(axis, "fresh paths an epoch")
        axis.set_title(f"at equal {budget.replace('_', ' ')}", fontsize=10)
    for axis in axes:
        _scale(axis, results, lowest)
    axes[0].set_ylabel(value_label(results))
    figure.suptitle(f"line: median, bars: all of {len(results['seeds'])} seeds", fontsize=10)
    _legend(figure, axes[0], 4)
    return figure


def _fixed_data(results: Results) -> Figure | None:
    """Value on test paths and on the training paths themselves against epochs, one panel a data set."""
    levels = {level: rows for level, rows in _levels(results).items() if level.startswith("fixed")}
    if not levels:
        return None
    figure, grid = plt.subplots(
        1, len(levels), figsize=(5 * len(levels), 5.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (level, rows) in zip(grid[0], levels.items(), strict=True):
        for i, variant in enumerate(rows.values()):
            style = _style(i, _method_label(variant)) | {"linestyle": "-"}
            epochs = [point["epochs"] for point in variant["points"]]
            _curve(axis, epochs, _spread(results, variant["points"]), style)
            trained = _spread(results, variant["points"], "batch_value")[1]
            axis.plot(epochs, trained, linewidth=1.2, **style | {"linestyle": ":", "label": None})
        _log_x(axis, "epochs")
        axis.set_title(f"the same {int(level.split()[1]):,} paths every epoch", fontsize=10)
        _scale(axis, results, -1.0)
    grid[0, 0].set_ylabel(value_label(results))
    figure.suptitle(
        "solid: test paths (median, bars: all seeds); dotted: training paths, against the optimum on them",
        fontsize=10,
    )
    _legend(figure, grid[0, 0], 4)
    return figure


def _price_noise(results: Results) -> Figure | None:
    """Last value of hedgers that were trained on noisy prices, tested on as noisy and on true ones."""
    levels = {level: rows for level, rows in _levels(results).items() if level.startswith("noisy")}
    if not levels or not results["finished"]:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    methods = next(iter(levels.values()))
    for axis, test in zip(axes, ("equally noisy", "true"), strict=True):
        lowest = np.inf
        for i, (method, first) in enumerate(methods.items()):
            variants = [rows[method] for rows in levels.values()]
            values = [v["clean_value"] if test == "true" else v["points"][-1]["value"] for v in variants]
            spread = _spread(results, [{"value": value} for value in values])
            lowest = min(lowest, float(np.nanmin(spread, initial=np.inf)))
            low, middle, high = spread
            x = np.arange(len(levels)) + 0.09 * (i - (len(methods) - 1) / 2)
            style = _style(i, _method_label(first)) | {"linestyle": "none", "markersize": 6}
            axis.errorbar(x, middle, yerr=[middle - low, high - middle], capsize=3, **style)
        axis.set_xticks(range(len(levels)), [level.split()[1] for level in levels])
        axis.set_xlabel("noise of the prices that are seen (st. dev. of one step's return)")
        axis.set_ylabel(value_label(results))
        axis.set_title(f"trained on noisy prices, tested on {test} prices", fontsize=10)
        _scale(axis, results, lowest)
    figure.suptitle(f"point: median, bar: all of {len(results['seeds'])} seeds", fontsize=10)
    _legend(figure, axes[0], 4)
    return figure


def _legend(figure: Figure, axis: Axes, columns: int) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        fontsize=8.5,
        handlelength=3.5,
    )
