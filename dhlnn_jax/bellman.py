"""The recursion behind the exact optimum, whatever its state, and what its solvers share: grids, checks.

`optimal_terminal` (claims on the last spot) and `optimal_lookback` (the running maximum) say what the
expectations are. Everything is host-level numpy in float64.

Source: Hodges and Neuberger (1989); Davis, Panas and Zariphopoulou (1993), in discrete time and log space.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import numpy as np
from scipy.interpolate import CubicSpline

from dhlnn_jax.errors import UsageError
from dhlnn_jax.market import MarketPath

CUT = 10.0  # normals are cut here, those of each step and that of the whole time, in standard deviations
_HEDGE_RATIOS = 64  # intervals across what the claim can ask for, see `hedge_ratio_grid`
NO_PLATEAU = 5.0  # lambda P_0 sigma sqrt(T) from which on the value depends on CUT
_BLOCK = 512  # spots whose expectations are one matrix product


class Solved(NamedTuple):
    """One solve on one grid: value in money, the coordinates of the bands, and their edges."""

    value: float
    coordinates: Any
    band_lower: np.ndarray
    band_upper: np.ndarray


BandTables = dict[str, Any]  # "lower", "upper": edges [n_steps, ...]; the rest says where

SolveAt = Callable[[float, np.ndarray], Solved]  # (resolution, hedge ratios) -> one solve


def backward(
    expected: Callable[[int, Any], np.ndarray],
    marginal_cost: Callable[[int], np.ndarray],
    hedge_ratio: np.ndarray,
    n_steps: int,
    *,
    kinked: bool,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """L_0 and the edges of the band at every step.

    Args:
      expected: (i, L_{i+1}) -> G_i [n_states, n_ratios]; L_n comes as None.
      marginal_cost: i -> lambda c p, [n_states].
      kinked: L has a kink at hedge ratio 0 (a final sale), where G is not smooth either.
    """
    cost_to_go: Any = None
    bands = []
    for i in reversed(range(n_steps)):
        *band, cost_to_go = _trade(expected(i, cost_to_go), hedge_ratio, marginal_cost(i), kinked)
        bands.append(band)
    lower, upper = (list(edge) for edge in zip(*reversed(bands), strict=True))
    return cost_to_go, lower, upper


def _trade(
    holding: np.ndarray, hedge_ratio: np.ndarray, marginal_cost: np.ndarray, kinked: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of the band and L_i from G_i, all at once.

    A cubic spline in the hedge ratio places the edges. Its errors are of second order in L, because
    dG/ddelta +- lambda c p vanishes there, and inside the band L is G at the nodes themselves.
    """
    n, width, state = len(hedge_ratio), np.diff(hedge_ratio), np.arange(len(holding))
    zero = int(np.argmin(np.abs(hedge_ratio)))
    operator = np.zeros((2, n - 1, n))  # to the spline's slopes at the start and the end of every interval
    for first, last in ((0, zero), (zero, n - 1)) if kinked else ((0, n - 1),):
        nodes = hedge_ratio[first : last + 1]
        slope = CubicSpline(nodes, np.eye(len(nodes)))(nodes, 1)
        operator[:, first:last, first : last + 1] = slope[:-1], slope[1:]
    slopes = [holding @ each.T for each in operator]

    def edge(slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """argmin over delta of G + slope delta, and G there."""
        node = np.argmin(holding + slope[:, None] * hedge_ratio, axis=1)
        best = hedge_ratio[node], holding[state, node]
        for neighbour in (node - 1, node):  # the minimum is a node, or inside one of the intervals beside it
            k = np.clip(neighbour, 0, len(width) - 1)
            a0, a1, late = holding[state, k], slopes[0][state, k], slopes[1][state, k]
            chord = (holding[state, k + 1] - a0) / width[k]
            a2, a3 = (3.0 * chord - 2.0 * a1 - late) / width[k], (a1 + late - 2.0 * chord) / width[k] ** 2
            with np.errstate(divide="ignore", invalid="ignore"):
                root = -2.0 * (a1 + slope) / (2.0 * a2 + np.sqrt(4.0 * a2**2 - 12.0 * a3 * (a1 + slope)))
            inside = (root > 0.0) & (root < width[k])  # False for nan
            t = np.where(inside, root, 0.0)
            there = a0 + t * (a1 + t * (a2 + t * a3))
            at = hedge_ratio[k] + t
            better = inside & (there + slope * at < best[1] + slope * best[0])
            best = np.where(better, at, best[0]), np.where(better, there, best[1])
        return best

    (lower, at_lower), (upper, at_upper) = edge(marginal_cost), edge(-marginal_cost)
    upper = np.maximum(lower, upper)  # equal without costs, but for rounding
    below = np.maximum(lower[:, None] - hedge_ratio, 0.0)
    above = np.maximum(hedge_ratio - upper[:, None], 0.0)
    cost_to_go = np.where(below > 0, at_lower[:, None], np.where(above > 0, at_upper[:, None], holding))
    return lower, upper, cost_to_go + marginal_cost[:, None] * (below + above)


def hedge_ratio_grid(low: float, high: float, resolution: float) -> np.ndarray:
    """Equally spaced hedge ratios over [low, high] and a quarter more on each side; 0 is one of them."""
    spacing = (high - low) / max(4.0, np.round(_HEDGE_RATIOS * resolution))
    margin = 0.25 * (high - low)
    return spacing * np.arange(np.floor((low - margin) / spacing), np.ceil((high + margin) / spacing) + 1)


def refined(
    solve_at: SolveAt, asked: tuple[float, float], resolution: float
) -> tuple[Solved, float, tuple[float, float]]:
    """The solve at `resolution`, its distance from a half and a third of that, and the hedge ratios covered.

    Args:
      asked: hedge ratios (0 among them) that the claim is expected to ask for; widened until no band is cut.
    """
    low, high = asked if asked[1] > asked[0] else (0.0, 1.0)
    for _ in range(8):
        ratios = hedge_ratio_grid(low, high, resolution)
        solved = solve_at(resolution, ratios)
        buys_most, sells_most = solved.band_lower.max() >= ratios[-1], solved.band_upper.min() <= ratios[0]
        if not (buys_most or sells_most):
            coarser = (resolution / 2, resolution / 3)  # two, in case that one agrees by chance
            values = [solve_at(r, hedge_ratio_grid(low, high, r)).value for r in coarser]
            error = max(abs(solved.value - value) for value in values)
            return solved, error, (float(ratios[0]), float(ratios[-1]))
        low, high = low - sells_most * (high - low), high + buys_most * (high - low)
    raise UsageError(f"the optimal hedge ratio leaves [{low:g}, {high:g}]: the problem has no finite optimum")


# Normal log returns on an equally spaced grid.


class NormalStep(NamedTuple):
    """Mean and standard deviation of the log return of one step, and the mean relative price change."""

    mean: float
    deviation: float
    growth: float


def normal_step(volatility: SupportsFloat, drift: SupportsFloat, dt: SupportsFloat) -> NormalStep:
    """The log return of geometric Brownian motion over dt."""
    sigma, mu, years = (float(x) for x in (volatility, drift, dt))
    return NormalStep((mu - 0.5 * sigma**2) * years, sigma * np.sqrt(years), np.expm1(mu * years))


class LogGrid(NamedTuple):
    """Log spots `row`, and `node`: the same with what one step can reach on either side.

    The trapezoidal rule on the nodes integrates a smooth function times a normal density to rounding, and
    needs no interpolation; `weight` [block, block + nodes - rows] is the same for every block of rows.
    """

    row: np.ndarray
    node: np.ndarray
    reach: int
    weight: np.ndarray

    def weights(self, first: int, last: int) -> tuple[slice, np.ndarray]:
        """Nodes that rows first..last-1 see, and their probabilities."""
        n = last - first + 2 * self.reach
        return slice(first, first + n), self.weight[: last - first, :n]


def log_grid(step: NormalStep, low: float, high: float, origin: float, per_deviation: float) -> LogGrid:
    """Grid over [low, high] with `origin` on it, `per_deviation` spots to the deviation of one step."""
    spacing = step.deviation / max(2.0, np.round(per_deviation))
    reach = int(np.ceil((CUT * step.deviation + abs(step.mean)) / spacing))
    first, last = np.floor((low - origin) / spacing), np.ceil((high - origin) / spacing)
    node = origin + spacing * np.arange(first - reach, last + reach + 1)
    jump = spacing * (np.arange(_BLOCK + 2 * reach) - reach - np.arange(_BLOCK)[:, None])
    weight = density(step, jump)
    return LogGrid(node[reach:-reach], node, reach, weight / weight[0].sum())


def density(step: NormalStep, log_return: np.ndarray) -> np.ndarray:
    z = (log_return - step.mean) / step.deviation
    return np.where(np.abs(z) <= CUT, np.exp(-0.5 * z**2), 0.0)


def log_expectation(
    exponent: np.ndarray, weights: Callable[[int, int], tuple[slice, np.ndarray]], first: int, last: int
) -> np.ndarray:
    """log sum_node weight exp(exponent), for rows first..last-1; [last - first, n_ratios].

    Numerics: one shift for a block of rows; a block where that underflows is cut in two.
    """
    if last - first > _BLOCK:
        parts = [(a, min(a + _BLOCK, last)) for a in range(first, last, _BLOCK)]
        return np.concatenate([log_expectation(exponent, weights, *part) for part in parts])
    nodes, weight = weights(first, last)
    top = exponent[nodes].max(axis=0)
    total = weight @ np.exp(exponent[nodes] - top)
    if last - first > 1 and total.min() < 1e-250:
        middle = (first + last) // 2
        parts = [(first, middle), (middle, last)]
        return np.concatenate([log_expectation(exponent, weights, *part) for part in parts])
    return np.log(total) + top


def linear_tail(values: np.ndarray, spot: np.ndarray, beyond: np.ndarray, *, end: int) -> np.ndarray:
    """Continues values [n_spot, n_ratios] to spots `beyond` the given end (0 or -1), linearly in price."""
    inner = 1 if end == 0 else -2
    slope = (values[end] - values[inner]) / (spot[end] - spot[inner])
    return values[end] + (beyond[:, None] - spot[end]) * slope


# What is refused, and what is said.


def tail_notes(size: float) -> tuple[str, ...]:
    """A note where the value depends on CUT, for a `size` lambda P_0 sigma sqrt(T)."""
    if size < NO_PLATEAU:
        return ()
    return (
        f"the value depends on where normals are cut, here at {CUT:g} standard deviations: "
        f"risk_aversion * spot0 * volatility * sqrt(time) = {size:.3g} is at least {NO_PLATEAU:g}",
    )


def check_numbers(
    spot0: SupportsFloat,
    volatility: SupportsFloat,
    dt: SupportsFloat,
    cost_rate: SupportsFloat,
    risk_aversion: SupportsFloat,
    n_steps: int,
    resolution: float,
) -> tuple[float, float, float, int]:
    """(spot0, cost_rate, risk_aversion, n_steps) as plain numbers, all in range."""
    positive = dict(
        spot0=spot0, volatility=volatility, dt=dt, risk_aversion=risk_aversion, n_steps=n_steps,
        resolution=resolution,
    )  # fmt: skip
    for name, number in positive.items():
        if not 0 < float(number) < np.inf:
            raise UsageError(f"{name} must be positive and finite, got {float(number):g}")
    if not 0 <= float(cost_rate) < np.inf:
        raise UsageError(f"cost_rate must be 0 or more and finite, got {float(cost_rate):g}")
    return float(spot0), float(cost_rate), float(risk_aversion), n_steps


def check_memory(rows: float, n_steps: int, resolution: float, limit_gib: float) -> None:
    """Refuses a solve of so many states a step; temporaries are some 30 arrays [rows, n_ratios]."""
    gib = 8.0 * rows * (30 * (1.5 * _HEDGE_RATIOS * resolution + 3) + 4 * n_steps) / 2**30
    if gib > limit_gib:
        raise UsageError(
            f"the solve would take {gib:.3g} GiB ({rows:.0f} states at each of {n_steps} steps), "
            f"the limit is memory_limit_gib = {limit_gib:g}: take fewer steps or a lower resolution"
        )


def rounding(spot0: float, risk_aversion: float) -> float:
    """What `error` is never below, in money: logarithms are rounded, and divided by lambda in the end."""
    return 1e-10 * spot0 + 1e-13 / risk_aversion


def check_path(path: MarketPath, edges: Any) -> None:
    """Raises: ValueError unless a band was solved for as many decisions as the path has."""
    if path.spot.shape != edges.shape[:1]:
        raise ValueError(f"solved for {edges.shape[0]} steps, the path has {path.spot.shape[0]} decisions")
