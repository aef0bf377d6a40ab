"""What a reader must know before believing a table, one line each."""

from typing import Any

import numpy as np

from dhlnn_jax.case import Case
from dhlnn_jax.report import objective_metric

Metrics = dict[str, Any]

MANY_RISES = 10
ONE_WAY = 0.01  # of what the best hedger turns back; below this share a hedger trades one way


def notes_of(case: Case, metrics: Metrics) -> list[str]:
    """Every note on a case with these metrics (`measured.case_metrics`), whichever seed it is about."""
    return [
        *_about_scale(case),
        *_about_not_trading(case, metrics),
        *_about_dead_bands(case, metrics),
        *_about_dead_edges(case, metrics),
        *_about_rises(metrics),
        *_about_optimum(case, metrics),
    ]


def _about_scale(case: Case) -> list[str]:
    notes = []
    s = case.source.market_settings
    scale = float(s.risk_aversion) * float(s.spot0) * float(s.volatility) * np.sqrt(float(s.maturity))
    if not 0.1 <= scale <= 5:
        notes.append(
            f"risk_aversion * spot0 * volatility * sqrt(maturity) = {scale:.3g} lies outside 0.1 to 5: "
            + ("risk aversion hardly matters" if scale < 0.1 else "the far tail carries entropic risks")
        )
    if no_liability(case):
        assert case.exact is not None
        notes.append(
            f"there is no liability here: the claim pays with probability "
            f"{case.exact.exercise_probability:.1e}, "
            "so doing nothing is optimal and no row is evidence of hedging"
        )
    return notes


def no_liability(case: Case) -> bool:
    """Whether the claim, where its law is known, hardly ever pays."""
    return case.exact is not None and case.exact.exercise_probability < 1e-4


def not_trading_is_optimal(metrics: Metrics) -> bool:
    """Whether the exact optimum, where there is one, gains nothing on no hedge."""
    regret = metrics["methods"]["no_hedge"].get("regret", {"value": None})["value"]
    return regret is not None and regret <= 1e-7 + metrics["optimum"]["error"]


def _about_not_trading(case: Case, metrics: Metrics) -> list[str]:
    metric = objective_metric(case.config)
    better = _better_than_no_hedge(metrics, metric)
    # On the same paths: the row of no hedge may be exact, and these paths dearer or cheaper than all are.
    less = {
        name: _less_no_hedge(metrics, metric, name)[0] for name in metrics["methods"] if name != "no_hedge"
    }
    hedged = [value for name, value in less.items() if name != "optimal" and value is not None]
    if not_trading_is_optimal(metrics):
        return [
            "the exact optimum is not to trade at this cost and risk aversion: the table shows who has "
            "learned not to trade, not who hedges well"
        ]
    if not hedged:
        return []
    if better:
        worse = []
        for name in better:
            mean = metrics["methods"][name]["final"][metric]["value"]
            for who, own in _by_seed(name, metrics["methods"][name]):
                by = less[name] + own["final"][metric]["value"] - mean
                worse += [f"{who} is worse than no hedge by {by:.2g}"] if by > 0 else []
        return worse
    if min(hedged) < 0:
        what = "too few test paths, or too little to gain, to tell hedging from not hedging"
    else:
        what = (
            "at this cost and risk aversion not trading is the best of these rows, and the table shows "
            "who has learned not to trade, not who hedges well"
        )
    return [f"no method beats no hedge by 3 paired standard errors of {metric}: {what}"]


def _about_dead_bands(case: Case, metrics: Metrics) -> list[str]:
    reports = metrics["methods"]
    better = _better_than_no_hedge(metrics, objective_metric(case.config))
    gains = [name for name in better if reports[name]["final"]["turnover_mean"]["value"]]
    return [
        f"{who} does not trade although {gains[0]} gains by it: a dead band, its gradient is "
        "zero; lower training.learning_rate or raise training.warmup"
        for name, report in reports.items()
        if gains and "training" in report
        for who, own in _by_seed(name, report)
        if not own["final"]["turnover_mean"]["value"]
    ]


def _about_dead_edges(case: Case, metrics: Metrics) -> list[str]:
    """A band of which no path reaches one edge: the gradient to it is zero, as to both of a dead band.

    Silent where the best hedger hardly turns back itself.
    """
    reports, metric = metrics["methods"], objective_metric(case.config)
    better = _better_than_no_hedge(metrics, metric)
    if not better:
        return []
    best = min(better, key=lambda name: (name != "optimal", reports[name]["final"][metric]["value"]))
    needed = _turned_back(reports[best])
    if needed < ONE_WAY * reports[best]["final"]["turnover_mean"]["value"]:
        return []
    return [
        f"{who} trades one way only: it turns back {_turned_back(own):.2g} units a path, {best} "
        f"{needed:.2g}. If it has a band, paths do not reach one edge, which then cannot learn; lower its "
        "learning rate or raise training.warmup"
        for name, report in reports.items()
        if "training" in report
        for who, own in _by_seed(name, report)
        if own["final"]["turnover_mean"]["value"] and _turned_back(own) < ONE_WAY * needed
    ]


def _turned_back(report: dict[str, Any]) -> float:
    return report["final"]["round_trip_mean"]["value"]


def _about_rises(metrics: Metrics) -> list[str]:
    """Inner steps are meant to lower the linearized objective; many in a row that raise it run away."""
    return [
        f"{who}: {own['most_rises']} inner steps in a row raised the linearized objective; "
        "lower nested.learning_rate or nested.n_inner"
        for name, report in metrics["methods"].items()
        for who, own in _by_seed(name, report)
        if own.get("most_rises", 0) >= MANY_RISES
    ]


def _about_optimum(case: Case, metrics: Metrics) -> list[str]:
    """What speaks against the optimum: its own notes, and rows that seem to beat it."""
    if case.optimum is None:
        return []
    notes = [f"exact optimum: {note}" for note in case.optimum.notes]
    for name, report in metrics["methods"].items():
        for who, own in _by_seed(name, report):
            value, error = own["regret"]["value"], own["regret"]["stderr"]
            if value is not None and error is not None and value < -3 * error - 1e-7 - case.optimum.error:
                notes.append(
                    f"{who} seems to beat the exact optimum by {-value:.2g} ± {error:.2g}, which cannot be: "
                    "too few paths carry the tail; raise evaluation.n_paths"
                )
    return notes


def _by_seed(name: str, report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """How to call each hedger of a row, and its numbers."""
    if "by_seed" not in report:
        return [(name, report)]
    return [(f"{name} (seed {own['seed']})", own) for own in report["by_seed"]]


def _better_than_no_hedge(metrics: Metrics, metric: str) -> list[str]:
    """Methods that beat it by three paired standard errors."""
    better = []
    for name in metrics["methods"]:
        if name == "no_hedge":
            continue
        value, error = _less_no_hedge(metrics, metric, name)
        # Entropic risks near zero are only good to the rounding of float32.
        if value is not None and error is not None and value < -3 * error - 1e-7:
            better.append(name)
    return better


def _less_no_hedge(metrics: Metrics, metric: str, name: str) -> tuple[float | None, float | None]:
    """A method's risk less that of no hedge on the same paths, and the standard error of that."""
    pair = metrics["paired"].get(f"{name}-no_hedge")
    if pair is not None:
        return pair[metric]["value"], pair[metric]["stderr"]
    value, error = (metrics["paired"][f"no_hedge-{name}"][metric][part] for part in ("value", "stderr"))
    return (None if value is None else -value), error
