"""Judges hedgers by their regret to the exact optimum, on one fixed set of paths."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dhlnn_jax.config import Config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import hedged_paths
from dhlnn_jax.fitting import evaluator, make_contract
from dhlnn_jax.hedger import Hedger, policy_of
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.optimal import optimal_policy, solve_contract
from dhlnn_jax.risk import entropic_risk_measure, paired_stderr
from dhlnn_jax.source import settings_of

Params = Any

_FEW = 200_000  # paths, of which a share would be too few to decide


class Judge:
    """Regret to the exact optimum, percent of the optimum, with its paired standard error.

    Raises: UsageError for a configuration whose optimum is not known.
    """

    def __init__(self, config: Config, n_paths: int, target: float):
        if config.no_optimum is not None:
            raise UsageError(f"the exact optimum {config.no_optimum}")
        self.settings, self.contract, self._target = settings_of(config), make_contract(config), target
        n_steps = config.market.n_steps
        sample = make_simulation_sampler(SIMULATORS[config.market.kind], n_steps=n_steps)
        key = jax.random.fold_in(jax.random.key(config.seed), 3)
        self.paths = jax.jit(sample, static_argnums=1)(key, n_paths, self.settings)[0]
        optimum = solve_contract(self.contract, self.settings, n_steps=n_steps)
        evaluate = evaluator(optimal_policy(optimum), self.contract)
        self._optimal = np.asarray(evaluate(None, self.paths, self.settings).pnl, float)
        self._value = optimum.value

    def evaluator(self, hedger: Hedger) -> Callable[[Params, int], np.ndarray]:
        """(params, n_paths) -> PnL on the first paths."""
        policy, settings = policy_of(hedger), self.settings
        # As in training, a CPU is fastest on few paths that stay in its cache.
        at_once = 500 if jax.default_backend() == "cpu" else 10_000

        @jax.jit
        def of_paths(params: Params, paths: Any) -> jax.Array:
            return hedged_paths(policy, params, paths, self.contract, settings, batch_size=at_once).pnl

        def pnl(params: Params, n_paths: int) -> np.ndarray:
            return np.asarray(of_paths(params, jax.tree.map(lambda x: x[:n_paths], self.paths)), float)

        return pnl

    def percent(
        self, pnl: Callable[[int], np.ndarray], *, whole: bool = False, shares: Sequence[float] = (0.05,)
    ) -> tuple[float, float]:
        """Regret and its error.

        Args:
          pnl: n_paths -> PnL on the first paths.
          whole: always on all paths. shares: of the paths, in turn, each of which decides alone where the
            regret is more than three errors above the target.
        """
        n_paths = len(self._optimal)
        for share in () if whole or n_paths < _FEW else shares:
            value, error = self._regret(pnl(int(share * n_paths)))
            if not value - 3 * error <= self._target:
                return value, error
        return self._regret(pnl(n_paths))

    def _regret(self, pnl: np.ndarray) -> tuple[float, float]:
        with jax.enable_x64(True):
            risk = partial(entropic_risk_measure, risk_aversion=float(self.settings.risk_aversion))
            ours, best = jnp.asarray(pnl), jnp.asarray(self._optimal[: len(pnl)])
            value, error = risk(ours) - risk(best), paired_stderr(risk, ours, best)
            return 100 * float(value) / self._value, 100 * float(error) / self._value
