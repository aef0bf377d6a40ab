"""Parts of resumable work: kept once, whole, and never taken for those of other work."""

import pytest

from dhlnn_jax import resumable
from dhlnn_jax.errors import UsageError

TOLD = {"config": {"out": "here", "rate": 1.0}, "n": 2}


def test_a_part_is_computed_once_and_comes_back_as_it_was(tmp_path):
    checkpoints = resumable.claim(tmp_path / "work", "done.json", overwrite=False, resume=False)
    resumable.begin(checkpoints, TOLD)
    computed = []

    def compute():
        computed.append(0)
        return [0.1, None, {"name": 1e-300}]

    assert not resumable.is_kept(checkpoints, "part")
    first = resumable.kept(checkpoints, "part", compute)
    assert resumable.is_kept(checkpoints, "part")
    assert resumable.kept(checkpoints, "part", compute) == first == [0.1, None, {"name": 1e-300}]
    assert len(computed) == 1
    resumable.kept(checkpoints, "another", compute)
    assert len(computed) == 2


def test_nothing_is_kept_without_a_folder():
    fresh = iter((1, 2))
    assert [resumable.kept(None, "part", lambda: next(fresh)) for _ in range(2)] == [1, 2]
    assert not resumable.is_kept(None, "part")


def test_a_part_that_fails_or_is_not_a_number_leaves_nothing(tmp_path):
    for compute in (lambda: 1 / 0, lambda: float("nan")):
        with pytest.raises((ZeroDivisionError, ValueError)):
            resumable.kept(tmp_path, "part", compute)
    assert not any(tmp_path.iterdir())


def test_a_damaged_part_is_said_in_one_line(tmp_path):
    (tmp_path / "part.json").write_text('{"val')
    with pytest.raises(UsageError, match="part.json: not readable as JSON"):
        resumable.kept(tmp_path, "part", lambda: 1)


def test_other_work_is_refused_another_folder_is_not(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    resumable.begin(checkpoints, TOLD)
    resumable.begin(checkpoints, {**TOLD, "config": {"out": "moved", "rate": 1.0}})
    for other in ({**TOLD, "n": 3}, {**TOLD, "config": {"out": "here", "rate": 2.0}}):
        with pytest.raises(UsageError, match="is of another configuration or other options"):
            resumable.begin(checkpoints, other)


def test_overwriting_takes_no_part_of_earlier_work(tmp_path):
    checkpoints = resumable.claim(tmp_path, "done.json", overwrite=False, resume=False)
    resumable.begin(checkpoints, TOLD)
    resumable.kept(checkpoints, "part", lambda: "old")
    again = resumable.claim(tmp_path, "done.json", overwrite=True, resume=False)
    resumable.begin(again, {**TOLD, "n": 3})
    assert resumable.kept(again, "part", lambda: "new") == "new"
