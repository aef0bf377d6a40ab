"""The judge of an ablation: the test paths that all of its variants share, and the exact optimum on them."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dhlnn_jax.ablation import seeing_noise, with_price_noise
from dhlnn_jax.config import Config
from dhlnn_jax.evaluate import hedged_paths, metrics_of
from dhlnn_jax.fitting import make_contract
from dhlnn_jax.hedger import Hedger, Policy, policy_of
from dhlnn_jax.market import MarketPath
from dhlnn_jax.optimal import optimal_policy, solve_contract
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.report import objective_metric
from dhlnn_jax.risk import influence
from dhlnn_jax.settings import Settings
from dhlnn_jax.source import Source

_NOISE = 5  # a role folded into the key of `config.seed`; 0 to 4 are taken by runs and by `measure`
_MAX_BATCHES = 1_000

Params = Any


class Judge:
    """The test paths, and the exact optimum on them where there is one."""

    def __init__(self, config: Config, source: Source, hedger: Hedger):
        self.metric, self.hedger, self.source = objective_metric(config), hedger, source
        self.contract = contract = make_contract(config)
        self._init = jax.jit(jax.vmap(hedger.init))
        self._key_noise = jax.random.fold_in(jax.random.key(config.seed), _NOISE)
        groups = np.unique(np.asarray(source.test_groups), return_inverse=True)[1]
        self.n_batches = min(_MAX_BATCHES, int(groups.max()) + 1)
        self.batches = jnp.asarray(groups % self.n_batches)
        self.optimum, self.round_trip = None, None
        self.unit, self.scale, self._reference = "money", 1.0, (0.0, np.zeros(self.n_batches))
        if config.no_optimum is None:
            with progress_bar("solving for the exact optimum", None):
                self.optimum = solve_contract(contract, source.market_settings, n_steps=config.market.n_steps)
            self.policy = optimal_policy(self.optimum)
            one = jax.jit(partial(self._measured, self.policy, None))
            risk, sums, turned_back = one(source.test, source.test_settings)
            self._reference = float(risk), np.asarray(sums, float)
            self.round_trip = float(turned_back)
            if self.optimum.value > 1e-6:
                self.unit, self.scale = "percent", 100.0 / self.optimum.value

    def _measured(self, policy: Policy, params: Params, paths: MarketPath, settings: Settings):
        """Risk, its influences summed over batches of paths, and the mean round trip."""
        money = hedged_paths(policy, params, paths, self.contract, settings, batch_size=1_000)
        reduce = metrics_of(settings)[self.metric].reduce
        sums = jax.ops.segment_sum(influence(reduce, money.pnl), self.batches, self.n_batches)
        return reduce(money.pnl), sums, jnp.mean(money.round_trip)

    def init(self, keys: Array) -> Params:
        """Initial parameters of every seed; the network does not know of noise."""
        return self._init(keys)

    @cache  # noqa: B019, it lives as long as the study
    def measurer(self, price_noise: float = 0.0):
        """params with a leading seed axis -> (value, influences of its mean [n_batches], mean round trip).

        Value and round trip are [n_seeds].
        """
        hedger, paths, source = self.hedger, self.source.test, self.source
        if price_noise:
            hedger = seeing_noise(hedger)
            keep = with_price_noise(lambda key, n_paths, settings: (paths, source.test_groups), price_noise)
            paths = keep(self._key_noise, paths.spot.shape[0], source.market_settings)[0]
        policy = policy_of(hedger)

        @jax.jit
        def measured(params, paths, settings):
            return jax.lax.map(lambda own: self._measured(policy, own, paths, settings), params)

        def measure(params: Params) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            done = measured(params, paths, source.test_settings)
            risk, sums, turned_back = (np.asarray(x, float) for x in done)
            # A band whose edges are not a number never trades, and its risk alone would look finite.
            leaves = [np.asarray(leaf).reshape(len(risk), -1) for leaf in jax.tree.leaves(params)]
            sound = np.isfinite(np.concatenate(leaves, axis=1)).all(axis=1)
            value = np.where(sound, risk - self._reference[0], np.nan)
            influences = self.scale * (sums.mean(axis=0) - self._reference[1])
            return self.scale * value, influences, turned_back

        return measure

    def on_training_paths(self, keys: Array, n_paths: int) -> Array | float:
        """Risk of the optimum on the first training paths of each seed, money; 0 without an optimum."""
        if self.optimum is None:
            return 0.0
        settings = self.source.settings

        def risk(key) -> Array:
            paths, _ = self.source.train(jax.random.fold_in(key, 0), n_paths, settings)
            pnl = hedged_paths(self.policy, None, paths, self.contract, settings).pnl
            return metrics_of(settings)[self.metric].reduce(pnl)

        return jax.jit(partial(jax.lax.map, risk))(keys)
