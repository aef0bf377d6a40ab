"""Shared fixtures; under pytest every jaxtyping annotation of the package is checked with beartype."""

import importlib.util
import os
import subprocess
import sys
import tempfile

# What the package keeps for its user is not kept by tests; set before anything reads it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dhlnn_jax_cache_")

# Compiling is most of the time that these tests take, and XLA's fusion emitters, which only speed needs, are
# half of that. An XLA that does not know a flag ends the process, so another one is asked first.
_FLAGS = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
_ASK = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
if subprocess.run(_ASK, env={**os.environ, "XLA_FLAGS": _FLAGS}, capture_output=True).returncode == 0:
    os.environ["XLA_FLAGS"] = _FLAGS

if importlib.util.find_spec("beartype"):  # the GPU machine has no beartype: it runs the tests unchecked
    from jaxtyping import install_import_hook

    install_import_hook("dhlnn_jax", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

# Most of what they compile runs once.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def nothing_traced_is_kept():
    """A test that runs a script leaves no other test with programs that were traced before."""
    from dhlnn_jax import traces

    yield
    traces.keep_in(None)


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
