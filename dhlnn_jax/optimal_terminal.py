"""Claims on the last spot: the expectations G_i of `optimal`, normal log returns on a grid or on a lattice.

Everything else is the recursion of `bellman`. Host-level numpy in float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import numpy as np

from dhlnn_jax.bellman import (
    CUT,
    NormalStep,
    SolveAt,
    Solved,
    backward,
    check_memory,
    density,
    linear_tail,
    log_expectation,
    log_grid,
    tail_notes,
)
from dhlnn_jax.errors import UsageError
from dhlnn_jax.payoff import payoff_at

SPOTS = 8  # spots per standard deviation of one step
_PANEL_NODES = 12


class TerminalClaim(NamedTuple):
    """The problem of selling a claim on the last spot, all but the law of the spot; units as in `optimal`."""

    payoff: Callable[..., Any]
    spot0: float
    cost_rate: float
    risk_aversion: float
    n_steps: int
    liquidate: bool

    def owed(self, log_spot: np.ndarray) -> np.ndarray:
        """The payoff at log spots."""
        owed = payoff_at(self.payoff, np.exp(log_spot))
        if not np.all(np.isfinite(owed)):
            bad = np.exp(log_spot[~np.isfinite(owed)][0])
            raise UsageError(f"payoff must be finite at every spot > 0, it is not at {bad:g}")
        return owed

    def terminal(self, log_spot: np.ndarray, owed: np.ndarray, hedge_ratio: np.ndarray) -> np.ndarray:
        """L_n, [n_spot, n_ratios]."""
        sale = self.liquidate * self.cost_rate * np.exp(log_spot)[:, None] * np.abs(hedge_ratio)
        return self.risk_aversion * (owed[:, None] + sale)

    def asked(self, slopes: np.ndarray, mean: float, variance: float, spot: float) -> tuple[float, float]:
        """Hedge ratios that the slopes of the payoff, and the drift, may ask for; 0 among them."""
        drifting = mean / (self.risk_aversion * spot * variance)
        ratios = np.concatenate([slopes, slopes + drifting, [0.0]])
        return float(ratios.min()), float(ratios.max())


def on_normal_grid(
    claim: TerminalClaim, step: NormalStep
) -> tuple[SolveAt, tuple[float, float], tuple[str, ...]]:
    """How to solve on a grid, the hedge ratios the claim may ask for, and notes."""
    n, scale, start = claim.n_steps, claim.risk_aversion, float(np.log(claim.spot0))
    around, reach = n * step.mean, CUT * np.sqrt(n) * step.deviation
    low, high = start + min(0.0, around) - reach, start + max(0.0, around) + reach
    node, weight = _panels(claim, step, low, high)
    owed = claim.owed(node)

    def solve_at(resolution: float, hedge_ratio: np.ndarray) -> Solved:
        grid = log_grid(step, low, high, start, SPOTS * resolution)
        spot, beyond, position = np.exp(grid.row), np.exp(grid.node), scale * hedge_ratio

        def panel_weights(first: int, last: int) -> tuple[slice, np.ndarray]:
            farthest = CUT * step.deviation + abs(step.mean)
            edges = np.searchsorted(node, [grid.row[first] - farthest, grid.row[last - 1] + farthest])
            seen = slice(*edges)
            mass = density(step, node[seen] - grid.row[first:last, None]) * weight[seen]
            return seen, mass / mass.sum(axis=1, keepdims=True)

        def expected(i: int, cost_to_go: np.ndarray | None) -> np.ndarray:
            if cost_to_go is None:
                later, after, weights = claim.terminal(node, owed, hedge_ratio), np.exp(node), panel_weights
            else:
                m = grid.reach
                below = linear_tail(cost_to_go, spot, beyond[:m], end=0)
                above = linear_tail(cost_to_go, spot, beyond[-m:], end=-1)
                later, after, weights = np.concatenate([below, cost_to_go, above]), beyond, grid.weights
            exponent = later - after[:, None] * position
            return log_expectation(exponent, weights, 0, len(spot)) + spot[:, None] * position

        marginal = scale * claim.cost_rate * spot
        value, lower, upper = backward(expected, lambda i: marginal, hedge_ratio, n, kinked=claim.liquidate)
        origin = np.argmin(np.abs(grid.row - start)), np.argmin(np.abs(hedge_ratio))
        return Solved(float(value[origin]) / scale, spot, np.array(lower), np.array(upper))

    coarse = np.arange(low, high, step.deviation)
    slopes = np.diff(claim.owed(coarse)) / np.diff(np.exp(coarse))
    asked = claim.asked(slopes, step.growth, step.deviation**2, np.exp(low))
    liability = scale * claim.spot0 * max(1.0, abs(slopes[-1]))  # of many calls, lambda counts many times
    return solve_at, asked, tail_notes(liability * np.sqrt(n) * step.deviation)


def _panels(claim: TerminalClaim, step: NormalStep, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights in the last log spot, on panels halved around kinks and jumps.

    A panel is halved until the polynomial through its nodes gives the payoff at the nodes of its halves.
    """
    x, w = np.polynomial.legendre.leggauss(_PANEL_NODES)
    halves = np.concatenate([0.5 * x - 0.5, 0.5 * x + 0.5])
    interpolate = np.linalg.solve(np.vander(x).T, np.vander(halves, _PANEL_NODES).T).T
    farthest = CUT * step.deviation + abs(step.mean) + step.deviation
    edges = np.arange(low - farthest, high + farthest + 0.5 * step.deviation, 0.5 * step.deviation)
    centre, half = 0.5 * (edges[1:] + edges[:-1]), np.full(len(edges) - 1, 0.25 * step.deviation)
    owed = claim.owed((centre[:, None] + half[:, None] * x).ravel()).reshape(-1, _PANEL_NODES)
    tolerance, done = 1e-11 * np.abs(owed).max(), []
    for _ in range(40):
        finer = claim.owed((centre[:, None] + half[:, None] * halves).ravel()).reshape(len(centre), -1)
        kept = np.abs(owed @ interpolate.T - finer).max(axis=1, initial=0.0) <= tolerance
        done.append((centre[kept], half[kept]))
        owed = finer[~kept].reshape(-1, _PANEL_NODES)
        half = np.repeat(0.5 * half[~kept], 2)
        centre = np.repeat(centre[~kept], 2) + half * np.tile([-1.0, 1.0], len(half) // 2)
        if not len(centre):
            break
    done.append((centre, half))
    centre, half = (np.concatenate(part) for part in zip(*done, strict=True))
    order = np.argsort(centre)
    centre, half = centre[order, None], half[order, None]
    return (centre + half * x).ravel(), (half * w).ravel()


class Lattice(NamedTuple):
    """Log spots that can be reached at times 0..n_steps, the node each move leads to, and the moves."""

    levels: list[np.ndarray]
    children: list[np.ndarray]
    log_return: np.ndarray
    probability: np.ndarray


def lattice_of(
    claim: TerminalClaim,
    increments: tuple[Any, Any],
    drift: SupportsFloat,
    resolution: float,
    limit_gib: float,
) -> Lattice:
    """Spots that the increments reach. Raises: UsageError for bad increments, or more spots than memory."""
    log_return, probability = (np.asarray(x, float) for x in increments)
    if log_return.ndim != 1 or log_return.shape != probability.shape or not np.all(np.isfinite(log_return)):
        raise UsageError("increments must be finite log returns and as many probabilities")
    if np.any(probability <= 0) or abs(probability.sum() - 1.0) > 1e-9:
        raise UsageError(f"probabilities must be positive and sum to 1, their sum is {probability.sum():g}")
    if not log_return.min() < 0 < log_return.max():
        raise UsageError("increments must hold a negative and a positive log return: all else is arbitrage")
    if float(drift) != 0:
        raise UsageError(f"drift belongs to the normal law, with increments it must be 0: {float(drift):g}")
    levels, children = [np.array([np.log(claim.spot0)])], []
    for _ in range(claim.n_steps):
        after = (levels[-1][:, None] + log_return).ravel()
        rows = sum(map(len, levels)) / claim.n_steps + len(after)
        check_memory(rows, claim.n_steps, resolution, limit_gib)
        levels.append(_merged(after))
        child = np.searchsorted(levels[-1], after + 1e-11, side="right") - 1
        children.append(child.reshape(-1, len(log_return)))
    return Lattice(levels, children, log_return, probability / probability.sum())


def _merged(log_spot: np.ndarray) -> np.ndarray:
    """Ascending, with what differs by rounding taken for one."""
    ordered = np.sort(log_spot)
    return ordered[np.append(True, np.diff(ordered) > 1e-10)]


def on_lattice(
    claim: TerminalClaim, lattice: Lattice
) -> tuple[SolveAt, tuple[float, float], tuple[str, ...]]:
    """As `on_normal_grid`; spots are exact, so that only the hedge ratios have a resolution."""
    n, scale = claim.n_steps, claim.risk_aversion
    spot = [np.exp(level) for level in lattice.levels]
    owed = claim.owed(lattice.levels[-1])

    def solve_at(resolution: float, hedge_ratio: np.ndarray) -> Solved:
        def expected(i: int, cost_to_go: np.ndarray | None) -> np.ndarray:
            after = claim.terminal(lattice.levels[n], owed, hedge_ratio) if cost_to_go is None else cost_to_go
            gain = spot[i + 1][lattice.children[i]] - spot[i][:, None]
            exponent = after[lattice.children[i]] - scale * gain[:, :, None] * hedge_ratio
            top = exponent.max(axis=1)
            return np.log(np.einsum("k,ikd->id", lattice.probability, np.exp(exponent - top[:, None]))) + top

        value, lower, upper = backward(
            expected, lambda i: scale * claim.cost_rate * spot[i], hedge_ratio, n, kinked=claim.liquidate
        )
        everywhere = np.exp(_merged(np.concatenate(lattice.levels[:-1])))
        low, high = (
            np.array([np.interp(everywhere, *at) for at in zip(spot, e, strict=False)])
            for e in (lower, upper)
        )
        return Solved(float(value[0, np.argmin(np.abs(hedge_ratio))]) / scale, everywhere, low, high)

    gain = np.expm1(lattice.log_return)
    moments = float(lattice.probability @ gain), float(lattice.probability @ gain**2)
    asked = claim.asked(np.diff(owed) / np.diff(spot[-1]), *moments, spot[-1][0])
    return solve_at, asked, ()
