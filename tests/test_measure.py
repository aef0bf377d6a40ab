"""A finished run measured on fresh paths, against the same paths held in memory; the command line."""

import dataclasses
import json
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import programs_kept, smoke_run

from dhlnn_jax import measure
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import measure as measure_paths
from dhlnn_jax.evaluate import standard_errors
from dhlnn_jax.fitting import evaluator, make_contract
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.measure import measure_run
from dhlnn_jax.measure_report import main
from dhlnn_jax.risk import entropic_risk_measure, paired_stderr
from dhlnn_jax.trained import load

NAMES = ("optimal", "dhntb", "whalley_wilmott")
BLOCK, N_PATHS = 1000, 4000  # as many as configs/smoke.toml measures, for its compiled programs
RISK = "entropic_risk_measure"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return smoke_run(tmp_path_factory.getbasetemp()).folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(measure, "BLOCK_PATHS", BLOCK)
    with programs_kept(tmp_path_factory.getbasetemp() / "programs"):
        yield


@pytest.fixture(scope="session")
def report(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "BLOCK_PATHS", BLOCK)
        return measure_run(
            folder, ["dhntb", "whalley_wilmott", "no_hedge"], n_paths=N_PATHS, chunk_paths=2000
        )


def fresh_paths(hedger, seed=1):
    """All paths at once, drawn as the module says they are."""
    sample = make_simulation_sampler(SIMULATORS["gbm"], n_steps=hedger.config.market.n_steps)
    key = jax.random.fold_in(jax.random.key(seed), 4)
    draws = [sample(jax.random.fold_in(key, i), BLOCK, hedger.settings)[0] for i in range(N_PATHS // BLOCK)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *draws)


def test_table_is_that_of_the_same_paths_in_memory(folder, report):
    hedgers = {name: load(folder, name) for name in NAMES}
    settings = hedgers["optimal"].settings
    paths = fresh_paths(hedgers["optimal"])
    pnl = {}
    for name, hedger in hedgers.items():
        money = evaluator(hedger.policy, make_contract(hedger.config))(hedger.params, paths, settings)
        pnl[name] = money.pnl
        wanted = measure_paths(money, settings)
        stderrs = standard_errors(wanted.influences, jnp.arange(N_PATHS))
        row = report["methods"][name]
        for metric, value in wanted.values.items():
            error = row["binning_error"].get(metric, 0.0)
            got = row["final"][metric]
            np.testing.assert_allclose(
                got["value"], value, rtol=2e-5, atol=error + 1e-7, err_msg=f"{name} {metric}"
            )
            np.testing.assert_allclose(got["stderr"], stderrs[metric], rtol=0.02, err_msg=f"{name} {metric}")
        np.testing.assert_allclose(row["effective_sample_size"], wanted.effective_sample_size, rtol=1e-4)
    entropic = partial(entropic_risk_measure, risk_aversion=settings.risk_aversion)
    for name in NAMES[1:]:
        regret = report["methods"][name]["regret"]
        apart = entropic(pnl[name]) - entropic(pnl["optimal"])
        np.testing.assert_allclose(regret["value"], apart, atol=2e-7)
        wanted = paired_stderr(entropic, pnl[name], pnl["optimal"])
        np.testing.assert_allclose(regret["stderr"], wanted, rtol=1e-3)
        assert report["paired"][f"optimal-{name}"][RISK]["stderr"] == pytest.approx(regret["stderr"])
        assert regret["percent"] == pytest.approx(100 * regret["value"] / report["optimum"]["value"])
    assert report["methods"]["optimal"]["regret"]["value"] == 0.0


def test_known_rows_are_the_run_s_own_and_the_optimum_comes_first(folder, report):
    table = json.loads((folder / "metrics.json").read_text())
    assert list(report["methods"]) == ["optimal", "dhntb", "whalley_wilmott", "no_hedge"]
    row = report["methods"]["no_hedge"]
    assert row["estimator"] == "quadrature" and "binning_error" not in row
    assert row["final"] == table["methods"]["no_hedge"]["final"]
    assert row["regret"] == table["methods"]["no_hedge"]["regret"]
    assert report["optimum"] == table["optimum"]
    # Two estimates of the same number, from different paths.
    for name in NAMES:
        a, b = (numbers["methods"][name]["final"]["pnl_mean"] for numbers in (report, table))
        assert a["value"] != b["value"]
        assert abs(a["value"] - b["value"]) < 4 * np.hypot(a["stderr"], b["stderr"])


@pytest.mark.parametrize("chunk_paths", [1000, 4000])
def test_table_does_not_depend_on_the_chunk(folder, report, chunk_paths):
    again = measure_run(
        folder, ["dhntb", "whalley_wilmott", "no_hedge"], n_paths=N_PATHS, chunk_paths=chunk_paths
    )
    for part in ("methods", "paired"):
        assert jax.tree.structure(again[part]) == jax.tree.structure(report[part])
        np.testing.assert_allclose(numbers_in(again[part]), numbers_in(report[part]), rtol=1e-5, atol=1e-7)


def numbers_in(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if not isinstance(leaf, str)]


def test_no_seed_gives_back_the_paths_of_the_run(folder):
    hedger = load(folder, "whalley_wilmott")
    roles = [jax.random.key_data(jax.random.fold_in(jax.random.key(hedger.config.seed), i)) for i in range(5)]
    assert len({tuple(np.asarray(data)) for data in roles}) == 5
    with np.load(folder / "pnl.npz") as table:
        seen = set(np.asarray(table["final_spot"]).tolist())
    fresh = np.asarray(fresh_paths(hedger, seed=hedger.config.seed).spot[:, -1]).tolist()
    # Spots are float32, so a few of thousands coincide by chance.
    assert len(seen & set(fresh)) < 0.05 * len(fresh)
    other = np.asarray(fresh_paths(hedger, seed=hedger.config.seed + 1).spot[:, -1]).tolist()
    assert len(set(other) & set(fresh)) < 0.05 * len(fresh)


def test_what_is_kept_does_not_grow_with_the_paths(folder, monkeypatch):
    kept = []

    @contextmanager
    def weigh(description, total):
        yield lambda steps: kept.append((steps, sum(array.nbytes for array in jax.live_arrays())))

    monkeypatch.setattr(measure, "progress_bar", weigh)
    measure_run(folder, ["whalley_wilmott"], n_paths=6000, chunk_paths=1000)
    steps, sizes = zip(*kept, strict=True)
    assert sum(steps) == 6000 and len(steps) == 6
    assert len(set(sizes[1:])) == 1, sizes


def test_program_needs_little_more_memory_for_more_blocks(folder):
    hedgers = [load(folder, name) for name in ("dhntb", "whalley_wilmott")]
    settings = hedgers[0].settings
    arguments = [hedger.params for hedger in hedgers], jax.random.key(0)
    needed = []
    for n_blocks in (2, 20):
        program = jax.jit(measure.make_draw_money(hedgers)).lower(
            *arguments, jnp.arange(n_blocks), settings, settings
        )
        analysis = program.compile().memory_analysis()
        needed.append(analysis.temp_size_in_bytes)
    # The money of each path, twice; a network's activations on all of them would be a hundred times that.
    assert needed[1] - needed[0] <= 2 * 18 * BLOCK * len(hedgers) * 6 * 4


def test_recorded_markets_are_refused(folder, monkeypatch):
    results = measure.read_results(folder)
    market = results.config.market.model_copy(update={"kind": "history"})
    recorded = dataclasses.replace(results, config=results.config.model_copy(update={"market": market}))
    monkeypatch.setattr(measure, "read_results", lambda folder: recorded)
    with pytest.raises(UsageError, match="is recorded: there are no fresh paths"):
        measure_run(folder, n_paths=BLOCK)


def test_main_prints_the_table_and_writes_the_numbers_but_not_over_others(folder, tmp_path, capsys):
    target = tmp_path / "fresh.json"
    arguments = [str(folder), "--n-paths", "2000", "--chunk", "1000", "--json", str(target), "--seed", "5"]
    arguments += ["--methods", "whalley_wilmott", "no_hedge"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == "" and "2000 fresh paths, seed 5" in out and f"numbers: {target}" in out
    assert all(said in out for said in ("exact optimum", "Whalley–Wilmott", "no hedge", "regret", "bins"))
    numbers = json.loads(target.read_text())
    assert numbers["n_paths"] == 2000 and numbers["peak_memory_bytes"] > 1e7
    assert set(numbers["methods"]) == {"optimal", "whalley_wilmott", "no_hedge"}
    before = target.read_bytes()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--overwrite" in err
    assert target.read_bytes() == before
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--n-paths", "1500"], "n_paths must be a multiple of 1000, got 1500"),
        (["--n-paths", "0"], "n_paths must be a multiple of 1000, got 0"),
        (["--n-paths", "many"], "invalid int value: 'many'"),
        (["--chunk", "-1000"], "chunk_paths must be a multiple of 1000, got -1000"),
        (["--seed", "-1"], "seed must be from 0 to 2147483647, got -1"),
        (["--methods", "dhlmn"], "has no method 'dhlmn'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--json", "/nowhere/at/all.json"], "there is no folder '/nowhere/at'"),
    ],
)
def test_a_bad_argument_gives_one_line(folder, arguments, wanted, capsys):
    assert main([str(folder), "--n-paths", "1000", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("measure.py: ") and err.count("\n") == 1 and wanted in err


def test_a_folder_without_a_run_gives_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--n-paths", "1000"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "holds no finished run" in err
    assert main(["--n-paths", "1000"]) == 2
    assert "results folder is missing" in capsys.readouterr().err


def test_help_goes_to_stdout_and_nothing_given_is_a_mistake(capsys):
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(o in out for o in ("--n-paths", "--methods", "--seed", "--chunk", "--json"))
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: python scripts/measure.py")
