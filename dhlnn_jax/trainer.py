"""Trains one method for all members of a fleet: checkpoints, validation, measurements, a progress bar.

One compiled program runs all members to the next epoch that the host must look at. An ordinary run is a fleet
of one.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from dhlnn_jax import traces
from dhlnn_jax.checkpoint import Checkpoints
from dhlnn_jax.compiling import jit_for_seldom, options_for_often, options_for_seldom
from dhlnn_jax.evaluate import Measurement, as_report, measure, standard_errors
from dhlnn_jax.fitting import (
    build_hedger,
    build_update,
    learning_rate,
    made_from,
    make_contract,
    remedy,
    rows_options,
    shared_made_from,
)
from dhlnn_jax.fleet import (
    Member,
    keys_of,
    layout_of,
    member_of,
    on_host,
    over_members,
    stacked,
)
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.settings import Settings
from dhlnn_jax.train import (
    CURVATURES,
    OBJECTIVES,
    TrainInfo,
    TrainState,
    first_state,
    make_train_block,
    make_train_step,
)
from dhlnn_jax.validation import Validation

Params = Any
Judge = Callable[[int, Measurement], dict[str, Any]]

_SECONDS_UNSEEN = 2.0  # a block of epochs ends, at the latest, when the progress bar should move


class TrainedMember(NamedTuple):
    """What training gave one member.

    Attributes:
      best, last: parameters after its best and its last epoch, on the host.
      curve: {"epoch", "risk", "turnover"} of every training batch, and {"validation_epoch",
        "validation_risk"}.
      history: metrics on the test paths after `evaluation.epochs`, and what had been spent by then.
      best_epoch: of the smallest validation risk.
      gradient_evaluations: of the whole training, resumed parts included.
      most_rises: the most inner steps in a row that raised the linearized objective.
    """

    best: Params
    last: Params
    curve: dict[str, list[float]]
    history: list[dict[str, Any]]
    best_epoch: int
    gradient_evaluations: int
    most_rises: int


class TrainedMethod(NamedTuple):
    """What training one method gave; seconds are those of all members together, resumed parts included."""

    members: tuple[TrainedMember, ...]
    train_seconds: float
    compile_seconds: float


def train_method(
    name: str,
    members: Sequence[Member],
    checkpoint_folder: Path | None = None,
    judge: Judge = lambda i, measurement: {},
) -> TrainedMethod:
    """Trains a method to `training.epochs`, going on from its last checkpoint if there is one.

    Args:
      members: what is not their own (see `fleet.Member`) is the first one's.
      checkpoint_folder: for this method alone; None keeps no checkpoints.
      judge: adds to what member i measured at `evaluation.epochs`, as the regret to the optimum.
    Raises: FloatingPointError naming method, member and epoch if outputs, validation risks or parameters
      stop being finite.
    """
    trainer = _Trainer(name, members, Checkpoints(checkpoint_folder), judge)
    with progress_bar(f"training {name}", trainer.epochs) as advance:
        advance(trainer.epoch)
        while trainer.epoch < trainer.epochs:
            n_epochs, risk = trainer.train_block()
            advance(n_epochs, note=f"risk {risk:.5f}")
            trainer.look()
    return trainer.result()


class _Saved(NamedTuple):
    """The arrays of a checkpoint, each [n_members, ...]."""

    state: TrainState
    best_params: Params


class _Trainer:
    def __init__(self, name: str, members: Sequence[Member], checkpoints: Checkpoints, judge: Judge):
        self.name, self._members, self._checkpoints, self._judge = name, members, checkpoints, judge
        self._config = config = members[0].config
        self._training = training = config.training
        self.epochs = training.epochs
        keys = [keys_of(member.config.seed) for member in members]
        self._layout = layout_of(len(members), n_paths=training.n_paths, devices=training.devices)
        self._max_epochs = min(training.validation_every, training.checkpoint_every, training.epochs)
        self._settings = stacked([member.source.settings for member in members])
        rates = np.array([learning_rate(name, member.config) for member in members], np.float32)
        hedger = build_hedger(name, config)
        self._validation = Validation(name, members, [key.validation for key in keys], self._layout)

        def begin(params: Params, rate: Array) -> TrainState:
            return first_state(params, build_update(name, config, rate))

        told = shared_made_from("initial parameters of", name, config, members[0].source)
        params = _initial_params(hedger.init, told)(jnp.stack([key.init for key in keys]))
        state = on_host(jit_for_seldom(over_members(begin))(params, rates))
        saved = checkpoints.latest(_Saved(state, state.params))
        (state, self._best_params), self._log = saved or (_Saved(state, state.params), _new_log(len(members)))
        self._best_params = on_host(self._best_params)
        self.epoch = int(state.epoch[0])
        self._state = self._layout.place(state)
        self._arguments = jnp.stack([key.train for key in keys]), self._settings, rates
        if self._layout.members is not None:
            self._arguments = self._layout.place(self._arguments)

        began = time.perf_counter()
        self._compiled = traces.compiled(
            self._program(),
            (self._state, *self._arguments, np.int32(0)),
            made_from=made_from(name, config, members[0].source),
            returns=(state, TrainInfo._make(TrainInfo._fields)),
            donate_first=True,
            out_shardings=self._layout.everywhere,
            compiler_options=options_for_often(),
        )
        self._log["compile_seconds"] += time.perf_counter() - began
        self._seconds_an_epoch = 0.0

    def _program(self) -> Callable[..., tuple[TrainState, TrainInfo]]:
        """(states, keys, settings, learning rates, n_epochs) -> (states, infos [n_members, max_epochs])."""
        name, config, mesh = self.name, self._config, self._layout.paths
        sample = self._members[0].source.train
        hedger, contract = build_hedger(name, config), make_contract(config)
        training, objective, max_epochs = self._training, OBJECTIVES[config.risk.kind], self._max_epochs
        rows = rows_options(name, config)

        def member(
            state: TrainState, key: PRNGKeyArray, settings: Settings, rate: Array, n_epochs: ArrayLike
        ) -> tuple[TrainState, TrainInfo]:
            step = make_train_step(
                hedger, sample, contract, objective, build_update(name, config, rate),
                n_paths=training.n_paths, curvature=CURVATURES.get(config.risk.kind),
                mesh=mesh, **rows,
            )  # fmt: skip
            return make_train_block(step, max_epochs=max_epochs)(state, key, settings, n_epochs)

        return over_members(member, mesh=self._layout.members, n_common=1, at_once=True)

    def train_block(self) -> tuple[int, float]:
        """Trains to the next epoch that must be looked at; the epochs done and the mean risk of the last."""
        n_epochs = self._next_look() - self.epoch
        if self._seconds_an_epoch * n_epochs > _SECONDS_UNSEEN:
            n_epochs = max(1, int(_SECONDS_UNSEEN / self._seconds_an_epoch))
        began = time.perf_counter()
        done = self._compiled(self._state, *self._arguments, np.int32(n_epochs))
        self._state, infos = jax.block_until_ready(done)
        seconds = time.perf_counter() - began
        self._log["train_seconds"] += seconds
        self._seconds_an_epoch = seconds / n_epochs
        infos = jax.tree.map(lambda rows: rows[:, :n_epochs], on_host(infos))
        if not infos.finite.all():
            first = int(np.argmin(infos.finite.all(axis=0)))
            what = f"network outputs are not finite in epoch {self.epoch + first + 1}"
            self._stop(int(np.argmin(infos.finite[:, first])), what)
        for i, log in enumerate(self._log["members"]):
            # The batch's risk is that of the parameters before the update.
            log["curve"]["epoch"] += range(self.epoch, self.epoch + n_epochs)
            log["curve"]["risk"] += infos.risk[i].tolist()
            log["curve"]["turnover"] += infos.turnover[i].tolist()
            log["gradient_evaluations"] += int(infos.n_gradients[i].sum())
            log["most_rises"] = max(log["most_rises"], int(infos.n_rises[i].max()))
        self.epoch += n_epochs
        return n_epochs, float(infos.risk[:, -1].mean())

    def _next_look(self) -> int:
        training, epoch = self._training, self.epoch
        steps = training.validation_every, training.checkpoint_every
        measured = [e for e in self._config.evaluation.epochs if e > epoch]
        return min([(epoch // step + 1) * step for step in steps] + measured + [self.epochs])

    def look(self) -> None:
        """Validates, measures and saves what is due after this epoch."""
        training, epoch = self._training, self.epoch
        if epoch % training.validation_every == 0 or epoch == self.epochs:
            self._validate()
        if epoch in self._config.evaluation.epochs:
            self._measure()
        if epoch % training.checkpoint_every == 0 or epoch == self.epochs:
            self._checkpoints.save(epoch, _Saved(on_host(self._state), self._best_params), self._log)

    def _validate(self) -> None:
        params = on_host(self._state.params)
        risks = self._validation(params)
        for i, log in enumerate(self._log["members"]):
            own, risk = member_of(params, i), float(risks[i])
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own)):
                self._stop(i, f"parameters are not finite after epoch {self.epoch}")
            if not np.isfinite(risk):
                self._stop(i, f"validation risk is {risk} after epoch {self.epoch}")
            log["curve"]["validation_epoch"].append(self.epoch)
            log["curve"]["validation_risk"].append(risk)
            if log["best_risk"] is None or risk < log["best_risk"]:
                log["best_risk"], log["best_epoch"] = risk, self.epoch
                for best, leaf in zip(jax.tree.leaves(self._best_params), jax.tree.leaves(own), strict=True):
                    best[i] = leaf

    def _measure(self) -> None:
        money = self._validation.evaluate(
            on_host(self._state.params),
            [member.source.test for member in self._members],
            stacked([member.source.test_settings for member in self._members]),
        )
        for i, (member, log) in enumerate(zip(self._members, self._log["members"], strict=True)):
            measurement = measure(member_of(money, i), member.source.test_settings)
            stderrs = standard_errors(measurement.influences, member.source.test_groups)
            spent = {
                "train_seconds": self._log["train_seconds"],
                "gradient_evaluations": log["gradient_evaluations"],
            }
            metrics = as_report(measurement.values, stderrs)
            log["history"].append({"epoch": self.epoch, **spent, **metrics, **self._judge(i, measurement)})

    def _stop(self, i: int, what: str) -> None:
        config, label = self._members[i].config, self._members[i].label
        raise FloatingPointError(
            f"{self.name}{f' ({label})' if label else ''}: {what}; {remedy(self.name, config)} "
            f"(last good checkpoint: {self._checkpoints.newest or 'none'})"
        )

    def result(self) -> TrainedMethod:
        last_params = on_host(self._state.params)
        trained = [
            TrainedMember(
                best=member_of(self._best_params, i),
                last=member_of(last_params, i),
                curve=log["curve"],
                history=log["history"],
                best_epoch=log["best_epoch"],
                gradient_evaluations=log["gradient_evaluations"],
                most_rises=log["most_rises"],
            )
            for i, log in enumerate(self._log["members"])
        ]
        return TrainedMethod(tuple(trained), self._log["train_seconds"], self._log["compile_seconds"])


@lru_cache(maxsize=32)  # compiled once for all methods that share a network
def _initial_params(
    init: Callable[[PRNGKeyArray], Params], made_from: str | None
) -> Callable[[PRNGKeyArray], Params]:
    return traces.jit(over_members(init), made_from=made_from, compiler_options=options_for_seldom())


def _new_log(n_members: int) -> dict[str, Any]:
    names = ("epoch", "risk", "turnover", "validation_epoch", "validation_risk")

    def of_member() -> dict[str, Any]:
        curve: dict[str, list[float]] = {name: [] for name in names}
        return {
            "curve": curve,
            "history": [],
            "best_risk": None,
            "best_epoch": 0,
            "gradient_evaluations": 0,
            "most_rises": 0,
        }

    return {
        "members": [of_member() for _ in range(n_members)],
        "train_seconds": 0.0,
        "compile_seconds": 0.0,
    }
