"""Paths of prices: simulators driven by injected noise, and the one sampler protocol."""

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from dhlnn_jax.settings import Settings, keywords_from

NoiseKind = Literal["pseudo", "antithetic", "sobol"]


class MarketPath(NamedTuple):
    """What the market does along one path; batched by `vmap` with a leading path axis.

    Attributes:
      spot: money, [n_steps + 1]; a further trailing axis holds further instruments.
      variance: annual variance known at each time, [n_steps + 1], or None where `Settings.volatility`
        is all there is to know.
      half_spread: half the quoted bid-ask spread as a fraction of the price, [n_steps + 1], or None.
    """

    spot: Array
    variance: Array | None = None
    half_spread: Array | None = None


def observed_path(path: MarketPath) -> MarketPath:
    """The path without its last point: all that any hedging decision may be computed from."""
    return jax.tree.map(lambda x: x[:-1], path)


def path_volatility(path: MarketPath, settings: Settings) -> Array:
    """Volatility the hedger goes by at each time [n_times], per square root of a year."""
    if path.variance is not None:
        return jnp.sqrt(path.variance)
    return jnp.broadcast_to(jnp.asarray(settings.volatility), path.spot.shape[:1])


@runtime_checkable  # beartype checks it under pytest
class Sampler(Protocol):
    """Where paths come from: simulators, daily closes, order books and files alike."""

    def __call__(
        self, key: PRNGKeyArray, n_paths: int, settings: Settings
    ) -> tuple[MarketPath, Int[Array, " n_paths"]]:
        """Batched path and the group of each path, an int in [0, n_paths).

        Paths of different groups are independent; standard errors are clustered by group.
        """
        ...


def gbm_path(
    noise: Float[ArrayLike, " n_steps"],
    *,
    spot0: ArrayLike,
    volatility: ArrayLike,
    drift: ArrayLike,
    dt: ArrayLike,
) -> MarketPath:
    """Geometric Brownian motion on a grid, exact in law.

    S_{i+1} = S_i exp((drift - volatility^2 / 2) dt + volatility sqrt(dt) noise_i).

    Args:
      noise: standard normals.
      spot0: money. volatility: per square root of a year. drift: per year. dt: years.
    Returns: path of n_steps + 1 spots, the first one spot0.
    Source: Shreve (2004), Stochastic Calculus for Finance II, Section 4.4.3.
    """
    noise = jnp.asarray(noise)
    log_return = (drift - 0.5 * jnp.square(volatility)) * dt + volatility * jnp.sqrt(dt) * noise
    log_spot = jnp.concatenate([jnp.zeros_like(noise, shape=(1,)), jnp.cumsum(log_return)])
    return MarketPath(spot=jnp.exp(log_spot) * spot0)


class Simulator(NamedTuple):
    """A simulator by name: one function, and the shape of the normals that it eats.

    Attributes:
      path: `(noise, *, name, ...) -> MarketPath`; each keyword is found by its name among the fields
        of `Settings` or in `Settings.parameters`.
      noise_shape: n_steps -> shape of the noise of one path.
    """

    path: Callable[..., MarketPath]
    noise_shape: Callable[[int], tuple[int, ...]]

    @property
    def keywords(self) -> tuple[str, ...]:
        parameters = inspect.signature(self.path).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


SIMULATORS: dict[str, Simulator] = {
    "gbm": Simulator(gbm_path, lambda n_steps: (n_steps,)),
}


def draw_normals(
    key: PRNGKeyArray, n_paths: int, shape: tuple[int, ...], *, kind: NoiseKind = "pseudo"
) -> Float[Array, " n_paths *shape"]:
    """Standard normals for n_paths paths.

    "pseudo": independent. "antithetic": row i + n_paths/2 is minus row i (n_paths must be even).
    "sobol": Sobol points with a random digital shift, so that every key gives a fresh unbiased sample.

    Raises: ValueError for an odd n_paths with "antithetic", or an unknown kind.
    Numerics: Sobol normals are cut at 5.3 (23 bits). The unshifted points are a constant of the
      compiled program, 4 bytes a number.
    Source: antithetic: Glasserman (2004), Section 4.2; digital shift: Lemieux (2009), Section 6.2.
    """
    if kind == "pseudo":
        return jax.random.normal(key, (n_paths, *shape))
    if kind == "antithetic":
        if n_paths % 2:
            raise ValueError(f"antithetic noise needs an even number of paths, got {n_paths}")
        half = jax.random.normal(key, (n_paths // 2, *shape))
        return jnp.concatenate([half, -half])
    if kind == "sobol":
        dimension = int(np.prod(shape))
        points = jnp.asarray(_sobol_points(n_paths, dimension))
        shift = jax.random.bits(key, (dimension,), jnp.uint32) >> (32 - _SOBOL_BITS)
        # (k + 1/2) / 2^bits never touches 0 or 1, and 23 bits leave it exact in float32.
        uniform = ((points ^ shift).astype(float) + 0.5) / 2**_SOBOL_BITS
        return jax.scipy.special.ndtri(uniform).reshape(n_paths, *shape)
    raise ValueError(f"kind must be one of pseudo, antithetic, sobol, got {kind!r}")


_SOBOL_BITS = 23


def _sobol_points(n_paths: int, dimension: int) -> np.ndarray:
    from scipy.stats import qmc

    power = int(np.ceil(np.log2(max(n_paths, 1))))  # scipy warns of anything but powers of two
    points = qmc.Sobol(dimension, scramble=False, bits=30).random_base2(power)[:n_paths]
    return (points * 2**_SOBOL_BITS).astype(np.uint32)


def noise_groups(n_paths: int, *, kind: NoiseKind = "pseudo") -> Int[Array, " n_paths"]:
    """Group of each path: its own, or that of the antithetic pair.

    Sobol paths are treated as independent; their standard errors are then too large, not too small.
    """
    paths = jnp.arange(n_paths)
    return paths % (n_paths // 2) if kind == "antithetic" else paths


def make_simulation_sampler(simulator: Simulator, *, n_steps: int, noise: NoiseKind = "pseudo") -> Sampler:
    """Sampler of fresh simulated paths."""
    shape = simulator.noise_shape(n_steps)

    def sample(key: PRNGKeyArray, n_paths: int, settings: Settings) -> tuple[MarketPath, Array]:
        normals = draw_normals(key, n_paths, shape, kind=noise)
        keywords = keywords_from(settings, simulator.keywords)
        paths = jax.vmap(lambda z: simulator.path(z, **keywords))(normals)
        return paths, noise_groups(n_paths, kind=noise)

    return sample


def make_bootstrap_sampler(paths: MarketPath, group_ids: Int[Array, " n_rows"]) -> Sampler:
    """Sampler that draws whole recorded paths with replacement (training on real prices).

    Groups are those of the drawn rows, renumbered by nothing: drawn copies share their row's group.
    """
    n_rows = paths.spot.shape[0]

    def sample(key: PRNGKeyArray, n_paths: int, settings: Settings) -> tuple[MarketPath, Array]:
        del settings
        rows = jax.random.randint(key, (n_paths,), 0, n_rows)
        return jax.tree.map(lambda x: x[rows], paths), group_ids[rows]

    return sample


def make_recorded_sampler(paths: MarketPath, group_ids: Int[Array, " n_rows"]) -> Sampler:
    """Sampler that returns the first n_paths recorded paths, whatever the key (testing on real prices).

    Raises: ValueError if more paths are asked for than were recorded.
    """
    n_rows = paths.spot.shape[0]

    def sample(key: PRNGKeyArray, n_paths: int, settings: Settings) -> tuple[MarketPath, Array]:
        del key, settings
        if n_paths > n_rows:
            raise ValueError(f"{n_paths} paths asked for, {n_rows} recorded")
        return jax.tree.map(lambda x: x[:n_paths], paths), group_ids[:n_paths]

    return sample
