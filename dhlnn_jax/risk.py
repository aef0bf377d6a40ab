"""Risk of a sample of PnL: measures (larger is riskier), their standard errors, the effective sample size.

The first room that sees the path axis. Every measure is `(pnl [n_paths], *, ..., weights=None) -> money`;
weights need not sum to one. A measure that is differentiable in its weights has its standard error from
`stderr`, by the derivative to them (the infinitesimal jackknife), clustered by group.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Real

Weights = Float[Array, " n_paths"] | None


def mean(pnl: Float[Array, " n_paths"], *, weights: Weights = None) -> Float[Array, ""]:
    """Weighted mean (of PnL, of costs, of anything that has one number a path)."""
    return jnp.average(_sample(pnl), weights=weights)


def standard_deviation(pnl: Float[Array, " n_paths"], *, weights: Weights = None) -> Float[Array, ""]:
    """Weighted standard deviation, divided by n.

    Numerics: the gradient at zero spread is 0 (the square root's would be infinite).
    """
    pnl = _sample(pnl)
    variance = jnp.average(jnp.square(pnl - mean(pnl, weights=weights)), weights=weights)
    none = variance <= 0
    return jnp.where(none, 0.0, jnp.sqrt(jnp.where(none, 1.0, variance)))


def entropic_risk_measure(
    pnl: Float[Array, " n_paths"], *, risk_aversion: Real[ArrayLike, ""], weights: Weights = None
) -> Float[Array, ""]:
    """(1 / lambda) log E exp(-lambda pnl), in money.

    Args:
      pnl: money. risk_aversion: lambda > 0, 1/money.
    Numerics: a log-sum-exp, so lambda |pnl| may be of any size. An estimate carried by few paths is no
      estimate: look at `effective_sample_size`.
    Source: paper Eq. (29), sign corrected; Foellmer and Schied (2002).
    """
    pnl = _sample(pnl)
    _check_positive("risk_aversion", risk_aversion)
    loss = -(risk_aversion * pnl)
    total = jnp.sum(weights) if weights is not None else jnp.asarray(pnl.shape[0], pnl.dtype)
    return (jax.nn.logsumexp(loss, b=weights) - jnp.log(total)) / risk_aversion


def quadratic_risk(
    pnl: Float[Array, " n_paths"], *, risk_aversion: Real[ArrayLike, ""], weights: Weights = None
) -> Float[Array, ""]:
    """Mean-variance risk -E pnl + (lambda / 2) Var pnl, in money: the entropic measure to second order."""
    pnl = _sample(pnl)
    _check_positive("risk_aversion", risk_aversion)
    centre = mean(pnl, weights=weights)
    return -centre + 0.5 * risk_aversion * mean(jnp.square(pnl - centre), weights=weights)


def expected_shortfall(
    pnl: Float[Array, " n_paths"], *, tail_prob: Real[ArrayLike, ""], weights: Weights = None
) -> Float[Array, ""]:
    """Mean loss over the worst fraction `tail_prob` of the sample, in money.

    The sample on the boundary enters with the fraction of it that completes the tail, so that the measure
    is continuous in `tail_prob` and coherent (a ceil(pN) tail is not).

    Args:
      tail_prob: worst fraction p in (0, 1]; "ES at alpha" is p = 1 - alpha.
    Source: paper Eq. (28); Acerbi and Tasche (2002), Definition 2.6.
    """
    pnl = _sample(pnl)
    _check_positive("tail_prob", tail_prob, most=1.0)
    loss, taken = _tail(pnl, tail_prob, weights)
    return jnp.sum(taken * loss) / jnp.sum(taken)


def value_at_risk(
    pnl: Float[Array, " n_paths"], *, tail_prob: Real[ArrayLike, ""], weights: Weights = None
) -> Float[Array, ""]:
    """Smallest loss in the worst fraction `tail_prob` of the sample, in money: the threshold of its tail.

    Numerics: the derivative to the weights is Bahadur's representation of a quantile, with the density
      from a difference quotient of the quantile over p (1 -+ 1/4); it is what `stderr` uses.
    Source: paper Eq. (28); Bahadur (1966).
    """
    pnl = _sample(pnl)
    _check_positive("tail_prob", tail_prob, most=1.0)
    if weights is None:
        weights = jnp.ones_like(pnl)
    return _value_at_risk(pnl, jnp.asarray(tail_prob, pnl.dtype), weights)


@jax.custom_jvp
def _value_at_risk(pnl: Array, tail_prob: Array, weights: Array) -> Array:
    loss, taken = _tail(pnl, tail_prob, weights)
    # Rounding of p * n may leave a speck of weight on the sample after the last one.
    in_tail = taken > 1e-6 * jnp.sum(taken)
    return jnp.min(jnp.where(in_tail, loss, jnp.inf))


@_value_at_risk.defjvp
def _value_at_risk_jvp(primals, tangents):
    pnl, tail_prob, weights = primals
    pnl_dot, tail_prob_dot, weights_dot = tangents
    threshold = _value_at_risk(pnl, tail_prob, weights)
    bandwidth = 0.25 * jnp.minimum(tail_prob, 1.0 - tail_prob)
    above = _value_at_risk(pnl, tail_prob - bandwidth, weights)
    below = _value_at_risk(pnl, tail_prob + bandwidth, weights)
    inverse_density = (above - below) / (2.0 * bandwidth)
    exceeds = jnp.where(-pnl > threshold, 1.0, 0.0) - tail_prob
    shift = jnp.sum(exceeds * weights_dot) / jnp.sum(weights) - tail_prob_dot
    on_threshold = jnp.where(-pnl == threshold, weights, 0.0)
    moved = -jnp.sum(on_threshold * pnl_dot) / jnp.sum(on_threshold)
    return threshold, moved + inverse_density * shift


def _tail(pnl: Array, tail_prob: ArrayLike, weights: Weights) -> tuple[Array, Array]:
    """Losses from the worst on, and the weight of each that lies within the worst fraction.

    What is not a number is worst of all, so that it is seen.
    """
    weights = jnp.ones_like(pnl) if weights is None else weights
    worst_first = jnp.argsort(jnp.where(jnp.isnan(pnl), -jnp.inf, pnl))
    sorted_weights = weights[worst_first]
    before = jnp.cumsum(sorted_weights) - sorted_weights
    return -pnl[worst_first], jnp.clip(tail_prob * jnp.sum(weights) - before, 0.0, sorted_weights)


def _sample(pnl: ArrayLike) -> Array:
    """One number a path. Raises: ValueError for other shapes, which reductions would mix up silently."""
    sample = jnp.asarray(pnl, jnp.result_type(pnl, float))
    if sample.ndim != 1:
        raise ValueError(
            f"a sample has one number a path, [n_paths]; got shape {sample.shape}: vmap over the other axes"
        )
    return sample


def _check_positive(name: str, number: ArrayLike, *, most: float = float("inf")) -> None:
    """Refuses a number out of range where it is known, that is but for traced ones."""
    if not isinstance(number, jax.core.Tracer) and not 0 < float(np.asarray(number)) <= most:
        and_at_most = f" and at most {most:g}" if np.isfinite(most) else ""
        raise ValueError(f"{name} must be above 0{and_at_most}, got {number}")


def exponential_loss(risk_aversion: ArrayLike) -> Callable[[Array], Array]:
    """L(x) = e^(lambda x) - (1 + log lambda) / lambda, whose certainty equivalent is the entropic measure.

    Source: paper Eq. (36).
    """
    return lambda x: jnp.exp(risk_aversion * x) - (1.0 + jnp.log(risk_aversion)) / risk_aversion


def optimized_certainty_equivalent(
    pnl: Float[Array, " n_paths"], *, loss: Callable[[Array], Array], weights: Weights = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """min over theta of theta + E L(-pnl - theta), and the minimizing theta; both in money.

    Args:
      loss: elementwise, convex, nondecreasing, of slope below 1 far left and above 1 far right.
    Numerics: theta by bisection on E L'(-pnl - theta) = 1 after a bracket has been doubled around the
      sample; the gradient of the value is that at fixed theta (envelope theorem).
    Source: paper Eq. (37); Ben-Tal and Teboulle (2007).
    """
    losses = -_sample(pnl)
    slope = jax.vmap(jax.grad(lambda x: loss(x)))

    def excess(theta: Array) -> Array:  # decreasing in theta
        return mean(slope(jax.lax.stop_gradient(losses) - theta), weights=weights) - 1.0

    low, high = jnp.min(losses), jnp.max(losses)
    width = jnp.maximum(high - low, 1.0)

    def widen(bracket):
        low, high, width = bracket
        return (
            jnp.where(excess(low) < 0, low - width, low),
            jnp.where(excess(high) > 0, high + width, high),
            2.0 * width,
        )

    def not_bracketed(bracket):
        low, high, width = bracket
        return ((excess(low) < 0) | (excess(high) > 0)) & (width < 1e12)

    low, high, _ = jax.lax.while_loop(not_bracketed, widen, jax.lax.stop_gradient((low, high, width)))

    def halve(_, bracket):
        low, high = bracket
        middle = 0.5 * (low + high)
        above = excess(middle) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, 80, halve, (low, high))
    theta = jax.lax.stop_gradient(0.5 * (low + high))
    return theta + mean(loss(losses - theta), weights=weights), theta


def effective_sample_size(
    pnl: Float[Array, " n_paths"], *, risk_aversion: Real[ArrayLike, ""]
) -> Float[Array, ""]:
    """(sum w)^2 / sum w^2 with w = exp(-lambda pnl): how many paths carry the entropic estimate.

    Source: Kong (1992).
    """
    pnl = _sample(pnl)
    _check_positive("risk_aversion", risk_aversion)
    log_weight = -(risk_aversion * pnl)
    return jnp.exp(2.0 * jax.nn.logsumexp(log_weight) - jax.nn.logsumexp(2.0 * log_weight))


RiskFn = Callable[..., Any]  # (pnl, *, weights) -> money


def influence(risk_fn: RiskFn, pnl: Float[Array, " n_paths"]) -> Float[Array, " n_paths"]:
    """Derivative of a risk to the weight of each path, at equal weights; sums to about zero.

    Source: infinitesimal jackknife, Efron (1982), Chapter 6.
    """
    pnl = _sample(pnl)
    return jax.grad(lambda weights: risk_fn(pnl, weights=weights))(jnp.ones_like(pnl))


def clustered_stderr(
    influences: Float[Array, " n_paths"], group_ids: Int[Array, " n_paths"] | None = None
) -> Float[Array, ""]:
    """Standard error of a statistic from the influence of each path, clustered by group.

    sqrt(G / (G - 1) sum_g (I_g - mean I)^2), I_g the sum over group g of G groups; NaN for one group.

    Source: Cameron and Miller (2015), Section II.
    """
    n_paths = influences.shape[0]
    if group_ids is None:
        sums, n_groups = influences, jnp.asarray(n_paths, influences.dtype)
        present = jnp.ones(n_paths, bool)
    else:
        _, ids, counts = jnp.unique(group_ids, return_inverse=True, return_counts=True, size=n_paths)
        sums = jax.ops.segment_sum(influences, ids, num_segments=n_paths)
        present = counts > 0
        n_groups = jnp.sum(present, dtype=influences.dtype)
    centred = jnp.where(present, sums - jnp.sum(sums) / n_groups, 0.0)
    return jnp.sqrt(n_groups / (n_groups - 1) * jnp.sum(jnp.square(centred)))


def stderr(
    risk_fn: RiskFn, pnl: Float[Array, " n_paths"], *, group_ids: Int[Array, " n_paths"] | None = None
) -> Float[Array, ""]:
    """Standard error of `risk_fn(pnl)`, in its unit.

    Args:
      risk_fn: `(pnl, *, weights) -> money`, differentiable in weights, as all measures here are once their
        hyper-parameters are bound (`functools.partial`). One that takes no weights, or takes them and does
        not look at them, is jackknifed instead.
      group_ids: paths of one group may depend on each other; None: every path for itself.
    Raises: ValueError for fewer than two paths.
    Numerics: the jackknife leaves out a hundredth of the groups at a time, so it is itself noisy by 7 %, and
      it needs concrete `group_ids` (no jit).
    """
    if _uses_weights(risk_fn, _sample(pnl)):
        return clustered_stderr(influence(risk_fn, pnl), group_ids)
    return _jackknife_stderr(risk_fn, (pnl,), group_ids)


def paired_stderr(
    risk_fn: RiskFn,
    pnl: Float[Array, " n_paths"],
    other: Float[Array, " n_paths"],
    *,
    group_ids: Int[Array, " n_paths"] | None = None,
) -> Float[Array, ""]:
    """Standard error of `risk_fn(pnl) - risk_fn(other)` for two hedgers on the same paths; as `stderr`."""
    if _uses_weights(risk_fn, _sample(pnl)):
        return clustered_stderr(influence(risk_fn, pnl) - influence(risk_fn, other), group_ids)
    return _jackknife_stderr(lambda pnl, other: risk_fn(pnl) - risk_fn(other), (pnl, other), group_ids)


def _uses_weights(risk_fn: RiskFn, pnl: Array) -> bool:
    """Whether the value depends on weights. Raises: ValueError for fewer than two paths."""
    if pnl.shape[0] < 2:
        raise ValueError(f"a standard error needs at least 2 paths, got {pnl.shape[0]}")
    parameters = inspect.signature(risk_fn).parameters.values()
    if not any(p.name == "weights" or p.kind is p.VAR_KEYWORD for p in parameters):
        return False
    # A `**kwargs` may swallow them, and a derivative of zero would pass for no error at all.
    traced = jax.make_jaxpr(lambda weights: risk_fn(pnl, weights=weights))(jnp.ones_like(pnl)).jaxpr
    (weights,) = traced.invars
    return any(used is weights for equation in traced.eqns for used in equation.invars)


def _jackknife_stderr(
    risk_fn: Callable[..., Any], samples: tuple[Array, ...], group_ids: Array | None
) -> Array:
    """Delete-a-block jackknife over at most 100 blocks of whole groups. Source: Shao and Tu (1995), 2.3."""
    n_paths = samples[0].shape[0]
    ids = np.arange(n_paths) if group_ids is None else np.unique(group_ids, return_inverse=True)[1]
    block = ids % 100
    left_out = [tuple(sample[block != b] for sample in samples) for b in range(block.max() + 1)]
    values = jnp.stack([risk_fn(*kept) for kept in left_out])
    n_blocks = values.shape[0]
    return jnp.sqrt((n_blocks - 1) / n_blocks * jnp.sum(jnp.square(values - jnp.mean(values))))
