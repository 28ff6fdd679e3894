"""Format a table as text that fits a terminal."""

from __future__ import annotations

from collections.abc import Container, Sequence

from feste.wording import width

__all__ = ["aligned", "telling"]

_INDENT, _GAP = 2, 2
_LONGEST = 24


def aligned(rows: Sequence[Sequence[str]], names: int, columns: int = 0) -> list[str]:
    """Format a table as lines, with names to the left and numbers to the right.

    Columns that do not fit follow in a second block, with the names repeated.

    :param rows: the cells, the heading first.
    :param names: the number of columns that hold names.
    :param columns: how many columns a line may have, other than :func:`~feste.wording.width`.

    >>> aligned([["what", "count"], ["apples", "12"], ["pears", "7"]], 1)
    ['  what    count', '  apples     12', '  pears       7']
    """
    rows = [[*map(_short, row[:names]), *row[names:]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    blocks: list[list[int]] = [[]]
    room = first = (columns or width()) - _INDENT - sum(widths[:names]) - _GAP * (names - 1)
    for column in range(names, len(widths)):
        if _GAP + widths[column] > room and blocks[-1]:
            blocks.append([])
            room = first
        blocks[-1].append(column)
        room -= _GAP + widths[column]
    lines: list[str] = []
    for block in blocks:
        lines += [""] * bool(lines)
        for row in rows:
            cells = [cell.ljust(size) for cell, size in zip(row[:names], widths)]
            cells += [row[column].rjust(widths[column]) for column in block]
            lines.append(" " * _INDENT + (" " * _GAP).join(cells).rstrip())
    return lines


def telling(
    rows: Sequence[Sequence[str]], optional: Container[str], nothing: Container[str]
) -> list[list[str]]:
    """Leave out columns that tell nothing.

    :param rows: the cells, the heading first.
    :param optional: the names of columns that may be left out.
    :param nothing: the cells that tell nothing.

    >>> telling([["calls", "failed"], ["3", "0"]], {"failed"}, {"0"})
    [['calls'], ['3']]
    """
    names, *cells = rows
    shown = [
        column
        for column, name in enumerate(names)
        if name not in optional or any(row[column] not in nothing for row in cells)
    ]
    return [[row[column] for column in shown] for row in rows]


def _short(name: str) -> str:
    """Shorten a name, to leave room for numbers.

    >>> _short("a-model-with-a-name-of-very-many-parts")
    'a-model-with…y-many-parts'
    """
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST + 1 else f"{name[:half]}…{name[-half:]}"
