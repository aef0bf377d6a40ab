from types import SimpleNamespace

import pytest

from dhlnn_jax import progress
from dhlnn_jax.progress import progress_bar


def clock(seconds):
    return SimpleNamespace(monotonic=iter(seconds).__next__)


def test_bar_is_silent_where_stderr_is_no_terminal_and_it_does_not_take_long(capsys):
    with progress_bar("reading", total=3) as advance:
        advance()
        advance(2, note="done")
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_a_line_a_minute(capsys, monkeypatch):
    monkeypatch.setattr(progress, "time", clock([0.0, 30.0, 72.0, 108.0, 132.0]))
    with progress_bar("training", total=9) as advance:
        for i in range(4):
            advance(2, note=f"seed {i}")
    assert capsys.readouterr() == (
        "",
        "training: 4 of 9 after 1 min, seed 1\ntraining: 8 of 9 after 2 min, seed 3\n",
    )
    monkeypatch.setattr(progress, "time", clock([0.0, 99.0]))
    with progress_bar("training", total=None) as advance:
        advance()
    assert capsys.readouterr().err == "training: 1 after 2 min\n"


def test_bar_on_a_terminal_shows_what_how_far_and_the_note_on_stderr(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("training dhntb", total=4) as advance:
        advance(3)
        advance(note="risk 0.02586")
    out, err = capsys.readouterr()
    assert out == ""
    assert "training dhntb" in err and "risk 0.02586" in err and "4/4" in err


def test_bar_lets_exceptions_through(capsys):
    with pytest.raises(KeyboardInterrupt), progress_bar("training", total=2) as advance:
        advance()
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "")
