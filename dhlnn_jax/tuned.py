"""Seconds until the regret is small, each method at the best of a grid of its options.

The best is picked in hindsight, by what the test paths say: nobody who trains has it. It is the fairest that
plain Adam can be compared with, and Adam has the largest grid.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np

from dhlnn_jax.config import Config, load_config, make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.fleet import Layout, keys_of, on_host
from dhlnn_jax.judge import Judge
from dhlnn_jax.methods import METHODS
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.runtime import path_mesh
from dhlnn_jax.train import TrainState, init_state, make_train_block
from dhlnn_jax.tuned_report import best_points, compare, print_tuned, reached, summary
from dhlnn_jax.workload import Answer, make_workload

WARMUP = 3  # epochs, of all points
_CLEAR = (0.05, 0.25)  # shares of the test paths that may say alone that the target is far


class Grid(NamedTuple):
    """What is tried of one method, all with all.

    Attributes:
      epochs: by paths an epoch; how long training is, and its cosine schedule if it has one.
      rates: learning rates; None where there is none. n_inner: inner steps; None: as configured.
    """

    epochs: dict[int, tuple[int, ...]]
    rates: tuple[float | None, ...] = (None,)
    n_inner: tuple[int | None, ...] = (None,)


GRIDS = {
    "dhntb": Grid(
        {
            250: (200, 400),
            500: (100, 200, 300),
            1000: (60, 100, 150, 200),
            2000: (40, 60, 100),
            5000: (25, 40),
        },
        rates=(5e-3, 1e-2, 2e-2, 3e-2),
    ),
    "dhlnn": Grid({1000: (100,), 2000: (60,)}, rates=(1e-3, 2e-3)),
    "dhlnn_newton": Grid({500: (150,), 1000: (100,), 2000: (60,)}, n_inner=(1, 2)),
}


class Point(NamedTuple):
    """One point of a grid."""

    method: str
    n_paths: int
    epochs: int
    rate: float | None
    n_inner: int | None


def grid_points(
    methods: Sequence[str],
    *,
    batch: Sequence[int] | None = None,
    rates: Sequence[float] | None = None,
    epochs: Sequence[int] | None = None,
) -> list[Point]:
    """All points of the grids; batch (paths an epoch), rates and epochs stand in for those of every grid.

    Raises: UsageError for a number of paths that a grid has no epochs for.
    """
    points = []
    for method in methods:
        grid = GRIDS[method]
        for n_paths in batch or grid.epochs:
            totals = epochs or grid.epochs.get(n_paths)
            if totals is None:
                known = ", ".join(map(str, grid.epochs))
                raise UsageError(f"--batch {n_paths}: {method} has {known} in its grid; or give --epochs")
            own_rates = grid.rates if rates is None or grid.rates == (None,) else rates
            points += [Point(method, n_paths, *rest) for rest in product(totals, own_rates, grid.n_inner)]
    return points


class Timed(NamedTuple):
    """Wall and processor seconds."""

    wall: float
    cpu: float


def timed(run: Callable[[], Any]) -> tuple[Any, Timed]:
    """What it returns when it is done, and the seconds it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = jax.block_until_ready(run())
    return done, Timed(time.perf_counter() - wall, time.process_time() - cpu)


class Program:
    """Training with one method, number of paths and of inner steps, compiled for all rates and lengths."""

    def __init__(self, config: Config, points: Sequence[Point], *, chunk: int | None, n_devices: int | None):
        first = points[0]
        self._config = _point_config(config, first)
        self._work = partial(
            make_workload, self._config, method=first.method, chunk=chunk, n_devices=n_devices
        )
        work = self._work()
        self.hedger, self._settings = work.hedger, work.settings
        self._layout = Layout(None, path_mesh(first.n_paths, devices=n_devices))
        self._init = jax.jit(lambda key: init_state(work.hedger, work.update, key))
        max_epochs = max(point.epochs for point in points)

        def train(state: TrainState, key: Any, settings: Any, rate: Any, epochs: Any, n: Any) -> TrainState:
            step = self._work(rate=rate, epochs=epochs).step
            return make_train_block(step, max_epochs=max_epochs)(state, key, settings, n)[0]

        jitted = jax.jit(train, out_shardings=self._layout.everywhere)
        self._train = jitted.lower(*self._arguments(self.init(0), 0, first), np.int32(0)).compile()
        # The first call of a program takes longer, whatever it does.
        jax.block_until_ready(self._train(*self._arguments(self.init(0), 0, first), np.int32(1)))

    def init(self, seed: int) -> TrainState:
        """State before the first epoch, that of an ordinary run with this seed."""
        return self._layout.place(self._init(keys_of(seed).init))

    def train(self, state: TrainState, seed: int, point: Point, n_epochs: int) -> tuple[TrainState, Timed]:
        """The state n_epochs later, and the seconds of the program alone; paths go by seed and epoch."""
        arguments = self._arguments(state, seed, point)
        return timed(lambda: self._train(*arguments, np.int32(n_epochs)))

    def _arguments(self, state: TrainState, seed: int, point: Point) -> tuple[Any, ...]:
        rate = np.float32(0.0 if point.rate is None else point.rate)
        others = (keys_of(seed).train, self._settings, rate, np.int32(point.epochs))
        return state, *self._layout.place(others)


def _point_config(config: Config, point: Point) -> Config:
    values = config.model_dump(mode="json")
    values["training"] |= {"n_paths": point.n_paths, "warmup": WARMUP}
    if point.n_inner is not None:
        section = "newton" if METHODS[point.method].update == "newton" else "nested"
        values[section]["n_inner"] = point.n_inner
    return make_config(values)


class Run:
    """One point with one seed, on its way.

    Attributes:
      curve: [epochs done, wall seconds, CPU seconds, regret in percent, its error] at every look.
    """

    def __init__(self, program: Program, point: Point, seed: int):
        self._program, self._point, self._seed = program, point, seed
        self.state, self.curve = program.init(seed), list[list[float]]()
        self._done, self._spent = 0, Timed(0.0, 0.0)

    def train_to(self, epoch: int) -> None:
        self.state, more = self._program.train(self.state, self._seed, self._point, epoch - self._done)
        self._done = epoch
        self._spent = Timed(self._spent.wall + more.wall, self._spent.cpu + more.cpu)

    def look(
        self, percent: Callable[..., tuple[float, float]], pnl: Callable[..., np.ndarray], target: float
    ):
        """Adds to the curve; once at the target, only the end is of interest."""
        at_end = self._done == self._point.epochs
        if at_end or not reached(self.curve, target):
            params = on_host(self.state.params)
            regret = percent(partial(pnl, params), shares=_CLEAR[1:] if at_end else _CLEAR)
            self.curve.append([self._done, *self._spent, *regret])


def look_epochs(epochs: int, looks: int) -> list[int]:
    """Epochs done at each of the looks, the last one at the end; a short training has fewer."""
    return sorted({max(1, round(epochs * (i + 1) / looks)) for i in range(looks)})


def tuned(options: argparse.Namespace) -> Answer:
    """Seconds to a small regret, each method at the best of its grid; evaluation is off the clock.

    A point that misses the target with one seed is no longer a candidate: the next seeds are not trained.
    """
    config = load_config(options.config, ["--seed", str(options.seed)])
    points = grid_points(options.methods, batch=options.batch, rates=options.rates, epochs=options.epochs)
    judge = Judge(config, options.n_paths, options.target)
    shared: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        shared.setdefault(_program_of(point), []).append(point)
    programs, pnls = {}, {}
    with progress_bar("compiling", len(shared)) as advance:
        for which, its_points in shared.items():
            programs[which] = Program(config, its_points, chunk=options.chunk, n_devices=options.devices)
            if its_points[0].method not in pnls:
                pnls[its_points[0].method] = judge.evaluator(programs[which].hedger)
            advance()
    curves: dict[Point, list[list[list[float]]]] = {point: [] for point in points}
    with progress_bar("training", options.seeds * options.looks * len(points)) as advance:
        for seed in range(config.seed, config.seed + options.seeds):
            left = [p for p in points if all(reached(curve, options.target) for curve in curves[p])]
            runs = {point: Run(programs[_program_of(point)], point, seed) for point in left}
            # All points are at the same share of their training, so that other load falls on all of them.
            for i in range(options.looks):
                for point, run in runs.items():
                    due = look_epochs(point.epochs, options.looks)
                    if i < len(due):
                        run.train_to(due[i])
                        run.look(judge.percent, pnls[point.method], options.target)
                    advance(note=f"seed {seed}, {point.method}")
            advance(options.looks * (len(points) - len(left)))
            for point, run in runs.items():
                curves[point].append(run.curve)
    rows = [{**point._asdict(), **summary(curves[point], options.target, options.seeds)} for point in points]
    best = best_points(rows)
    adam = best.get("dhntb")
    against = {
        name: compare(row, adam)
        for name, row in best.items()
        if name != "dhntb" and row is not None and adam is not None
    }
    answer = {
        "ours": {
            "target_percent": options.target,
            "seeds": options.seeds,
            "n_test_paths": options.n_paths,
            "best": best,
            "ratio_to_adam": against,
            "points": rows,
        }
    }
    print_tuned(answer)
    return answer


def _program_of(point: Point) -> tuple[Any, ...]:
    return point.method, point.n_paths, point.n_inner
