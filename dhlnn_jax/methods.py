"""The hedging methods by name: what each trains (if anything), and which claims it covers.

Adding a method means writing its rule or hedger elsewhere and naming it here.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from dhlnn_jax.hedge import DELTAS, no_hedge, whalley_wilmott_band, whalley_wilmott_hedge
from dhlnn_jax.hedger import Hedger, Policy, make_band_hedger, make_recurrent_hedger, rule_policy


class Method(NamedTuple):
    """One row of the results table.

    Attributes:
      label: how tables and figures call it.
      make_rule: claim name -> policy without parameters; None for trained methods.
      make_hedger: `(*, features, hidden_sizes, centre, centre_strike, ...) -> Hedger`; None for rules.
      nested: trained by nested updates on the linearized objective instead of plain optimizer steps.
      recurrent: sees its previous hedge ratio, so `make_hedger` takes the `form` of the position.
      covers: the claims it is defined for; None for all.
    """

    label: str
    make_rule: Callable[[str], Policy] | None = None
    make_hedger: Callable[..., Hedger] | None = None
    nested: bool = False
    recurrent: bool = False
    covers: tuple[str, ...] | None = None

    @property
    def trained(self) -> bool:
        return self.make_hedger is not None


def _whalley_wilmott(claim: str) -> Policy:
    delta = DELTAS[claim]
    return rule_policy(
        partial(whalley_wilmott_hedge, delta=delta), partial(whalley_wilmott_band, delta=delta)
    )


_EUROPEAN = ("european_call", "european_put")

METHODS: dict[str, Method] = {
    "dhlnn": Method("DHLNN", make_hedger=make_band_hedger, nested=True),
    "dhntb": Method("DHNTB", make_hedger=make_band_hedger),
    "dhmlp": Method("DHMLP", make_hedger=make_recurrent_hedger, recurrent=True),
    "whalley_wilmott": Method("Whalley–Wilmott", make_rule=_whalley_wilmott, covers=_EUROPEAN),
    "bsdh": Method(
        "Black–Scholes delta", make_rule=lambda claim: rule_policy(DELTAS[claim]), covers=_EUROPEAN
    ),
    "no_hedge": Method("no hedge", make_rule=lambda claim: rule_policy(no_hedge)),
}
