"""The requests of a run, packed: a run of a million of them must fit into memory beside its graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from struct import Struct
from typing import get_args, overload

from feste.errors import Billed
from feste.events import CAUSES, RequestFinished

__all__ = ["RequestLog"]

#: What a request may wait for by itself.
_CAUSES = tuple(cause for cause in CAUSES if cause not in ("dependency", "equal_call"))
#: at, ready, sent; waits by cause; four counts of tokens, status; number, items, attempt; kind, error;
#: billed. Unknown tokens and no status are -1.
_RECORD = Struct(f"<3d{len(_CAUSES)}d5qqiiIHB")
_WAITS = slice(3, 3 + len(_CAUSES))
_BILLED: tuple[Billed, ...] = get_args(Billed)


class RequestLog(Sequence[RequestFinished]):
    """A sequence of requests that holds bytes, and makes each record when it is asked for.

    :param run: the name of the run.
    :param records: the first requests.

    >>> log = RequestLog("run-1")
    >>> log.append(RequestFinished("run-1", 2.0, "fake", "chat", "m", 1, 1, 0.5, 1.0))
    >>> log[0].sent, log[0].input_tokens, len(log)
    (1.0, None, 1)
    """

    __slots__ = ("_data", "_errors", "_ids", "_kinds", "run")

    def __init__(self, run: str = "", records: Iterable[RequestFinished] = ()) -> None:
        self.run = run
        self._data = bytearray()
        #: Backend, operation, model and worker of requests, and names of errors; records hold their
        #: positions.
        self._kinds: dict[tuple[str, str, str, str], int] = {}
        self._errors: dict[str, int] = {"": 0}
        self._ids: list[str | None] = []
        for record in records:
            self.append(record)

    def append(self, record: RequestFinished) -> None:
        """Add a request.

        :param record: the request.
        """
        kind = (record.backend, record.operation, record.model, record.worker)
        waits = record.waits
        self._ids.append(record.request_id)  # first: a report may be made at any moment
        self._data += _RECORD.pack(
            record.at,
            record.ready,
            record.sent,
            *[waits.get(cause, 0.0) for cause in _CAUSES],
            _known(record.input_tokens),
            _known(record.output_tokens),
            _known(record.cached_tokens),
            _known(record.written_tokens),
            _known(record.status),
            record.number,
            record.items,
            record.attempt,
            self._kinds.setdefault(kind, len(self._kinds)),
            self._errors.setdefault(record.error, len(self._errors)),
            _BILLED.index(record.billed if record.billed in _BILLED else "unknown"),
        )

    def copy(self) -> RequestLog:
        """Return the requests so far, which stay as they are."""
        other = RequestLog(self.run)
        other._data += self._data
        other._kinds, other._errors = dict(self._kinds), dict(self._errors)
        other._ids = self._ids[: len(other)]
        return other

    def __len__(self) -> int:
        return len(self._data) // _RECORD.size

    @overload
    def __getitem__(self, position: int) -> RequestFinished: ...

    @overload
    def __getitem__(self, position: slice) -> list[RequestFinished]: ...

    def __getitem__(self, position: int | slice) -> RequestFinished | list[RequestFinished]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"there are {len(self)} requests, none at {position}")
        return self._record(position % len(self), list(self._kinds), list(self._errors))

    def __iter__(self) -> Iterator[RequestFinished]:
        count = len(self)
        kinds, errors = list(self._kinds), list(self._errors)
        for i in range(count):
            yield self._record(i, kinds, errors)

    def _record(
        self, i: int, kinds: Sequence[tuple[str, str, str, str]], errors: Sequence[str]
    ) -> RequestFinished:
        row = _RECORD.unpack_from(self._data, i * _RECORD.size)
        at, ready, sent = row[:3]
        waits = {cause: wait for cause, wait in zip(_CAUSES, row[_WAITS]) if wait}
        *numbers, number, items, attempt, kind, error, billed = row[_WAITS.stop :]
        read, made, cached, written, status = (None if known < 0 else known for known in numbers)
        backend, operation, model, worker = kinds[kind]
        return RequestFinished(
            self.run,
            at,
            backend,
            operation,
            model,
            items,
            attempt,
            ready,
            sent,
            read,
            made,
            cached,
            written,
            status,
            errors[error],
            self._ids[i],
            _BILLED[billed],
            number,
            waits,
            worker,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} requests of {self.run}>"


def _known(number: int | None) -> int:
    """Return a number of a plugin's as it is kept: -1 for unknown, or if it is no count."""
    return number if isinstance(number, int) and 0 <= number < 1 << 63 else -1
