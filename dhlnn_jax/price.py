"""Indifference prices: the optimal risk with the claim less the optimal risk without it, paper Eq. (7).

A price is a difference of two optima and does not ask where they come from: an `OptimalRisk` says how small
the risk of a claim sold (+1), held (-1) or absent (0) can be made. `exact_risk` solves for it; `trained_risk`
trains a hedger for each. `oce_update` trains the threshold of a general optimized certainty equivalent along.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray, Real

from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import hedged_paths
from dhlnn_jax.hedger import Hedger, policy_of
from dhlnn_jax.market import Sampler
from dhlnn_jax.nested import Problem, Update
from dhlnn_jax.optimal import OptimalHedge, solve_european, solve_lookback
from dhlnn_jax.optimal_lookback import LookbackHedge
from dhlnn_jax.payoff import Claim, lookback_call
from dhlnn_jax.pnl import Contract
from dhlnn_jax.risk import RiskFn, clustered_stderr, influence
from dhlnn_jax.settings import Settings
from dhlnn_jax.train import fit, init_state, make_train_step

Position = Literal[-1, 0, 1]  # of the seller's book: claim held, none, claim sold
Side = Literal["seller", "buyer"]


class Estimate(NamedTuple):
    """An optimal risk, with what is known of its accuracy.

    Attributes:
      value: money.
      error: of the numerical solution, money; NaN for a trained hedger: nobody knows how far it is from the
        optimum, only that it is not below.
      influences: of each test path on the value [n_paths], 0 if there are no paths; the same paths for all
        positions, so that the standard error of a price is a paired one.
      group_ids: as in `market.Sampler`. notes: what the reader should know; empty if nothing.
    """

    value: float
    error: float
    influences: Any = 0.0
    group_ids: Any = None
    notes: tuple[str, ...] = ()


OptimalRisk = Callable[[Position], Estimate]
NOTHING = Estimate(0.0, 0.0)  # the optimum without a claim where prices are martingales: not to trade


class Price(NamedTuple):
    """An indifference price = +-(risk_with - risk_without), + for the seller.

    Attributes:
      value, risk_with, risk_without: money.
      stderr: Monte Carlo standard error; 0 for exact solutions.
      error, notes: of both risks, as in `Estimate`.
    """

    value: float
    stderr: float
    error: float
    risk_with: float
    risk_without: float
    notes: tuple[str, ...]


def indifference_price(optimal_risk: OptimalRisk, *, side: Side = "seller") -> Price:
    """Money that leaves the optimally hedged seller or buyer as well off with the claim as without it.

    seller: risk(+1) - risk(0), the least to sell for. buyer: risk(0) - risk(-1), the most to pay.

    Args:
      optimal_risk: from `exact_risk` or `trained_risk`; of a cash-invariant risk measure.
    Raises: ValueError for an unknown side.
    Source: paper Eq. (7), (35); Hodges and Neuberger (1989).
    """
    if side not in ("seller", "buyer"):
        raise ValueError(f"side must be seller or buyer, got {side!r}")
    with_claim, without = optimal_risk(1 if side == "seller" else -1), optimal_risk(0)
    sign = 1.0 if side == "seller" else -1.0
    influences = jnp.asarray(with_claim.influences - without.influences)
    stderr = jax.jit(clustered_stderr)(influences, with_claim.group_ids) if influences.ndim else 0.0
    return Price(
        value=sign * (with_claim.value - without.value),
        stderr=float(stderr),
        error=with_claim.error + without.error,
        risk_with=with_claim.value,
        risk_without=without.value,
        notes=tuple(dict.fromkeys(with_claim.notes + without.notes)),
    )


def exact_risk(
    claim: Claim,
    *,
    strike: SupportsFloat,
    drift: SupportsFloat = 0.0,
    increments: tuple[Any, Any] | None = None,
    **numbers: Any,
) -> OptimalRisk:
    """The optimal entropic risk by the exact solver; without claim and without drift it is 0, unsolved.

    Args:
      claim: on the last spot, or the lookback call (to be sold only).
      strike: money. drift, increments, numbers: as in `optimal.solve_european`.
    Raises: UsageError for what the solvers do not cover, when it is asked for.
    """
    market = dict(numbers, drift=drift)

    def optimal_risk(position: Position) -> Estimate:
        if position == 0 and _is_martingale(drift, increments):
            return NOTHING
        solution: OptimalHedge | LookbackHedge
        if position == 0 or claim.terminal:
            solution = solve_european(
                lambda spot: position * claim.payoff(spot, strike=strike) if position else 0.0 * spot[-1],
                increments=increments,
                **market,
            )
        elif claim.payoff is lookback_call and position == 1 and increments is None:
            solution = solve_lookback(strike=strike, **market)
        else:
            raise UsageError(
                "exact prices cover the seller and the buyer of claims on the last spot, and the seller of a "
                "lookback call under the normal law; train hedgers for all else (price.trained_risk)"
            )
        return Estimate(solution.value, solution.error, notes=solution.notes)

    return optimal_risk


def _is_martingale(drift: SupportsFloat, increments: tuple[Any, Any] | None) -> bool:
    if increments is None:
        return float(drift) == 0
    growth = np.dot(np.expm1(np.asarray(increments[0], float)), np.asarray(increments[1], float))
    return bool(abs(growth) < 1e-12)


def trained_risk(
    key: PRNGKeyArray,
    make_hedger: Callable[[Position], Hedger],
    sample: Sampler,
    contract: Contract,
    settings: Settings,
    update: Update,
    *,
    risk_fn: RiskFn,
    martingale: bool,
    n_epochs: int,
    n_paths: int = 10_000,
    n_test_paths: int = 100_000,
) -> OptimalRisk:
    """The risk of a hedger trained for the position, on fresh paths: in expectation not below the optimum.

    Training and test paths are the same for all positions. The hedger of the last epoch is measured, so that
    nothing is selected on the test paths; premiums are left out.

    Args:
      make_hedger: position -> hedger; its centre must suit the position, as in
        `make_band_hedger(..., centre=lambda path, settings: position * european_call_delta(path, settings))`.
      update: `optax_update(...)`, `nested_update(...)`, or either in `oce_update`.
      risk_fn: trained on and measured, `(pnl [n_paths], *, weights) -> money`, as
        `functools.partial(entropic_risk_measure, risk_aversion=50.0)`; what the settings say of risk is not
        looked at. It must be cash-invariant, convex and 0 for a certain 0.
      martingale: no expected gain without a claim (simulators with drift 0; never recorded prices), so that
        not to trade is optimal there and is not trained.
      n_paths: a step. n_test_paths: of the measurement.
    Numerics: entropic risks of large lambda are carried by few paths: see `risk.effective_sample_size`.
    """
    settings = settings._replace(premium=jnp.zeros_like(jnp.asarray(settings.premium, float)))
    key_init, key_train, key_test = jax.random.split(key, 3)

    def optimal_risk(position: Position) -> Estimate:
        if position == 0 and martingale:
            return NOTHING
        payoff = contract.claim.payoff
        claim = contract.claim._replace(payoff=lambda spot, *, strike: position * payoff(spot, strike=strike))
        held = contract._replace(claim=claim)
        hedger = make_hedger(position)
        step = make_train_step(hedger, sample, held, lambda pnl, _: risk_fn(pnl), update, n_paths=n_paths)
        state = init_state(hedger, update, key_init)
        params = fit(jax.jit(step), state, key_train, settings, n_epochs=n_epochs).state.params

        @jax.jit
        def measured(key: PRNGKeyArray) -> tuple[Array, Array, Array]:
            paths, group_ids = sample(key, n_test_paths, settings)
            pnl = hedged_paths(policy_of(hedger), params, paths, held, settings).pnl
            return risk_fn(pnl), influence(risk_fn, pnl), group_ids

        value, influences, group_ids = measured(key_test)
        return Estimate(float(value), float("nan"), influences, group_ids)

    return optimal_risk


class OceState(NamedTuple):
    """The threshold theta in money, and the state of the update that moves it and the hedger."""

    theta: Array
    update: Any


def oce_update(
    update: Update, *, loss: Callable[[Array], Array], theta0: Real[ArrayLike, ""] = 0.0
) -> Update:
    """Trains theta + E loss(-pnl - theta), the hedger and theta as one pytree {"hedger": params, "theta"}.

    At the minimizing theta this is the optimized certainty equivalent of `loss`. Unlike the measure itself
    it is a mean over paths, whose gradient on a batch is unbiased. The result takes the place of `update` in
    `make_train_step` (whose objective is then not looked at) and `init_state`; theta is
    `state.update.theta`, and `TrainInfo.risk` that mean.

    Args:
      update: any; the nested one linearizes the hedger and keeps theta, which enters linearly, as it is.
      loss: elementwise, as in `risk.optimized_certainty_equivalent`.
      theta0: money. Start near the solution if the loss is exponential: far below it the first gradients are
        of size exp(-lambda theta0), and Adam's second moment remembers them.
    Source: paper Eq. (37), with the expectation that Eq. (43) drops; Buehler et al. (2019), Section 4.5.
    """

    def init(params: Any) -> OceState:
        theta = jnp.asarray(theta0, float)
        return OceState(theta, update.init({"hedger": params, "theta": theta}))

    def apply(problem: Problem, params: Any, state: OceState):
        def with_theta(value: Callable[[Any], Array]) -> Callable[[Any], Array]:
            return lambda y: y["theta"] + loss(-value(y["hedger"]) - y["theta"])

        surrogate = problem.surrogate_value
        joint = Problem(
            outputs=lambda both: {"hedger": problem.outputs(both["hedger"]), "theta": both["theta"]},
            value=with_theta(problem.value),
            risk=jnp.mean,
            surrogate_value=None if surrogate is None else with_theta(surrogate),
        )
        both, inner, info = update.apply(joint, {"hedger": params, "theta": state.theta}, state.update)
        info = info._replace(outputs=info.outputs["hedger"])
        return both["hedger"], OceState(both["theta"], inner), info

    return update._replace(init=init, apply=apply)
