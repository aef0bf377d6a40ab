"""scripts/benchmark.py: its statistics, its file, what it refuses, and a tiny run of the step."""

import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import benchmark, clamp_choice, processes, race, step_time, timing, workload
from dhlnn_jax.errors import UsageError
from dhlnn_jax.fitting import dense_operations

SCRIPTS = Path(__file__).parents[1] / "scripts"
TINY = ("--n-paths", "16", "--trained", "1", "--steps", "1", "--repeats", "1", "--chunk", "0")


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """One narrow layer, few products; and the option that main() sets is taken back."""

    def small(n_paths, **options):
        values = full(n_paths, **options).model_dump(mode="json")
        values["model"]["hidden_sizes"] = [4]  # whatever was asked for
        values["market"]["n_steps"] = 2
        return workload.make_config(values)

    full = workload.step_config
    monkeypatch.setattr(step_time, "step_config", small)
    monkeypatch.setattr(step_time, "make_product_rate", lambda: timing.make_product_rate(5))
    monkeypatch.setattr(benchmark.runtime, "prepare", lambda **_: None)
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_spread_is_median_and_range():
    assert timing.spread([3.0, 1.0, 2.0, 10.0], "s") == {
        "median": 2.5,
        "min": 1.0,
        "max": 10.0,
        "unit": "s",
        "repeats": 4,
    }
    never = timing.spread([1.0, float("inf"), float("inf")], "s")
    assert (never["median"], never["min"], never["max"]) == (None, 1.0, None)


def test_ratio_pairs_what_was_measured_side_by_side():
    assert timing.ratio([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == 2.0


def test_interleaved_takes_turns_and_leaves_out_the_first_round():
    calls = []

    def run(name):
        calls.append(name)
        return float(len(calls))

    samples = timing.interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert samples == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_compile_clock_counts_programs_and_nested_seconds_once(monkeypatch):
    clock = timing.CompileClock()
    for now, event, duration in ((5.0, "jaxpr_trace", 1.0), (6.0, "jaxpr_trace", 4.0), (9.0, "backend", 2.0)):
        monkeypatch.setattr(timing.time, "perf_counter", lambda now=now: now)
        clock.note(f"/jax/core/compile/{event}_compile_duration", duration)
    clock.note("/jax/something_else", 100.0)
    assert (clock.seconds, clock.xla_seconds, clock.programs) == (4.0 + 2.0, 2.0, 1)


def test_compile_clock_hears_jax():
    x = jnp.arange(3.0)
    with timing.compile_clock() as clock:
        jax.jit(lambda x: x * 1.25)(x)
    counted = clock.programs
    jax.jit(lambda x: x * 1.5)(x)
    assert counted == clock.programs == 1 and clock.seconds > 0


def test_answers_are_added_to_a_file_and_not_replaced_unasked(tmp_path):
    path = tmp_path / "numbers.json"
    timing.check_target(path, "step", overwrite=False)
    timing.add_answer(path, "step", {"ours": {"median": 1.0}})
    timing.check_target(path, "memory", overwrite=False)
    timing.add_answer(path, "memory", {"ours": {"median": 2.0}})
    with pytest.raises(UsageError, match="has an answer to 'step'"):
        timing.check_target(path, "step", overwrite=False)
    timing.check_target(path, "step", overwrite=True)
    timing.add_answer(path, "step", {"ours": {"median": 3.0}})
    assert json.loads(path.read_text()) == {
        "step": {"ours": {"median": 3.0}},
        "memory": {"ours": {"median": 2.0}},
    }


@pytest.mark.parametrize("text", ["no JSON", "[1, 2]"])
def test_file_of_something_else_is_refused(tmp_path, text):
    path = tmp_path / "numbers.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="not written by benchmark.py"):
        timing.check_target(path, "step", overwrite=True)
    assert path.read_text() == text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["speed"], "invalid choice"),
        (["step", "--n-paths", "0"], "must be a whole number above 0, got 0"),
        (["step", "--repeats", "two"], "invalid"),
        (["step", "--chunk", "-1"], "--chunk"),
        (["step", "--chunk", "500", "--forms", "rows"], "--chunk is by rows"),
        (["step", "--n-paths", "4", "--forms", "pieces"], "dhntb with 4 paths goes by rows all the same"),
        (["step", "--forms", "pieces", "--method", "dhlnn_newton"], "goes by rows all the same"),
        (["step", "--peers", "--method", "dhlnn"], "leave --hidden-sizes and --method out"),
        (["step", "--peers", "--hidden-sizes", "32"], "leave --hidden-sizes and --method out"),
        (["sweep", "--peers"], "--peers"),
        (["step", "--json", "/nowhere/numbers.json"], "no folder"),
        (["scaling", "--n-paths", "10", "--counts", "1", "4"], "cannot be shared evenly by 4 devices"),
        (["time-to-regret", "--config", "nowhere.toml"], "no config file"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("benchmark.py: ") and error.count("\n") == 1


def test_help_and_nothing_given(capsys):
    assert benchmark.main([]) == 2
    shown = capsys.readouterr().err
    assert all(question in shown for question in benchmark.QUESTIONS)


def test_step_without_the_peers_says_so_in_one_line_and_writes_ours(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    arguments = ["step", *TINY, "--peers", "--peers-python", str(tmp_path / "python"), "--json", str(path)]
    assert benchmark.main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("no peers: ") and shown.err.count("\n") == 1
    assert "ours, after 1 epochs" in shown.out and "jax " in shown.out
    answer = json.loads(path.read_text())["step"]
    assert set(answer) == {"ours"}
    ours = answer["ours"]
    assert ours["unit"] == "s" and 0 < ours["min"] <= ours["median"] <= ours["max"]
    assert 0 < ours["live_rows"] <= 1 and ours["compile_seconds"] > 0
    assert ours["machine"]["cores"] >= 1 and "jax" in ours["machine"]["versions"]


def test_step_times_both_forms_of_a_method_in_one_call(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        step_time, "make_workload", lambda config, **o: asked.append((config, o)) or make(config, **o)
    )
    make, path = workload.make_workload, tmp_path / "numbers.json"
    sizes = ("--n-paths", "64", "--trained", "2", "--steps", "1", "--repeats", "2")
    arguments = ["step", *sizes, "--method", "dhlnn", "--forms", "rows", "pieces", "--json", str(path)]
    assert benchmark.main(arguments) == 0
    shown = capsys.readouterr().out
    assert [f"ours, after 2 epochs, by {form}" in shown for form in ("rows", "pieces")] == [True, True]
    assert [config.training.by_pieces for config, _ in asked] == ["never", "always"]
    assert all(options["method"] == "dhlnn" for _, options in asked)
    ours = json.loads(path.read_text())["step"]["ours"]
    assert ours["method"] == "dhlnn" and ours["median"] == ours["by rows"]["median"]
    assert ours["by pieces"]["median"] > 0 and ours["by pieces"]["compile_seconds"] > 0
    # the same mathematics: the same share of decisions has a gradient
    live = [ours[f"by {form}"]["trained"]["live_rows"] for form in ("rows", "pieces")]
    assert live[0] == pytest.approx(live[1], abs=0.02)


def test_clamp_times_both_forms_at_every_horizon(monkeypatch, capsys):
    monkeypatch.setattr(clamp_choice, "DECISIONS", 60)
    assert benchmark.main(["clamp", "--horizons", "3", "20", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert [f"{n} steps, {kind}" in shown for n in (3, 20) for kind in ("scan", "parallel")] == [True] * 4
    assert "x the scan" in shown and "s to compile" in shown


def test_python_without_torch_is_no_peer(capsys):
    with processes.peers_process(True, Path(sys.executable)) as process:
        found = process is not None
    if not found:  # the test environment may have torch and pfhedge
        error = capsys.readouterr().err
        assert error.startswith("no peers: ") and "No module named" in error and error.count("\n") == 1


def test_peers_are_not_looked_for_unasked(monkeypatch):
    monkeypatch.setattr(processes, "make_peers", lambda folder: pytest.fail("not asked for"))
    with processes.peers_process(False, None) as process:
        assert process is None


def test_peers_that_cannot_be_installed_are_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(processes, "_call", lambda command: "no such index")
    with processes.peers_process(True, None) as process:
        assert process is None
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("no peers: cannot install torch==") and error[-1].endswith("no such index")
    assert not (processes.peers_folder() / "finished").exists()


def test_line_process_answers_and_closes():
    echo = "import json, sys\nfor line in sys.stdin: print(line.strip(), flush=True)"
    with processes.LineProcess([sys.executable, "-c", echo]) as process:
        assert process.ask(do="train", epochs=3) == {"do": "train", "epochs": 3}


def test_dense_operations_of_the_paper():
    assert dense_operations(workload.step_config(10_000)) == 6 * 12_608 * 300_000


def test_live_rows_of_a_network_that_never_trades_is_zero():
    work = workload.make_workload(step_time.step_config(8), chunk=0)
    params = work.hedger.init(jax.random.key(0))
    never = jax.tree.map(jnp.zeros_like, params)
    last = sorted(never["params"]["Perceptron_0"])[-1]
    never["params"]["Perceptron_0"][last]["bias"] = jnp.full(2, 5.0)
    assert workload.live_rows(work, never) == 0.0
    assert workload.live_rows(work, params) > 0.0


def test_flax_params_are_those_of_the_hedger():
    params = workload.make_workload(step_time.step_config(8)).hedger.init(jax.random.key(0))
    layers = params["params"]["Perceptron_0"]
    names = [f"Dense_{i}" for i in range(len(layers))]
    arrays = {f"{k}_{i}": np.asarray(layers[n][k]) for i, n in enumerate(names) for k in ("kernel", "bias")}
    again = race.flax_params(arrays)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), again, params)))


def test_until_stops_at_the_target_or_the_limit():
    regrets = iter([5.0, 1.0, 0.05])
    limits = {"target": 0.1, "every": 10, "epochs": None}
    reached = race._until(lambda n: 0.1 * n, lambda whole: (next(regrets), 0.0), seconds=60.0, **limits)
    assert reached.seconds == pytest.approx(3.0) and [row[0] for row in reached.curve] == [10, 20, 30]
    never = race._until(lambda n: 0.1 * n, lambda whole: (1.0, 0.0), seconds=1.5, **limits)
    assert never.seconds == float("inf") and len(never.curve) == 2


def test_script_shows_its_questions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / "benchmark.py"), run_name="__main__")
    assert ended.value.code == 0 and "time-to-regret" in capsys.readouterr().out
