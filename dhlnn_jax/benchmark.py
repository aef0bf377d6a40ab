"""How fast the library is: one question each, asked on the command line, with PyTorch peers beside it.

Times are medians of repeats that take turns, so that other load falls on all; their ratios are what counts.
The training step is measured in `step_time`, the rest in `race`, `tuned`, `clamp_time` and `gpu_program`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from dhlnn_jax import runtime
from dhlnn_jax.clamp_time import clamp
from dhlnn_jax.gpu_program import program
from dhlnn_jax.race import time_to_regret
from dhlnn_jax.script import Parser, exit_code, show_help
from dhlnn_jax.step_time import compile_time, memory, scaling, step, sweep
from dhlnn_jax.timing import add_answer, check_target, machine_report
from dhlnn_jax.tuned import GRIDS, tuned
from dhlnn_jax.workload import FORMS, METHOD, Answer

_BAND_METHODS = ("dhntb", "dhlnn", "dhlnn_newton")
_CONFIGS = Path(__file__).parents[1] / "configs"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return number


def _rows(text: str) -> int:
    return 0 if text == "0" else _positive(text)


QUESTIONS: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "step": step,
    "time-to-regret": time_to_regret,
    "tuned": tuned,
    "sweep": sweep,
    "clamp": clamp,
    "program": program,
    "scaling": scaling,
    "memory": memory,
    "compile": compile_time,
}


_WITH_REPEATS = {"step", "time-to-regret", "sweep", "clamp", "scaling", "memory", "compile"}
_WITH_CHUNK = {"step", "time-to-regret", "tuned", "sweep", "scaling", "memory", "compile"}
_WITH_DEVICES = {"step", "time-to-regret", "tuned", "memory", "compile"}
_N_PATHS = {"time-to-regret": 1_000_000, "tuned": 200_000, "sweep": 4000} | dict.fromkeys(
    ("step", "program", "scaling", "compile"), 10_000
)


def _parser() -> Parser:
    parser = Parser(prog="python scripts/benchmark.py", description="Measures speed, one question at a time.")
    questions = parser.add_subparsers(dest="question", required=True, metavar="QUESTION")
    add = {name: questions.add_parser(name, help=ask.__doc__).add_argument for name, ask in QUESTIONS.items()}
    for name, option in add.items():
        option("--json", type=Path, metavar="FILE", help="also write the numbers here, beside other answers")
        option("--overwrite", action="store_true", help="replace an earlier answer to this question in FILE")
        if name in _WITH_REPEATS:
            option("--repeats", type=_positive, default=3 if name in ("time-to-regret", "compile") else 7)
        if name in _WITH_CHUNK:
            option(
                "--chunk", type=_rows, metavar="ROWS", help="rows at a time, 0: all; default: as in training"
            )
        if name in _WITH_DEVICES:
            alone = {"default": 1, "help": "that share the paths (default: 1)"}
            shared = {"help": "that share the paths; default: as in training"}
            option("--devices", type=_positive, **(alone if name == "tuned" else shared))
        if name in _N_PATHS:
            option("--n-paths", type=_positive, default=_N_PATHS[name], help=f"default: {_N_PATHS[name]}")
        if name in ("step", "sweep", "scaling"):
            option("--steps", type=_positive, default=3, help="training steps a repeat (default: 3)")
        if name in ("step", "time-to-regret"):
            option("--peers", action="store_true", help="pfhedge and a PyTorch loop beside it (1 GB, once)")
            option("--peers-python", type=Path, metavar="PYTHON", help="that has torch and pfhedge already")
    option = add["step"]
    option("--trained", type=_positive, default=40, metavar="EPOCHS", help="before the second time")
    option("--method", choices=_BAND_METHODS, default=METHOD, help=f"default: {METHOD}")
    option("--hidden-sizes", type=_positive, nargs="+", metavar="UNITS", help="default: 64 64 64 64")
    option("--forms", choices=list(FORMS), nargs="+", help="of its rows, in turn; default: as in training")
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
