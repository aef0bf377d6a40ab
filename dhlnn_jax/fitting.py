"""What a configuration's methods are built from: hedgers, contracts, policies, updates; and one evaluator."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike

from dhlnn_jax.clamp_choice import fastest_clamp
from dhlnn_jax.config import Config
from dhlnn_jax.errors import UsageError
from dhlnn_jax.evaluate import HedgedPaths
from dhlnn_jax.fleet import TRACED_OPTIONS, fleet_evaluator, stacked
from dhlnn_jax.hedge import DELTAS
from dhlnn_jax.hedger import Hedger, Policy, policy_of
from dhlnn_jax.market import MarketPath
from dhlnn_jax.methods import METHODS, RuleOptions
from dhlnn_jax.nested import Update, nested_update, optax_update
from dhlnn_jax.newton import newton_update
from dhlnn_jax.optimal import solve_contract
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import COST_MODELS, Contract
from dhlnn_jax.settings import Settings
from dhlnn_jax.source import Source

Params = Any

# Operations of a training that saves by pieces what they take longer to compile (docs/performance.md).
_WORTH_PIECES = 3e11


def build_hedger(name: str, config: Config) -> Hedger:
    """The trainable hedger of a method."""
    method, model = METHODS[name], config.model
    assert method.make_hedger is not None
    # The paper's lineage centres the band of a lookback on the European delta.
    default = "european_put" if config.contract.kind == "european_put" else "european_call"
    extra: dict[str, Any] = {"form": model.form}
    if not method.recurrent:
        extra = {"prior": model.prior, "clamp": clamp_of(config)}
    return _hedger(
        method.make_hedger,
        features=tuple(model.features),
        hidden_sizes=tuple(model.hidden_sizes),
        centre=DELTAS[model.centre or default],
        centre_strike=model.centre_strike,
        **extra,
    )


def clamp_of(config: Config) -> str:
    """The form of the band's recursion over time: a key of `hedge.CLAMPS`."""
    return fastest_clamp(config.market.n_steps) if config.model.clamp == "auto" else config.model.clamp


@lru_cache(maxsize=32)  # methods of the same network share its hedger, and what is compiled of it
def _hedger(make_hedger: Callable[..., Hedger], **choices: Any) -> Hedger:
    return make_hedger(**choices)


def make_contract(config: Config) -> Contract:
    """The contract record of a configuration."""
    return Contract(
        CLAIMS[config.contract.kind],
        cost_model=COST_MODELS[config.cost.kind],
        liquidate=config.cost.liquidate,
        charge_half_spread=config.cost.charge == "half_spread",
    )


def build_policy(name: str, config: Config, market_settings: Settings) -> Policy:
    """The policy of any method, trained or not.

    Args:
      market_settings: of the market that is hedged in, for `optimal`.
    """
    make_rule = METHODS[name].make_rule
    if make_rule is None:
        return policy_of(build_hedger(name, config))
    rules, optimum = config.rules, None
    if name == "optimal":
        optimum = solve_contract(make_contract(config), market_settings, n_steps=config.market.n_steps)
    return make_rule(RuleOptions(config.contract.kind, rules.rebalance_every, rules.half_width, optimum))


def rate_option(name: str, config: Config) -> str:
    """The option that says a method's learning rate."""
    own = METHODS[name].update == "nested" and config.nested.learning_rate is not None
    return "nested.learning_rate" if own else "training.learning_rate"


def learning_rate(name: str, config: Config) -> float:
    """Of a method's updates, after the warm-up."""
    section, option = rate_option(name, config).split(".")
    return getattr(getattr(config, section), option)


def remedy(name: str, config: Config) -> str:
    """What to change when training a method runs away."""
    if METHODS[name].update == "newton":
        return f"raise newton.damping = {config.newton.damping:g}"
    return f"lower {rate_option(name, config)} = {learning_rate(name, config):g}"


def build_update(
    name: str, config: Config, rate: ArrayLike | None = None, epochs: ArrayLike | None = None
) -> Update:
    """How a method's parameters are moved.

    Args:
      rate, epochs: learning rate and epochs in all, which may be traced, in place of the configured ones.
    """
    nested, newton = config.nested, config.newton
    rate = learning_rate(name, config) if rate is None else rate
    if METHODS[name].update == "optimizer":
        return optax_update(_optimizer(config, rate, epochs))
    if METHODS[name].update == "newton":
        layer = build_hedger(name, config).output_layer
        assert layer is not None
        return newton_update(layer, n_inner=newton.n_inner, damping=newton.damping, burn_in=newton.burn_in)
    return nested_update(
        _optimizer(config, rate, epochs),
        learning_rate=_schedule(config, rate, epochs),
        n_inner=nested.n_inner,
        tolerance=nested.tolerance,
        risk_weights=nested.risk_weights,
        cost_surrogate=nested.cost_surrogate,
        inner_update=nested.inner_update,
        linearization=nested.linearization,
    )


def rows_options(name: str, config: Config, *, compiled_free: bool = False) -> dict[str, Any]:
    """How decisions go through a method's network in training: chunk_size and by_pieces of `make_train_step`.

    A CPU is fastest on chunks that stay in its cache, an accelerator on everything at once. Gauss-Newton sums
    over the inputs of the output layer at every row, and so goes by rows.

    Args:
      compiled_free: only running counts, as where many trainings or steps share a program.
    """
    training, on_cpu = config.training, jax.default_backend() == "cpu"
    by_pieces = training.by_pieces == "always"
    if by_pieces and not on_cpu and training.chunk_size is None:
        raise UsageError("training.by_pieces 'always' needs a training.chunk_size on an accelerator")
    if training.by_pieces == "auto" and on_cpu and training.n_paths >= 8 * sum(config.model.hidden_sizes):
        n_gradients = config.nested.n_inner if METHODS[name].update == "nested" else 1
        operations = dense_operations(config) * n_gradients * training.epochs
        by_pieces = compiled_free or operations > _WORTH_PIECES
    by_pieces = by_pieces and METHODS[name].update != "newton"
    return {"chunk_size": training.chunk_size or (500 if on_cpu else None), "by_pieces": by_pieces}


def dense_operations(config: Config) -> int:
    """Floating-point operations of a step's products, forward and backward, if no row is skipped."""
    sizes = [len(config.model.features), *config.model.hidden_sizes, 2]
    products = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    return 3 * 2 * products * config.training.n_paths * config.market.n_steps


def made_from(what: str, config: Config, source: Source) -> str | None:
    """Of a configuration, all that one of its programs depends on, for `traces.compiled`.

    Args:
      what: which program, the method's name for its training.
    Returns: None if the configuration does not say it: recorded prices, which the program holds, and samplers
      from elsewhere.
    """
    if not source.from_config:
        return None
    values = config.model_dump(mode="json")
    for part in ("out", "seed", "methods", "evaluation"):
        del values[part]
    for option in TRACED_OPTIONS:
        section, number = option.split(".")
        values[section][number] = None
    return f"{what} {values!r}"


def shared_made_from(what: str, name: str, config: Config, source: Source) -> str | None:
    """The same of a program that methods on one network share, as its evaluation; alike for all of them."""
    network = METHODS[name].make_hedger
    return made_from(f"{what} {network.__name__ if network else name}", config, source)


def _schedule(config: Config, rate: Any, epochs: Any = None) -> optax.Schedule:
    training = config.training
    after = jnp.maximum((training.epochs if epochs is None else epochs) - training.warmup, 1)

    def cosine(count: ArrayLike) -> ArrayLike:  # optax's own takes no traced number of steps
        return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(count, after) / after))

    main = cosine if training.schedule == "cosine" else optax.constant_schedule(rate)
    if not training.warmup:
        return main
    # The first step has a rate above zero: (epoch + 1) / warmup of the full one.
    rising = optax.linear_schedule(rate / training.warmup, rate, max(training.warmup - 1, 1))
    return optax.join_schedules([rising, main], [training.warmup])


def _optimizer(config: Config, rate: Any, epochs: Any = None) -> optax.GradientTransformation:
    return getattr(optax, config.training.optimizer)(_schedule(config, rate, epochs))


def evaluator(policy: Policy, contract: Contract) -> Callable[[Params, MarketPath, Settings], HedgedPaths]:
    """`hedged_paths` of one policy, in blocks of one size, so that any number of paths compiles once."""
    of_members = fleet_evaluator(policy, contract)

    def evaluate(params: Params, paths: MarketPath, settings: Settings) -> HedgedPaths:
        alone = jax.tree.map(lambda x: jnp.asarray(x)[None], params)
        return jax.tree.map(lambda x: jnp.asarray(x[0]), of_members(alone, [paths], stacked([settings])))

    return evaluate
