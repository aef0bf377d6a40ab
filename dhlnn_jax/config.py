"""The validated configuration: every option with its unit, its default and what is allowed.

`load_config` reads TOML, lays command-line overrides over it and validates both the same way, so that a
mistake in either gives the same one-line `UsageError`.
"""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dhlnn_jax.errors import UsageError
from dhlnn_jax.features import FEATURES
from dhlnn_jax.hedge import DELTAS
from dhlnn_jax.market import SIMULATORS, NoiseKind
from dhlnn_jax.methods import METHODS
from dhlnn_jax.nested import PRESETS, CostSurrogate, InnerUpdate, LinearizationKind, RiskWeights
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import COST_MODELS
from dhlnn_jax.settings import Settings
from dhlnn_jax.train import CURVATURES, OBJECTIVES

RECORDED = ("history", "order_book", "paths_file")
OPTIMIZERS = ("adam", "adamw", "sgd", "rmsprop", "nadam", "radam", "adabelief", "lion")


def one_of(name: str, given: str, allowed: Sequence[str]) -> str:
    """`given`, if it is allowed. Raises: ValueError with the nearest allowed name and all of them."""
    if given in allowed:
        return given
    near = difflib.get_close_matches(given, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {name} {given!r}; {hint}allowed: {', '.join(allowed)}")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MarketConfig(_Section):
    """Where prices come from."""

    kind: str = Field(
        "gbm", description=f"simulated: {', '.join(SIMULATORS)}; recorded: {', '.join(RECORDED)}"
    )
    n_steps: int = Field(30, gt=0, description="number of hedging decisions")
    dt: float | None = Field(
        None, gt=0, description="years between decisions; default 1/365 simulated, 1/252 daily closes"
    )
    volatility: float = Field(0.2, ge=0, description="per square root of a year (simulated markets)")
    drift: float = Field(0.0, description="per year (simulated markets)")
    spot0: float = Field(1.0, gt=0, description="first price, money")
    noise: NoiseKind = Field("pseudo", description="how training normals are drawn")
    parameters: dict[str, float] = Field({}, description="further numbers of a simulator: name=number ...")
    path: str | None = Field(None, description="file or folder of recorded prices; history has its own")
    tickers: tuple[str, ...] | None = Field(None, description="history: use only these")
    test_fraction: float = Field(0.35, gt=0, lt=1, description="recorded: last part of the time that tests")
    target_volatility: float | None = Field(
        None, gt=0, description="recorded: rescale log returns to this, factor fitted on training part"
    )
    wap: Literal["auto", "level_average", "cross_weighted"] = Field(
        "auto", description="order_book: which weighted average price"
    )

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        return one_of("market.kind", kind, (*SIMULATORS, *RECORDED))

    @model_validator(mode="after")
    def _complete(self) -> "MarketConfig":
        if self.kind in ("order_book", "paths_file") and self.path is None:
            raise ValueError(f"market.kind {self.kind!r} needs market.path, none was given")
        if self.kind == "paths_file" and self.dt is None:
            raise ValueError("market.kind 'paths_file' needs market.dt (years between prices)")
        if self.kind in SIMULATORS:
            keywords = SIMULATORS[self.kind].keywords
            wanted = {name for name in keywords if name not in Settings._fields}
            if wanted != set(self.parameters):
                raise ValueError(
                    f"market.parameters of {self.kind!r} must be {sorted(wanted) or 'empty'}, "
                    f"got {sorted(self.parameters)}"
                )
        if self.kind in SIMULATORS and self.target_volatility is not None:
            raise ValueError("market.target_volatility rescales recorded prices only; set market.volatility")
        return self

    @property
    def recorded(self) -> bool:
        return self.kind in RECORDED

    @property
    def years_per_step(self) -> float:
        if self.dt is not None:
            return self.dt
        if self.kind == "order_book":
            from dhlnn_jax.orderbook import LAST_SECOND, SECONDS_PER_YEAR

            return LAST_SECOND / self.n_steps / SECONDS_PER_YEAR
        return 1 / 252 if self.kind == "history" else 1 / 365


class ContractConfig(_Section):
    """What the seller owes."""

    kind: str = Field("european_call", description=", ".join(CLAIMS))
    strike: float = Field(1.0, gt=0, description="money; spot starts at market.spot0")
    maturity: float | None = Field(None, gt=0, description="years; default n_steps * dt")
    premium: float = Field(0.0, description="money received at the start")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        return one_of("contract.kind", kind, tuple(CLAIMS))


class CostConfig(_Section):
    """What trading costs."""

    kind: str = Field("proportional", description=", ".join(COST_MODELS))
    rate: float = Field(2e-3, ge=0, lt=1, description="fraction of the traded notional")
    liquidate: bool = Field(False, description="charge the sale of the last position")
    charge: Literal["rate", "half_spread"] = Field(
        "rate", description="cost.rate, or the half-spread quoted on each path at each time"
    )

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        return one_of("cost.kind", kind, tuple(COST_MODELS))


class RiskConfig(_Section):
    """What is minimized, and the parameters of the reported risks."""

    kind: str = Field("entropic", description=f"what is minimized: {', '.join(OBJECTIVES)}")
    risk_aversion: float = Field(50.0, gt=0, description="lambda, 1/money")
    tail_prob: float = Field(0.1, gt=0, lt=1, description="worst fraction (0.1 is ES at alpha 0.9)")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        return one_of("risk.kind", kind, tuple(OBJECTIVES))


class ModelConfig(_Section):
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
    clamp: Literal["scan", "parallel"] = Field(
        "scan",
        description="a band's recursion over time; parallel takes log2(n_steps) rounds, for accelerators: "
        "on a CPU it is ten times slower",
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


class RulesConfig(_Section):
    """The rules that have a number of their own."""

    rebalance_every: int = Field(5, gt=0, description="periodic_delta: steps between two trades")
    half_width: float = Field(0.1, ge=0, description="fixed_band: units of the underlying")


class TrainingConfig(_Section):
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


class NestedConfig(_Section):
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


class NewtonConfig(_Section):
    """Gauss-Newton steps on the output layer (dhlnn_newton); see dhlnn_jax.newton."""

    n_inner: int = Field(1, gt=0, description="steps on the same batch")
    damping: float = Field(0.01, gt=0, description="of the first steps, relative to the mean curvature")
    burn_in: int = Field(3, ge=0, description="epochs of whole steps before averaging over epochs")


class TestMarketConfig(_Section):
    """What differs when the hedgers are tested (simulated markets)."""

    __test__ = False  # no pytest class

    volatility: float | None = Field(None, ge=0, description="per square root of a year; default as trained")
    drift: float | None = Field(None, description="per year; default as trained")


class EvaluationConfig(_Section):
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


class Config(_Section):
    """One experiment."""

    seed: int = Field(0, ge=0, description="of all random numbers")
    seeds: int = Field(
        1,
        gt=0,
        description="hedgers of each trained method, from seeds seed, seed + 1, ...; trained in one program",
    )
    methods: tuple[str, ...] = Field(
        ("dhlnn", "dhntb", "dhmlp", "whalley_wilmott", "bsdh", "no_hedge"),
        description="rows of the table",
    )
    matmul_precision: Literal["default", "tensorfloat32", "float32"] = Field(
        "default",
        description="of products of float32 matrices; default is JAX's, TF32 on recent GPUs, whose roundings "
        "are far below the Monte Carlo error",
    )
    out: str = Field("results/run", description="results folder")
    market: MarketConfig = MarketConfig()
    contract: ContractConfig = ContractConfig()
    cost: CostConfig = CostConfig()
    risk: RiskConfig = RiskConfig()
    model: ModelConfig = ModelConfig()
    rules: RulesConfig = RulesConfig()
    training: TrainingConfig = TrainingConfig()
    nested: NestedConfig = NestedConfig()
    newton: NewtonConfig = NewtonConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError(f"methods must name at least one of {', '.join(METHODS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"methods names one twice: {', '.join(names)}")
        return tuple(one_of("method", name, tuple(METHODS)) for name in names)

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        claim = self.contract.kind
        for name in self.methods:
            covers = METHODS[name].covers
            if covers is not None and claim not in covers:
                raise ValueError(
                    f"method {name!r} is a closed form for {', '.join(covers)}; "
                    f"contract.kind is {claim!r}: take it out of methods"
                )
        curved = [name for name in self.methods if METHODS[name].update == "newton"]
        if curved and self.risk.kind not in CURVATURES:
            raise ValueError(
                f"method {curved[0]!r} solves with the curvature of the risk: risk.kind must be one of "
                f"{', '.join(CURVATURES)}, got {self.risk.kind!r}"
            )
        if "optimal" in self.methods and (why := self.no_optimum):
            raise ValueError(f"method 'optimal' {why}: take it out of methods")
        lookback = [f for f in self.model.features if "max_" in f]
        if lookback and CLAIMS[claim].terminal:
            raise ValueError(
                f"model.features has {lookback[0]!r}, but {claim!r} does not depend on the maximum: "
                "take it out, or set contract.kind to a lookback"
            )
        for name in ("n_paths", "validation_paths") if self.market.noise == "antithetic" else ():
            if getattr(self.training, name) % 2:
                given = getattr(self.training, name)
                raise ValueError(f"antithetic noise needs an even training.{name}, got {given}")
        late = [e for e in self.evaluation.epochs if not 0 < e <= self.training.epochs]
        if late:
            raise ValueError(f"evaluation.epochs has {late[0]}, training.epochs is {self.training.epochs}")
        if self.cost.charge == "half_spread" and not self.market.recorded:
            raise ValueError("cost.charge 'half_spread' needs recorded prices that quote one (order_book)")
        if self.market.recorded and (
            self.evaluation.market.volatility is not None or self.evaluation.market.drift is not None
        ):
            raise ValueError("evaluation.market changes simulated markets only, market.kind is recorded")
        return self

    @property
    def measured_parameters(self) -> Literal["best", "last"]:
        """Which parameters are measured.

        Where the learning rate falls to zero the last epoch is the best one, and what validation picks among
        the many before it is luck: over 20 seeds that cost a quarter to a half of the regret.
        """
        return self.evaluation.parameters or ("last" if self.training.schedule == "cosine" else "best")

    @property
    def no_optimum(self) -> str | None:
        """Why no exact optimum is solved for, or None; what `optimal.solve_contract` refuses is here too."""
        claim = self.contract.kind
        if self.market.kind != "gbm":
            return f"is known for market.kind 'gbm', not {self.market.kind!r}"
        if not CLAIMS[claim].terminal and claim != "lookback_call":
            return f"is known for claims on the last spot and lookback_call, not {claim!r}"
        if self.cost.kind != "proportional":
            return f"is known for cost.kind 'proportional', not {self.cost.kind!r}"
        if self.risk.kind != "entropic":
            return f"is known for risk.kind 'entropic', not {self.risk.kind!r}"
        if not self.market.volatility or self.evaluation.market.volatility == 0:
            return "needs a volatility above 0"
        return None if self.evaluation.optimum else "was switched off (evaluation.optimum = false)"

    @property
    def maturity(self) -> float:
        if self.contract.maturity is not None:
            return self.contract.maturity
        return self.market.n_steps * self.market.years_per_step


def option_names(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name of every option and its pydantic field."""
    names: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            names |= option_names(section, f"{prefix}{name}.")
        else:
            names[prefix + name] = field
    return names


def make_config(values: dict[str, Any], *, source: str = "config") -> Config:
    """Validated configuration from nested dicts.

    Raises: UsageError, one line: what was given, what is allowed, in which source.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{source}: {_first_error(error)}") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Configuration from a TOML file and `--section.key value` overrides; `out` defaults to results/<stem>.

    Raises: UsageError for a missing or malformed file, an unknown option, or a value that is not allowed.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"no config file {str(path)!r}; shipped ones are in configs/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: not readable as TOML: {error}") from None
    values.setdefault("out", f"results/{path.stem}")
    source = str(path)
    for name, given in parse_overrides(overrides).items():
        *sections, key = name.split(".")
        table = values
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UsageError(f"{path}: {section!r} must be a table")
        table[key] = given
        source = f"{path} with the command line"
    return make_config(values, source=source)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """{"section.key": value} from `--section.key value ...`; `-` and `_` in names are the same.

    Values stay strings (or lists of them, for options that take several); pydantic converts them.
    """
    options = option_names()
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise UsageError(f"expected --section.key value, got {flag!r}; see --help")
        name, equals, attached = flag[2:].partition("=")
        name = name.replace("-", "_")
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            raise UsageError(
                f"unknown option --{name}" + (f"; did you mean --{near[0]}?" if near else "") + " See --help"
            )
        given = [attached] if equals else []
        while rest and not rest[0].startswith("--"):
            given.append(rest.pop(0))
        found[name] = _override_value(name, options[name], given)
    return found


def _override_value(name: str, field: Any, given: list[str]) -> Any:
    kind = str(field.annotation)
    if "None" in kind and [g.lower() for g in given] == ["none"]:
        return None
    if "dict" in kind:
        pairs = [g.partition("=") for g in given]
        if not all(equals for _, equals, _ in pairs):
            raise UsageError(f"--{name} takes name=number ..., got {' '.join(given)!r}")
        return {key: value for key, _, value in pairs}
    if "tuple" in kind:
        return [part for g in given for part in g.split(",") if part]
    if len(given) != 1:
        raise UsageError(f"--{name} takes one value, got {len(given)}: {' '.join(given) or 'nothing'}")
    return given[0]


def _first_error(error: ValidationError) -> str:
    """The first validation error in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = option_names()
        tables = {name.rpartition(".")[0] for name in known} - {""}
        near = difflib.get_close_matches(where, [*known, *tables], n=1)
        return f"unknown key {where!r}" + (f"; did you mean {near[0]!r}?" if near else "") + " (see --help)"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return message
    return f"{where} = {first['input']!r}: {message[0].lower()}{message[1:]}"
