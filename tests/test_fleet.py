"""Many hedgers in one program: each is the ordinary run of its seed, whatever the others and the devices."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import CONFIGS, METRICS, small_run, smoke_run
from test_experiment import counted_epochs, without_seconds

from dhlnn_jax import figures, report
from dhlnn_jax.case import make_case
from dhlnn_jax.checkpoint import load_tree
from dhlnn_jax.errors import UsageError
from dhlnn_jax.fitting import build_hedger, evaluator
from dhlnn_jax.fleet import fleet_evaluator, over_members, stacked
from dhlnn_jax.hedger import rule_policy
from dhlnn_jax.notes import notes_of
from dhlnn_jax.source import make_source
from dhlnn_jax.trained import load

SEEDS = ("--methods", "dhntb", "bsdh", "--seeds", "2")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def two(base):
    return small_run(base, "two", *SEEDS)


def params_of(folder, hedger):
    return load_tree(folder, jax.eval_shape(hedger.init, jax.random.key(0)))


def assert_close(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


def test_function_of_one_becomes_a_function_of_many():
    def fn(x, settings, factor):
        return {"sum": x.sum() * factor, "n": settings["a"]}

    rows, numbers = jnp.arange(6.0).reshape(3, 2), {"a": jnp.array([5.0, 6.0, 7.0])}
    done = jax.jit(over_members(fn, n_common=1))(rows, numbers, 2.0)
    np.testing.assert_array_equal(done["sum"], [2.0, 10.0, 18.0])
    np.testing.assert_array_equal(done["n"], numbers["a"])


def test_evaluator_of_members_is_that_of_each(base):
    case = make_case(smoke_run(base).config, make_source(smoke_run(base).config, jax.random.key(0)))
    policy = rule_policy(lambda path, settings: settings.strike * jnp.ones_like(path.spot))
    paths = [jax.tree.map(lambda x, n=n: x[n : n + 7], case.source.test) for n in (0, 7)]
    settings = [case.source.settings._replace(strike=jnp.asarray(k)) for k in (0.9, 1.1)]
    both = fleet_evaluator(policy, case.contract)(None, paths, stacked(settings))
    for i in range(2):
        alone = evaluator(policy, case.contract)(None, paths[i], settings[i])
        np.testing.assert_allclose(both.pnl[i], alone.pnl, atol=1e-7)
    assert both.pnl.shape == (2, 7) and np.abs(both.pnl[0] - both.pnl[1]).max() > 1e-4


def test_every_seed_is_the_ordinary_run_of_that_seed(base, two):
    row = two.metrics["methods"]["dhntb"]
    assert [own["seed"] for own in row["by_seed"]] == [0, 1]
    hedger = build_hedger("dhntb", two.config)
    for seed, own in enumerate(row["by_seed"]):
        alone = small_run(base, f"alone_{seed}", "--methods", "dhntb", "--seed", str(seed))
        expected = alone.metrics["methods"]["dhntb"]
        for name in ("risk", "turnover", "validation_risk"):
            np.testing.assert_allclose(own["training"][name], expected["training"][name], rtol=1e-4)
        assert own["best_epoch"] == expected["best_epoch"]
        where = two.folder / "params" / "dhntb" / (f"seed_{seed}" if seed else "")
        for which in ("best", "last"):
            assert_close(
                params_of(where / which, hedger), params_of(alone.folder / "params/dhntb" / which, hedger)
            )
    # the first seed is judged on the same test paths as alone
    first = smoke_run(base).metrics["methods"]["dhntb"]
    for metric in METRICS:
        found, wanted = row["by_seed"][0]["final"][metric], first["final"][metric]
        assert found["value"] == pytest.approx(wanted["value"], rel=1e-4, abs=1e-7)
        assert found["stderr"] == pytest.approx(wanted["stderr"], rel=1e-3, abs=1e-9)
    np.testing.assert_allclose(two.pnl["dhntb/pnl"], smoke_run(base).pnl["dhntb/pnl"], atol=1e-5)


def test_row_is_the_mean_over_seeds_with_both_errors(two):
    row = two.metrics["methods"]["dhntb"]
    for metric in METRICS:
        values, errors = (
            np.array([own["final"][metric][x] for own in row["by_seed"]]) for x in ("value", "stderr")
        )
        assert row["final"][metric]["value"] == pytest.approx(values.mean(), rel=1e-6)
        of_seeds = values.std(ddof=1) / np.sqrt(2)
        # errors from shared paths neither vanish in the mean nor exceed those of its parts
        assert of_seeds <= row["final"][metric]["stderr"] <= np.hypot(of_seeds, errors.max()) * 1.0001
    percents = [own["regret"]["percent"] for own in row["by_seed"]]
    assert row["regret"]["percent"] == pytest.approx(np.mean(percents), rel=1e-3)
    assert row["regret"]["percent_stderr"] >= np.std(percents, ddof=1) / np.sqrt(2)
    pair = two.metrics["paired"]["dhntb-bsdh"]["pnl_mean"]
    delta = two.metrics["methods"]["bsdh"]["final"]["pnl_mean"]["value"]
    assert pair["value"] == pytest.approx(row["final"]["pnl_mean"]["value"] - delta, abs=1e-9)
    assert row["paths_simulated"] == 2 * 8 * 256 and row["gradient_evaluations"] == 2 * 8
    assert "by_seed" not in two.metrics["methods"]["bsdh"]


def test_one_seed_says_nothing_of_seeds(base, capsys):
    assert not any("by_seed" in row for row in smoke_run(base).metrics["methods"].values())
    report.print_report(smoke_run(base))
    assert "seed" not in capsys.readouterr().out


def test_table_and_figure_tell_the_seeds_apart(two, capsys):
    report.print_report(two)
    out = capsys.readouterr().out
    assert "trained methods: mean over 2 seeds ± 1 standard error" in out
    for own in two.metrics["methods"]["dhntb"]["by_seed"]:
        assert f"{own['regret']['percent']:.2f} (seed {own['seed']})" in out
    figure = figures.risk_by_epoch(two)
    assert sum(line.get_linewidth() == 0.8 for line in figure.axes[0].lines) == 2
    assert "every seed" in figure.axes[0].get_title()
    figures.plt.close(figure)


def test_seed_of_a_run_can_be_loaded(two):
    prices = np.array([1.0, 1.01, 0.99])
    held = [load(two.folder, "dhntb", seed=seed).positions(prices).hedge_ratio for seed in (None, 0, 1)]
    np.testing.assert_array_equal(held[0], held[1])
    assert np.abs(held[2] - held[0]).max() > 1e-4
    with pytest.raises(UsageError, match="has seeds 0 to 1, not 2"):
        load(two.folder, "dhntb", seed=2)


def test_notes_look_at_every_seed(two):
    case = make_case(two.config, make_source(two.config, jax.random.key(0)))
    metrics = json.loads((two.folder / "metrics.json").read_text())
    metrics["methods"]["dhntb"]["by_seed"][1]["final"]["turnover_mean"]["value"] = 0.0
    metrics["methods"]["dhntb"]["by_seed"][0]["regret"]["value"] = -1.0
    notes = notes_of(case, metrics)
    assert any(note.startswith("dhntb (seed 1) does not trade although") for note in notes)
    assert any(note.startswith("dhntb (seed 0) seems to beat the exact optimum") for note in notes)


def test_run_of_seeds_cut_off_goes_on_to_the_same_numbers(base, two, monkeypatch):
    counted_epochs(monkeypatch, stop_after=("dhntb", 8))
    with pytest.raises(KeyboardInterrupt):
        small_run(base, "two_cut", *SEEDS)
    done = counted_epochs(monkeypatch)
    resumed = small_run(base, "two_cut", *SEEDS, resume=True).metrics["methods"]["dhntb"]
    expected = two.metrics["methods"]["dhntb"]
    assert done == {"dhntb": 4}
    for own, wanted in zip(resumed.pop("by_seed"), expected["by_seed"], strict=True):
        assert without_seconds(own) == without_seconds(wanted)
    assert resumed["final"] == expected["final"]


def test_seed_that_fails_is_named(base):
    with pytest.raises(
        FloatingPointError, match=r"dhntb \(seed [01]\): network outputs are not finite in epoch 2"
    ):
        small_run(base, "two_absurd", *SEEDS, "--training.learning_rate", "1e30")


SHARED = """
import sys
from dhlnn_jax import runtime
runtime.prepare(devices=2)
import jax
jax.config.update("jax_disable_most_optimizations", True)
from dhlnn_jax.case import make_case
from dhlnn_jax.config import load_config
from dhlnn_jax.fleet import keys_of, layout_of
from dhlnn_jax.measured import case_metrics, measured_rows
from dhlnn_jax.source import make_source
config = load_config(sys.argv[1], sys.argv[2:])
layout = layout_of(2, n_paths=256)
assert layout.members.shape == {"members": 2} and layout.paths is None
assert layout_of(3, n_paths=256).paths.shape == {"paths": 2}
case = make_case(config, make_source(config, keys_of(config.seed).test))
import json
rows = {name: measured_rows(name, [case], [None])[0] for name in ("dhntb", "no_hedge")}
seeds = case_metrics(case, rows)["methods"]["dhntb"]["by_seed"]
print(json.dumps([own["training"]["validation_risk"] for own in seeds]))
"""


def test_members_shared_by_two_devices_are_those_of_one(two):
    arguments = [
        str(CONFIGS / "smoke.toml"),
        "--seeds",
        "2",
        "--evaluation.optimum",
        "false",
        "--methods",
        "dhntb",
    ]
    done = subprocess.run(
        [sys.executable, "-c", SHARED, *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    wanted = [own["training"]["validation_risk"] for own in two.metrics["methods"]["dhntb"]["by_seed"]]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_members_at_once_are_those_one_after_another(base, two, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "an accelerator")
    at_once = small_run(base, "two_at_once", *SEEDS)
    for own, wanted in zip(
        *(results.metrics["methods"]["dhntb"]["by_seed"] for results in (at_once, two)), strict=True
    ):
        risks = [x["training"]["validation_risk"] for x in (own, wanted)]
        np.testing.assert_allclose(*risks, rtol=1e-4)
