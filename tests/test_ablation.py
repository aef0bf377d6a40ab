"""The ablation: what its variants are and cost, its equalities, its budgets, its files and mistakes."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import ablation_report, ablation_study, ablation_trainer
from dhlnn_jax.ablation import (
    base_config,
    measured_epochs,
    passes,
    seeing_noise,
    variants_of,
    with_price_noise,
)
from dhlnn_jax.ablation_figures import diverged, figures_of
from dhlnn_jax.ablation_report import main, print_ablation
from dhlnn_jax.ablation_study import Asked, last_within, run_study
from dhlnn_jax.config import load_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.fitting import build_hedger, build_update
from dhlnn_jax.linearize import Linearization, linearize_at
from dhlnn_jax.nested import Problem
from dhlnn_jax.source import make_source, settings_of
from dhlnn_jax.train import OBJECTIVES, init_state, make_train_step

SMOKE = str(Path(__file__).parents[1] / "configs/smoke.toml")
TINY = (
    *(
        "--market.n_steps",
        "3",
        "--model.hidden_sizes",
        "4",
        "--training.epochs",
        "4",
        "--training.warmup",
        "0",
    ),
    *("--training.n_paths", "40", "--training.learning_rate", "1e-3", "--evaluation.n_paths", "600"),
    *("--evaluation.epochs", "2", "4", "--nested.n_inner", "2"),
)
# No exact optimum: solving for one takes longer than everything else here.
RISK = (*TINY, "--evaluation.optimum", "false", "--methods", "dhlnn")


def config_of(*overrides):
    return load_config(SMOKE, [*TINY, *overrides])


@cache
def tiny_judge():
    config = load_config(SMOKE, [*RISK])
    source = make_source(config, jax.random.key(3))
    return ablation_study.Judge(config, source, build_hedger("dhntb", config))


@cache
def tiny_study():
    """Two seeds of two rows, after each measured epoch."""
    rows = ("adam_more_epochs",)
    return list(run_study(Asked("optimizers", load_config(SMOKE, [*RISK]), n_seeds=2, rows=rows)))


def test_every_variant_is_options_over_the_same_base():
    config = config_of()
    variants = variants_of("optimizers", config)
    for variant in variants.values():
        base_config(config, variant.options)  # valid
        assert variant.reference == "dhlnn"
    assert variants["adam_n_eta"].options["training.learning_rate"] == pytest.approx(2e-3)
    printed = base_config(config, variants["as_printed"].options).nested
    assert (printed.risk_weights, printed.cost_surrogate) == ("frozen", "squared_difference")
    assert base_config(config, {}).nested.n_inner == 2
    configured = config_of("--training.learning_rate", "1e-2")
    assert "adam_configured" in variants_of("optimizers", configured)


def test_levels_have_their_own_reference_and_sizes():
    config = config_of()
    noise = variants_of("noise", config, (20, 50))
    assert len(noise) == 2 * 8
    without = variants_of("noise", config, (20, 50), hedger="dhmlp")
    assert len(without) == 2 * 7  # Gauss-Newton is for the band
    assert noise["adam @ 50"].reference == "dhlnn @ 50"
    assert base_config(config, noise["adam @ 50"].options).training.n_paths == 50
    data = variants_of("data", config, (20,), ("adam",))
    assert list(data) == [
        *("dhlnn @ fixed 20", "adam @ fixed 20", "dhlnn @ noisy 0.2", "adam @ noisy 0.2"),
        *("dhlnn @ noisy 1", "adam @ noisy 1"),
    ]
    assert data["adam @ fixed 20"].fixed_data and not data["adam @ noisy 1"].fixed_data


def test_measured_epochs_end_with_the_last_and_hold_one_nth_of_it():
    assert measured_epochs(config_of()) == (2, 4)
    config = load_config(
        SMOKE, ["--training.epochs", "60", "--evaluation.epochs", "5", "--nested.n_inner", "5"]
    )
    assert measured_epochs(config) == (5, 12, 60)
    default = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"epochs": ()})})
    assert measured_epochs(default) == (1, 2, 3, 5, 7, 10, 12, 15, 20, 30, 50, 60)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dhlnn", (1, 2, 3)),
        ("adam", (1, 0, 1)),
        ("no_momentum", (1, 0, 1)),
        ("adam_same_batch", (3, 0, 3)),
        ("position", (1, 2, 3)),
        ("frozen_direction", (1, 0, 1)),
        ("as_printed", (1, 2, 4)),
        ("sgd", (1, 2, 3)),
    ],
)
def test_passes_are_those_that_one_update_makes(name, expected):
    config = config_of("--nested.n_inner", "3")
    variant = variants_of("optimizers", config)[name]
    config = base_config(config, variant.options)
    update = build_update(variant.update, config)
    count = {"forward": 0, "jvp": 0, "vjp": 0}

    def counted(kind, fn):
        def call(*args):
            count[kind] += 1
            return fn(*args)

        return call

    inputs = jnp.linspace(-1.0, 1.0, 5)

    def network(params):
        return jnp.tanh(params["w"] * inputs)

    @jax.custom_vjp
    def outputs(params):
        return network(params)

    outputs.defvjp(
        lambda params: (counted("forward", network)(params), params),
        counted("vjp", lambda params, bar: jax.vjp(network, params)[1](bar)),
    )

    def linearize(params):
        plain = linearize_at(counted("forward", network), params)
        return Linearization(plain.value, counted("jvp", plain.jvp), counted("vjp", plain.vjp))

    surrogate = None if config.nested.cost_surrogate == "absolute" else lambda y: -jnp.square(y)
    problem = Problem(outputs, lambda y: -jnp.square(y - 1), lambda v: -jnp.mean(v), surrogate, linearize)
    params = {"w": jnp.asarray(0.3)}
    with jax.disable_jit():  # loops run in Python
        info = update.apply(problem, params, update.init(params))[2]
    n_gradients = float(info.n_gradients)
    assert tuple(passes(config, variant.update, n_updates=1, n_gradients=n_gradients)) == expected
    assert tuple(count.values()) == expected


def test_gauss_newton_passes_forward_once_an_update_and_back_once_a_step():
    assert passes(config_of(), "dhlnn_newton", n_updates=3, n_gradients=6.0) == (3, 0, 6)


def test_study_counts_spends_and_pairs():
    results = tiny_study()[-1]
    assert [r["finished"] for r in tiny_study()] == [False, True]
    assert (results["unit"], results["optimum"], results["clock"]) == ("money", None, "cpu_seconds")
    json.dumps(results, allow_nan=False)
    rows = results["variants"]
    assert [p["epochs"] for p in rows["dhlnn"]["points"]] == [2, 4]
    assert [p["epochs"] for p in rows["adam_more_epochs"]["points"]] == [4, 8]
    last = rows["dhlnn"]["points"][-1]
    counts = ("paths", "gradients", "forward", "jvp", "vjp")
    assert [last[count] for count in counts] == [160, 8, 4, 4, 8]
    assert all(0 < last[clock] for clock in ("seconds", "cpu_seconds"))
    paired = results["paired"]
    assert list(paired) == ["adam_more_epochs"]
    assert paired["adam_more_epochs"]["epochs"]["at"] == [4, 4]
    row = paired["adam_more_epochs"]["gradients"]
    assert (row["at"], row["spent"]) == ([8, 4], [8, 8])
    difference = np.subtract(rows["adam_more_epochs"]["points"][-1]["value"], last["value"])
    np.testing.assert_allclose(row["by_seed"], difference)
    assert row["value"] == pytest.approx(difference.mean())
    assert row["stderr_seeds"] == pytest.approx(difference.std(ddof=1) / np.sqrt(2))
    assert 0 < row["stderr_paths"] < last["stderr_paths"]


def test_a_seed_is_trained_as_by_the_loop_over_epochs():
    config, judge = load_config(SMOKE, [*RISK]), tiny_judge()
    update = build_update("dhntb", base_config(config, {}))
    step = jax.jit(
        make_train_step(
            judge.hedger, judge.source.train, judge.contract, OBJECTIVES["entropic"], update, n_paths=40
        )
    )
    key_init, key_train = (jax.random.fold_in(jax.random.key(1), role) for role in (0, 1))
    state = init_state(judge.hedger, update, key_init)
    for epoch in range(4):
        state, info = step(state, jax.random.fold_in(key_train, epoch), judge.source.settings)
    point = tiny_study()[-1]["variants"]["adam_more_epochs"]["points"][0]
    assert point["batch_value"][1] == pytest.approx(float(info.risk), rel=1e-5)
    assert point["turnover"][1] == pytest.approx(float(info.turnover), rel=1e-4)


def test_a_seed_whose_parameters_are_not_finite_is_said_to_diverge():
    judge = tiny_judge()
    params = judge.init(jnp.stack([jax.random.key(s) for s in range(2)]))
    broken = jax.tree.map(lambda x: x.at[1].set(jnp.nan), params)
    value, _, _ = judge.measurer()(broken)
    assert np.isfinite(value[0]) and np.isnan(value[1])
    assert diverged({"unit": "percent"}, [0.1, None, 2e3]) == 2
    assert diverged({"unit": "money"}, [0.1, None, 2e3]) == 1


def test_an_edge_that_no_path_reaches_is_told_by_what_is_never_turned_back(capsys):
    judge = tiny_judge()
    params = judge.init(jnp.stack([jax.random.key(s) for s in range(3)]))
    (layer,) = (x for name, x in params["params"]["Perceptron_0"].items() if name == "Dense_1")
    wide = layer["bias"].at[1, 1].set(20.0).at[2].set(20.0)  # the upper edge of one seed, both of another
    params["params"]["Perceptron_0"]["Dense_1"] = {**layer, "bias": wide}
    _, _, turned_back = judge.measurer()(params)
    assert turned_back[0] > 0.01 and turned_back[1] == turned_back[2] == 0

    results = json.loads(json.dumps(tiny_study()[-1]))
    point = results["variants"]["dhlnn"]["points"][-1]
    point |= {"turnover": [0.7, 0.5], "round_trip": [0.2, 0.001]}
    for at_optimum, said in ((0.3, "(1 of 2 trade one way only)"), (0.05, None), (0.0, None)):
        results["optimum"] = {"value": 0.03, "error": 0.0, "round_trip": at_optimum}
        print_ablation(results)
        out = capsys.readouterr().out
        assert said in out if said else "one way" not in out
    point["turnover"][1] = 0.0  # that is a dead band, which has its own words
    results["optimum"]["round_trip"] = 0.3
    print_ablation(results)
    out = capsys.readouterr().out
    assert "one way" not in out and "(1 of 2 never trade)" in out


def test_noise_moves_features_and_not_money(key):
    config, source = load_config(SMOKE, [*RISK]), tiny_judge().source
    settings = settings_of(config)
    sample = with_price_noise(source.train, 0.5)
    noisy, plain = jax.jit(lambda key: [draw(key, 4_000, settings)[0] for draw in (sample, source.train)])(
        key
    )
    np.testing.assert_array_equal(noisy.spot, plain.spot)
    deviation = 0.5 * float(settings.volatility * jnp.sqrt(settings.dt))
    assert float(jnp.std(noisy.half_spread)) == pytest.approx(deviation, rel=0.03)
    hedger = build_hedger("dhntb", config)
    one = jax.tree.map(lambda x: x[0], noisy)
    seen = one._replace(spot=one.spot * (1 + one.half_spread), half_spread=None)
    for got, want in zip(
        jax.tree.leaves(seeing_noise(hedger).inputs(one, settings)),
        jax.tree.leaves(hedger.inputs(seen, settings)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want)
    assert not np.allclose(
        hedger.inputs(seen, settings)[0], hedger.inputs(plain._replace(spot=one.spot), settings)[0]
    )


def test_fixed_data_are_the_same_every_epoch_and_overfitted():
    config, judge = load_config(SMOKE, [*RISK, "--training.learning_rate", "0.05"]), tiny_judge()
    variant = variants_of("data", config, (30,), ("adam",))["adam @ fixed 30"]
    trainer = ablation_trainer.Trainer(variant, config, judge, range(1))
    for epoch in (1, 2, 4, 60):
        trainer.train_to(epoch)
    points = trainer.points
    assert {point["paths"] for point in points} == {30}
    assert points[-1]["batch_value"][0] < points[0]["batch_value"][0]
    assert points[-1]["value"][0] > points[-1]["batch_value"][0]


def test_last_within_is_the_last_point_that_has_spent_no_more():
    points = [{"gradients": g} for g in (1, 5, 10)]
    assert [last_within(points, "gradients", most) for most in (0.5, 5, 9.9, 10, 11)] == [0, 1, 1, 2, 2]


def test_cli_writes_and_redraws_and_refuses(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "here"

    def studied(asked, *, checkpoint_folder):
        checkpoint_folder.mkdir(parents=True)
        return iter(tiny_study())

    monkeypatch.setattr(ablation_report, "run_study", studied)
    command = [SMOKE, "--seeds", "2", *RISK, "--out", str(folder)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "at equal gradients" in out and "DHLNN, N = 2" in out
    assert {p.name for p in folder.iterdir()} == {"ablation.json", "ablation_controls.png"}
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    (folder / "ablation_controls.png").unlink()
    assert main(["--report", str(folder)]) == 0
    assert (folder / "ablation_controls.png").exists()
    (folder / "ablation_noise.png").touch()  # of another study
    assert main([*command, "--overwrite"]) == 0
    assert {p.name for p in folder.iterdir()} == {"ablation.json", "ablation_controls.png"}
    (folder / "ablation.json").write_text('{"schema": 1, "variants": {}}')
    assert main(["--report", str(folder)]) == 2
    assert "was not written by an ablation of this version" in capsys.readouterr().err
    capsys.readouterr()


def test_study_cut_off_goes_on_from_its_last_checkpoint_to_the_same_numbers(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "cut"
    command = [SMOKE, "--seeds", "2", "--rows", "adam_more_epochs", *RISK, "--out", str(folder)]
    trained = []
    train_to = ablation_trainer.Trainer.train_to

    def counted(trainer, epoch, *, last=False):
        if len(trained) == 3:  # of 2 variants at 2 measured epochs
            raise KeyboardInterrupt
        trained.append(epoch)
        train_to(trainer, epoch, last=last)

    with monkeypatch.context() as patch:
        patch.setattr(ablation_trainer.Trainer, "train_to", counted)
        assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"ablation.json", "checkpoints"}
    measured = json.loads((folder / "ablation.json").read_text())
    assert not measured["finished"] and len(measured["variants"]["dhlnn"]["points"]) == 1

    for wrong, said in (
        ([], "exists; give --out another folder, or --overwrite, or --resume"),
        (["--resume", "--cost.rate", "3e-3"], "is of another configuration or other options"),
        (["--resume", "--study", "noise"], "is of another configuration or other options"),
        (["--resume", "--seeds", "3"], "is of another configuration or other options"),
        (["--resume", "--overwrite"], "not allowed with argument"),
    ):
        assert main([*command, *wrong]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1

    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ablation_trainer.Trainer, "train_to", counted)
        assert main([*command, "--resume"]) == 0
    assert trained == [4, 8]  # the second measured epoch alone; the slower variant at its own
    out = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"ablation.json", "ablation_controls.png"}

    def numbers(results):
        """All but what moves with the machine's speed: seconds, and what is paired at equal ones."""
        points = {
            name: [{k: x for k, x in p.items() if "seconds" not in k} for p in variant["points"]]
            for name, variant in results["variants"].items()
        }
        paired = results["paired"]["adam_more_epochs"]
        return points, {budget: paired[budget] for budget in ("epochs", "gradients")}

    written = json.loads((folder / "ablation.json").read_text())
    assert numbers(written) == numbers(json.loads(json.dumps(tiny_study()[-1])))
    seconds = [[p["cpu_seconds"] for p in v["points"]] for v in written["variants"].values()]
    assert all(0 < first < last for first, last in seconds)  # those of the first part are counted

    # finished, it is read back
    (folder / "ablation_controls.png").unlink()
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out == out and (folder / "ablation_controls.png").exists()
    assert main([*command, "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "nothing to resume in" in capsys.readouterr().err


def test_study_killed_before_its_last_results_were_written_writes_them_first(tmp_path):
    def study():
        asked = Asked("optimizers", load_config(SMOKE, [*RISK]), n_seeds=2, rows=("adam_more_epochs",))
        return run_study(asked, checkpoint_folder=tmp_path / "checkpoints")

    (*_, last) = study()
    assert last["finished"]
    (again,) = study()
    again.pop("variants"), last.pop("variants")  # compile_seconds
    assert again == last


def test_noise_and_data_figures_are_drawn():
    point = tiny_study()[-1]["variants"]["dhlnn"]["points"]
    results = tiny_study()[-1] | {"paired": {}, "unit": "percent", "optimum": {"value": 0.02}}

    def rows(study):
        variants = variants_of(study, config_of(), (20, 50), ("adam",))
        return {n: v._asdict() | {"points": point, "clean_value": [1.0, None]} for n, v in variants.items()}

    for study, names in (("noise", {"noise"}), ("data", {"fixed_data", "price_noise"})):
        figures = figures_of(results | {"study": study, "variants": rows(study)})
        assert set(figures) == {f"ablation_{name}.png" for name in names}
        for figure in figures.values():
            assert all(axis.get_xlabel() for axis in figure.axes)


def test_divergence_is_named_in_tables_and_legends(capsys):
    results = json.loads(json.dumps(tiny_study()[-1]))
    results["variants"]["adam_more_epochs"]["points"][-1]["value"][0] = None
    for row in results["paired"]["adam_more_epochs"].values():
        row["by_seed"][0] = row["value"] = None
    print_ablation(results)
    assert "diverges in 1 of 2 seeds" in capsys.readouterr().out
    labels = figures_of(results)["ablation_controls.png"].axes[0].get_legend_handles_labels()[1]
    assert any("diverges in 1 of 2" in label for label in labels)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seeds", "2"], "config file comes first"),
        ([SMOKE, "--seeds", "0"], "--seeds"),
        ([SMOKE, "--study", "colours"], "--study"),
        ([SMOKE, "--nested.n_inner", "1"], "n_inner"),
        ([SMOKE, "--rows", "adm"], "unknown row 'adm'"),
        ([SMOKE, "--paths", "30"], "--paths"),
        ([SMOKE, "--training.epoch", "3"], "training.epochs"),
        (["nowhere.toml"], "nowhere.toml"),
        (["--report", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments, said, tmp_path, capsys):
    out = [] if "--report" in arguments else ["--out", str(tmp_path / "out")]
    assert main([*arguments, *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ablation.py: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "out").exists()


def test_recorded_prices_are_refused_by_noise():
    with pytest.raises(UsageError, match="simulated"):
        variants_of("noise", load_config(str(Path(SMOKE).parent / "history_lookback.toml"), []))
