"""The hedging methods by name: what each trains (if anything), and which claims it covers.

Adding a method means writing its rule or hedger elsewhere and naming it here.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from dhlnn_jax.hedge import (
    DELTAS,
    band_hedge,
    fixed_band,
    leland_hedge,
    no_hedge,
    periodic_delta_hedge,
    whalley_wilmott_band,
    whalley_wilmott_hedge,
)
from dhlnn_jax.hedger import Hedger, Policy, make_band_hedger, make_recurrent_hedger, rule_policy
from dhlnn_jax.market import MarketPath
from dhlnn_jax.optimal import Optimum, optimal_policy
from dhlnn_jax.settings import Settings


class RuleOptions(NamedTuple):
    """What rules are told of the configuration.

    Attributes:
      claim: its name.
      rebalance_every: steps between two trades of `periodic_delta`.
      half_width: of `fixed_band`, units of the underlying.
      optimum: the solved problem, for `optimal`.
    """

    claim: str
    rebalance_every: int = 5
    half_width: float = 0.1
    optimum: Optimum | None = None


class Method(NamedTuple):
    """One row of the results table.

    Attributes:
      label: how tables and figures call it.
      make_rule: options -> policy without parameters; None for trained methods.
      make_hedger: `(*, features, hidden_sizes, centre, centre_strike, ...) -> Hedger`; None for rules.
      update: what moves its parameters: plain optimizer steps, nested updates on the linearized objective, or
        Gauss-Newton steps on the output layer.
      recurrent: sees its previous hedge ratio, so `make_hedger` takes the `form` of the position.
      covers: the claims it is defined for; None for all.
    """

    label: str
    make_rule: Callable[[RuleOptions], Policy] | None = None
    make_hedger: Callable[..., Hedger] | None = None
    update: Literal["optimizer", "nested", "newton"] = "optimizer"
    recurrent: bool = False
    covers: tuple[str, ...] | None = None

    @property
    def trained(self) -> bool:
        return self.make_hedger is not None


def _optimal(options: RuleOptions) -> Policy:
    if options.optimum is None:
        raise ValueError("the exact optimum must be solved first: RuleOptions.optimum is None")
    return optimal_policy(options.optimum)


def _whalley_wilmott(options: RuleOptions) -> Policy:
    delta = DELTAS[options.claim]
    return rule_policy(
        partial(whalley_wilmott_hedge, delta=delta), partial(whalley_wilmott_band, delta=delta)
    )


def _fixed_band(options: RuleOptions) -> Policy:
    band = partial(fixed_band, half_width=options.half_width, delta=DELTAS[options.claim])
    return rule_policy(lambda path, settings: band_hedge(*band(path, settings)), band)


def _periodic_delta(options: RuleOptions) -> Policy:
    every, delta = options.rebalance_every, DELTAS[options.claim]

    def response(path: MarketPath, settings: Settings, previous: Array) -> Array:
        rebalanced = jnp.arange(path.spot.shape[0]) % every == 0
        return jnp.where(rebalanced, delta(path, settings), previous)

    return rule_policy(partial(periodic_delta_hedge, every=every, delta=delta), response=response)


def _leland(options: RuleOptions) -> Policy:
    return rule_policy(partial(leland_hedge, delta=DELTAS[options.claim]))


_EUROPEAN = ("european_call", "european_put")
_WITH_DELTA = tuple(DELTAS)

METHODS: dict[str, Method] = {
    "optimal": Method("exact optimum", make_rule=_optimal),
    "dhlnn": Method("DHLNN", make_hedger=make_band_hedger, update="nested"),
    "dhlnn_newton": Method("DHLNN, Gauss–Newton", make_hedger=make_band_hedger, update="newton"),
    "dhntb": Method("DHNTB", make_hedger=make_band_hedger),
    "dhmlp": Method("DHMLP", make_hedger=make_recurrent_hedger, recurrent=True),
    "whalley_wilmott": Method("Whalley–Wilmott", make_rule=_whalley_wilmott, covers=_EUROPEAN),
    "bsdh": Method(
        "Black–Scholes delta", make_rule=lambda o: rule_policy(DELTAS[o.claim]), covers=_WITH_DELTA
    ),
    "no_hedge": Method("no hedge", make_rule=lambda o: rule_policy(no_hedge)),
    "leland": Method("Leland delta", make_rule=_leland, covers=_EUROPEAN),
    "fixed_band": Method("delta, fixed band", make_rule=_fixed_band, covers=_WITH_DELTA),
    "periodic_delta": Method("delta, every k steps", make_rule=_periodic_delta, covers=_WITH_DELTA),
}
