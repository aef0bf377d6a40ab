"""How long XLA's CPU compiler works on a program: less where that costs less than it saves.

Compiling is most of a short run. Measured in docs/performance.md; accelerators keep their defaults.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import jax

CompilerOptions = dict[str, Any]

_OFTEN: CompilerOptions = {"xla_backend_optimization_level": 1}
_SELDOM: CompilerOptions = {**_OFTEN, "xla_cpu_use_fusion_emitters": False}


def options_for_often() -> CompilerOptions | None:
    """`jax.jit(..., compiler_options=...)` of a program that runs thousands of times: a training step.

    Numerics: other fusions round otherwise; nothing else changes.
    """
    return _OFTEN if _understood() else None


def options_for_seldom() -> CompilerOptions | None:
    """The same of a program that runs a few times; it compiles in half the time."""
    return _SELDOM if _understood() else None


def jit_for_seldom(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit(fn, **options)` with `options_for_seldom`.

    Not to be called under another jit, vmap or grad: JAX takes compiler options at the top only.
    """

    @cache
    def jitted() -> Callable[..., Any]:  # asking for the backend starts JAX, so not before the first call
        return jax.jit(fn, compiler_options=options_for_seldom(), **options)

    return wraps(fn)(lambda *args, **kwargs: jitted()(*args, **kwargs))


@cache
def _understood() -> bool:
    """Whether the backend is a CPU whose XLA knows all of these options."""
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda: 0, compiler_options=_SELDOM).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
