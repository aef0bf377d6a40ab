"""The picture of what `diagnostics_run.diagnose` measured."""

import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Results = dict[str, Any]

# Okabe and Ito's colours, distinguishable with any colour vision; markers and line styles differ as well.
_BLUE, _RED, _GREEN, _PINK, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
_EPOCH_STYLES = ((_BLUE, "o-"), (_RED, "s--"), (_GREEN, "^-."), (_PINK, "D:"))
_MEASURED, _ALL_LAYERS, _PRINTED = (_BLUE, "o-"), (_ORANGE, "^-."), (_RED, "s--")


def diagnostics_figure(results: Results) -> Figure:
    """Nine panels: medians over seeds, with bands of the middle half of the seeds and of all of them.

    A seed whose number is not defined (the ratio of a step that changes nothing) is left out of it.
    """
    figure = Figure(figsize=(13, 11.5), layout="constrained")
    (error, mean_error, inner), (ratio, hedge_ratio, drift), (gradient, hessian, shares) = panels = (
        figure.subplots(3, 3)
    )

    error.set_title("error of the linearized raw outputs\nroot mean square")
    _over_step_sizes(error, results, "outputs_error", power=2)
    mean_error.set_title("error of the linearized raw outputs\nmean absolute")
    _over_step_sizes(mean_error, results, "outputs_mean_error", power=2)
    inner.set_title("inner steps; the loop stops after the first\nbelow the tolerance ε")
    _over_inner_steps(inner, results)

    ratio.set_title("error relative to the change\nraw outputs, root mean square")
    _over_step_sizes(ratio, results, "outputs_ratio", power=1)
    hedge_ratio.set_title("error relative to the change\nhedge ratio, root mean square")
    _over_step_sizes(hedge_ratio, results, "hedge_ratio_ratio", power=1)
    drift.set_title("gradient drift over one outer iteration\n‖∇f(w) − ∇f(wʳ)‖ of single outputs")
    drift.set_ylabel("units of the underlying per unit weight")
    _over_epochs(drift, results, "gradient_drift_max", "measured, largest", _MEASURED)
    _over_epochs(drift, results, "gradient_drift_median", "measured, median", (_GREEN, "D:"))
    _over_epochs(drift, results, "drift_estimate_23", "(23) with measured ‖∇²f(wʳ)‖", _ALL_LAYERS)
    _over_epochs(drift, results, "drift_bound_25", "(25) with β of (93)", _PRINTED)

    gradient.set_title("‖∇f‖ of single outputs, largest measured\nbeside the printed expression")
    gradient.set_ylabel("units of the underlying per unit weight")
    _over_epochs(gradient, results, "hidden_gradient_norm_max", "hidden layers", _MEASURED)
    _over_epochs(gradient, results, "gradient_norm_max", "all layers", _ALL_LAYERS)
    _over_epochs(gradient, results, "gradient_bound_66", "(66) as printed, hidden layers", _PRINTED)
    hessian.set_title("‖∇²f‖ of single outputs, largest measured\nbeside the printed expression")
    hessian.set_ylabel("units of the underlying per unit weight²")
    _over_epochs(hessian, results, "hidden_hessian_norm_max", "hidden layers", _MEASURED)
    _over_epochs(hessian, results, "hessian_norm_max", "all layers", _ALL_LAYERS)
    _over_epochs(hessian, results, "hessian_bound_93", "(93) as printed, hidden layers", _PRINTED)
    shares.set_title("path-steps without a gradient")
    shares.set_ylabel("share of path-steps")
    _over_epochs(shares, results, "zero_gradient_share", "output gradient exactly zero", _MEASURED)
    _over_epochs(shares, results, "no_trade_share", "no trade (inside the band)", (_ORANGE, "s--"))

    for axis in panels.flat:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        if axis is shares:
            axis.set_ylim(0, 1)
        else:
            _log_scale(axis)
    figure.suptitle(
        f"lines: median of {len(results['seeds'])} seeds; dark bands: middle half of the seeds; light bands: "
        "lowest to highest seed (beyond the panel for a seed that leaps)",
        fontsize=11,
    )
    return figure


def values_of(results: Results, name: str) -> np.ndarray:
    """[n_seeds, n_epochs, ...]; NaN where a seed's number is not defined."""
    return np.array([numbers[name] for numbers in results["by_seed"]], float)


def shown_epochs(results: Results) -> list[int]:
    """Positions in "epoch" of the first, the last and at most two in between."""
    n = len(results["by_seed"][0]["epoch"])
    return np.unique(np.linspace(0, n - 1, min(n, len(_EPOCH_STYLES))).round().astype(int)).tolist()


def _over_step_sizes(axis: Axes, results: Results, name: str, *, power: int) -> None:
    """An error (power 2) or its ratio to the change (power 1) at some epochs, beside that of a smooth f."""
    first, values = results["by_seed"][0], values_of(results, name)
    sizes = np.asarray(first["step_sizes"])
    for i, style in zip(shown_epochs(results), _EPOCH_STYLES, strict=False):
        label = f"epoch {first['epoch'][i]}"
        if power == 2:
            label += f": slope {_spread(values_of(results, f'{name}_slope')[:, i])[2]:.2f}"
        _curve(axis, sizes, values[:, i], label, style)
    highest = np.nanmax(_spread(values)[2][:, -1])
    axis.plot(sizes, 2.0 * highest * (sizes / sizes[-1]) ** power, ":", color="0.5", label=f"slope {power}")
    axis.set_xscale("log")
    axis.set_xlabel(f"step ‖w − wʳ‖ / that of one outer iteration (N = {first['n_inner']})")
    axis.set_ylabel("‖f(w) − f̂(w)‖ / ‖f(w) − f(wʳ)‖" if power == 1 else "f − f̂ (units of the underlying)")


def _over_inner_steps(axis: Axes, results: Results) -> None:
    first, values = results["by_seed"][0], values_of(results, "inner_step_norms")
    for i, style in zip(shown_epochs(results), _EPOCH_STYLES, strict=False):
        _curve(axis, np.arange(1, values.shape[2] + 1), values[:, i], f"epoch {first['epoch'][i]}", style)
    for tolerance in first["tolerances"]:
        if tolerance > 0:
            axis.axhline(tolerance, color="0.6", linestyle=":", linewidth=1)
            axis.text(
                0.99, tolerance, f"ε = {tolerance:g}", transform=axis.get_yaxis_transform(),
                fontsize=7, ha="right", va="bottom", color="0.4",
            )  # fmt: skip
    axis.set_xlabel("inner iteration j")
    axis.set_ylabel("‖wʲ − wʲ⁻¹‖ (weights)")


def _over_epochs(axis: Axes, results: Results, name: str, label: str, style: tuple[str, str]) -> None:
    axis.set_xlabel("epoch")
    first = results["by_seed"][0]
    if first.get(name) is not None:  # hedgers that see their previous position have no bounds
        _curve(axis, np.asarray(first["epoch"]), values_of(results, name), label, style)


def _curve(axis: Axes, x: np.ndarray, values: np.ndarray, label: str, style: tuple[str, str]) -> None:
    colour, line = style
    lowest, low, middle, high, highest = _spread(values)
    axis.plot(x, middle, line, markersize=3.5, color=colour, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    axis.fill_between(x, lowest, highest, color=colour, alpha=0.08, linewidth=0)


def _spread(values: np.ndarray) -> np.ndarray:
    """Lowest, quartiles and highest over the first axis, seeds; NaN where no seed has a number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that no seed has a number is drawn as a gap
        return np.nanquantile(values, (0.0, 0.25, 0.5, 0.75, 1.0), axis=0)


def _log_scale(axis: Axes) -> None:
    """As far as the lines reach, or one seed that leaps by decades would flatten all others."""
    axis.set_yscale("log")
    heights = np.concatenate([np.asarray(line.get_ydata(), float) for line in axis.lines])
    heights = heights[heights > 0]
    if heights.size:
        axis.set_ylim(np.min(heights) / 5, np.max(heights) * 5)
