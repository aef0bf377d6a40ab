from dhlnn_jax.notes import MANY_RISES, _about_rises


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
