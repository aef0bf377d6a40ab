"""A grid of numeric settings: every point and seed of a method trained in one program, judged like a run.

All points see the same training paths and, where the market is the same, the same test paths (common random
numbers), so that what differs between two points is the setting and not the draw.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dhlnn_jax import resumable
from dhlnn_jax.case import Case, make_case
from dhlnn_jax.config import Config, make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import write_json
from dhlnn_jax.fitting import rate_option
from dhlnn_jax.fleet import TRACED_OPTIONS, keys_of
from dhlnn_jax.measured import Row, case_metrics, measured_rows
from dhlnn_jax.methods import METHODS
from dhlnn_jax.notes import no_liability, not_trading_is_optimal, notes_of
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import machine
from dhlnn_jax.source import make_sources

SweepResults = dict[str, Any]

_FINISHED = "sweep.json"


def sweep(
    config: Config, over: Mapping[str, Sequence[float]], *, checkpoint_folder: Path | None = None
) -> SweepResults:
    """Trains and measures every method of a configuration at every point of a grid.

    Args:
      config: `seeds` hedgers of each trained method are trained at each point; `evaluation.epochs` are not
        measured.
      over: one of TRACED_OPTIONS -> its values; several options make a grid, the first varying slowest.
      checkpoint_folder: where checkpoints are kept, and gone on from if there are any; None keeps none.
    Returns: contents of sweep.json: "over"; "points", in the order of the grid, each with "at" (option ->
      value), "methods", "paired" and "optimum" as in metrics.json, "notes", "not_trading_is_optimal" and
      "no_liability"; "notes" on the sweep; "seconds", training and compilation by method; "config",
      "machine", "n_test_paths".
    Raises: UsageError for an option that cannot be swept, a value that is not allowed, or checkpoints of
      another sweep. FloatingPointError as `trainer.train_method`.
    """
    _check(config, over)
    with jax.default_matmul_precision(config.matmul_precision):
        return _sweep(config, over, checkpoint_folder)


def _sweep(config: Config, over: Mapping[str, Sequence[float]], checkpoints: Path | None) -> SweepResults:
    began = time.perf_counter()
    points = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
    configs = [_config_at(config, at) for at in points]
    sources = make_sources(configs, keys_of(config.seed).test)
    if checkpoints is not None:
        resumable.begin(checkpoints, _told(config, over))
    cases = []
    with progress_bar("solving for the exact optima", len(configs)) as advance:
        for at, of_point, source in zip(points, configs, sources, strict=True):
            cases.append(make_case(of_point, source, label=label_of_point(at)))
            advance()

    rows: list[dict[str, Row]] = [{} for _ in cases]
    names = dict.fromkeys(name for case in cases for name in case.rows)
    for name in sorted(names, key=lambda name: name != "optimal"):  # regret is to it, so it comes first
        having = [i for i, case in enumerate(cases) if name in case.rows]
        done = measured_rows(
            name,
            [cases[i] for i in having],
            [rows[i].get("optimal") for i in having],
            checkpoint_folder=checkpoints / name if checkpoints else None,
        )
        for i, row in zip(having, done, strict=True):
            rows[i][name] = row
    trained = {name: row.training for of_case in rows for name, row in of_case.items() if row.training}
    return {
        "schema": 1,
        **_told(config, over),
        "points": [_point(at, case, of_case) for at, case, of_case in zip(points, cases, rows, strict=True)],
        "n_test_paths": int(sources[0].test.spot.shape[0]),
        "notes": [*sources[0].notes, *_about_rates(configs[0], over, list(trained))],
        "seconds": {
            "total": time.perf_counter() - began,
            "train": {name: method.train_seconds for name, method in trained.items()},
            "compile": {name: method.compile_seconds for name, method in trained.items()},
        },
        "machine": machine(),
    }


def label_of_point(at: Mapping[str, float]) -> str:
    """ "cost.rate 0.002, contract.strike 1.2"."""
    return ", ".join(f"{name} {value:g}" for name, value in at.items())


def _check(config: Config, over: Mapping[str, Sequence[float]]) -> None:
    for name, values in over.items():
        if name not in TRACED_OPTIONS:
            raise UsageError(f"--over {name}: cannot be swept; allowed: {', '.join(TRACED_OPTIONS)}")
        if not values:
            raise UsageError(f"--over {name} needs values, as --over {name} 1 2 3")
        if len(set(values)) < len(values):
            raise UsageError(f"--over {name} names a value twice: {' '.join(f'{x:g}' for x in values)}")
    if "market.volatility" in over and config.market.recorded:
        raise UsageError("--over market.volatility: recorded prices have their own volatility")
    if "cost.rate" in over and config.cost.charge == "half_spread":
        raise UsageError("--over cost.rate: cost.charge is 'half_spread', which uses no rate")


def _about_rates(config: Config, over: Mapping[str, Sequence[float]], trained: Sequence[str]) -> list[str]:
    """Which trained methods a swept learning rate leaves as they are: the rows alone look like robustness."""
    option = "training.learning_rate"
    unmoved = [n for n in trained if METHODS[n].update == "newton" or rate_option(n, config) != option]
    if option not in over or not unmoved:
        return []
    return [f"{option} is not used by {', '.join(unmoved)}, and makes no difference there"]


def _config_at(config: Config, at: Mapping[str, float]) -> Config:
    changed = config.model_dump()
    changed["evaluation"]["epochs"] = ()
    for name, value in at.items():
        section, option = name.split(".")
        changed[section][option] = value
    return make_config(changed, source=f"at {label_of_point(at)}")


def _point(at: dict[str, float], case: Case, rows: dict[str, Row]) -> dict[str, Any]:
    in_order = {name: rows[name] for name in case.rows}
    metrics = case_metrics(case, in_order)
    return {
        "at": at,
        **metrics,
        "notes": notes_of(case, metrics),
        "not_trading_is_optimal": not_trading_is_optimal(metrics),
        "no_liability": no_liability(case),
    }


def _told(config: Config, over: Mapping[str, Sequence[float]]) -> resumable.Told:
    return {
        "config": config.model_dump(mode="json"),
        "over": {name: [float(value) for value in values] for name, values in over.items()},
    }


def write_sweep(results: SweepResults, checkpoints: Path) -> None:
    """Writes sweep.json beside its checkpoints, whole or not at all, and removes them."""
    folder = checkpoints.parent
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _FINISHED, results)
    resumable.discard(checkpoints)  # a finished sweep is not resumed


def claim_sweep(folder: Path, *, overwrite: bool, resume: bool) -> Path:
    """`resumable.claim` for a sweep."""
    return resumable.claim(folder, _FINISHED, overwrite=overwrite, resume=resume)


def finished_sweep(
    checkpoints: Path, config: Config, over: Mapping[str, Sequence[float]]
) -> SweepResults | None:
    """`resumable.finished` for a sweep."""
    return resumable.finished(checkpoints, _FINISHED, _told(config, over))


def parse_over(arguments: Sequence[str]) -> tuple[dict[str, list[float]], list[str]]:
    """The options of `--over OPTION VALUE ...` with their values, and the other arguments.

    Raises: UsageError for an --over without an option, a value that is no finite number, or a repetition.
    """
    over: dict[str, list[float]] = {}
    rest, others = list(arguments), []
    while rest:
        flag = rest.pop(0)
        if flag != "--over":
            others.append(flag)
            continue
        given = []
        while rest and not rest[0].startswith("--"):
            given += [part for part in rest.pop(0).split(",") if part]
        if not given:
            raise UsageError(f"--over needs an option and its values; allowed: {', '.join(TRACED_OPTIONS)}")
        name, values = given[0].replace("-", "_"), given[1:]
        if name in over:
            raise UsageError(f"--over {name} is given twice; list all values after one")
        try:
            over[name] = [float(value) for value in values]
        except ValueError:
            raise UsageError(f"--over {name} takes numbers, got {' '.join(values)}") from None
        if not np.all(np.isfinite(over[name])):
            raise UsageError(f"--over {name} takes finite numbers, got {' '.join(values)}")
    if not over:
        raise UsageError(f"give --over OPTION VALUE ...; allowed: {', '.join(TRACED_OPTIONS)}")
    return over, others
