"""What accelerators do by default, done here: factors of float32 products are rounded first."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lax import lax as products  # where derivatives of products look theirs up as well
from runs import CONFIGS, optimized

from dhlnn_jax import experiment
from dhlnn_jax.config import load_config
from dhlnn_jax.experiment import run

METHODS = ("dhlnn", "dhlnn_newton", "dhntb")
TENSORFLOAT32 = 10  # bits of the mantissa


@contextlib.contextmanager
def factors_rounded_to(n_bits):
    """Rounds the factors of every float32 product that does not ask for full precision."""
    exact = products.dot_general

    def rounded(x):
        x = jnp.asarray(x)
        return jax.lax.reduce_precision(x, 8, n_bits) if x.dtype == jnp.float32 else x

    def product(x, y, dimension_numbers, precision=None, **how):
        if "HIGHEST" not in str(precision).upper():
            x, y = rounded(x), rounded(y)
        return exact(x, y, dimension_numbers, precision, **how)

    with (
        mock.patch.object(products, "dot_general", product),
        mock.patch.object(jax.lax, "dot_general", product),
    ):
        jax.clear_caches()
        try:
            yield
        finally:
            jax.clear_caches()


def test_factors_are_rounded_here_and_their_derivatives_too():
    x, third = jnp.ones((2, 2)), jnp.full((2, 2), 1 / 3)
    assert float((third @ x)[0, 0]) == pytest.approx(2 / 3, rel=1e-7)
    with factors_rounded_to(TENSORFLOAT32):
        assert 1e-4 < abs(float((third @ x)[0, 0]) / (2 / 3) - 1) < 1e-3
        slope = float(jax.grad(lambda y: (third @ y).sum())(x)[0, 0])
        assert 1e-4 < abs(slope / (2 / 3) - 1) < 1e-3
        full = jnp.matmul(third, x, precision="highest")
    assert float(full[0, 0]) == pytest.approx(2 / 3, rel=1e-7)


def test_training_with_tensorfloat32_ends_at_the_same_risk(quickstart, tmp_path):
    """Within half the Monte Carlo error, on the same paths: the default of NVIDIA's GPUs costs nothing."""
    arguments = ["--methods", *METHODS, "--evaluation.optimum", "false", "--out", str(tmp_path / "rounded")]
    config = load_config(CONFIGS / "quickstart.toml", arguments)
    with factors_rounded_to(TENSORFLOAT32), optimized(), mock.patch.object(experiment, "write_figures"):
        rounded = run(config)
    for name in METHODS:
        found, wanted = (
            of.metrics["methods"][name]["final"]["entropic_risk_measure"] for of in (rounded, quickstart)
        )
        print(f"{name}: {found['value'] - wanted['value']:.1e} at an error of {wanted['stderr']:.1e}")
        assert abs(found["value"] - wanted["value"]) < 0.5 * wanted["stderr"], name
        paths = [of.pnl[f"{name}/pnl"] for of in (rounded, quickstart)]
        assert np.abs(paths[0] - paths[1]).max() > 1e-5  # otherwise nothing was rounded
