"""Runs that several test files share, each done once a session."""

import contextlib
import functools
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
from jax.experimental.compilation_cache import compilation_cache

from dhlnn_jax import experiment, figures, trainer
from dhlnn_jax.config import load_config
from dhlnn_jax.experiment import run
from dhlnn_jax.results import machine, read_config, read_results

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = (
    *("optimal", "dhlnn", "dhlnn_newton", "dhntb", "dhmlp", "whalley_wilmott", "bsdh"),
    *("leland", "fixed_band", "periodic_delta", "no_hedge"),
)  # in the order of configs/smoke.toml
TRAINED = METHODS[1:5]
PICTURES = ("bands.png", "pnl_histogram.png", "risk_by_epoch.png", "sample_path.png")
METRICS = {
    "entropic_risk_measure",
    "expected_shortfall",
    "value_at_risk",
    "pnl_mean",
    "pnl_std",
    "trading_cost_mean",
    "turnover_mean",
    "trade_frequency_mean",
    "round_trip_mean",
}


@contextlib.contextmanager
def programs_kept(folder):
    """Keeps compiled programs on disk, so that a run with the shapes of an earlier one compiles nothing."""
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}

    def switch(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    switch(options)
    try:
        yield
    finally:
        switch(before)


@contextlib.contextmanager
def optimized():
    """Compiles as for users; `conftest` turns most optimizations off."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def small_run(base, name, *overrides, **how):
    """configs/smoke.toml with overrides, into base/name, without figures; `base` is the session's folder."""
    config = load_config(CONFIGS / "smoke.toml", ["--out", str(base / name), *overrides])
    with programs_kept(base / "programs"), mock.patch.object(experiment, "write_figures"):
        return run(config, **how)


@functools.cache
def smoke_run(base):
    """The one run of configs/smoke.toml as it is, figures included."""
    results = small_run(base, "smoke")
    figures.write_figures(results)
    return results


@functools.cache
def quickstart_run(base):
    """The one run of configs/quickstart.toml at its full settings, in base/results as README has it.

    If README's first command has just been run with the same clean commit and the same versions (as CI does),
    its folder is copied instead: another test shows that the same run gives the same numbers.
    """
    done, config = CONFIGS.parent / "results" / "quickstart", load_config(CONFIGS / "quickstart.toml")
    if (done / "metrics.json").exists():
        meta, here = json.loads((done / "meta.json").read_text()), machine()
        same = all(meta[name] == here[name] for name in ("device", "versions", "commit"))
        if same and not here["commit"].endswith("-dirty") and read_config(done) == config:
            shutil.copytree(done, base / "results" / "quickstart")
            return read_results(base / "results" / "quickstart")
    with programs_kept(base / "programs"), optimized():
        return run(load_config(CONFIGS / "quickstart.toml", ["--out", str(base / "results/quickstart")]))


def counted_epochs(monkeypatch, stop_after=None):
    """Epochs done of each method, counted by its progress bar; `stop_after`: (method, epoch) to die at."""
    done = {}

    @contextlib.contextmanager
    def bar(description, total):
        name = description.removeprefix("training ")
        done[name] = 0

        def advance(steps=1, note=""):
            if note:
                done[name] += steps
                if stop_after and name == stop_after[0] and done[name] >= stop_after[1]:
                    raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(trainer, "progress_bar", bar)
    return done
