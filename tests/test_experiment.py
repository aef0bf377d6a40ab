"""The whole run in small: configs/smoke.toml, all methods, and variations of it that compile nothing new."""

import copy
import functools
import json
import tomllib

import jax
import numpy as np
import pytest
from runs import METHODS, METRICS, PICTURES, TRAINED, counted_epochs, small_run, smoke_run

from dhlnn_jax import checkpoint, compiling, fitting, notes, trainer
from dhlnn_jax.case import make_case
from dhlnn_jax.errors import UsageError
from dhlnn_jax.results import read_results
from dhlnn_jax.source import make_source


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def smoke(base):
    return smoke_run(base)


def without_seconds(report):
    """A method's report without what a clock decided."""
    kept = {key: value for key, value in report.items() if not key.endswith("_seconds")}
    return kept | {"history": [without_seconds(entry) for entry in kept.get("history", [])]}


# --- metrics.json -------------------------------------------------------------------------------------


def test_metrics_have_the_schema_of_the_issue(smoke):
    text = (smoke.folder / "metrics.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    metrics = json.loads(text)
    assert set(metrics) == {"schema", "seed", "device", "methods", "paired", "optimum"}
    assert (metrics["schema"], metrics["seed"]) == (1, 0)
    assert metrics["device"] == jax.devices()[0].device_kind
    assert tuple(metrics["methods"]) == METHODS
    for name, row in metrics["methods"].items():
        wanted = {"final", "history", "effective_sample_size", "train_seconds", "compile_seconds"}
        wanted |= {"paths_simulated", "gradient_evaluations", "estimator", "regret"}
        assert set(row) == wanted | ({"training", "best_epoch", "most_rises"} if name in TRAINED else set())
        assert set(row["final"]) == METRICS
        for number in row["final"].values():
            assert set(number) == {"value", "stderr"}
            assert number["value"] is not None and number["stderr"] is not None
    pairs = {f"{a}-{b}" for i, a in enumerate(METHODS) for b in METHODS[i + 1 :]}
    assert set(metrics["paired"]) == pairs
    for pair in metrics["paired"].values():
        assert set(pair) == METRICS and all(set(number) == {"value", "stderr"} for number in pair.values())


def test_counts_are_those_of_the_algorithms(smoke):
    rows = smoke.metrics["methods"]
    for name in METHODS:
        assert rows[name]["paths_simulated"] == (8 * 256 if name in TRAINED else 0)
        assert (rows[name]["train_seconds"] > 0) == (rows[name]["compile_seconds"] > 0) == (name in TRAINED)
    # one gradient an epoch, and n_inner of them in nested training (Gauss-Newton: 1 by default)
    assert [rows[name]["gradient_evaluations"] for name in METHODS] == [0, 8 * 3, 8, 8, 8, 0, 0, 0, 0, 0, 0]


def test_history_holds_the_asked_epochs_and_ends_in_the_final_row(smoke):
    for name in METHODS:
        row = smoke.metrics["methods"][name]
        assert [entry["epoch"] for entry in row["history"]] == ([4, 8] if name in TRAINED else [])
        for entry in row["history"]:
            assert set(entry) == {"epoch", "train_seconds", "gradient_evaluations", "regret"} | METRICS
            assert entry["pnl_mean"]["stderr"] > 0
        if name in TRAINED:
            curve = row["training"]
            assert curve["epoch"] == list(range(8)) and curve["validation_epoch"] == [4, 8]
            assert row["best_epoch"] == [4, 8][int(np.argmin(curve["validation_risk"]))]
            best = row["history"][[4, 8].index(row["best_epoch"])]
            assert {metric: best[metric] for metric in METRICS} == row["final"]


def test_final_numbers_are_those_of_the_saved_paths(smoke):
    pnl = np.load(smoke.folder / "pnl.npz")
    for name in METHODS[:-1]:
        sample = pnl[f"{name}/pnl"].astype(float)
        worst = np.sort(sample)[: len(sample) // 10]
        final = smoke.metrics["methods"][name]["final"]
        weight = np.exp(-20.0 * sample)
        wanted = {
            "entropic_risk_measure": np.log(np.mean(weight)) / 20.0,
            "expected_shortfall": -worst.mean(),
            "value_at_risk": -worst[-1],
            "pnl_mean": sample.mean(),
            "pnl_std": sample.std(),
            "trading_cost_mean": pnl[f"{name}/trading_cost"].astype(float).mean(),
        }
        for metric, value in wanted.items():
            assert final[metric]["value"] == pytest.approx(value, rel=1e-4, abs=1e-6), (name, metric)
        assert final["pnl_mean"]["stderr"] == pytest.approx(sample.std() / np.sqrt(4000), rel=1e-3)
        ess = smoke.metrics["methods"][name]["effective_sample_size"]
        assert ess == pytest.approx(weight.sum() ** 2 / np.square(weight).sum(), rel=1e-3)


def test_pnl_of_every_path_adds_up(smoke):
    pnl = np.load(smoke.folder / "pnl.npz")
    columns = {f"{name}/{column}" for name in METHODS for column in ("trading_gain", "trading_cost", "pnl")}
    assert set(pnl.files) == {"payoff", "final_spot", "group_id"} | columns
    assert all(pnl[name].shape == (4000,) for name in pnl.files)
    np.testing.assert_allclose(pnl["payoff"], np.maximum(pnl["final_spot"] - 1.0, 0.0), atol=1e-7)
    assert len(np.unique(pnl["group_id"])) == 4000
    for name in METHODS:
        total = pnl[f"{name}/trading_gain"] - pnl["payoff"] - pnl[f"{name}/trading_cost"]
        np.testing.assert_allclose(pnl[f"{name}/pnl"], total, atol=1e-6)
        assert np.all(pnl[f"{name}/trading_cost"] > 0) == (name != "no_hedge")


def test_premium_and_spot_unit_reach_the_money(base):
    scaled = small_run(
        base, "premium", "--methods", "bsdh", "--market.spot0", "100", "--contract.strike", "100",
        "--contract.premium", "1.5", "--risk.risk_aversion", "0.2",
    )  # fmt: skip
    plain = smoke_run(base)
    gained = scaled.pnl["bsdh/pnl"] - 100 * plain.pnl["bsdh/pnl"]
    np.testing.assert_allclose(gained, 1.5, atol=2e-3)  # the same draws, float32 prices near 100
    exact = scaled.metrics["methods"]["no_hedge"]["final"]["entropic_risk_measure"]["value"]
    plain_exact = plain.metrics["methods"]["no_hedge"]["final"]["entropic_risk_measure"]["value"]
    assert exact == pytest.approx(100 * plain_exact - 1.5, abs=1e-4)


def test_row_without_a_hedge_is_exact(smoke):
    row = smoke.metrics["methods"]["no_hedge"]
    assert row["estimator"] == "quadrature" and row["effective_sample_size"] is None
    assert all(number["stderr"] == 0 for number in row["final"].values())
    for metric, sample in (("pnl_mean", smoke.pnl["no_hedge/pnl"]), ("pnl_std", smoke.pnl["no_hedge/pnl"])):
        error = 4 * sample.std() / np.sqrt(len(sample))
        assert row["final"][metric]["value"] == pytest.approx(getattr(sample, metric[4:])(), abs=error)
    assert all(smoke.metrics["methods"][name]["estimator"] == "simulation" for name in METHODS[:-1])


def test_row_without_a_hedge_is_always_added(base):
    results = small_run(base, "alone", "--methods", "bsdh")
    assert list(results.metrics["methods"]) == ["optimal", "bsdh", "no_hedge"]
    assert set(results.metrics["paired"]) == {"optimal-bsdh", "optimal-no_hedge", "bsdh-no_hedge"}
    alone = small_run(base, "no_optimum", "--methods", "bsdh", "--evaluation.optimum", "false")
    assert list(alone.metrics["methods"]) == ["bsdh", "no_hedge"]
    assert "optimum" not in alone.metrics and "regret" not in alone.metrics["methods"]["bsdh"]
    assert "no_hedge/pnl" in results.pnl


def test_paired_numbers_are_differences_with_errors_of_the_differences(smoke):
    rows = smoke.metrics["methods"]
    for pair, numbers in smoke.metrics["paired"].items():
        a, b = pair.split("-")
        if b != "no_hedge":
            for metric, number in numbers.items():
                difference = rows[a]["final"][metric]["value"] - rows[b]["final"][metric]["value"]
                assert number["value"] == pytest.approx(difference, abs=1e-12)
        # no hedge as well is taken on the same paths here, where enough of them carry its risk
        difference = smoke.pnl[f"{a}/pnl"].astype(float) - smoke.pnl[f"{b}/pnl"]
        assert numbers["pnl_mean"]["value"] == pytest.approx(difference.mean(), abs=1e-7)
        assert numbers["pnl_mean"]["stderr"] == pytest.approx(difference.std() / np.sqrt(4000), rel=2e-3)


@pytest.mark.parametrize("order", [("no_hedge", "bsdh"), ("bsdh", "no_hedge")])
def test_exact_row_adds_no_error_where_simulation_cannot_carry_it(base, order):
    far = ("--risk.risk_aversion", "100")
    results = small_run(base, f"{order[0]}_first", "--methods", *order, *far)
    finals = [results.metrics["methods"][name]["final"] for name in order]
    own = results.metrics["methods"]["bsdh"]["final"]
    for metric, number in results.metrics["paired"]["-".join(order)].items():
        difference = finals[0][metric]["value"] - finals[1][metric]["value"]
        assert number["value"] == pytest.approx(difference, abs=1e-12), metric
        assert number["stderr"] == pytest.approx(own[metric]["stderr"], rel=1e-6), metric


# --- the folder ---------------------------------------------------------------------------------------


def test_folder_holds_what_was_promised(smoke):
    files = {path.name for path in smoke.folder.iterdir()}
    kept = {"config.toml", "metrics.json", "meta.json", "pnl.npz", "sample_path.npz", "bands.npz"}
    assert files >= kept | set(PICTURES)
    assert {path.name for path in (smoke.folder / "params").iterdir()} == set(TRAINED)
    for name in TRAINED:
        assert {path.name for path in (smoke.folder / "params" / name).iterdir()} == {"best", "last"}
    resolved = tomllib.loads((smoke.folder / "config.toml").read_text())
    assert resolved["training"]["optimizer"] == "adam" and resolved["market"]["n_steps"] == 10
    meta = json.loads((smoke.folder / "meta.json").read_text())
    assert set(meta) >= {"device", "versions", "commit", "seconds"}
    assert set(meta["versions"]) >= {"dhlnn-jax", "jax", "flax", "optax", "numpy"}
    assert set(meta["seconds"]) == {"total", "compile", "train"}
    assert meta["seconds"]["total"] > meta["seconds"]["compile"] > 0
    assert meta["notes"] == [] and meta["clamp"] == "scan"  # how "auto" ended on a CPU


def test_sample_path_is_the_first_test_path(smoke):
    arrays = np.load(smoke.folder / "sample_path.npz")
    assert arrays["spot"].shape == (11,) and arrays["spot"][-1] == smoke.pnl["final_spot"][0]
    np.testing.assert_allclose(arrays["time"], np.arange(11) / 365)
    for name in METHODS:
        held = arrays[f"{name}/hedge_ratio"]
        gain = np.sum(held * np.diff(arrays["spot"]))
        assert held.shape == (10,)
        assert gain == pytest.approx(smoke.pnl[f"{name}/trading_gain"][0], abs=1e-6)
    banded = {key.split("/")[0] for key in arrays.files if key.endswith("band_lower")}
    assert banded == {"optimal", "dhlnn", "dhlnn_newton", "dhntb", "whalley_wilmott", "fixed_band"}
    inside = arrays["dhlnn/hedge_ratio"]
    lower, upper = arrays["dhlnn/band_lower"], arrays["dhlnn/band_upper"]
    assert np.all((inside >= lower - 1e-6) & (inside <= upper + 1e-6) | (lower > upper))


def test_results_read_back_are_those_returned(smoke):
    back = read_results(smoke.folder)
    assert back.config == smoke.config and back.metrics == smoke.metrics and back.meta == smoke.meta
    for given, read in ((smoke.pnl, back.pnl), (smoke.sample_path, back.sample_path)):
        assert set(given) == set(read)
        for name in given:
            np.testing.assert_array_equal(given[name], read[name])


# --- seeds, interruptions -----------------------------------------------------------------------------


def test_same_seed_gives_identical_numbers_and_another_does_not(base, smoke):
    again = small_run(base, "again", "--methods", "dhlnn", "dhntb", "bsdh")
    for name, row in again.metrics["methods"].items():
        assert without_seconds(row) == without_seconds(smoke.metrics["methods"][name])
        np.testing.assert_array_equal(again.pnl[f"{name}/pnl"], smoke.pnl[f"{name}/pnl"])
    assert all(
        again.metrics["paired"][pair] == smoke.metrics["paired"][pair] for pair in again.metrics["paired"]
    )
    other = small_run(base, "other_seed", "--methods", "dhlnn", "dhntb", "bsdh", "--seed", "1")
    for name in ("dhlnn", "dhntb", "bsdh"):
        for metric in METRICS:
            values = [r.metrics["methods"][name]["final"][metric]["value"] for r in (other, smoke)]
            assert values[0] != values[1]
    assert not np.isin(other.pnl["final_spot"], smoke.pnl["final_spot"]).all()


def test_run_takes_an_accelerators_way_to_the_same_numbers(base, smoke, monkeypatch):
    """All decisions at once, band in parallel over time, no CPU's compiler options: the same run, here."""
    fastest = functools.cache(lambda n_steps: "parallel")
    monkeypatch.setattr(fitting, "fastest_clamp", fastest)
    monkeypatch.setattr(jax, "default_backend", lambda: "an accelerator")
    options = compiling._understood
    monkeypatch.setattr(compiling, "_understood", functools.cache(options.__wrapped__))
    make_step, chunk_sizes = trainer.make_train_step, set()

    def make(*of_what, chunk_size, **how):
        chunk_sizes.add(chunk_size)
        return make_step(*of_what, chunk_size=chunk_size, **how)

    monkeypatch.setattr(trainer, "make_train_step", make)
    there = small_run(base, "accelerator", "--methods", *TRAINED)
    assert chunk_sizes == {None} and fastest.cache_info().misses == 1 and not compiling._understood()
    for name in TRAINED:
        for metric, number in smoke.metrics["methods"][name]["final"].items():
            found = there.metrics["methods"][name]["final"][metric]["value"]
            assert found == pytest.approx(number["value"], rel=1e-4, abs=1e-6), (name, metric)


def test_run_cut_off_between_checkpoints_goes_on_to_the_same_numbers(base, smoke, monkeypatch):
    methods = ("--methods", "dhntb", "dhlnn", "bsdh")
    done = counted_epochs(monkeypatch, stop_after=("dhlnn", 8))  # before its checkpoint
    with pytest.raises(KeyboardInterrupt):
        small_run(base, "cut", *methods)
    assert done == {"dhntb": 8, "dhlnn": 8}
    assert not (base / "cut" / "metrics.json").exists()
    with pytest.raises(UsageError, match="metrics.json is missing"):
        read_results(base / "cut")

    done = counted_epochs(monkeypatch)
    resumed = small_run(base, "cut", *methods, resume=True)
    assert done == {"dhntb": 0, "dhlnn": 4}  # a checkpoint is every 4 epochs: 4 were lost
    for name, row in resumed.metrics["methods"].items():
        assert without_seconds(row) == without_seconds(smoke.metrics["methods"][name])
        np.testing.assert_array_equal(resumed.pnl[f"{name}/pnl"], smoke.pnl[f"{name}/pnl"])


def test_run_killed_while_it_saves_a_checkpoint_goes_on_from_the_one_before(base, smoke, monkeypatch):
    whole = checkpoint.write_json

    def killed(path, values):
        if path.name == "8.json":
            raise KeyboardInterrupt
        whole(path, values)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_json", killed)
        small_run(base, "killed", "--methods", "dhntb")
    # the arrays are there, what marks them as complete is not
    assert {p.name for p in (base / "killed/checkpoints/dhntb").iterdir()} == {"4", "4.json", "8"}
    done = counted_epochs(monkeypatch)
    resumed = small_run(base, "killed", "--methods", "dhntb", resume=True)
    assert done == {"dhntb": 4}
    assert without_seconds(resumed.metrics["methods"]["dhntb"]) == without_seconds(
        smoke.metrics["methods"]["dhntb"]
    )


def test_finished_run_is_read_back_on_resume_and_another_config_is_refused(base, smoke, monkeypatch):
    done = counted_epochs(monkeypatch)
    before = (smoke.folder / "metrics.json").read_bytes()
    assert small_run(base, "smoke", resume=True).metrics == smoke.metrics
    assert done == {} and (smoke.folder / "metrics.json").read_bytes() == before
    with pytest.raises(UsageError, match="begun with another configuration"):
        small_run(base, "smoke", "--seed", "3", resume=True)
    with pytest.raises(UsageError, match="exists; give --out another one, or --overwrite, or --resume"):
        small_run(base, "smoke")
    assert (smoke.folder / "metrics.json").read_bytes() == before


def test_overwriting_leaves_nothing_of_the_earlier_run(base):
    small_run(base, "twice", "--methods", "bsdh")
    (base / "twice" / "old.png").write_bytes(b"")
    results = small_run(base, "twice", "--methods", "bsdh", "--seed", "2", overwrite=True)
    assert not (base / "twice" / "old.png").exists()
    assert json.loads((base / "twice/metrics.json").read_text())["seed"] == results.config.seed == 2


def test_checkpoints_may_come_before_the_first_validation(base, smoke):
    every = ("--training.checkpoint_every", "3", "--training.validation_every", "8")
    results = small_run(base, "early", "--methods", "dhntb", *every)
    row, smoke_row = (r.metrics["methods"]["dhntb"] for r in (results, smoke))
    assert row["training"]["risk"] == smoke_row["training"]["risk"]
    assert row["training"]["validation_risk"] == smoke_row["training"]["validation_risk"][1:]


# --- other problems -----------------------------------------------------------------------------------


def notes_of(base, name, *overrides):
    return small_run(base, name, "--methods", "bsdh", *overrides).meta["notes"]


def test_note_where_there_is_no_liability(base):
    notes = notes_of(base, "no_liability", "--contract.strike", "1.2", "--market.volatility", "0.1")
    assert any("no liability" in note and "no row is evidence of hedging" in note for note in notes)


def test_note_where_nothing_beats_not_trading_and_the_tail_does_not_matter(base):
    notes = notes_of(base, "no_trade", "--risk.risk_aversion", "1")
    assert any("the exact optimum is not to trade" in n and "not who hedges well" in n for n in notes)
    unknown = notes_of(base, "unknown", "--risk.risk_aversion", "1", "--evaluation.optimum", "false")
    assert any("no method beats no hedge" in n and "not trading is the best" in n for n in unknown)
    assert any("= 0.0331 lies outside 0.1 to 5: risk aversion hardly matters" in note for note in notes)


def test_note_where_the_far_tail_decides(base):
    notes = notes_of(base, "far_tail", "--risk.risk_aversion", "200")
    assert any("= 6.62 lies outside 0.1 to 5: the far tail" in note for note in notes)


def test_note_on_a_dead_band(smoke):
    metrics = copy.deepcopy(smoke.metrics)
    metrics["methods"]["dhntb"]["final"]["turnover_mean"]["value"] = 0.0
    case = make_case(smoke.config, make_source(smoke.config, jax.random.key(0)))
    assert notes.notes_of(case, smoke.metrics) == []
    (note,) = notes.notes_of(case, metrics)
    assert note.startswith("dhntb does not trade although optimal gains by it: a dead band")


def test_note_on_a_dead_edge(smoke):
    """A trained hedger that only buys, as many units as before; no other row is meant."""
    metrics = copy.deepcopy(smoke.metrics)
    metrics["methods"]["dhntb"]["final"]["round_trip_mean"]["value"] = 0.0
    metrics["methods"]["fixed_band"]["final"]["round_trip_mean"]["value"] = 0.0  # a rule is not trained
    case = make_case(smoke.config, make_source(smoke.config, jax.random.key(0)))
    (note,) = notes.notes_of(case, metrics)
    assert note.startswith("dhntb trades one way only: it turns back 0 units a path, optimal ")
    optimal = metrics["methods"]["optimal"]["final"]
    optimal["round_trip_mean"]["value"] = 0.009 * optimal["turnover_mean"]["value"]
    assert notes.notes_of(case, metrics) == []  # one way is nearly the best way


def test_hedgers_are_tested_under_another_volatility(base, smoke):
    rough = small_run(base, "rough", "--methods", "bsdh", "--evaluation.market.volatility", "0.4")
    exact = rough.metrics["methods"]["no_hedge"]["final"]["pnl_mean"]["value"]
    plain = smoke.metrics["methods"]["no_hedge"]["final"]["pnl_mean"]["value"]
    assert exact == pytest.approx(2 * plain, rel=1e-2)  # at the money, proportional to the volatility
    assert (
        rough.metrics["methods"]["bsdh"]["final"]["pnl_std"]["value"]
        > 1.5 * (smoke.metrics["methods"]["bsdh"]["final"]["pnl_std"]["value"])
    )


@functools.cache
def history_run(base):
    """Real prices, a lookback, expected shortfall and one small network; its table is in test_report."""
    return small_run(
        base, "history", "--market.kind", "history", "--contract.kind", "lookback_call", "--methods", "dhntb",
        "--risk.kind", "expected_shortfall", "--training.epochs", "4", "--evaluation.epochs=",
    )  # fmt: skip


def test_recorded_prices_give_a_table_with_clustered_errors(base):
    results = history_run(base)
    rows = results.metrics["methods"]
    assert list(rows) == ["dhntb", "no_hedge"]
    n_paths, n_groups = results.meta["n_test_paths"], results.meta["n_test_groups"]
    assert n_groups < n_paths == len(results.pnl["payoff"]) and n_groups >= 30
    assert {row["estimator"] for row in rows.values()} == {"simulation"}
    assert all(0 < row["effective_sample_size"] < 1000 for row in rows.values())
    # paths of one time group move together: by hand, the error of the mean from sums over groups
    pnl, group = results.pnl["no_hedge/pnl"].astype(float), results.pnl["group_id"]
    sums = np.bincount(group, pnl - pnl.mean()) / n_paths
    by_hand = np.sqrt(n_groups / (n_groups - 1) * np.square(sums - sums.mean()).sum())
    assert rows["no_hedge"]["final"]["pnl_mean"]["stderr"] == pytest.approx(by_hand, rel=1e-3)
    assert by_hand > 1.1 * pnl.std() / np.sqrt(n_paths)
    notes = "\n".join(results.meta["notes"])
    assert "the shipped closes" in notes and "training volatility: AAPL" in notes
    # what was minimized fell on the training batches' own risk scale
    curve = rows["dhntb"]["training"]
    assert np.all(np.isfinite(curve["validation_risk"])) and curve["validation_risk"][-1] > 0
