"""Work that ends in one JSON file: whose folder it may use, and what is left of it after a kill.

While it lasts, its folder holds checkpoints, and among them begun.json, which says what work they are of.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import read_json, write_json

Told = dict[str, Any]  # which work it is, as JSON: "config", and whatever else it depends on

_CHECKPOINTS = "checkpoints"
_BEGUN = "begun.json"


def claim(folder: Path, file: str, *, overwrite: bool, resume: bool) -> Path:
    """Where work that ends in `folder / file` keeps its checkpoints.

    Args:
      overwrite: removes the checkpoints of earlier work.
    Raises: UsageError if `folder` is a file, holds a run, or holds such work and neither overwriting nor
      resuming was asked for, or if there is none to resume.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out = {str(folder)!r} is a file; name a folder")
    if (folder / "config.toml").exists():
        raise UsageError(f"{str(folder)!r} holds a run; give --out another folder")
    checkpoints, finished = folder / _CHECKPOINTS, (folder / file).exists()
    begun = (checkpoints / _BEGUN).exists()
    if resume and not (begun or finished):
        raise UsageError(f"nothing to resume in {str(folder)!r}; run without --resume")
    if (begun or finished) and not (overwrite or resume):
        found = str(checkpoints if begun else folder / file)
        raise UsageError(f"{found!r} exists; give --out another folder, or --overwrite, or --resume")
    if begun and overwrite:
        discard(checkpoints)
    return checkpoints


def begin(checkpoints: Path, told: Told) -> None:
    """Writes what work the checkpoints are of. Raises: UsageError if there are some of other work."""
    begun = checkpoints / _BEGUN
    if begun.exists():
        _check_same(begun, told)
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    write_json(begun, told)


def finished(checkpoints: Path, file: str, told: Told) -> dict[str, Any] | None:
    """Contents of the file if this work is finished; None if it has still to be gone on with.

    Raises: UsageError if other work is.
    """
    if (checkpoints / _BEGUN).exists():
        return None
    return _check_same(checkpoints.parent / file, told)


def kept(checkpoints: Path | None, name: str, compute: Callable[[], Any]) -> Any:
    """One part of the work, as JSON: what is kept under its name, or else computed, and kept from then on.

    Args:
      checkpoints: where work has begun; None keeps nothing.
    """
    if checkpoints is None:
        return compute()
    file = checkpoints / f"{name}.json"
    if is_kept(checkpoints, name):
        return read_json(file)["value"]
    value = compute()
    write_json(file, {"value": value})
    return value


def is_kept(checkpoints: Path | None, name: str) -> bool:
    """Whether `kept` has nothing to compute."""
    return checkpoints is not None and (checkpoints / f"{name}.json").exists()


def discard(checkpoints: Path) -> None:
    """Removes them at once: what a kill left of them would be taken for those of the next work."""
    if checkpoints.exists():
        gone = checkpoints.with_name(f".{checkpoints.name}.partial")
        shutil.rmtree(gone, ignore_errors=True)
        checkpoints.rename(gone)
        shutil.rmtree(gone)


def _check_same(file: Path, told: Told) -> dict[str, Any]:
    kept = read_json(file)
    if _as_text({name: kept.get(name) for name in told}) != _as_text(told):
        raise UsageError(f"{str(file)!r} is of another configuration or other options; use --overwrite")
    return kept


def _as_text(told: Told) -> str:
    """With the order of everything, and without the folder, which may have been moved."""
    return json.dumps({**told, "config": {**(told["config"] or {}), "out": ""}})
