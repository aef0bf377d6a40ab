"""The results folder: what a run leaves on disk, written whole or not at all, and read back.

config.toml       the resolved configuration
metrics.json      every number of the table, its standard error, counts and seconds
pnl.npz           per test path: payoff, final_spot, group_id, and <method>/{trading_gain,trading_cost,pnl}
                  (with several seeds these, the sample path and the bands are the first one's)
sample_path.npz   the first test path: spot, time, and <method>/{hedge_ratio,band_lower,band_upper}
bands.npz         simulated markets: spot, decision, and <method>/{band_lower,band_upper} over them
params/<method>/  parameters of the best and of the last epoch (orbax), of the first seed; those of
                  others in seed_<seed>/
meta.json         device, versions, commit, seconds, notes
*.png             figures, drawn from the files above by `figures`
"""

import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tomli_w

from dhlnn_jax.config import Config, make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.files import read_arrays, read_json, write_json, write_whole

# All that a run and its report write; overwriting would delete anything else with them.
_OURS = (
    "config.toml",
    "metrics.json",
    "meta.json",
    "pnl.npz",
    "sample_path.npz",
    "bands.npz",
    "params",
    "checkpoints",
)
_ARRAYS = ("pnl", "sample_path", "bands")
_OURS_SUFFIXES = (".png", ".partial")


@dataclass(frozen=True)
class Results:
    """A finished run, in memory.

    Attributes:
      config: the resolved configuration. metrics: contents of metrics.json. meta: contents of meta.json.
      pnl: contents of pnl.npz. sample_path: contents of sample_path.npz. bands: contents of bands.npz.
      folder: where they lie.
    """

    config: Config
    metrics: dict[str, Any]
    meta: dict[str, Any]
    pnl: dict[str, np.ndarray]
    sample_path: dict[str, np.ndarray]
    bands: dict[str, np.ndarray]
    folder: Path


def claim_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Checks that a run may write to `folder`.

    Raises: UsageError if it holds anything and neither overwriting nor resuming was asked for, or if what
      would be overwritten was not written by a run.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out = {str(folder)!r} is a file; name a folder")
    if not folder.exists() or not any(folder.iterdir()):
        if resume:
            raise UsageError(f"nothing to resume in {str(folder)!r}; run without --resume")
        return
    ours = (folder / "config.toml").exists()
    if resume:
        if not ours:
            raise UsageError(f"{str(folder)!r} was not written by a run (no config.toml); cannot resume")
        return
    if not overwrite:
        raise UsageError(
            f"results folder {str(folder)!r} exists; give --out another one, or --overwrite, or --resume"
        )
    if not ours:
        raise UsageError(f"{str(folder)!r} was not written by a run (no config.toml); not overwritten")
    foreign = sorted(p.name for p in folder.iterdir() if not (p.name in _OURS or p.suffix in _OURS_SUFFIXES))
    if foreign:
        raise UsageError(f"{str(folder)!r} also holds {foreign[0]!r}, which no run wrote; not overwritten")


def open_folder(folder: Path, config: Config, *, overwrite: bool, resume: bool) -> None:
    """Makes the folder (emptied if overwriting) and writes config.toml.

    Raises: UsageError if a run with another configuration is to be resumed.
    """
    if resume:
        if read_config(folder).model_dump(exclude={"out"}) != config.model_dump(exclude={"out"}):
            raise UsageError(f"{str(folder)!r} was begun with another configuration; use --overwrite")
        return
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the results folder {str(folder)!r}: {error.strerror}") from None
    values = _without_none(config.model_dump(mode="json"))
    write_whole(folder / "config.toml", lambda file: tomli_w.dump(values, file))


def write_results(results: Results) -> None:
    """Writes everything but parameters and figures; metrics.json comes last and marks the run as finished."""
    folder = results.folder
    for name in _ARRAYS:
        write_whole(folder / f"{name}.npz", partial(np.savez_compressed, **getattr(results, name)))
    write_json(folder / "meta.json", results.meta)
    write_json(folder / "metrics.json", results.metrics)


def read_results(folder: str | Path) -> Results:
    """A finished run, from its folder alone.

    Raises: UsageError if there is no finished run in the folder, or one of its files is damaged.
    """
    folder = Path(folder)
    for name in ("config.toml", "metrics.json", "meta.json", *(f"{name}.npz" for name in _ARRAYS)):
        if not (folder / name).exists():
            raise UsageError(f"{str(folder)!r} holds no finished run: {name} is missing")
    return Results(
        config=read_config(folder),
        metrics=read_json(folder / "metrics.json"),
        meta=read_json(folder / "meta.json"),
        pnl=read_arrays(folder / "pnl.npz"),
        sample_path=read_arrays(folder / "sample_path.npz"),
        bands=read_arrays(folder / "bands.npz"),
        folder=folder,
    )


def params_folder(folder: Path, method: str, seed: int | None = None) -> Path:
    """Where "best" and "last" parameters of a method lie; seed: one of the others than the run's first."""
    return folder / "params" / method / ("" if seed is None else f"seed_{seed}")


def read_config(folder: Path) -> Config:
    """The resolved configuration of a results folder. Raises: UsageError if there is none."""
    path = folder / "config.toml"
    if not path.exists():
        raise UsageError(f"{str(folder)!r} is not a results folder: config.toml is missing")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable as TOML: {error}") from None
    return make_config(values, source=str(path))


def machine() -> dict[str, Any]:
    """Device, versions and commit, for meta.json."""
    names = ("dhlnn-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "device": device_name(),
        "versions": {name: metadata.version(name) for name in names},
        "commit": _commit(),
    }


def device_name() -> str:
    """The device arrays live on, such as "cpu" or "NVIDIA H100 80GB HBM3"."""
    return jax.devices()[0].device_kind


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null; an option left out means its default, which is None for these."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }
