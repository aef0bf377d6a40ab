"""How fast the library is: one question each about the training step, with PyTorch peers beside it.

Times are medians of repeats that take turns, so that other load falls on all; their ratios are what counts.
Compilation is never part of a step's time. The measuring itself is in `timing`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dhlnn_jax import runtime
from dhlnn_jax.clamp_time import clamp
from dhlnn_jax.errors import UsageError
from dhlnn_jax.race import print_race, time_to_regret
from dhlnn_jax.script import Parser, exit_code, show_help
from dhlnn_jax.settings import Settings
from dhlnn_jax.timing import (
    PEERS,
    LineProcess,
    add_answer,
    check_target,
    compile_clock,
    cores,
    interleaved,
    machine_report,
    make_product_rate,
    peers_process,
    ratio,
    spread,
)
from dhlnn_jax.tuned import GRIDS, tuned
from dhlnn_jax.tuned_report import print_tuned
from dhlnn_jax.workload import (
    Answer,
    compiled,
    dense_operations,
    live_rows,
    make_workload,
    own_process,
    peers_problem,
    step_config,
)

_CONFIGS = Path(__file__).parents[1] / "configs"


def step(options: argparse.Namespace) -> Answer:
    """Seconds of one training step, at initial and at trained parameters."""
    config = step_config(options.n_paths)
    work = make_workload(config, chunk=options.chunk, n_devices=options.devices)
    with compile_clock() as clock:
        program = compiled(work)
    first = work.init(0)
    trained, _ = program.train(first, jax.random.key(1), options.trained)
    shares = {"initial": live_rows(work, first.params), "trained": live_rows(work, trained.params)}
    rate, n, key = make_product_rate(), options.steps, jax.random.key(2)
    with peers_process(options.peers, options.peers_python) as process:
        runs: dict[str, Callable[[], float]] = {
            "initial": lambda: program.train(first, key, n)[1] / n,
            "trained": lambda: program.train(trained, key, n)[1] / n,
        }
        if process is not None:
            problem = peers_problem(config, as_ours=False)
            for name in PEERS:
                process.ask(do="start", peer=name, problem=problem)
                runs[name] = partial(_peer_seconds, process, name, n)
        samples = interleaved({**runs, "products": rate}, options.repeats)
        versions = None if process is None else process.ask(do="versions")
    products = samples.pop("products")
    operations = dense_operations(config) / 1e9
    rows = {
        name: {
            **spread(seconds, "s"),
            "dense_gflops_per_s": spread([operations / s for s in seconds], "GFLOP/s")["median"],
            "share_of_product_rate": ratio([operations / s for s in seconds], products),
            "ratio_to_ours": ratio(seconds, samples["initial"]),
        }
        for name, seconds in samples.items()
    }
    for name, share in shares.items():
        rows[name]["live_rows"] = share
    print_rows(
        {
            "ours, initial parameters": rows["initial"],
            f"ours, after {options.trained} epochs": rows["trained"],
            **{name: rows[name] for name in PEERS if name in rows},
        }
    )
    print(
        f"dense network: {operations:.2f} GFLOP a step; products of 64 x 64 with 64 x 500 on all cores: "
        f"{spread(products, 'GFLOP/s')['median']:.0f} GFLOP/s at that time"
    )
    print(f"compiling the step took {clock.seconds:.1f} s")
    ours = {
        **rows["initial"],
        "trained": {"epochs": options.trained, **rows["trained"]},
        "compile_seconds": clock.seconds,
        "product_rate": spread(products, "GFLOP/s"),
        "dense_gflop": operations,
    }
    return {"ours": ours, **{name: {**rows[name], "versions": versions} for name in PEERS if name in rows}}


def _peer_seconds(process: LineProcess, name: str, n_steps: int) -> float:
    return process.ask(do="train", peer=name, epochs=n_steps)["seconds"] / n_steps


def sweep(options: argparse.Namespace) -> Answer:
    """Seconds an epoch of several hedgers (seeds and cost rates), in one program and one after another."""
    work = make_workload(step_config(options.n_paths), chunk=options.chunk, n_devices=1)
    n_members, n = options.members, options.steps
    costs = jnp.linspace(1e-3, 5e-3, n_members)
    states = [work.init(seed) for seed in range(n_members)]
    keys = jax.random.split(jax.random.key(1), (n, n_members))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    only_cost: Any = Settings(**{**dict.fromkeys(Settings._fields), "cost_rate": 0})  # type: ignore[arg-type]
    together = jax.vmap(work.step, in_axes=(0, 0, only_cost))
    many, first_keys, first_key = work.settings._replace(cost_rate=costs), keys[0], keys[0, 0]
    with compile_clock() as clock_together:
        all_at_once = jax.jit(together).lower(stacked, first_keys, many).compile()
    with compile_clock() as clock_alone:
        alone = jax.jit(work.step).lower(states[0], first_key, work.settings).compile()

    def run_together() -> float:
        state, began = stacked, time.perf_counter()
        for i in range(n):
            state, _ = all_at_once(state, keys[i], many)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / n

    def run_alone() -> float:
        began = time.perf_counter()
        for member, state in enumerate(states):
            settings = work.settings._replace(cost_rate=costs[member])
            for i in range(n):
                state, _ = alone(state, keys[i, member], settings)
            jax.block_until_ready(state)
        return (time.perf_counter() - began) / n

    samples = interleaved({"together": run_together, "alone": run_alone}, options.repeats)
    rows = {
        name: {
            **spread(samples[name], "s"),
            "compile_seconds": clock.seconds,
            "programs_compiled": clock.programs,
            "ratio_to_ours": ratio(samples[name], samples["together"]),
        }
        for name, clock in (("together", clock_together), ("alone", clock_alone))
    }
    print_rows(
        {f"{n_members} in one program": rows["together"], f"{n_members} one after another": rows["alone"]}
    )
    print("one after another shares a compiled step too: settings are arguments of it, not constants in it")
    return {"ours": {**rows["together"], "members": n_members, "one_after_another": rows["alone"]}}


def scaling(options: argparse.Namespace) -> Answer:
    """Seconds of one step on several host devices: the same paths for all, and as many paths for each."""
    for count in options.counts:
        if count < 1 or options.n_paths % count:
            raise UsageError(f"--counts: {options.n_paths} paths cannot be shared evenly by {count} devices")
    answers: dict[str, dict[int, dict[str, Any]]] = {}
    for kind in ("strong", "weak"):
        processes = {count: own_process(count) for count in options.counts}
        try:
            for count, process in processes.items():
                n_paths = options.n_paths * (count if kind == "weak" else 1)
                config = step_config(n_paths).model_dump(mode="json")
                process.ask(do="compile", config=config, chunk=options.chunk, n_devices=count)
            runs = {
                str(count): partial(_step_seconds, process, options.steps)
                for count, process in processes.items()
            }
            samples = interleaved(runs, options.repeats)
        finally:
            for process in processes.values():
                process.close()
        fewest = str(options.counts[0])
        answers[kind] = {
            int(count): {**spread(seconds, "s"), "ratio_to_fewest": ratio(seconds, samples[fewest])}
            for count, seconds in samples.items()
        }
    print_rows(
        {f"{kind}, devices: {count}": row for kind, rows in answers.items() for count, row in rows.items()}
    )
    print(
        f"{cores()} cores: host devices beyond them can gain nothing; weak: {options.n_paths} paths a device"
    )
    return {"ours": {**answers["strong"][options.counts[-1]], **answers}}


def _step_seconds(process: LineProcess, n_steps: int) -> float:
    return process.ask(do="train", n_steps=n_steps)["seconds"] / n_steps


def memory(options: argparse.Namespace) -> Answer:
    """Bytes of one step by number of paths: what XLA plans, and what the process then takes."""
    rows = {}
    for n_paths in options.sizes:
        with own_process(options.devices) as process:
            config = step_config(n_paths).model_dump(mode="json")
            process.ask(do="compile", config=config, chunk=options.chunk, n_devices=options.devices)
            plan = process.ask(do="memory")
        planned = plan["temporaries"] + plan["outputs"]
        rows[n_paths] = {**spread([planned / 2**20], "MiB"), **{k: v / 2**20 for k, v in plan.items()}}
    print_rows({f"{n_paths} paths": row for n_paths, row in rows.items()})
    print("MiB: XLA's temporaries and outputs of one step; resident: peak of the process after two steps")
    return {"ours": {**rows[options.sizes[-1]], "by_n_paths": rows}}


def compile_time(options: argparse.Namespace) -> Answer:
    """Seconds to compile in a fresh process: persistent cache empty (cold) and filled (warm)."""
    what = {
        "step": {"do": "compile", "config": step_config(options.n_paths).model_dump(mode="json")}
        | {"chunk": options.chunk, "n_devices": options.devices},
        "quickstart": {"do": "quickstart", "file": str(options.config)},
    }
    times: dict[str, list[float]] = {}
    programs: dict[str, int] = {}
    for _ in range(options.repeats):
        for name, request in what.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    with own_process(options.devices, cache) as process:
                        answer = process.ask(**request)
                    times.setdefault(f"{name}, {state}", []).append(answer["seconds"])
                    programs[f"{name}, {state}"] = answer["programs"]
    rows = {name: {**spread(t, "s"), "programs_compiled": programs[name]} for name, t in times.items()}
    print_rows(rows)
    print("warm programs are fetched from the persistent cache, and counted all the same")
    return {"ours": {**rows["quickstart, cold"], "by_program": rows}}


def print_rows(rows: dict[str, dict[str, Any]]) -> None:
    """Median, minimum and maximum of each row, and its further numbers, on stdout."""
    further = {
        "ratio_to_ours": "x ours",
        "ratio_to_scan": "x the scan",
        "ratio_to_fewest": "x fewest",
        "live_rows": "of rows live",
    }
    further |= {"share_of_product_rate": "of product rate", "programs_compiled": "programs"}
    further |= {"compile_seconds": "s to compile", "resident": "MiB resident"}
    print(f"{'':32}{'median':>11}{'min':>11}{'max':>11}")
    for name, row in rows.items():
        numbers = (row[key] for key in ("median", "min", "max"))
        cells = "".join(f"{'never':>11}" if x is None else f"{x:11.4g}" for x in numbers)
        plain = {key: row[key] for key in further if isinstance(row.get(key), int | float)}
        notes = "; ".join(f"{x:.3g} {further[key]}" for key, x in plain.items())
        print(f"{name:32}{cells} {row['unit']:4} {notes}".rstrip())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return number


def _race(options: argparse.Namespace) -> Answer:
    """Seconds of training until the regret is small; evaluation is off the clock."""
    answer = time_to_regret(options)
    print_rows(answer)
    print_race(answer)
    return answer


def _clamp(options: argparse.Namespace) -> Answer:
    """Seconds of the band's recursion and of its gradient, scan and parallel, by horizon."""
    answer = clamp(options)
    print_rows(answer["ours"]["by_horizon"])
    return answer


def _tuned(options: argparse.Namespace) -> Answer:
    """Seconds to a small regret, each method at the best of its grid; evaluation is off the clock."""
    answer = tuned(options)
    print_tuned(answer)
    return answer


def _rows(text: str) -> int:
    return 0 if text == "0" else _positive(text)


QUESTIONS: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "step": step,
    "time-to-regret": _race,
    "tuned": _tuned,
    "sweep": sweep,
    "clamp": _clamp,
    "scaling": scaling,
    "memory": memory,
    "compile": compile_time,
}


def _parser() -> Parser:
    parser = Parser(prog="python scripts/benchmark.py", description="Measures speed, one question at a time.")
    questions = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    add = {name: questions.add_parser(name, help=ask.__doc__).add_argument for name, ask in QUESTIONS.items()}
    for name, option in add.items():
        option("--json", type=Path, metavar="FILE", help="also write the numbers here, beside other answers")
        option("--overwrite", action="store_true", help="replace an earlier answer to this question in FILE")
        if name != "tuned":
            option("--repeats", type=_positive, default=3 if name in ("time-to-regret", "compile") else 7)
        if name != "clamp":
            option(
                "--chunk", type=_rows, metavar="ROWS", help="rows at a time, 0: all; default: as in training"
            )
        if name not in ("scaling", "sweep", "clamp"):
            alone = {"default": 1, "help": "that share the paths (default: 1)"}
            shared = {"help": "that share the paths; default: as in training"}
            option("--devices", type=_positive, **(alone if name == "tuned" else shared))
        if name not in ("memory", "clamp"):
            paths = {"time-to-regret": 1_000_000, "tuned": 200_000, "sweep": 4000}.get(name, 10_000)
            option("--n-paths", type=_positive, default=paths, help=f"default: {paths}")
        if name in ("step", "sweep", "scaling"):
            option("--steps", type=_positive, default=3, help="training steps a repeat (default: 3)")
        if name in ("step", "time-to-regret"):
            option("--peers", action="store_true", help="pfhedge and a PyTorch loop beside it (1 GB, once)")
            option("--peers-python", type=Path, metavar="PYTHON", help="that has torch and pfhedge already")
    add["step"]("--trained", type=_positive, default=40, metavar="EPOCHS", help="before the second time")
    for name in ("time-to-regret", "tuned"):
        option = add[name]
        option("--config", type=Path, default=_CONFIGS / "benchmark_european.toml", help="of our recipe")
        option("--target", type=float, default=0.1, help="percent of the exact optimum (default: 0.1)")
    option = add["time-to-regret"]
    option("--seconds", type=float, default=60.0, help="of training, then it is not reached (default: 60)")
    option("--every", type=_positive, default=10, help="epochs between two evaluations (default: 10)")
    option = add["tuned"]
    option("--seeds", type=_positive, default=5, help="trainings of every point of a grid (default: 5)")
    option("--seed", type=int, default=0, help="the first of them, and of the test paths (default: 0)")
    option("--looks", type=_positive, default=10, help="at the regret, evenly over a training (default: 10)")
    option("--methods", nargs="+", choices=list(GRIDS), default=list(GRIDS), help="default: all")
    option("--batch", type=_positive, nargs="+", metavar="PATHS", help="paths an epoch; default: the grid's")
    option("--rates", type=float, nargs="+", metavar="RATE", help="learning rates; default: the grid's")
    option("--epochs", type=_positive, nargs="+", help="of a training; default: the grid's")
    add["sweep"]("--members", type=_positive, default=8, help="hedgers (default: 8)")
    option = add["clamp"]
    option("--horizons", type=_positive, nargs="+", default=[30, 1_000, 10_000], help="steps of a path")
    add["scaling"]("--counts", type=_positive, nargs="+", default=[1, 2, 4], help="of host devices")
    add["memory"]("--sizes", type=_positive, nargs="+", default=[2500, 10_000, 40_000], help="paths")
    add["compile"]("--config", type=Path, default=_CONFIGS / "quickstart.toml", help="whose programs")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the script; returns its exit code, that of `script.exit_code`."""
    return exit_code("benchmark.py", lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    parser = _parser()
    show_help(parser.format_help, arguments[:1])  # after a question, its own
    options = parser.parse_args(arguments)
    check_target(options.json, options.question, overwrite=options.overwrite)
    runtime.prepare(devices=getattr(options, "devices", None))
    jax.config.update("jax_enable_compilation_cache", False)  # what compiling costs is measured, not saved
    machine = machine_report()
    print(", ".join(f"{k}: {v}" for k, v in machine.items() if k != "versions"))
    print(", ".join(f"{k} {v}" for k, v in machine["versions"].items()))
    if machine["load"] and machine["load"][0] > 0.5:
        print("others use this machine: their load slows PyTorch's spinning threads most, repeat it alone")
    answer = QUESTIONS[options.question](options)
    answer["ours"]["machine"] = machine | {"load_after": machine_report()["load"]}
    if options.json is not None:
        add_answer(options.json, options.question, answer)
        print(f"numbers: {options.json}")
