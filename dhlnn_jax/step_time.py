"""Seconds and bytes of the training step: one, of many hedgers, on several devices, by size, to compile.

PyTorch peers are timed beside one step. Compilation is never part of a step's time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dhlnn_jax.errors import UsageError
from dhlnn_jax.fitting import dense_operations, rows_options
from dhlnn_jax.piece_network import has_pieces
from dhlnn_jax.processes import PEERS, LineProcess, peers_process
from dhlnn_jax.settings import Settings
from dhlnn_jax.timing import (
    compile_clock,
    cores,
    interleaved,
    make_product_rate,
    ratio,
    spread,
)
from dhlnn_jax.timing_report import print_rows
from dhlnn_jax.train import TrainState
from dhlnn_jax.workload import (
    METHOD,
    Answer,
    Program,
    Workload,
    compiled,
    live_rows,
    make_workload,
    own_process,
    peers_problem,
    step_config,
)


class _Form(NamedTuple):
    """A step in one form of its rows, compiled.

    Attributes:
      states: by name, initial and trained ones. live_rows: at the parameters of each.
    """

    program: Program
    states: dict[str, TrainState]
    live_rows: dict[str, float]
    compile_seconds: float

    def seconds(self, state: str, n_steps: int) -> float:
        """A step, on average."""
        return self.program.train(self.states[state], jax.random.key(2), n_steps)[1] / n_steps


def step(options: argparse.Namespace) -> Answer:
    """Seconds of one training step, at initial and at trained parameters."""
    sizes = options.hidden_sizes or step_config(options.n_paths).model.hidden_sizes
    if options.peers and (options.hidden_sizes or options.method != METHOD):
        raise UsageError("--peers train the paper's network by Adam: leave --hidden-sizes and --method out")
    if options.forms and options.chunk is not None:
        raise UsageError("--chunk is by rows: leave --forms out")
    config = step_config(options.n_paths, hidden_sizes=sizes)
    forms = {
        "" if form is None else f", by {form}": _compiled_form(options, sizes, form)
        for form in options.forms or [None]
    }
    rate, n = make_product_rate(), options.steps
    with peers_process(options.peers, options.peers_python) as process:
        runs: dict[str, Callable[[], float]] = {
            state + name: partial(form.seconds, state, n)
            for name, form in forms.items()
            for state in form.states
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
    first = next(iter(forms))
    rows = {
        name: {
            **spread(seconds, "s"),
            "dense_gflops_per_s": spread([operations / s for s in seconds], "GFLOP/s")["median"],
            "share_of_product_rate": ratio([operations / s for s in seconds], products),
            "ratio_to_ours": ratio(seconds, samples["initial" + first]),
        }
        for name, seconds in samples.items()
    }
    labels = {"initial": "ours, initial parameters", "trained": f"ours, after {options.trained} epochs"}
    for name, form in forms.items():
        for state, share in form.live_rows.items():
            rows[state + name]["live_rows"] = share
    print_rows(
        {labels[state] + name: rows[state + name] for name, form in forms.items() for state in form.states}
        | {name: rows[name] for name in PEERS if name in rows}
    )
    print(
        f"dense network: {operations:.2f} GFLOP a gradient; products of 64 x 64 with 64 x 500 on all cores: "
        f"{spread(products, 'GFLOP/s')['median']:.0f} GFLOP/s at that time"
    )
    for name, form in forms.items():
        print(f"compiling the step{name} took {form.compile_seconds:.1f} s")
    by_form = {
        name.removeprefix(", "): {
            **rows["initial" + name],
            "trained": {"epochs": options.trained, **rows["trained" + name]},
            "compile_seconds": form.compile_seconds,
        }
        for name, form in forms.items()
    }
    ours = {
        **next(iter(by_form.values())),
        "method": options.method,
        "hidden_sizes": list(sizes),
        "product_rate": spread(products, "GFLOP/s"),
        "dense_gflop": operations,
        **(by_form if options.forms else {}),
    }
    return {"ours": ours, **{name: {**rows[name], "versions": versions} for name in PEERS if name in rows}}


def _compiled_form(options: argparse.Namespace, sizes: Sequence[int], form: str | None) -> _Form:
    config = step_config(options.n_paths, hidden_sizes=sizes, form=form)
    work = make_workload(config, method=options.method, chunk=options.chunk, n_devices=options.devices)
    if form == "pieces" and not _has_pieces(work, options.method):
        raise UsageError(
            f"--forms pieces: {options.method} with {options.n_paths} paths goes by rows all the same"
        )
    with compile_clock() as clock:
        program = compiled(work)
    first = work.init(0)
    trained, _ = program.train(first, jax.random.key(1), options.trained)
    states = {"initial": first, "trained": trained}
    shares = {name: live_rows(work, state.params) for name, state in states.items()}
    return _Form(program, states, shares, clock.seconds)


def _has_pieces(work: Workload, method: str) -> bool:
    paths, _ = work.sample(jax.random.key(0), work.config.training.n_paths, work.settings)
    by_pieces = rows_options(method, work.config, compiled_free=True)["by_pieces"]
    return by_pieces and has_pieces(work.hedger, paths, work.settings)


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
    answers: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for name, request in what.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    with own_process(options.devices, cache) as process:
                        answer = process.ask(**request)
                    answers.setdefault(f"{name}, {state}", []).append(answer)
    rows = {
        name: {
            **spread([answer["seconds"] for answer in each], "s"),
            "xla_seconds": spread([answer["xla_seconds"] for answer in each], "s")["median"],
            "programs_compiled": each[-1]["programs"],
        }
        for name, each in answers.items()
    }
    print_rows(rows)
    print("warm programs are fetched from the persistent cache, and counted all the same; the seconds that")
    print("XLA does not take are tracing and lowering by Python, saved for what a run keeps as traced")
    return {"ours": {**rows["quickstart, cold"], "by_program": rows}}
