"""Shared fixtures; under pytest every jaxtyping annotation of the package is checked with beartype."""

import importlib.util
import os
import tempfile

# What the package keeps for its user is not kept by tests; set before anything reads it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dhlnn_jax_cache_")

if importlib.util.find_spec("beartype"):  # the GPU machine has no beartype: it runs the tests unchecked
    from jaxtyping import install_import_hook

    install_import_hook("dhlnn_jax", "beartype.beartype")

import jax
import pytest

# Compiling is most of the time that these tests take, and most of what they compile runs once.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def key():
    return jax.random.key(20250217)


@pytest.fixture
def strict_x64():
    """Float64 and strict dtype promotion, rank promotion refused: for tests of the pure rooms only."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """The shipped quickstart, run once: the evidence that training works."""
    from runs import quickstart_run

    return quickstart_run(tmp_path_factory.getbasetemp())
