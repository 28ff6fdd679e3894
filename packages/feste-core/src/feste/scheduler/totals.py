"""What the calls of one operation and model waited for, sent and used in a run, as it goes on."""

from __future__ import annotations

from feste.backend import Backend
from feste.events import CAUSES, RequestFinished

__all__ = ["IN_FLIGHT", "PYTHON", "Totals"]

#: What a call's time goes to besides waiting: its request under way, and its own pieces of Python.
IN_FLIGHT, PYTHON = len(CAUSES), len(CAUSES) + 1


class Totals:
    """The sums of one operation and model of one client.

    :param client: the backend, which knows the prices.
    :param operation: ``plugin.operation``.
    :param model: the model.
    """

    __slots__ = (
        "begun",
        "cached_tokens",
        "calls",
        "client",
        "counted",
        "failed",
        "free",
        "input_tokens",
        "longest",
        "model",
        "most_input",
        "most_output",
        "operation",
        "output_tokens",
        "perhaps_billed",
        "requests",
        "reused",
        "reused_input",
        "reused_output",
        "seconds",
        "times",
        "unbounded",
        "written_tokens",
    )

    def __init__(self, client: Backend, operation: str, model: str) -> None:
        self.client = client
        self.operation = operation
        self.model = model
        #: The seconds of its calls, from the start of the run: waits by position in CAUSES, then
        #: IN_FLIGHT and PYTHON.
        self.times = [0.0] * (len(CAUSES) + 2)
        self.begun = self.requests = self.failed = self.calls = 0
        self.seconds = self.longest = 0.0
        #: Requests whose tokens are known, and failed ones that the provider does not charge for.
        self.counted = self.free = 0
        self.input_tokens = self.output_tokens = self.cached_tokens = self.written_tokens = 0
        #: Requests that may have been billed without an answer.
        self.perhaps_billed = 0
        #: The most tokens that these, and answers that were not counted, may have had; and how many
        #: of both have no bound.
        self.most_input = self.most_output = self.unbounded = 0
        #: The answers that a store or a cache had, and their tokens.
        self.reused = 0
        self.reused_input = self.reused_output = 0.0

    def merge(self, other: Totals) -> None:
        """Add the totals of another run for the same operation, model and client.

        :param other: the totals.
        """
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.times = [one + more for one, more in zip(self.times, other.times, strict=True)]

    def add(self, record: RequestFinished, size: int, bound: int | None) -> None:
        """Add a request that ended.

        :param record: the request.
        :param size: its bytes, which are at least as many as its tokens.
        :param bound: the most tokens that it may have generated, or None.
        """
        self.requests += 1
        self.failed += bool(record.error)
        self.calls += 0 if record.error else record.items
        self.seconds += record.at - record.sent
        self.longest = max(self.longest, record.at - record.sent)
        self.perhaps_billed += record.billed == "unknown"
        if record.error and record.billed == "no":
            self.free += 1
        elif record.input_tokens is None:
            self.most_input += size
            self.most_output += bound or 0
            self.unbounded += bound is None
        else:
            read = record.input_tokens
            cached = min(read, record.cached_tokens or 0)
            self.counted += 1
            self.input_tokens += read
            self.output_tokens += record.output_tokens or 0
            self.cached_tokens += cached
            self.written_tokens += min(read - cached, record.written_tokens or 0)


_SUMMED = sorted({*Totals.__slots__} - {"client", "operation", "model", "longest", "times"})
