"""Files of results: written whole or not at all, and what cannot be read back is said in one line."""

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dhlnn_jax.errors import UsageError

# What NumPy and zipfile raise of files that are cut off, changed anywhere, or no archive at all; a changed
# header can ask for a compression that zipfile has not, or for a password (RuntimeError is of both).
_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    AttributeError,
    TypeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes beside the file and moves it into place, so that a kill leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def write_json(path: Path, values: Any) -> None:
    """Writes JSON by replacing the file; not-a-number is refused rather than written."""
    text = json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def plain(numbers: Any) -> Any:
    """A number, or an array as lists, in Python's own types; None for what is not finite: JSON has none."""
    array = np.asarray(numbers)
    return np.where(np.isfinite(array), array.astype(object), np.array(None)).tolist()


def from_plain(numbers: list[float | None]) -> np.ndarray:
    """What `plain` was given, but that infinities are not numbers."""
    return np.array([np.nan if x is None else x for x in numbers])


def read_json(path: Path) -> dict[str, Any]:
    """Contents of a file of `write_json` that holds an object. Raises: UsageError if it holds none."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError is one
        raise UsageError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: not a JSON object")
    return values


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. Raises: UsageError if it is missing, damaged, or holds anything else."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _DAMAGED as error:
        raise UsageError(f"{path}: not a readable .npz of plain arrays ({type(error).__name__})") from None
