"""Traced programs kept between processes: what JAX's cache of compiled programs cannot save.

Before that cache is asked for a program, Python has traced and lowered it, which for a training step takes
longer than fetching it. What tracing gives is kept here as `jax.export` writes it (StableHLO, no pickle).

A kept program is found without tracing, by all that it is made from: what the caller says, the source of
this package and of every other module that was not installed, versions, JAX's configuration, devices, and
the structure, shapes and types of its arguments. A function replaced while a process runs is not seen by
that, and so nothing is kept until a script asks for it (`runtime.prepare`).
"""

import hashlib
import os
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.export

from dhlnn_jax.compiling import CompilerOptions

_folder: Path | None = None
_began = time.time()


def keep_in(folder: Path | None) -> None:
    """Keeps traced programs in this folder from now on; None: nowhere, as at the start."""
    global _folder
    _folder = folder


def compiled(
    fn: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    made_from: str | None,
    returns: Any = None,
    donate_first: bool = False,
    compiler_options: CompilerOptions | None = None,
    **shardings: Any,
) -> Callable[..., Any]:
    """`jax.jit(fn, ...).lower(*arguments).compile()`, without tracing if that was kept.

    Args:
      fn: of pytrees of arrays.
      arguments: an example of each, laid out over devices as they will be.
      made_from: all that fn depends on and its arguments do not say; None: that cannot be said, and nothing
        is kept.
      returns: any tree of the structure that fn returns; not needed for dicts, lists and tuples.
      donate_first: the first argument's buffers are given away, as by donate_argnums.
      shardings: in_shardings and out_shardings, one for all arrays.
    Numerics: what is kept is the traced program itself, so results are the same.
    """
    leaves, structure = jax.tree.flatten(arguments)
    returned = None if returns is None else jax.tree.structure(returns)

    def flat(*leaves: Any) -> Any:
        value = fn(*jax.tree.unflatten(structure, leaves))
        return value if returned is None else tuple(jax.tree.leaves(value))

    n_donated = len(jax.tree.leaves(arguments[0])) if donate_first else 0
    jit = partial(jax.jit, donate_argnums=range(n_donated), **shardings)
    path = _path(made_from, leaves, structure, returned)
    kept = None if path is None else _read(path) or _trace(jit(flat), leaves, path)
    program = jit(flat if kept is None else kept.call, compiler_options=compiler_options)
    ready = program.lower(*leaves).compile()

    def call(*arguments: Any) -> Any:
        value = ready(*jax.tree.leaves(arguments))
        return value if returned is None else jax.tree.unflatten(returned, value)

    return call


def jit(fn: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """`compiled` at the first call with new structure, shapes or types of arguments, or configuration of JAX.

    Args:
      how: made_from and what else `compiled` takes.
    """
    programs: dict[Any, Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        signature = structure, _described(leaves), _configuration()
        if signature not in programs:
            programs[signature] = compiled(fn, arguments, **how)
        return programs[signature](*arguments)

    return call


def _described(leaves: list[Any]) -> tuple[tuple[str, str], ...]:
    return tuple((str(jax.typeof(x)), str(getattr(x, "sharding", None))) for x in leaves)


def _configuration() -> str:
    """JAX's, with what a context manager has changed."""
    return repr(sorted(jax.config.values.items()))


def _path(made_from: str | None, leaves: list[Any], *structures: Any) -> Path | None:
    """Where this program is kept; None if it is not to be."""
    if _folder is None or made_from is None:
        return None
    if jax.default_backend() != "cpu" or jax.process_count() > 1:  # not measured there
        return None
    sources = _sources()
    if sources is None:
        return None
    devices = [device.device_kind for device in jax.devices()]
    environment = sources, _versions(), _configuration(), devices
    told = made_from, environment, _described(leaves), *map(str, structures)
    return _folder / f"{hashlib.sha256(repr(told).encode()).hexdigest()}.stablehlo"


def _versions() -> tuple[str, ...]:
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "jaxtyping")
    return (sys.version, *(metadata.version(name) for name in packages))


def _sources() -> str | None:
    """Digest of this package and of the loaded modules that were not installed, the script among them.

    None if one of them was changed while this process ran: which version runs cannot be told then.
    """
    named = (getattr(module, "__dict__", {}).get("__file__") for module in list(sys.modules.values()))
    files = {Path(file) for file in named if isinstance(file, str) and not _installed(file)}
    digest = hashlib.sha256()
    for file in sorted(files.union(Path(__file__).parent.rglob("*.py"))):
        if not file.is_file():  # "<frozen ...>", or a module inside an archive
            continue
        if file.stat().st_mtime > _began:
            return None
        digest.update(f"{file}\0{_digest(file)}".encode())
    return digest.hexdigest()


@cache  # of some two thousand files, for every program that is asked for
def _installed(file: str) -> bool:
    parts = Path(file).parts
    return (
        "site-packages" in parts or "dist-packages" in parts or file.startswith(sysconfig.get_path("stdlib"))
    )


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _read(path: Path) -> jax.export.Exported | None:
    """The program kept there; None if there is none, or one that is damaged."""
    try:
        check, blob = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(blob).hexdigest().encode() != check:
            return None
        return jax.export.deserialize(bytearray(blob))
    except (OSError, ValueError, ImportError):
        return None


def _trace(jitted: Any, leaves: list[Any], path: Path) -> jax.export.Exported | None:
    """The traced program, kept if it can be; None if it cannot be written, for want of a library or form."""
    try:
        traced = jax.export.export(jitted)(*leaves)
        blob = bytes(traced.serialize())
    except (ImportError, NotImplementedError, ValueError):
        return None  # a mistake in the program comes up again where it is compiled without being kept
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path.write_bytes(hashlib.sha256(blob).hexdigest().encode() + b"\n" + blob)
        os.replace(partial_path, path)
    except OSError:
        pass  # a cache that cannot be written saves nothing, and harms nothing
    return traced
