"""Runs an ablation: every variant from the same seeds, one program each, measured on the same test paths.

The variants take turns from one measurement to the next, so that a machine that slows down slows all of them.
"""

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
    measured_epochs,
    variants_of,
)
from dhlnn_jax.ablation_judge import Judge
from dhlnn_jax.ablation_trainer import Point, Trainer
from dhlnn_jax.checkpoint import Checkpoints
from dhlnn_jax.config import Config
from dhlnn_jax.files import from_plain, plain
from dhlnn_jax.fitting import build_hedger
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import machine
from dhlnn_jax.risk import clustered_stderr
from dhlnn_jax.source import make_source

DIVERGED = 1_000.0  # percent of the optimum
SCHEMA = 2  # of ablation.json
_TEST = 3  # the role of test paths, folded into the key of a seed as in `experiment`


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
            trainers[name] = Trainer(variant, config, judge, asked.seeds)
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


def _go_on(trainers: list[Trainer], checkpoints: Checkpoints) -> int:
    """Takes all to the last checkpoint; the epoch of it, 0 without one."""
    saved = checkpoints.latest([trainer.states for trainer in trainers])
    if saved is None:
        return 0
    every_states, log = saved
    for trainer, states, own in zip(trainers, every_states, log["trainers"], strict=True):
        trainer.go_on_from(states, own)
    return int(log["epoch"])


def _paired(
    variants: dict[str, Variant], trainers: dict[str, Trainer], budgets: Sequence[str]
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
            values = [from_plain(p["value"]) for p in points]
            influences = [trainer.influences[i] for trainer, i in zip(pair, at, strict=True)]
            apart = values[0] - values[1]
            spread = np.std(apart, ddof=1) / np.sqrt(len(apart)) if len(apart) > 1 else np.nan
            report[name][budget] = {
                "at": [p["epochs"] for p in points],
                "spent": [p[budget] for p in points],
                "value": plain(np.mean(apart)),
                "stderr_paths": plain(clustered_stderr(jnp.asarray(influences[0] - influences[1]))),
                "stderr_seeds": plain(spread),
                "by_seed": plain(apart),
            }
    return report


def last_within(points: list[Point], budget: str, most: int | float) -> int:
    """Index of the last point that has spent no more; the first one if all have."""
    return max([i for i, point in enumerate(points) if point[budget] <= most], default=0)
