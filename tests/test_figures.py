"""Figures from a results folder alone."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from runs import METHODS, PICTURES, smoke_run

from dhlnn_jax import figures
from dhlnn_jax.methods import METHODS as REGISTRY
from dhlnn_jax.results import read_results


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def test_figures_are_the_same_every_time(base, tmp_path):
    original, copy = smoke_run(base).folder, tmp_path / "copy"
    shutil.copytree(original, copy, ignore=shutil.ignore_patterns("*.png", "params", "checkpoints"))
    figures.write_figures(read_results(copy))
    for name in PICTURES:
        assert (copy / name).read_bytes() == (original / name).read_bytes()


def test_histogram_has_shared_bins_and_mass_one(base):
    figure = figures.pnl_histogram(smoke_run(base))
    for axis in figure.axes:
        steps = [patch.get_data() for patch in axis.patches]
        assert len(steps) == len(METHODS)
        for step in steps:
            np.testing.assert_array_equal(step.edges, steps[0].edges)
            assert np.sum(step.values * np.diff(step.edges)) == pytest.approx(1.0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        REGISTRY[name].label for name in METHODS
    ]
    figures.plt.close(figure)


def test_run_without_training_has_no_curve(base):
    results = smoke_run(base)
    rows = {name: results.metrics["methods"][name] for name in ("bsdh", "no_hedge")}
    metrics = {**results.metrics, "methods": rows}
    assert figures.risk_by_epoch(replace(results, metrics=metrics)) is None
