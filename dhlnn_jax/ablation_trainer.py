"""One variant of an ablation: all its seeds by one compiled program, and what they measured so far."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dhlnn_jax.ablation import Variant, base_config, passes, seeing_noise, with_price_noise
from dhlnn_jax.ablation_judge import Judge
from dhlnn_jax.config import Config
from dhlnn_jax.files import from_plain, plain
from dhlnn_jax.fitting import build_update, rows_options
from dhlnn_jax.fleet import on_host
from dhlnn_jax.risk import clustered_stderr
from dhlnn_jax.train import CURVATURES, OBJECTIVES, TrainState, make_train_step

Point = dict[str, Any]


class _Spent(NamedTuple):
    """Since training began, a seed."""

    gradients: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Trainer:
    """All seeds of one variant, trained one after another by one compiled program of any number of epochs."""

    def __init__(self, variant: Variant, config: Config, judge: Judge, seeds: Sequence[int]):
        self.variant, self.config, self._judge = variant, base_config(config, variant.options), judge
        self.n_paths, self._settings = self.config.training.n_paths, judge.source.settings
        self.sample = judge.source.train
        update = build_update(variant.update, self.config)
        hedger = judge.hedger
        if variant.price_noise:
            hedger, self.sample = seeing_noise(hedger), with_price_noise(self.sample, variant.price_noise)
        step = make_train_step(
            hedger,
            self.sample,
            judge.contract,
            OBJECTIVES[config.risk.kind],
            update,
            n_paths=self.n_paths,
            curvature=CURVATURES.get(config.risk.kind),
            **rows_options(variant.update, self.config, compiled_free=True),
        )

        def train(states, keys, settings, n_epochs):
            def epoch(_, carry):
                (state, n_gradients, _), key = carry
                number = 0 if variant.fixed_data else state.epoch
                state, info = step(state, jax.random.fold_in(key, number), settings)
                return (state, n_gradients + info.n_gradients, (info.risk, info.turnover)), key

            def one_seed(of_seed):
                state, key = of_seed
                carry = (state, jnp.asarray(0), (jnp.asarray(jnp.nan), jnp.asarray(jnp.nan))), key
                return jax.lax.fori_loop(0, n_epochs, epoch, carry)[0]

            return jax.lax.map(one_seed, (states, keys))

        roots = jnp.stack([jax.random.key(seed) for seed in seeds])
        key_init, self.keys = (jax.vmap(jax.random.fold_in, (0, None))(roots, role) for role in (0, 1))
        params = judge.init(key_init)
        began = time.perf_counter()
        states = TrainState(params, jax.jit(jax.vmap(update.init))(params), jnp.zeros(len(seeds), int))
        # Lowered and compiled by hand: another shape would be an error here, not another compilation.
        lowered = jax.jit(train, donate_argnums=0).lower(states, self.keys, self._settings, 0)
        self._train = lowered.compile()
        self.states = self._train(states, self.keys, self._settings, 0)[0]  # its first call is slower
        self.compile_seconds = time.perf_counter() - began
        self._batch_reference = (
            judge.on_training_paths(self.keys, self.n_paths) if variant.fixed_data else 0.0
        )
        self._epoch, self._spent = 0, _Spent()
        self._clean: list[float | None] | None = None
        self.points: list[Point] = []
        self.influences: list[np.ndarray] = []

    def train_to(self, epoch: int, *, last: bool = False) -> None:
        """Trains until so many epochs are done, and measures."""
        n_seeds = len(self.keys)
        began, cpu = time.perf_counter(), time.process_time()
        done = self._train(self.states, self.keys, self._settings, epoch - self._epoch)
        self.states, n_gradients, (risk, turnover) = jax.block_until_ready(done)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        self._spent = _Spent(
            self._spent.gradients + float(np.mean(n_gradients)),
            self._spent.seconds + seconds / n_seeds,
            self._spent.cpu_seconds + cpu_seconds / n_seeds,
        )
        self._epoch, n = epoch, self._spent.gradients
        measured = self._judge.measurer(self.variant.price_noise)(self.states.params)
        value, influences, turned_back = measured
        if last and self.variant.price_noise:
            self._clean = plain(self._judge.measurer()(self.states.params)[0])
        n_passes = passes(self.config, self.variant.update, n_updates=epoch, n_gradients=n)
        self.influences.append(influences)
        batch_value = np.asarray(risk - self._batch_reference, float)
        if self.variant.fixed_data:
            batch_value = self._judge.scale * batch_value
        self.points.append(
            {
                "epochs": epoch,
                "paths": self.n_paths * (1 if self.variant.fixed_data else epoch),
                **self._spent._asdict(),
                **n_passes._asdict(),
                "value": plain(value),
                "stderr_paths": plain(clustered_stderr(jnp.asarray(influences))),
                "batch_value": plain(batch_value),
                "turnover": plain(np.asarray(turnover)),
                "round_trip": plain(turned_back),
            }
        )

    def log(self) -> dict[str, Any]:
        """All but its states, for a checkpoint."""
        return {
            "epoch": self._epoch,
            "spent": self._spent._asdict(),
            "points": self.points,
            "influences": [plain(x) for x in self.influences],
            "clean": self._clean,
        }

    def go_on_from(self, states: TrainState, log: dict[str, Any]) -> None:
        """Takes up what it left in a checkpoint."""
        self.states = jax.tree.map(jnp.asarray, on_host(states))
        self._epoch, self._spent, self._clean = log["epoch"], _Spent(**log["spent"]), log["clean"]
        self.points, self.influences = log["points"], [from_plain(x) for x in log["influences"]]

    def report(self) -> dict[str, Any]:
        variant = self.variant
        return {
            **{name: value for name, value in variant._asdict().items() if name != "slower"},
            "n_paths": self.n_paths,
            "compile_seconds": self.compile_seconds,
            "points": self.points,
            **({"clean_value": self._clean} if self._clean else {}),
        }
