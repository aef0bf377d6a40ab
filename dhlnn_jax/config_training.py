"""The sections of the configuration that say how hedgers are made, trained and measured."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dhlnn_jax.config_problem import Section, one_of
from dhlnn_jax.features import FEATURES
from dhlnn_jax.hedge import DELTAS
from dhlnn_jax.nested import PRESETS, CostSurrogate, InnerUpdate, LinearizationKind, RiskWeights

OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "nadam", "radam", "adabelief", "lion")


class ModelConfig(Section):
    """The networks of the trained methods."""

    hidden_sizes: tuple[int, ...] = Field((64, 64, 64, 64), description="widths of the ReLU layers")
    features: tuple[str, ...] = Field(
        ("standardised_log_moneyness", "standardised_time_to_maturity", "deviations_from_strike"),
        description="inputs of the network, names from dhlnn_jax.features",
    )
    centre: str | None = Field(
        None, description="claim whose delta the band is built around; default: European call or put"
    )
    centre_strike: float | None = Field(None, gt=0, description="its strike, money; default contract.strike")
    form: Literal["delta_plus_tanh", "direct"] = Field("delta_plus_tanh", description="position of dhmlp")
    prior: Literal["none", "whalley_wilmott"] = Field(
        "none", description="band networks learn a correction to this band; the correction starts at 0"
    )
    clamp: Literal["auto", "scan", "parallel"] = Field(
        "auto",
        description="a band's recursion over time, parallel in log2(n_steps) rounds; auto: scan on a CPU, "
        "where it is 6 to 13 times faster, else the faster one, measured once for a horizon and kept",
    )

    @field_validator("hidden_sizes")
    @classmethod
    def _positive(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or min(sizes) < 1:
            raise ValueError(f"model.hidden_sizes must be one or more positive widths, got {list(sizes)}")
        return sizes

    @field_validator("features")
    @classmethod
    def _known_features(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("model.features must name at least one feature")
        return tuple(one_of("feature in model.features", name, tuple(FEATURES)) for name in names)

    @field_validator("centre")
    @classmethod
    def _known_centre(cls, name: str | None) -> str | None:
        return None if name is None else one_of("model.centre", name, tuple(DELTAS))


class RulesConfig(Section):
    """The rules that have a number of their own."""

    rebalance_every: int = Field(5, gt=0, description="periodic_delta: steps between two trades")
    half_width: float = Field(0.1, ge=0, description="fixed_band: units of the underlying")


class TrainingConfig(Section):
    """How the networks are trained."""

    epochs: int = Field(60, gt=0, description="updates, each on fresh paths")
    n_paths: int = Field(10_000, gt=1, description="paths an epoch")
    learning_rate: float = Field(1e-3, gt=0, description="of the optimizer, a pure number")
    optimizer: str = Field(
        "adam", description=f"from optax, at its defaults but for the rate: {', '.join(OPTIMIZERS)}"
    )
    warmup: int = Field(0, ge=0, description="epochs of linear learning-rate warm-up")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    chunk_size: int | None = Field(
        None, gt=0, description="decisions through the network at a time; default 500 on a CPU, else all"
    )
    by_pieces: Literal["auto", "always", "never"] = Field(
        "auto",
        description="networks of time and moneyness alone are trained from two points of every linear piece, "
        "the same to rounding in a fraction of the time; auto: on a CPU, where training is long enough to "
        "save what that takes longer to compile",
    )
    devices: int | None = Field(
        None, gt=0, description="that share the paths; default all: accelerators, or the cores of a CPU"
    )
    validation_paths: int = Field(10_000, gt=1, description="paths of the validation risk")
    validation_every: int = Field(5, gt=0, description="epochs between two validation risks")
    checkpoint_every: int = Field(50, gt=0, description="epochs between two checkpoints")

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        return one_of("training.optimizer", name, OPTIMIZERS)


class NestedConfig(Section):
    """Nested training on the linearized objective (dhlnn): Algorithm 1 and its choices."""

    preset: Literal["default", "as_printed"] = Field(
        "default", description="as_printed: every choice as the paper prints it, unless set here"
    )
    n_inner: int = Field(5, gt=0, description="inner iterations N")
    tolerance: float = Field(0.0, ge=0, description="stop when an inner step is shorter than this")
    learning_rate: float | None = Field(None, gt=0, description="default: training.learning_rate")
    risk_weights: RiskWeights = Field(
        "refreshed", description="derivative of the risk to each PnL: at every inner step, or once"
    )
    cost_surrogate: CostSurrogate = Field("absolute", description="cost in the inner iterations")
    inner_update: InnerUpdate = Field(
        "frozen_preconditioner", description="how an inner gradient becomes a step; see dhlnn_jax.nested"
    )
    linearization: LinearizationKind = Field(
        "network", description="what is linearized: raw outputs or hedge ratio"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") in PRESETS:
            return {**PRESETS[given["preset"]], **given}
        return given


class NewtonConfig(Section):
    """Gauss-Newton steps on the output layer (dhlnn_newton); see dhlnn_jax.newton."""

    n_inner: int = Field(1, gt=0, description="steps on the same batch")
    damping: float = Field(0.01, gt=0, description="of the first steps, relative to the mean curvature")
    burn_in: int = Field(3, ge=0, description="epochs of whole steps before averaging over epochs")


class TestMarketConfig(Section):
    """What differs when the hedgers are tested (simulated markets)."""

    __test__ = False  # no pytest class

    volatility: float | None = Field(None, ge=0, description="per square root of a year; default as trained")
    drift: float | None = Field(None, description="per year; default as trained")


class EvaluationConfig(Section):
    """How the trained hedgers are measured."""

    n_paths: int = Field(100_000, gt=1, description="test paths (simulated markets)")
    epochs: tuple[int, ...] = Field((), description="also measure after these epochs")
    optimum: bool = Field(
        True, description="solve for the exact optimum where there is one, and report regret to it"
    )
    parameters: Literal["best", "last"] | None = Field(
        None, description="by validation risk, or of the last epoch; default: last if the schedule is cosine"
    )
    volatility_seen: Literal["stale", "refreshed"] = Field(
        "stale", description="volatility hedgers go by under evaluation.market.volatility"
    )
    market: TestMarketConfig = TestMarketConfig()
