"""Tables on stdout in which no digit is cut off, however narrow the terminal."""

import sys

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_BORDER = 3  # a space on either side of a cell and the line between two


def print_table(table: Table, *, n_keys: int = 1) -> None:
    """A table in one piece, or on a terminal too narrow for it in several, of as many columns as fit.

    Args:
      table: of cells that are text of one line.
      n_keys: first columns, which say what a row is, and stand in every piece.
    """
    widths = [
        max(cell_len(str(text)) for text in (column.header, *column.cells)) + _BORDER
        for column in table.columns
    ]
    # A pipe has no width: it gets the table whole instead of folded at 80 columns.
    room = Console().width if sys.stdout.isatty() else max(sum(widths) + 1, 80)
    keys, others = list(range(n_keys)), list(range(n_keys, len(widths)))
    for number, group in enumerate(_groups(others, widths, room - sum(widths[:n_keys]) - 1)):
        columns = [*keys, *group]
        # Folded by the terminal if need be, rather than cut off by us.
        console = Console(width=max(room, sum(widths[i] for i in columns) + 1))
        console.print(_part(table, columns, title=number == 0))


def _groups(columns: list[int], widths: list[int], room: int) -> list[list[int]]:
    """Columns in order, in groups that fit; one that is too wide by itself is a group."""
    groups: list[list[int]] = [[]]
    for column in columns:
        if groups[-1] and sum(widths[i] for i in [*groups[-1], column]) > room:
            groups.append([])
        groups[-1].append(column)
    return groups


def _part(table: Table, columns: list[int], *, title: bool) -> Table:
    part = Table(title=table.title if title else None, title_justify=table.title_justify)
    for i in columns:
        part.add_column(table.columns[i].header, justify=table.columns[i].justify, no_wrap=True)
    cells = [list(table.columns[i].cells) for i in columns]
    for i, row in enumerate(table.rows):
        part.add_row(*(column[i] for column in cells), end_section=row.end_section)
    return part
