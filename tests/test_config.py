"""Configuration: files, overrides, and every mistake a user can make in them before any work starts."""

import tomllib
from pathlib import Path

import pytest
import tomli_w

from dhlnn_jax.command_line import main
from dhlnn_jax.config import Config, load_config, make_config, option_names, parse_overrides
from dhlnn_jax.errors import UsageError

SMALL = """
methods = ["dhntb", "bsdh"]
[market]
volatility = 0.25
[training]
epochs = 3
n_paths = 64
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A valid file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


def without_none(values):
    return {k: without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}


# --- values that are allowed --------------------------------------------------------------------------


def test_defaults_survive_a_round_trip_through_toml():
    text = tomli_w.dumps(without_none(Config().model_dump(mode="json")))
    assert make_config(tomllib.loads(text)) == Config()


def test_file_fills_in_over_the_defaults(small):
    config = load_config(small)
    assert config.methods == ("dhntb", "bsdh")
    assert (config.market.volatility, config.training.epochs, config.training.n_paths) == (0.25, 3, 64)
    assert config.market.n_steps == 30 and config.cost.rate == 2e-3 and config.risk.risk_aversion == 50
    assert config.out == "results/small"


@pytest.mark.parametrize(
    "market, years",
    [
        ({}, 30 / 365),
        ({"n_steps": 10, "dt": 0.01}, 0.1),
        ({"kind": "history"}, 30 / 252),
        ({"kind": "order_book", "path": "x"}, 599 / (252 * 6.5 * 3600)),
        ({"kind": "paths_file", "path": "x", "dt": 0.5, "n_steps": 2}, 1.0),
    ],
)
def test_maturity_is_the_number_of_steps_times_their_length(market, years):
    assert make_config({"market": market}).maturity == pytest.approx(years, rel=1e-12)
    given = make_config({"market": market, "contract": {"maturity": 0.7}})
    assert given.maturity == 0.7


def test_every_option_says_what_it_is():
    names = option_names()
    assert {"seed", "methods", "market.volatility", "evaluation.market.volatility", "nested.n_inner"} <= {
        *names
    }
    assert "market" not in names and "evaluation.market" not in names
    assert [name for name, field in names.items() if not field.description] == []


# --- overrides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, section, key, wanted",
    [
        (["--seed", "3"], None, "seed", 3),
        (["--seed=3"], None, "seed", 3),
        (["--contract.strike", "1.2"], "contract", "strike", 1.2),
        (["--cost.rate=5e-3"], "cost", "rate", 5e-3),
        (["--market.drift", "-0.1"], "market", "drift", -0.1),
        (["--market.drift=-0.1"], "market", "drift", -0.1),
        (["--methods", "bsdh", "no_hedge"], None, "methods", ("bsdh", "no_hedge")),
        (["--methods", "bsdh,no_hedge"], None, "methods", ("bsdh", "no_hedge")),
        (["--methods=bsdh"], None, "methods", ("bsdh",)),
        (["--model.hidden_sizes", "16", "8"], "model", "hidden_sizes", (16, 8)),
        (["--model.hidden-sizes", "16,8"], "model", "hidden_sizes", (16, 8)),
        (["--evaluation.epochs", "1,3"], "evaluation", "epochs", (1, 3)),
        (["--evaluation.epochs="], "evaluation", "epochs", ()),
        (["--cost.liquidate", "true"], "cost", "liquidate", True),
        (["--cost.liquidate", "false"], "cost", "liquidate", False),
        (["--contract.maturity", "none"], "contract", "maturity", None),
        (["--contract.maturity", "0.25"], "contract", "maturity", 0.25),
        (["--market.tickers", "none"], "market", "tickers", None),
        (["--market.tickers", "IBM", "AAPL"], "market", "tickers", ("IBM", "AAPL")),
        (["--nested.linearization", "none"], "nested", "linearization", "none"),
        (["--nested.n-inner", "7"], "nested", "n_inner", 7),
        (["--out", "results/x"], None, "out", "results/x"),
        (["--seed", "1", "--seed", "2"], None, "seed", 2),
    ],
)
def test_override_replaces_one_value(small, arguments, section, key, wanted):
    before, config = load_config(small), load_config(small, arguments)
    assert getattr(config if section is None else getattr(config, section), key) == wanted
    # and nothing else
    flat = lambda c: c.model_dump(exclude={section: {key}} if section else {key})  # noqa: E731
    assert flat(config) == flat(before)


def test_override_reaches_two_levels_down(small):
    config = load_config(small, ["--evaluation.market.volatility", "0.4"])
    assert config.evaluation.market.volatility == 0.4 and config.market.volatility == 0.25


def test_overrides_stay_apart():
    given = parse_overrides(["--methods", "bsdh", "no_hedge", "--seed=4", "--cost.liquidate", "true"])
    assert given == {"methods": ["bsdh", "no_hedge"], "seed": "4", "cost.liquidate": "true"}


def test_overrides_of_a_table_are_pairs():
    pairs = parse_overrides(["--market.parameters", "kappa=1.5", "xi=-2", "--seed", "1"])
    assert pairs == {"market.parameters": {"kappa": "1.5", "xi": "-2"}, "seed": "1"}
    assert parse_overrides(["--market.parameters=kappa=1.5"]) == {"market.parameters": {"kappa": "1.5"}}


# --- mistakes -----------------------------------------------------------------------------------------

MAX = "standardised_max_log_moneyness"
# arguments after the file, and what the one line must say
BAD_ARGUMENTS = [
    # unknown names, with the nearest known one
    (["--training.epoch", "3"], ["unknown option --training.epoch", "did you mean --training.epochs?"]),
    (["--volatility", "3"], ["unknown option --volatility"]),
    (["--market.knd", "gbm"], ["unknown option --market.knd", "--market.kind"]),
    (["--market", "gbm"], ["unknown option --market"]),
    (["--methods", "dhlnm"], ["unknown method 'dhlnm'", "did you mean 'dhlnn'?", "whalley_wilmott"]),
    (["--market.kind", "gmb"], ["market.kind", "'gmb'", "did you mean 'gbm'?", "order_book"]),
    (["--contract.kind", "european"], ["contract.kind", "'european'", "european_call", "lookback_call"]),
    (["--risk.kind", "entropy"], ["risk.kind", "'entropy'", "did you mean 'entropic'?"]),
    (["--cost.kind", "fixed"], ["cost.kind", "'fixed'", "proportional"]),
    (["--model.features", "log_moneynes"], ["'log_moneynes'", "did you mean 'log_moneyness'?"]),
    (["--model.centre", "european"], ["model.centre", "'european'", "european_call"]),
    (["--training.optimizer", "adm"], ["training.optimizer", "'adm'", "did you mean 'adam'?"]),
    (["--nested.inner_update", "newton"], ["nested.inner_update", "'newton'", "frozen_direction"]),
    (["--market.noise", "halton"], ["market.noise", "'halton'", "sobol"]),
    (["--nested.preset", "printed"], ["nested.preset", "'printed'", "as_printed"]),
    # numbers out of range
    (["--cost.rate", "-0.001"], ["cost.rate", "-0.001", "greater than or equal to 0"]),
    (["--cost.rate", "1"], ["cost.rate", "'1'", "less than 1"]),
    (["--market.volatility", "-0.2"], ["market.volatility", "-0.2", "greater than or equal to 0"]),
    (["--evaluation.market.volatility", "-0.2"], ["evaluation.market.volatility", "-0.2"]),
    (["--contract.strike", "-1"], ["contract.strike", "-1", "greater than 0"]),
    (["--contract.strike", "0"], ["contract.strike", "'0'", "greater than 0"]),
    (["--market.spot0", "0"], ["market.spot0", "greater than 0"]),
    (["--contract.maturity", "-1"], ["contract.maturity", "-1", "greater than 0"]),
    (["--training.n_paths", "0"], ["training.n_paths", "'0'", "greater than"]),
    (["--evaluation.n_paths", "0"], ["evaluation.n_paths", "'0'", "greater than"]),
    (["--training.validation_paths", "0"], ["training.validation_paths", "'0'", "greater than"]),
    (["--training.epochs", "0"], ["training.epochs", "'0'", "greater than 0"]),
    (["--training.checkpoint_every", "0"], ["training.checkpoint_every", "greater than 0"]),
    (["--market.n_steps", "0"], ["market.n_steps", "greater than 0"]),
    (["--nested.n_inner", "0"], ["nested.n_inner", "greater than 0"]),
    (["--risk.risk_aversion", "0"], ["risk.risk_aversion", "greater than 0"]),
    (["--risk.tail_prob", "1"], ["risk.tail_prob", "less than 1"]),
    (["--training.learning_rate", "0"], ["training.learning_rate", "greater than 0"]),
    (["--seed", "-1"], ["seed", "-1", "greater than or equal to 0"]),
    (["--market.volatility", "nan"], ["market.volatility", "finite"]),
    (["--market.drift", "inf"], ["market.drift", "finite"]),
    # wrong types and counts
    (["--market.volatility", "high"], ["market.volatility = 'high'", "number"]),
    (["--training.epochs", "2.5"], ["training.epochs = '2.5'", "integer"]),
    (["--cost.liquidate", "perhaps"], ["cost.liquidate = 'perhaps'", "boolean"]),
    (["--model.hidden_sizes", "16", "wide"], ["model.hidden_sizes.1 = 'wide'", "integer"]),
    (["--model.hidden_sizes", "16", "0"], ["model.hidden_sizes", "[16, 0]", "positive"]),
    (["--seed", "1", "2"], ["--seed takes one value, got 2"]),
    (["--seed"], ["--seed takes one value, got 0"]),
    (["--market.parameters", "kappa"], ["--market.parameters takes name=number", "kappa"]),
    (["--market.parameters", "kappa=big"], ["market.parameters.kappa = 'big'", "number"]),
    (["--market.parameters", "kappa=1"], ["market.parameters of 'gbm' must be empty", "kappa"]),
    (["seed", "3"], ["expected --section.key value, got 'seed'"]),
    (["-s", "3"], ["expected --section.key value, got '-s'"]),
    (["--methods"], ["methods must name at least one of", "dhlnn"]),
    (["--methods", "bsdh", "bsdh"], ["methods names one twice"]),
    (["--model.hidden_sizes="], ["model.hidden_sizes must be one or more"]),
    (["--model.features="], ["model.features must name at least one"]),
    # values that do not go together
    (["--model.features", MAX], [MAX, "'european_call' does not depend on the maximum"]),
    (["--methods", "leland", "--contract.kind", "lookback_call"], ["method 'leland'", "european_put"]),
    (["--methods", "optimal", "--cost.kind", "squared_difference"], ["'optimal'", "'proportional'"]),
    (["--methods", "optimal", "--risk.kind", "expected_shortfall"], ["'optimal'", "'entropic'"]),
    (["--methods", "dhlnn_newton", "--risk.kind", "expected_shortfall"], ["'dhlnn_newton'", "quadratic"]),
    (["--matmul_precision", "bfloat16"], ["matmul_precision", "'float32'"]),
    (["--model.clamp", "loop"], ["model.clamp", "'parallel'"]),
    (["--newton.damping", "0"], ["newton.damping"]),
    (["--methods", "optimal", "--market.kind", "history"], ["'optimal'", "'gbm'", "'history'"]),
    (["--methods", "optimal", "--evaluation.optimum", "false"], ["'optimal'", "evaluation.optimum"]),
    (
        ["--methods", "whalley_wilmott", "--contract.kind", "lookback_call"],
        ["method 'whalley_wilmott' is a closed form for"],
    ),
    (["--evaluation.epochs", "4"], ["evaluation.epochs has 4", "training.epochs is 3"]),
    (["--evaluation.epochs", "0"], ["evaluation.epochs has 0"]),
    (["--market.noise", "antithetic", "--training.n_paths", "65"], ["even training.n_paths, got 65"]),
    (
        ["--market.noise", "antithetic", "--training.validation_paths", "65"],
        ["even training.validation_paths"],
    ),
    (["--cost.charge", "half_spread"], ["half_spread", "recorded prices"]),
    (["--market.target_volatility", "0.2"], ["market.target_volatility", "recorded prices only"]),
    (["--market.kind", "history", "--evaluation.market.drift", "0.1"], ["evaluation.market", "recorded"]),
    (["--overwrite", "--resume"], ["--overwrite", "--resume", "one of them"]),
    # data that is not there or does not do
    (["--market.kind", "order_book"], ["'order_book' needs market.path"]),
    (["--market.kind", "paths_file", "--market.dt", "0.01"], ["'paths_file' needs market.path"]),
    (["--market.kind", "paths_file", "--market.path", "x.npz"], ["'paths_file' needs market.dt"]),
    (["--market.kind", "history", "--market.path", "none.csv"], ["none.csv: no such file"]),
    (["--market.kind", "order_book", "--market.path", "nowhere"], ["nowhere: no such folder"]),
    (
        ["--market.kind", "paths_file", "--market.path", "none.npz", "--market.dt", "0.01"],
        ["none.npz: no such file"],
    ),
    (["--market.kind", "history", "--market.tickers", "AAPLE"], ["no ticker 'AAPLE'", "nearest is 'AAPL'"]),
    (["--market.kind", "history", "--market.n_steps", "5000"], ["too few windows"]),
    (
        ["--market.kind", "history", "--cost.charge", "half_spread"],
        ["half_spread", "history prices quote none"],
    ),
    # folders
    (["--resume"], ["nothing to resume in 'results/small'"]),
    (["--out", "small.toml"], ["'small.toml' is a file"]),
    (["--out", "small.toml/x"], ["small.toml/x", "cannot make the results folder"]),
]


@pytest.mark.parametrize(
    "arguments, said", BAD_ARGUMENTS, ids=lambda x: " ".join(x) if x[0][:1] == "-" else ""
)
def test_mistake_on_the_command_line_is_one_line_and_exit_code_2(small, capsys, arguments, said):
    assert_refused(small, capsys, arguments, said)


BAD_FILES = [
    ("epochs = 3\n", ["unknown key 'epochs'"]),
    ("[training]\nepoch = 3\n", ["unknown key 'training.epoch'", "did you mean 'training.epochs'?"]),
    ("[trainng]\nepochs = 3\n", ["unknown key 'trainng'", "did you mean 'training'?"]),
    (
        "[evaluation.market]\nvolatilty = 3\n",
        ["evaluation.market.volatilty", "'evaluation.market.volatility'"],
    ),
    ("[market]\nvolatility = -0.2\n", ["market.volatility = -0.2", "greater than or equal to 0"]),
    ("[cost]\nrate = -1e-3\n", ["cost.rate = -0.001"]),
    ("[contract]\nstrike = -1\n", ["contract.strike = -1"]),
    ("[training]\nepochs = 0\n", ["training.epochs = 0"]),
    ("[training]\nn_paths = 0\n", ["training.n_paths = 0"]),
    ("[market]\nvolatility = [0.1, 0.2]\n", ["market.volatility = [0.1, 0.2]", "number"]),
    ('[market]\nvolatility = "low"\n', ["market.volatility = 'low'", "number"]),
    ("methods = []\n", ["methods must name at least one of"]),
    ('methods = "bsdh"\n', ["methods = 'bsdh'", "tuple"]),
    ("market = 3\n", ["market = 3"]),
    ("[market\nvolatility = 0.2\n", ["not readable as TOML", "line 1"]),
    ("seed = \n", ["not readable as TOML"]),
    ("seed = 1\nseed = 2\n", ["not readable as TOML"]),
]


@pytest.mark.parametrize("text, said", BAD_FILES, ids=[text for text, _ in BAD_FILES])
def test_mistake_in_the_file_is_one_line_and_exit_code_2(small, capsys, text, said):
    small.write_text(text)
    assert_refused(small, capsys, [], [*said, "small.toml"])


def test_override_under_something_that_is_no_table_is_refused(small, capsys):
    small.write_text("market = 3\n")
    assert_refused(small, capsys, ["--market.volatility", "0.2"], ["'market' must be a table"])


def test_file_that_is_not_text_is_refused(small, capsys):
    small.write_bytes(b"\xff\xfe\x00")
    assert_refused(small, capsys, [], ["small.toml: not readable as TOML"])


def test_missing_file_is_refused(small, capsys):
    assert_refused("smal.toml", capsys, [], ["no config file 'smal.toml'", "configs/"])
    assert_refused(small.parent, capsys, [], ["not readable as TOML"])  # a folder
    assert_refused("--seed", capsys, ["3", "small.toml"], ["the config file comes first"])
    assert_refused("--overwrite", capsys, [], ["the config file comes first"])


def assert_refused(file, capsys, arguments, said):
    """Exit code 2, one line on stderr with all that must be said, nothing on stdout or on disk."""
    before = sorted(Path.cwd().rglob("*"))
    code = main("run", [str(file), *arguments])
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("run.py: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and "pydantic" not in err
    for words in said:
        assert words in err
    assert out == ""
    assert sorted(Path.cwd().rglob("*")) == before


def test_refusals_from_python_carry_the_same_line(small):
    with pytest.raises(UsageError, match=r"\Amine: market.volatility = -1.0: .*\Z"):
        make_config({"market": {"volatility": -1.0}}, source="mine")
    with pytest.raises(UsageError, match=r"small.toml with the command line: seed = '-1'"):
        load_config(small, ["--seed", "-1"])


def test_a_rate_that_falls_to_zero_is_measured_after_the_last_epoch(small):
    for overrides, which in (
        ([], "best"),
        (["--training.schedule", "cosine"], "last"),
        (["--training.schedule", "cosine", "--evaluation.parameters", "best"], "best"),
        (["--evaluation.parameters", "last"], "last"),
    ):
        assert load_config(small, overrides).measured_parameters == which
