import jax
import jax.numpy as jnp
import pytest

from dhlnn_jax.settings import Settings, keywords_from, make_settings


def test_make_settings_maturity_is_n_steps_times_dt():
    assert float(make_settings(n_steps=30).maturity) == pytest.approx(30 / 365)
    assert float(make_settings(n_steps=4, dt=0.25, maturity=3.0).maturity) == pytest.approx(3.0)


def test_make_settings_leaves_are_arrays_of_one_dtype():
    settings = make_settings(n_steps=2, strike=1, parameters={"reversion": 3})
    leaves = jax.tree.leaves(settings)
    assert len(leaves) == len(Settings._fields) - 1 + 1  # `parameters` itself is no leaf, its entry is
    assert all(isinstance(x, jax.Array) and x.dtype == jnp.zeros(()).dtype and x.shape == () for x in leaves)
    assert float(settings.parameters["reversion"]) == 3.0


def test_make_settings_parameters_are_not_shared():
    assert make_settings(n_steps=1).parameters == {}
    make_settings(n_steps=1, parameters={"a": 1.0})
    assert make_settings(n_steps=1).parameters == {}


def test_keywords_from_fields_before_parameters():
    settings = make_settings(n_steps=2, drift=0.3, parameters={"drift": 9.0, "reversion": 4.0})
    found = keywords_from(settings, ("reversion", "drift"))
    assert {name: round(float(x), 6) for name, x in found.items()} == {"reversion": 4.0, "drift": 0.3}


@pytest.mark.parametrize("name", ["reversion", "parameters"])
def test_keywords_from_unknown_name_is_named(name):
    with pytest.raises(KeyError, match=name):
        keywords_from(make_settings(n_steps=2), (name,))


def test_settings_numbers_never_retrace_and_sweep_by_vmap():
    traces = []

    @jax.jit
    def notional(settings):
        traces.append(1)
        return settings.strike * settings.cost_rate + settings.parameters["extra"]

    def make(cost_rate):
        return make_settings(n_steps=2, strike=2.0, cost_rate=cost_rate, parameters={"extra": 0.5})

    assert [round(float(notional(make(c))), 6) for c in (0.1, 0.2)] == [0.7, 0.9]
    assert len(traces) == 1
    axes = jax.tree.map(lambda _: None, make(0.0))._replace(cost_rate=0)
    swept = jax.vmap(notional, in_axes=(axes,))(make(0.0)._replace(cost_rate=jnp.array([0.1, 0.2, 0.4])))
    assert jnp.allclose(swept, jnp.array([0.7, 0.9, 1.3]))
