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


def test_an_edge_of_the_exact_band_at_the_end_of_what_was_solved_for_leaves_the_panel(base):
    results = smoke_run(base)
    lowest, highest = results.metrics["optimum"]["hedge_ratio_limits"]
    arrays = dict(results.bands)
    shape = arrays["optimal/band_lower"].shape
    inner = {"optimal/band_lower": np.full(shape, 0.2), "optimal/band_upper": np.full(shape, 0.4)}
    ended = {**inner, "optimal/band_upper": np.full(shape, highest)}
    for edges, top in ((inner, 0.4), (ended, 99.0)):
        figure = figures.bands(replace(results, bands={**arrays, **edges}))
        grey = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
        assert (grey.min(), grey.max()) == (0.2, top)
        assert ("beyond the positions solved for" in figure.get_suptitle()) == (top == 99.0)
        assert figure.axes[0].get_ylim()[1] < 2
        figures.plt.close(figure)
    assert lowest < 0 < 1 < highest


def test_no_legend_covers_the_curves_over_epochs(base):
    figure = figures.risk_by_epoch(smoke_run(base))
    figure.draw_without_rendering()
    (legend,) = figure.legends
    (axis,) = figure.axes
    assert axis.get_legend() is None
    assert not legend.get_window_extent().overlaps(axis.get_window_extent())
    figures.plt.close(figure)
