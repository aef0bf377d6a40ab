"""Which form of the band's recursion a hedger takes: measured where nothing is known, once, and kept."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from dhlnn_jax import clamp_choice, fitting
from dhlnn_jax.clamp_choice import fastest_clamp, make_clamp_timer, measured_clamp
from dhlnn_jax.config import Config
from dhlnn_jax.hedge import CLAMPS


@pytest.fixture(autouse=True)
def nothing_chosen():
    fastest_clamp.cache_clear()
    yield
    fastest_clamp.cache_clear()
    fitting._hedger.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """What was timed; parallel takes 1 ms, scan a tenth of a millisecond a step."""
    timed = []

    def make(kind, n_steps):
        timed.append((kind, n_steps))
        return lambda: 1e-3 if kind == "parallel" else 1e-4 * n_steps

    monkeypatch.setattr(clamp_choice, "make_clamp_timer", make)
    return timed


def test_faster_form_is_chosen_by_horizon_and_kept(asked, tmp_path, capsys):
    file = tmp_path / "new" / "clamp.json"
    assert measured_clamp(5, file) == "scan" and measured_clamp(30, file) == "parallel"
    assert sorted(asked) == [("parallel", 5), ("parallel", 30), ("scan", 5), ("scan", 30)]
    told = capsys.readouterr().err
    assert told.count("\n") == 2 and f"30 steps ... scan 3 ms, parallel 1 ms; kept in {file}" in told
    asked.clear()
    assert measured_clamp(5, file) == "scan" and measured_clamp(30, file) == "parallel"
    assert not asked and capsys.readouterr().err == ""


def test_another_device_is_measured_anew(asked, tmp_path, monkeypatch):
    measured_clamp(30, tmp_path / "clamp.json")
    monkeypatch.setattr(clamp_choice, "device_name", lambda: "another")
    measured_clamp(30, tmp_path / "clamp.json")
    assert len(asked) == 4
    assert {name.split(",")[0] for name in json.loads((tmp_path / "clamp.json").read_text())} == {
        "another",
        jax.devices()[0].device_kind,
    }


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"x": 1}', '{"x": {"scan": 1.0}}', "null"])
def test_damaged_file_is_measured_anew(asked, tmp_path, damaged):
    file = tmp_path / "clamp.json"
    file.write_text(damaged)
    assert measured_clamp(30, file) == "parallel" and len(asked) == 2
    assert [set(times) for times in json.loads(file.read_text()).values()] == [set(CLAMPS)]


def test_folder_that_cannot_be_written_changes_nothing(asked, tmp_path):
    (tmp_path / "file").write_text("")
    assert measured_clamp(30, tmp_path / "file" / "clamp.json") == "parallel"


def test_cpu_takes_the_scan_unmeasured(asked):
    assert fastest_clamp(10_000) == "scan" and not asked


TWO = """
import sys
from dhlnn_jax import clamp_choice, runtime
runtime.prepare(devices=1)
runtime.join(sys.argv[1], n_processes=2, process=int(sys.argv[2]))
import jax
measured = []
clamp_choice.measured_clamp = lambda n_steps, file: measured.append(n_steps) or "parallel"
jax.default_backend = lambda: "gpu"
print(clamp_choice.fastest_clamp(30), measured)
"""


def test_several_processes_take_what_the_first_has_measured():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, coordinator, str(process)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(2)
    ]  # fmt: skip
    printed = [job.communicate(timeout=300)[0].split("\n")[-2] for job in jobs]
    assert printed == [
        "parallel [30]",
        "parallel []",
    ]  # "scan" is what a process without an answer would take


def test_hedgers_elsewhere_take_what_is_faster_unless_told(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = Config()
    assert config.model.clamp == "auto" and fitting.clamp_of(config) == "parallel"
    chosen = fitting.build_hedger("dhntb", config)
    held = {}
    for kind in CLAMPS:
        told = config.model_copy(update={"model": config.model.model_copy(update={"clamp": kind})})
        assert fitting.clamp_of(told) == kind
        held[kind] = fitting.build_hedger("dhntb", told)
    assert chosen is held["parallel"] and chosen is not held["scan"]
    assert len(asked) == 2 and (tmp_path / "dhlnn_jax" / "clamp.json").exists()


@pytest.mark.parametrize("kind", CLAMPS)
def test_timer_measures_every_call(kind, monkeypatch):
    monkeypatch.setattr(clamp_choice, "DECISIONS", 60)
    seconds = make_clamp_timer(kind, 20)
    assert 0 < seconds() < 60 and seconds() > 0
