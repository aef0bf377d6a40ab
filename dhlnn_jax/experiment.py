"""One experiment, from configuration to results folder: train each method, measure all on the same paths."""

import itertools
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dhlnn_jax.bands import effective_band
from dhlnn_jax.config import Config
from dhlnn_jax.evaluate import (
    HedgedPaths,
    Measurement,
    Regret,
    as_report,
    measure,
    regret,
    regret_report,
    standard_errors,
    unhedged_values,
)
from dhlnn_jax.fitting import TrainedMethod, build_policy, evaluator, make_contract, train_method
from dhlnn_jax.hedger import Policy
from dhlnn_jax.market import MarketPath
from dhlnn_jax.methods import METHODS
from dhlnn_jax.optimal import Optimum, solve_contract
from dhlnn_jax.pnl import Contract
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.report import MIN_EFFECTIVE_PATHS, objective_metric, write_figures
from dhlnn_jax.results import (
    Results,
    claim_folder,
    device_name,
    machine,
    open_folder,
    read_results,
    write_results,
)
from dhlnn_jax.settings import Settings
from dhlnn_jax.source import Source, make_source
from dhlnn_jax.unhedged import unhedged_law


class _Row(NamedTuple):
    """One method, measured."""

    money: HedgedPaths
    measurement: Measurement
    final: dict[str, dict[str, float | None]]
    trained: TrainedMethod | None


def run(config: Config, *, overwrite: bool = False, resume: bool = False) -> Results:
    """Trains and measures every method of the configuration and writes its results folder.

    Args:
      overwrite: replace an earlier run in the same folder. resume: go on with one that was cut off, from its
        last checkpoints.
    Returns: the results, as `results.read_results` would read them back.
    Raises: UsageError for input that cannot be used, before any training.
      FloatingPointError if a risk stops being finite during training.
    """
    started = time.perf_counter()
    folder = Path(config.out)
    claim_folder(folder, overwrite=overwrite, resume=resume)
    if resume and (folder / "metrics.json").exists():
        open_folder(folder, config, overwrite=False, resume=True)  # refuses another configuration
        return read_results(folder)
    key_init, key_train, key_validation, key_test = (
        jax.random.fold_in(jax.random.key(config.seed), role) for role in range(4)
    )
    source = make_source(config, key_test)
    contract = make_contract(config)
    open_folder(folder, config, overwrite=overwrite, resume=resume)

    # The optimum and the row without a hedge are what every other one must be read against.
    optimum = _solve(config, contract, source.market_settings)
    first = () if optimum is None else ("optimal",)
    names = list(dict.fromkeys((*first, *config.methods, "no_hedge")))
    rows: dict[str, _Row] = {}
    bands: dict[str, np.ndarray] = {}
    sample_path = _sample_path(config, source)

    def judge(measurement: Measurement) -> dict[str, Any]:
        if optimum is None:
            return {}
        return {
            "regret": regret_report(
                regret(measurement, rows["optimal"].measurement, source.test_groups), optimum.value
            )
        }

    for name in names:
        trained = None
        params = None
        if METHODS[name].trained:
            trained = train_method(
                name, config, source, contract, key_init, key_train, key_validation, folder, judge
            )
            params = trained.params
        policy = build_policy(name, config, source.market_settings)
        evaluate = evaluator(policy, contract)
        money = evaluate(params, source.test, source.test_settings)
        measurement = measure(money, source.test_settings)
        stderrs = standard_errors(measurement.influences, source.test_groups)
        rows[name] = _Row(money, measurement, as_report(measurement.values, stderrs), trained)
        sample_path |= _sampled(name, policy, params, source)
        if not config.market.recorded:
            bands |= _bands(name, policy, params, config, source)

    exact = _exact_no_hedge(config, contract, source.market_settings)
    metrics: dict[str, Any] = {
        "schema": 1,
        "seed": config.seed,
        "device": device_name(),
        "methods": {name: _method_report(rows[name], exact if name == "no_hedge" else None) for name in rows},
    }
    metrics["paired"] = _paired(rows, metrics["methods"], source)
    if optimum is not None:
        metrics["optimum"] = {"value": optimum.value, "error": optimum.error}
        for name, report in metrics["methods"].items():
            report |= judge(rows[name].measurement)
        if exact is not None:
            risk = exact.values["entropic_risk_measure"] + config.contract.premium
            unhedged = Regret(jnp.asarray(risk - optimum.value), jnp.asarray(0.0))
            metrics["methods"]["no_hedge"]["regret"] = regret_report(unhedged, optimum.value)
    n_groups = len(np.unique(np.asarray(source.test_groups)))
    results = Results(
        config=config,
        metrics=metrics,
        meta={
            **machine(),
            "seconds": {
                "total": time.perf_counter() - started,
                "compile": sum(r.trained.compile_seconds for r in rows.values() if r.trained),
                "train": sum(r.trained.train_seconds for r in rows.values() if r.trained),
            },
            "settings": _numbers(source.settings),
            "market_settings": _numbers(source.market_settings),
            "n_test_paths": int(source.test.spot.shape[0]),
            "n_test_groups": n_groups,
            "notes": [*source.notes, *_notes(config, source, metrics, exact), *_doubts(optimum, metrics)],
        },
        pnl=_pnl_arrays(rows, source.test, source.test_groups),
        sample_path=sample_path,
        bands=bands,
        folder=folder,
    )
    write_results(results)
    write_figures(results)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished run is not resumed
    return results


def _solve(config: Config, contract: Contract, market_settings: Settings) -> Optimum | None:
    """The exact optimum on the test market; None where there is none."""
    if config.no_optimum is not None:
        return None
    with progress_bar("solving for the exact optimum", None):
        return solve_contract(contract, market_settings, n_steps=config.market.n_steps)


def _doubts(optimum: Optimum | None, metrics: dict[str, Any]) -> list[str]:
    """What speaks against the optimum: its own notes, and rows that seem to beat it."""
    if optimum is None:
        return []
    notes = [f"exact optimum: {note}" for note in optimum.notes]
    for name, report in metrics["methods"].items():
        value, error = report["regret"]["value"], report["regret"]["stderr"]
        if value is not None and error is not None and value < -3 * error - 1e-7 - optimum.error:
            notes.append(
                f"{name} seems to beat the exact optimum by {-value:.2g} ± {error:.2g}, which cannot be: "
                "too few paths carry the tail; raise evaluation.n_paths"
            )
    return notes


def _numbers(settings: Settings) -> dict[str, Any]:
    """Settings as plain floats: what hedgers of this run go by."""
    return jax.tree.map(float, settings._asdict())


def _method_report(row: _Row, exact: "ExactNoHedge | None") -> dict[str, Any]:
    """One entry of metrics.json."""
    trained = row.trained
    ess = float(row.measurement.effective_sample_size)
    final = row.final
    if exact is not None:
        final = as_report(exact.values, dict.fromkeys(exact.values, 0.0))
    return {
        "final": final,
        "history": trained.history if trained else [],
        "effective_sample_size": None if exact is not None or not np.isfinite(ess) else ess,
        "estimator": "simulation" if exact is None else "quadrature",
        "train_seconds": trained.train_seconds if trained else 0.0,
        "compile_seconds": trained.compile_seconds if trained else 0.0,
        "paths_simulated": trained.paths_simulated if trained else 0,
        "gradient_evaluations": trained.gradient_evaluations if trained else 0,
        **({"training": trained.curve, "best_epoch": trained.best_epoch} if trained else {}),
    }


class ExactNoHedge(NamedTuple):
    """No hedge under geometric Brownian motion: its metrics by quadrature, and the chance of a payoff."""

    values: dict[str, float]
    exercise_probability: float


def _exact_no_hedge(config: Config, contract: Contract, settings: Settings) -> ExactNoHedge | None:
    """None where the law of the claim is not known."""
    if config.market.kind != "gbm" or contract.claim.depends_on == "path":
        return None
    law = unhedged_law(contract.claim, settings, n_steps=config.market.n_steps)
    exercised = float(law.probability[law.payoff > 0].sum())
    return ExactNoHedge(unhedged_values(law.payoff, law.probability, settings), exercised)


def _paired(rows: dict[str, _Row], reports: dict[str, Any], source: Source) -> dict[str, Any]:
    """Differences of every two methods on the same paths, in the order of the table.

    Where too few paths carry the simulated risk of no hedge, its exact value stands in, without an error.
    """
    values, influences = {}, {}
    for name, row in rows.items():
        exact = reports[name]["estimator"] == "quadrature"
        if exact and row.measurement.effective_sample_size < MIN_EFFECTIVE_PATHS:
            values[name] = {metric: number["value"] for metric, number in reports[name]["final"].items()}
            influences[name] = jax.tree.map(jnp.zeros_like, row.measurement.influences)
        else:
            values[name], influences[name] = row.measurement.values, row.measurement.influences
    paired = {}
    for a, b in itertools.combinations(rows, 2):
        difference = {metric: float(values[a][metric]) - float(values[b][metric]) for metric in values[a]}
        apart = jax.tree.map(jnp.subtract, influences[a], influences[b])
        paired[f"{a}-{b}"] = as_report(difference, standard_errors(apart, source.test_groups))
    return paired


def _notes(config: Config, source: Source, metrics: dict[str, Any], exact: ExactNoHedge | None) -> list[str]:
    """What a reader must know before believing the table, one line each."""
    notes = []
    s = source.market_settings
    scale = float(s.risk_aversion * s.spot0 * s.volatility * np.sqrt(s.maturity))
    if not 0.1 <= scale <= 5:
        notes.append(
            f"risk_aversion * spot0 * volatility * sqrt(maturity) = {scale:.3g} lies outside 0.1 to 5: "
            + ("risk aversion hardly matters" if scale < 0.1 else "the far tail carries entropic risks")
        )
    if exact is not None and exact.exercise_probability < 1e-4:
        notes.append(
            f"there is no liability here: the claim pays with probability {exact.exercise_probability:.1e}, "
            "so doing nothing is optimal and no row is evidence of hedging"
        )
    metric = objective_metric(config)
    reports = metrics["methods"]
    unhedged = reports["no_hedge"]["final"][metric]["value"]
    better = [
        name
        for name, report in reports.items()
        if name != "no_hedge" and _beats(metrics, name, "no_hedge", metric)
    ]
    hedged = [
        report["final"][metric]["value"]
        for name, report in reports.items()
        if name not in ("no_hedge", "optimal") and report["final"][metric]["value"] is not None
    ]
    regret = reports["no_hedge"].get("regret", {"value": None})["value"]
    if regret is not None and regret <= 1e-7 + metrics["optimum"]["error"]:
        notes.append(
            "the exact optimum is not to trade at this cost and risk aversion: the table shows who has "
            "learned not to trade, not who hedges well"
        )
    elif unhedged is not None and hedged and not better:
        if min(hedged) < unhedged:
            what = "too few test paths, or too little to gain, to tell hedging from not hedging"
        else:
            what = (
                "at this cost and risk aversion not trading is the best of these rows, and the table shows "
                "who has learned not to trade, not who hedges well"
            )
        notes.append(f"no method beats no hedge by 3 paired standard errors of {metric}: {what}")
    gains = [name for name in better if reports[name]["final"]["turnover_mean"]["value"]]
    for name, report in reports.items():
        if gains and "training" in report and not report["final"]["turnover_mean"]["value"]:
            notes.append(
                f"{name} does not trade although {gains[0]} gains by it: a dead band, its gradient is "
                "zero; lower training.learning_rate or raise training.warmup"
            )
    return notes


def _beats(metrics: dict[str, Any], a: str, b: str, metric: str) -> bool:
    pair = metrics["paired"].get(f"{a}-{b}")
    sign = 1.0
    if pair is None:
        pair, sign = metrics["paired"][f"{b}-{a}"], -1.0
    value, error = pair[metric]["value"], pair[metric]["stderr"]
    # Entropic risks near zero are only good to the rounding of float32.
    return value is not None and error is not None and sign * value < -3 * error - 1e-7


def _pnl_arrays(rows: dict[str, _Row], paths: MarketPath, groups: Any) -> dict[str, np.ndarray]:
    first = next(iter(rows.values()))
    arrays = {
        "payoff": np.asarray(first.money.payoff),
        "final_spot": np.asarray(paths.spot[:, -1]),
        "group_id": np.asarray(groups),
    }
    for name, row in rows.items():
        for column in ("trading_gain", "trading_cost", "pnl"):
            arrays[f"{name}/{column}"] = np.asarray(getattr(row.money, column))
    return arrays


def _sample_path(config: Config, source: Source) -> dict[str, np.ndarray]:
    spot = np.asarray(source.test.spot[0])
    return {"spot": spot, "time": np.arange(len(spot)) * config.market.years_per_step}


def _bands(name: str, policy: Policy, params: Any, config: Config, source: Source) -> dict[str, np.ndarray]:
    """No-transaction band over spot at some times to maturity: a policy's own, or its effective one."""
    n_steps = config.market.n_steps
    decisions = np.unique([min(1, n_steps - 1), n_steps // 2, 4 * n_steps // 5, n_steps - 1])
    s = source.market_settings
    reach = 2.5 * float(s.volatility) * np.sqrt(n_steps * float(s.dt))
    spot = float(s.spot0) * np.exp(np.linspace(-reach, reach, 101))
    lower, upper = effective_band(policy, params, jnp.asarray(spot, float), source.test_settings, n_steps)
    return {
        "spot": spot,
        "decision": decisions,
        f"{name}/band_lower": np.asarray(lower)[decisions],
        f"{name}/band_upper": np.asarray(upper)[decisions],
    }


def _sampled(name: str, policy: Policy, params: Any, source: Source) -> dict[str, np.ndarray]:
    """Hedge ratios, and bands where there are any, on the first test path."""
    path = jax.tree.map(lambda x: x[0], source.test)
    arrays = {f"{name}/hedge_ratio": jax.jit(policy.hedge_ratio)(params, path, source.test_settings)}
    if policy.band is not None:
        lower, upper = jax.jit(policy.band)(params, path, source.test_settings)
        arrays |= {f"{name}/band_lower": lower, f"{name}/band_upper": upper}
    return {key: np.asarray(value) for key, value in arrays.items()}
