"""From methods to the numbers of a table: every seed on the same test paths, means over seeds, their errors.

Two things make a mean over seeds uncertain: the test paths, which all seeds and methods share, and the seeds.
The error from the paths is that of the mean, from influences averaged over seeds; the error from the seeds is
their standard deviation divided by sqrt(n_seeds); the two are added in quadrature. With one seed nothing is
known of the second, and the error is that of the paths alone.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dhlnn_jax.case import Case
from dhlnn_jax.evaluate import (
    HedgedPaths,
    Measurement,
    Regret,
    as_report,
    measure,
    regret,
    regret_report,
    standard_errors,
)
from dhlnn_jax.fitting import build_policy, shared_made_from
from dhlnn_jax.fleet import Member, fleet_evaluator, layout_of, member_of, on_host, seeds_of, stacked
from dhlnn_jax.hedger import Policy
from dhlnn_jax.methods import METHODS
from dhlnn_jax.optimal import optimal_policies
from dhlnn_jax.report import MIN_EFFECTIVE_PATHS
from dhlnn_jax.trainer import TrainedMember, TrainedMethod, train_method

Params = Any


class Seed(NamedTuple):
    """One hedger of a row, measured.

    Attributes:
      seed: its own, None for rules. stderrs: of values, from the test paths.
      regret: to the optimal policy on the same paths; None where there is none.
    """

    seed: int | None
    values: dict[str, Any]
    stderrs: dict[str, Any]
    regret: Regret | None
    effective_sample_size: float
    trained: TrainedMember | None


class Row(NamedTuple):
    """One method on one case.

    Attributes:
      seeds: one for a rule. mean: of their measurements (the smallest effective sample size).
      money: of the first seed. policy, params: of the first seed.
      training: of all cases and seeds of the method together; None for rules.
    """

    seeds: tuple[Seed, ...]
    mean: Measurement
    money: HedgedPaths
    policy: Policy
    params: Params
    training: TrainedMethod | None


def measured_rows(
    name: str,
    cases: Sequence[Case],
    optimal: Sequence[Row | None],
    *,
    checkpoint_folder: Path | None = None,
) -> list[Row]:
    """Trains a method for all cases and seeds in one program and measures it; one row for each case.

    Args:
      optimal: rows of the exact optimum of each case, to which regret is taken; None where there is none.
      checkpoint_folder: see `trainer.train_method`.
    Raises: FloatingPointError as `trainer.train_method`.
    """
    if not METHODS[name].trained:
        members = [Member(case.config, case.source) for case in cases]
        return _rows(name, cases, [[member] for member in members], optimal, None)
    groups = [seeds_of(case.config, case.source, label=case.label) for case in cases]
    at = [i for i, group in enumerate(groups) for _ in group]

    def judge(i: int, measurement: Measurement) -> dict[str, Any]:
        case, best = cases[at[i]], optimal[at[i]]
        if best is None or case.optimum is None:
            return {}
        distance = regret(measurement, best.mean, case.source.test_groups)
        return {"regret": regret_report(distance, case.optimum.value)}

    trained = train_method(name, [m for group in groups for m in group], checkpoint_folder, judge)
    return _rows(name, cases, groups, optimal, trained)


def _rows(
    name: str,
    cases: Sequence[Case],
    groups: Sequence[Sequence[Member]],
    optimal: Sequence[Row | None],
    trained: TrainedMethod | None,
) -> list[Row]:
    members = [member for group in groups for member in group]
    first = cases[0]
    params = None
    if name == "optimal":  # every case has a band of its own
        policy, params = optimal_policies([case.optimum for case in cases if case.optimum is not None])
    else:
        policy = build_policy(name, first.config, first.source.market_settings)
    if trained is not None:
        which = first.config.measured_parameters
        params = stacked([getattr(one, which) for one in trained.members])
    layout = layout_of(len(members), n_paths=1, devices=first.config.training.devices)
    evaluate = fleet_evaluator(
        policy,
        first.contract,
        mesh=layout.members,
        made_from=shared_made_from("evaluating", name, first.config, first.source),
    )
    money = evaluate(
        params,
        [member.source.test for member in members],
        stacked([member.source.test_settings for member in members]),
    )
    rows, done = [], 0
    for case, group, best in zip(cases, groups, optimal, strict=True):
        of_case = range(done, done + len(group))
        done += len(group)
        groups_of_paths = case.source.test_groups
        seeds, total = [], None
        for i, member in zip(of_case, group, strict=True):
            measurement = on_host(measure(member_of(money, i), case.source.test_settings))
            total = measurement if total is None else jax.tree.map(np.add, total, measurement)
            seeds.append(
                Seed(
                    member.config.seed if trained is not None else None,
                    measurement.values,
                    standard_errors(measurement.influences, groups_of_paths),
                    None if best is None else regret(measurement, best.mean, groups_of_paths),
                    float(measurement.effective_sample_size),
                    None if trained is None else trained.members[i],
                )
            )
        assert total is not None
        n_seeds = len(group)
        mean = total if n_seeds == 1 else jax.tree.map(lambda x, n=n_seeds: x / n, total)
        mean = mean._replace(effective_sample_size=min(seed.effective_sample_size for seed in seeds))
        own = of_case[0]
        rows.append(Row(tuple(seeds), mean, member_of(money, own), policy, member_of(params, own), trained))
    return rows


def case_metrics(case: Case, rows: dict[str, Row]) -> dict[str, Any]:
    """ "methods", "paired" and, where there is one, "optimum", as in metrics.json."""
    groups = case.source.test_groups
    methods = {name: _method_report(case, name, row) for name, row in rows.items()}
    metrics: dict[str, Any] = {"methods": methods, "paired": _paired(rows, methods, groups)}
    if case.optimum is None:
        return metrics
    value = case.optimum.value
    metrics["optimum"] = {
        "value": value,
        "error": case.optimum.error,
        "hedge_ratio_limits": list(case.optimum.hedge_ratio_limits),
    }
    for name, row in rows.items():
        apart, of_paths = regret(row.mean, rows["optimal"].mean, groups)
        by_seed = [float(seed.regret.value) for seed in row.seeds if seed.regret is not None]
        both = Regret(apart, np.hypot(of_paths, _spread(by_seed)))
        methods[name]["regret"] = regret_report(both, value)
    if case.exact is not None:
        risk = case.exact.values["entropic_risk_measure"] + case.config.contract.premium
        unhedged = Regret(np.asarray(risk - value), np.asarray(0.0))
        methods["no_hedge"]["regret"] = regret_report(unhedged, value)
    return metrics


def _spread(values: Sequence[float]) -> float:
    """Standard error of a mean over seeds; 0 for one seed, of which nothing is known."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _over_seeds(
    values: Sequence[dict[str, Any]], stderrs: dict[str, Any]
) -> dict[str, dict[str, float | None]]:
    """Means over seeds, and the errors of paths and seeds in quadrature."""
    of = {metric: [float(own[metric]) for own in values] for metric in values[0]}
    both = {metric: np.hypot(float(stderrs[metric]), _spread(of[metric])) for metric in of}
    return as_report({metric: np.mean(of[metric]) for metric in of}, both)


def _method_report(case: Case, name: str, row: Row) -> dict[str, Any]:
    """One entry of "methods", regret apart."""
    exact = case.exact if name == "no_hedge" else None
    final = _over_seeds(
        [seed.values for seed in row.seeds], standard_errors(row.mean.influences, case.source.test_groups)
    )
    if exact is not None:
        final = as_report(exact.values, dict.fromkeys(exact.values, 0.0))
    ess, training = float(row.mean.effective_sample_size), row.training
    trained = [seed.trained for seed in row.seeds if seed.trained is not None]
    n_paths = len(trained) * case.config.training.epochs * case.config.training.n_paths
    report: dict[str, Any] = {
        "final": final,
        "history": trained[0].history if trained else [],
        "effective_sample_size": None if exact is not None or not np.isfinite(ess) else ess,
        "estimator": "simulation" if exact is None else "quadrature",
        "train_seconds": training.train_seconds if training else 0.0,
        "compile_seconds": training.compile_seconds if training else 0.0,
        "paths_simulated": n_paths,
        "gradient_evaluations": sum(one.gradient_evaluations for one in trained),
    }
    if trained:
        one = trained[0]
        report |= {"training": one.curve, "best_epoch": one.best_epoch, "most_rises": one.most_rises}
    if len(row.seeds) > 1:
        report["by_seed"] = [_seed_report(case, seed) for seed in row.seeds]
    return report


def _seed_report(case: Case, seed: Seed) -> dict[str, Any]:
    assert seed.trained is not None
    distance = {}
    if seed.regret is not None and case.optimum is not None:
        distance = {"regret": regret_report(seed.regret, case.optimum.value)}
    return {
        "seed": seed.seed,
        "final": as_report(seed.values, seed.stderrs),
        **distance,
        "best_epoch": seed.trained.best_epoch,
        "most_rises": seed.trained.most_rises,
        "history": seed.trained.history,
        "training": seed.trained.curve,
    }


def _paired(rows: dict[str, Row], reports: dict[str, Any], groups: Any) -> dict[str, Any]:
    """Differences of every two methods on the same paths, seed by seed, in the order of the table.

    Where too few paths carry the simulated risk of no hedge, its exact value stands in, without an error.
    """
    values, influences = {}, {}
    for name, row in rows.items():
        exact = reports[name]["estimator"] == "quadrature"
        if exact and row.mean.effective_sample_size < MIN_EFFECTIVE_PATHS:
            values[name] = [{metric: x["value"] for metric, x in reports[name]["final"].items()}]
            influences[name] = jax.tree.map(np.zeros_like, row.mean.influences)
        else:
            values[name], influences[name] = [seed.values for seed in row.seeds], row.mean.influences
    paired = {}
    for a, b in itertools.combinations(rows, 2):
        n_seeds = max(len(values[a]), len(values[b]))  # a rule is the same for every seed
        both = [(values[a][i % len(values[a])], values[b][i % len(values[b])]) for i in range(n_seeds)]
        apart = jax.tree.map(np.subtract, influences[a], influences[b])
        difference = [{metric: float(x[metric]) - float(y[metric]) for metric in x} for x, y in both]
        paired[f"{a}-{b}"] = _over_seeds(difference, standard_errors(apart, groups))
    return paired
