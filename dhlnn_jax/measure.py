"""Measures the hedgers of a finished run on any number of fresh paths, in constant memory.

Block i of the paths is always the same `BLOCK_PATHS` plain draws with `fold_in(key, i)`, and what is computed
together is a whole number of blocks: the paths depend on the seed and not on the chunk, and the table only by
what a program for other shapes rounds differently in float32 (below a thousandth of a standard error at 3e5
paths). The key is `fold_in(jax.random.key(seed), 4)`; runs fold 0 to 3 into theirs (model, training,
validation, test), so that no seed brings back a path that a hedger was trained, chosen or measured on, while
runs measured with one seed see the same paths. Statistics are those of `streaming`, in float64; paths and
their money are float32 as in training, good to about 1e-7 of the spot.
"""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from dhlnn_jax import streaming
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import HedgedPaths, Regret, as_report, hedged_paths, regret_report
from dhlnn_jax.files import plain
from dhlnn_jax.fitting import make_contract
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import Results, machine, read_results
from dhlnn_jax.settings import Settings, make_settings
from dhlnn_jax.trained import TrainedHedger, load

BLOCK_PATHS = 10_000
_ROLE = 4
RISK = "entropic_risk_measure"

Params = Any
DrawMoney = Callable[[list[Params], PRNGKeyArray, Array, Settings, Settings], HedgedPaths]


def measure_run(
    folder: str | Path,
    methods: Sequence[str] = (),
    *,
    n_paths: int,
    seed: int = 1,
    chunk_paths: int = 100_000,
) -> dict[str, Any]:
    """Measures methods of a finished run on the same fresh paths of the market it was tested in.

    Args:
      methods: of the run, all if none are named; where the run has the exact optimum it comes first.
      n_paths: a multiple of `BLOCK_PATHS`. chunk_paths: paths at a time, likewise: a matter of
        memory, some 150 bytes a path and method.
    Returns: what `--json` writes: "methods" as in metrics.json, each with its "binning_error"; "paired",
      differences of the entropic risk. A method whose values the run has by quadrature (no hedge under
      geometric Brownian motion) is not simulated: its row is the run's.
    Raises: UsageError for a folder without a finished run, a recorded market, unknown methods, numbers of
      paths that are not whole blocks, or a seed out of range.
    """
    for name, number in (("n_paths", n_paths), ("chunk_paths", chunk_paths)):
        if number < BLOCK_PATHS or number % BLOCK_PATHS:
            raise UsageError(f"{name} must be a multiple of {BLOCK_PATHS}, got {number}")
    if not 0 <= seed < 2**31:
        raise UsageError(f"seed must be from 0 to 2147483647, got {seed}")
    began = time.perf_counter()
    results = read_results(folder)
    if results.config.market.recorded:
        raise UsageError(
            f"the market of {str(folder)!r} is recorded: there are no fresh paths to draw from it"
        )
    table = results.metrics["methods"]
    first = ("optimal",) if "optimum" in results.metrics else ()
    names = list(dict.fromkeys((*first, *(methods or table))))
    simulated = [name for name in names if name not in table or table[name]["estimator"] == "simulation"]
    if not simulated:
        raise UsageError(f"{', '.join(names)}: known exactly, see the table of {str(folder)!r}")
    hedgers = [load(folder, name) for name in simulated]
    summary = _stream(hedgers, results, n_paths, seed, chunk_paths)

    optimum = results.metrics.get("optimum")
    reports = {
        name: _method_report(summary, i, None if optimum is None else optimum["value"])
        for i, name in enumerate(simulated)
    }
    copied = ("final", "effective_sample_size", "estimator", "regret")
    for name in names:
        if name not in reports:
            reports[name] = {key: table[name][key] for key in copied if key in table[name]}
    return {
        "schema": 1,
        "results": str(folder),
        "n_paths": n_paths,
        "seed": seed,
        "methods": {name: reports[name] for name in names},
        "paired": _paired(summary, simulated),
        **({} if optimum is None else {"optimum": optimum}),
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": _peak_memory(),
        "machine": machine(),
    }


def _stream(
    hedgers: list[TrainedHedger], results: Results, n_paths: int, seed: int, chunk_paths: int
) -> streaming.Summary:
    config, settings = results.config, hedgers[0].settings
    market_settings = make_settings(n_steps=config.market.n_steps, **results.meta["market_settings"])
    if config.evaluation.volatility_seen == "refreshed":
        settings = settings._replace(volatility=market_settings.volatility)
    key = jax.random.fold_in(jax.random.key(seed), _ROLE)
    params = [hedger.params for hedger in hedgers]
    n_blocks = min(chunk_paths, n_paths) // BLOCK_PATHS
    draw_money = jax.jit(make_draw_money(hedgers))
    statistics, update = jax.jit(streaming.statistics), jax.jit(streaming.update)
    grid = total = None
    with progress_bar("measuring", n_paths) as advance:
        for start in range(0, n_paths, n_blocks * BLOCK_PATHS):
            blocks = start // BLOCK_PATHS + jnp.arange(n_blocks)
            money = draw_money(params, key, blocks, settings, market_settings)
            # The last chunk has blocks too many, so that there is one program; they are left out here.
            size = min(n_blocks * BLOCK_PATHS, n_paths - start)
            money = jax.tree.map(lambda x, size=size: x[:, :size], money)
            with jax.enable_x64(True):
                if grid is None or total is None:
                    # The first block alone decides on the bins, or they would depend on the chunk.
                    grid = streaming.make_grid(
                        jax.tree.map(lambda x: x[:, :BLOCK_PATHS], money),
                        risk_aversion=config.risk.risk_aversion,
                        tail_prob=config.risk.tail_prob,
                    )
                    total = statistics(money, grid)
                else:
                    total = update(total, money, grid)
                # Without waiting, chunks would queue up in memory.
                jax.block_until_ready(total)
            advance(size)
    assert grid is not None and total is not None
    return streaming.summary(total, grid)


def make_draw_money(hedgers: Sequence[TrainedHedger]) -> DrawMoney:
    """Money of all hedgers on the same fresh paths, a block at a time: one program for the whole table.

    Returns: `(params of each, key, blocks [n_blocks], settings, market_settings) -> money`, each array
      [n_hedgers, n_blocks * BLOCK_PATHS]; pure, the caller jits it.
    """
    config = hedgers[0].config
    sample = make_simulation_sampler(SIMULATORS[config.market.kind], n_steps=config.market.n_steps)
    contract = make_contract(config)
    # On a CPU the activations of a thousand paths stay in the cache; an accelerator wants them all at once.
    batch_size = 1_000 if jax.default_backend() == "cpu" else BLOCK_PATHS

    def draw_money(params, key, blocks, settings, market_settings):
        def block(i: Array) -> HedgedPaths:
            paths, _ = sample(jax.random.fold_in(key, i), BLOCK_PATHS, market_settings)
            each = [
                hedged_paths(hedger.policy, own, paths, contract, settings, batch_size=batch_size)
                for hedger, own in zip(hedgers, params, strict=True)
            ]
            return jax.tree.map(lambda *columns: jnp.stack(columns), *each)

        money = jax.lax.map(block, blocks)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).reshape(len(hedgers), -1), money)

    return draw_money


def _method_report(summary: streaming.Summary, i: int, optimum: float | None) -> dict[str, Any]:
    """One entry of "methods"; the first hedger is the optimum where there is one."""
    values, stderrs = (
        {name: x[i] for name, x in numbers.items()} for numbers in (summary.values, summary.stderrs)
    )
    report: dict[str, Any] = {
        "final": as_report(values, stderrs),
        "binning_error": {name: plain(x[i]) for name, x in summary.binning_errors.items()},
        "effective_sample_size": plain(summary.effective_sample_size[i]),
        "estimator": "simulation",
    }
    if optimum is not None:
        difference = jnp.asarray(values[RISK] - summary.values[RISK][0])
        report["regret"] = regret_report(
            Regret(difference, jnp.asarray(summary.paired_stderr[i, 0])), optimum
        )
    return report


def _paired(summary: streaming.Summary, names: Sequence[str]) -> dict[str, Any]:
    """Differences of the entropic risk of every two methods that were simulated."""
    risk = summary.values[RISK]
    return {
        f"{a}-{b}": as_report({RISK: risk[i] - risk[j]}, {RISK: summary.paired_stderr[i, j]})
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)
    }


def _peak_memory() -> int:
    """Most bytes that this process has had in memory."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
