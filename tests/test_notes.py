from dhlnn_jax.case import Case
from dhlnn_jax.config import Config
from dhlnn_jax.notes import MANY_RISES, _about_not_trading, _about_rises

CASE = Case(Config(), None, None, None, None)  # the notes below look at its configuration alone
RISK = "entropic_risk_measure"


def number(value, stderr=0.0):
    return {RISK: {"value": value, "stderr": stderr}}


def compared(paired, *, exact=0.018357, simulated=0.018406, error=4e-6, by_seed=()):
    """Rows that stand so far from no hedge on the same paths, on which it is 5e-5 dearer than exact."""
    methods = {name: {"final": number(simulated + apart)} for name, apart in paired.items()}
    if by_seed:
        methods["dhntb"]["by_seed"] = [
            {"seed": seed, "final": number(simulated + apart)} for seed, apart in enumerate(by_seed)
        ]
    pairs = {f"{name}-no_hedge": number(apart, error) for name, apart in paired.items()}
    return {
        "methods": methods | {"no_hedge": {"final": number(exact)}},
        "paired": pairs,
    }


def test_a_row_that_is_better_on_the_same_paths_is_not_called_worse_than_an_exact_no_hedge():
    assert _about_not_trading(CASE, compared({"optimal": -1.4e-5, "dhntb": 0.0})) == []


def test_a_seed_that_is_worse_than_no_hedge_on_the_same_paths_is_named():
    metrics = compared({"optimal": -3e-5, "dhntb": -2e-5}, by_seed=(-6e-5, 2e-5))
    assert _about_not_trading(CASE, metrics) == ["dhntb (seed 1) is worse than no hedge by 2e-05"]


def test_no_method_beats_no_hedge_is_said_of_the_same_paths():
    (note,) = _about_not_trading(CASE, compared({"optimal": 0.0, "dhntb": -1e-5, "bsdh": 1e-3}))
    assert "too few test paths" in note
    (note,) = _about_not_trading(CASE, compared({"optimal": 0.0, "dhntb": 1e-5, "bsdh": 1e-3}))
    assert "not trading is the best of these rows" in note


def metrics(**most_rises):
    return {"methods": {name: {"most_rises": n} for name, n in most_rises.items()} | {"bsdh": {}}}


def test_inner_steps_that_raise_the_objective_many_times_in_a_row_are_reported():
    (note,) = _about_rises(metrics(dhlnn=MANY_RISES, dhntb=0))
    assert note.startswith("dhlnn: 10 inner steps in a row") and "nested.learning_rate" in note
    assert _about_rises(metrics(dhlnn=MANY_RISES - 1)) == []


def test_the_seed_is_named_where_there_are_several():
    by_seed = [{"seed": 3, "most_rises": 4}, {"seed": 4, "most_rises": 12}]
    (note,) = _about_rises({"methods": {"dhlnn": {"most_rises": 4, "by_seed": by_seed}}})
    assert note.startswith("dhlnn (seed 4): 12 ")
