"""The regime map: its risks against quadrature, simulation and printed numbers; its files and mistakes."""

import csv
from functools import cache, partial

import jax
import numpy as np
import pytest
from scipy.stats import norm

from dhlnn_jax import regime, regime_map
from dhlnn_jax.evaluate import hedged_paths
from dhlnn_jax.hedge import european_call_delta, whalley_wilmott_hedge
from dhlnn_jax.hedger import rule_policy
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract
from dhlnn_jax.regime import MARKED, Setting, deviation, risks_of
from dhlnn_jax.regime_map import main
from dhlnn_jax.risk import entropic_risk_measure, stderr
from dhlnn_jax.settings import make_settings

risks_of = cache(risks_of)  # each setting is solved once for all tests
RULES = ("delta", "whalley_wilmott")


def at(size, relative_cost, volatility=0.2):
    scale = deviation(volatility)
    return coarse(Setting(volatility, size / scale, relative_cost * scale))


def coarse(setting):
    return risks_of(setting, resolution=0.25)


@pytest.mark.parametrize("name", ["paper 0.2 %", "paper 0.8 %"])
def test_in_the_papers_settings_nothing_beats_no_hedge(name):
    risks = risks_of(MARKED[name])
    assert risks.optimum == pytest.approx(risks.no_hedge, rel=1e-8)
    assert abs(risks.removed) < 1e-6 < regime.NO_TRADE
    assert risks.no_hedge < risks.whalley_wilmott < risks.delta


@pytest.mark.parametrize(
    "name, optimum, delta, whalley_wilmott",
    [("quickstart.toml", 0.025862, 0.02773, 0.02608), ("benchmark_european.toml", 0.0287196, 0.0347, 0.0294)],
)
def test_at_the_benchmark_the_risks_are_the_printed_ones(name, optimum, delta, whalley_wilmott):
    risks = risks_of(MARKED[name])
    assert risks.optimum == pytest.approx(optimum, abs=1e-6)
    assert risks.no_hedge == pytest.approx(0.100024, abs=1e-6)
    assert risks.delta == pytest.approx(delta, abs=2e-5)  # as many digits as are printed
    assert risks.whalley_wilmott == pytest.approx(whalley_wilmott, abs=4e-5)


def test_rules_agree_with_simulation(key):
    setting = Setting(0.2, 50.0, 5e-3)
    settings = make_settings(n_steps=30, volatility=0.2, risk_aversion=50.0, cost_rate=5e-3)
    sample = make_simulation_sampler(SIMULATORS["gbm"], n_steps=30)
    paths, _ = sample(key, 20_000, settings)
    risk = partial(entropic_risk_measure, risk_aversion=50.0)
    for name, rule in zip(RULES, (european_call_delta, whalley_wilmott_hedge), strict=True):
        hedged = jax.jit(
            partial(hedged_paths, rule_policy(rule), None, contract=Contract(CLAIMS["european_call"]))
        )
        pnl = hedged(paths, settings=settings).pnl
        assert abs(risk(pnl) - getattr(risks_of(setting), name)) < 3 * stderr(risk, pnl) + 2e-5


def test_a_band_that_is_never_left_gives_the_unhedged_risk():
    def everything(path, settings):
        delta = european_call_delta(path, settings)
        return 0 * delta, 0 * delta + 1

    setting = MARKED["quickstart.toml"]
    value = regime.rule_risk(everything, setting)
    assert value == pytest.approx(risks_of(setting).no_hedge, abs=2e-6)


def test_rules_hardly_move_with_the_resolution():
    setting = MARKED["benchmark_european.toml"]
    for name in RULES:
        assert getattr(coarse(setting), name) == pytest.approx(getattr(risks_of(setting), name), rel=1e-3)


@pytest.mark.parametrize("resolution", [0.25, 0.5])
def test_the_delta_without_cost_and_risk_aversion_is_worth_black_scholes(resolution):
    """Of a fair game only the claim's mean is left: the kink of the payoff must be integrated right."""
    setting = Setting(0.2, 1e-4, 0.0)
    found = regime.rule_risk(regime._delta_band, setting, resolution=resolution)
    d1 = 0.5 * deviation(0.2)
    assert found == pytest.approx(2 * norm.cdf(d1) - 1, abs=3e-7)


def test_the_optimum_is_the_smallest_and_its_saving_falls_in_cost_and_rises_in_risk_aversion():
    grid = [[at(size, cost) for size in (0.5, 2.5)] for cost in (0.01, 0.06)]
    for risks in sum(grid, []):
        assert risks.frictionless < risks.optimum <= min(risks[1:4]) + 1e-7
    for number in ("saving", "removed"):
        values = np.array([[getattr(risks, number) for risks in row] for row in grid])
        assert np.all(np.diff(values, axis=0) < 0) and np.all(np.diff(values, axis=1) > 0)


@pytest.mark.parametrize("size", [0.5, 2.5])
def test_the_map_hardly_depends_on_the_volatility(size):
    low, high = at(size, 0.06, volatility=0.1), at(size, 0.06)
    assert low.removed == pytest.approx(high.removed, abs=0.02)
    for rule in RULES:
        excess = [getattr(risks, rule) / risks.optimum for risks in (low, high)]
        assert excess[0] == pytest.approx(excess[1], abs=0.01)


def test_main_writes_the_picture_and_its_numbers_and_keeps_an_earlier_map(tmp_path, capsys, monkeypatch):
    marked = {name: MARKED[name] for name in ("paper 0.2 %", "quickstart.toml")}
    monkeypatch.setattr(regime_map, "MARKED", marked)
    for module in (regime, regime_map):
        monkeypatch.setattr(module, "risks_of", partial(risks_of, resolution=0.15))
    folder = tmp_path / "map"
    folder.mkdir()
    (folder / "regime_map.csv").write_text("earlier")
    assert main(["--points", "2", "--out", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "--overwrite" in err and err.count("\n") == 1
    assert main(["--points", "2", "--out", str(folder), "--overwrite"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(name in out for name in marked)
    assert f"figure: {folder / 'regime_map.png'}" in out
    rows = list(csv.DictReader((folder / "regime_map.csv").open()))
    assert len(rows) == 4 and {float(row["size"]) for row in rows} == set(regime.SIZES)
    for row in rows:
        assert float(row["optimum"]) <= min(float(row[name]) for name in ("no_hedge", *RULES)) + 1e-7
    assert (folder / "regime_map.png").stat().st_size > 10_000
    assert {path.name for path in folder.iterdir()} == {"regime_map.csv", "regime_map.png"}


def test_main_cut_off_goes_on_after_its_last_row_to_the_same_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(regime_map, "MARKED", {})
    computed = []

    def risks_or_stop(setting):
        if len(computed) == 3:  # of 2 x 2 cells: in the second row
            raise KeyboardInterrupt
        computed.append(setting)
        return risks_of(setting, resolution=0.15)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setattr(regime, "risks_of", partial(risks_of, resolution=0.15))
    assert main(["--points", "2", "--out", str(whole)]) == 0
    monkeypatch.setattr(regime, "risks_of", risks_or_stop)
    command = ["--points", "2", "--out", str(cut)]
    assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    computed.clear()
    assert main([*command, "--resume", "--volatility", "0.1"]) == 2
    assert "is of another configuration or other options" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert len(computed) == 2  # the second row alone
    assert (cut / "regime_map.csv").read_text() == (whole / "regime_map.csv").read_text()
    assert main([*command, "--resume"]) == 2
    assert "is finished; use --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--volatility", "0"], "--volatility must be from 0.01 to 1, got 0"),
        (["--volatility", "nan"], "--volatility must be from 0.01 to 1"),
        (["--volatility", "much"], "invalid float value: 'much'"),
        (["--points", "1"], "--points must be from 2 to 100, got 1"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--out"], "expected one argument"),
        (["--out", __file__], "test_regime.py' is a file; name a folder"),
    ],
)
def test_a_bad_argument_gives_one_line(arguments, wanted, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("regime_map.py: ") and err.count("\n") == 1 and wanted in err


def test_help_goes_to_stdout(capsys):
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(option in out for option in ("--volatility", "--points", "--out", "--overwrite"))
