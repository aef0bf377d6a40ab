"""Parameters and training states on disk (orbax: no pickle, each save appears whole or not at all)."""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dhlnn_jax.files import read_json, write_json


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


class Checkpoints:
    """Numbered checkpoints of one method; only a complete one counts, and older ones are removed after it.

    Args:
      folder: theirs alone; None keeps none.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def _complete(self) -> list[int]:
        if self._folder is None:
            return []
        found = (p.stem for p in self._folder.glob("*.json"))
        return sorted(int(stem) for stem in found if (self._folder / stem).is_dir())

    @property
    def newest(self) -> str | None:
        """Folder of the last complete one."""
        complete = self._complete()
        return str(self._folder / str(complete[-1])) if self._folder and complete else None

    def save(self, epoch: int, trees: Any, log: dict[str, Any]) -> None:
        """The arrays first; the log beside them marks them as complete."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / str(epoch)
        if target.exists():
            shutil.rmtree(target)
        save_tree(target, trees)
        write_json(self._folder / f"{epoch}.json", log)
        for old in self._complete()[:-1]:
            (self._folder / f"{old}.json").unlink()
            shutil.rmtree(self._folder / str(old))

    def latest(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Arrays (as `load_tree`) and log of the last complete one; None without one."""
        if self.newest is None:
            return None
        return load_tree(Path(self.newest), like), read_json(Path(f"{self.newest}.json"))
