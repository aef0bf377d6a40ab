"""Deep hedging in JAX: band networks, linearized-objective training, honest statistics.

The rooms are modules: `market`, `payoff`, `black_scholes`, `features`, `model`, `linearize`, `hedge`,
`hedger`, `pnl`, `risk`, `nested`, `train` need only jax, flax, optax, numpy and jaxtyping; `run` and `load`
below, which read and write files, need the rest.
"""

from typing import Any

from dhlnn_jax.errors import UsageError
from dhlnn_jax.market import MarketPath
from dhlnn_jax.settings import Settings, make_settings

__all__ = ["MarketPath", "Settings", "UsageError", "load", "load_config", "make_settings", "run"]

_LAZY = {"run": "experiment", "load": "trained", "load_config": "config"}


def __getattr__(name: str) -> Any:
    """Imports the experiment half when it is first asked for, so that the library half stays light."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dhlnn_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"dhlnn_jax.{_LAZY[name]}"), name)
