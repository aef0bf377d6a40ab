import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from dhlnn_jax import diagnostics, diagnostics_run, train
from dhlnn_jax.config import load_config
from dhlnn_jax.diagnostics_figure import diagnostics_figure
from dhlnn_jax.diagnostics_report import print_diagnostics
from dhlnn_jax.diagnostics_run import diagnose, main
from dhlnn_jax.hedger import make_band_hedger
from dhlnn_jax.market import SIMULATORS, make_simulation_sampler
from dhlnn_jax.model import BandNetwork
from dhlnn_jax.nested import Problem, nested_update
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract
from dhlnn_jax.settings import make_settings

RNG = np.random.default_rng(4)
SMOKE = str(Path(__file__).parents[1] / "configs/smoke.toml")


def tanh_network(params):
    """Pytree in, pytree of 5 numbers out, smooth."""
    hidden = jnp.tanh(jnp.linspace(-1.0, 1.0, 4)[:, None] * params["in"] + params["shift"])
    return {"fit": hidden @ params["out"], "sum": jnp.sum(params["out"] ** 3)}


def tanh_params():
    return {name: jnp.asarray(RNG.normal(size=3)) for name in ("in", "shift", "out")}


# --- linearization error ------------------------------------------------------------------------------


def test_linearization_error_of_a_square_by_hand(x64):
    # f = (w^2, 10 w) at 3 along 2: f - f_lin = (4 h^2, 0), f - f_0 = (12 h + 4 h^2, 20 h)
    fn = lambda w: {"square": w**2, "line": 10.0 * w}  # noqa: E731
    h = np.array([0.1, 0.5, 2.0])
    found = diagnostics.linearization_error(fn, jnp.array(3.0), jnp.array(2.0), h)
    square, line = 12 * h + 4 * h**2, 20 * h
    np.testing.assert_allclose(found.error, 4 * h**2 / np.sqrt(2), rtol=1e-12)
    np.testing.assert_allclose(found.mean_error, 2 * h**2, rtol=1e-12)
    np.testing.assert_allclose(found.change, np.sqrt((square**2 + line**2) / 2), rtol=1e-12)
    np.testing.assert_allclose(found.mean_change, (square + line) / 2, rtol=1e-12)
    np.testing.assert_allclose(found.ratio, found.error / found.change, rtol=1e-12)
    np.testing.assert_allclose(found.mean_ratio, 4 * h / (32 + 4 * h), rtol=1e-12)


def test_linearization_error_of_a_smooth_network_has_slope_2_and_its_ratio_slope_1(x64):
    h = 2.0 ** -np.arange(6, 12)
    measure = jax.jit(lambda w, d: diagnostics.linearization_error(tanh_network, w, d, h))
    found = measure(tanh_params(), tanh_params())
    for error, ratio in ((found.error, found.ratio), (found.mean_error, found.mean_ratio)):
        assert diagnostics.log_slope(h, error) == pytest.approx(2.0, abs=0.05)
        assert diagnostics.log_slope(h, ratio) == pytest.approx(1.0, abs=0.05)


def test_linearization_error_over_kinks_has_slope_three_halves_in_root_mean_square(x64):
    # relu(w - u) for u spread evenly over (0, 1), from w = 0: errors (h - u)^+, whose root mean square is
    # sqrt(h^3 / 3) and whose mean is h^2 / 2.
    kinks = (np.arange(20_000) + 0.5) / 20_000
    h = 2.0 ** -np.arange(1, 7)
    found = diagnostics.linearization_error(
        lambda w: jax.nn.relu(w - kinks), jnp.array(0.0), jnp.array(1.0), h
    )
    np.testing.assert_allclose(found.error, np.sqrt(h**3 / 3), rtol=1e-3)
    np.testing.assert_allclose(found.mean_error, h**2 / 2, rtol=1e-3)
    assert diagnostics.log_slope(h, found.error) == pytest.approx(1.5, abs=0.01)


def test_no_step_leaves_no_error_no_ratio_and_no_slope(x64):
    h = np.array([0.5, 1.0])
    found = diagnostics.linearization_error(jnp.square, jnp.ones(2), jnp.zeros(2), h)
    assert found.error.tolist() == [0.0, 0.0] and np.all(np.isnan(found.ratio))
    assert np.isnan(diagnostics.log_slope(h, found.error))


# --- gradients and Hessians ---------------------------------------------------------------------------


def test_gradient_norms_and_drift_by_hand(x64):
    # f = (a b, a^2): gradients (2, 3) and (6, 0) at (3, 2), (2, 4) and (8, 0) at (4, 2)
    fn = lambda w: (w["a"] * w["b"], w["a"] ** 2)  # noqa: E731
    at, there = ({"a": jnp.array(a), "b": jnp.array(2.0)} for a in (3.0, 4.0))
    np.testing.assert_allclose(diagnostics.gradient_norms(fn, at), [np.sqrt(13.0), 6.0])
    np.testing.assert_allclose(diagnostics.gradient_drift(fn, at, there), [1.0, 2.0])
    # of a quadratic, (25) with the Hessian's norm (1 for ab, 2 for a^2) is attained
    bound = diagnostics.gradient_drift_bound(np.array([1.0, 2.0]), 1.0)
    np.testing.assert_allclose(bound, [1.0, 2.0])
    np.testing.assert_allclose(diagnostics.gradient_drift_bound(2.0, 3.0, tau=0.5), 3.0)


def test_hessian_norm_is_the_largest_eigenvalue_in_absolute_value_from_below(x64, key):
    basis = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    matrix = basis @ np.diag([-5.0, 4.0, 3.0, 0.5, 0.0, 0.0]) @ basis.T
    fn = lambda w: 0.5 * jnp.vdot(w["x"], matrix @ w["x"]) + jnp.sum(w["x"])  # noqa: E731

    def norm(n_iterations):
        return diagnostics.hessian_norm(fn, {"x": jnp.ones(6)}, key, n_iterations=n_iterations)

    found = np.array(jax.jit(lambda: [norm(n) for n in (1, 3, 10, 100)])())
    assert np.all(np.diff(found) >= 0) and np.all(found <= 5.0 + 1e-12)
    assert found[-1] == pytest.approx(5.0, abs=1e-9) and found[0] < 4.9


def test_hessian_norms_against_the_whole_hessian(x64, key):
    params = tanh_params()
    flat, unravel = ravel_pytree(params)
    found = jax.jit(lambda w: diagnostics.hessian_norms(tanh_network, w, key, n_iterations=300))(params)
    whole = jax.jit(jax.hessian(lambda w: ravel_pytree(tanh_network(unravel(w)))[0]))(flat)
    np.testing.assert_allclose(found, np.linalg.norm(whole, 2, axis=(1, 2)), rtol=1e-3)


def test_hessian_norm_of_an_affine_function_is_zero(x64, key):
    assert float(diagnostics.hessian_norm(lambda w: 3.0 * jnp.sum(w), jnp.ones(4), key)) == 0.0


# --- the bounds of appendix D -------------------------------------------------------------------------


def one_unit_layers(a, w1, w2):
    """a (w2 (w1 x + b1)^+ + b2)^+, twice, with b1 = b2 = 0."""
    layer = lambda k, n: {"kernel": jnp.full((1, n), k), "bias": jnp.zeros(n)}  # noqa: E731
    return {
        "params": {"Perceptron_0": {"Dense_0": layer(w1, 1), "Dense_1": layer(w2, 1), "Dense_2": layer(a, 2)}}
    }


@functools.partial(jax.jit, static_argnums=3)
def measured_and_printed(params, x, key, hidden_sizes=(1, 1)):
    """Gradient and Hessian norms of the hidden layers beside (66) and (93), on the rows x."""
    outputs = lambda w: BandNetwork(hidden_sizes).apply(w, x)  # noqa: E731
    fn, hidden = diagnostics.output_layer_fixed(outputs, params)
    constants = diagnostics.perceptron_constants(params, x)
    return (
        diagnostics.gradient_norms(fn, hidden),
        diagnostics.hessian_norms(fn, hidden, key),
        constants,
        diagnostics.gradient_bound(constants),
        diagnostics.hessian_bound(constants),
    )


def test_93_is_no_bound_by_hand(x64, key):
    # f = a w2 (w1 x + b1) + a b2 where positive: the second derivatives are a x for (w1, w2) and a for
    # (b1, w2), all others 0, so the norm is a sqrt(x^2 + 1) = 0.5 sqrt(10) > 0.5 = A.
    params, x = one_unit_layers(0.5, 1.0, 1.0), jnp.array([[3.0]])
    gradients, hessians, constants, _, printed = measured_and_printed(params, x, key)
    assert printed == 0.5 and constants.n_hidden == 2
    np.testing.assert_allclose(hessians, 0.5 * np.sqrt(10.0), rtol=1e-6)
    # df/dw1 = a w2 x, df/db1 = a w2, df/dw2 = a w1 x, df/db2 = a
    np.testing.assert_allclose(gradients, 0.5 * np.sqrt(9 + 1 + 9 + 1), rtol=1e-12)


def test_66_is_no_bound_by_hand(x64, key):
    # with w2 = 10 and w1 = 0.1: df/dw1 = 0.5 10 3 = 15, while A (H + 1) = 0.5 (3 + 1) = 2
    params, x = one_unit_layers(0.5, 0.1, 10.0), jnp.array([[3.0]])
    gradients, _, constants, printed, _ = measured_and_printed(params, x, key)
    assert float(constants.activation_norm) == 3.0 and printed == 2.0
    np.testing.assert_allclose(gradients, 0.5 * np.sqrt(30**2 + 10**2 + 0.3**2 + 1), rtol=1e-12)


def test_93_fails_for_the_band_network_as_it_is_initialized(x64, key):
    network, x = BandNetwork((8, 8)), jnp.asarray(4.0 * RNG.normal(size=(6, 3)))
    params = jax.tree.map(lambda w: w.astype(float), jax.jit(network.init)(key, x))
    _, hessians, _, _, printed = measured_and_printed(params, x, key, (8, 8))
    assert np.max(hessians) > 1.2 * printed


def test_92_fails_within_one_layer(x64):
    # f = tanh(w x + b): d2f / dw db = tanh''(w x + b) x
    second = jax.jit(jax.hessian(lambda wb: jnp.tanh(wb[0] * 2.0 + wb[1])))(jnp.array([0.3, 0.1]))
    t = np.tanh(0.7)
    assert float(second[0, 1]) == pytest.approx(-2 * t * (1 - t**2) * 2.0) and abs(second[0, 1]) > 1.0


def test_perceptron_constants_by_hand(strict_x64):
    # rows (3, 4) and (0, 1); the first layer gives (7, 0) and (1, 0), so H = 7; A = sqrt(2) 0.3
    with jax.numpy_rank_promotion("allow"):
        kernels = ([[1.0, -1.0], [1.0, -1.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.1, -0.3], [0.2, 0.0]])
        layers = {f"Dense_{i}": {"kernel": jnp.array(k), "bias": jnp.zeros(2)} for i, k in enumerate(kernels)}
        params = {"params": {"Perceptron_0": layers}}
        found = diagnostics.perceptron_constants(params, jnp.array([[3.0, 4.0], [0.0, 1.0]]))
        assert float(found.output_weight) == pytest.approx(0.3 * np.sqrt(2)) and found.n_hidden == 2
        assert float(found.activation_norm) == 7.0
        # the printed expressions in full, with a curvature
        curved = found._replace(output_weight=jnp.array(2.0), slope=3.0, curvature=0.5)
        assert float(diagnostics.gradient_bound(curved)) == 2.0 * 9.0 * 8.0
        assert float(diagnostics.hessian_bound(curved)) == 2.0 * (0.5 * 49.0 + 3.0) ** 2


# --- problems and updates -----------------------------------------------------------------------------


def test_zero_gradient_share_by_hand(x64):
    # two paths, three steps, two widths; a width below zero does nothing
    widths = jnp.array([[[1.0, -1.0], [-1.0, -2.0], [-3.0, 0.5]], [[-1.0, -1.0], [-1.0, -1.0], [2.0, 2.0]]])
    mean_loss = lambda values: -jnp.mean(values)  # noqa: E731
    problem = Problem(lambda w: w * widths, lambda y: jnp.sum(jax.nn.relu(y), axis=(1, 2)), mean_loss)
    share = functools.partial(diagnostics.zero_gradient_share, problem, jnp.array(1.0))
    assert float(share(n_row_axes=2)) == pytest.approx(3 / 6)
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
    monkeypatch.setattr(
        diagnostics_run, "diagnose", lambda config, *, n_seeds: asked.append(n_seeds) or of_three_seeds()
    )
    assert main([SMOKE, *given, "--out", str(tmp_path)]) == 0 and asked == [n_seeds]
    assert json.loads((tmp_path / "diagnostics.json").read_text()) == of_three_seeds()
    out = capsys.readouterr().out
    assert "median of 3 seeds" in out and f"figure: {tmp_path / 'diagnostics.png'}" in out


def test_script_refuses_in_one_line_and_overwrites_nothing(tmp_path, capsys):
    assert main(["--help"]) == 0 and "--seeds" in capsys.readouterr().out
    (tmp_path / "diagnostics.json").write_text("earlier")
    for arguments, said in (
        ([SMOKE, "--out", str(tmp_path)], "--overwrite"),
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
