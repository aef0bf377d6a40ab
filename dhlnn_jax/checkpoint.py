"""Parameters and training states on disk (orbax: no pickle, each save appears whole or not at all)."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def save_tree(folder: Path, tree: Any) -> None:
    """Writes a pytree of arrays to a new folder.

    Raises: ValueError (from orbax) if the folder exists.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), tree)


def load_tree(folder: Path, like: Any) -> Any:
    """The pytree saved in `folder`, with the structure, shapes and dtypes of `like`.

    Raises: ValueError (from orbax) if they do not match.
    """
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve(), template)
