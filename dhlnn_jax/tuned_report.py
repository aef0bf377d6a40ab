"""What trainings of a grid say: seconds to the target by seed, each method's best point, their ratios."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from dhlnn_jax.files import plain

Curve = Sequence[Sequence[float | int]]  # rows of epochs done, wall seconds, CPU seconds, percent, error
Row = dict[str, Any]


def seconds_to(curve: Curve, target: float) -> tuple[float, float]:
    """Wall and CPU seconds of the first look at or below the target; infinite if there is none."""
    for _, wall, cpu, percent, _ in curve:
        if percent <= target:
            return wall, cpu
    return math.inf, math.inf


def reached(curve: Curve, target: float) -> bool:
    return any(row[3] <= target for row in curve)


def summary(curves: Sequence[Curve], target: float, n_seeds: int) -> Row:
    """Of one point over its seeds; a number that is not finite is None.

    Args:
      curves: of the seeds that were trained, of n_seeds; the rest are taken not to reach the target.
    Returns: `end_percent` and `end_stderr` (over seeds) of the regret at the end, and `end_paired_stderr`,
      the largest error that one seed's has from the test paths; `wall` and `cpu` seconds to the target: mean,
      median, by seed; `seconds`: mean wall seconds of the whole training; `n_reached` of
      the `n_trained` seeds.
    """
    ends = [curve[-1] for curve in curves]
    regrets = [end[3] for end in ends]
    spread = statistics.stdev(regrets) / math.sqrt(len(regrets)) if len(regrets) > 1 else math.nan
    seconds = [seconds_to(curve, target) for curve in curves]
    seconds += [(math.inf, math.inf)] * (n_seeds - len(curves))
    return {
        "end_percent": plain(statistics.fmean(regrets)),
        "end_stderr": plain(spread),
        "end_paired_stderr": plain(max(end[4] for end in ends)),
        "n_trained": len(curves),
        "n_reached": sum(math.isfinite(wall) for wall, _ in seconds),
        "wall": _of_seeds([wall for wall, _ in seconds]),
        "cpu": _of_seeds([cpu for _, cpu in seconds]),
        "seconds": statistics.fmean(end[1] for end in ends),
        "curves": [[[plain(x) for x in row] for row in curve] for curve in curves],
    }


def _of_seeds(seconds: Sequence[float]) -> Row:
    """The mean is None if any seed did not reach the target, the median if half of them did not."""
    return {
        "mean": plain(statistics.fmean(seconds)),
        "median": plain(statistics.median(seconds)),
        "by_seed": [plain(x) for x in seconds],
    }


def best_points(rows: Sequence[Row]) -> dict[str, Row | None]:
    """By method the row with the smallest mean wall seconds; None where none reached it with all seeds."""
    best: dict[str, Row | None] = {row["method"]: None for row in rows}
    for row in rows:
        so_far, mean = best[row["method"]], row["wall"]["mean"]
        if mean is not None and (so_far is None or mean < so_far["wall"]["mean"]):
            best[row["method"]] = row
    return {name: row and {k: v for k, v in row.items() if k != "curves"} for name, row in best.items()}


def compare(row: Row, to: Row) -> Row:
    """Ratios of wall and CPU seconds, seed by seed: mean, min, max, and each."""
    ratios = {}
    for clock in ("wall", "cpu"):
        pairs = zip(row[clock]["by_seed"], to[clock]["by_seed"], strict=True)
        each = [a / b for a, b in pairs]
        ratios[clock] = {"mean": statistics.fmean(each), "min": min(each), "max": max(each), "by_seed": each}
    return ratios


def print_tuned(answer: dict[str, Any]) -> None:
    """A markdown table of all points, the best ones, and the ratios, on stdout."""
    ours = answer["ours"]
    n_seeds, target = ours["seeds"], ours["target_percent"]
    print("\n".join(table(ours["points"])))
    print(f"seconds to {target:g} %: mean (median) over {n_seeds} seeds; after a seed that misses, no other")
    for name, row in ours["best"].items():
        if row is None:
            print(f"{name}: no point reached {target:g} % with all seeds")
        else:
            wall, cpu = row["wall"]["mean"], row["cpu"]["mean"]
            print(f"{name}, best in hindsight: {_options(row)}: {wall:.3g} s, CPU {cpu:.3g} s")
    for name, ratios in ours["ratio_to_adam"].items():
        parts = (f"{clock} {r['mean']:.2f} ({r['min']:.2f} to {r['max']:.2f})" for clock, r in ratios.items())
        print(f"{name} / dhntb, best points, by seed, mean (min to max): {', '.join(parts)}")


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of markdown, a row for each point."""
    lines = ["| point | % at the end | seeds at the target | wall s | CPU s |", "|---|---|---|---|---|"]
    for row in rows:
        end, error = (_number(row[key], ".3f") for key in ("end_percent", "end_stderr"))
        wall, cpu = (f"{_number(row[c]['mean'])} ({_number(row[c]['median'])})" for c in ("wall", "cpu"))
        point = f"{row['method']}, {_options(row)}"
        seeds = f"{row['n_reached']} of {row['n_trained']}"
        lines.append(f"| {point} | {end} ± {error} | {seeds} | {wall} | {cpu} |")
    return lines


def _options(row: Row) -> str:
    parts = [f"{row['n_paths']} paths", f"{row['epochs']} epochs"]
    parts += [f"rate {row['rate']:g}"] if row["rate"] is not None else []
    parts += [f"{row['n_inner']} inner"] if row["n_inner"] is not None else []
    return ", ".join(parts)


def _number(x: float | None, digits: str = ".3g") -> str:
    return "never" if x is None and digits == ".3g" else "–" if x is None else format(x, digits)
