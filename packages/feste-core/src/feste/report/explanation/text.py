"""A plan as text: the figures, the graph as a tree, the longest path, the passes, the advice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from feste.report.explanation.passes import PassRow, RemarkRow, advice
from feste.report.explanation.summary import headline, operations, ran
from feste.report.explanation.tree import MOST_ROWS, GraphRow, Tree
from feste.report.figures import time
from feste.report.table import aligned
from feste.wording import counted, printable, width, wrapped

if TYPE_CHECKING:
    from feste.report.explanation.explanation import Explanation, Hop

__all__ = ["DEEPEST", "branches", "critical_path", "deeper", "said", "shown", "spot"]

#: The most rows of operations, remarks of a pass, and hops of the path that are printed.
MOST_OPERATIONS, MOST_REMARKS, MOST_HOPS = 30, 6, 6

#: How many levels of the tree are indented; below them, a row says how many more there are.
DEEPEST = 9

#: A space where no line may end.
_GLUE = "\N{NO-BREAK SPACE}"


def _columns() -> int:
    """Return how many columns a line may have: as many as the terminal, from 80 to 100."""
    return width(100, 100)


def spot(where: str) -> str:
    """Return a source line, shortened to 28 characters.

    :param where: ``file:line``.

    >>> spot("a/long/path/to/the/folder/of/app.py:14")
    '…to/the/folder/of/app.py:14'
    """
    return where if len(where) <= 28 else f"…{where[-27:].partition('/')[2] or where[-27:]}"


def _wrapped(text: str, indent: int = 0, hang: int = 2) -> list[str]:
    return wrapped(text, indent, hang, _columns())


def _packed(start: str, parts: Sequence[str]) -> list[str]:
    """Put parts on lines, without breaking one."""
    lines = [start + parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 3 + len(part) > _columns():
            lines.append(" " * len(start) + part)
        else:
            lines[-1] += f"   {part}"
    return lines


def shown(explained: Explanation) -> str:
    """Return an explanation as text.

    :param explained: the explanation.
    """
    lines = _packed("PLAN  ", headline(explained))
    for note in explained.notes:
        lines += _wrapped(note, 2)
    if explained.rows:
        table = operations(explained.rows[:MOST_OPERATIONS], explained.actual)
        lines += aligned(table, table[0].index("calls"), _columns())
        lines += _left_out(len(explained.rows) - MOST_OPERATIONS, "row")
    if explained.actual is not None:
        lines.append("RUN")
        for line in ran(explained.actual, explained):
            lines += _wrapped(line, 2)
    if explained.tree.rows:
        lines += ["GRAPH", *_tree(explained.tree)]
    if explained.depth:
        lines += _wrapped(f"CRITICAL PATH  {critical_path(explained)}", hang=2)
    lines += _passes(explained.passes)
    given = advice(explained.passes)
    if given:
        lines.append("ADVICE")
        for name, remark in given[: 5 * MOST_REMARKS]:
            lines += _wrapped(f"{_origins(remark)}  {said(remark)} ({name})".strip(), 2)
        lines += _left_out(len(given) - 5 * MOST_REMARKS, "remark")
    return "\n".join(map(printable, lines))


# --- the graph ------------------------------------------------------------------------------------


def branches(tree: Tree) -> Iterator[tuple[str, int, GraphRow, bool]]:
    """Yield the lines of the tree: its branches, the level, the row, and whether it is repeated.

    :param tree: the tree.
    """
    done: set[int] = set()
    stack = [("", "", 0, number) for number in reversed(tree.results or [1])]
    while stack:
        lead, branch, level, number = stack.pop()
        row = tree.row(number)
        yield lead + branch, level, row, number in done
        if number in done:
            continue
        done.add(number)
        inner = lead
        if level < DEEPEST:  # deeper rows follow each other
            inner += {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        needs = [need for need in row.needs if need != number]
        for need in reversed(needs):
            stack.append((inner, "└─ " if need == needs[-1] else "├─ ", level + 1, need))


def deeper(level: int) -> str:
    """Return how far a row stands below the last level that is indented, or an empty string.

    :param level: its level; that of results is 0.

    >>> deeper(9), deeper(11)
    ('', '+2 levels: ')
    """
    more = level - DEEPEST
    return f"+{counted(more, 'level')}: " if more > 0 else ""


def _tree(tree: Tree) -> list[str]:
    lines = list(branches(tree))
    named = {row.number for _, _, row, again in lines[:MOST_ROWS] if again}
    cells = [_row(*line, named) for line in lines[:MOST_ROWS]]
    digits = max(len(count) for _, count, *_ in cells)
    place = max(len(where) for *_, where, _ in cells)
    side = min(34, max(len(notes) for *_, notes in cells))
    most = max(24, _columns() - digits - place - side - 8)
    room = min(most, max(len(name) for name, *_ in cells))
    made = []
    for name, count, where, notes in cells:
        start = f"  {_fitted(name, room):<{room}}  {count:>{digits}}  {where:<{place}}"
        rest = _columns() - len(start) - 2
        made.append(f"{start}  {_fitted(notes, rest)}".rstrip() if rest > 8 else start.rstrip())
    shown_rows = {row.number for *_, row, _ in lines[:MOST_ROWS]}
    return [*made, *_left_out(len(tree.rows) - len(shown_rows), "row")]


def _row(
    lead: str, level: int, row: GraphRow, again: bool, named: set[int]
) -> tuple[str, str, str, str]:
    lead += deeper(level)
    if again:
        return f"{lead}see ({row.number}): {row.name}", "", "", ""
    mark = f"({row.number}) " if row.number in named else ""
    return (
        printable(f"{lead}{mark}{row.name} {row.detail}".rstrip()),
        f"{row.nodes:,}",
        spot(row.where),
        ", ".join([*row.notes, *(["one needs another"] if row.number in row.needs else [])]),
    )


def _fitted(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(0, room - 1)].rstrip()}…"


# --- the rest -------------------------------------------------------------------------------------


def _hops(path: Sequence[Hop]) -> str:
    words = []
    for hop in path:
        times = f" x {hop.nodes:,}" if hop.nodes > 1 else ""
        at = f" ({spot(hop.where)})" if hop.where else ""
        words.append(f"{hop.name}{at}{times}")
    if len(words) > MOST_HOPS:
        half = MOST_HOPS // 2
        words[half:-half] = ["..."]
    return " -> ".join(words)


def critical_path(explained: Explanation) -> str:
    """Return the longest path in words.

    :param explained: the explanation.
    """
    known = explained.seconds.likely is not None
    takes = f", {time(explained.path_seconds)}" if known else ""
    return f"{counted(explained.depth, 'request')} deep{takes}: {_hops(explained.critical_path)}"


def _passes(rows: Sequence[PassRow]) -> list[str]:
    lines = ["PASSES" if rows else "PASSES  none (optimize is off)"]
    busy = [row for row in rows if not row.is_idle]
    names = [f"{row.name} ({row.numbered()})" if row.numbers else row.name for row in busy]
    room = max(map(len, names), default=0)
    for name, row in zip(names, busy, strict=True):
        lines_of = [(r, said(r)) for r in row.remarks if r.kind != "advice"]
        advised = len(row.remarks) - len(lines_of)
        words = [
            f"{'missed: ' if remark.kind == 'missed' else ''}{text}  {_origins(remark)}".rstrip()
            for remark, text in lines_of[:MOST_REMARKS]
        ]
        if len(lines_of) > MOST_REMARKS:
            words.append(f"... and {counted(len(lines_of) - MOST_REMARKS, 'further remark')}")
        if advised:
            words.append(f"{counted(advised, 'remark')} under ADVICE")
        words = words or ["changed the graph"]
        start = f"{name:<{room}}".replace(" ", _GLUE)
        lines += _wrapped(f"{start}{_GLUE}{_GLUE}{words[0]}", 2, room + 2)
        for text in words[1:]:
            lines += _wrapped(text, room + 4, hang=0)
    idle = [row.name for row in rows if row.is_idle]
    if idle:
        lines += _wrapped(f"nothing to do: {', '.join(idle)}", 2)
    return [line.replace(_GLUE, " ") for line in lines]


def said(remark: RemarkRow) -> str:
    """Return what a remark says, and how many say the same.

    :param remark: the remark.
    """
    if not remark.alike:
        return remark.text
    return f"{remark.text} (and {remark.alike:,} alike, {counted(remark.count, 'node')})"


def _origins(remark: RemarkRow) -> str:
    return ", ".join(spot(origin) for origin in remark.origins[:2])


def _left_out(count: int, noun: str) -> list[str]:
    return [f"  ... and {counted(count, noun)} more"] if count > 0 else []
