"""The fixed-gradient form, Eq. (13)-(15): linearization "position", frozen path weights, steps of plain size.

With h_i the position, g_i its gradient at w^r, d = w - w^r, and h_{-1} = 0, g_{-1} = 0 (trading and pricing
at t_i, first purchase charged), the gradient of (13) is

  (14), corrected:  sum g_i dP_i - 2c sum P_i (h_i - h_{i-1}) (g_i - g_{i-1})
                                 - 2c sum P_i (g_i - g_{i-1}) (g_i - g_{i-1})^T d,

while the printed (14) takes the differences after the products:

  (14), printed:    sum g_i dP_i - 2c sum P_i (h_i g_i - h_{i-1} g_{i-1})
                                 - 2c sum P_i (g_i g_i^T - g_{i-1} g_{i-1}^T) d.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from dhlnn_jax import train
from dhlnn_jax.hedger import Anchor, Hedger, make_band_hedger, make_recurrent_hedger
from dhlnn_jax.market import SIMULATORS, MarketPath, make_recorded_sampler, make_simulation_sampler
from dhlnn_jax.nested import nested_update
from dhlnn_jax.payoff import CLAIMS
from dhlnn_jax.pnl import Contract
from dhlnn_jax.settings import make_settings

CONTRACT = Contract(CLAIMS["european_call"])
FORMS = {"corrected": "squared_difference", "printed": "difference_of_squares"}


def fixed_gradient(form, *, learning_rate, n_inner):
    """Eq. (15), word for word."""
    return nested_update(
        optax.sgd(77.0),  # never used
        learning_rate=learning_rate,
        n_inner=n_inner,
        risk_weights="frozen",
        cost_surrogate=FORMS[form],
        inner_update="sgd",
        linearization="position",
    )


def moved(hedger, sample, settings, update, params, *, n_paths):
    step = train.make_train_step(
        hedger, sample, CONTRACT, train.OBJECTIVES["entropic"], update, n_paths=n_paths
    )
    state = train.TrainState(params, update.init(params), jnp.asarray(0))
    return step(state, jax.random.key(3), settings)[0].params


# --- two steps by hand --------------------------------------------------------------------------------

# Positions h_0 = a b and h_1 = -a^2 b; at (a, b) = (1/2, 1) they are 1/2 and -1/4, and their gradients
# g_0 = (b, a) = (1, 1/2) and g_1 = (-2ab, -a^2) = (-1, -1/4).
TOY = Hedger(
    init=lambda key: jnp.array([0.5, 1.0]),
    inputs=lambda path, settings: (path.spot[:, None], Anchor(path.spot, path.spot)),
    outputs=lambda w, features, anchor: jnp.stack([w[0] * w[1], -(w[0] ** 2) * w[1]]),
    position=lambda raw, anchor: raw,
)


@pytest.mark.parametrize(
    ("form", "n_inner", "by_hand"),
    [
        # P = 1.0, 1.2, 0.9, so dP = 0.2, -0.3, and c = 0.01. One path, no claim: rho(V) = -V, rho' = -1, and
        # with eta = 1 a step adds the gradient of V.
        # Gain: 0.2 (1, 0.5) - 0.3 (-1, -0.25) = (0.5, 0.175), in all four.
        # Corrected cost: 2c [1.0 0.5 (1, 0.5) + 1.2 (-0.75) (-2, -0.75)] = 0.02 (2.3, 0.925).
        ("corrected", 1, (0.5 + 0.454, 1.0 + 0.1565)),
        # d = (0.454, 0.1565): g_0.d = 0.53225, (g_1 - g_0).d = -1.025375, so the last line of (14) is
        # 2c [1.0 0.53225 (1, 0.5) + 1.2 (-1.025375) (-2, -0.75)] = 0.02 (2.99315, 1.1889625).
        ("corrected", 2, (0.954 + 0.454 - 0.059863, 1.1565 + 0.1565 - 0.02377925)),
        # Printed cost: 2c [1.0 0.5 (1, 0.5) + 1.2 (-0.25 (-1, -0.25) - 0.5 (1, 0.5))] = 0.02 (0.2, 0.025).
        ("printed", 1, (0.5 + 0.496, 1.0 + 0.1745)),
        # d = (0.496, 0.1745): g_0.d = 0.58325, g_1.d = -0.539625, so the last line of (14) is 2c [1.0 0.58325
        # (1, 0.5) + 1.2 (-0.539625 (-1, -0.25) - 0.58325 (1, 0.5))] = 0.02 (0.5309, 0.1035625).
        ("printed", 2, (0.996 + 0.496 - 0.010618, 1.1745 + 0.1745 - 0.00207125)),
    ],
)
def test_two_steps_by_hand(x64, form, n_inner, by_hand):
    path = MarketPath(jnp.array([[1.0, 1.2, 0.9]]))
    sample = make_recorded_sampler(path, jnp.zeros(1, int))
    settings = make_settings(n_steps=2, strike=10.0, cost_rate=0.01, risk_aversion=3.0)
    update = fixed_gradient(form, learning_rate=1.0, n_inner=n_inner)
    after = jax.jit(lambda w: moved(TOY, sample, settings, update, w, n_paths=1))(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(after, by_hand, rtol=1e-12)


# --- (14) and (15) in full ----------------------------------------------------------------------------

N_STEPS, N_PATHS, COST, AVERSION, ETA = 4, 6, 0.01, 20.0, 0.3
HEDGERS = {
    "band": make_band_hedger(
        features=("standardised_log_moneyness", "standardised_time_to_maturity"), hidden_sizes=(5, 4)
    ),
    "recurrent": make_recurrent_hedger(features=("standardised_log_moneyness",), hidden_sizes=(5,)),
}
SAMPLE = make_simulation_sampler(SIMULATORS["gbm"], n_steps=N_STEPS)


@functools.cache
def positions(name):
    """Spot [p, i], hedge ratio h [p, i] and gradient g [p, i, w] at w^r, and w^r: as numpy, unraveled too."""
    hedger = HEDGERS[name]
    settings = numbers()
    paths, _ = SAMPLE(jax.random.key(3), N_PATHS, settings)
    params = jax.tree.map(lambda w: w.astype(float), jax.jit(hedger.init)(jax.random.key(5)))
    flat, unravel = ravel_pytree(params)

    def ratios(w):
        def one(path):
            features, anchor = hedger.inputs(MarketPath(path.spot[:-1]), settings)
            return hedger.position(hedger.outputs(unravel(w), features, anchor), anchor)

        return jax.vmap(one)(paths)

    h, g = jax.jit(lambda w: (ratios(w), jax.jacrev(ratios)(w)))(flat)
    return np.asarray(paths.spot), np.asarray(h), np.asarray(g), np.asarray(flat), unravel


def numbers():
    return make_settings(n_steps=N_STEPS, cost_rate=COST, risk_aversion=AVERSION, dt=7 / 365)


def before(x):
    """x_{i-1} over the time axis 1, zero at the start."""
    return np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def gradient_14(form, spot, h, g, d):
    """Gradient of V-hat at w^r + d on every path, [p, w], by the formulas at the top of this file."""
    price = 2 * COST * spot[:, :-1, None]
    total = (g * np.diff(spot, axis=1)[..., None]).sum(1)
    if form == "corrected":
        dh, dg = h - before(h), g - before(g)
        return total - (price * (dh + dg @ d)[..., None] * dg).sum(1)
    along = (g @ d)[..., None] * g
    return total - (price * (h[..., None] * g - before(h[..., None] * g) + along - before(along))).sum(1)


def path_weights(spot, h):
    """d rho / d V_p at V^r, the true PnL (11): minus the softmax of -lambda V^r, by the entropic measure."""
    cost = COST * (spot[:, :-1] * np.abs(h - before(h))).sum(1)
    pnl = (h * np.diff(spot, axis=1)).sum(1) - cost - np.maximum(spot[:, -1] - 1.0, 0.0)
    weights = np.exp(-AVERSION * pnl)
    return -weights / weights.sum()


@pytest.mark.parametrize("name", HEDGERS)
def test_inner_steps_follow_14_and_15(x64, name):
    spot, h, g, flat, unravel = positions(name)
    weights = path_weights(spot, h)
    assert np.ptp(weights) > 0.01  # the paths are told apart

    def ends(w):
        updates = [fixed_gradient(form, learning_rate=ETA, n_inner=3) for form in FORMS]
        steps = [moved(HEDGERS[name], SAMPLE, numbers(), update, w, n_paths=N_PATHS) for update in updates]
        return [ravel_pytree(step)[0] for step in steps]

    for form, end in zip(FORMS, jax.jit(ends)(unravel(flat)), strict=True):
        w = flat
        for _ in range(3):
            w = w - ETA * weights @ gradient_14(form, spot, h, g, w - flat)
        np.testing.assert_allclose(end, w, rtol=1e-9, atol=1e-13)
        assert np.max(np.abs(w - flat)) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_14_is_the_derivative_of_13(x64, form):
    # Autodiff of V-hat of the linearized positions, written out here: with the square of the difference for
    # the corrected form, and with the difference of the squares for the printed one.
    spot, h, g, flat, _ = positions("band")
    d = 0.1 * np.random.default_rng(0).normal(size=flat.size)

    def value(d):
        now = h + g @ d
        then = jnp.concatenate([jnp.zeros((N_PATHS, 1)), now[:, :-1]], axis=1)
        charge = (now - then) ** 2 if form == "corrected" else now**2 - then**2
        return jnp.sum(now * np.diff(spot, axis=1) - COST * spot[:, :-1] * charge, axis=1)

    by_autodiff = jax.jit(jax.jacrev(value))(d)
    np.testing.assert_allclose(gradient_14(form, spot, h, g, d), by_autodiff, rtol=1e-10, atol=1e-14)


def test_only_the_corrected_form_leaves_a_held_position_free(x64):
    # The same position at all times costs nothing after its purchase, and small changes of it cost nothing
    # to first order; the printed form charges 2c h sum P_i (g_i - g_{i-1}) all the same.
    spot, h, g, flat, _ = positions("band")
    held = np.full_like(h, 0.4)
    gain = (g * np.diff(spot, axis=1)[..., None]).sum(1)
    purchase = -2 * COST * 0.4 * spot[:, 0, None] * g[:, 0]
    corrected, printed = (
        gradient_14(form, spot, held, g, np.zeros_like(flat)) - gain - purchase for form in FORMS
    )
    np.testing.assert_allclose(corrected, 0.0, atol=1e-14)
    expected = -2 * COST * 0.4 * (spot[:, 1:-1, None] * np.diff(g, axis=1)).sum(1)
    np.testing.assert_allclose(printed, expected, atol=1e-14)
    assert np.max(np.abs(printed)) > 1e-4
