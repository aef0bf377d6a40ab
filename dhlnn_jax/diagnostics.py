"""How far a network is from its linearization: the quantities of the paper's section 4.3 and appendix D.

The first half works for any function of parameters; the second measures a hedger along its training.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from dhlnn_jax.hedger import Anchor, Hedger, batched_inputs
from dhlnn_jax.linearize import linearize_at
from dhlnn_jax.market import MarketPath, Sampler
from dhlnn_jax.nested import CostSurrogate, Problem, Update
from dhlnn_jax.pnl import COST_MODELS, Contract, contract_pnl, trades
from dhlnn_jax.settings import Settings
from dhlnn_jax.train import Objective, TrainState

Params = Any
Outputs = Any

STEP_SIZES = tuple(2.0**k for k in range(-8, 4))
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)


# --- any function of parameters -----------------------------------------------------------------------


class LinearizationError(NamedTuple):
    """Along w = w0 + h d, one number for each step size h.

    Attributes:
      error: ||f(w) - f_lin(w)||. change: ||f(w) - f(w0)||; root mean squares over all outputs, in their unit.
      mean_error, mean_change: the same as mean absolute values.
    """

    error: Float[Array, " n_sizes"]
    change: Float[Array, " n_sizes"]
    mean_error: Float[Array, " n_sizes"]
    mean_change: Float[Array, " n_sizes"]

    @property
    def ratio(self) -> Float[Array, " n_sizes"]:
        """error / change; NaN where nothing changes."""
        return self.error / self.change

    @property
    def mean_ratio(self) -> Float[Array, " n_sizes"]:
        """mean_error / mean_change; NaN where nothing changes."""
        return self.mean_error / self.mean_change


def linearization_error(
    fn: Callable[[Params], Outputs],
    params0: Params,
    direction: Params,
    step_sizes: Float[ArrayLike, " n_sizes"],
) -> LinearizationError:
    """Error of the first-order expansion of fn at params0, along one direction.

    Args:
      direction: a step d of the parameters, not normalized. step_sizes: h, its multiples.
    Numerics: twice differentiable fn: error ~ h^2, change ~ h, ratio ~ h. A kink (ReLU, the clamp of a
      band) at distance u along d leaves an error ~ (h - u)^+; over many outputs with kinks spread evenly the
      root mean square goes like h^1.5, the mean absolute error like h^2 still. Errors below rounding are
      rounding: use float64 for small h.
    Source: paper Eq. (9) and (21).
    """
    at = linearize_at(fn, params0)
    slope = at.jvp(direction)

    def one(h: Array) -> LinearizationError:
        moved = fn(jax.tree.map(lambda w, d: w + h * d, params0, direction))
        change = ravel_pytree(jax.tree.map(jnp.subtract, moved, at.value))[0]
        error = change - h * ravel_pytree(slope)[0]
        rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x)))  # noqa: E731
        return LinearizationError(
            rms(error), rms(change), jnp.mean(jnp.abs(error)), jnp.mean(jnp.abs(change))
        )

    return jax.lax.map(one, jnp.asarray(step_sizes))


def log_slope(x: Float[ArrayLike, " n"], y: Float[ArrayLike, " n"]) -> float:
    """Least-squares slope of log y over log x; NaN if fewer than two of the y are positive."""
    x, y = np.asarray(x), np.asarray(y)
    used = y > 0
    return float(np.polyfit(np.log(x[used]), np.log(y[used]), 1)[0]) if used.sum() > 1 else float("nan")


def gradient_norms(fn: Callable[[Params], Outputs], params: Params) -> Float[Array, " n_outputs"]:
    """||grad f_k(params)|| for every number k among the outputs of fn, flattened.

    Numerics: builds the whole Jacobian, n_outputs times the number of parameters.
    """
    return jnp.linalg.norm(_jacobian(fn, params), axis=1)


def gradient_drift(
    fn: Callable[[Params], Outputs], params0: Params, params: Params
) -> Float[Array, " n_outputs"]:
    """||grad f_k(params) - grad f_k(params0)|| for every number k among the outputs, flattened.

    Source: left-hand side of paper Eq. (23) and (25).
    """
    return jnp.linalg.norm(_jacobian(fn, params) - _jacobian(fn, params0), axis=1)


def gradient_drift_bound(
    hessian_bound: ArrayLike, distance: ArrayLike, *, tau: ArrayLike = 1.0
) -> Float[Array, "..."]:
    """tau beta ||w - w0||, beta a bound on the Hessian's norm all along the way.

    Numerics: with beta the norm at w0 only this is the estimate (23), no bound; for ReLU networks no beta
      bounds the drift, since gradients jump at kinks.
    Source: paper Eq. (25).
    """
    return jnp.asarray(tau) * hessian_bound * distance


def hessian_norm(
    fn: Callable[[Params], Array], params: Params, key: PRNGKeyArray, *, n_iterations: int = 30
) -> Float[Array, ""]:
    """Spectral norm of the Hessian of a scalar function, by power iteration on Hessian-vector products.

    v <- H v / ||H v|| from a random v; returns the last ||H v||.

    Numerics: ||H v|| never decreases (H is symmetric) and never exceeds the norm: a lower bound. The Hessian
      of a ReLU network is that of its piece, without the kinks.
    Source: Golub and Van Loan (2013), Section 8.2.1.
    """
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda w: fn(unravel(w)))

    def iterate(v: Array, _: None) -> tuple[Array, Array]:
        product = jax.jvp(gradient, (flat,), (v,))[1]
        norm = jnp.linalg.norm(product)
        return jnp.where(norm > 0, product / jnp.where(norm > 0, norm, 1.0), v), norm

    start = jax.random.normal(key, flat.shape, flat.dtype)
    return jax.lax.scan(iterate, start / jnp.linalg.norm(start), length=n_iterations)[1][-1]


def hessian_norms(
    fn: Callable[[Params], Outputs], params: Params, key: PRNGKeyArray, *, n_iterations: int = 30
) -> Float[Array, " n_outputs"]:
    """`hessian_norm` of every number among the outputs of fn, flattened, from the same random start."""
    flat_fn = lambda w: ravel_pytree(fn(w))[0]  # noqa: E731
    outputs = jax.eval_shape(flat_fn, params)

    def one(unit: Array) -> Array:
        return hessian_norm(lambda w: jnp.vdot(unit, flat_fn(w)), params, key, n_iterations=n_iterations)

    return jax.vmap(one)(jnp.eye(outputs.shape[0], dtype=outputs.dtype))


def _jacobian(fn: Callable[[Params], Outputs], params: Params) -> Array:
    flat, unravel = ravel_pytree(params)
    return jax.jacrev(lambda w: ravel_pytree(fn(unravel(w)))[0])(flat)


# --- the bounds of appendix D -------------------------------------------------------------------------


class PerceptronConstants(NamedTuple):
    """What the bounds of appendix D are made of, for a ReLU network and a set of rows.

    Attributes:
      output_weight: A = max_j |a_kj|, over both outputs, in the parametrization (50): the output layer is
        a / sqrt(m), so A is sqrt(m) times its largest weight.
      activation_norm: H, the largest Euclidean norm among the inputs of all hidden layers.
      n_hidden: L, the number of hidden layers.
      slope: M_1, the bound on |sigma'|: 1. curvature: M_2, that on |sigma''|: 0 but for the kink.
    """

    output_weight: Array
    activation_norm: Array
    n_hidden: int
    slope: float = 1.0
    curvature: float = 0.0


def perceptron_constants(
    params: Params, features: Float[Array, "*rows n_features"], *, module: str = "Perceptron_0"
) -> PerceptronConstants:
    """The constants of a network with one `Perceptron` at these parameters on these rows.

    Source: paper App. D.1 and D.4.
    """
    *hidden, last = _dense_layers(params, module)
    largest = jnp.zeros((), features.dtype)
    for layer in hidden:
        largest = jnp.maximum(largest, jnp.max(jnp.linalg.norm(features, axis=-1)))
        features = jax.nn.relu(features @ layer["kernel"] + layer["bias"])
    kernel = last["kernel"]
    return PerceptronConstants(
        jnp.sqrt(kernel.shape[0]) * jnp.max(jnp.abs(kernel)), largest, n_hidden=len(hidden)
    )


def gradient_bound(constants: PerceptronConstants) -> Float[Array, ""]:
    """A M_1^l (H + 1), at the l in 1..L where it is largest. Source: paper Eq. (66), as printed.

    Not a bound: (53) multiplies activations where the chain rule multiplies by the weights of the later
    layers, which appear nowhere in it. With f = a s(w_2 s(w_1 x)), everything positive, df/dw_1 = a w_2 x.
    """
    a, h, n, m1, _ = constants
    return a * max(m1**layer for layer in range(1, n + 1)) * (h + 1.0)


def hessian_bound(constants: PerceptronConstants) -> Float[Array, ""]:
    """max(A (M_2 H^2 + M_1)^L, A M_2^L). Source: paper Eq. (93), as printed.

    Not a bound: it takes the Hessian to be block diagonal, one block a weight matrix or a bias vector. The
    blocks that mix layers are not zero, and for ReLU they are all there is: (93) is A whatever the input,
    while f = a s(w_2 s(w_1 x)), everything positive, is a w_2 w_1 x with Hessian norm a |x|. Nor is (92)
    true within one layer: d2f / dw db = a s''(w x + b) x for one hidden unit. And as in (66) the weights of
    later layers are missing, so smooth activations do not save it.
    """
    a, h, n, m1, m2 = constants
    return jnp.maximum(a * (m2 * jnp.square(h) + m1) ** n, a * m2**n)


def output_layer_fixed(
    fn: Callable[[Params], Outputs], params: Params, *, module: str = "Perceptron_0"
) -> tuple[Callable[[Params], Outputs], Params]:
    """fn as a function of the hidden layers alone, and these: what appendix D calls w.

    Source: paper App. D.1, "exclude [a_k] from the training procedure".
    """
    layers = params["params"][module]
    last = f"Dense_{len(layers) - 1}"

    def of_hidden(hidden: Params) -> Outputs:
        joined = {**params["params"], module: {**hidden, last: layers[last]}}
        return fn({**params, "params": joined})

    return of_hidden, {name: layer for name, layer in layers.items() if name != last}


def _dense_layers(params: Params, module: str) -> list[dict[str, Array]]:
    layers = params["params"][module]
    return [layers[f"Dense_{i}"] for i in range(len(layers))]


# --- problems and updates -----------------------------------------------------------------------------


def zero_gradient_share(problem: Problem, params: Params, *, n_row_axes: int) -> Float[Array, ""]:
    """Share of rows of the outputs whose gradient of the risk is exactly zero, in [0, 1].

    Args:
      n_row_axes: leading axes of every leaf of the outputs that count rows (2: paths and steps).
    Numerics: the raw widths of a step inside its band have no effect, hence the zero. A path outside the
      tail of an expected shortfall, or of an entropic weight below rounding, has zeros at every step too.
    """
    outputs = problem.outputs(params)
    gradient = jax.grad(lambda y: problem.risk(problem.value(y)))(outputs)
    moves = [jnp.any(g.reshape(*g.shape[:n_row_axes], -1) != 0, axis=-1) for g in jax.tree.leaves(gradient)]
    return 1.0 - jnp.mean(jnp.any(jnp.stack(moves), axis=0), dtype=float)


def inner_step_norms(
    update_of: Callable[[int], Update], problem: Problem, params: Params, state: Any, *, n_steps: int
) -> tuple[Float[Array, " n_steps"], list[Params]]:
    """||w_j - w_(j-1)|| for the inner iterations j = 1..n_steps of one outer iteration, and all w_j.

    Args:
      update_of: number of inner steps -> update, tolerance 0. state: that of the update before it.
    Numerics: runs the update n_steps times from the start, n_steps^2 / 2 inner steps in all.
    Source: paper Algorithm 1, line 8.
    """
    ends = [update_of(n).apply(problem, params, state)[0] for n in range(1, n_steps + 1)]
    steps = [
        jax.tree.map(jnp.subtract, after, before)
        for before, after in zip([params, *ends[:-1]], ends, strict=True)
    ]
    return jnp.stack([optax.global_norm(step) for step in steps]), ends


def inner_steps_allowed(step_norms: Float[ArrayLike, " n_steps"], tolerance: Float[ArrayLike, ""]) -> int:
    """Inner steps taken before a tolerance stops them: up to the first whose norm is below it, or all."""
    below = np.flatnonzero(np.asarray(step_norms) < tolerance)
    return int(below[0]) + 1 if below.size else int(np.size(step_norms))


def hedging_problem(
    hedger: Hedger,
    paths: MarketPath,
    contract: Contract,
    objective: Objective,
    settings: Settings,
    *,
    cut: Literal["raw", "hedge_ratio"] = "raw",
    cost_surrogate: CostSurrogate = "absolute",
) -> Problem:
    """The problem that one training step poses on these paths.

    Args:
      paths: a batch of whole paths. cut, cost_surrogate: those of the `Update`.
    """
    features, anchor = batched_inputs(hedger, paths, settings)

    def positions(raw: Array) -> Array:
        return jax.vmap(hedger.position)(raw, anchor)

    def outputs(params: Params) -> Array:
        raw = jax.vmap(hedger.outputs, (None, 0, 0))(params, features, anchor)
        return raw if cut == "raw" else positions(raw)

    def value_of(contract: Contract) -> Callable[[Array], Array]:
        def value(y: Array) -> Array:
            ratios = positions(y) if cut == "raw" else y
            return jax.vmap(lambda path, h: contract_pnl(contract, path, h, settings))(paths, ratios)

        return value

    surrogate = None
    if cost_surrogate != "absolute":
        surrogate = value_of(contract._replace(cost_model=COST_MODELS[cost_surrogate]))
    return Problem(outputs, value_of(contract), lambda pnl: objective(pnl, settings), surrogate)


# --- along training -----------------------------------------------------------------------------------


def make_diagnostics(
    hedger: Hedger,
    sample: Sampler,
    contract: Contract,
    objective: Objective,
    settings: Settings,
    key: PRNGKeyArray,
    *,
    update_of: Callable[[int], Update],
    n_inner: int = 5,
    n_inner_shown: int = 8,
    n_paths: int = 2_000,
    n_row_paths: int = 4,
    n_iterations: int = 20,
    step_sizes: Sequence[float] = STEP_SIZES,
    tolerances: Sequence[float] = TOLERANCES,
) -> Callable[[Sequence[TrainState]], dict[str, Any]]:
    """All the diagnostics at some epochs of a training, every training on the same fresh paths.

    The step looked at is the whole outer iteration of n_inner inner steps from each state.

    Args:
      key: of the paths and of the power iterations.
      update_of: number of inner steps -> the update that training used, tolerance 0.
      n_inner_shown: inner steps whose norms are measured, at least n_inner.
      n_row_paths: paths whose every output has its gradient and Hessian measured, one by one.
      step_sizes: multiples of the step.
    Returns: `diagnostics(states) -> numbers`, compiled once for all trainings; states are those of one
      training after the epochs to be looked at. The numbers are ready for JSON: lists over epochs, "epoch"
      first; curves have an inner list, over "step_sizes" or inner steps.
      "..._slope": of log error over log step size, up to the whole step. "..._max": over the outputs
      measured one by one. Bounds are None for hedgers that see their previous position: theirs is not the
      network of appendix D. Not a number is None too.
    Raises: ValueError if n_inner_shown is below n_inner.
    Numerics: paths as in training, everything after them in float64.
    """
    if n_inner_shown < n_inner:
        raise ValueError(f"n_inner_shown must be at least n_inner = {n_inner}, got {n_inner_shown}")
    key_paths, key_hessian = jax.random.split(key)
    drawn, _ = sample(key_paths, n_paths, settings)

    @jax.jit
    def measure(state: TrainState, paths: MarketPath, settings: Settings) -> dict[str, Array]:
        update = update_of(n_inner)

        def problem_at(cut: Literal["raw", "hedge_ratio"]) -> Problem:
            return hedging_problem(
                hedger,
                paths,
                contract,
                objective,
                settings,
                cut=cut,
                cost_surrogate=update.cost_surrogate,
            )

        params, raw, ratio = state.params, problem_at("raw"), problem_at("hedge_ratio")
        norms, ends = inner_step_norms(
            update_of, problem_at(update.cut), params, state.update, n_steps=n_inner_shown
        )
        after = ends[n_inner - 1]
        step = jax.tree.map(jnp.subtract, after, params)
        sizes, distance = jnp.asarray(step_sizes), optax.global_norm(step)
        numbers = {"inner_step_norms": norms, "step_norm": distance}
        for name, problem in (("outputs", raw), ("hedge_ratio", ratio)):
            found = linearization_error(problem.outputs, params, step, sizes)
            numbers |= {f"{name}_{field}": values for field, values in found._asdict().items()}
            numbers |= {f"{name}_ratio": found.ratio, f"{name}_mean_ratio": found.mean_ratio}

        few = batched_inputs(hedger, jax.tree.map(lambda x: x[:n_row_paths], paths), settings)

        def of_single_outputs(features: Array, anchor: Anchor) -> dict[str, Array]:
            outputs = lambda w: hedger.outputs(w, features, anchor)  # noqa: E731
            hessian = partial(hessian_norms, key=key_hessian, n_iterations=n_iterations)
            found = {
                "gradient_drift": gradient_drift(outputs, params, after),
                "gradient_norm": gradient_norms(outputs, params),
                "hessian_norm": hessian(outputs, params),
            }
            if hedger.band is None:
                return found
            of_hidden, hidden = output_layer_fixed(outputs, params)
            found["hidden_gradient_norm"] = gradient_norms(of_hidden, hidden)
            return found | {"hidden_hessian_norm": hessian(of_hidden, hidden)}

        single = jax.lax.map(lambda inputs: of_single_outputs(*inputs), few)
        numbers |= {f"{name}_max": jnp.max(norms) for name, norms in single.items()}
        numbers["gradient_drift_median"] = jnp.median(single["gradient_drift"])
        numbers["drift_estimate_23"] = gradient_drift_bound(numbers["hessian_norm_max"], distance)
        if hedger.band is not None:
            constants = perceptron_constants(params, few[0])
            numbers |= {
                "hessian_bound_93": hessian_bound(constants),
                "gradient_bound_66": gradient_bound(constants),
                "drift_bound_25": gradient_drift_bound(hessian_bound(constants), distance),
                "output_weight_A": constants.output_weight,
                "activation_norm_H": constants.activation_norm,
            }
        trade = jax.vmap(trades)(ratio.outputs(params))[:, :-1]
        numbers["risk"] = raw.risk(raw.value(raw.outputs(params)))
        numbers["no_trade_share"] = jnp.mean(trade == 0, dtype=float)
        numbers["zero_gradient_share"] = zero_gradient_share(raw, params, n_row_axes=2)
        return numbers

    def diagnostics(states: Sequence[TrainState]) -> dict[str, Any]:
        with jax.enable_x64(True):
            inputs = _in_double(drawn), _in_double(settings)
            found = [jax.tree.map(np.asarray, measure(_in_double(state), *inputs)) for state in states]
        for numbers in found:
            norms = numbers["inner_step_norms"]
            numbers["inner_steps_allowed"] = np.array([inner_steps_allowed(norms, e) for e in tolerances])
            small = np.asarray(step_sizes) <= 1.0
            for name in _ERRORS:
                slope = log_slope(np.asarray(step_sizes)[small], numbers[name][small])
                numbers[f"{name}_slope"] = np.asarray(slope)
        return {
            "epoch": [int(state.epoch) for state in states],
            "n_inner": n_inner,
            "step_sizes": list(step_sizes),
            "tolerances": list(tolerances),
            **{name: [_plain(numbers[name]) for numbers in found] for name in found[0]},
            **({} if hedger.band is not None else dict.fromkeys(_BOUNDS)),
        }

    return diagnostics


_ERRORS = ("outputs_error", "outputs_mean_error", "hedge_ratio_error", "hedge_ratio_mean_error")
_BOUNDS = ("hessian_bound_93", "gradient_bound_66", "drift_bound_25")


def _in_double(tree: Any) -> Any:
    """Floating point leaves in float64; needs x64 enabled."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree
    )


def _plain(numbers: np.ndarray) -> Any:
    """Python numbers in lists, None for those that are not finite."""
    return np.where(np.isfinite(numbers), numbers.astype(object), np.array(None)).tolist()
