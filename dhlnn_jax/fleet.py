"""Many hedgers in one program: what a member is, and how a function of one becomes a function of all.

A member is an ordinary run: a configuration whose seed gives the initial parameters, the training paths and
the validation paths, and whose numbers reach the program as traced arguments. Members may differ in nothing
else, so that a fleet is one compilation whatever its size.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from dhlnn_jax import traces
from dhlnn_jax.compiling import jit_for_seldom, options_for_seldom
from dhlnn_jax.config import Config
from dhlnn_jax.evaluate import HedgedPaths, hedged_paths
from dhlnn_jax.hedger import Policy
from dhlnn_jax.market import MarketPath
from dhlnn_jax.pnl import Contract
from dhlnn_jax.runtime import member_mesh, path_mesh
from dhlnn_jax.settings import Settings
from dhlnn_jax.source import Source

Params = Any

BLOCK_PATHS = 10_000  # test paths at a time

# In what members may differ and sweeps vary, since it reaches programs as a traced number; and how figures
# call it.
TRACED_OPTIONS = {
    "cost.rate": "cost rate (fraction of the traded notional)",
    "contract.strike": "strike (money)",
    "market.volatility": "volatility (per √year)",
    "risk.risk_aversion": "risk aversion λ (1/money)",
    "training.learning_rate": "learning rate (pure number)",
    "nested.learning_rate": "learning rate of nested training (pure number)",
}


class Keys(NamedTuple):
    """What each role of a seed draws from; runs, fleets and studies fold in the same numbers."""

    init: PRNGKeyArray
    train: PRNGKeyArray
    validation: PRNGKeyArray
    test: PRNGKeyArray


def keys_of(seed: int) -> Keys:
    """The keys of an ordinary run with this seed."""
    return Keys(*(jax.random.fold_in(jax.random.key(seed), role) for role in range(4)))


class Member(NamedTuple):
    """One hedger of a fleet.

    Attributes:
      config: of the ordinary run that trains the same hedger. source: its market; `train` is that of the
        first member for all of them, the numbers and the test paths are its own.
      label: how a message calls it; empty where there is only one.
    """

    config: Config
    source: Source
    label: str = ""


def seeds_of(config: Config, source: Source, *, label: str = "") -> list[Member]:
    """The members of one problem: seed, seed + 1, ..., judged on the same test paths."""
    members = []
    for seed in range(config.seed, config.seed + config.seeds):
        named = [label] if label else []
        named += [f"seed {seed}"] if config.seeds > 1 else []
        members.append(Member(config.model_copy(update={"seed": seed}), source, ", ".join(named)))
    return members


class Layout(NamedTuple):
    """Which devices share what; at most one of the two is a mesh."""

    members: Mesh | None
    paths: Mesh | None

    @property
    def everywhere(self) -> NamedSharding | None:
        """Where what all devices hold alike lies, if they share paths."""
        return None if self.paths is None else NamedSharding(self.paths, PartitionSpec())

    def place(self, stacked: Any) -> Any:
        """Lays a tree of stacked arrays out: members by device, or the same on all that share paths."""
        where = self.everywhere
        if self.members is not None:
            where = NamedSharding(self.members, PartitionSpec(*self.members.axis_names))
        return stacked if where is None else jax.device_put(stacked, where)


def layout_of(n_members: int, *, n_paths: int, devices: int | None = None) -> Layout:
    """Devices share the members where they divide evenly, else the paths of every member."""
    mesh = member_mesh(n_members, devices=devices)
    return Layout(mesh, None if mesh is not None else path_mesh(n_paths, devices=devices))


def over_members(
    fn: Callable[..., Any], *, mesh: Mesh | None = None, n_common: int = 0, at_once: bool = False
) -> Callable[..., Any]:
    """`fn` of one member as a function of many: a leading axis on its arguments and on what it returns.

    Args:
      mesh: devices that share the members evenly, over its one axis, without a word between them.
      n_common: how many of the last arguments are the same for all members and have no such axis.
      at_once: members may be vectorized on an accelerator. A CPU takes one after another, since what it is
        fast on is a chunk of one member that stays in its cache; so does anything with a single member.
    Numerics: the same for each member whatever the others, to rounding.
    """

    def mapped(*arguments: Any) -> Any:
        n_own = len(arguments) - n_common
        own, common = arguments[:n_own], arguments[n_own:]
        n_members = jax.tree.leaves(own)[0].shape[0]
        if at_once and n_members > 1 and jax.default_backend() != "cpu":
            return jax.vmap(lambda *own: fn(*own, *common))(*own)
        return jax.lax.map(lambda own: fn(*own, *common), own)

    if mesh is None:
        return mapped
    shared = PartitionSpec(mesh.axis_names[0])

    def on_mesh(*arguments: Any) -> Any:
        specs = (shared,) * (len(arguments) - n_common) + (PartitionSpec(),) * n_common
        return jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=shared, check_vma=False)(*arguments)

    return on_mesh


def stacked(trees: Sequence[Any]) -> Any:
    """One tree of arrays [n_members, ...], on the host."""
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def on_host(tree: Any) -> Any:
    """Numpy copies; of what all processes hold alike, this one's."""

    def copied(x: Any) -> np.ndarray:
        elsewhere = isinstance(x, jax.Array) and not x.is_fully_addressable
        return np.array(x.addressable_data(0) if elsewhere else x)

    return jax.tree.map(copied, tree)


def member_of(tree: Any, i: int) -> Any:
    """Entry i of every array of a stacked tree."""
    return jax.tree.map(lambda x: x[i], tree)


Evaluator = Callable[[Params, Sequence[MarketPath], Settings], HedgedPaths]


@lru_cache(maxsize=32)  # the same policy asked for again is not compiled again
def fleet_evaluator(
    policy: Policy, contract: Contract, *, mesh: Mesh | None = None, made_from: str | None = None
) -> Evaluator:
    """`hedged_paths` of one policy for many members, in blocks, so that any number of paths compiles once.

    Args:
      mesh: devices that share the members, as in `over_members`.
      made_from: of policy and contract, as `traces.compiled` takes it.
    Returns: `evaluate(params [n_members, ...], paths, settings [n_members]) -> HedgedPaths` with arrays
      [n_members, n_paths] on the host; paths: those of each member, equally many.
    """
    block = traces.jit(
        over_members(
            lambda params, paths, settings: hedged_paths(policy, params, paths, contract, settings), mesh=mesh
        ),
        made_from=made_from,
        returns=HedgedPaths._make(HedgedPaths._fields),
        in_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec(*mesh.axis_names)),
        compiler_options=options_for_seldom(),
    )

    def evaluate(params: Params, paths: Sequence[MarketPath], settings: Settings) -> HedgedPaths:
        n_paths = paths[0].spot.shape[0]
        size = min(BLOCK_PATHS, n_paths)
        done = []
        for start in range(0, n_paths, size):
            # The last block is filled up with copies of the last path, which are cut off again.
            rows = np.minimum(np.arange(start, start + size), n_paths - 1)
            done.append(block(params, _stacked_rows(tuple(paths), rows), settings))
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1)[:, :n_paths], *on_host(done))

    return evaluate


@jit_for_seldom
def _stacked_rows(trees: Sequence[Any], rows: Array) -> Any:
    """The given rows of the arrays of every tree, [n_trees, n_rows, ...]."""
    return jax.tree.map(lambda *x: jnp.stack([of_one[rows] for of_one in x]), *trees)
