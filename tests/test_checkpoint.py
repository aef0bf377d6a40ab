from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dhlnn_jax.checkpoint import load_tree, save_tree


class Saved(NamedTuple):
    params: dict
    optimizer: tuple
    epoch: jax.Array


def tree(seed):
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(seed), (3, 2)), "bias": jnp.ones(2)}}
    optimizer = optax.adam(1e-3)
    gradient = jax.tree.map(lambda x: 0.1 * x, params)
    return Saved(params, optimizer.update(gradient, optimizer.init(params))[1], jnp.asarray(seed))


def test_saved_tree_comes_back_bit_for_bit(tmp_path):
    save_tree(tmp_path / "one", tree(7))
    back = load_tree(tmp_path / "one", tree(0))
    assert jax.tree.structure(back) == jax.tree.structure(tree(7))
    chex.assert_trees_all_equal(back, tree(7))
    chex.assert_trees_all_equal_dtypes(back, tree(7))
    # shapes alone do as the template
    chex.assert_trees_all_equal(load_tree(tmp_path / "one", jax.eval_shape(tree, 0)), tree(7))


def test_relative_folders_are_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tree(Path("here"), {"a": jnp.arange(3)})
    np.testing.assert_array_equal(load_tree(Path("here"), {"a": jnp.zeros(3, int)})["a"], [0, 1, 2])


def test_existing_folder_is_not_overwritten(tmp_path):
    save_tree(tmp_path / "one", {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="already exists"):
        save_tree(tmp_path / "one", {"a": jnp.zeros(2)})
    np.testing.assert_array_equal(load_tree(tmp_path / "one", {"a": jnp.zeros(2)})["a"], [1, 1])


@pytest.mark.parametrize(
    "like", [{"b": jnp.zeros(2)}, {"a": jnp.zeros(2), "b": jnp.zeros(2)}, {"a": jnp.zeros(5)}]
)
def test_tree_of_another_kind_is_refused(tmp_path, like):
    save_tree(tmp_path / "one", {"a": jnp.ones(2)})
    with pytest.raises(ValueError):
        load_tree(tmp_path / "one", like)
