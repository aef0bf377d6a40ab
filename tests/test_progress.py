import pytest

from dhlnn_jax.progress import progress_bar


def test_bar_is_silent_where_stderr_is_no_terminal(capsys):
    with progress_bar("reading", total=3) as advance:
        advance()
        advance(2, note="done")
    assert capsys.readouterr() == ("", "")


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
