"""The picture of the regime map, its files and its command line."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dhlnn_jax import resumable
from dhlnn_jax.bellman import NO_PLATEAU
from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import write_whole
from dhlnn_jax.regime import (
    MARKED,
    NO_TRADE,
    RELATIVE_COSTS,
    SIZES,
    RegimeMap,
    Risks,
    Setting,
    deviation,
    regime_map,
    risks_of,
)
from dhlnn_jax.script import Parser, exit_code


def figure_of(regimes: RegimeMap) -> Figure:
    """The share that the optimum removes as colour, the regimes' boundaries, the marked settings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter

    x, y, scale = regimes.sizes, regimes.relative_costs, deviation(regimes.volatility)
    figure, axis = plt.subplots(figsize=(9, 6.8), layout="constrained")
    axis.set_xscale("log")
    axis.set_yscale("log")
    mesh = axis.pcolormesh(
        _cell_edges(x), _cell_edges(y), regimes.of(lambda r: 100 * r.removed), cmap="Blues", vmin=0, vmax=125
    )
    figure.colorbar(
        mesh,
        ax=axis,
        boundaries=np.linspace(0, 100, 101),
        ticks=range(0, 101, 20),
        label="risk beyond the Black–Scholes price\nthat the best hedge removes (%)",
    )
    for number, colour, line, label in _BOUNDARIES:
        values = regimes.of(number)
        if values.min() < 0 < values.max():
            axis.contour(x, y, values, [0.0], colors=colour, linestyles=[line], linewidths=2.2)
        axis.plot([], [], color=colour, linestyle=line, linewidth=2.2, label=label)
    hatch: dict[str, Any] = {"facecolor": "none", "edgecolor": "#666666", "hatch": "//", "linewidth": 0.5}
    axis.axvspan(NO_PLATEAU, _cell_edges(x)[-1], label="value depends on where normals are cut", **hatch)
    for name, setting in MARKED.items():
        place = setting.size, setting.relative_cost
        family = name.split()[0].removesuffix(".toml")
        axis.plot(*place, markeredgecolor="black", linestyle="none", **_MARKERS[family])
        left = setting.size > 1
        axis.annotate(
            name,
            place,
            (-11 if left else 9, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8.5,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
    axis.set_xlabel("λ·P₀·σ√T: risk aversion × one standard deviation of the price (no unit)")
    axis.set_ylabel("c/(σ√T): cost rate ÷ standard deviation (no unit)")
    above = axis.secondary_xaxis("top", functions=(_times(1 / scale), _times(scale)))
    above.set_xlabel(f"λ at volatility {regimes.volatility:g} (1/money, spot 1)")
    right = axis.secondary_yaxis("right", functions=(_times(100 * scale), _times(0.01 / scale)))
    right.set_ylabel(f"c at volatility {regimes.volatility:g} (%)")
    for ruler in (axis.xaxis, axis.yaxis, above.xaxis, right.yaxis):
        ruler.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_title(
        "At-the-money call, 30 daily steps; paper: λ 1, σ 0.1; notebook: λ 1, σ 0.2; stars: λ 50, σ 0.2",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)
    return figure


# Negative on one side, positive on the other; Okabe and Ito's colours.
_BOUNDARIES: tuple[tuple[Callable[[Risks], float], str, object, str], ...] = (
    (
        # Towards the boundary the share falls like e^(-1/distance), which this makes linear.
        lambda r: 1.0 / np.log(NO_TRADE) - 1.0 / np.log(np.clip(r.removed, 1e-12, 0.999)),
        "#000000",
        "-",
        "above: the optimum never trades (removes < 0.1 %)",
    ),
    (
        lambda r: r.whalley_wilmott / r.no_hedge - 1.0,
        "#D55E00",
        "--",
        "above: Whalley–Wilmott is worse than no hedge",
    ),
    (lambda r: r.delta / r.no_hedge - 1.0, "#CC79A7", "-.", "above: the delta is worse than no hedge"),
    (
        lambda r: r.whalley_wilmott / r.optimum - 1.01,
        "#009E73",
        ":",
        "below: Whalley–Wilmott is within 1 % of the optimum",
    ),
)
_MARKERS: dict[str, dict[str, Any]] = {
    "paper": {"marker": "o", "color": "#E69F00", "markersize": 8},
    "ntb_notebook": {"marker": "s", "color": "#F0E442", "markersize": 8},
    "quickstart": {"marker": "*", "color": "#F0E442", "markersize": 15},
    "benchmark_european": {"marker": "*", "color": "#F0E442", "markersize": 15},
}


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda x: factor * x


def _cell_edges(centres: np.ndarray) -> np.ndarray:
    """Edges of cells around geometrically spaced centres."""
    ratio = np.sqrt(centres[1] / centres[0])
    return np.append(centres / ratio, centres[-1] * ratio)


_TABLE = "regime_map.csv"
_COLUMNS = (*Setting._fields, "size", "relative_cost", *Risks._fields, "saving", "removed")


def _row(setting: Setting, risks: Risks) -> list[float]:
    return [*setting, setting.size, setting.relative_cost, *risks, risks.saving, risks.removed]


def write_map(regimes: RegimeMap, folder: Path) -> list[Path]:
    """Writes regime_map.png and every number in it, regime_map.csv, into a folder; returns their paths."""
    picture, table = folder / "regime_map.png", folder / _TABLE
    figure_of(regimes).savefig(picture, dpi=150)
    rows = io.StringIO(newline="")
    writer = csv.writer(rows)
    writer.writerow(_COLUMNS)
    for j, row in enumerate(regimes.risks):
        writer.writerows([f"{x:.12g}" for x in _row(regimes.setting(j, i), r)] for i, r in enumerate(row))
    write_whole(table, lambda file: file.write(rows.getvalue().encode()))
    return [picture, table]


def print_marked(marked: dict[str, Risks]) -> None:
    """The marked settings as a table on stdout."""
    print("entropic risks (money, spot 1) without sampling error, to 0.04 %; saved: of the unhedged risk;")
    print("removed: of the unhedged risk beyond the Black-Scholes price; size: λ·P₀·σ√T")
    headings = ("size", "c/(σ√T)", "optimum", "no hedge", "delta", "Wh.–Wilm.", "saved", "removed")
    print(f"{'setting':20}" + "".join(f"{heading:>11}" for heading in headings))
    for name, r in marked.items():
        at = MARKED[name]
        risks = "".join(f"{x:11.6f}" for x in (r.optimum, r.no_hedge, r.delta, r.whalley_wilmott))
        shares = "".join(f"{round(100 * x, 2) + 0.0:9.2f} %" for x in (r.saving, r.removed))  # no -0.00
        print(f"{name:20}{at.size:11.3f}{at.relative_cost:11.4f}{risks}{shares}")


def _parser() -> Parser:
    parser = Parser(
        prog="python scripts/regime_map.py",
        description="Computes the risks of the optimum, no hedge, delta and Whalley-Wilmott over a grid of "
        "lambda P_0 sigma sqrt(T) and c / (sigma sqrt(T)), and draws where hedging is worth its cost.",
    )
    parser.add_argument(
        "--volatility", type=float, default=0.2, help="per square root of a year, 0.01 to 1 (default: 0.2)"
    )
    parser.add_argument(
        "--points", type=int, default=13, help="cells along each axis, 2 to 100 (default: 13, a minute)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/regime_map"), help="folder (default: results/regime_map)"
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--overwrite", action="store_true", help="replace an earlier map in the same folder")
    folder.add_argument("--resume", action="store_true", help="go on with one cut off, after its last row")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the script; returns its exit code, that of `script.exit_code`."""
    interrupted = "; --resume goes on with the row that was being computed"
    return exit_code("regime_map.py", lambda: _run(arguments), interrupted=interrupted)


def _run(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    if not 0.01 <= options.volatility <= 1.0:
        raise UsageError(f"--volatility must be from 0.01 to 1, got {options.volatility:g}")
    if not 2 <= options.points <= 100:
        raise UsageError(f"--points must be from 2 to 100, got {options.points}")
    checkpoints = resumable.claim(options.out, _TABLE, overwrite=options.overwrite, resume=options.resume)
    if options.resume and not checkpoints.exists():
        raise UsageError(f"{str(options.out / _TABLE)!r} is finished; use --overwrite to compute it again")
    told = {"config": None, "volatility": options.volatility, "points": options.points}
    resumable.begin(checkpoints, told)
    axes = (np.geomspace(*ends, options.points) for ends in (SIZES, RELATIVE_COSTS))
    regimes = regime_map(options.volatility, *axes, checkpoint_folder=checkpoints)
    print_marked({name: risks_of(setting) for name, setting in MARKED.items()})
    picture, table = write_map(regimes, options.out)
    resumable.discard(checkpoints)  # a finished map is not resumed
    print(f"figure: {picture}\ntable: {table}")
