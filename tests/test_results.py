"""The results folder: who may write where, and files that appear whole or not at all."""

import tomllib

import numpy as np
import pytest

from dhlnn_jax.config import make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.results import (
    Results,
    claim_folder,
    machine,
    open_folder,
    read_config,
    read_results,
    write_results,
)

CONFIG = make_config(
    {"seed": 4, "methods": ["bsdh"], "contract": {"maturity": 0.1}, "market": {"n_steps": 3}}
)


def claim(folder, overwrite=False, resume=False):
    claim_folder(folder, overwrite=overwrite, resume=resume)


def began(folder):
    open_folder(folder, CONFIG, overwrite=False, resume=False)
    return folder


def finished(folder):
    arrays = {"pnl": np.arange(3.0), "group_id": np.arange(3)}
    results = Results(
        CONFIG, {"schema": 1}, {"notes": ["µ"]}, arrays, {"spot": np.ones(4)}, {}, began(folder)
    )
    write_results(results)
    return results


def test_new_and_empty_folders_may_be_written(tmp_path):
    claim(tmp_path / "new")
    claim(tmp_path)
    claim(tmp_path / "new", overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_run_needs_overwrite_or_resume(tmp_path):
    folder = began(tmp_path / "run")
    with pytest.raises(UsageError, match="exists; give --out another one, or --overwrite, or --resume"):
        claim(folder)
    claim(folder, overwrite=True)
    claim(folder, resume=True)


def test_nothing_to_resume_is_refused(tmp_path):
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(UsageError, match="nothing to resume"):
            claim(folder, resume=True)


def test_what_no_run_wrote_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for how, said in (
        ({}, "exists"),
        ({"overwrite": True}, "not overwritten"),
        ({"resume": True}, "cannot resume"),
    ):
        with pytest.raises(UsageError, match=said):
            claim(tmp_path, **how)
    # a config.toml alone makes no results folder: other programs have one too
    (tmp_path / "config.toml").write_text("[site]\n")
    with pytest.raises(UsageError, match="'thesis.tex', which no run wrote; not overwritten"):
        claim(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        claim(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="cannot make the results folder"):
        began(tmp_path / "file" / "below")


def test_config_in_the_folder_is_resolved_and_reads_back(tmp_path):
    folder = began(tmp_path / "a" / "b")
    assert read_config(folder) == CONFIG
    written = tomllib.loads((folder / "config.toml").read_text())
    assert written["seed"] == 4 and written["contract"]["maturity"] == 0.1
    assert written["training"]["learning_rate"] == 1e-3  # defaults are written out


def test_opening_to_overwrite_empties_and_to_resume_keeps(tmp_path):
    folder = began(tmp_path / "run")
    (folder / "old.png").write_bytes(b"")
    open_folder(folder, CONFIG.model_copy(update={"out": "elsewhere"}), overwrite=False, resume=True)
    assert (folder / "old.png").exists()
    with pytest.raises(UsageError, match="begun with another configuration"):
        open_folder(folder, CONFIG.model_copy(update={"seed": 5}), overwrite=False, resume=True)
    open_folder(folder, CONFIG, overwrite=True, resume=False)
    assert [path.name for path in folder.iterdir()] == ["config.toml"]


def test_results_read_back(tmp_path):
    results = finished(tmp_path / "run")
    back = read_results(tmp_path / "run")
    assert (back.config, back.metrics, back.meta) == (CONFIG, {"schema": 1}, {"notes": ["µ"]})
    for name, array in results.pnl.items():
        np.testing.assert_array_equal(back.pnl[name], array)
    np.testing.assert_array_equal(back.sample_path["spot"], np.ones(4))
    assert not [path for path in back.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["config.toml", "metrics.json", "meta.json", "pnl.npz", "sample_path.npz"])
def test_folder_with_a_file_missing_holds_no_finished_run(tmp_path, name):
    finished(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(UsageError, match=rf"holds no finished run: {name} is missing"):
        read_results(tmp_path / "run")


def test_config_that_was_edited_by_hand_is_checked(tmp_path):
    finished(tmp_path / "run")
    file = tmp_path / "run" / "config.toml"
    for text, said in (("seed = -1\n", "seed = -1"), ("seed = \n", "not readable as TOML")):
        file.write_text(text)
        with pytest.raises(UsageError, match=f"config.toml: {said}"):
            read_results(tmp_path / "run")


@pytest.mark.parametrize("name", ["metrics.json", "meta.json", "pnl.npz", "sample_path.npz", "bands.npz"])
def test_damaged_file_is_named_in_one_line(tmp_path, name):
    finished(tmp_path / "run")
    file = tmp_path / "run" / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UsageError, match=rf"{name}: not (a )?readable") as raised:
        read_results(tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_interrupted_writing_leaves_the_old_array_file(tmp_path, monkeypatch):
    finished(tmp_path / "run")

    def killed(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    results = read_results(tmp_path / "run")
    monkeypatch.setattr(np, "savez_compressed", killed)
    with pytest.raises(KeyboardInterrupt):
        write_results(results)
    monkeypatch.undo()
    np.testing.assert_array_equal(read_results(tmp_path / "run").pnl["pnl"], np.arange(3.0))


def test_machine_names_what_a_number_depends_on():
    found = machine()
    assert found["device"] and set(found["versions"]) >= {
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "numpy",
        "dhlnn-jax",
    }
