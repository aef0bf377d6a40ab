"""What the scripts do with their arguments: results on stdout, progress and mistakes on stderr, exit codes.

0: done. 2: a mistake in what was given, in one line. 1: training failed, in one line. 130: interrupted.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dhlnn_jax.errors import UsageError

_RUN_USAGE = """usage: python scripts/run.py CONFIG [--section.key value ...] [--overwrite | --resume]

Trains every method of a TOML file (see configs/), measures all on the same test paths and writes a
results folder.

  --overwrite  replace an earlier run in the same folder
  --resume     go on with a run that was cut off, from its last checkpoints

Several processes that share the paths of every step, on one machine or many (same command, other --process):
  --coordinator HOST:PORT --processes N --process 0..N-1     only process 0 writes and prints results
"""
_REPORT_USAGE = """usage: python scripts/report.py RESULTS...

Prints the table and redraws the figures of each results folder, from its files alone.
"""


_SWEEP_USAGE = """usage: python scripts/sweep.py CONFIG --over OPTION VALUE ... [--section.key value ...]

Trains every method of a TOML file (see configs/) at every value of an option, or at every point of a grid of
several, all in one program a method, and writes sweep.json and sweep.png.

  --over OPTION VALUE ...  what is swept, given once for each option: {options}
  --seeds N                hedgers of each trained method at each point, from seeds seed, seed + 1, ...
  --out FOLDER             default: that of the config, with _sweep at its end
  --overwrite              replace an earlier sweep in the same folder
  --section.key value      any other option of scripts/run.py (see its --help); evaluation.epochs is not used

example, figure 6 of the paper (not trading is optimal at all its costs):
  python scripts/sweep.py configs/paper_european.toml --contract.strike 1.2 \\
    --over cost.rate 2e-3 4e-3 6e-3 8e-3
"""


def main(command: str, arguments: Sequence[str]) -> int:
    """Runs a script's command; returns its exit code."""
    commands = {"run": _run, "report": _report, "sweep": _sweep}
    try:
        return commands[command](list(arguments))
    except UsageError as error:
        print(f"{command}.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{command}.py: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"{command}.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        rest = "; --resume goes on from the last checkpoint" if command == "run" else ", nothing was written"
        print(f"{command}.py: interrupted{rest}", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or "-h" in arguments or "--help" in arguments:
        _print_run_help(arguments)
        return 0 if arguments else 2
    flags = {flag: flag in arguments for flag in ("--overwrite", "--resume")}
    path, *overrides = [argument for argument in arguments if argument not in flags] or [""]
    if not path or path.startswith("--"):
        raise UsageError("the config file comes first: run.py CONFIG [--section.key value ...]; see --help")
    if all(flags.values()):
        raise UsageError("--overwrite starts anew and --resume goes on: give one of them")
    several, overrides = _several(overrides)
    from dhlnn_jax import runtime
    from dhlnn_jax.config import load_config

    config = load_config(path, overrides)
    from dhlnn_jax import report
    from dhlnn_jax.experiment import run

    runtime.prepare(devices=config.training.devices)
    if several is not None:
        if flags["--resume"]:
            raise UsageError("--resume is for one process; start the others anew, or resume without them")
        runtime.join(several[0], n_processes=several[1], process=several[2])
        if several[2] > 0:  # computes the same, keeps nothing
            with tempfile.TemporaryDirectory() as folder:
                run(config.model_copy(update={"out": folder}))
            return 0
    results = run(config, overwrite=flags["--overwrite"], resume=flags["--resume"])
    report.print_report(results)
    return 0


def _several(arguments: list[str]) -> tuple[tuple[str, int, int] | None, list[str]]:
    """(coordinator, processes, process) if this is one of several processes, and the other arguments."""
    given, rest = {}, list(arguments)
    for flag in ("--coordinator", "--processes", "--process"):
        if flag in rest:
            at = rest.index(flag)
            given[flag] = rest[at + 1 : at + 2]
            del rest[at : at + 2]
    if not given:
        return None, rest
    try:
        (coordinator,), (processes,), (process,) = given.values()
        return (coordinator, int(processes), int(process)), rest
    except ValueError:
        raise UsageError("several processes need --coordinator HOST:PORT --processes N --process I") from None


def _report(arguments: list[str]) -> int:
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(_REPORT_USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    from dhlnn_jax import report
    from dhlnn_jax.results import read_results

    for results in [read_results(folder) for folder in arguments]:
        report.write_figures(results)
        report.print_report(results)
    return 0


def _sweep(arguments: list[str]) -> int:
    from dhlnn_jax.sweep import OPTIONS, claim_sweep, parse_over, sweep, write_sweep

    if not arguments or "-h" in arguments or "--help" in arguments:
        usage = _SWEEP_USAGE.format(options=", ".join(OPTIONS))
        print(usage, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    overwrite = "--overwrite" in arguments
    path, *rest = [argument for argument in arguments if argument != "--overwrite"] or [""]
    if not path or path.startswith("--"):
        raise UsageError("the config file comes first: sweep.py CONFIG --over OPTION VALUE ...; see --help")
    over, overrides = parse_over(rest)
    from dhlnn_jax import runtime
    from dhlnn_jax.config import load_config

    config = load_config(path, [*overrides, "--evaluation.epochs="])  # sweeps measure at the end only
    given = any(argument.split("=")[0] == "--out" for argument in overrides)
    folder = Path(config.out if given else f"{config.out}_sweep")
    claim_sweep(folder, overwrite=overwrite)
    from dhlnn_jax.sweep_report import print_sweep, write_figure

    runtime.prepare(devices=config.training.devices)
    results = sweep(config, over)
    written = write_sweep(results, folder)
    print_sweep(results)
    print(f"results: {written}\nfigure: {write_figure(results, folder)}")
    return 0


def _print_run_help(arguments: list[str]) -> None:
    """The usage on stderr if nothing was given; else every option with its unit, on stdout."""
    if not arguments:
        print(_RUN_USAGE, end="", file=sys.stderr)
        return
    import tyro

    from dhlnn_jax.config import Config, load_config

    configs = [argument for argument in arguments[:1] if not argument.startswith("-")]
    default: Any = load_config(configs[0]) if configs else Config()
    print(_RUN_USAGE)
    help_text = tyro.extras.get_parser(
        Config,
        prog="",
        description="Options, their units and their values" + (f" in {configs[0]}:" if configs else ":"),
        default=default,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    ).format_help()
    print(help_text[help_text.index("Options, their units") :])
