"""Sections on a terminal.

With rich (the extra ``cli``) titles and names are coloured and long
cells are wrapped within their column; without it the same text is printed plainly.
"""

from __future__ import annotations

from collections.abc import Sequence

from .words import Section

__all__ = ["show", "table"]

# A row is one line, whatever a damaged or hostile report holds: none of its texts
# is to look like one of its rows.
_BREAKS = dict.fromkeys([9, 10, 0x2028, 0x2029], " ")

_TITLE = "bold"
_FIRST_COLUMN = "cyan"


def show(sections: Sequence[Section]) -> None:
    """Prints all sections to stdout."""
    for i, section in enumerate(sections):
        if i:
            print()
        table(section)


def table(section: Section) -> None:
    """Prints one section to stdout."""
    rows = [tuple(cell.translate(_BREAKS) for cell in row) for row in section.rows]
    section = Section(section.title, rows)
    try:
        from rich import console, text
        from rich import table as rich_table
    except ImportError:
        _plain(section)
        return
    # Nothing of a report is markup, and a program that reads a pipe wants its
    # lines whole.
    out = console.Console(markup=False, highlight=False, emoji=False)
    if not out.is_terminal:
        _plain(section)
        return
    grid = rich_table.Table.grid(padding=(0, 2))
    columns = max(len(row) for row in section.rows)
    for i in range(columns):
        first = i == 0 and columns > 1
        grid.add_column(style=_FIRST_COLUMN if first else "", no_wrap=first)
    for row in section.rows:
        grid.add_row(*(text.Text(cell) for cell in row))
    out.print(text.Text(section.title, style=_TITLE))
    out.print(grid)


def _plain(section: Section) -> None:
    columns = max(len(row) for row in section.rows)
    widths = [
        max(len(row[i]) for row in section.rows if i < len(row))
        for i in range(columns - 1)
    ]
    print(section.title)
    for row in section.rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  " + "  ".join([*cells, *row[len(cells) :]]).rstrip())
