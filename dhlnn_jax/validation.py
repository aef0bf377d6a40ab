"""The risks by which the best epoch is chosen: of all members, on paths that nothing was trained on."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Array, PRNGKeyArray

from dhlnn_jax.compiling import jit_for_seldom
from dhlnn_jax.fitting import build_hedger, make_contract, shared_made_from
from dhlnn_jax.fleet import Layout, Member, fleet_evaluator, over_members, stacked
from dhlnn_jax.hedger import policy_of
from dhlnn_jax.settings import Settings
from dhlnn_jax.train import OBJECTIVES, Objective

Params = Any


class Validation:
    """Risks of all members, each on the validation paths of its own seed and market."""

    def __init__(self, name: str, members: Sequence[Member], keys: Sequence[PRNGKeyArray], layout: Layout):
        config = members[0].config
        self.evaluate = fleet_evaluator(
            policy_of(build_hedger(name, config)),
            make_contract(config),
            mesh=layout.members,
            made_from=shared_made_from("evaluating", name, config, members[0].source),
        )
        self._objective = OBJECTIVES[config.risk.kind]
        draw = jit_for_seldom(members[0].source.train, static_argnums=1)
        n_paths = config.training.validation_paths
        self._paths = [draw(key, n_paths, m.source.settings)[0] for key, m in zip(keys, members, strict=True)]
        self._settings = stacked([member.source.settings for member in members])

    def __call__(self, params: Params) -> np.ndarray:
        money = self.evaluate(params, self._paths, self._settings)
        return np.asarray(_risks(self._objective, money.pnl, self._settings))


@partial(jit_for_seldom, static_argnums=0)  # compiled once for all methods that share an objective
def _risks(objective: Objective, pnl: Array, settings: Settings) -> Array:
    return over_members(objective)(pnl, settings)
