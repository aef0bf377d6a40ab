"""The exact law of an unhedged claim under geometric Brownian motion, as nodes and weights.

At the risk aversions where hedging matters the entropic risk of the bare claim cannot be simulated: a handful
of paths carries it. It is a one-dimensional integral, and any risk measure of `risk` evaluates it when given
the nodes as PnL and the probabilities as weights. Host-level, float64.
"""

from typing import NamedTuple

import numpy as np
from jax.tree_util import Partial
from scipy.special import ndtr

from dhlnn_jax.payoff import Claim, payoff_at
from dhlnn_jax.settings import Settings

# Beyond 10 standard deviations nothing moves for lambda P_0 sigma sqrt(T) up to about 3; see `unhedged_law`.
_CUT = 10.0
_PANEL_NODES = 16
# Panel width of the returned law in standard deviations (of the end, or of one step for the maximum): the
# integrals need 20 times fewer nodes, but a quantile is only as fine as the nodes are dense.
_FINE = 0.05


class UnhedgedLaw(NamedTuple):
    """A discrete law: payoff in money and its probability, each [n_nodes]; probabilities sum to 1."""

    payoff: np.ndarray
    probability: np.ndarray


def unhedged_law(claim: Claim, settings: Settings, *, n_steps: int) -> UnhedgedLaw:
    """Law of the payoff of a claim on the last spot, or on the maximum over the n_steps + 1 spots.

    Gauss-Legendre nodes in standard normals (terminal) or in the log of the maximum, cut at 10 standard
    deviations; a panel edge stands at the strike, so that the kink of a call or put costs no accuracy.

    Args:
      settings: of the market that is simulated (its volatility and drift, not the hedger's belief).
    Raises: ValueError for a claim that depends on more of the path.
    Numerics: the entropic risk of a short call under GBM is infinite; what is computed is that of normals
      cut at 10. For lambda P_0 sigma sqrt(T) up to about 3 the cut does not matter between 10 and 800, from
      about 5 on there is no such plateau.
    """
    volatility, drift, dt = (float(x) for x in (settings.volatility, settings.drift, settings.dt))
    spot0, strike = float(settings.spot0), float(settings.strike)
    step_mean = (drift - 0.5 * volatility**2) * dt
    step_deviation = volatility * np.sqrt(dt)
    if claim.depends_on == "terminal":
        mean, deviation = n_steps * step_mean, np.sqrt(n_steps) * step_deviation
        kink = (np.log(strike / spot0) - mean) / deviation if strike > 0 and deviation > 0 else 0.0
        z, weight = _panels(-_CUT, _CUT, width=_FINE, edge=kink)
        log_spot, probability = mean + deviation * z, weight * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    elif claim.depends_on == "maximum":
        log_spot, probability = _maximum_law(
            step_mean, step_deviation, n_steps, kink=np.log(strike / spot0) if strike > 0 else 0.0
        )
    else:
        raise ValueError("the unhedged law is known for claims on the last spot or the maximum only")
    payoff = payoff_at(Partial(claim.payoff, strike=strike), spot0 * np.exp(log_spot))
    return UnhedgedLaw(payoff, probability / probability.sum())


def _panels(low: float, high: float, *, width: float, edge: float) -> tuple[np.ndarray, np.ndarray]:
    """Composite Gauss-Legendre nodes and weights on [low, high], with a panel edge at `edge` if inside."""
    edges = np.linspace(low, high, int(np.ceil((high - low) / width)) + 1)
    if low < edge < high:
        edges = np.unique(np.append(edges, edge))
    x, w = np.polynomial.legendre.leggauss(_PANEL_NODES)
    half = 0.5 * np.diff(edges)[:, None]
    centre = 0.5 * (edges[1:] + edges[:-1])[:, None]
    return (centre + half * x).ravel(), (half * w).ravel()


def _maximum_law(
    step_mean: float, step_deviation: float, n_steps: int, *, kink: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes m and probabilities of max(0, X_1, .., X_n) for a Gaussian random walk X from 0.

    P(max > m) = u_n(m), where u_i(z), the chance to rise by more than z within i steps, obeys
      u_i(z) = P(step > z) + int_0^inf u_{i-1}(z') density(step = z - z') dz',  u_0 = 0.
    u is smooth on z > 0, so Gauss-Legendre panels of two step deviations integrate it to rounding. The
    density of the maximum is -u_n', from the recursion differentiated once; its atom at 0 is 1 - u_n(0).
    """
    if step_deviation == 0:
        return np.array([max(0.0, n_steps * step_mean)]), np.array([1.0])
    reach = _CUT * np.sqrt(n_steps) * step_deviation + max(0.0, n_steps * step_mean)
    z, z_weight = _panels(0.0, reach, width=2.0 * step_deviation, edge=kink)

    def step_density(rise: np.ndarray) -> np.ndarray:
        scaled = (rise - step_mean) / step_deviation
        return np.exp(-0.5 * scaled**2) / (np.sqrt(2 * np.pi) * step_deviation)

    def exceed(rise: np.ndarray) -> np.ndarray:
        return ndtr((step_mean - rise) / step_deviation)

    kernel = step_density(z[:, None] - z)
    survival = np.zeros_like(z)  # u_{n-1}
    for _ in range(n_steps - 1):
        survival = exceed(z) + kernel @ (z_weight * survival)

    maximum, weight = _panels(0.0, reach, width=2.0 * _FINE * step_deviation * np.sqrt(n_steps), edge=kink)
    rise = maximum[:, None] - z
    slope = -(rise - step_mean) / step_deviation**2 * step_density(rise)
    density = step_density(maximum) - slope @ (z_weight * survival)
    zero = np.zeros(1)
    atom = 1.0 - exceed(zero) - step_density(-z[None, :]) @ (z_weight * survival)
    return np.append(maximum, zero), np.append(weight * density, atom)
