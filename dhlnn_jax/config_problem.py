"""The sections of the configuration that say what is hedged: prices, claim, costs, risk."""

import difflib
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dhlnn_jax.market import SIMULATORS, NoiseKind
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import COST_MODELS
from dhlnn_jax.settings import Settings
from dhlnn_jax.train import OBJECTIVES

RECORDED = ("history", "order_book", "paths_file")


def one_of(name: str, given: str, allowed: Sequence[str]) -> str:
    """`given`, if it is allowed. Raises: ValueError with the nearest allowed name and all of them."""
    if given in allowed:
        return given
    near = difflib.get_close_matches(given, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {name} {given!r}; {hint}allowed: {', '.join(allowed)}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MarketConfig(Section):
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


class ContractConfig(Section):
    """What the seller owes."""

    kind: str = Field("european_call", description=", ".join(CLAIMS))
    strike: float = Field(1.0, gt=0, description="money; spot starts at market.spot0")
    maturity: float | None = Field(None, gt=0, description="years; default n_steps * dt")
    premium: float = Field(0.0, description="money received at the start")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        return one_of("contract.kind", kind, tuple(CLAIMS))


class CostConfig(Section):
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


class RiskConfig(Section):
    """What is minimized, and the parameters of the reported risks."""

    kind: str = Field("entropic", description=f"what is minimized: {', '.join(OBJECTIVES)}")
    risk_aversion: float = Field(50.0, gt=0, description="lambda, 1/money")
    tail_prob: float = Field(0.1, gt=0, lt=1, description="worst fraction (0.1 is ES at alpha 0.9)")

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        return one_of("risk.kind", kind, tuple(OBJECTIVES))
