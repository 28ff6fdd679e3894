"""What the passes of a plan did and did not do, remarks of one kind put together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from feste.optimization import PassReport, Remark
from feste.report.naming import Places

__all__ = ["PassRow", "RemarkRow", "advice", "pass_rows"]

#: A number and the noun behind it: remarks that differ in these only are shown as one.
_NUMBER = re.compile(r"\d[\d,.]*(?: (\w+?)s?\b)?")


@dataclass(slots=True)
class RemarkRow:
    """A remark, and those that say the same of other nodes.

    :param kind: ``"applied"``, ``"missed"`` or ``"advice"``.
    :param text: the first one's sentence.
    :param count: the number of nodes concerned, of all of them.
    :param alike: how many further remarks differ in numbers only.
    :param origins: ``file:line`` of the first few nodes.
    """

    kind: str
    text: str
    count: int
    alike: int = 0
    origins: list[str] = field(default_factory=list)


@dataclass(slots=True)
class PassRow:
    """What one pass did.

    :param name: the pass.
    :param phase: the name of its phase.
    :param level: the name of its level.
    :param changed: how many times it changed the graph.
    :param rewrites: how many rewrites it made.
    :param numbers: the numbers of its rewrites, as the setting ``max_rewrites`` counts them: first
        and last of each stretch.
    :param remarks: its remarks.
    """

    name: str
    phase: str
    level: str
    changed: int
    rewrites: int
    numbers: list[tuple[int, int]]
    remarks: list[RemarkRow]

    @property
    def is_idle(self) -> bool:
        """Whether there was nothing to do, and nothing to say."""
        return not self.rewrites and not self.changed and not self.remarks

    def numbered(self) -> str:
        """Return the numbers of its rewrites as text, or an empty string."""
        told = [str(a) if a == b else f"{a:,}-{b:,}" for a, b in self.numbers]
        if len(told) > 3:
            told[1:-1] = ["..."]
        word = "rewrite" if self.rewrites == 1 else "rewrites"
        return f"{word} {', '.join(told)}" if told else ""


def pass_rows(reports: Iterable[PassReport]) -> list[PassRow]:
    """Return what each pass did, in running order.

    :param reports: the reports of the passes.
    """
    places = Places()
    return [
        PassRow(
            report.name,
            report.phase.name,
            report.level.name,
            report.changed,
            report.rewrites,
            _joined(report.numbers),
            _summarized(report.remarks, places),
        )
        for report in reports
    ]


def advice(rows: Iterable[PassRow]) -> list[tuple[str, RemarkRow]]:
    """Return the advice of all passes, each piece with the name of its pass.

    :param rows: what the passes did.
    """
    return [(row.name, each) for row in rows for each in row.remarks if each.kind == "advice"]


def _joined(numbers: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join stretches that follow each other."""
    joined: list[tuple[int, int]] = []
    for first, last in numbers:
        if joined and joined[-1][1] + 1 == first:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    return joined


def _summarized(remarks: Iterable[Remark], places: Places) -> list[RemarkRow]:
    rows: dict[Any, RemarkRow] = {}
    for remark in remarks:
        form = remark.kind, _NUMBER.sub(r"# \1", remark.text)
        row = rows.get(form)
        if row is None:
            rows[form] = row = RemarkRow(remark.kind, remark.text, 0)
        else:
            row.alike += 1
        row.count += remark.count
        origins = [places.short(origin) for origin in remark.origins]
        row.origins = list(dict.fromkeys([*row.origins, *origins]))[:3]
    return list(rows.values())
