"""Tables, and the command that redraws everything, from a results folder alone."""

import shutil
import struct

import pytest
from runs import METHODS, PICTURES, smoke_run
from test_experiment import history_run

from dhlnn_jax import report
from dhlnn_jax.command_line import main
from dhlnn_jax.methods import METHODS as REGISTRY
from dhlnn_jax.results import read_results


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def moved(base, tmp_path):
    """A run's folder, copied elsewhere without its figures, the original gone."""
    original = tmp_path / "original"
    shutil.copytree(smoke_run(base).folder, original)
    config = (original / "config.toml").read_text().replace(str(base / "smoke"), str(original))
    assert str(original) in config
    (original / "config.toml").write_text(config)
    copy = tmp_path / "far" / "copy"
    shutil.copytree(original, copy, ignore=shutil.ignore_patterns("*.png", "params", "checkpoints"))
    shutil.rmtree(original)
    return copy


def size_of(png):
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_report_redraws_everything_from_a_copied_folder_alone(moved, capsys):
    assert main("report", [str(moved)]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # this run has no notes
    for name in METHODS:
        assert REGISTRY[name].label in out
    assert "exact" in out and "±" in out and "(paired)" in out
    assert "on which a row that is exact above is simulated too" in " ".join(out.split())
    assert f"results: {moved}" in out
    for name in PICTURES:
        assert f"figure: {moved / name}" in out
        width, height = size_of(moved / name)
        assert 800 < width < 4000 and 500 < height < 3000
        assert (moved / name).stat().st_size > 20_000
    assert sorted(path.name for path in moved.parent.parent.iterdir()) == ["far"]


def test_table_shows_the_numbers_of_metrics_json(moved, capsys):
    results = read_results(moved)
    report.print_report(results)
    out = capsys.readouterr().out
    for row in results.metrics["methods"].values():
        for name, number in row["final"].items():
            assert f"{number['value']:.6f}" in out or name == "round_trip_mean"  # which is for the notes
    values = {
        n: r["final"]["entropic_risk_measure"]["value"]
        for n, r in results.metrics["methods"].items()
        if n != "optimal"
    }
    best = min(values, key=values.get)
    for row in results.metrics["methods"].values():
        assert f"{row['regret']['value']:.6f} ±" in out and f"{row['regret']['percent']:.2f} ±" in out
    assert f"exact optimum of the entropic risk: {results.metrics['optimum']['value']:.7f}" in out
    # a title is broken where its table is narrower
    assert f"entropic risk less that of {REGISTRY[best].label} (paired)" in " ".join(out.split())
    for pair, numbers in results.metrics["paired"].items():
        if best in pair.split("-") and "optimal" not in pair:
            sign = -1 if pair.startswith(f"{best}-") else 1
            assert f"{sign * numbers['entropic_risk_measure']['value']:+.6f} ±" in out


def test_several_folders_are_reported_in_turn(moved, capsys):
    assert main("report", [str(moved), str(moved)]) == 0
    assert capsys.readouterr().out.count("results: ") == 2


@pytest.mark.parametrize("what", ["nothing", "empty", "unfinished"])
def test_folder_that_is_no_results_folder_is_one_line_and_exit_code_2(moved, tmp_path, capsys, what):
    folder = tmp_path / "other"
    if what != "nothing":
        folder.mkdir()
    if what == "unfinished":
        shutil.copy(moved / "config.toml", folder)
    assert main("report", [str(moved), str(folder)]) == 2  # before anything is printed
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("report.py: ")
    assert "holds no finished run" in err and str(folder) in err


def test_tail_carried_by_few_paths_is_not_shown_as_a_number(base, capsys):
    results = history_run(base)
    report.print_report(results)
    out, err = capsys.readouterr()
    for row in results.metrics["methods"].values():
        assert f"tail not estimable (ESS {row['effective_sample_size']:.0f})" in out
        assert f"{row['final']['entropic_risk_measure']['value']:.6f}" not in out
        assert f"{row['final']['expected_shortfall']['value']:.6f}" in out  # this one is an average
    assert "expected shortfall ◂" in out and "time groups" in out
    notes = err.splitlines()
    assert notes == [f"note: {note}" for note in results.meta["notes"]] and len(notes) >= 3


@pytest.mark.parametrize(
    "estimator, ess, hidden",
    [
        ("simulation", 999.0, True),
        ("simulation", 1000.0, False),
        ("simulation", None, True),
        ("quadrature", None, False),
    ],
)
def test_threshold_of_the_effective_sample_size(estimator, ess, hidden):
    assert report.tail_not_estimable({"estimator": estimator, "effective_sample_size": ess}) == hidden
