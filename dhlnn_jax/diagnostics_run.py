"""The diagnostics of configured trainings of `dhlnn` over seeds: their files and their command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from dhlnn_jax import resumable
from dhlnn_jax.config import Config, load_config
from dhlnn_jax.diagnostics import make_diagnostics
from dhlnn_jax.diagnostics_figure import diagnostics_figure
from dhlnn_jax.diagnostics_report import print_diagnostics
from dhlnn_jax.files import write_json
from dhlnn_jax.fitting import build_hedger, build_update, make_contract
from dhlnn_jax.progress import progress_bar
from dhlnn_jax.script import Parser, config_first, config_line, exit_code
from dhlnn_jax.source import make_source
from dhlnn_jax.train import OBJECTIVES, TrainInfo, TrainState, first_state, fit, make_train_step

_FILE = "diagnostics.json"
_LOOKED_AT = (1, 2, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200)


def diagnose(config: Config, *, n_seeds: int = 5, checkpoint_folder: Path | None = None) -> dict[str, Any]:
    """The contents of diagnostics.json.

    Args:
      n_seeds: seeds config.seed, config.seed + 1, ...; a seed is initial parameters and training paths, those
        of `scripts/run.py --seed`. All are measured on the same fresh paths, by the same compiled programs.
      checkpoint_folder: keeps the numbers of every seed that is done, and those that it has are not computed
        again; None keeps none.
    Returns: "config", "seeds", and "by_seed": what `diagnostics.make_diagnostics` describes, for each seed.
    Raises: UsageError as `make_source`, and for checkpoints of other diagnostics.
    """
    told = _told(config, n_seeds)
    if checkpoint_folder is not None:
        resumable.begin(checkpoint_folder, told)
    key_test = jax.random.fold_in(jax.random.key(config.seed), 3)
    source, contract = make_source(config, key_test), make_contract(config)
    hedger, objective = build_hedger("dhlnn", config), OBJECTIVES[config.risk.kind]

    def update_of(n_inner: int):
        nested = config.nested.model_copy(update={"n_inner": n_inner, "tolerance": 0.0})
        return build_update("dhlnn", config.model_copy(update={"nested": nested}))

    n_epochs, n_inner = config.training.epochs, config.nested.n_inner
    update, init = update_of(n_inner), jax.jit(hedger.init)
    step = jax.jit(
        make_train_step(hedger, source.train, contract, objective, update, n_paths=config.training.n_paths)
    )
    diagnostics = make_diagnostics(
        hedger, source.train, contract, objective, source.settings, key_test,
        update_of=update_of, n_inner=n_inner, n_inner_shown=max(8, n_inner),
    )  # fmt: skip

    def of_seed(seed: int) -> dict[str, Any]:
        key_init, key_train = (jax.random.fold_in(jax.random.key(seed), role) for role in (0, 1))
        states = [first_state(init(key_init), update)]
        with progress_bar(f"seed {seed}: training dhlnn", n_epochs) as advance:

            def on_epoch(epoch: int, state: TrainState, info: TrainInfo) -> None:
                if epoch in _LOOKED_AT or epoch == n_epochs:
                    states.append(state)
                advance(note=f"risk {float(info.risk):.5f}")

            fit(step, states[0], key_train, source.settings, n_epochs=n_epochs, on_epoch=on_epoch)
        with progress_bar(f"seed {seed}: measuring {len(states)} epochs", None):
            return diagnostics(states)

    def kept(seed: int) -> dict[str, Any]:
        return resumable.kept(checkpoint_folder, f"seed_{seed}", lambda: of_seed(seed))

    return {**told, "by_seed": [kept(seed) for seed in told["seeds"]]}


def _told(config: Config, n_seeds: int) -> resumable.Told:
    return {
        "config": config.model_dump(mode="json"),
        "seeds": list(range(config.seed, config.seed + n_seeds)),
    }


def _parser() -> Parser:
    parser = Parser(
        prog="python scripts/diagnostics.py",
        usage="python scripts/diagnostics.py CONFIG [options] [--section.key value ...]",
        description="Trains dhlnn as the configuration says, once for each seed, and writes diagnostics.json "
        "and diagnostics.png to --out (default: results/CONFIG_diagnostics): error of the linearization, "
        "drift of the gradient, norms of gradient and Hessian beside the bounds, inner steps, and the share "
        "of decisions without a gradient.",
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, 1 to 100 (default: 5)")
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--overwrite", action="store_true", help="replace earlier diagnostics in the folder")
    folder.add_argument(
        "--resume", action="store_true", help="go on with those cut off, after their last seed"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the script; returns its exit code, that of `script.exit_code`."""
    interrupted = "; --resume goes on with the seed that was being trained"
    return exit_code("diagnostics.py", lambda: _run(arguments), interrupted=interrupted)


def _run(arguments: Sequence[str]) -> None:
    path, options, overrides = config_line(_parser(), arguments)
    config = load_config(config_first(path, "diagnostics.py CONFIG [--seeds 5] ..."), overrides)
    if not any(flag.partition("=")[0] == "--out" for flag in overrides):
        config = config.model_copy(update={"out": f"{config.out}_diagnostics"})
    folder = Path(config.out)
    checkpoints = resumable.claim(folder, _FILE, overwrite=options.overwrite, resume=options.resume)
    told = _told(config, options.seeds)
    results = resumable.finished(checkpoints, _FILE, told) if options.resume else None
    if results is None:
        results = diagnose(config, n_seeds=options.seeds, checkpoint_folder=checkpoints)
        write_json(folder / _FILE, results)
        resumable.discard(checkpoints)  # finished diagnostics are not resumed
    picture = folder / "diagnostics.png"
    diagnostics_figure(results).savefig(picture, dpi=150)
    print_diagnostics(results)
    print(f"results: {folder / _FILE}\nfigure: {picture}")
