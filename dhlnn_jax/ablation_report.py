"""The ablation's command line, its tables and its results folder.

ablation.json holds everything, see `ablation_study.run_study`; ablation_*.png are drawn from it.
"""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dhlnn_jax import resumable
from dhlnn_jax.ablation import STUDIES
from dhlnn_jax.ablation_figures import diverged, draw, value_label
from dhlnn_jax.ablation_study import SCHEMA, Asked, run_study
from dhlnn_jax.config import load_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import read_json, write_json
from dhlnn_jax.notes import ONE_WAY
from dhlnn_jax.script import Parser, config_first, config_line, exit_code

Results = dict[str, Any]

_FILE = "ablation.json"
_COUNTS = ("epochs", "paths", "gradients", "forward", "jvp", "vjp")
_SECONDS = ("seconds", "cpu_seconds")


def print_ablation(results: Results) -> None:
    """Two tables on stdout: what each variant spent and reached, and paired differences at equal budgets."""
    from rich.table import Table

    from dhlnn_jax.tables import print_table

    what = value_label(results)
    table = Table(title=f"{what}: mean ± s.e. over test paths ± s.e. over seeds", title_justify="left")
    table.add_column("variant", no_wrap=True)
    for heading in (*_COUNTS, "seconds", "CPU s", "compile s", "value", "median (lowest, highest)"):
        table.add_column(heading, justify="right")
    for variant in results["variants"].values():
        last = variant["points"][-1]
        table.add_row(
            variant["label"],
            *(f"{last[count]:,.0f}" for count in _COUNTS),
            *(f"{last[clock]:.2f}" for clock in _SECONDS),
            f"{variant['compile_seconds']:.1f}",
            _last_value(results, last),
            _range(results, last["value"]),
        )
    print_table(table)

    budgets = ("epochs", "gradients", results["clock"])
    names = ("epochs", "gradients", results["clock"].replace("_", " "))
    paired = Table(
        title="less that of DHLNN, same paths and seeds: difference ± s.e. over paths ± s.e. over seeds, "
        "seeds where it is lower (epochs of the variant / of DHLNN)",
        title_justify="left",
    )
    paired.add_column("variant", no_wrap=True)
    for name in names:
        paired.add_column(f"at equal {name}", justify="right")
    for name, row in results["paired"].items():
        paired.add_row(
            results["variants"][name]["label"], *(_difference(results, row[budget]) for budget in budgets)
        )
    print_table(paired)
    epochs = next(iter(results["variants"].values()))["points"][-1]["epochs"]
    if results["optimum"] is not None:
        print(f"exact optimum of the entropic risk: {results['optimum']['value']:.7f}")
    print(
        f"{len(results['seeds'])} seeds, {results['config']['evaluation']['n_paths']:,} test paths; counts "
        "and seconds are those of one seed; gradients, forward, jvp and vjp are passes over a batch"
    )
    if not results["finished"]:
        print(f"note: not finished, measured to epoch {epochs}", file=sys.stderr)


def _last_value(results: Results, point: dict[str, Any]) -> str:
    values, n_seeds = point["value"], len(results["seeds"])
    if wrong := diverged(results, values):
        return f"diverges in {wrong} of {n_seeds} seeds"
    mean = sum(values) / n_seeds
    cell = _with_errors(results, mean, point["stderr_paths"], _spread_of_mean(values))
    if still := sum(x == 0 for x in point["turnover"]):
        cell += f" ({still} of {n_seeds} never trade)"
    if one_way := _n_one_way(results, point):
        cell += f" ({one_way} of {n_seeds} trade one way only)"
    return cell


def _n_one_way(results: Results, point: dict[str, Any]) -> int:
    """Seeds that hardly turn back where the optimum does: one edge of their band is out of reach."""
    if results["optimum"] is None:
        return 0
    least = ONE_WAY * results["optimum"]["round_trip"]
    pairs = zip(point["turnover"], point["round_trip"], strict=True)
    return sum(traded != 0 and turned_back < least for traded, turned_back in pairs)


def _range(results: Results, values: list[float | None]) -> str:
    found = sorted(x for x in values if x is not None)
    if not found:
        return "–"
    decimals = _decimals(results)
    middle = statistics.median(_ranked(values))
    highest = f"{found[-1]:.{decimals}f}" if len(found) == len(values) else "not finite"
    return f"{middle:.{decimals}f} ({found[0]:.{decimals}f}, {highest})"


def _ranked(values: list[float | None]) -> list[float]:
    """What is not finite counts as worse than anything."""
    return [float("inf") if x is None else x for x in values]


def _difference(results: Results, row: dict[str, Any]) -> str:
    at = f"({row['at'][0]} / {row['at'][1]})"
    if wrong := diverged(results, row["by_seed"]):
        return f"diverges in {wrong} of {len(row['by_seed'])} seeds {at}"
    lower = sum(x < 0 for x in row["by_seed"])
    cell = _with_errors(results, row["value"], row["stderr_paths"], row["stderr_seeds"], "+")
    return f"{cell}, {lower}/{len(row['by_seed'])} {at}"


def _with_errors(
    results: Results, value: float, paths: float | None, seeds: float | None, sign: str = ""
) -> str:
    decimals = _decimals(results)
    errors = " ".join("± ?" if x is None else f"± {x:.{decimals}f}" for x in (paths, seeds))
    return f"{value:{sign}.{decimals}f} {errors}"


def _decimals(results: Results) -> int:
    return 3 if results["unit"] == "percent" else 6


def _spread_of_mean(values: list[float]) -> float | None:
    """Standard error of the mean over seeds."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    return (sum((x - mean) ** 2 for x in values) / (n - 1) / n) ** 0.5


def read_ablation(folder: Path) -> Results:
    """Contents of a folder's ablation.json. Raises: UsageError if there is none that can be read."""
    path = folder / _FILE
    if not path.exists():
        raise UsageError(f"{str(folder)!r} holds no ablation: {_FILE} is missing")
    results = read_json(path)
    if results.get("schema") != SCHEMA:
        raise UsageError(f"{path}: was not written by an ablation of this version")
    return results


def _parser() -> Parser:
    parser = Parser(
        prog="python scripts/ablation.py",
        usage="python scripts/ablation.py CONFIG [options] [--section.key value ...] | --report FOLDER",
        description="Trains variants of nested training and their controls from the same seeds, measures all "
        "on the same test paths, and compares them at equal epochs, gradients and seconds. The options of a "
        "run lie over CONFIG as in scripts/run.py; --out defaults to results/ablation_STUDY.",
    )
    parser.add_argument(
        "--study",
        default="optimizers",
        choices=STUDIES,
        help="optimizers: variants and controls (default); noise: few to many paths an epoch; data: the same "
        "few paths every epoch, and noisy prices",
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, 1 to 100 (default: 5)")
    parser.add_argument("--rows", nargs="+", default=(), metavar="ROW", help="only these, and dhlnn")
    parser.add_argument("--paths", nargs="+", type=int, default=(), help="sizes of noise and data")
    parser.add_argument(
        "--hedger", default="dhntb", choices=("dhntb", "dhmlp"), help="whose network (default: dhntb)"
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--overwrite", action="store_true", help="replace an earlier ablation in the folder")
    folder.add_argument("--resume", action="store_true", help="go on with one that was cut off")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="print and redraw an earlier ablation")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the script; returns its exit code, that of `script.exit_code`."""
    interrupted = f"; --resume goes on, and --report shows what is in {_FILE} by now, if anything"
    return exit_code("ablation.py", lambda: _run(arguments), interrupted=interrupted)


def _run(arguments: Sequence[str]) -> None:
    path, options, overrides = config_line(_parser(), arguments)
    if options.report is not None:
        _show(read_ablation(options.report), options.report)
        return
    if not any(flag.partition("=")[0] == "--out" for flag in overrides):
        overrides += ["--out", f"results/ablation_{options.study}"]
    config = load_config(config_first(path, "ablation.py CONFIG [--seeds 5] ..."), overrides)
    folder = Path(config.out)
    checkpoints = resumable.claim(folder, _FILE, overwrite=options.overwrite, resume=options.resume)
    asked = Asked(options.study, config, options.seeds, options.hedger, options.paths, options.rows)
    if options.resume:
        done = resumable.finished(checkpoints, _FILE, asked.told)
        if done is not None:
            _show(done, folder)
            return
    results: Results = {}
    for results in run_study(asked, checkpoint_folder=checkpoints):
        for figure in folder.glob("ablation_*.png"):
            figure.unlink()  # of what is overwritten, or of fewer epochs
        write_json(folder / _FILE, results)
    resumable.discard(checkpoints)  # a finished study is not resumed
    _show(results, folder)


def _show(results: Results, folder: Path) -> None:
    print_ablation(results)
    print(f"results: {folder / _FILE}")
    for figure in draw(results, folder):
        print(f"figure: {figure}")
