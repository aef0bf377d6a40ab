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
    check_memory,
    check_numbers,
    check_path,
    normal_step,
    refined,
    rounding,
)
from dhlnn_jax.errors import UsageError
from dhlnn_jax.hedge import band_hedge
from dhlnn_jax.hedger import Policy, rule_policy
from dhlnn_jax.market import MarketPath, observed_path
from dhlnn_jax.optimal_lookback import LookbackHedge, solve_lookback
from dhlnn_jax.optimal_terminal import SPOTS, TerminalClaim, lattice_of, on_lattice, on_normal_grid
from dhlnn_jax.payoff import CLAIMS, Claim
from dhlnn_jax.pnl import Contract, proportional_cost
from dhlnn_jax.settings import Settings

_LATTICE_REFINEMENT = 4  # finer on lattices, where no density smooths the kinks of L


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
        grid, lower, upper = (jnp.asarray(tables[x], dtype) for x in ("log_spot", "lower", "upper"))
        at = jax.vmap(jnp.interp, in_axes=(0, None, 0))
        edges = jax.vmap(at, in_axes=(None, None, 0))(log_spot, grid, jnp.stack([lower, upper]))
        return edges[0], edges[1]

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
    numbers = check_numbers(spot0, volatility, dt, cost_rate, risk_aversion, n_steps, resolution)
    _check_terminal(payoff, float(spot0))
    claim = TerminalClaim(payoff, *numbers, liquidate)
    if increments is None:
        step = normal_step(volatility, drift, dt)
        deviations = 2 * CUT * (np.sqrt(n_steps) + 1) + abs(n_steps * step.mean / step.deviation)
        check_memory(SPOTS * resolution * deviations, n_steps, resolution, memory_limit_gib)
        solve_at, asked, notes = on_normal_grid(claim, step)
    else:
        resolution = _LATTICE_REFINEMENT * resolution
        lattice = lattice_of(claim, increments, drift, resolution, memory_limit_gib)
        solve_at, asked, notes = on_lattice(claim, lattice)
    solved, error, limits = refined(solve_at, asked, resolution)
    error += rounding(claim.spot0, claim.risk_aversion)
    return OptimalHedge(solved.value, error, *solved[1:], limits, notes)


def _check_terminal(payoff: Callable[..., Any], spot0: float) -> None:
    """By the claims' own word, or by paths of the same end where the payoff is the user's own."""
    own = payoff
    while isinstance(own, partial):
        own = own.func
    known = [(name, claim) for name, claim in CLAIMS.items() if claim.payoff is own]
    if known:
        name, claim = known[0]
        terminal, what = claim.terminal, f"{name} depends on the {claim.depends_on} of the path"
    else:
        ends = spot0 * np.array([0.8, 1.0, 1.25])
        owed = [[float(payoff(jnp.array(path))) for path in ([e], [e / 2, e], [2 * e, e])] for e in ends]
        terminal = all(np.array_equal(same_end, same_end[:1] * 3, equal_nan=True) for same_end in owed)
        what = "the payoff differs on paths of the same end"
    if not terminal:
        raise UsageError(
            f"solve_european covers claims on the last spot, {what}: fixed-strike lookback calls have "
            "solve_lookback, others are not covered"
        )


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
