"""Runs an ablation: every variant from the same seeds, one program each, measured on the same test paths.

The variants take turns from one measurement to the next, so that a machine that slows down slows all of them.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dhlnn_jax import resumable
from dhlnn_jax.ablation import (
    Study,
    Variant,
    base_config,
    measured_epochs,
    passes,
    seeing_noise,
    variants_of,
    with_price_noise,
)
from dhlnn_jax.ablation_judge import Judge
from dhlnn_jax.checkpoint import Checkpoints
from dhlnn_jax.config import Config
from dhlnn_jax.fitting import build_hedger, build_update, rows_options
from dhlnn_jax.fleet import on_host
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import machine
from dhlnn_jax.risk import clustered_stderr
from dhlnn_jax.source import make_source
from dhlnn_jax.train import CURVATURES, OBJECTIVES, TrainState, make_train_step

DIVERGED = 1_000.0  # percent of the optimum
SCHEMA = 2  # of ablation.json
_TEST = 3  # the role of test paths, folded into the key of a seed as in `experiment`

Point = dict[str, Any]


class Asked(NamedTuple):
    """What a study is asked for.

    Attributes:
      n_seeds: seeds config.seed, config.seed + 1, ...; a seed is initial parameters and training paths, the
        same for all variants and those of `scripts/run.py --seed`.
      hedger: the method whose network is trained, "dhntb" (the band) or "dhmlp".
      paths, rows: see `variants_of`.
    """

    study: Study
    config: Config
    n_seeds: int = 5
    hedger: str = "dhntb"
    paths: Sequence[int] = ()
    rows: Sequence[str] = ()

    @property
    def seeds(self) -> list[int]:
        """Of every variant."""
        return list(range(self.config.seed, self.config.seed + self.n_seeds))

    @property
    def told(self) -> resumable.Told:
        """The same as it is in ablation.json."""
        return {
            "study": self.study,
            "hedger": self.hedger,
            "seeds": self.seeds,
            "paths": list(self.paths),
            "rows": list(self.rows),
            "config": self.config.model_dump(mode="json"),
        }


def run_study(asked: Asked, *, checkpoint_folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """The contents of ablation.json after each measured epoch: whole, but for the epochs still to come.

    What was measured by the last checkpoint comes first, at once.

    Args:
      checkpoint_folder: where every measured epoch leaves a checkpoint, and the last one is gone on from;
        None keeps none.
    Returns: per variant "points", one a measured epoch: spent so far, a seed: epochs, paths, gradients,
      forward, jvp, vjp, seconds (wall) and cpu_seconds (of this process), compilation apart; a list over
      seeds: value (regret on the test paths in percent of the optimum if "unit" is "percent", else regret or
      risk in money), batch_value (risk of the last training batch before its update, money; with fixed data
      as value, on the training paths), turnover on that batch, round_trip (units bought and sold again, or
      the reverse, a test path); stderr_paths of the mean value.
      A number that is not finite is None. "clock": which seconds are the budget; on a CPU those of the
      process, since a machine is seldom idle. "paired": see `_paired`.
    Raises: UsageError as `variants_of` and `make_source`, and for checkpoints of another study.
    """
    config = asked.config
    variants = variants_of(asked.study, config, asked.paths, asked.rows, hedger=asked.hedger)
    source = make_source(config, jax.random.fold_in(jax.random.key(config.seed), _TEST))
    if checkpoint_folder is not None:
        resumable.begin(checkpoint_folder, asked.told)
    judge = Judge(config, source, build_hedger(asked.hedger, config))
    clock = "cpu_seconds" if jax.default_backend() == "cpu" else "seconds"
    epochs = measured_epochs(config)
    with progress_bar("compiling", len(variants)) as advance:
        trainers = {}
        for name, variant in variants.items():
            trainers[name] = _Trainer(variant, config, judge, asked.seeds)
            advance(note=variant.label)
    checkpoints = Checkpoints(checkpoint_folder)
    before = _go_on(list(trainers.values()), checkpoints)
    n_slower = sum(variant.slower for variant in variants.values())
    with progress_bar("training", epochs[-1] * n_slower) as advance:
        advance(before * n_slower)
        for epoch in (epoch for epoch in epochs if epoch >= before):
            if epoch > before:
                for variant, trainer in zip(variants.values(), trainers.values(), strict=True):
                    trainer.train_to(epoch * variant.slower, last=epoch == epochs[-1])
                    advance((epoch - before) * variant.slower, note=variant.label)
                every = trainers.values()
                checkpoints.save(
                    epoch,
                    [trainer.states for trainer in every],
                    {"epoch": epoch, "trainers": [trainer.log() for trainer in every]},
                )
            before = epoch
            yield {
                "schema": SCHEMA,
                **asked.told,
                "finished": epoch == epochs[-1],
                "metric": judge.metric,
                "unit": judge.unit,
                "optimum": judge.optimum
                and {
                    "value": judge.optimum.value,
                    "error": judge.optimum.error,
                    "round_trip": judge.round_trip,
                },
                "clock": clock,
                "machine": machine(),
                "variants": {name: trainer.report() for name, trainer in trainers.items()},
                "paired": _paired(variants, trainers, ("epochs", "gradients", clock)),
            }


def _go_on(trainers: "list[_Trainer]", checkpoints: Checkpoints) -> int:
    """Takes all to the last checkpoint; the epoch of it, 0 without one."""
    saved = checkpoints.latest([trainer.states for trainer in trainers])
    if saved is None:
        return 0
    every_states, log = saved
    for trainer, states, own in zip(trainers, every_states, log["trainers"], strict=True):
        trainer.go_on_from(states, own)
    return int(log["epoch"])


class _Spent(NamedTuple):
    """Since training began, a seed."""

    gradients: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class _Trainer:
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
            self._clean = _plain(self._judge.measurer()(self.states.params)[0])
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
                "value": _plain(value),
                "stderr_paths": _number(clustered_stderr(jnp.asarray(influences))),
                "batch_value": _plain(batch_value),
                "turnover": _plain(np.asarray(turnover)),
                "round_trip": _plain(turned_back),
            }
        )

    def log(self) -> dict[str, Any]:
        """All but its states, for a checkpoint."""
        return {
            "epoch": self._epoch,
            "spent": self._spent._asdict(),
            "points": self.points,
            "influences": [_plain(x) for x in self.influences],
            "clean": self._clean,
        }

    def go_on_from(self, states: TrainState, log: dict[str, Any]) -> None:
        """Takes up what it left in a checkpoint."""
        self.states = jax.tree.map(jnp.asarray, on_host(states))
        self._epoch, self._spent, self._clean = log["epoch"], _Spent(**log["spent"]), log["clean"]
        self.points, self.influences = log["points"], [_array(x) for x in log["influences"]]

    def report(self) -> dict[str, Any]:
        variant = self.variant
        return {
            **{name: value for name, value in variant._asdict().items() if name != "slower"},
            "n_paths": self.n_paths,
            "compile_seconds": self.compile_seconds,
            "points": self.points,
            **({"clean_value": self._clean} if self._clean else {}),
        }


def _paired(
    variants: dict[str, Variant], trainers: dict[str, _Trainer], budgets: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Value of each variant less its reference's, at equal budgets.

    The budget is the most that both have spent, each stands where it was last measured within it: "at" are
    their epochs, "spent" what they had spent, "value" the mean over seeds, "stderr_paths" and "stderr_seeds"
    its standard errors over test paths and over seeds, "by_seed" the differences.
    """
    report: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        if name == variant.reference:
            continue
        pair = trainers[name], trainers[variant.reference]
        report[name] = {}
        for budget in budgets:
            most = min(trainer.points[-1][budget] for trainer in pair)
            at = [last_within(trainer.points, budget, most) for trainer in pair]
            points = [trainer.points[i] for trainer, i in zip(pair, at, strict=True)]
            values = [_array(p["value"]) for p in points]
            influences = [trainer.influences[i] for trainer, i in zip(pair, at, strict=True)]
            apart = values[0] - values[1]
            spread = np.std(apart, ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else np.nan
            report[name][budget] = {
                "at": [p["epochs"] for p in points],
                "spent": [p[budget] for p in points],
                "value": _number(np.mean(apart)),
                "stderr_paths": _number(clustered_stderr(jnp.asarray(influences[0] - influences[1]))),
                "stderr_seeds": _number(spread),
                "by_seed": _plain(apart),
            }
    return report


def last_within(points: list[Point], budget: str, most: int | float) -> int:
    """Index of the last point that has spent no more; the first one if all have."""
    return max([i for i, point in enumerate(points) if point[budget] <= most], default=0)


def _number(x: Any) -> float | None:
    x = float(x)
    return x if np.isfinite(x) else None


def _plain(values: np.ndarray) -> list[float | None]:
    return [_number(x) for x in values]


def _array(plain: list[float | None]) -> np.ndarray:
    """What `_plain` was given, but for infinities."""
    return np.array([np.nan if x is None else x for x in plain])
