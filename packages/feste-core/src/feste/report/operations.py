"""The rows of a report: what each operation and model did, waited for and cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from feste.events import CAUSES
from feste.report.prices import Prices, certain, possible
from feste.scheduler.totals import IN_FLIGHT, PYTHON, Totals

__all__ = ["OperationRow", "rows_of", "saved_by", "sum_if_known"]


@dataclass(slots=True)
class OperationRow:
    """The totals of one operation and model.

    :param operation: ``plugin.operation``.
    :param model: the model.
    :param calls: the number of calls answered.
    :param requests: the number of requests sent, including failed ones.
    :param failed: the number of requests that ended in an error.
    :param input_tokens: tokens read, where the provider reported them; None if it never did.
    :param output_tokens: tokens generated, likewise.
    :param cached_tokens: how many of the tokens read came from the provider's prompt cache.
    :param written_tokens: how many were written to it.
    :param dollars: the price of the requests whose price is known; None if there is none.
    :param unpriced: the number of requests of unknown price.
    :param seconds: the time in flight, summed over requests.
    :param longest: the duration of the longest request in seconds.
    :param dollars_possible: the price if each request that may have been billed was, in full; None if
        that has no known bound.
    :param begun: the number of calls that were begun, answered or not.
    :param waits: the seconds that calls waited, by cause, summed over calls; see
        :data:`feste.events.CAUSES`. With ``in_flight`` and ``python`` they are all the time of the calls,
        from the start of the run to their ends.
    :param in_flight: the seconds for which calls were in flight, summed over calls.
    :param python: the seconds that calls were prepared, packed, unpacked and parsed, likewise.
    """

    operation: str
    model: str
    calls: int = 0
    requests: int = 0
    failed: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    written_tokens: int | None = None
    dollars: float | None = None
    unpriced: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    dollars_possible: float | None = None
    begun: int = 0
    waits: dict[str, float] = field(default_factory=dict)
    in_flight: float = 0.0
    python: float = 0.0

    def add(self, totals: Totals, prices: Prices) -> None:
        """Add the totals of one client.

        :param totals: the totals.
        :param prices: the prices.
        """
        price = prices.of(totals)
        dollars, unpriced = certain(totals, price)
        most = possible(totals, price)
        if not self.requests:
            self.dollars_possible = most
        else:
            self.dollars_possible = sum_if_known(self.dollars_possible, most)
        if dollars is not None:
            self.dollars = dollars + (self.dollars or 0.0)
        self.unpriced += unpriced
        self.calls += totals.calls
        self.requests += totals.requests
        self.failed += totals.failed
        if totals.counted:
            self.input_tokens = totals.input_tokens + (self.input_tokens or 0)
            self.output_tokens = totals.output_tokens + (self.output_tokens or 0)
            self.cached_tokens = totals.cached_tokens + (self.cached_tokens or 0)
            self.written_tokens = totals.written_tokens + (self.written_tokens or 0)
        self.seconds += totals.seconds
        self.longest = max(self.longest, totals.longest)
        self.begun += totals.begun
        self.in_flight += totals.times[IN_FLIGHT]
        self.python += totals.times[PYTHON]
        for cause, seconds in zip(CAUSES, totals.times):
            if seconds:
                self.waits[cause] = seconds + self.waits.get(cause, 0.0)


def rows_of(rows: Iterable[Totals], prices: Prices) -> list[OperationRow]:
    """Return a row for each operation and model of which a run has sent requests.

    :param rows: the totals of the run.
    :param prices: the prices.
    """
    found: dict[tuple[str, str], OperationRow] = {}
    for totals in (each for each in rows if each.requests):
        name = (totals.operation, totals.model)
        found.setdefault(name, OperationRow(*name)).add(totals, prices)
    return list(found.values())


def saved_by(rows: Iterable[Totals], prices: Prices) -> float | None:
    """Return what answers would have cost that a store or a cache had; None if that is not known.

    :param rows: the totals of the run.
    :param prices: the prices.
    """
    saved = 0.0
    for totals in rows:
        if totals.reused:
            price = prices.of(totals)
            if price is None:
                return None
            saved += price.dollars(totals.reused_input, totals.reused_output)
    return saved


def sum_if_known(one: float | None, other: float | None) -> float | None:
    """Return the sum of two figures; None if one of them is not known.

    :param one: the one.
    :param other: the other.
    """
    return None if one is None or other is None else one + other
