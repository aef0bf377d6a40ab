import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import CONFIGS, TRAINED

from dhlnn_jax import experiment, traces, trainer
from dhlnn_jax.config import make_config
from dhlnn_jax.fitting import build_hedger, build_policy, made_from, make_contract, shared_made_from
from dhlnn_jax.fleet import TRACED_OPTIONS, fleet_evaluator, keys_of, seeds_of, stacked
from dhlnn_jax.measured import Row
from dhlnn_jax.methods import METHODS
from dhlnn_jax.optimal import OptimalHedge, optimal_policies
from dhlnn_jax.source import make_source

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="kept for a CPU only")


class Two(NamedTuple):
    sum: jax.Array
    product: jax.Array


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("flatbuffers")
    traces.keep_in(tmp_path / "traces")  # conftest ends it
    return tmp_path / "traces"


@pytest.fixture
def count():
    """A function and how often it has been traced."""

    def both(x, y):
        both.traced += 1
        return Two(x["a"] + y, x["a"] * y)

    both.traced = 0
    return both


ARGUMENTS = {"a": jnp.arange(3.0)}, np.float32(2.0)


def compiled(fn, arguments=ARGUMENTS, made_from="both", **options):
    return traces.compiled(fn, arguments, made_from=made_from, returns=Two(0, 0), **options)


def test_kept_program_is_not_traced_again_and_gives_the_same(folder, count):
    first = compiled(count)(*ARGUMENTS)
    again = compiled(count)({"a": jnp.arange(3.0) + 1.0}, np.float32(5.0))
    assert count.traced == 1
    assert isinstance(first, Two) and isinstance(again, Two)
    np.testing.assert_array_equal(first.product, [0.0, 2.0, 4.0])
    np.testing.assert_array_equal(again.sum, [6.0, 7.0, 8.0])
    np.testing.assert_array_equal(again.product, [5.0, 10.0, 15.0])
    (file,) = folder.iterdir()
    assert file.suffix == ".stablehlo"


def test_structure_need_not_be_said_of_dicts(folder):
    for _ in range(2):
        program = traces.compiled(lambda x: {"twice": 2 * x}, (np.float32(3.0),), made_from="twice")
        assert float(program(np.float32(4.0))["twice"]) == 8.0
    assert len(list(folder.iterdir())) == 1


def test_jit_has_a_program_for_each_type_of_arguments(folder, count):
    both = traces.jit(count, made_from="both", returns=Two(0, 0))
    for _ in range(2):
        np.testing.assert_array_equal(both(*ARGUMENTS).sum, [2.0, 3.0, 4.0])
        assert both({"a": np.arange(3)}, np.int32(2)).sum.dtype.kind == "i"
    assert count.traced == 2
    np.testing.assert_array_equal(
        traces.jit(count, made_from="both", returns=Two(0, 0))(*ARGUMENTS).sum, [2, 3, 4]
    )
    assert count.traced == 2


def test_jit_has_a_program_for_each_configuration(count):
    both = traces.jit(count, made_from=None, returns=Two(0, 0))
    for _ in range(2):
        both(*ARGUMENTS)
        with jax.default_matmul_precision("float32"):
            both(*ARGUMENTS)
    assert count.traced == 2


def test_nothing_is_kept_unless_asked_for(tmp_path, folder, count):
    compiled(count, made_from=None)(*ARGUMENTS)
    traces.keep_in(None)
    compiled(count)(*ARGUMENTS)
    assert count.traced == 2 and not folder.exists()


@pytest.mark.parametrize(
    "other",
    [
        {"made_from": "another"},
        {"arguments": ({"a": jnp.arange(4.0)}, np.float32(2.0))},
        {"arguments": ({"a": jnp.arange(3)}, np.float32(2.0))},
        {"arguments": ({"a": jnp.arange(3.0)}, jnp.asarray(2.0))},  # weakly typed
    ],
)
def test_another_program_is_traced_anew(folder, count, other):
    compiled(count)(*ARGUMENTS)
    compiled(count, **other)(*other.get("arguments", ARGUMENTS))
    assert count.traced == 2 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "configure",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.default_matmul_precision("float32"),
        lambda: jax.numpy_dtype_promotion("strict"),
    ],
)
def test_another_configuration_of_jax_is_traced_anew(folder, count, configure):
    arguments = {"a": np.arange(3, dtype=np.float32)}, np.float32(2.0)
    compiled(count, arguments)(*arguments)
    with configure():
        compiled(count, arguments)(*arguments)
    assert count.traced == 2


def test_other_versions_are_traced_anew(folder, count, monkeypatch):
    compiled(count)(*ARGUMENTS)
    monkeypatch.setattr(traces, "_versions", lambda: ("a newer jax",))
    compiled(count)(*ARGUMENTS)
    assert count.traced == 2


def test_a_module_of_the_user_that_changes_is_seen(tmp_path, monkeypatch):
    module = tmp_path / "of_the_user.py"
    module.write_text("value = 1\n")
    long_ago = traces._began - 1000  # before this process, however long its other tests took
    os.utime(module, (long_ago, long_ago))
    without = traces._sources()
    monkeypatch.syspath_prepend(tmp_path)
    __import__("of_the_user")
    loaded = traces._sources()
    traces._digest.cache_clear()  # as in another process
    module.write_text("value = 2\n")
    os.utime(module, (long_ago, long_ago))
    changed = traces._sources()
    sys.modules.pop("of_the_user")
    assert len({without, loaded, changed}) == 3 and None not in (without, loaded, changed)
    assert traces._sources() == without


def test_source_that_changes_while_the_process_runs_keeps_nothing(folder, count, monkeypatch):
    monkeypatch.setattr(traces, "_began", 0.0)  # as if every file had been written since
    compiled(count)(*ARGUMENTS)
    compiled(count)(*ARGUMENTS)
    assert count.traced == 2 and not folder.exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])]
)
def test_damaged_file_is_traced_anew_and_repaired(folder, count, damage):
    compiled(count)(*ARGUMENTS)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    assert damage(whole) != whole
    file.write_bytes(damage(whole))
    np.testing.assert_array_equal(compiled(count)(*ARGUMENTS).sum, [2.0, 3.0, 4.0])
    assert count.traced == 2
    compiled(count)(*ARGUMENTS)
    assert count.traced == 2


def test_cache_that_cannot_be_written_harms_nothing(folder, count):
    folder.write_text("a file in the place of the folder")
    np.testing.assert_array_equal(compiled(count)(*ARGUMENTS).sum, [2.0, 3.0, 4.0])


def test_keys_are_written_too(folder):
    keys = jax.random.split(jax.random.key(0), 3)
    for _ in range(2):
        draw = traces.compiled(lambda k: [jax.random.normal(k[1])], (keys,), made_from="draws")
        assert float(draw(keys)[0]) == float(jax.random.normal(keys[1]))
    assert len(list(folder.iterdir())) == 1


def test_what_cannot_be_written_is_compiled_all_the_same(folder):
    def fn(x):
        return [jax.pure_callback(np.sin, x, x)]  # on the host, by this process

    assert float(traces.compiled(fn, (np.float32(1.0),), made_from="sine")(np.float32(1.0))[0]) == np.sin(
        np.float32(1.0)
    )
    assert not folder.exists()


def test_mistakes_in_a_program_are_raised(folder, count):
    arguments = {"a": jnp.ones(3)}, np.ones(2, np.float32)
    with pytest.raises(TypeError, match="incompatible shapes"):
        compiled(count, arguments)


def test_only_the_first_argument_is_given_away(folder, count):
    for _ in range(2):  # traced and kept
        first, second = {"a": jnp.arange(3.0)}, jnp.arange(3.0)
        compiled(count, (first, second), made_from="donated", donate_first=True)(first, second)
        assert first["a"].is_deleted() and not second.is_deleted()
    assert count.traced == 1


# --- training programs --------------------------------------------------------------------------------


def small(**changes):
    values = {
        "market": {"kind": "gbm", "volatility": 0.2, "n_steps": 4},
        "model": {"hidden_sizes": [4]},
        "training": {"epochs": 2, "n_paths": 8, "validation_paths": 8},
        "evaluation": {"n_paths": 16},
    }
    for option, value in changes.items():
        section, _, name = option.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return make_config(values, source="test")


def recorded(monkeypatch, work):
    """Programs that `work()` would keep, as the compiler gets them, and what each is said to be made from."""
    seen = []

    def record(fn, arguments, *, made_from, **options):
        seen.append((jax.jit(fn).lower(*arguments).as_text(), made_from))
        return jax.jit(fn)

    monkeypatch.setattr(traces, "compiled", record)
    trainer._initial_params.cache_clear()
    work()
    trainer._initial_params.cache_clear()
    assert all(told is not None for _, told in seen)
    return seen


OTHER_NUMBERS = {option.replace(".", "__"): 0.123 for option in TRACED_OPTIONS}


@pytest.mark.parametrize("name", TRAINED)
def test_numbers_that_a_kept_training_program_is_not_told_are_not_in_it(name, monkeypatch):
    """The danger of keeping: a number that is constant in the program, and not in what it goes by."""

    def of(config):
        source = make_source(config, keys_of(config.seed).test)
        return recorded(
            monkeypatch,
            lambda: trainer._Trainer(
                name, seeds_of(config, source), trainer.Checkpoints(None), lambda i, m: {}
            ),
        )

    others = {"seed": 7, "out": "elsewhere", "methods": ("dhntb", "dhmlp"), "evaluation__n_paths": 24}
    assert of(small()) == of(small(**others, **OTHER_NUMBERS)) != []


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_a_kept_evaluation_is_not_told_are_not_in_it(name, monkeypatch):
    def of(config):
        source = make_source(config, keys_of(0).test)
        params, contract = None, make_contract(config)
        if name == "optimal":
            edges = np.zeros((4, 5)), np.ones((4, 5))
            policy, params = optimal_policies(
                [OptimalHedge(0.0, 0.0, np.arange(1.0, 6.0), *edges, (0, 1), ())]
            )
        else:
            policy = build_policy(name, config, source.market_settings)
        if METHODS[name].trained:
            params = jax.vmap(build_hedger(name, config).init)(jax.random.split(jax.random.key(0), 1))
        fleet_evaluator.cache_clear()
        evaluate = fleet_evaluator(
            policy, contract, made_from=shared_made_from("evaluating", name, config, source)
        )
        return recorded(monkeypatch, lambda: evaluate(params, [source.test], stacked([source.test_settings])))

    assert of(small()) == of(small(seed=7, **OTHER_NUMBERS)) != []
    fleet_evaluator.cache_clear()


def test_numbers_that_the_kept_figures_are_not_told_are_not_in_them(monkeypatch, tmp_path):
    methods = ("dhlnn", "dhntb", "dhmlp", "whalley_wilmott", "bsdh", "no_hedge")
    nothing: Any = None

    def of(config):
        source = make_source(config, keys_of(0).test)
        key = jax.random.key(0)
        rows = {}
        for name in methods:
            params = build_hedger(name, config).init(key) if METHODS[name].trained else None
            policy = build_policy(name, config, source.market_settings)
            rows[name] = Row((), nothing, nothing, policy, params, None)
        return recorded(monkeypatch, lambda: experiment._shown(rows, config, source))

    assert of(small(methods=methods)) == of(small(methods=methods, seed=7, **OTHER_NUMBERS)) != []


@pytest.mark.parametrize(
    "change",
    [
        {"nested__n_inner": 9},
        {"nested__inner_update": "sgd"},
        {"newton__damping": 0.5},
        {"training__epochs": 3},
        {"training__optimizer": "sgd"},
        {"model__hidden_sizes": [5]},
        {"model__features": ["log_moneyness"]},
        {"market__noise": "antithetic"},
        {"contract__kind": "european_put"},
        {"cost__liquidate": True},
        {"risk__kind": "expected_shortfall"},
        {"rules__half_width": 0.2},
    ],
)
def test_choices_that_make_another_program_are_told(change):
    config, changed = small(), small(**change)
    source = make_source(config, keys_of(0).test)
    assert made_from("dhlnn", config, source) != made_from("dhlnn", changed, source)
    assert made_from("dhlnn", config, source) != made_from("dhntb", config, source)


def test_paths_from_elsewhere_keep_no_program():
    config = make_config({"market": {"kind": "history", "n_steps": 5}}, source="test")
    assert made_from("dhlnn", config, make_source(config, keys_of(0).test)) is None


def test_second_run_traces_no_training_step_and_gives_the_same(tmp_path):
    pytest.importorskip("flatbuffers")
    code = (
        "import sys, jax.monitoring; from dhlnn_jax import command_line, trainer\n"
        "step = trainer.make_train_step\n"
        "def counted(*a, **k): print('TRACED', file=sys.stderr); return step(*a, **k)\n"
        "trainer.make_train_step = counted\n"
        "sys.exit(command_line.main('run', sys.argv[1:]))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    traced = []
    for name in ("first", "second"):
        out = ["--out", str(tmp_path / name), "--methods", "dhlnn", "dhmlp", "no_hedge"]
        done = subprocess.run(
            [sys.executable, "-c", code, str(CONFIGS / "smoke.toml"), *out],
            env=environment, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        traced.append(done.stderr.count("TRACED"))
    assert traced == [2, 0]
    # Two training steps and initial parameters, the figures, and evaluations: of each network on as many
    # paths as validation and tests have, of the optimum and of no hedge.
    assert len(list((tmp_path / "cache" / "dhlnn_jax" / "traces").iterdir())) == 4 + 1 + 4 + 2
    for name in ("sample_path", "bands", "pnl"):
        one, two = (np.load(tmp_path / run / f"{name}.npz") for run in ("first", "second"))
        assert set(one) == set(two)
        for array in one:
            np.testing.assert_array_equal(one[array], two[array])
