"""The exact optimum of hedging with proportional costs under exponential utility, by backward induction.

Wealth factors out of the exponential utility, so that the state is the time, the spot and the hedge ratio
held so far. In logarithms, with lambda the risk aversion and c the cost rate,

  L_n(p, d)     = lambda payoff(p)  (+ lambda c p |d| if the last position is sold),
  G_i(p, delta) = log E exp(L_{i+1}(P', delta) - lambda delta (P' - p)),
  L_i(p, d)     = min_delta { lambda c p |delta - d| + G_i(p, delta) },   value = L_0(spot0, 0) / lambda.

G_i is convex in delta, so the minimum is a no-transaction band: nothing is traded between `band_lower`, where
dG/ddelta = -lambda c p, and `band_upper`, where it is +lambda c p; outside one trades to the nearer edge.
Host-level numpy in float64, whatever the caller's JAX precision.

Source: Hodges and Neuberger (1989); Davis, Panas and Zariphopoulou (1993), in discrete time and log space.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from dhlnn_jax.bellman import (
    CUT,
    BandTables,
    NormalStep,
    SolveAt,
    Solved,
    backward,
    check_memory,
    check_numbers,
    check_path,
    density,
    linear_tail,
    log_expectation,
    log_grid,
    normal_step,
    refined,
    rounding,
    tail_notes,
)
from dhlnn_jax.errors import UsageError
from dhlnn_jax.hedge import band_hedge
from dhlnn_jax.hedger import Policy, rule_policy
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.optimal_lookback import LookbackHedge, solve_lookback
from dhlnn_jax.payoff import CLAIMS, Claim, payoff_at
from dhlnn_jax.pnl import Contract, proportional_cost
from dhlnn_jax.settings import Settings

SPOTS = 8  # spots per standard deviation of one step
_LATTICE_REFINEMENT = 4  # finer on lattices, where no density smooths the kinks of L
_PANEL_NODES = 12


class OptimalHedge(NamedTuple):
    """The optimum for a claim on the last spot.

    Attributes:
      value: entropic risk of the optimally hedged claim, starting at spot0 without a position; money.
      error: the larger distance of `value` from those at half and at a third of the resolution; money.
      spot: [n_spot], ascending; equally spaced in the logarithm under the normal law.
      band_lower, band_upper: edges of the no-transaction band, [n_steps, n_spot]. An edge beyond
        `hedge_ratio_limits` stands at the limit, and no optimal position is out there.
      hedge_ratio_limits: the smallest and largest hedge ratio that the recursion sees.
      notes: what the reader of the value should know; empty if nothing.
    """

    value: float
    error: float
    spot: np.ndarray
    band_lower: np.ndarray
    band_upper: np.ndarray
    hedge_ratio_limits: tuple[float, float]
    notes: tuple[str, ...]

    @property
    def tables(self) -> BandTables:
        """The arrays that the band is read from."""
        return {"log_spot": np.log(self.spot), "lower": self.band_lower, "upper": self.band_upper}

    @staticmethod
    def band_from(tables: BandTables, path: MarketPath) -> tuple[jax.Array, jax.Array]:
        """Edges along an observed path [n_steps]: linear in the log spot, constant beyond the grid."""
        check_path(path, tables["lower"])
        log_spot, dtype = jnp.log(path.spot), path.spot.dtype
        at = jax.vmap(jnp.interp, in_axes=(0, None, 0))
        grid, lower, upper = (jnp.asarray(tables[x], dtype) for x in ("log_spot", "lower", "upper"))
        return at(log_spot, grid, lower), at(log_spot, grid, upper)

    def band(self, path: MarketPath, settings: Settings) -> tuple[jax.Array, jax.Array]:
        """`band_from` of its own tables; what the settings say is not looked at."""
        return self.band_from(self.tables, path)


def solve_european(
    payoff: Callable[..., Any],
    *,
    spot0: SupportsFloat = 1.0,
    volatility: SupportsFloat,
    drift: SupportsFloat = 0.0,
    n_steps: int,
    dt: SupportsFloat,
    cost_rate: SupportsFloat,
    risk_aversion: SupportsFloat,
    liquidate: bool = False,
    increments: tuple[Any, Any] | None = None,
    resolution: float = 1.0,
    memory_limit_gib: float = 4.0,
) -> OptimalHedge:
    """Optimal value and no-transaction band for the seller of a claim on the last spot.

    value = min over hedges of 1/lambda log E exp(-lambda PnL), PnL as in `pnl.hedged_pnl` without premium.

    Args:
      payoff: money owed at maturity, called on a path of the last spot alone, as
        `functools.partial(european_call, strike=1.0)`; traceable by JAX; negative for a claim held. Kinks
        and jumps are found numerically.
      volatility, drift, dt: per square root of a year, per year, years between two trades.
      cost_rate: fraction of the traded notional. risk_aversion: 1/money.
      liquidate: charge the sale of the last position.
      increments: (log returns, probabilities) of every step in place of the normal law; `volatility` and `dt`
        then say nothing. Memory limits the spots they may reach, fewest if log returns are equally spaced.
      resolution: factor on the numbers of spots and hedge ratios.
      memory_limit_gib: a solve that would take more is refused before it starts.
    Returns: the optimum with its error, band and notes; `optimal_policy` turns it into a hedger.
    Raises: UsageError for a claim that is not terminal, numbers out of range, increments with arbitrage, an
      optimum without bound and more memory than the limit.
    Numerics: under the normal law every hedger that ever holds less than one share has infinite risk
      (lognormal tails), the optimum included. What is computed is for normals cut at `CUT`; up to about 3 of
      lambda P_0 sigma sqrt(T) the cut does not matter, from 5 on it does and `notes` says so.
    Source: Hodges and Neuberger (1989); Davis, Panas and Zariphopoulou (1993).
    """
    _check_terminal(payoff)
    numbers = check_numbers(spot0, volatility, dt, cost_rate, risk_aversion, n_steps, resolution)
    claim = _Claim(payoff, *numbers, liquidate)
    if increments is None:
        step = normal_step(volatility, drift, dt)
        deviations = 2 * CUT * (np.sqrt(n_steps) + 1) + abs(n_steps * step.mean / step.deviation)
        check_memory(SPOTS * resolution * deviations, n_steps, resolution, memory_limit_gib)
        solve_at, asked, notes = _on_normal_grid(claim, step)
    else:
        resolution = _LATTICE_REFINEMENT * resolution
        lattice = _lattice(claim, increments, drift, resolution, memory_limit_gib)
        solve_at, asked, notes = _on_lattice(claim, lattice)
    solved, error, limits = refined(solve_at, asked, resolution)
    error += rounding(claim.spot0, claim.risk_aversion)
    return OptimalHedge(solved.value, error, *solved[1:], limits, notes)


Optimum = OptimalHedge | LookbackHedge


def optimal_policy(optimum: Optimum) -> Policy:
    """The solved band as a policy on any paths (`params=None`); what the settings say is not looked at."""
    return rule_policy(lambda path, settings: band_hedge(*optimum.band(path, settings)), optimum.band)


def optimal_policies(optima: Sequence[Optimum]) -> tuple[Policy, BandTables]:
    """One policy for several optima of the same claim, and its params: their tables, [n_optima, ...] each.

    Numerics: smaller tables are continued beyond the ends of their grids, where bands are constant.
    """
    band_from, every = optima[0].band_from, [optimum.tables for optimum in optima]

    def band(tables: BandTables, path: MarketPath, settings: Settings) -> tuple[jax.Array, jax.Array]:
        return band_from(tables, observed_path(path))

    def hedge_ratio(tables: BandTables, path: MarketPath, settings: Settings) -> jax.Array:
        return band_hedge(*band(tables, path, settings))

    largest = np.max([tables["lower"].shape for tables in every], axis=0)
    continued = [_continued(tables, largest) for tables in every]
    return Policy(hedge_ratio, band), jax.tree.map(lambda *arrays: np.stack(arrays), *continued)


def _continued(tables: BandTables, shape: np.ndarray) -> BandTables:
    """Edges repeated up to `shape`; the grid of their second axis, the only one there is, goes on."""
    missing = [(0, int(wanted) - had) for wanted, had in zip(shape, tables["lower"].shape, strict=True)]

    def of(name: str, array: np.ndarray) -> np.ndarray:
        if name in ("lower", "upper"):
            return np.pad(array, missing, mode="edge")
        return array if np.ndim(array) == 0 else np.append(array, array[-1] + 1.0 + np.arange(missing[1][1]))

    return {name: of(name, np.asarray(array)) for name, array in tables.items()}


def solve_contract(contract: Contract, settings: Settings, *, n_steps: int) -> Optimum:
    """The optimum of selling a contract under geometric Brownian motion with the numbers of `settings`.

    `settings.premium` is not part of the value. Solved once for the same numbers.

    Raises: UsageError for a contract that no solver covers, saying which ones are.
    """
    if contract.cost_model is not proportional_cost:
        raise UsageError("the exact optimum covers proportional costs only (cost.kind = 'proportional')")
    if contract.charge_half_spread:
        raise UsageError("the exact optimum covers one cost rate only, not a quoted half-spread")
    if not contract.claim.terminal and contract.claim.payoff is not CLAIMS["lookback_call"].payoff:
        raise UsageError(
            "the exact optimum covers claims on the last spot and fixed-strike lookback calls; this claim "
            f"depends on the {contract.claim.depends_on} of the path"
        )
    names = ("strike", "spot0", "volatility", "drift", "dt", "cost_rate", "risk_aversion")
    # float32 keeps seven digits: a rate given as 0.005 is to be solved as 0.005.
    numbers = tuple((name, float(f"{float(getattr(settings, name)):.7g}")) for name in names)
    return _solved_once(contract.claim, contract.liquidate, n_steps, numbers)


@lru_cache(maxsize=32)
def _solved_once(
    claim: Claim, liquidate: bool, n_steps: int, numbers: tuple[tuple[str, float], ...]
) -> Optimum:
    keywords: dict[str, Any] = {**dict(numbers), "n_steps": n_steps, "liquidate": liquidate}
    if not claim.terminal:
        return solve_lookback(**keywords)
    return solve_european(Partial(claim.payoff, strike=keywords.pop("strike")), **keywords)


# Claims on the last spot.


class _Claim(NamedTuple):
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


def _on_normal_grid(claim: _Claim, step: NormalStep) -> tuple[SolveAt, tuple[float, float], tuple[str, ...]]:
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


def _panels(claim: _Claim, step: NormalStep, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
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


class _Lattice(NamedTuple):
    """Log spots that can be reached at times 0..n_steps, the node each move leads to, and the moves."""

    levels: list[np.ndarray]
    children: list[np.ndarray]
    log_return: np.ndarray
    probability: np.ndarray


def _lattice(
    claim: _Claim, increments: tuple[Any, Any], drift: SupportsFloat, resolution: float, limit_gib: float
) -> _Lattice:
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
    return _Lattice(levels, children, log_return, probability / probability.sum())


def _merged(log_spot: np.ndarray) -> np.ndarray:
    """Ascending, with what differs by rounding taken for one."""
    ordered = np.sort(log_spot)
    return ordered[np.append(True, np.diff(ordered) > 1e-10)]


def _on_lattice(claim: _Claim, lattice: _Lattice) -> tuple[SolveAt, tuple[float, float], tuple[str, ...]]:
    """As `_on_normal_grid`; spots are exact, so that only the hedge ratios have a resolution."""
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


def _check_terminal(payoff: Callable[..., Any]) -> None:
    while isinstance(payoff, partial):
        payoff = payoff.func
    for name, claim in CLAIMS.items():
        if claim.payoff is payoff and not claim.terminal:
            raise UsageError(
                f"solve_european covers claims on the last spot, {name} depends on the {claim.depends_on} "
                f"of the path: fixed-strike lookback calls have solve_lookback, others are not covered"
            )
