"""The picture of what `diagnostics.diagnostics_along_training` measured."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, distinguishable with any colour vision; line styles differ as well.
_BLUE, _RED, _GREEN, _PINK, _ORANGE, _BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000"
_EPOCH_COLOURS = (_BLUE, _RED, _GREEN, _PINK)


def diagnostics_figure(numbers: dict[str, Any]) -> Figure:
    """Six panels of `diagnostics_along_training`; at most four epochs are drawn as curves over step sizes."""
    epochs, sizes = np.asarray(numbers["epoch"]), np.asarray(numbers["step_sizes"])
    shown = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), 4)).round().astype(int))
    get = lambda name: np.array(numbers[name], float)  # noqa: E731
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    panels = figure.subplots(2, 3)
    (error, ratio, drift), (norms, inner, shares) = panels

    for i, colour in zip(shown, _EPOCH_COLOURS, strict=False):
        slopes = [get(f"outputs_{kind}_slope")[i] for kind in ("error", "mean_error")]
        label = f"epoch {epochs[i]}: slopes {slopes[0]:.2f} / {slopes[1]:.2f}"
        error.loglog(sizes, get("outputs_error")[i], "o-", markersize=3, color=colour, label=label)
        error.loglog(sizes, get("outputs_mean_error")[i], "s--", markersize=3, color=colour)
        label = f"epoch {epochs[i]}"
        ratio.loglog(sizes, get("outputs_ratio")[i], "o-", markersize=3, color=colour, label=label)
        ratio.loglog(sizes, get("hedge_ratio_ratio")[i], "s--", markersize=3, color=colour)
        steps = get("inner_step_norms")[i]
        inner.semilogy(range(1, len(steps) + 1), steps, "o-", markersize=3, color=colour, label=label)
    for axis, name, power in ((error, "outputs_error", 2), (ratio, "outputs_ratio", 1)):
        anchor = np.nanmax(get(name)[:, -1])
        line = 2.0 * anchor * (sizes / sizes[-1]) ** power
        axis.loglog(sizes, line, color="0.5", linestyle=":", label=f"slope {power}")
        axis.set_xlabel(f"step ‖w − wʳ‖ / that of one outer iteration (N = {numbers['n_inner']})")
    error.set_title("error of the linearized outputs\nsolid: root mean square, dashed: mean absolute")
    error.set_ylabel("‖f − f̂‖ (units of the underlying)")
    ratio.set_title("error relative to the change\nsolid: raw outputs, dashed: hedge ratio")
    ratio.set_ylabel("‖f(w) − f̂(w)‖ / ‖f(w) − f(wʳ)‖")

    def along(axis: Any, name: str, label: str, colour: str, line: str) -> None:
        if numbers.get(name) is not None:
            axis.plot(epochs, get(name), line, markersize=3, color=colour, label=label)

    along(drift, "gradient_drift_max", "measured, largest", _BLUE, "o-")
    along(drift, "gradient_drift_median", "measured, median", _GREEN, "^-")
    along(drift, "drift_estimate_23", "(23) with ‖∇²f(wʳ)‖ measured, largest", _ORANGE, "-.")
    along(drift, "drift_bound_25", "(25) with β of (93)", _RED, "s--")
    drift.set_title("gradient drift over one outer iteration\n‖∇f(w) − ∇f(wʳ)‖ of single outputs")
    drift.set_ylabel("units of the underlying per unit weight")
    along(norms, "hidden_gradient_norm_max", "‖∇f‖, hidden layers", _BLUE, "o-")
    along(norms, "gradient_bound_66", "(66) as printed", _BLUE, "--")
    along(norms, "hidden_hessian_norm_max", "‖∇²f‖, hidden layers", _RED, "s-")
    along(norms, "hessian_bound_93", "(93) as printed", _RED, "--")
    along(norms, "hessian_norm_max", "‖∇²f‖, all layers", _PINK, "^-")
    norms.set_title("norms of single outputs (largest of those measured)\nbeside the printed expressions")
    norms.set_ylabel("units per unit weight (‖∇f‖), squared (‖∇²f‖)")
    for tolerance in numbers["tolerances"]:
        if tolerance > 0:
            inner.axhline(tolerance, color="0.6", linestyle=":", linewidth=1)
            inner.text(0.99, tolerance, f"ε = {tolerance:g}", transform=inner.get_yaxis_transform(), **_LABEL)
    inner.set_xlabel("inner iteration j")
    inner.set_ylabel("‖wʲ − wʲ⁻¹‖ (weights)")
    inner.set_title("inner steps; the loop stops after the first\nbelow the tolerance ε")
    along(shares, "zero_gradient_share", "output gradient exactly zero", _BLUE, "o-")
    along(shares, "no_trade_share", "no trade (inside the band)", _ORANGE, "s--")
    shares.set_ylim(0, 1)
    shares.set_ylabel("share of path-steps")
    shares.set_title("path-steps without a gradient")
    for axis in (drift, norms, shares):
        axis.set_xlabel("epoch")
    for axis in (drift, norms):
        axis.set_yscale("log")
    for axis in panels.flat:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower left" if axis is inner else "best")
    return figure


_LABEL: dict[str, Any] = {"fontsize": 7, "ha": "right", "va": "bottom", "color": "0.4"}
