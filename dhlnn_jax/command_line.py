"""The command lines of run.py, report.py and sweep.py."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dhlnn_jax.errors import UsageError
from dhlnn_jax.script import config_first, exit_code, show_help

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
                               [--overwrite | --resume]

Trains every method of a TOML file (see configs/) at every value of an option, or at every point of a grid of
several, all in one program a method, and writes sweep.json and sweep.png.

  --over OPTION VALUE ...  what is swept, given once for each option: {options}
  --seeds N                hedgers of each trained method at each point, from seeds seed, seed + 1, ...
  --out FOLDER             default: that of the config, with _sweep at its end
  --overwrite              replace an earlier sweep in the same folder
  --resume                 go on with a sweep that was cut off, from its last checkpoints
  --section.key value      any other option of scripts/run.py (see its --help); evaluation.epochs is not used

example, figure 6 of the paper (not trading is optimal at all its costs):
  python scripts/sweep.py configs/paper_european.toml --contract.strike 1.2 \\
    --over cost.rate 2e-3 4e-3 6e-3 8e-3
"""


def main(command: str, arguments: Sequence[str]) -> int:
    """Runs a script's command; returns its exit code, that of `script.exit_code`."""
    commands = {"run": _run, "report": _report, "sweep": _sweep}
    rest = ", nothing was written" if command == "report" else "; --resume goes on from the last checkpoint"
    return exit_code(f"{command}.py", lambda: commands[command](list(arguments)), interrupted=rest)


def _run(arguments: list[str]) -> None:
    show_help(lambda: _run_help(arguments), arguments)
    flags, (path, *overrides) = _folder_flags(arguments)
    config_first(path, "run.py CONFIG [--section.key value ...]")
    several, overrides = _several(overrides)
    from dhlnn_jax import runtime
    from dhlnn_jax.config import load_config

    config = load_config(path, overrides)
    from dhlnn_jax import report
    from dhlnn_jax.experiment import run

    runtime.prepare(devices=config.training.devices)
    if several is not None:
        if flags["resume"]:
            raise UsageError("--resume is for one process; start the others anew, or resume without them")
        runtime.join(several[0], n_processes=several[1], process=several[2])
        if several[2] > 0:  # computes the same, keeps nothing
            with tempfile.TemporaryDirectory() as folder:
                run(config.model_copy(update={"out": folder}))
            return
    results = run(config, **flags)
    report.print_report(results)


def _folder_flags(arguments: list[str]) -> tuple[dict[str, bool], list[str]]:
    """What may be done with a folder that is there, and the other arguments, at least one."""
    flags = ("--overwrite", "--resume")
    given = {flag.removeprefix("--"): flag in arguments for flag in flags}
    if all(given.values()):
        raise UsageError("--overwrite starts anew and --resume goes on: give one of them")
    return given, [argument for argument in arguments if argument not in flags] or [""]


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


def _report(arguments: list[str]) -> None:
    show_help(lambda: _REPORT_USAGE, arguments)
    options = [argument for argument in arguments if argument.startswith("-")]
    if options:
        raise UsageError(f"{options[0]}: report.py takes results folders and no options; see --help")
    from dhlnn_jax import figures, report
    from dhlnn_jax.results import read_results

    for results in [read_results(folder) for folder in arguments]:
        figures.write_figures(results)
        report.print_report(results)


def _sweep(arguments: list[str]) -> None:
    from dhlnn_jax.fleet import TRACED_OPTIONS
    from dhlnn_jax.sweep import claim_sweep, finished_sweep, parse_over, sweep, write_sweep

    show_help(lambda: _SWEEP_USAGE.format(options=", ".join(TRACED_OPTIONS)), arguments)
    flags, (path, *rest) = _folder_flags(arguments)
    config_first(path, "sweep.py CONFIG --over OPTION VALUE ...")
    over, overrides = parse_over(rest)
    from dhlnn_jax import runtime
    from dhlnn_jax.config import load_config

    config = load_config(path, [*overrides, "--evaluation.epochs="])  # sweeps measure at the end only
    given = any(argument.split("=")[0] == "--out" for argument in overrides)
    folder = Path(config.out if given else f"{config.out}_sweep")
    checkpoints = claim_sweep(folder, **flags)
    from dhlnn_jax.sweep_report import print_sweep, write_figure

    results = finished_sweep(checkpoints, config, over) if flags["resume"] else None
    if results is None:
        runtime.prepare(devices=config.training.devices)
        results = sweep(config, over, checkpoint_folder=checkpoints)
        write_sweep(results, checkpoints)
    print_sweep(results)
    print(f"results: {folder / 'sweep.json'}\nfigure: {write_figure(results, folder)}")


def _run_help(arguments: list[str]) -> str:
    """The usage, and if anything was given every option with its unit."""
    if not arguments:
        return _RUN_USAGE
    import tyro

    from dhlnn_jax.config import Config, load_config

    configs = [argument for argument in arguments[:1] if not argument.startswith("-")]
    default: Any = load_config(configs[0]) if configs else Config()
    help_text = tyro.extras.get_parser(
        Config,
        prog="",
        description="Options, their units and their values" + (f" in {configs[0]}:" if configs else ":"),
        default=default,
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    ).format_help()
    return f"{_RUN_USAGE}\n{help_text[help_text.index('Options, their units') :]}\n"
