"""Hear from workers what the tasks took that they ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import uuid4

__all__ = ["Note", "Notes"]


class Note(NamedTuple):
    """What a worker told of the tasks of a chunk.

    :param worker: its name.
    :param seconds: how long each task ran there.
    :param sizes: the size of each value in bytes, about; 0 for what is no value.
    """

    worker: str
    seconds: Sequence[float]
    sizes: Sequence[int]


class Notes:
    """The notes of chunks under way. A chunk that ran twice has two; one may also never come.

    :param client: a ``distributed.Client``; its loop hears the notes.
    :param on_left: called with the number of a chunk, and the places of the tasks that it gave back.
    """

    def __init__(self, client: Any, on_left: Callable[[int, Sequence[int]], None]) -> None:
        self.topic = f"feste-{uuid4().hex}"
        self._client = client
        self._on_left: Callable[[int, Sequence[int]], None] | None = on_left
        self._notes: dict[int, Note | None] = {}
        client.subscribe_topic(self.topic, self._hear)

    def expect(self, number: int) -> None:
        """Keep the next note with this number.

        :param number: the number of a chunk.
        """
        self._notes[number] = None

    def take(self, number: int) -> Note | None:
        """Return the last note of a chunk, or None, and keep no more of them.

        :param number: its number.
        """
        return self._notes.pop(number, None)

    def close(self) -> None:
        """Hear no more."""
        self._on_left = None  # the client keeps its handlers for ever
        self._notes.clear()
        with suppress(Exception):  # the client is closed
            self._client.unsubscribe_topic(self.topic)

    def _hear(self, event: tuple[float, Any]) -> None:
        told = event[1]
        number = told["number"]
        if number not in self._notes:
            return
        if "left" not in told:
            self._notes[number] = Note(told["name"], told["seconds"], told["sizes"])
        elif self._on_left is not None:
            self._on_left(number, told["left"])
