"""Training one configured method: what is built from the configuration, and how training may fail."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import CONFIGS, METRICS, small_run

from dhlnn_jax.config import load_config, make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.fitting import build_hedger, build_policy, build_update, rows_options
from dhlnn_jax.hedge import DELTAS
from dhlnn_jax.hedger import Anchor
from dhlnn_jax.market import MarketPath
from dhlnn_jax.nested import Problem
from dhlnn_jax.settings import make_settings
from dhlnn_jax.source import settings_of
from dhlnn_jax.train import OBJECTIVES

PATH = MarketPath(jnp.array([1.0, 1.02, 0.97]))  # as a hedger sees it
SETTINGS = make_settings(n_steps=3, volatility=0.3)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def config(**sections):
    model = {"hidden_sizes": [3], "features": ["log_moneyness"]} | sections.pop("model", {})
    return make_config({"methods": ["no_hedge"], "model": model, **sections})


@pytest.mark.parametrize(
    "contract, model, centre, strike",
    [
        ("european_call", {}, "european_call", 1.0),
        ("european_put", {}, "european_put", 1.0),
        ("lookback_call", {}, "european_call", 1.0),  # as in the paper's lineage
        ("lookback_call", {"centre": "lookback_call"}, "lookback_call", 1.0),
        ("lookback_call", {"centre_strike": 1.05}, "european_call", 1.05),
    ],
)
def test_hedger_is_built_around_the_asked_delta(contract, model, centre, strike):
    hedger = build_hedger("dhntb", config(contract={"kind": contract}, model=model))
    features, (found, _) = jax.jit(hedger.inputs)(PATH, SETTINGS)
    wanted = jax.jit(DELTAS[centre])(PATH, SETTINGS._replace(strike=jnp.asarray(strike)))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(features[:, 0], np.log(PATH.spot), atol=1e-7)  # of the contract's strike


def test_form_of_the_plain_network_is_the_asked_one():
    raw, centre = jnp.array([2.0, -0.5]), jnp.array([0.3, 0.4])
    anchor = Anchor(centre, jnp.zeros(2))
    direct = build_hedger("dhmlp", config(model={"form": "direct"}))
    around = build_hedger("dhmlp", config())
    np.testing.assert_allclose(direct.position(raw, anchor), raw)
    np.testing.assert_allclose(around.position(raw, anchor), centre + jnp.tanh(raw))


def test_policies_of_rules_take_no_parameters():
    whole = MarketPath(jnp.append(PATH.spot, 0.9))
    policy = build_policy("bsdh", config(contract={"kind": "european_put"}), SETTINGS)
    held = policy.hedge_ratio(None, whole, SETTINGS)
    np.testing.assert_allclose(held, DELTAS["european_put"](PATH, SETTINGS), rtol=1e-6)


def steps_taken(name, n_epochs, **training):
    """How far a single parameter moves in each epoch on a risk of slope 1."""
    update = build_update(name, config(training=training, nested={"n_inner": 1, "inner_update": "sgd"}))
    problem = Problem(outputs=lambda w: w, value=lambda y: y, risk=lambda v: jnp.sum(v))
    w, moved = jnp.zeros(1), []
    state = update.init(w)
    for _ in range(n_epochs):
        after, state, info = update.apply(problem, w, state)
        moved.append(float(w[0] - after[0]))
        w = after
    assert int(info.n_gradients) == 1
    return moved


@pytest.mark.parametrize("name, optimizer", [("dhntb", "sgd"), ("dhlnn", "sgd"), ("dhntb", "adam")])
def test_learning_rate_warms_up_linearly_and_then_stays(name, optimizer):
    moved = steps_taken(name, 6, optimizer=optimizer, learning_rate=0.1, warmup=4, epochs=6)
    np.testing.assert_allclose(moved, [0.025, 0.05, 0.075, 0.1, 0.1, 0.1], rtol=1e-4)


def test_cosine_schedule_falls_after_the_warm_up():
    moved = steps_taken("dhntb", 6, optimizer="sgd", learning_rate=0.1, warmup=2, epochs=6, schedule="cosine")
    wanted = [0.05, 0.1, *(0.05 * (1 + np.cos(np.pi * i / 4)) for i in range(4))]
    np.testing.assert_allclose(moved, wanted, rtol=1e-5)


def test_rate_and_epochs_may_be_traced():
    problem = Problem(outputs=lambda w: w, value=lambda y: y, risk=lambda v: jnp.sum(v))
    given = config(training={"optimizer": "sgd", "warmup": 2, "epochs": 99, "schedule": "cosine"})

    @jax.jit
    def run(rate, epochs):
        update = build_update("dhntb", given, rate, epochs)
        w, state = jnp.zeros(1), update.init(jnp.zeros(1))
        for _ in range(6):
            w, state, _ = update.apply(problem, w, state)
        return w[0]

    wanted = [0.05, 0.1, *(0.05 * (1 + np.cos(np.pi * i / 4)) for i in range(4))]
    np.testing.assert_allclose(run(0.1, 6), -sum(wanted), rtol=1e-5)


def test_one_epoch_of_warm_up_is_none():
    assert (
        steps_taken("dhntb", 2, optimizer="sgd", learning_rate=0.1, warmup=1, epochs=2)
        == [pytest.approx(0.1)] * 2
    )


def test_nested_learning_rate_is_its_own_where_given():
    problem = Problem(outputs=lambda w: w, value=lambda y: y, risk=lambda v: jnp.sum(v))
    nested = {"n_inner": 3, "inner_update": "sgd", "learning_rate": 0.02}
    update = build_update("dhlnn", config(training={"learning_rate": 0.1}, nested=nested))
    after, _, info = update.apply(problem, jnp.zeros(1), update.init(jnp.zeros(1)))
    assert float(after[0]) == pytest.approx(-3 * 0.02) and int(info.n_gradients) == 3


def test_optimizers_are_those_of_optax(monkeypatch):
    asked = []
    monkeypatch.setattr(optax, "lion", lambda rate: asked.append(rate) or optax.sgd(rate))
    build_update("dhntb", config(training={"optimizer": "lion", "learning_rate": 0.3}))
    assert len(asked) == 1 and float(asked[0](0)) == pytest.approx(0.3)


TINY = (
    "--methods",
    "dhntb",
    "--training.epochs",
    "4",
    "--evaluation.epochs=",
    "--training.validation_every",
    "2",
)


def test_absurd_learning_rate_is_reported_with_method_and_epoch(base):
    # the band of parameters that are not numbers never trades: its risk is finite, that of no hedge
    with pytest.raises(
        FloatingPointError,
        match=r"\Adhntb: network outputs are not finite in epoch 2; [^\n]*= 1e\+30 [^\n]*\Z",
    ):
        small_run(base, "absurd", *TINY, "--training.learning_rate", "1e30")
    assert not (base / "absurd" / "metrics.json").exists()


def test_risk_that_is_not_finite_is_reported_with_method_and_epoch(base, monkeypatch):
    endless = lambda pnl, settings: jnp.inf + 0.0 * jnp.mean(jax.lax.stop_gradient(pnl))  # noqa: E731
    monkeypatch.setitem(OBJECTIVES, "entropic", endless)
    with pytest.raises(
        FloatingPointError, match="dhntb: validation risk is inf after epoch 2; .*checkpoint: none"
    ):
        small_run(base, "endless", *TINY)


def test_parameters_of_the_best_or_of_the_last_epoch_are_measured_as_asked(base):
    epochs = ("--training.epochs", "4", "--training.validation_every", "1", "--evaluation.epochs", "1,2,3,4")
    rows = {}
    for which in ("best", "last"):
        rate = ("--training.learning_rate", "0.2", "--evaluation.parameters", which)  # far too large
        results = small_run(base, which, "--methods", "dhntb", *epochs, *rate)
        rows[which] = results.metrics["methods"]["dhntb"]
    best = int(np.argmin(rows["best"]["training"]["validation_risk"]))
    assert rows["best"]["best_epoch"] == rows["last"]["best_epoch"] == best + 1 < 4
    for which, entry in (("best", best), ("last", -1)):
        row = rows[which]
        assert {metric: row["history"][entry][metric] for metric in METRICS} == row["final"]
    assert rows["best"]["final"] != rows["last"]["final"]


def test_shipped_configs_build_every_method_they_name():
    names = sorted(CONFIGS.glob("*.toml"))
    assert {file.stem for file in names} >= {"quickstart", "smoke"}
    for file in names:
        loaded = load_config(file, ["--market.path", "x"] if file.stem.startswith("order_book") else [])
        for name in loaded.methods:
            policy = build_policy(name, loaded, settings_of(loaded))
            assert callable(policy.hedge_ratio)


# --- rows in training -----------------------------------------------------------------------------------


def big(**training):
    sizes = {"hidden_sizes": [64] * 4, "features": ["log_moneyness", "time_to_maturity"]}
    return config(model=sizes, training={"n_paths": 10_000, "epochs": 50, **training})


def test_long_training_on_a_cpu_goes_by_pieces():
    assert rows_options("dhntb", big()) == {"chunk_size": 500, "by_pieces": True}
    assert not rows_options("dhntb", big(epochs=10))["by_pieces"]  # compiling would take longer
    assert rows_options("dhntb", big(epochs=10), compiled_free=True)["by_pieces"]
    assert rows_options("dhlnn", big(epochs=10))["by_pieces"]  # five gradients an epoch
    few = big(n_paths=2_000, epochs=400)  # beside the pieces
    assert not rows_options("dhntb", few)["by_pieces"]
    assert not rows_options("dhntb", few, compiled_free=True)["by_pieces"]
    shipped = load_config(CONFIGS / "quickstart.toml")
    assert [rows_options(name, shipped)["by_pieces"] for name in ("dhlnn", "dhntb")] == [True, False]


def test_pieces_are_taken_as_configured():
    assert not rows_options("dhntb", big(by_pieces="never"))["by_pieces"]
    assert rows_options("dhntb", big(by_pieces="always", epochs=1))["by_pieces"]
    assert not rows_options("dhlnn_newton", big(by_pieces="always"))["by_pieces"]  # it needs every row
    assert rows_options("dhntb", big(chunk_size=123))["chunk_size"] == 123


def test_accelerators_take_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rows_options("dhntb", big()) == {"chunk_size": None, "by_pieces": False}
    with pytest.raises(UsageError, match="'always' needs a training.chunk_size on an accelerator"):
        rows_options("dhntb", big(by_pieces="always"))
    assert rows_options("dhntb", big(by_pieces="always", chunk_size=5_000))["by_pieces"]
