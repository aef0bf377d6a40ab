"""One experiment, from configuration to results folder: train each method, measure all on the same paths."""

import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dhlnn_jax import traces
from dhlnn_jax.bands import effective_band
from dhlnn_jax.case import make_case
from dhlnn_jax.checkpoint import save_tree
from dhlnn_jax.compiling import options_for_seldom
from dhlnn_jax.config import Config
from dhlnn_jax.figures import write_figures
from dhlnn_jax.fitting import clamp_of, made_from
from dhlnn_jax.fleet import keys_of, on_host
from dhlnn_jax.hedge import band_hedge
from dhlnn_jax.hedger import Policy
from dhlnn_jax.market import MarketPath
from dhlnn_jax.measured import Row, case_metrics, measured_rows
from dhlnn_jax.notes import notes_of
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import (
    Results,
    claim_folder,
    device_name,
    machine,
    open_folder,
    params_folder,
    read_results,
    write_results,
)
from dhlnn_jax.settings import Settings
from dhlnn_jax.source import Source, make_source


def run(config: Config, *, overwrite: bool = False, resume: bool = False) -> Results:
    """Trains and measures every method of the configuration and writes its results folder.

    Args:
      overwrite: replace an earlier run in the same folder. resume: go on with one that was cut off, from its
        last checkpoints.
    Returns: the results, as `results.read_results` would read them back.
    Raises: UsageError for input that cannot be used, before any training.
      FloatingPointError if a risk stops being finite during training.
    """
    with jax.default_matmul_precision(config.matmul_precision):
        return _run(config, overwrite=overwrite, resume=resume)


def _run(config: Config, *, overwrite: bool, resume: bool) -> Results:
    started = time.perf_counter()
    folder = Path(config.out)
    claim_folder(folder, overwrite=overwrite, resume=resume)
    if resume and (folder / "metrics.json").exists():
        open_folder(folder, config, overwrite=False, resume=True)  # refuses another configuration
        return read_results(folder)
    source = make_source(config, keys_of(config.seed).test)
    open_folder(folder, config, overwrite=overwrite, resume=resume)
    with progress_bar("solving for the exact optimum", None):
        case = make_case(config, source)

    rows: dict[str, Row] = {}
    for name in case.rows:
        (row,) = measured_rows(
            name, [case], [rows.get("optimal")], checkpoint_folder=folder / "checkpoints" / name
        )
        rows[name] = row
        _keep_params(folder, name, row)

    sample_path, bands = _shown(rows, config, source)
    metrics = {"schema": 1, "seed": config.seed, "device": device_name(), **case_metrics(case, rows)}
    trained = [row.training for row in rows.values() if row.training]
    results = Results(
        config=config,
        metrics=metrics,
        meta={
            **machine(),
            "seconds": {
                "total": time.perf_counter() - started,
                "compile": sum(method.compile_seconds for method in trained),
                "train": sum(method.train_seconds for method in trained),
            },
            "clamp": clamp_of(config) if trained else None,
            "settings": _numbers(source.settings),
            "market_settings": _numbers(source.market_settings),
            "n_test_paths": int(source.test.spot.shape[0]),
            "n_test_groups": len(np.unique(np.asarray(source.test_groups))),
            "notes": [*source.notes, *notes_of(case, metrics)],
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


def _keep_params(folder: Path, name: str, row: Row) -> None:
    for i, own in enumerate(row.seeds):
        for which in ("best", "last") if own.trained is not None else ():
            target = params_folder(folder, name, own.seed if i else None) / which
            if not target.exists():  # a resumed run has those of the methods that it had finished
                save_tree(target, getattr(own.trained, which))


def _numbers(settings: Settings) -> dict[str, Any]:
    """Settings as plain floats: what hedgers of this run go by."""
    return jax.tree.map(float, settings._asdict())


def _pnl_arrays(rows: dict[str, Row], paths: MarketPath, groups: Any) -> dict[str, np.ndarray]:
    first = next(iter(rows.values()))
    arrays = {
        "payoff": np.asarray(first.money.payoff),
        "final_spot": np.asarray(paths.spot)[:, -1],
        "group_id": np.asarray(groups),
    }
    for name, row in rows.items():
        for column in ("trading_gain", "trading_cost", "pnl"):
            arrays[f"{name}/{column}"] = np.asarray(getattr(row.money, column))
    return arrays


def _shown(
    rows: dict[str, Row], config: Config, source: Source
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What figures show of all methods on the first test path, and over spot at some times to maturity.

    Bands are a policy's own; over spot, of a simulated market, those that it has in effect if it has none.
    """
    n_steps, s = config.market.n_steps, source.market_settings
    path = jax.tree.map(lambda x: np.asarray(x)[0], source.test)
    if config.market.recorded:
        spot = None
    else:
        reach = 2.5 * float(s.volatility) * np.sqrt(n_steps * float(s.dt))
        spot = float(s.spot0) * np.exp(np.linspace(-reach, reach, 101))
    arguments = {name: row.params for name, row in rows.items()}, path, spot, source.test_settings
    positions = traces.compiled(
        partial(_positions, {name: row.policy for name, row in rows.items()}, n_steps),
        arguments,
        made_from=made_from("positions", config, source),
        compiler_options=options_for_seldom(),
    )
    along, over = on_host(positions(*arguments))
    sample_path = {"spot": path.spot, "time": np.arange(n_steps + 1) * config.market.years_per_step, **along}
    if spot is None:
        return sample_path, {}
    decisions = np.unique([min(1, n_steps - 1), n_steps // 2, 4 * n_steps // 5, n_steps - 1])
    at_decisions = {name: edge[decisions] for name, edge in over.items()}
    return sample_path, {"spot": spot, "decision": decisions, **at_decisions}


def _positions(
    policies: Mapping[str, Policy],
    n_steps: int,
    params: Mapping[str, Any],
    path: MarketPath,
    spot: Array | None,
    settings: Settings,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Hedge ratios, and bands where there are any, along a path; bands over spots; of all in one program."""
    sharing: dict[Policy, list[str]] = {}  # methods on one network are traced and compiled once
    for name, policy in policies.items():
        sharing.setdefault(policy, []).append(name)
    along: dict[str, Array] = {}
    over: dict[str, Array] = {}
    for policy, names in sharing.items():
        of_method = partial(_of_method, policy, path=path, spot=spot, settings=settings, n_steps=n_steps)
        every = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
        shown = jax.lax.map(of_method, (jnp.arange(len(names)), every))  # a rule's parameters have no length
        for arrays, of_group in zip((along, over), shown, strict=True):
            for i, name in enumerate(names):
                arrays |= {f"{name}/{kind}": array[i] for kind, array in of_group.items()}
    return along, over


def _of_method(
    policy: Policy,
    counted: tuple[Array, Any],
    *,
    path: MarketPath,
    spot: Array | None,
    settings: Settings,
    n_steps: int,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What `_positions` has of one method; counted: its number in its group, and its parameters."""
    _, params = counted
    if policy.band is None:
        along = {"hedge_ratio": policy.hedge_ratio(params, path, settings)}
    else:
        lower, upper = policy.band(params, path, settings)
        along = {"hedge_ratio": band_hedge(lower, upper), "band_lower": lower, "band_upper": upper}
    if spot is None:
        return along, {}
    lower, upper = effective_band(policy, params, spot, settings, n_steps)
    return along, {"band_lower": lower, "band_upper": upper}
