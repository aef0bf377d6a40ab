import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dhlnn_jax import compiling


@pytest.fixture
def asked_again():
    compiling._understood.cache_clear()
    yield
    compiling._understood.cache_clear()


def wave(x, n):
    return jnp.sin(x) * n


def test_programs_that_run_seldom_give_the_same_numbers():
    x = jnp.linspace(-2.0, 2.0, 101)
    quick = compiling.jit_for_seldom(wave, static_argnums=1)
    np.testing.assert_allclose(quick(x, 3), jax.jit(wave, static_argnums=1)(x, 3), rtol=1e-6)
    assert quick.__name__ == "wave"


def test_options_reach_the_compiler():
    if jax.default_backend() != "cpu":
        pytest.skip("options of the CPU's compiler")
    options = compiling.options_for_often()
    assert options == {"xla_backend_optimization_level": 1}
    jax.jit(jnp.sin, compiler_options=options).lower(1.0).compile()  # an unknown option would be refused


def test_options_that_xla_does_not_know_are_left_out(monkeypatch, asked_again):
    monkeypatch.setattr(compiling, "_SELDOM", {"xla_no_such_option": True})
    assert compiling.options_for_often() is None
    np.testing.assert_allclose(
        compiling.jit_for_seldom(wave, static_argnums=1)(0.5, 2), 2 * np.sin(0.5), rtol=1e-6
    )
