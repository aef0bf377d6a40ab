"""What the scripts print where, and their exit codes. Mistakes in options are in test_config."""

import subprocess
import sys
from pathlib import Path

import pytest
from runs import CONFIGS, METHODS, programs_kept, smoke_run

from dhlnn_jax import experiment
from dhlnn_jax.command_line import main
from dhlnn_jax.config import option_names
from dhlnn_jax.methods import METHODS as REGISTRY

ROOT = CONFIGS.parent
SMOKE = str(CONFIGS / "smoke.toml")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], [SMOKE, "--help"], [SMOKE, "--seed", "3", "--help"]]
)
def test_help_lists_every_option_and_exits_0(capsys, arguments):
    assert main("run", arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    words = set(out.replace("│", " ").split())
    assert {f"--{name}" for name in option_names()} <= words
    assert {"--overwrite", "--resume", "CONFIG"} <= words
    assert ("(default: 10)" in out) == (SMOKE in arguments)  # n_steps of smoke.toml
    assert "per square root of a year" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize(
    "command, first", [("run", "usage: python scripts/run.py CONFIG"), ("report", "usage: ")]
)
def test_no_arguments_give_the_usage_on_stderr_and_exit_2(capsys, command, first):
    assert main(command, []) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(first) and "Traceback" not in err


def test_report_takes_no_options(capsys):
    assert main("report", ["results/run", "--foo"]) == 2
    err = capsys.readouterr().err
    assert err == "report.py: --foo: report.py takes results folders and no options; see --help\n"


def test_help_of_report_exits_0(capsys):
    assert main("report", ["--help"]) == 0
    assert "RESULTS" in capsys.readouterr().out


def test_help_of_a_missing_config_is_refused(capsys):
    assert main("run", ["nowhere.toml", "--help"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "run.py: no config file 'nowhere.toml'; shipped ones are in configs/\n"


def test_run_prints_results_on_stdout_and_notes_on_stderr(base, tmp_path, capsys):
    smoke_run(base)  # compiled what is needed
    arguments = ["--out", str(tmp_path / "run"), "--methods", "bsdh,whalley-wilmott".replace("-", "_")]
    arguments += ["--risk.risk-aversion", "1"]
    with programs_kept(base / "programs"):
        assert main("run", [SMOKE, *arguments]) == 0
        out, err = capsys.readouterr()
        for name in ("bsdh", "whalley_wilmott", "no_hedge"):
            assert REGISTRY[name].label in out
        assert f"results: {tmp_path / 'run'}" in out and "note:" not in out
        assert err and all(line.startswith("note: ") for line in err.splitlines())
        assert (tmp_path / "run" / "pnl_histogram.png").exists()

        before = (tmp_path / "run" / "metrics.json").read_bytes()
        assert main("run", [SMOKE, *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "--overwrite" in err and "--resume" in err
        assert main("run", [SMOKE, *arguments, "--seed", "8", "--resume"]) == 2
        assert "another configuration" in capsys.readouterr().err
        assert (tmp_path / "run" / "metrics.json").read_bytes() == before
        assert main("run", ["--overwrite", SMOKE, *arguments, "--seed", "8"]) == 0
        assert (tmp_path / "run" / "metrics.json").read_bytes() != before


def test_folder_that_no_run_wrote_survives_overwrite(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    assert main("run", [SMOKE, "--out", str(tmp_path), "--overwrite"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "not overwritten" in err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    "raised, code, said",
    [
        (
            FloatingPointError("dhntb: validation risk is nan after epoch 5"),
            1,
            "dhntb: validation risk is nan after epoch 5",
        ),
        (KeyboardInterrupt(), 130, "interrupted; --resume goes on from the last checkpoint"),
    ],
)
def test_failed_and_interrupted_training_is_one_line(tmp_path, capsys, monkeypatch, raised, code, said):
    def fail(*arguments, **how):
        raise raised

    monkeypatch.setattr(experiment, "run", fail)
    assert main("run", [SMOKE, "--out", str(tmp_path / "x")]) == code
    assert capsys.readouterr() == ("", f"run.py: {said}\n")


def test_mistakes_in_the_program_are_not_hidden(tmp_path, monkeypatch):
    def fail(*arguments, **how):
        raise ZeroDivisionError

    monkeypatch.setattr(experiment, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main("run", [SMOKE, "--out", str(tmp_path / "x")])


def test_script_refuses_in_one_line_without_a_trace(tmp_path):
    (tmp_path / "mine.toml").write_text("[market]\nvolatilty = 0.2\n")
    script = Path(ROOT / "scripts" / "run.py")
    done = subprocess.run(
        [sys.executable, str(script), "mine.toml"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "run.py: mine.toml: unknown key 'market.volatilty'; did you mean 'market.volatility'? (see --help)\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
    done = subprocess.run(
        [sys.executable, str(script.with_name("report.py")), "nowhere"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("report.py: 'nowhere' holds no finished run") and done.stderr.count("\n") == 1
    )


def test_methods_of_the_smoke_run_are_all_there_are():
    assert set(METHODS) == set(REGISTRY)
