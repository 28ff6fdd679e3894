"""Which stored answer a draw takes.

A draw takes its own answer. Without one, it takes an answer to the same request that belongs to no
draw of this process, so that a program which was rewritten, or runs eagerly now, still finds what
it paid for. No answer serves two draws of a process: five samples stay five samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from feste import draw
from feste.draw import Draw
from feste.store.rows import draw_of

__all__ = ["Claims"]


class Claims:
    """The answers that draws of this process have taken, and those that are still free.

    Only answers that were there when the store was opened can be free: later ones are of draws of
    this process.
    """

    def __init__(self) -> None:
        #: The draw that took an answer, by the answer's id.
        self._taken: dict[int, Draw] = {}
        #: The scopes of tasks of this process: what they bought before waits for them.
        self.reserved: set[str] = set()
        self._given: dict[tuple[str, Draw], int] = {}
        #: The lowest ordinal among the answers of a key, by scope and fingerprint.
        self._first: dict[tuple[str, tuple[Any, ...]], int] = {}
        #: For each key the free answers by ordinal: ids and draws.
        self._free: dict[str, dict[int, list[tuple[int, Draw]]]] = {}

    def reopen(self) -> None:
        """Look for free answers anew: another process may have written the store meanwhile."""
        self._free.clear()
        self._first.clear()

    def given(self, key: str, drawn: Draw) -> int | None:
        """Return the id of the foreign answer that a draw took before, or None.

        :param key: the call's key.
        :param drawn: its draw.
        """
        answer = self._given.get((key, drawn))
        # a purge frees numbers, so the id may be another draw's by now
        return answer if answer is not None and self._taken.get(answer) == drawn else None

    def note(self, answer: int, drawn: Draw) -> None:
        """Note that an answer was bought for a draw, or given to it for good.

        :param answer: its id.
        :param drawn: the draw.
        """
        self._taken[answer] = drawn

    def give(self, answer: int, key: str, drawn: Draw) -> bool:
        """Give an answer to a draw; return False if another draw has taken it.

        :param answer: its id.
        :param key: the call's key.
        :param drawn: the draw.
        """
        given = self.take_own(answer, drawn)
        if given:
            self._given[key, drawn] = answer
        return given

    def take_own(self, answer: int, drawn: Draw) -> bool:
        """Take a draw's own answer; return False if another draw has taken it.

        :param answer: its id.
        :param drawn: its own draw.
        """
        return self._taken.setdefault(answer, drawn) == drawn

    def knows(self, key: str) -> bool:
        """Whether the free answers of a key were given to :meth:`learn`.

        :param key: the key.
        """
        return key in self._free

    def learn(self, key: str, rows: Iterable[tuple[int, str]]) -> None:
        """Note the answers of a key.

        :param key: the key.
        :param rows: their ids and draws, newest first.
        """
        free: dict[int, list[tuple[int, Draw]]] = {}
        for answer, text in rows:
            own = draw_of(text)
            free.setdefault(own.n, []).append((answer, own))
            family = (key, own[:2])
            self._first[family] = min(own.n, self._first.get(family, own.n))
        self._free[key] = dict(sorted(free.items()))

    def _awaited(self, key: str, own: Draw, drawn: Draw) -> bool:
        """Whether the draw that an answer was bought for may still come for it.

        It may if it was made, or if it is of a task that will run. It may also if it differs from
        the asking draw in its ordinal alone, and a draw of this process has the first answer of
        them: then the ordinals mean the same as before, and the asking draw's answer is a gap.
        """
        if draw.is_collected(own) or (own.scope in self.reserved and own.scope != drawn.scope):
            return True
        siblings = (own.scope, own.fingerprint) == (drawn.scope, drawn.fingerprint)
        return siblings and draw.is_collected(own._replace(n=self._first[key, own[:2]]))

    def take(self, key: str, drawn: Draw) -> int | None:
        """Take a free answer for a draw that has none; return its id or None.

        An answer with the draw's own ordinal is preferred, so that a program that runs eagerly
        gives each of its draws the same answer as when it ran lazily.

        :param key: the call's key.
        :param drawn: its draw.
        """
        free = self._free[key]
        n = drawn.n
        while free:
            rows = free.get(n)
            while rows:
                answer, own = rows.pop()
                if answer not in self._taken and not self._awaited(key, own, drawn):
                    self._taken[answer] = drawn
                    self._given[key, drawn] = answer
                    return answer
            free.pop(n, None)
            n = next(iter(free), 0)
        return None
