"""Exit codes, messages, help and the config file first, on scripts that do nothing else."""

import pytest

from dhlnn_jax.errors import UsageError
from dhlnn_jax.script import Parser, config_first, config_line, exit_code, show_help


def parser():
    made = Parser(prog="fake.py")
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--study", choices=("a", "b"))
    return made


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (UsageError("--n must be above 0, got 0"), 2, "--n must be above 0, got 0"),
        (FileNotFoundError(2, "No such file or directory", "here"), 2, "No such file or directory: here"),
        (OSError("disk on fire"), 2, "disk on fire"),
        (FloatingPointError("risk is nan after epoch 5"), 1, "risk is nan after epoch 5"),
        (KeyboardInterrupt(), 130, "interrupted, nothing was written"),
    ],
)
def test_what_ends_a_script_is_one_line_and_a_code(raised, code, said, capsys):
    def body():
        raise raised

    assert exit_code("fake.py", body) == code
    assert capsys.readouterr() == ("", f"fake.py: {said}\n")


def test_script_says_what_an_interruption_left(capsys):
    def body():
        raise KeyboardInterrupt

    assert exit_code("fake.py", body, interrupted="; half is in half.json") == 130
    assert capsys.readouterr().err == "fake.py: interrupted; half is in half.json\n"


def test_script_that_ends_well_adds_nothing_to_what_it_prints(capsys):
    assert exit_code("fake.py", lambda: print("results")) == 0
    assert capsys.readouterr() == ("results\n", "")


def test_mistakes_in_the_program_are_not_hidden():
    with pytest.raises(ValueError, match="not the user's"):
        exit_code("fake.py", lambda: int("not the user's"))


@pytest.mark.parametrize("arguments", [["--help"], ["a.toml", "-h"]])
def test_help_is_on_stdout_and_no_mistake(arguments, capsys):
    assert exit_code("fake.py", lambda: show_help(lambda: "usage\n", arguments)) == 0
    assert capsys.readouterr() == ("usage\n", "")
    assert exit_code("fake.py", lambda: parser().parse_args(["-h"])) == 0  # argparse's own
    assert capsys.readouterr().out.startswith("usage: fake.py")


def test_nothing_given_is_a_mistake_with_help_on_stderr(capsys):
    assert exit_code("fake.py", lambda: config_line(parser(), [])) == 2
    assert capsys.readouterr() == ("", parser().format_help())


def test_config_options_and_overrides_are_told_apart():
    line = ["a.toml", "--seed", "7", "--seeds", "3", "--model.hidden_sizes", "8", "4"]
    path, options, overrides = config_line(parser(), line)
    assert config_first(path, "fake.py CONFIG") == "a.toml" and options.seeds == 3
    assert overrides == ["--seed", "7", "--model.hidden_sizes", "8", "4"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--seeds", "3"], "the config file comes first: fake.py CONFIG; see --help"),
        ([""], "the config file comes first: fake.py CONFIG; see --help"),
        (["a.toml", "--seeds", "0"], "--seeds must be from 1 to 100, got 0"),
        (["a.toml", "--seeds", "two"], "argument --seeds: invalid int value: 'two'; see --help"),
        (["a.toml", "--seeds"], "argument --seeds: expected one argument; see --help"),
    ],
)
def test_mistakes_in_a_config_line_are_one_line(arguments, said, capsys):
    assert (
        exit_code("fake.py", lambda: config_first(config_line(parser(), arguments)[0], "fake.py CONFIG")) == 2
    )
    assert capsys.readouterr() == ("", f"fake.py: {said}\n")
