"""The exact optimum for a fixed-strike lookback call: the running maximum joins the state.

The claim pays max(M_n - K, 0), M_i = max(p_0, .., p_i), which is m_n - K with m_i = max(M_i, K). With what is
owed for certain taken out, L = lambda (m - K) + R, one step from m and p <= m is

  G(p, m, delta) = log E exp(lambda (m' - m) + R'(P', m', delta) - lambda delta (P' - p)),  m' = max(m, P').

At a given drawdown p/m, R depends on m only as on the scale of lambda, so that a few m suffice; the drawdown
is resolved like the spot of a European claim. Everything else is the recursion of `bellman`.
"""

from typing import NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import CubicSpline

from dhlnn_jax.bellman import (
    CUT,
    BandTables,
    Solved,
    backward,
    check_memory,
    check_numbers,
    check_path,
    linear_tail,
    log_expectation,
    log_grid,
    normal_step,
    refined,
    rounding,
    tail_notes,
)
from dhlnn_jax.errors import UsageError
from dhlnn_jax.market import MarketPath
from dhlnn_jax.settings import Settings

_SPOTS = 12  # log drawdowns per deviation of one step: the kink at P' = m needs more than `optimal_terminal`
_MAXIMA = 18  # values of m, denser where the path starts
# Weights of the trapezoidal rule at an end of an interval, in error O(h^6) (Gregory).
_END_WEIGHTS = np.array([95 / 288, 317 / 240, 23 / 30, 793 / 720, 157 / 160])


class LookbackHedge(NamedTuple):
    """The optimum for a fixed-strike lookback call.

    Attributes:
      value, error, hedge_ratio_limits, notes: as in `optimal.OptimalHedge`.
      strike: money.
      maximum: [n_maximum], m = max(running maximum, strike), ascending; money.
      log_drawdown: [n_drawdown], log(spot / m) <= 0, ascending and equally spaced.
      band_lower, band_upper: edges of the no-transaction band, [n_steps, n_maximum, n_drawdown].
    """

    value: float
    error: float
    strike: float
    maximum: np.ndarray
    log_drawdown: np.ndarray
    band_lower: np.ndarray
    band_upper: np.ndarray
    hedge_ratio_limits: tuple[float, float]
    notes: tuple[str, ...]

    @property
    def tables(self) -> BandTables:
        """The arrays that the band is read from."""
        return {
            "strike": self.strike,
            "log_maximum": np.log(self.maximum),
            "first": self.log_drawdown[0],
            "spacing": self.log_drawdown[1] - self.log_drawdown[0],
            "lower": self.band_lower,
            "upper": self.band_upper,
        }

    def band(self, path: MarketPath, settings: Settings) -> tuple[jax.Array, jax.Array]:
        """`band_from` of its own tables; what the settings say is not looked at."""
        return self.band_from(self.tables, path)

    @staticmethod
    def band_from(tables: BandTables, path: MarketPath) -> tuple[jax.Array, jax.Array]:
        """Edges along an observed path [n_steps]: linear in log(m) and the log drawdown, constant beyond."""
        check_path(path, tables["lower"])
        dtype = path.spot.dtype
        maximum = jnp.maximum(jax.lax.cummax(path.spot), jnp.asarray(tables["strike"], dtype))
        grid = jnp.asarray(tables["log_maximum"], dtype)
        first, spacing = tables["first"], tables["spacing"]
        at = (
            jnp.arange(len(path.spot), dtype=dtype),
            jnp.interp(jnp.log(maximum), grid, jnp.arange(len(grid), dtype=dtype)),
            (jnp.log(path.spot / maximum) - jnp.asarray(first, dtype)) / jnp.asarray(spacing, dtype),
        )
        lower, upper = (
            jax.scipy.ndimage.map_coordinates(jnp.asarray(edge, dtype), at, order=1, mode="nearest")
            for edge in (tables["lower"], tables["upper"])
        )
        return lower, upper


def solve_lookback(
    *,
    strike: SupportsFloat,
    spot0: SupportsFloat = 1.0,
    volatility: SupportsFloat,
    drift: SupportsFloat = 0.0,
    n_steps: int,
    dt: SupportsFloat,
    cost_rate: SupportsFloat,
    risk_aversion: SupportsFloat,
    liquidate: bool = False,
    resolution: float = 1.0,
    memory_limit_gib: float = 4.0,
) -> LookbackHedge:
    """Optimal value and band for the seller of a lookback call on max_i p_i, i = 0..n_steps, p_0 included.

    Args: as in `optimal.solve_european`.
    Returns: the optimum with its error, band and notes; `optimal.optimal_policy` turns it into a hedger.
    Raises: UsageError for numbers out of range and more memory than the limit.
    Numerics: tails as in `optimal.solve_european`. The density is split at P' = m, where L has a kink.
    """
    numbers = check_numbers(spot0, volatility, dt, cost_rate, risk_aversion, n_steps, resolution)
    p0, rate, scale, n = numbers
    if not 0 < float(strike) < np.inf:
        raise UsageError(f"strike must be positive and finite, got {float(strike):g}")
    step = normal_step(volatility, drift, dt)
    deviation, shift = step.deviation * np.sqrt(n), n * step.mean
    start = max(np.log(p0), np.log(float(strike)))
    drawdown0 = float(np.log(p0) - start)
    lowest = drawdown0 + min(0.0, shift) - CUT * deviation
    highest = start + max(0.0, shift) + CUT * deviation
    rows = _MAXIMA * resolution * (_SPOTS * resolution * -lowest / step.deviation)
    check_memory(rows, n, resolution, memory_limit_gib)

    def solve_at(resolution: float, hedge_ratio: np.ndarray) -> Solved:
        grid = log_grid(step, lowest, 0.0, 0.0, _SPOTS * resolution)
        log_max = (
            start + (highest - start) * np.linspace(0.0, 1.0, max(6, round(_MAXIMA * resolution))) ** 1.5
        )
        below, excess = grid.node[: grid.reach], grid.node[-grid.reach :]
        # states and nodes are (log drawdown, log maximum); nodes above 0 are a rise of the maximum
        shape = len(grid.row), len(log_max), len(hedge_ratio)
        spot, node_spot = np.exp(grid.row[:, None] + log_max), np.exp(grid.node[:, None] + log_max)
        risen = np.minimum(excess[:, None] + log_max, highest)
        across = CubicSpline(log_max, np.eye(len(log_max)))(risen)  # [reach, n_maximum, n_maximum]
        owed_more = scale * np.exp(log_max) * np.expm1(excess)[:, None]
        ends, zero = np.log(_END_WEIGHTS), len(grid.node) - grid.reach - 1
        end_weight = np.zeros(len(grid.node))
        end_weight[zero - len(ends) + 1 : zero + len(ends)] = np.append(ends[::-1], ends[1:])
        end_weight[zero] += np.log(2.0)
        missing = log_expectation(end_weight[:, None], grid.weights, 0, len(grid.row))  # to a sum of 1

        def expected(i: int, cost_to_go: np.ndarray | None) -> np.ndarray:
            if cost_to_go is None:
                cost_to_go = liquidate * scale * rate * spot.reshape(-1, 1) * np.abs(hedge_ratio)
            later = cost_to_go.reshape(len(grid.row), -1)
            falling = linear_tail(later, np.exp(grid.row), np.exp(below), end=0)
            rising = across @ cost_to_go.reshape(shape)[-1] + owed_more[:, :, None]
            exponent = np.concatenate([falling, later, rising.reshape(len(excess), -1)])
            exponent += end_weight[:, None]
            exponent -= (node_spot[:, :, None] * (scale * hedge_ratio)).reshape(exponent.shape)
            mean = log_expectation(exponent, grid.weights, 0, len(grid.row)) - missing
            return mean.reshape(-1, len(hedge_ratio)) + spot.reshape(-1, 1) * (scale * hedge_ratio)

        marginal = scale * rate * spot.ravel()
        value, lower, upper = backward(expected, lambda i: marginal, hedge_ratio, n, kinked=liquidate)
        unhedged = value.reshape(shape)[:, 0, np.argmin(np.abs(hedge_ratio))]
        at_start = float(CubicSpline(grid.row, unhedged)(drawdown0))
        owed = np.exp(start) - float(strike)
        edges = (np.array(edge).reshape(n, *spot.shape).swapaxes(1, 2) for edge in (lower, upper))
        return Solved(float(owed + at_start / scale), (np.exp(log_max), grid.row), *edges)

    drifting = step.growth / (scale * p0 * step.deviation**2)
    asked = min(0.0, drifting), max(1.0, 1.0 + drifting)
    solved, error, limits = refined(solve_at, asked, resolution)
    notes = tail_notes(scale * p0 * deviation)
    maximum, log_drawdown = solved.coordinates
    return LookbackHedge(
        solved.value,
        error + rounding(p0, scale),
        float(strike),
        maximum,
        log_drawdown,
        solved.band_lower,
        solved.band_upper,
        limits,
        notes,
    )
