"""Presets and optimizers of the configuration; its mistakes are in test_config."""

import optax

from dhlnn_jax.config import make_config
from dhlnn_jax.config_training import OPTIMIZERS


def test_preset_as_printed_sets_every_choice_of_the_paper_unless_one_is_given():
    printed = make_config({"nested": {"preset": "as_printed"}}).nested
    assert printed.risk_weights == "frozen"
    assert printed.cost_surrogate == "squared_difference"
    assert printed.inner_update == "frozen_preconditioner"
    assert printed.linearization == "network"
    mixed = make_config({"nested": {"preset": "as_printed", "risk_weights": "refreshed"}}).nested
    assert (mixed.risk_weights, mixed.cost_surrogate) == ("refreshed", "squared_difference")
    ours = make_config({}).nested
    assert (ours.risk_weights, ours.cost_surrogate) == ("refreshed", "absolute")


def test_every_optimizer_that_is_allowed_exists():
    for name in OPTIMIZERS:
        assert isinstance(getattr(optax, name)(1e-3), optax.GradientTransformation)
