"""The diagnostics of one configured training of `dhlnn`: its files and its command line."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from dhlnn_jax.config import Config, load_config
from dhlnn_jax.diagnostics import diagnostics_along_training
from dhlnn_jax.diagnostics_figure import diagnostics_figure
from dhlnn_jax.errors import UsageError
from dhlnn_jax.fitting import build_hedger, build_update, make_contract
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.results import write_json
from dhlnn_jax.source import make_source
from dhlnn_jax.train import OBJECTIVES, TrainInfo, TrainState, fit, init_state, make_train_step

_USAGE = """usage: python scripts/diagnostics.py CONFIG [--section.key value ...] [--overwrite]

Trains dhlnn as the configuration says and writes diagnostics.json and diagnostics.png to its `out`: error of
the linearization, drift of the gradient, norms of gradient and Hessian beside the bounds, inner steps,
and the share of decisions without a gradient.
"""
_LOOKED_AT = (1, 2, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200)


def main(arguments: Sequence[str]) -> int:
    """Runs the script; returns its exit code: 0, 2 for a mistake in what was given, 130 if interrupted."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(_USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    try:
        path, *overrides = [argument for argument in arguments if argument != "--overwrite"]
        config = load_config(path, overrides)
        for written in run(config, overwrite="--overwrite" in arguments):
            print(f"written: {written}")
        return 0
    except (UsageError, OSError) as error:
        print(f"diagnostics.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("diagnostics.py: interrupted, nothing written", file=sys.stderr)
        return 130


def run(config: Config, *, overwrite: bool = False) -> list[Path]:
    """Trains, measures, and writes; returns what was written. Raises: UsageError for files that are there."""
    folder = Path(config.out)
    table, picture = folder / "diagnostics.json", folder / "diagnostics.png"
    if table.exists() and not overwrite:
        raise UsageError(f"{table} exists: give another --out, or --overwrite to replace it")
    key_init, key_train, _, key_test = (
        jax.random.fold_in(jax.random.key(config.seed), role) for role in range(4)
    )
    source, contract = make_source(config, key_test), make_contract(config)
    hedger, objective = build_hedger("dhlnn", config), OBJECTIVES[config.risk.kind]

    def update_of(n_inner: int):
        nested = config.nested.model_copy(update={"n_inner": n_inner, "tolerance": 0.0})
        return build_update("dhlnn", config.model_copy(update={"nested": nested}))

    n_epochs, n_inner = config.training.epochs, config.nested.n_inner
    update = update_of(n_inner)
    step = jax.jit(
        make_train_step(hedger, source.train, contract, objective, update, n_paths=config.training.n_paths)
    )
    state = init_state(hedger, update, key_init)
    states = [state]
    with progress_bar("training dhlnn", n_epochs) as advance:

        def on_epoch(epoch: int, state: TrainState, info: TrainInfo) -> None:
            if epoch in _LOOKED_AT or epoch == n_epochs:
                states.append(state)
            advance(note=f"risk {float(info.risk):.5f}")

        fit(step, state, key_train, source.settings, n_epochs=n_epochs, on_epoch=on_epoch)
    with progress_bar(f"measuring {len(states)} epochs", None):
        numbers = diagnostics_along_training(
            hedger, source.train, contract, objective, source.settings, states, key_test,
            update_of=update_of, n_inner=n_inner, n_inner_shown=max(8, n_inner),
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_json(table, {"config": config.model_dump(mode="json"), **numbers})
    diagnostics_figure(numbers).savefig(picture, dpi=150)
    return [table, picture]
