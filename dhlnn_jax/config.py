"""The validated configuration: every option with its unit, its default and what is allowed.

The sections are in `config_problem` and `config_training`. `load_config` reads TOML, lays command-line
overrides over it and validates both the same way, so that a mistake in either gives the same one-line
`UsageError`.
"""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from dhlnn_jax.config_problem import ContractConfig, CostConfig, MarketConfig, RiskConfig, Section, one_of
from dhlnn_jax.config_training import (
    EvaluationConfig,
    ModelConfig,
    NestedConfig,
    NewtonConfig,
    RulesConfig,
    TrainingConfig,
)
from dhlnn_jax.errors import UsageError
from dhlnn_jax.methods import METHODS
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.train import CURVATURES


class Config(Section):
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
