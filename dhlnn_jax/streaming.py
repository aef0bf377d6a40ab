"""Statistics of hedgers over a stream of paths: what `evaluate.measure` reports, in memory of one size.

The money of several hedgers on the same paths comes chunk by chunk; `statistics` of a chunk are sums, so that
`merge` adds them up in any order, and `summary` turns the total into metrics and standard errors. Sums are
good to rounding, whatever the chunks; a quantile is known up to the bin of `Grid` that it falls into. An
expected shortfall is known far better, as only the part of its tail inside that bin is uncertain; `summary`
bounds both errors.

Everything runs in float64 (float32 stops counting at 1.7e7): call it under `jax.enable_x64(True)`. The money
itself may be float32. Paths are taken to be independent, so antithetic or recorded ones do not belong here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dhlnn_jax.evaluate import HedgedPaths

_COLUMNS = ("pnl", "trading_cost", "turnover", "trade_frequency", "round_trip")


class Grid(NamedTuple):
    """What is fixed before the stream begins; statistics of different grids cannot be merged.

    Attributes:
      risk_aversion: lambda > 0, 1/money. tail_prob: worst fraction p in (0, 1].
      centre: [n_columns, n_hedgers], about which moments are taken; anything near the means.
      edges: [n_hedgers, n_bins + 1], equally spaced losses; a bin on either side takes all beyond.
    """

    risk_aversion: Array
    tail_prob: Array
    centre: Array
    edges: Array


class Statistics(NamedTuple):
    """Sums over the paths so far, of size independent of their number.

    Attributes:
      n_paths: so far.
      powers: [4, n_columns, n_hedgers], sums of (x - centre)^k for k = 1 to 4.
      shift: [n_hedgers], the largest log weight -lambda pnl; weights are w = exp(-lambda pnl - shift).
      weights: [n_hedgers], sums of w. products: [n_hedgers, n_hedgers], sums of w_a w_b.
      bins: [3, n_hedgers, n_bins + 2], number, sum and sum of squares of the losses in each bin.
      least, most: [n_hedgers], the extreme losses.
    """

    n_paths: Array
    powers: Array
    shift: Array
    weights: Array
    products: Array
    bins: Array
    least: Array
    most: Array


class Summary(NamedTuple):
    """The total as numbers, each array [n_hedgers].

    Attributes:
      values, stderrs: metric of `evaluate.metrics_of` -> numbers.
      binning_errors: expected_shortfall, value_at_risk -> bound on what the bins hide of the value, money.
      effective_sample_size: paths that carry the entropic estimate.
      paired_stderr: [n_hedgers, n_hedgers], of the difference of two entropic risks on the same paths.
    """

    values: dict[str, np.ndarray]
    stderrs: dict[str, np.ndarray]
    binning_errors: dict[str, np.ndarray]
    effective_sample_size: np.ndarray
    paired_stderr: np.ndarray


def make_grid(pilot: HedgedPaths, *, risk_aversion: float, tail_prob: float, n_bins: int = 4096) -> Grid:
    """Grid for a stream that begins like `pilot`.

    The bins cover the quantiles at p and at p -+ h, h = min(p, 1 - p) / 4, which the standard error of the
    value at risk needs, and four standard errors of the pilot beyond them.

    Args:
      pilot: money, [n_hedgers, n_paths]. n_bins: without the two open ones.
    """
    columns = np.stack([np.asarray(getattr(pilot, name), float) for name in _COLUMNS])
    worst_first = -np.sort(columns[0], axis=-1)
    n_paths = worst_first.shape[-1]
    bandwidth = _bandwidth(tail_prob)
    least, most = n_paths * (tail_prob - bandwidth), n_paths * (tail_prob + bandwidth)
    ranks = np.ceil([most + 4 * np.sqrt(most), least - 4 * np.sqrt(least)]).astype(int)
    low, high = worst_first[:, np.clip(ranks, 1, n_paths) - 1].T
    high = np.maximum(high, low + 1e-6 * np.maximum(np.abs(low), 1.0))  # no bin is empty on an atom
    return Grid(
        risk_aversion=jnp.asarray(float(risk_aversion)),
        tail_prob=jnp.asarray(float(tail_prob)),
        centre=jnp.asarray(columns.mean(axis=-1)),
        edges=jnp.asarray(np.linspace(low, high, n_bins + 1, axis=-1)),
    )


def _bandwidth(tail_prob: float) -> float:
    return 0.25 * min(tail_prob, 1.0 - tail_prob)


def statistics(money: HedgedPaths, grid: Grid) -> Statistics:
    """Statistics of one chunk; pure, the caller jits it.

    Args:
      money: [n_hedgers, n_paths], float32 or float64.
    Raises: ValueError outside `jax.enable_x64(True)`.
    Numerics: the shift is the chunk's largest log weight, so lambda |pnl| may be of any size.
    """
    _require_float64()
    columns = jnp.stack([jnp.asarray(getattr(money, name), float) for name in _COLUMNS])
    centred = columns - grid.centre[:, :, None]
    loss = -columns[0]
    log_weight = grid.risk_aversion * loss
    shift = jnp.max(log_weight, axis=-1)
    weight = jnp.exp(log_weight - shift[:, None])
    return Statistics(
        n_paths=jnp.asarray(float(loss.shape[-1])),
        powers=jnp.stack([jnp.sum(centred**k, axis=-1) for k in (1, 2, 3, 4)]),
        shift=shift,
        weights=jnp.sum(weight, axis=-1),
        products=weight @ weight.T,
        bins=jax.vmap(_binned, out_axes=1)(loss, grid.edges),
        least=jnp.min(loss, axis=-1),
        most=jnp.max(loss, axis=-1),
    )


def _require_float64() -> None:
    if jnp.result_type(float) != jnp.float64:
        raise ValueError("streaming statistics are float64: call them under jax.enable_x64(True)")


def _binned(loss: Array, edges: Array) -> Array:
    """Number, sum and sum of squares by bin, [3, n_bins + 2]."""
    n_bins = edges.shape[0] - 1
    position = (loss - edges[0]) / (edges[-1] - edges[0]) * n_bins + 1.0
    index = jnp.clip(jnp.floor(position), 0, n_bins + 1).astype(jnp.int32)
    # One scatter a number: a scatter of triples is three times slower on a CPU.
    numbers = (jnp.ones_like(loss), loss, jnp.square(loss))
    return jnp.stack([jax.ops.segment_sum(x, index, num_segments=n_bins + 2) for x in numbers])


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the paths of both, which must have been taken on one grid.

    Raises: as `statistics`.
    """
    _require_float64()
    shift = jnp.maximum(a.shift, b.shift)
    scale_a, scale_b = jnp.exp(a.shift - shift), jnp.exp(b.shift - shift)
    return Statistics(
        n_paths=a.n_paths + b.n_paths,
        powers=a.powers + b.powers,
        shift=shift,
        weights=scale_a * a.weights + scale_b * b.weights,
        products=jnp.outer(scale_a, scale_a) * a.products + jnp.outer(scale_b, scale_b) * b.products,
        bins=a.bins + b.bins,
        least=jnp.minimum(a.least, b.least),
        most=jnp.maximum(a.most, b.most),
    )


def update(total: Statistics, money: HedgedPaths, grid: Grid) -> Statistics:
    """The total with one more chunk; pure, the caller jits it."""
    return merge(total, statistics(money, grid))


def summary(total: Statistics, grid: Grid) -> Summary:
    """Metrics and standard errors of a stream; host-level numpy.

    Standard errors are those of `risk.stderr`, sqrt(n / (n - 1) sum_i (I_i - mean I)^2) with influences

      entropic risk       (w_i / sum w - 1 / n) / lambda
      mean, deviation s   (x_i - mean) / n,  ((x_i - mean)^2 - s^2) / (2 s n)
      expected shortfall  ((loss_i - VaR)^+ / p + VaR - ES) / n
      value at risk       (1{loss_i > VaR} - p) / (n density),  density from the quantiles at p -+ h

    and the paired one is that of I_a - I_b.

    Numerics: a value at risk is interpolated in its bin, an expected shortfall takes the middle of what its
      boundary bin allows; a loss atom at the quantile counts as if it were spread over its bin.
    """
    total, grid = jax.tree.map(lambda x: np.asarray(x, float), (total, grid))
    n, weights, risk_aversion = float(total.n_paths), total.weights, float(grid.risk_aversion)
    with np.errstate(invalid="ignore", divide="ignore"):  # what is not finite is reported as such
        tails = [_tail(*of_one, n, float(grid.tail_prob)) for of_one in _bins_of_each(total, grid)]
        shortfall, threshold = (_Estimate(*np.transpose(column)) for column in zip(*tails, strict=True))
        cross = (total.products / np.outer(weights, weights) - 1.0 / n) / risk_aversion**2
        own = np.diagonal(cross)
        estimates = {
            "entropic_risk_measure": _Estimate((np.log(weights / n) + total.shift) / risk_aversion, own),
            "expected_shortfall": shortfall,
            "value_at_risk": threshold,
            **_moments(total, grid, n),
        }
        return Summary(
            {name: estimate.value for name, estimate in estimates.items()},
            {name: _stderr(n, estimate.squares) for name, estimate in estimates.items()},
            {"expected_shortfall": shortfall.error, "value_at_risk": threshold.error},
            np.square(weights) / np.diagonal(total.products),
            _stderr(n, own[:, None] + own[None, :] - 2.0 * cross),
        )


class _Estimate(NamedTuple):
    value: Any
    squares: Any  # sum of the squared influences
    error: Any = 0.0  # what the bins hide


def _stderr(n: float, squares: np.ndarray) -> np.ndarray:
    """Rounding may leave a sum of squares a hair below zero."""
    return np.sqrt(n / (n - 1.0) * np.maximum(squares, 0.0))


def _moments(total: Statistics, grid: Grid, n: float) -> dict[str, _Estimate]:
    first, second, third, fourth = total.powers / n
    mean, variance = grid.centre + first, np.maximum(second - first**2, 0.0)
    fourth_central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    # Without any spread the derivative of the deviation is 0, as that of `risk.standard_deviation`.
    of_deviation = (fourth_central - variance**2) / (4 * n * np.where(variance == 0, np.inf, variance))
    means = [_Estimate(mean[i], variance[i] / n) for i in range(len(_COLUMNS))]
    return {
        "pnl_mean": means[0],
        "pnl_std": _Estimate(np.sqrt(variance[0]), of_deviation[0]),
        **{f"{name}_mean": estimate for name, estimate in zip(_COLUMNS[1:], means[1:], strict=True)},
    }


def _bins_of_each(total: Statistics, grid: Grid) -> list[tuple[Any, Any]]:
    """Bins [3, n_bins + 2] and their n_bins + 3 edges, no wider than the losses seen."""
    least, most = total.least[:, None], total.most[:, None]
    edges = np.clip(np.concatenate([least, grid.edges, most], axis=1), least, most)
    return [(total.bins[:, i], edges[i]) for i in range(edges.shape[0])]


class _Quantile(NamedTuple):
    loss: float
    error: float
    bin: int
    taken: float  # paths of the bin that lie in the tail


def _quantile(counts: np.ndarray, edges: np.ndarray, tail: float) -> _Quantile:
    """Smallest loss of the worst `tail` paths."""
    at_least = np.cumsum(counts[::-1])[::-1]
    # Rounding of p * n must not reach for one path more.
    bin = max(int(np.count_nonzero(at_least >= tail * (1.0 - 1e-9))) - 1, 0)
    taken = min(float(tail - (at_least[bin] - counts[bin])), counts[bin])
    low, high = edges[bin : bin + 2]
    loss = high - taken / counts[bin] * (high - low)
    return _Quantile(loss, max(high - loss, loss - low), bin, taken)


def _tail(bins: np.ndarray, edges: np.ndarray, n: float, tail_prob: float) -> tuple[_Estimate, _Estimate]:
    """Expected shortfall and value at risk of one hedger."""
    counts, losses, squares = bins
    tail, h = tail_prob * n, _bandwidth(tail_prob)
    threshold = _quantile(counts, edges, tail)
    above, below = (_quantile(counts, edges, n * share).loss for share in (tail_prob - h, tail_prob + h))
    inverse_density = (above - below) / np.float64(2.0 * h)  # p = 1 has none: not a number
    of_threshold = tail_prob * (1.0 - tail_prob) / n * inverse_density**2

    bin, taken = threshold.bin, threshold.taken
    low, high, share = *edges[bin : bin + 2], taken / counts[bin]
    # The losses taken from the boundary bin are its largest: not below its mean, not beyond its edge.
    least = share * losses[bin]
    most = max(min(taken * high, losses[bin] - (counts[bin] - taken) * low), least)
    shortfall = (losses[bin + 1 :].sum() + 0.5 * (least + most)) / tail
    excess = squares - 2.0 * threshold.loss * losses + threshold.loss**2 * counts  # of (loss - VaR)^2
    of_excess = excess[bin + 1 :].sum() + share * excess[bin]
    of_shortfall = (of_excess / (n * tail_prob**2) - (shortfall - threshold.loss) ** 2) / n
    return (
        _Estimate(shortfall, of_shortfall, 0.5 * (most - least) / tail),
        _Estimate(threshold.loss, of_threshold, threshold.error),
    )
