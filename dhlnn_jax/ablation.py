"""What an ablation compares: variants of nested training and their controls, and what each of them costs.

A variant is a few options laid over one configuration, so that `scripts/run.py` can train any of them alone.
eta is the learning rate of nested training (`nested.learning_rate`, else `training.learning_rate`), N is
`nested.n_inner`; warm-up and schedule are the configuration's for all.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
from jaxtyping import PRNGKeyArray

from dhlnn_jax.config import Config, make_config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.hedger import Hedger
from dhlnn_jax.market import Sampler
from dhlnn_jax.methods import METHODS
from dhlnn_jax.train import CURVATURES

Study = Literal["optimizers", "noise", "data"]
STUDIES: tuple[Study, ...] = get_args(Study)
FRESH_PATHS = (100, 300, 1_000, 3_000, 10_000)  # paths an epoch of "noise"
FIXED_PATHS = (300, 1_000, 3_000)  # size of the data sets of "data"
PRICE_NOISE = (0.2, 1.0)  # noise of "data", in standard deviations of one step's return
REFERENCE = "dhlnn"


class Variant(NamedTuple):
    """One row of an ablation, trained once for every seed.

    Attributes:
      label: how tables and figures call it.
      update: the method whose update moves the parameters: "dhlnn" (nested), "dhntb" (the optimizer) or
        "dhlnn_newton".
      options: dotted option -> value, over `base_config`.
      groups: the figures that show it.
      reference: the variant that it is compared with, path by path and seed by seed.
      slower: it trains this many times more epochs and is measured that much later.
      fixed_data: every epoch has the paths of the first.
      price_noise: of the prices that the hedger sees, in standard deviations of one step's return.
    """

    label: str
    update: str
    options: dict[str, Any]
    groups: tuple[str, ...] = ()
    reference: str = REFERENCE
    slower: int = 1
    fixed_data: bool = False
    price_noise: float = 0.0


class Passes(NamedTuple):
    """How often all decisions of a batch went through the network: values, tangents, cotangents."""

    forward: float
    jvp: float
    vjp: float


def passes(config: Config, update: str, *, n_updates: int, n_gradients: float) -> Passes:
    """Passes of so many updates, which took so many gradients together.

    Optimizer: 1 forward and 1 VJP an update. Nested, n inner steps taken: 1 forward, 1 VJP for the exact
    gradient, 1 more for g_0 if the cost is a surrogate; then for each of the n - 1 others 1 JVP and 1 VJP of
    the linearized network, 1 forward and 1 VJP where nothing is linearized, nothing where the direction is
    frozen. Gauss-Newton: 1 forward an update, and 1 VJP a step that ends at the output layer. So VJP =
    n_gradients in all cases.

    Numerics: what `rows` recomputes is not counted: with chunks every JVP runs forward again, and every VJP
      does for the rows whose cotangent is not zero, which are also the only ones that it looks at.
    """
    nested = update == "dhlnn"
    n_first = 2 if nested and config.nested.cost_surrogate != "absolute" else 1
    n_further = n_gradients - n_first * n_updates
    if update == "dhlnn_newton":
        return Passes(n_updates, 0, n_gradients)
    if nested and config.nested.linearization == "none":
        return Passes(n_updates + n_further, 0, n_gradients)
    return Passes(n_updates, n_further, n_gradients)


def base_config(config: Config, options: dict[str, Any]) -> Config:
    """The configuration with the default nested options but for N, tolerance and eta, and then `options`."""
    values = config.model_dump()
    nested = config.nested
    values["nested"] = {
        "n_inner": nested.n_inner,
        "tolerance": nested.tolerance,
        "learning_rate": learning_rate(config),
    }
    for name, value in options.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return make_config(values, source="ablation")


def learning_rate(config: Config) -> float:
    """eta."""
    return config.nested.learning_rate or config.training.learning_rate


def variants_of(
    study: Study,
    config: Config,
    paths: Sequence[int] = (),
    rows: Sequence[str] = (),
    *,
    hedger: str = "dhntb",
) -> dict[str, Variant]:
    """The rows of a study by name, in the order of its table.

    Args:
      paths: sizes in place of `FRESH_PATHS` or `FIXED_PATHS`.
      rows: only these of the optimizers, and the reference; by default all of them for "optimizers", those of
        the group "controls" for "noise" and "data".
      hedger: the method whose network is trained; Gauss-Newton is for the band.
    Raises: UsageError for an unknown study or row, N = 1 (there is nothing to ablate), sizes for
      "optimizers", and for "noise" and "data" on recorded prices.
    """
    if study not in STUDIES:
        raise UsageError(f"--study must be one of {', '.join(STUDIES)}, got {study!r}")
    if config.nested.n_inner < 2:
        raise UsageError(f"nested.n_inner must be at least 2 in an ablation, got {config.nested.n_inner}")
    optimizers = _optimizers(config)
    if METHODS[hedger].recurrent or config.risk.kind not in CURVATURES:
        del optimizers["newton"]
    controls = tuple(name for name, variant in optimizers.items() if "controls" in variant.groups)
    wanted = rows or (tuple(optimizers) if study == "optimizers" else controls)
    for row in wanted:
        if row not in optimizers:
            raise UsageError(f"unknown row {row!r}; allowed: {', '.join(optimizers)}")
    chosen = {name: variant for name, variant in optimizers.items() if name in (REFERENCE, *wanted)}
    if study == "optimizers":
        if paths:
            raise UsageError("--paths belongs to --study noise and data; set --training.n_paths")
        return chosen
    if config.market.recorded:
        raise UsageError(f"--study {study} needs a simulated market, market.kind is {config.market.kind!r}")
    if any(n < 2 for n in paths):
        raise UsageError(f"--paths must be at least 2, got {min(paths)}")
    levels = {}
    if study == "noise":
        for n in paths or FRESH_PATHS:
            levels[f"{n}"] = _Level(f"{n:,} paths", {"training.n_paths": n})
    else:
        for n in paths or FIXED_PATHS:
            levels[f"fixed {n}"] = _Level(f"the same {n:,} paths", {"training.n_paths": n}, fixed_data=True)
        for x in PRICE_NOISE:
            levels[f"noisy {x:g}"] = _Level(f"price noise {x:g}", {}, price_noise=x)
    return {
        f"{name} @ {level}": variant._replace(
            label=f"{variant.label}; {change.label}",
            options=variant.options | change.options,
            groups=(level,),
            reference=f"{REFERENCE} @ {level}",
            fixed_data=change.fixed_data,
            price_noise=change.price_noise,
        )
        for level, change in levels.items()
        for name, variant in chosen.items()
    }


class _Level(NamedTuple):
    """What all variants of one level of "noise" or "data" have in common."""

    label: str
    options: dict[str, Any]
    fixed_data: bool = False
    price_noise: float = 0.0


def _optimizers(config: Config) -> dict[str, Variant]:
    n, eta = config.nested.n_inner, learning_rate(config)
    optimizer = config.training.optimizer.capitalize()

    def nested(label: str, *groups: str, **options: Any) -> Variant:
        return Variant(label, "dhlnn", {f"nested.{name}": value for name, value in options.items()}, groups)

    def plain(label: str, rate: float, slower: int = 1) -> Variant:
        options = {"training.learning_rate": rate, "training.epochs": slower * config.training.epochs}
        return Variant(label, "dhntb", options, ("controls",), slower=slower)

    rows = {
        REFERENCE: nested(f"DHLNN, N = {n}", "controls", "objective", "inner"),
        "adam": plain(f"{optimizer}, η", eta),
        "adam_n_eta": plain(f"{optimizer}, Nη", n * eta),
        # With one inner step the frozen preconditioner is Adam with b1 = 0.
        "no_momentum": nested("Adam b1 = 0, η", "controls", n_inner=1),
        "no_momentum_n_eta": nested("Adam b1 = 0, Nη", "controls", n_inner=1, learning_rate=n * eta),
        "adam_same_batch": nested(
            f"{n} {optimizer} steps, same batch",
            "controls",
            "inner",
            linearization="none",
            inner_update="adam",
        ),
        "adam_more_epochs": plain(f"{optimizer}, η, {n}× the epochs", eta, slower=n),
        "not_linearized": nested("DHLNN, real network inside", "inner", linearization="none"),
        "position": nested("hedge ratio linearized", "objective", linearization="position"),
        "frozen_weights": nested("risk weights frozen", "objective", risk_weights="frozen"),
        "squared_difference": nested("cost (13)", "objective", cost_surrogate="squared_difference"),
        "difference_of_squares": nested(
            "cost (14) as printed", "objective", cost_surrogate="difference_of_squares"
        ),
        "as_printed": nested("all as printed", "objective", preset="as_printed"),
        "frozen_state": nested("frozen state", "inner", inner_update="frozen_state"),
        "frozen_direction": nested("frozen direction", "inner", inner_update="frozen_direction"),
        "sgd": nested("SGD (15)", "inner", inner_update="sgd"),
        "inner_adam": nested("running Adam", "inner", inner_update="adam"),
        "newton": Variant("output layer, Gauss–Newton", "dhlnn_newton", {}, ("controls", "inner")),
    }
    if config.training.learning_rate != eta:
        label = f"{optimizer}, {config.training.learning_rate:g}"
        rows["adam_configured"] = Variant(label, "dhntb", {}, ("controls",))
    return rows


def measured_epochs(config: Config) -> tuple[int, ...]:
    """`evaluation.epochs`, or 1, 2, 3, 5, 7, 10, 15, ... to the last; the last and 1/N of it in any case."""
    last, n = config.training.epochs, config.nested.n_inner
    default = {x * 10**d // 10 for d in range(7) for x in (10, 15, 20, 30, 50, 70)}
    asked = config.evaluation.epochs or default
    return tuple(sorted({e for e in asked if e < last} | {max(last // n, 1), last}))


def with_price_noise(sample: Sampler, noise: float) -> Sampler:
    """The same paths with the relative errors of seen prices, independent normals, in `half_spread`.

    The field is free for it: simulated markets quote no spread. `seeing_noise` reads it and nothing else.

    Args:
      noise: in standard deviations of one step's return, volatility sqrt(dt).
    """

    def draw(key: PRNGKeyArray, n_paths: int, settings):
        paths, groups = sample(key, n_paths, settings)
        deviation = noise * settings.volatility * settings.dt**0.5
        errors = deviation * jax.random.normal(jax.random.fold_in(key, 1), paths.spot.shape)
        return paths._replace(half_spread=errors), groups

    return draw


def seeing_noise(hedger: Hedger) -> Hedger:
    """A hedger whose features and delta come from spot (1 + error), on paths of `with_price_noise`."""

    def inputs(path, settings):
        seen = path._replace(spot=path.spot * (1.0 + path.half_spread), half_spread=None)
        return hedger.inputs(seen, settings)

    return hedger._replace(inputs=inputs, piecewise=None)
