"""Where hedging is worth its cost: the risks of four hedgers over risk aversion and cost, and their picture.

The seller of an at-the-money European call (spot and strike 1, 30 daily steps, zero drift) hedges optimally,
not at all, by the delta, or to the edge of Whalley-Wilmott bands. Two numbers without unit decide:

  size = lambda P_0 sigma sqrt(T),  relative cost = c / (sigma sqrt(T)),

because prices, risks and costs are proportional to sigma sqrt(T) while that is small. Between volatilities
0.1 and 0.2 the `removed` share differs by at most 0.025 for sizes up to 1 and by 0.04 up to 8
(lognormal tails), so that one map serves both; the marked settings are computed at their own volatility.

No number is simulated: the optimum is `solve_european`'s, no hedge a quadrature, and the two rules the same
recursion with their bands in place of the optimal ones. Twice the resolution moves the rules by less than
4e-4 of their value, the optimum by less. From size 5 on all depends on where normals are cut (here at 10):
that part is hatched.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import CubicSpline

from dhlnn_jax import resumable
from dhlnn_jax.bellman import CUT, linear_tail, log_expectation, log_grid, normal_step
from dhlnn_jax.hedge import european_call_delta, whalley_wilmott_band
from dhlnn_jax.market import MarketPath
from dhlnn_jax.optimal import solve_european
from dhlnn_jax.optimal_terminal import SPOTS
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.settings import Settings, make_settings
from dhlnn_jax.unhedged import unhedged_law

N_STEPS, DT = 30, 1 / 365
SIZES, RELATIVE_COSTS = (0.02, 8.0), (0.005, 0.5)  # the ends of the map
NO_TRADE = 1e-3  # the optimum counts as never trading where it removes less than this share


_payoff = jax.jit(partial(CLAIMS["european_call"].payoff, strike=1.0))


class Setting(NamedTuple):
    """A hedging problem of the map: volatility per square root of a year, 1/money, fraction of notional."""

    volatility: float
    risk_aversion: float
    cost_rate: float

    @property
    def size(self) -> float:
        return self.risk_aversion * deviation(self.volatility)

    @property
    def relative_cost(self) -> float:
        return self.cost_rate / deviation(self.volatility)


MARKED = {
    "paper 0.2 %": Setting(0.1, 1.0, 2e-3),
    "paper 0.4 %": Setting(0.1, 1.0, 4e-3),
    "paper 0.6 %": Setting(0.1, 1.0, 6e-3),  # the paper has this and the next at strike 1.2,
    "paper 0.8 %": Setting(0.1, 1.0, 8e-3),  # where there is not even a liability
    "ntb_notebook.toml": Setting(0.2, 1.0, 1e-3),  # less its quirks: 30 trades, no drift
    "quickstart.toml": Setting(0.2, 50.0, 2e-3),
    "benchmark_european.toml": Setting(0.2, 50.0, 5e-3),
}


class Risks(NamedTuple):
    """Entropic risks of the sold call, money, larger is worse; `frictionless` is the Black-Scholes price."""

    optimum: float
    no_hedge: float
    delta: float
    whalley_wilmott: float
    frictionless: float

    @property
    def saving(self) -> float:
        """Share of the unhedged risk that the optimum saves."""
        return 1.0 - self.optimum / self.no_hedge

    @property
    def removed(self) -> float:
        """Share of what not hedging costs beyond the Black-Scholes price that the optimum removes."""
        return (self.no_hedge - self.optimum) / (self.no_hedge - self.frictionless)


def deviation(volatility: float) -> float:
    """sigma sqrt(T), without unit."""
    return volatility * (N_STEPS * DT) ** 0.5


def risks_of(setting: Setting, *, resolution: float = 0.5) -> Risks:
    """The four risks and the frictionless price in one setting.

    Args:
      resolution: factor on the numbers of spots and hedge ratios.
    Raises: UsageError for numbers out of range.
    """
    claim, scale = CLAIMS["european_call"], setting.risk_aversion
    solution = solve_european(
        _payoff,
        n_steps=N_STEPS,
        dt=DT,
        resolution=resolution,
        **setting._asdict(),
    )
    with jax.enable_x64(True):
        settings = make_settings(n_steps=N_STEPS, dt=DT, **setting._asdict())
        law = unhedged_law(claim, settings, n_steps=N_STEPS)
    top = scale * law.payoff.max()
    no_hedge = (np.log(law.probability @ np.exp(scale * law.payoff - top)) + top) / scale
    delta, whalley_wilmott = (
        rule_risk(band, setting, resolution=resolution) for band in (_delta_band, whalley_wilmott_band)
    )
    return Risks(solution.value, float(no_hedge), delta, whalley_wilmott, float(law.probability @ law.payoff))


Band = Callable[[MarketPath, Settings], tuple[jax.Array, jax.Array]]


def _delta_band(path: MarketPath, settings: Settings) -> tuple[jax.Array, jax.Array]:
    delta = european_call_delta(path, settings)
    return delta, delta


def rule_risk(band: Band, setting: Setting, *, resolution: float = 0.5) -> float:
    """Entropic risk of the call hedged to the nearer edge of a given band, by backward induction; money.

    With e the nearest point to d of the band at (t_i, p), and G_i as in `optimal`,

      L_n(p, d) = lambda max(p - 1, 0),
      L_i(p, d) = lambda c p |e - d| + G_i(p, e),  risk = L_0(1, 0) / lambda.

    Args:
      band: the edges along an observed path, [n_steps], each a function of the spot at that time alone.
    Numerics: edges are cut to [0, 1], beyond which a hedger that starts at 0 never goes if the delta of a
      call lies in its band. G is a cubic spline in d. Normals are cut at 10.
    """
    volatility, scale, cost_rate = setting
    step = normal_step(volatility, 0.0, DT)
    reach = CUT * deviation(volatility)
    grid = log_grid(step, N_STEPS * step.mean - reach, reach, 0.0, SPOTS * resolution)
    spot, after, m = np.exp(grid.row), np.exp(grid.node), grid.reach
    start = int(np.argmin(np.abs(grid.row)))
    lower, upper = np.clip(_edges(band, spot, setting), 0.0, 1.0)
    ratios = np.linspace(0.0, 1.0, round(128 * resolution) + 1)
    basis = CubicSpline(ratios, np.eye(len(ratios)))  # edges -> weights of G at the nodes
    owed = np.maximum(spot - 1.0, 0.0)
    # Euler and Maclaurin's term for the kink of the payoff, which stands on a node of the trapezoidal rule.
    owed[start] += (grid.row[1] - grid.row[0]) / 12.0
    cost_to_go = np.repeat(scale * owed[:, None], len(ratios), axis=1)
    for i in reversed(range(N_STEPS)):
        below = linear_tail(cost_to_go, spot, after[:m], end=0)
        above = linear_tail(cost_to_go, spot, after[-m:], end=-1)
        exponent = np.concatenate([below, cost_to_go, above]) - scale * after[:, None] * ratios
        holding = log_expectation(exponent, grid.weights, 0, len(spot)) + scale * spot[:, None] * ratios
        at_lower, at_upper = (np.sum(basis(e[:, i]) * holding, axis=1) for e in (lower, upper))
        bought = np.maximum(lower[:, i, None] - ratios, 0.0)
        sold = np.maximum(ratios - upper[:, i, None], 0.0)
        cost_to_go = np.where(bought > 0, at_lower[:, None], np.where(sold > 0, at_upper[:, None], holding))
        cost_to_go += scale * cost_rate * spot[:, None] * (bought + sold)
    return float(cost_to_go[start, 0]) / scale


def _edges(band: Band, spot: np.ndarray, setting: Setting) -> np.ndarray:
    """Both edges at every spot and time, [2, n_spot, n_steps]."""
    with jax.enable_x64(True):
        settings = make_settings(n_steps=N_STEPS, dt=DT, **setting._asdict())
        at_rest = jnp.repeat(jnp.asarray(spot)[:, None], N_STEPS, axis=1)
        return np.array(_bands(band, at_rest, settings))


@partial(jax.jit, static_argnums=0)
def _bands(band: Band, spot: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(lambda path: band(MarketPath(path), settings))(spot)


class RegimeMap(NamedTuple):
    """Risks at one volatility, risks[j][i] at relative_costs[j] and sizes[i]."""

    volatility: float
    sizes: np.ndarray
    relative_costs: np.ndarray
    risks: list[list[Risks]]

    def of(self, number: Callable[[Risks], float]) -> np.ndarray:
        """A number of every cell, [n_costs, n_sizes]."""
        return np.array([[number(risks) for risks in row] for row in self.risks])

    def setting(self, j: int, i: int) -> Setting:
        scale = deviation(self.volatility)
        return Setting(self.volatility, float(self.sizes[i]) / scale, float(self.relative_costs[j]) * scale)


def regime_map(
    volatility: float, sizes: np.ndarray, relative_costs: np.ndarray, *, checkpoint_folder: Path | None = None
) -> RegimeMap:
    """The map over a grid; some 0.4 s a cell.

    Args:
      checkpoint_folder: of a map begun there (`resumable.begin`), keeps every row that is done; those that it
        has are not computed again. None keeps none.
    Raises: UsageError for numbers out of range.
    """
    empty = RegimeMap(volatility, sizes, relative_costs, [])
    with progress_bar("regime map", total=len(sizes) * len(relative_costs)) as advance:

        def cell(j: int, i: int) -> Risks:
            risks = risks_of(empty.setting(j, i))
            advance(note=f"size {sizes[i]:.2g}, relative cost {relative_costs[j]:.2g}")
            return risks

        def row(j: int) -> list[Risks]:
            return [cell(j, i) for i in range(len(sizes))]

        def kept(j: int) -> list[Risks]:
            if resumable.is_kept(checkpoint_folder, f"row_{j}"):
                advance(len(sizes))
            return [Risks(*each) for each in resumable.kept(checkpoint_folder, f"row_{j}", lambda: row(j))]

        return empty._replace(risks=[kept(j) for j in range(len(relative_costs))])
