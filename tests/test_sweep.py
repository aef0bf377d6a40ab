"""Sweeps: a point is the ordinary run with that option; nothing compiles more for more points or seeds."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import CONFIGS, METRICS, counted_epochs, programs_kept, small_run

from dhlnn_jax import sweep_report
from dhlnn_jax.command_line import main
from dhlnn_jax.config import load_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.fitting import make_contract
from dhlnn_jax.fleet import TRACED_OPTIONS
from dhlnn_jax.optimal import optimal_policies, optimal_policy, solve_contract
from dhlnn_jax.source import make_sources
from dhlnn_jax.sweep import claim_sweep, sweep

SMOKE = str(CONFIGS / "smoke.toml")
FEW = ("--methods", "dhntb", "bsdh", "--training.epochs", "4")
DEAR = 0.03  # not trading is optimal


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def tiny(*overrides):
    return load_config(SMOKE, [*FEW, "--evaluation.epochs=", *overrides])


@pytest.fixture(scope="session")
def swept(base):
    with programs_kept(base / "programs"):
        return sweep(tiny(), {"cost.rate": [2e-3, DEAR]})


@pytest.fixture(scope="session")
def grid(base):
    """Two options, two seeds, no optimum."""
    config = tiny("--seeds", "2", "--evaluation.optimum", "false", "--risk.kind", "expected_shortfall")
    with programs_kept(base / "programs"):
        return sweep(config, {"market.volatility": [0.2, 0.4], "training.learning_rate": [1e-3, 5e-3]})


def test_point_is_the_ordinary_run_with_that_option(base, swept):
    alone = small_run(base, "point", *FEW, "--evaluation.epochs=", "--cost.rate", str(DEAR))
    point = swept["points"][1]
    assert point["at"] == {"cost.rate": DEAR}
    assert (
        list(point["methods"]) == list(alone.metrics["methods"]) == ["optimal", "dhntb", "bsdh", "no_hedge"]
    )
    for name, row in alone.metrics["methods"].items():
        for metric in METRICS:
            found, wanted = (x["final"][metric] for x in (point["methods"][name], row))
            assert found["value"] == pytest.approx(wanted["value"], rel=1e-4, abs=1e-6), (name, metric)
            assert found["stderr"] == pytest.approx(wanted["stderr"], rel=1e-3, abs=1e-8), (name, metric)
        assert point["methods"][name]["regret"]["value"] == pytest.approx(row["regret"]["value"], abs=1e-6)
    assert point["optimum"] == alone.metrics["optimum"]
    assert point["notes"] == alone.meta["notes"] and point["not_trading_is_optimal"]


def test_only_where_not_trading_is_optimal_it_is_said(swept):
    cheap, dear = swept["points"]
    assert not cheap["not_trading_is_optimal"] and not any("not to trade" in note for note in cheap["notes"])
    assert any("the exact optimum is not to trade" in note for note in dear["notes"])
    assert not cheap["no_liability"] and not dear["no_liability"]


def test_points_of_one_market_share_their_test_paths():
    configs = [
        tiny("--cost.rate", "0.1"),
        tiny("--contract.strike", "1.1"),
        tiny("--market.volatility", "0.4"),
    ]
    sources = make_sources(configs, jax.random.key(0))
    assert sources[0].test is sources[1].test and float(sources[1].settings.strike) == pytest.approx(1.1)
    normals = [np.diff(np.log(s.test.spot), axis=1) for s in (sources[0], sources[2])]
    np.testing.assert_allclose(
        (normals[1] + 0.5 * 0.16 / 365) / 0.4, (normals[0] + 0.5 * 0.04 / 365) / 0.2, atol=1e-5
    )  # the same draws at twice the volatility


def test_grid_has_every_combination_and_every_seed(grid):
    assert [tuple(point["at"].values()) for point in grid["points"]] == [
        (0.2, 1e-3), (0.2, 5e-3), (0.4, 1e-3), (0.4, 5e-3)
    ]  # fmt: skip
    risks = [p["methods"]["dhntb"]["final"]["expected_shortfall"]["value"] for p in grid["points"]]
    assert len(set(risks)) == 4 and risks[2] > 1.5 * risks[0]
    for point in grid["points"]:
        assert [own["seed"] for own in point["methods"]["dhntb"]["by_seed"]] == [0, 1]
        assert "optimum" not in point and "regret" not in point["methods"]["dhntb"]


def test_rate_that_a_method_does_not_use_is_noted_and_changes_nothing_there(base, grid, swept, capsys):
    small = ("--market.n_steps", "3", "--evaluation.optimum", "false")
    config = tiny("--methods", "dhlnn", "dhlnn_newton", "dhntb", *small)
    with programs_kept(base / "programs"):
        results = sweep(config, {"training.learning_rate": [1e-3, 5e-3]})
    said = "training.learning_rate is not used by dhlnn, dhlnn_newton, and makes no difference there"
    assert results["notes"] == [said]  # dhlnn has nested.learning_rate
    sweep_report.print_sweep(results)
    assert f"note: {said}\n" in capsys.readouterr().err
    for name in ("dhlnn", "dhlnn_newton", "dhntb"):
        first, second = (point["methods"][name]["final"] for point in results["points"])
        assert (first == second) == (name != "dhntb"), name
    assert grid["notes"] == swept["notes"] == []  # no such method, another option


def test_bands_of_several_optima_are_those_of_each():
    configs = [tiny("--market.volatility", v, "--market.drift", d) for v, d in (("0.2", "0"), ("0.3", "0.4"))]
    sources = make_sources(configs, jax.random.key(0))
    optima = [
        solve_contract(make_contract(c), s.settings, n_steps=10)
        for c, s in zip(configs, sources, strict=True)
    ]
    policy, tables = optimal_policies(optima)
    for i, (optimum, source) in enumerate(zip(optima, sources, strict=True)):
        path = jax.tree.map(lambda x: x[3], source.test)
        path = path._replace(spot=path.spot.at[4].set(9.0))  # beyond every grid
        own = jax.tree.map(lambda x, i=i: jnp.asarray(x[i], float), tables)
        wanted = optimal_policy(optimum).hedge_ratio(None, path, source.settings)
        np.testing.assert_allclose(policy.hedge_ratio(own, path, source.settings), wanted, atol=1e-6)


@pytest.mark.parametrize("which, panels", [("swept", 2), ("grid", 2)])
def test_figure_shows_every_method_and_says_where_not_trading_is_optimal(which, panels, request):
    results = json.loads(json.dumps(request.getfixturevalue(which)))
    figure = sweep_report.sweep_figure(results)
    assert len(figure.axes) == panels
    legend = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert {"DHNTB", "Black–Scholes delta"} <= legend and any("no hedge" in label for label in legend)
    first = next(iter(results["over"]))
    assert all(axis.get_xlabel() == TRACED_OPTIONS[first] for axis in figure.axes)
    said = figure.axes[0].get_title(loc="left")
    assert ("not trading is optimal at cost.rate 0.03" in said) == (which == "swept")
    assert ("training.learning_rate 0.001" in said) == (which == "grid")
    sweep_report.plt.close(figure)


def test_script_writes_what_it_says_and_nothing_over_it(base, tmp_path, capsys, swept):
    folder = tmp_path / "swept"
    arguments = [SMOKE, *FEW, "--over", "cost.rate", "2e-3", str(DEAR), "--out", str(folder)]
    with programs_kept(base / "programs"):
        assert main("sweep", arguments) == 0
    out, err = capsys.readouterr()
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "sweep.png"}
    assert f"results: {folder / 'sweep.json'}" in out and f"figure: {folder / 'sweep.png'}" in out
    assert "DHNTB: 2 hedgers in one program" in out and out.count("no hedge") == 2
    assert all(line.startswith("note: at cost.rate") for line in err.splitlines()) and "not to trade" in err
    written = json.loads((folder / "sweep.json").read_text())
    for point, wanted in zip(written["points"], swept["points"], strict=True):
        assert f"{point['methods']['dhntb']['final']['entropic_risk_measure']['value']:.6f}" in out
        assert point["methods"]["dhntb"]["final"] == wanted["methods"]["dhntb"]["final"]
    assert (folder / "sweep.png").stat().st_size > 20_000
    before = (folder / "sweep.json").read_bytes()
    assert main("sweep", arguments) == 2
    assert "--overwrite" in capsys.readouterr().err and (folder / "sweep.json").read_bytes() == before


def test_sweep_cut_off_goes_on_from_its_last_checkpoint_to_the_same_numbers(
    base, tmp_path, capsys, swept, monkeypatch
):
    folder = tmp_path / "cut"
    arguments = [SMOKE, *FEW, "--out", str(folder), "--training.checkpoint_every", "2"]
    over = ["--over", "cost.rate", "2e-3", str(DEAR)]
    with programs_kept(base / "programs"):
        counted_epochs(monkeypatch, stop_after=("dhntb", 4))  # of 4, before the last checkpoint
        assert main("sweep", [*arguments, *over]) == 130
        assert "interrupted; --resume goes on" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == ["checkpoints"]

        refused = [
            ([*over], "exists; give --out another folder, or --overwrite, or --resume"),
            ([*over, "--resume", "--seed", "1"], "is of another configuration or other options"),
            (["--over", "cost.rate", "2e-3", "--resume"], "is of another configuration or other options"),
            ([*over, "--resume", "--overwrite"], "give one of them"),
        ]
        for wrong, said in refused:
            assert main("sweep", [*arguments, *wrong]) == 2
            err = capsys.readouterr().err
            assert said in err and err.count("\n") == 1

        done = counted_epochs(monkeypatch)
        assert main("sweep", [*arguments, *over, "--resume"]) == 0
        assert done == {"dhntb": 2}
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "sweep.png"}
    written = json.loads((folder / "sweep.json").read_text())
    for point, wanted in zip(written["points"], swept["points"], strict=True):
        assert point["methods"]["dhntb"]["final"] == wanted["methods"]["dhntb"]["final"]
    # killed before it was drawn, a finished sweep is read back
    (folder / "sweep.png").unlink()
    done.clear()
    out = capsys.readouterr().out
    assert main("sweep", [*arguments, *over, "--resume"]) == 0
    assert capsys.readouterr().out == out and not done and (folder / "sweep.png").exists()
    assert main("sweep", [*arguments, *over, "--resume", "--seed", "1"]) == 2
    assert "is of another configuration or other options" in capsys.readouterr().err
    assert main("sweep", [*arguments, *over, "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "nothing to resume in" in capsys.readouterr().err


def test_sweep_that_was_cut_off_is_begun_anew_if_overwritten_and_a_run_is_not(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "begun.json").write_text("{}")
    assert claim_sweep(tmp_path, overwrite=True, resume=False) == checkpoints and not checkpoints.exists()
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(UsageError, match="holds a run"):
        claim_sweep(tmp_path, overwrite=True, resume=False)


def test_kill_while_checkpoints_are_removed_leaves_none_that_another_sweep_would_go_on_from(
    tmp_path, monkeypatch
):
    old = tmp_path / "checkpoints" / "dhntb"
    old.mkdir(parents=True)
    (tmp_path / "checkpoints" / "begun.json").write_text("{}")

    def killed(folder, ignore_errors=False):
        if folder.exists():
            (folder / "begun.json").unlink()  # and no more
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        claim_sweep(tmp_path, overwrite=True, resume=False)
    assert not old.exists() and not (tmp_path / "checkpoints").exists()
    checkpoints = claim_sweep(tmp_path, overwrite=True, resume=False)
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("", "give --over OPTION VALUE ...; allowed: cost.rate, "),
        ("--over", "--over needs an option and its values; allowed: cost.rate, "),
        ("--over cost.rate", "--over cost.rate needs values"),
        ("--over cost.rate cheap", "--over cost.rate takes numbers, got cheap"),
        ("--over cost.rate nan", "--over cost.rate takes finite numbers"),
        ("--over cost.rate 1e-3 1e-3", "--over cost.rate names a value twice"),
        ("--over cost.rate 1e-3 --over cost.rate 2e-3", "--over cost.rate is given twice"),
        ("--over market.n_steps 10 20", "--over market.n_steps: cannot be swept; allowed: cost.rate, "),
        ("--over cost.rate 1e-3 2", "at cost.rate 2: cost.rate = 2.0: input should be less than 1"),
        ("--over market.volatility 0.1 --market.kind history --methods dhntb", "have their own volatility"),
        ("--over cost.rate 1e-3 --market.n_step 3", "did you mean --market.n_steps?"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys, tmp_path):
    assert main("sweep", [SMOKE, *arguments.split(), "--out", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sweep.py: ") and said in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_help_names_the_options(capsys):
    assert main("sweep", ["--help"]) == 0 and main("sweep", []) == 2
    out, err = capsys.readouterr()
    assert out == err and all(name in out for name in TRACED_OPTIONS) and "--over" in out


# --- compilations -------------------------------------------------------------------------------------


@pytest.fixture
def compilations():
    """Programs compiled (or fetched from the cache of compiled ones) since the last call."""
    found = []

    def listener(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    def count():
        n = len(found)
        found.clear()
        return n

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield count
    jax.monitoring.unregister_event_duration_listener(listener)


def test_nothing_compiles_more_for_more_epochs_seeds_and_points(base, compilations):
    def programs(*, n_epochs, n_seeds, n_points):
        config = tiny(
            "--methods", "dhntb", "--evaluation.optimum", "false", "--training.validation_every", "2",
            "--training.epochs", str(n_epochs), "--seeds", str(n_seeds),
            "--market.n_steps", "3", "--model.hidden_sizes", "2",
            "--evaluation.n_paths", "777", "--training.validation_paths", "333",  # shapes of no other test
        )  # fmt: skip
        compilations()
        sweep(config, {"cost.rate": np.linspace(1e-3, 2e-3, n_points).tolist()})
        return compilations()

    with programs_kept(base / "programs"):
        programs(n_epochs=2, n_seeds=1, n_points=1)  # what has nothing to do with a fleet, once a process
        little = programs(n_epochs=2, n_seeds=3, n_points=2)
        # test paths, training (initial parameters, epochs), validation, measurement; arrays put together
        assert programs(n_epochs=8, n_seeds=4, n_points=3) <= little <= 13
