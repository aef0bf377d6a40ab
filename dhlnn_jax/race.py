"""Seconds of training until the regret to the exact optimum is small: ours, and the peers'."""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dhlnn_jax.config import Config, load_config
from dhlnn_jax.fitting import build_hedger
from dhlnn_jax.hedger import make_band_hedger
from dhlnn_jax.judge import Judge
from dhlnn_jax.processes import PEERS, LineProcess, peers_process
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.timing import spread
from dhlnn_jax.timing_report import print_rows
from dhlnn_jax.workload import METHOD, Answer, Params, compiled, make_workload, peers_problem


class _Reached(NamedTuple):
    """Training seconds until the target, infinite if it was not; [epochs, seconds, %, error] so far."""

    seconds: float
    curve: list[list[float]]


def _until(
    train: Callable[[int], float],
    percent: Callable[..., tuple[float, float]],
    *,
    target: float,
    every: int,
    seconds: float,
    epochs: int | None,
    advance: Callable[..., None] = lambda **_: None,
) -> _Reached:
    """Trains `every` epochs at a time until the regret is at the target, or seconds or epochs are spent."""
    spent, done, curve = 0.0, 0, []
    while True:
        n = every if epochs is None else min(every, epochs - done)
        spent, done = spent + train(n), done + n
        over = spent >= seconds or done == epochs
        regret, error = percent(whole=over)
        curve.append([done, spent, regret, error])
        advance(note=f"{regret:.3f} % after {done} epochs, {spent:.0f} s")
        if regret <= target or over:
            return _Reached(spent if regret <= target else float("inf"), curve)


def time_to_regret(options: argparse.Namespace) -> Answer:
    """Seconds of training until the regret is small; evaluation is off the clock."""
    config = load_config(options.config)
    judge = Judge(config, options.n_paths, options.target)
    limits: dict[str, Any] = {
        "target": options.target,
        "every": options.every,
        "seconds": options.seconds,
    }
    reached: dict[str, list[_Reached]] = {"ours": []}
    compile_seconds, differences = [], dict.fromkeys(PEERS, 0.0)
    with (
        peers_process(options.peers, options.peers_python) as process,
        progress_bar("training", None) as limits["advance"],
    ):
        for seed in range(options.repeats):
            ours, seconds = _ours_until(config, judge, seed, options, limits)
            reached["ours"].append(ours)
            compile_seconds.append(seconds)
            for name in PEERS if process is not None else ():
                assert process is not None
                peer, difference = _peer_until(process, name, config, judge, seed, limits)
                reached.setdefault(name, []).append(peer)
                differences[name] = max(differences[name], difference)
    answer: Answer = {}
    for name, runs in reached.items():
        compiling = compile_seconds if name == "ours" else [0.0] * len(runs)
        answer[name] = {
            **spread([run.seconds + c for run, c in zip(runs, compiling, strict=True)], "s"),
            "without_compile": spread([run.seconds for run in runs], "s"),
            "target_percent": options.target,
            "not_reached_in_s": [run.curve[-1][1] for run in runs if not np.isfinite(run.seconds)],
            "curves": {"columns": ["epoch", "seconds", "percent", "stderr"], "runs": [r.curve for r in runs]},
        }
    answer["ours"]["compile_seconds"] = spread(compile_seconds, "s")
    for name, row in list(answer.items())[1:]:
        row["pnl_difference"] = differences[name]
        if row["median"] and answer["ours"]["median"]:
            row["ratio_to_ours"] = row["median"] / answer["ours"]["median"]
    print_rows(answer)
    _print_race(answer)
    return answer


def _print_race(answer: Answer) -> None:
    """What the table of medians does not say, a line each, on stdout."""
    for name, row in answer.items():
        epochs, seconds, percent, error = row["curves"]["runs"][0][-1]
        outcome = "at the target" if percent <= row["target_percent"] else f"not reached in {seconds:.0f} s"
        alone = row["without_compile"]["median"]
        if name == "ours" and alone is not None:
            print(f"ours without compiling: {alone:.3g} s")
        print(f"{name}, first run: {percent:.3f} ± {error:.3f} % after {epochs} epochs, {outcome}")
        if "pnl_difference" in row:
            print(f"  its own PnL and ours of its network: at most {row['pnl_difference']:.1e} apart a path")


def _ours_until(
    config: Config, judge: Judge, seed: int, options: argparse.Namespace, limits: dict[str, Any]
) -> tuple[_Reached, float]:
    jax.clear_caches()
    began = time.perf_counter()
    work = make_workload(config, chunk=options.chunk, n_devices=options.devices)
    program = compiled(work)
    state = jax.block_until_ready(work.init(seed))
    compile_seconds = time.perf_counter() - began
    pnl, key = judge.evaluator(work.hedger), jax.random.fold_in(jax.random.key(seed), 1)

    def train(n: int) -> float:
        nonlocal state
        state, seconds = program.train(state, jax.random.fold_in(key, int(state.epoch)), n)
        return seconds

    def percent(whole: bool) -> tuple[float, float]:
        return judge.percent(partial(pnl, jax.device_put(state.params, jax.devices()[0])), whole=whole)

    return _until(train, percent, epochs=config.training.epochs, **limits), compile_seconds


def _peer_until(
    process: LineProcess, name: str, config: Config, judge: Judge, seed: int, limits: dict[str, Any]
) -> tuple[_Reached, float]:
    """What it reached, and the largest difference of its own PnL from ours of its network on some paths."""
    as_ours = name == "torch_loop"
    problem = peers_problem(config, as_ours=as_ours, seed=seed)
    process.ask(do="start", peer=name, problem=problem)
    if as_ours:
        hedger = build_hedger(METHOD, config)
    else:
        names = ("log_moneyness", "time_to_maturity", "volatility")
        hedger = make_band_hedger(features=names, hidden_sizes=problem["hidden_sizes"])
    pnl = judge.evaluator(hedger)
    with tempfile.TemporaryDirectory() as folder:
        weights, spot, money = (str(Path(folder) / f) for f in ("weights.npz", "spot.npy", "pnl.npy"))

        def params() -> Params:
            process.ask(do="save", peer=name, file=weights)
            with np.load(weights) as saved:
                return flax_params(dict(saved))

        def percent(whole: bool) -> tuple[float, float]:
            return judge.percent(partial(pnl, params()), whole=whole)

        reached = _until(
            lambda n: process.ask(do="train", peer=name, epochs=n)["seconds"],
            percent,
            epochs=config.training.epochs if as_ours else None,
            **limits,
        )
        some = np.asarray(judge.paths.spot[:10_000])
        np.save(spot, some)
        process.ask(do="pnl", peer=name, spot=spot, file=money)
        difference = np.abs(np.load(money) - pnl(params(), len(some))).max()
    return reached, float(difference)


def flax_params(arrays: dict[str, np.ndarray]) -> Params:
    """Parameters of `model.BandNetwork` from kernel_0, bias_0, kernel_1, ..."""
    layers = {
        f"Dense_{i}": {name: jnp.asarray(arrays[f"{name}_{i}"]) for name in ("kernel", "bias")}
        for i in range(len(arrays) // 2)
    }
    return {"params": {"Perceptron_0": layers}}
