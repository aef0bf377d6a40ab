"""Tables keep every digit at every width."""

import re

import pytest
from rich.table import Table

from dhlnn_jax import tables


def table():
    made = Table(title="numbers", title_justify="left")
    for name in ("at", "method", "first", "second", "third"):
        made.add_column(name, justify="right")
    made.add_row("1", "DHLNN", "0.025903 ± 0.000020", "0.000017 ± 0.000003", "0.07 ± 0.01")
    made.add_section()
    made.add_row("2", "no hedge", "0.1 exact", "–", "286.76")
    return made


def printed(monkeypatch, capsys, *, terminal, columns, n_keys=2):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    tables.print_table(table(), n_keys=n_keys)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.parametrize("terminal, columns", [(False, 20), (True, 200)])
def test_a_pipe_and_a_wide_terminal_get_one_piece(monkeypatch, capsys, terminal, columns):
    out = printed(monkeypatch, capsys, terminal=terminal, columns=columns)
    assert out.count("DHLNN") == 1 and out.count("numbers") == 1
    row = next(line for line in out.splitlines() if "DHLNN" in line)
    assert all(cell in row for cell in ("0.025903 ± 0.000020", "0.000017 ± 0.000003", "0.07 ± 0.01"))


@pytest.mark.parametrize("columns, pieces", [(64, 2), (45, 3), (30, 3)])
def test_a_narrow_terminal_gets_several_with_the_keys_in_each(monkeypatch, capsys, columns, pieces):
    out = printed(monkeypatch, capsys, terminal=True, columns=columns)
    assert out.count("numbers") == 1
    assert out.count("DHLNN") == out.count("no hedge") == out.count("method") == pieces
    if columns > 30:  # wide enough for the widest piece
        assert all(len(line) <= columns for line in out.splitlines())
    for cell in ("0.025903 ± 0.000020", "0.000017 ± 0.000003", "0.07 ± 0.01", "286.76", "0.1 exact"):
        assert out.count(cell) == 1, cell
    assert "…" not in out
