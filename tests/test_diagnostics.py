import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dhlnn_jax import diagnostics, diagnostics_run, train
from dhlnn_jax.config import load_config
from dhlnn_jax.diagnostics_figure import diagnostics_figure
from dhlnn_jax.diagnostics_report import print_diagnostics
from dhlnn_jax.diagnostics_run import diagnose, main
from dhlnn_jax.hedger import make_band_hedger
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.nested import Problem, nested_update
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract
from dhlnn_jax.settings import make_settings

SMOKE = str(Path(__file__).parents[1] / "configs/smoke.toml")


# --- problems and updates -----------------------------------------------------------------------------


def test_zero_gradient_share_by_hand(x64):
    # two paths, three steps, two widths; a width below zero does nothing
    widths = jnp.array([[[1.0, -1.0], [-1.0, -2.0], [-3.0, 0.5]], [[-1.0, -1.0], [-1.0, -1.0], [2.0, 2.0]]])
    mean_loss = lambda values: -jnp.mean(values)  # noqa: E731
    problem = Problem(lambda w: w * widths, lambda y: jnp.sum(jax.nn.relu(y), axis=(1, 2)), mean_loss)
    share = functools.partial(diagnostics.zero_gradient_share, problem, jnp.array(1.0))
    assert float(share(n_row_axes=2)) == pytest.approx(3 / 6)
    # of two outputs, the second of which nothing depends on, a row has a gradient if one of them has
    two = Problem(
        lambda w: (w * widths, w * widths), lambda y: jnp.sum(jax.nn.relu(y[0]), axis=(1, 2)), mean_loss
    )
    assert float(diagnostics.zero_gradient_share(two, jnp.array(1.0), n_row_axes=2)) == pytest.approx(3 / 6)
    assert float(share(n_row_axes=1)) == 0.0 and float(share(n_row_axes=3)) == pytest.approx(8 / 12)


@pytest.mark.parametrize("inner_update", ["sgd", "frozen_direction"])
def test_inner_step_norms_and_the_steps_that_a_tolerance_allows(x64, inner_update):
    # |w|^2 / 2 with eta 1/2 from |w| = 1: steps 1/2, 1/4, 1/8, 1/16, or 1/2 again and again
    problem = Problem(lambda w: w, lambda y: 0.5 * y**2, jnp.sum)
    w = jnp.array([0.6, -0.8])

    def update_of(n_inner, tolerance=0.0):
        return nested_update(
            optax.sgd(0.5), learning_rate=0.5, n_inner=n_inner, tolerance=tolerance, inner_update=inner_update
        )

    def measure(w):
        return diagnostics.inner_step_norms(update_of, problem, w, update_of(1).init(w), n_steps=4)

    norms, ends = jax.jit(measure)(w)
    halving = inner_update == "sgd"
    np.testing.assert_allclose(norms, 0.5 ** np.arange(1, 5) if halving else [0.5] * 4, rtol=1e-12)
    assert len(ends) == 4
    for tolerance, n in ((0.0, 4), (0.2, 3), (10.0, 1)) if halving else ((0.0, 4), (10.0, 1)):
        assert diagnostics.inner_steps_allowed(norms, tolerance) == n
        update = update_of(4, tolerance)  # Algorithm 1 itself stops there
        end = jax.jit(lambda w, u=update: u.apply(problem, w, u.init(w))[0])(w)
        np.testing.assert_allclose(end, ends[n - 1], rtol=1e-12)


# --- along training -----------------------------------------------------------------------------------

N_STEPS, N_PATHS = 4, 32
SAMPLE = make_simulation_sampler(SIMULATORS["gbm"], n_steps=N_STEPS)
CONTRACT, ENTROPIC = Contract(CLAIMS["european_call"]), train.OBJECTIVES["entropic"]
FEATURES = ("standardised_log_moneyness", "standardised_time_to_maturity")


def settings():
    return make_settings(n_steps=N_STEPS, cost_rate=5e-3, risk_aversion=50.0, dt=7 / 365)


def update_of(n_inner):
    return nested_update(optax.adam(1e-2), learning_rate=1e-2, n_inner=n_inner)


def state_of(params, epoch):
    return train.TrainState(params, update_of(1).init(params), jnp.asarray(epoch))


def make(hedger, n_inner):
    return diagnostics.make_diagnostics(
        hedger,
        SAMPLE,
        CONTRACT,
        ENTROPIC,
        settings(),
        jax.random.key(1),
        update_of=update_of,
        n_inner=n_inner,
        n_inner_shown=n_inner,
        n_paths=N_PATHS,
        n_row_paths=2,
        n_iterations=5,
        step_sizes=(0.125, 0.25, 0.5, 1.0),
        tolerances=(1e3, 0.0),
    )


@functools.cache
def of_a_band_hedger():
    """A fresh network, and a dead one: bands so wide that nobody trades."""
    hedger = make_band_hedger(features=FEATURES, hidden_sizes=(6, 5))
    params = jax.jit(hedger.init)(jax.random.key(0))
    dead = jax.tree.map(lambda w: w, params)
    dead["params"]["Perceptron_0"]["Dense_2"]["bias"] = jnp.array([50.0, 50.0])
    return make(hedger, 2)([state_of(params, 0), state_of(dead, 7)])


def test_along_training_is_json_with_a_number_for_every_epoch():
    numbers = of_a_band_hedger()
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert numbers["epoch"] == [0, 7]
    for name, values in numbers.items():
        if name not in ("n_inner", "step_sizes", "tolerances"):
            assert len(values) == 2, name
    for name in ("outputs_error", "hedge_ratio_mean_ratio"):
        assert np.shape(numbers[name]) == (2, 4)
    assert np.shape(numbers["inner_step_norms"]) == (2, 2)
    assert numbers["inner_steps_allowed"][0] == [1, 2]


def test_along_training_numbers_of_a_fresh_and_of_a_dead_network():
    numbers = of_a_band_hedger()
    fresh, dead = ({k: v[i] for k, v in numbers.items() if k not in ("n_inner",)} for i in (0, 1))
    # what has no gradient is what does not trade
    assert fresh["zero_gradient_share"] == fresh["no_trade_share"] and 0 < fresh["no_trade_share"] < 1
    assert dead["zero_gradient_share"] == dead["no_trade_share"] == 1.0
    assert dead["step_norm"] == 0.0 and dead["outputs_ratio"] == [None] * 4
    # the errors grow faster than the changes; (66) and (93) as printed, of the measured constants
    assert np.all(np.diff(fresh["outputs_ratio"]) > 0)
    assert fresh["hessian_bound_93"] == fresh["output_weight_A"]
    assert fresh["gradient_bound_66"] == pytest.approx(
        fresh["output_weight_A"] * (fresh["activation_norm_H"] + 1)
    )
    assert fresh["drift_bound_25"] == pytest.approx(fresh["output_weight_A"] * fresh["step_norm"])
    assert 0 < fresh["gradient_drift_median"] <= fresh["gradient_drift_max"]
    assert 0 < fresh["hidden_hessian_norm_max"] <= fresh["hessian_norm_max"] * 1.5


def test_along_training_step_is_the_outer_iteration_of_the_same_update():
    hedger, numbers = make_band_hedger(features=FEATURES, hidden_sizes=(6, 5)), of_a_band_hedger()
    state = state_of(jax.jit(hedger.init)(jax.random.key(0)), 0)
    step = train.make_train_step(hedger, SAMPLE, CONTRACT, ENTROPIC, update_of(2), n_paths=N_PATHS)
    key_paths = jax.random.split(jax.random.key(1))[0]
    after, info = jax.jit(step)(state, key_paths, settings())
    change = optax.global_norm(jax.tree.map(jnp.subtract, after.params, state.params))
    assert numbers["step_norm"][0] == pytest.approx(float(change), rel=1e-4)
    assert numbers["risk"][0] == pytest.approx(float(info.risk), rel=1e-4)


def test_too_few_inner_steps_shown_is_refused():
    hedger = make_band_hedger(features=FEATURES, hidden_sizes=(4,))
    with pytest.raises(ValueError, match="n_inner_shown must be at least n_inner = 9"):
        diagnostics.make_diagnostics(
            hedger,
            SAMPLE,
            CONTRACT,
            ENTROPIC,
            settings(),
            jax.random.key(0),
            update_of=update_of,
            n_inner=9,
        )


# --- over seeds ---------------------------------------------------------------------------------------

TINY = (
    *("--model.hidden_sizes", "4", "--training.epochs", "1", "--training.n_paths", "32"),
    *("--evaluation.epochs=", "--seed", "3"),
)


def test_one_entry_a_seed_the_first_as_with_one_seed_and_nothing_compiled_twice(monkeypatch):
    traced = []

    def counted(pnl, settings):
        traced.append(pnl.shape)
        return ENTROPIC(pnl, settings)

    monkeypatch.setitem(train.OBJECTIVES, "entropic", counted)
    config = load_config(SMOKE, TINY)
    one = diagnose(config, n_seeds=1)
    n_traced = len(traced)
    two = diagnose(config, n_seeds=2)
    assert 0 < n_traced == len(traced) - n_traced  # a second seed runs the first one's programs
    assert two["seeds"] == [3, 4] and len(two["by_seed"]) == 2
    assert two["by_seed"][0] == one["by_seed"][0] != two["by_seed"][1]
    assert two["by_seed"][1]["epoch"] == [0, 1]
    json.dumps(two, allow_nan=False)


def of_three_seeds():
    """Three times the band hedger's numbers, with its risk times 1, 2 and 4 by hand."""
    by_seed = [of_a_band_hedger() | {"risk": [scale, 10.0 * scale]} for scale in (4.0, 1.0, 2.0)]
    return {"seeds": [0, 1, 2], "by_seed": by_seed}


def test_table_has_median_and_range_over_seeds_and_says_where_seeds_are_missing(capsys):
    results = of_three_seeds()
    results["by_seed"][0]["step_norm"] = [None, None]
    print_diagnostics(results)
    said = " ".join(capsys.readouterr().out.split())
    assert "median of 3 seeds (lowest to highest)" in said
    assert "2 (1 to 4)" in said and "20 (10 to 40)" in said
    assert "2 of 3 seeds" in said
    # the dead network's steps change nothing, whatever the seed: its ratio is not defined
    assert "–" in said


def test_figure_has_nine_labelled_panels_with_a_band_for_every_curve_over_seeds(tmp_path):
    figure = diagnostics_figure(of_three_seeds())
    assert len(figure.axes) == 9
    assert "median of 3 seeds" in figure.get_suptitle() and "lowest to highest" in figure.get_suptitle()
    for axis in figure.axes:
        assert axis.get_xlabel() and axis.get_ylabel() and axis.get_title() and axis.get_legend()
        assert len(axis.collections) >= 4  # two bands a curve
    figure.savefig(tmp_path / "diagnostics.png")
    assert (tmp_path / "diagnostics.png").stat().st_size > 20_000


@pytest.mark.parametrize("given, n_seeds", [((), 5), (("--seeds", "3"), 3)])
def test_script_writes_results_and_figure_and_prints_the_table(given, n_seeds, tmp_path, capsys, monkeypatch):
    asked = []

    def diagnose(config, *, n_seeds, checkpoint_folder):
        checkpoint_folder.mkdir(parents=True)
        asked.append(n_seeds)
        return of_three_seeds()

    monkeypatch.setattr(diagnostics_run, "diagnose", diagnose)
    monkeypatch.chdir(tmp_path)
    folder = Path("results") / "smoke_diagnostics"
    assert main([SMOKE, *given]) == 0 and asked == [n_seeds]
    assert json.loads((folder / "diagnostics.json").read_text()) == of_three_seeds()
    out = capsys.readouterr().out
    assert "median of 3 seeds" in out and f"figure: {folder / 'diagnostics.png'}" in out
    assert {path.name for path in folder.iterdir()} == {"diagnostics.json", "diagnostics.png"}


def test_script_cut_off_in_its_second_seed_goes_on_with_it_to_the_same_numbers(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "cut"
    command = [SMOKE, *TINY, "--seeds", "2", "--out", str(folder)]

    def cheap(*given, **how):  # a number of each seed's own parameters among those of another hedger
        def diagnostics(states):
            sums = [float(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state.params))) for state in states]
            return of_a_band_hedger() | {"risk": sums}

        return diagnostics

    monkeypatch.setattr(diagnostics_run, "make_diagnostics", cheap)
    whole = diagnose(load_config(SMOKE, [*TINY, "--out", str(folder)]), n_seeds=2)
    assert whole["by_seed"][0]["risk"] != whole["by_seed"][1]["risk"]
    trained = []

    def fit_or_stop(*given, **how):
        trained.append(len(trained))
        if trained == [0, 1]:
            raise KeyboardInterrupt
        return train.fit(*given, **how)

    monkeypatch.setattr(diagnostics_run, "fit", fit_or_stop)
    assert main(command) == 130
    assert "--resume goes on" in capsys.readouterr().err
    for wrong, said in (
        ([], "exists; give --out another folder, or --overwrite, or --resume"),
        (["--resume", "--cost.rate", "3e-3"], "is of another configuration or other options"),
        (["--resume", "--seeds", "3"], "is of another configuration or other options"),
        (["--resume", "--overwrite"], "not allowed with argument"),
    ):
        assert main([*command, *wrong]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert main([*command, "--resume"]) == 0
    assert trained == [0, 1, 2]  # the first seed is not trained again
    out = capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"diagnostics.json", "diagnostics.png"}
    assert json.loads((folder / "diagnostics.json").read_text()) == json.loads(json.dumps(whole))
    assert main([*command, "--resume"]) == 0  # finished: read back
    assert trained == [0, 1, 2] and capsys.readouterr().out == out


def test_script_refuses_in_one_line_and_overwrites_nothing(tmp_path, capsys):
    assert main(["--help"]) == 0 and "--seeds" in capsys.readouterr().out
    (tmp_path / "diagnostics.json").write_text("earlier")
    for arguments, said in (
        (
            [SMOKE, "--out", str(tmp_path)],
            "diagnostics.json' exists; give --out another folder, or --overwrite",
        ),
        (["missing.toml"], "no config file 'missing.toml'"),
        (["--seeds", "2"], "config file comes first"),
        ([SMOKE, "--seeds", "0"], "--seeds must be from 1 to 100, got 0"),
        ([SMOKE, "--seeds", "101"], "--seeds must be from 1 to 100, got 101"),
        ([SMOKE, "--seeds", "two"], "--seeds: invalid int value: 'two'"),
        ([SMOKE, "--seeds"], "--seeds: expected one argument"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and said in err and err.startswith("diagnostics.py: ") and err.count("\n") == 1
    assert (tmp_path / "diagnostics.json").read_text() == "earlier"
