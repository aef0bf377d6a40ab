"""The table of what `diagnostics_run.diagnose` measured."""

from typing import Any

import numpy as np

from dhlnn_jax.diagnostics_figure import shown_epochs, values_of

_ROWS = {
    "slope of the linearization error over the step, root mean square": "outputs_error_slope",
    "... mean absolute": "outputs_mean_error_slope",
    "error / change after one outer iteration, raw outputs": "outputs_ratio",
    "... hedge ratio": "hedge_ratio_ratio",
    "largest gradient drift": "gradient_drift_max",
    "... (25) with β of (93)": "drift_bound_25",
    "... (23) with the measured norm of the Hessian": "drift_estimate_23",
    "largest gradient, hidden layers": "hidden_gradient_norm_max",
    "... (66) as printed": "gradient_bound_66",
    "norm of the Hessian, hidden layers": "hidden_hessian_norm_max",
    "... (93) as printed": "hessian_bound_93",
    "... all layers": "hessian_norm_max",
    "share of decisions without a gradient": "zero_gradient_share",
    "... inside the band": "no_trade_share",
    "risk": "risk",
    "length of one outer iteration": "step_norm",
}


def print_diagnostics(results: dict[str, Any]) -> None:
    """On stdout, at the epochs of the figure: median over seeds (lowest to highest)."""
    from rich.table import Table

    from dhlnn_jax.tables import print_table

    n_seeds, first = len(results["seeds"]), results["by_seed"][0]
    table = Table(title=f"median of {n_seeds} seeds (lowest to highest)", title_justify="left")
    table.add_column("epoch", no_wrap=True)
    shown = shown_epochs(results)
    for i in shown:
        table.add_column(str(first["epoch"][i]), justify="right")
    whole_step = first["step_sizes"].index(1.0)
    for label, name in _ROWS.items():
        if first.get(name) is None:
            continue
        values = values_of(results, name)
        if values.ndim == 3:  # over step sizes
            values = values[..., whole_step]
        table.add_row(label, *(_cell(values[:, i]) for i in shown))
    print_table(table)


def _cell(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    if not known.size:
        return "–"
    of = "" if known.size == values.size else f", {known.size} of {values.size} seeds"
    return f"{np.median(known):.3g} ({np.min(known):.3g} to {np.max(known):.3g}{of})"
