"""scripts/benchmark.py tuned: grids, looks that change nothing, and seeds that do not get there."""

import json
import math

import jax
import numpy as np
import pytest

from dhlnn_jax import benchmark, tuned, tuned_report
from dhlnn_jax.config import load_config, make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.judge import Judge
from dhlnn_jax.source import settings_of

TINY = """
[market]
volatility = 0.2
n_steps = 2
[cost]
rate = 5e-3
[risk]
risk_aversion = 50.0
[model]
hidden_sizes = [4]
prior = "whalley_wilmott"
[training]
schedule = "cosine"
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.runtime, "prepare", lambda **_: None)
    before = jax.config.jax_enable_compilation_cache
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    yield path
    jax.config.update("jax_enable_compilation_cache", before)


def curve(*rows):
    """Epochs, wall, CPU and percent of each look; errors of 0.01."""
    return [[*row, 0.01] for row in rows]


def test_seconds_are_those_of_the_first_look_at_the_target():
    rows = curve((2, 1.0, 1.5, 0.3), (4, 2.0, 3.0, 0.1), (6, 3.0, 4.5, 0.2), (8, 4.0, 6.0, 0.05))
    assert tuned_report.seconds_to(rows, 0.1) == (2.0, 3.0)
    assert tuned_report.seconds_to(rows, 0.01) == (math.inf, math.inf)
    assert tuned_report.seconds_to(curve((2, 1.0, 1.0, math.nan)), 0.1) == (math.inf, math.inf)


def test_a_seed_that_does_not_get_there_takes_the_mean_and_not_yet_the_median():
    there, slower, never = (curve((2, s, 2 * s, p)) for s, p in ((1.0, 0.05), (3.0, 0.07), (2.0, 0.6)))
    row = tuned_report.summary([there, slower, never], 0.1, 3)
    assert row["wall"] == {"mean": None, "median": 3.0, "by_seed": [1.0, 3.0, None]}
    assert row["cpu"]["by_seed"] == [2.0, 6.0, None] and row["n_reached"] == 2
    assert row["end_percent"] == pytest.approx(0.24)
    assert row["end_stderr"] == pytest.approx(np.std([0.05, 0.07, 0.6], ddof=1) / np.sqrt(3))
    cut_short = tuned_report.summary([never], 0.1, 3)
    assert (cut_short["n_trained"], cut_short["wall"]["median"]) == (1, None)
    json.dumps(tuned_report.summary([curve((2, 1.0, 1.0, math.nan))], 0.1, 1), allow_nan=False)


def test_best_is_the_smallest_mean_of_points_that_all_seeds_reach():
    def row(method, n_paths, *seconds):
        curves = [curve((1, s, s, 0.05 if s < 9 else 1.0)) for s in seconds]
        return {"method": method, "n_paths": n_paths, **tuned_report.summary(curves, 0.1, 2)}

    rows = [row("a", 1, 1.0, 9.0), row("a", 2, 3.0, 3.0), row("a", 3, 2.0, 3.0), row("b", 1, 9.0, 9.0)]
    best = tuned_report.best_points(rows)
    assert best["a"]["n_paths"] == 3 and "curves" not in best["a"] and best["b"] is None


def test_ratios_are_taken_seed_by_seed():
    def row(wall, cpu):
        return {"wall": {"by_seed": wall}, "cpu": {"by_seed": cpu}}

    ratios = tuned_report.compare(row([1.0, 3.0], [1.0, 1.0]), row([4.0, 4.0], [2.0, 4.0]))
    assert ratios["wall"] == {"mean": 0.5, "min": 0.25, "max": 0.75, "by_seed": [0.25, 0.75]}
    assert ratios["cpu"]["mean"] == pytest.approx(0.375)


def test_grids_hold_all_combinations_and_options_stand_in_for_them():
    assert len(tuned.grid_points(["dhntb"])) == 4 * (2 + 3 + 4 + 3 + 2)
    newton = tuned.grid_points(["dhlnn_newton"], rates=[0.5], batch=[1000])
    assert [(p.rate, p.n_inner) for p in newton] == [(None, 1), (None, 2)]
    assert tuned.grid_points(["dhntb"], batch=[7], rates=[0.5], epochs=[3]) == [
        tuned.Point("dhntb", 7, 3, 0.5, None)
    ]
    with pytest.raises(UsageError, match="--batch 7: dhntb has 250"):
        tuned.grid_points(["dhntb"], batch=[7])


def test_looks_are_even_and_the_last_one_is_the_end():
    assert tuned.look_epochs(25, 10) == [2, 5, 8, 10, 12, 15, 18, 20, 22, 25]
    assert tuned.look_epochs(3, 10) == [1, 2, 3]


def test_training_is_the_same_whatever_the_looks_and_the_schedule_goes_by_the_point(config_file):
    config = load_config(config_file)
    points = tuned.grid_points(["dhntb"], batch=[16], rates=[1e-2], epochs=[6, 9])
    program = tuned.Program(config, points, chunk=None, n_devices=1)

    def params(point, looks):
        run = tuned.Run(program, point, seed=1)
        for epoch in looks:
            run.train_to(epoch)
            run.look(lambda pnl, shares: (1.0, 0.1), lambda params, n: None, 0.1)
        assert [row[0] for row in run.curve] == looks and run.curve[-1][1] > 0
        return jax.tree.leaves(tuned.on_host(run.state.params))

    once, often = params(points[0], [6]), params(points[0], [1, 4, 6])
    assert all((a == b).all() for a, b in zip(once, often, strict=True))
    longer = params(points[1], [6])
    assert any((a != b).any() for a, b in zip(once, longer, strict=True))


def test_run_stops_looking_at_the_target_and_looks_at_the_end():
    run = object.__new__(tuned.Run)
    run._point, run._spent, run.curve = tuned.Point("dhntb", 1, 5, 0.1, None), tuned.Timed(1.0, 1.0), []
    run.state = tuned.TrainState({}, None, 0)
    regrets = iter([0.5, 0.08, 0.12])
    for run._done in (1, 2, 3, 4, 5):
        run.look(lambda pnl, shares: (next(regrets), 0.0), lambda params, n: None, 0.1)
    assert [row[0] for row in run.curve] == [1, 2, 5]


def test_judge_goes_on_to_more_paths_only_near_the_target(monkeypatch):
    monkeypatch.setattr("dhlnn_jax.judge._FEW", 100)
    judge = object.__new__(Judge)
    judge.settings, judge._target, judge._value = settings_of(make_config({})), 0.1, 0.03
    judge._optimal = 0.01 * np.random.default_rng(0).normal(size=200)
    asked = []

    def pnl(worse):
        return lambda n: asked.append(n) or judge._optimal[:n] - worse

    far, error = judge.percent(pnl(0.01), shares=(0.05, 0.25))
    assert asked == [10] and far == pytest.approx(100 * 0.01 / judge._value, rel=1e-3)
    assert judge.percent(pnl(0.0), shares=(0.05, 0.25))[0] == pytest.approx(0.0, abs=1e-6)
    assert asked == [10, 10, 50, 200]


def test_tiny_grid_end_to_end(config_file, tmp_path, monkeypatch, capsys):
    path, newton = tmp_path / "numbers.json", tuned.GRIDS["dhlnn_newton"]
    monkeypatch.setitem(tuned.GRIDS, "dhlnn_newton", newton._replace(n_inner=(1,)))
    arguments = ["tuned", "--config", str(config_file), "--n-paths", "50", "--seeds", "2", "--looks", "2"]
    arguments += ["--methods", "dhntb", "dhlnn_newton"]
    arguments += ["--batch", "16", "--epochs", "2", "--rates", "1e-3", "--target", "1e6", "--json", str(path)]
    assert benchmark.main(arguments) == 0
    out = capsys.readouterr().out
    assert "| dhntb, 16 paths, 2 epochs, rate 0.001 |" in out and "dhlnn_newton / dhntb" in out
    ours = json.loads(path.read_text())["tuned"]["ours"]
    assert [(p["method"], p["n_inner"]) for p in ours["points"]] == [("dhntb", None), ("dhlnn_newton", 1)]
    for point in ours["points"]:
        assert point["n_reached"] == 2 and 0 < point["wall"]["mean"] < 60 and len(point["curves"]) == 2
        assert point["curves"][0][-1][0] == 2
    assert set(ours["best"]) == {"dhntb", "dhlnn_newton"} and "load_after" in ours["machine"]
    ratio = ours["ratio_to_adam"]["dhlnn_newton"]["wall"]
    assert ratio["min"] <= ratio["mean"] <= ratio["max"] and len(ratio["by_seed"]) == 2


def test_not_reached_is_said(capsys):
    rows = [{**point._asdict(), **tuned_report.summary([curve((1, 1.0, 1.0, 2.0))], 0.1, 1)}
            for point in tuned.grid_points(["dhlnn"], batch=[16], epochs=[1], rates=[1e-3])]  # fmt: skip
    best = tuned_report.best_points(rows)
    ours = {"target_percent": 0.1, "seeds": 1, "points": rows, "best": best, "ratio_to_adam": {}}
    tuned_report.print_tuned({"ours": ours})
    out = capsys.readouterr().out
    assert (
        "| dhlnn, 16 paths, 1 epochs, rate 0.001 | 2.000 ± – | 0 of 1 | never (never) | never (never) |"
        in out
    )
    assert "dhlnn: no point reached 0.1 % with all seeds" in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--batch", "7"], "--batch 7: dhntb has"),
        (["--methods", "bsdh"], "invalid choice"),
        (["--seeds", "0"], "must be a whole number above 0"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert benchmark.main(["tuned", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
