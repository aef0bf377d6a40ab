"""One problem, and what every row of its table must be read against: the exact optimum and exact no hedge."""

from typing import NamedTuple

from dhlnn_jax.config import Config
from dhlnn_jax.evaluate import unhedged_values
from dhlnn_jax.fitting import make_contract
from dhlnn_jax.optimal import Optimum, solve_contract
from dhlnn_jax.pnl import Contract
from dhlnn_jax.source import Source
from dhlnn_jax.unhedged import unhedged_law


class ExactNoHedge(NamedTuple):
    """No hedge under geometric Brownian motion: its metrics by quadrature, and the chance of a payoff."""

    values: dict[str, float]
    exercise_probability: float


class Case(NamedTuple):
    """A configuration with its market, test paths included.

    Attributes:
      contract: the configured one.
      optimum: on the test market; None where there is none. exact: None where the claim's law is not known.
      label: how a message calls it; empty where there is only one.
    """

    config: Config
    source: Source
    contract: Contract
    optimum: Optimum | None
    exact: ExactNoHedge | None
    label: str = ""

    @property
    def rows(self) -> list[str]:
        """Methods in the order of the table: the optimum first, since regret is measured to it."""
        first = () if self.optimum is None else ("optimal",)
        return list(dict.fromkeys((*first, *self.config.methods, "no_hedge")))


def make_case(config: Config, source: Source, *, label: str = "") -> Case:
    """Solves what can be solved. Raises: UsageError as `optimal.solve_contract`."""
    contract, settings = make_contract(config), source.market_settings
    optimum = exact = None
    if config.no_optimum is None:
        optimum = solve_contract(contract, settings, n_steps=config.market.n_steps)
    if config.market.kind == "gbm" and contract.claim.depends_on != "path":
        law = unhedged_law(contract.claim, settings, n_steps=config.market.n_steps)
        exercised = float(law.probability[law.payoff > 0].sum())
        exact = ExactNoHedge(unhedged_values(law.payoff, law.probability, settings), exercised)
    return Case(config, source, contract, optimum, exact, label)
