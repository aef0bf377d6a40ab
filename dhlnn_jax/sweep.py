"""A grid of numeric settings: every point and seed of a method trained in one program, judged like a run.

All points see the same training paths and, where the market is the same, the same test paths (common random
numbers), so that what differs between two points is the setting and not the draw.
"""

import itertools
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dhlnn_jax.case import Case, make_case
from dhlnn_jax.config import Config, make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.fitting import rate_option
from dhlnn_jax.fleet import TRACED_OPTIONS, keys_of
from dhlnn_jax.measured import Row, case_metrics, measured_rows
from dhlnn_jax.methods import METHODS
from dhlnn_jax.notes import no_liability, not_trading_is_optimal, notes_of
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import machine, write_json
from dhlnn_jax.source import make_sources

SweepResults = dict[str, Any]

_FINISHED = "sweep.json"
_CHECKPOINTS = "checkpoints"
_BEGUN = "begun.json"  # among the checkpoints: of which sweep they are


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
        _begin(checkpoints, config, over)
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
        "over": {name: list(values) for name, values in over.items()},
        "points": [_point(at, case, of_case) for at, case, of_case in zip(points, cases, rows, strict=True)],
        "config": config.model_dump(mode="json"),
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


def _begin(checkpoints: Path, config: Config, over: Mapping[str, Sequence[float]]) -> None:
    """Writes of which sweep the checkpoints are, or checks that they are of this one."""
    begun = checkpoints / _BEGUN
    if begun.exists():
        _check_same(begun, config, over)
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    values = {name: [float(value) for value in values] for name, values in over.items()}
    write_json(begun, {"config": config.model_dump(mode="json"), "over": values})


def _check_same(file: Path, config: Config, over: Mapping[str, Sequence[float]]) -> SweepResults:
    """Contents of a file with "config" and "over". Raises: UsageError if they are of another sweep."""
    kept = json.loads(file.read_text())
    theirs = {**kept["config"], "out": ""}, list(kept["over"].items())
    ours = (
        {**config.model_dump(mode="json"), "out": ""},
        [(name, list(values)) for name, values in over.items()],
    )
    if theirs != ours:
        raise UsageError(f"{str(file)!r} is of another configuration or grid; use --overwrite")
    return kept


def _discard(checkpoints: Path) -> None:
    """Removes them at once: what a kill left of them would be taken for those of the next sweep."""
    if checkpoints.exists():
        gone = checkpoints.with_name(f".{checkpoints.name}.partial")
        shutil.rmtree(gone, ignore_errors=True)
        checkpoints.rename(gone)
        shutil.rmtree(gone)


def write_sweep(results: SweepResults, folder: Path) -> None:
    """Writes sweep.json whole or not at all, and removes the checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _FINISHED, results)
    _discard(folder / _CHECKPOINTS)  # a finished sweep is not resumed


def claim_sweep(folder: Path, *, overwrite: bool, resume: bool) -> Path:
    """Where a sweep that writes to `folder` keeps its checkpoints.

    Args:
      overwrite: removes those of an earlier sweep.
    Raises: UsageError if `folder` is a file, holds a run, or holds a sweep and neither overwriting nor
      resuming was asked for, or if there is none to resume.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out = {str(folder)!r} is a file; name a folder")
    if (folder / "config.toml").exists():
        raise UsageError(f"{str(folder)!r} holds a run; give --out another folder")
    checkpoints, finished = folder / _CHECKPOINTS, (folder / _FINISHED).exists()
    begun = (checkpoints / _BEGUN).exists()
    if resume and not (begun or finished):
        raise UsageError(f"nothing to resume in {str(folder)!r}; run without --resume")
    if (begun or finished) and not (overwrite or resume):
        found = str(checkpoints if begun else folder / _FINISHED)
        raise UsageError(f"{found!r} exists; give --out another folder, or --overwrite, or --resume")
    if begun and overwrite:
        _discard(checkpoints)
    return checkpoints


def finished_sweep(folder: Path, config: Config, over: Mapping[str, Sequence[float]]) -> SweepResults | None:
    """Contents of sweep.json if this sweep is finished there; None if it has still to be gone on with.

    Raises: UsageError if another one is.
    """
    if (folder / _CHECKPOINTS / _BEGUN).exists():
        return None
    return _check_same(folder / _FINISHED, config, over)


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
