"""A plan as HTML for notebooks and pages: self-contained, without scripts, in the page's colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from feste.report.explanation.passes import PassRow, RemarkRow, advice
from feste.report.explanation.summary import headline, operations, ran
from feste.report.explanation.text import DEEPEST, branches, critical_path, deeper, said, spot
from feste.report.explanation.tree import MOST_ROWS, GraphRow, Tree
from feste.report.svg import xml
from feste.wording import counted

if TYPE_CHECKING:
    from feste.report.explanation.explanation import Explanation

__all__ = ["html_of"]

# No colours of its own, so that it can be read on light and on dark pages.
_STYLE = (
    ".feste-plan{line-height:1.5}.feste-plan p{white-space:pre-wrap}"
    ".feste-plan table{border-collapse:collapse}"
    ".feste-plan td,.feste-plan th{padding:.1em .7em;text-align:right}"
    ".feste-plan .name{text-align:left}"
    ".feste-plan ul{list-style:none;margin:0;padding-left:1.4em}"
    ".feste-plan summary{cursor:pointer}"
    ".feste-plan .side{opacity:.7;padding-left:.7em}"
)


def html_of(explained: Explanation) -> str:
    """Return an explanation as an HTML element.

    :param explained: the explanation.
    """
    parts = [
        f"<style>{_STYLE}</style>",
        f"<p><b>Plan</b>   {xml('   '.join(headline(explained)))}</p>",
    ]
    parts += [f"<p>{xml(note)}</p>" for note in explained.notes]
    if explained.rows:
        parts.append(_table(operations(explained.rows, explained.actual)))
    if explained.actual is not None:
        happened = map(xml, ran(explained.actual, explained))
        parts.append(_section("Run", _list(happened), is_open=True))
    if explained.tree.rows:
        title = f"Graph: {counted(len(explained.tree.rows), 'row')}"
        parts.append(_section(title, _tree(explained.tree), is_open=True))
    if explained.depth:
        parts.append(f"<p><b>Critical path</b> {xml(critical_path(explained))}</p>")
    parts.append(
        _section("Passes", _list(map(_pass, explained.passes)) or "none (optimize is off)")
    )
    given = [
        f"{_remark(remark)}<span class='side'>{xml(name)}</span>"
        for name, remark in advice(explained.passes)
    ]
    if given:
        parts.append(_section("Advice", _list(given), is_open=True))
    return f"<div class='feste-plan'>{''.join(parts)}</div>"


def _section(title: str, body: str, *, is_open: bool = False) -> str:
    mark = " open='open'" if is_open else ""
    return f"<details{mark}><summary><b>{xml(title)}</b></summary>{body}</details>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    names = rows[0].index("calls")

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag} class='name'>{xml(cell)}</{tag}>"
            if i < names
            else f"<{tag}>{xml(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    heading, *body = rows
    filled = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
    return f"<table><thead><tr>{cells('th', heading)}</tr></thead><tbody>{filled}</tbody></table>"


def _list(items: Iterable[str]) -> str:
    filled = "".join(f"<li>{item}</li>" for item in items)
    return f"<ul>{filled}</ul>" if filled else ""


def _tree(tree: Tree) -> str:
    """Nest the rows: each that needs others can be folded."""
    parts: list[str] = []
    depths: list[int] = []
    lines = list(branches(tree))
    named = {row.number for *_, row, again in lines if again}
    for _, level, row, again in lines[:MOST_ROWS]:
        depth = min(level, DEEPEST)
        while depths and depths[-1] >= depth:
            depths.pop()
            parts.append("</ul></details></li>")
        if again:
            parts.append(f"<li>{deeper(level)}see ({row.number}): {xml(row.name)}</li>")
            continue
        words = deeper(level) + _row(row, named)
        if any(need != row.number for need in row.needs):
            parts.append(f"<li><details open='open'><summary>{words}</summary><ul>")
            depths.append(depth)
        else:
            parts.append(f"<li>{words}</li>")
    parts += ["</ul></details></li>"] * len(depths)
    return f"<ul>{''.join(parts)}</ul>"


def _row(row: GraphRow, named: set[int]) -> str:
    mark = f"({row.number}) " if row.number in named else ""
    times = f" × {row.nodes:,}" if row.nodes > 1 else ""
    side = ", ".join(filter(None, [spot(row.where), *row.notes]))
    return f"{mark}<b>{xml(row.name)}</b> {xml(row.detail)}{times}<span class='side'>{xml(side)}</span>"


def _pass(row: PassRow) -> str:
    rest = [_remark(remark) for remark in row.remarks if remark.kind != "advice"]
    side = "nothing to do" if row.is_idle else row.numbered()
    return f"<b>{xml(row.name)}</b><span class='side'>{side}</span>{_list(rest)}"


def _remark(remark: RemarkRow) -> str:
    missed = "missed: " if remark.kind == "missed" else ""
    return f"{missed}{xml(said(remark))}<span class='side'>{xml(', '.join(map(spot, remark.origins)))}</span>"
