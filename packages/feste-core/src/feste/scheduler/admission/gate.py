"""The admission gate: what may be sent to one account at one endpoint, and when.

A request leaves the queue when there is a slot for it (:mod:`.slots`), when the buckets of requests
and of tokens hold enough (:mod:`.quota`), and when the provider has not asked everyone to wait. The
rates of the buckets are the lowest of what the user's limits say, what the provider's headers say,
and what refusals have taught (:mod:`.pace`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any, Generic, Literal, TypeVar

from feste.backend import Limits, RateLimit, Request, Usage
from feste.scheduler.admission.pace import Pace
from feste.scheduler.admission.queue import FairQueue
from feste.scheduler.admission.quota import Bucket, Costs
from feste.scheduler.admission.slots import Slots

__all__ = ["Gate", "Holds"]

P = TypeVar("P")

Holds = Literal["", "slot", "rate limit", "closed"]
"""Why a gate holds requests back; empty if it does not."""

#: A limit that is renewed after more seconds is no limit by the minute: it is not spread evenly.
_MINUTE = 60.0
_LONGEST = 2 * _MINUTE
#: So many refusals at a rate that was stated are no proof that it is wrong: tokens are estimates. Each
#: answer makes up for a part of one, so that one in a hundred never adds up.
_FEW, _FORGET, _LITTLE = 5.0, 0.99, 0.3
#: By which share less is sent for each of them.
_SLOWER = 0.02


class _Flight:
    """A request in flight, and what was reserved for it."""

    __slots__ = ("item", "number", "request", "sent", "stated", "taken", "tokens")

    def __init__(
        self, item: object, request: Request | None, tokens: float, gate: Gate[Any], now: float
    ) -> None:
        self.item = item  # so that its id() stays its own
        self.request = request
        self.tokens = tokens
        self.sent = now
        #: How many requests and tokens were taken until then, with these.
        self.number = gate.sent
        self.taken = gate.tokens.taken
        #: Whether a rate was stated by then, by the user or by the provider.
        self.stated = bool(gate.stated) or min(gate.wanted) < math.inf


class Gate(Generic[P]):
    """One gate: it holds the waiting requests, and the brain asks which may be sent.

    :param limits: the user's limits for the account.

    >>> gate = Gate(Limits(concurrency=1))
    >>> gate.push("a", 0), gate.push("b", 5)
    (None, None)
    >>> gate.pop(0.0), gate.pop(0.0), gate.holds(0.0)
    ('b', None, 'slot')
    >>> gate.left("b", 1.0)
    >>> gate.pop(1.0)
    'a'
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.slots = Slots()
        self.requests = Bucket()
        self.tokens = Bucket()
        self.costs = Costs()
        self.pace = Pace()
        self.closed_until = 0.0
        #: Requests that are being packed and will come here soon.
        self.coming = 0
        #: Lists that were answered, and whose answers no store has yet: a crash would lose them as it
        #: loses requests in flight, so no others take their places.
        self.unkept = 0
        #: The requests sent so far.
        self.sent = 0
        #: When the brain will check this gate again by itself.
        self.alarm = 0.0
        #: What holds back its requests besides it, as in CAUSES: the provider is down, a cap on money,
        #: no worker.
        self.parked = ""
        self._queue: FairQueue[P] = FairQueue()
        self._flights: dict[int, _Flight] = {}
        #: Limits by the second: the user's and those in headers, of requests and of tokens.
        self.wanted = (math.inf, math.inf)
        self.stated: dict[str, float] = {}
        #: Keyed by `id()`: a client may define its own `__eq__`.
        self._said: dict[int, tuple[weakref.ref[Any], Limits]] = {}
        self._gone = False
        #: Refusals at a rate that should be right, as far as they are not forgotten.
        self._unforeseen = 0.0
        if limits is not None:
            self._take([limits])

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """The number of requests in flight."""
        return len(self._flights)

    # --- the user's limits ------------------------------------------------------------------------

    def heed(self, client: Any, limits: Limits, now: float = 0.0) -> None:
        """Apply a client's limits. If several living clients share the account, the lowest holds.

        :param client: the client.
        :param limits: its limits.
        :param now: the time in seconds on the brain's clock.
        """
        known = self._said.get(id(client))
        if self._gone or known is None or known[0]() is not client or known[1] != limits:
            self._gone = False
            self._said[id(client)] = weakref.ref(client, self._forget), limits
            self._said = {name: one for name, one in self._said.items() if one[0]() is not None}
            self._take([said for _, said in self._said.values()], now)

    def _forget(self, _: object) -> None:
        self._gone = True  # a client may go on any thread: the limits change at the next request

    def _take(self, limits: list[Limits], now: float = 0.0) -> None:
        self.slots.bound(min((n.concurrency for n in limits if n.concurrency), default=None))
        self.wanted = (
            min((n.requests_per_minute or math.inf for n in limits), default=math.inf) / _MINUTE,
            min((n.tokens_per_minute or math.inf for n in limits), default=math.inf) / _MINUTE,
        )
        self._allow(now)

    def _allow(self, now: float) -> None:
        """Fill the buckets at the lowest of the rates that are known."""
        requests, tokens = self.wanted
        told = self.stated.get
        share = 1.0 - _SLOWER * min(_FEW, math.ceil(self._unforeseen))
        self.requests.allow(
            min(share * min(requests, told("requests", math.inf)), self.pace.rate), now
        )
        self.tokens.allow(share * min(tokens, told("tokens", math.inf)), now)

    # --- the queue --------------------------------------------------------------------------------

    def push(self, item: P, rank: int, lane: str = "", request: Request | None = None) -> None:
        """Add an item to the queue.

        :param item: the item.
        :param rank: its priority: the highest of a run goes first, equal ones in order of arrival.
        :param lane: the name of its run; runs take turns, so that each gets as many tokens as the others.
        :param request: its request, from which its tokens are known.
        """
        self._queue.push(item, rank, lane, request)

    def pop(self, now: float) -> P | None:
        """Return the next item that may go, counted as in flight; None if none may go.

        :param now: the time in seconds on the brain's clock.
        """
        place = self._queue.peek()
        if place is None:
            return None
        tokens = self.costs.of(place.request)
        cause = self._cause(tokens, now)
        if cause == "rate limit" and self.pace.rate <= self.requests.rate:
            self.pace.grow(now)
            self._allow(now)
            cause = self._cause(tokens, now)
        elif cause == "slot":
            self.slots.pressed = True
        if cause:
            return None
        self.pace.sends(self.sent, now)
        self.sent += 1
        self.requests.take(1.0)
        self.tokens.take(tokens)
        self.costs.saw(tokens)
        item = self._queue.pop(tokens)
        self._flights[id(item)] = _Flight(item, place.request, tokens, self, now)
        return item

    def remove(self, item: P) -> bool:
        """Remove an item from the queue; return whether it was there.

        :param item: the item.
        """
        return self._queue.remove(item)

    def drop(self, lane: str) -> list[P]:
        """Remove all items of a run from the queue and return them.

        :param lane: the run's name.
        """
        return self._queue.drop(lane)

    def waiting(self) -> list[P]:
        """Return all items of the queue, in no order."""
        return self._queue.items()

    def hold(self, lane: str, why: str) -> None:
        """Let other runs go first, since this one may send nothing for now.

        :param lane: the run's name.
        :param why: the reason, as in CAUSES.
        """
        self._queue.hold(lane, why)

    def let_go(self, lane: str, why: str) -> None:
        """Let a run have its turns again, if nothing else holds it.

        :param lane: the run's name.
        :param why: the reason that is no more.
        """
        self._queue.let_go(lane, why)

    @property
    def held_by(self) -> str:
        """Why all that wait here may send nothing for now, as in CAUSES; else an empty text."""
        return self._queue.held_by

    def queues(self, lane: str) -> bool:
        """Return whether a run has items in the queue.

        :param lane: the run's name.
        """
        return self._queue.has(lane)

    # --- what it would do -------------------------------------------------------------------------

    def room(self, now: float) -> int:
        """Return how many more requests it would admit at once, besides those that it knows of.

        :param now: the time in seconds on the brain's clock.
        """
        if now < self.closed_until:
            return 0
        room = min(
            self.slots.count(self.requests.rate) - self.in_flight - self.unkept,
            self.requests.room(1.0, now),
            self.tokens.room(self.costs.typical, now),
        )
        return max(0, int(room) - self._queue.turns - self.coming)

    def holds(self, now: float) -> Holds:
        """Return why the next request would have to wait, or an empty text.

        :param now: the time in seconds on the brain's clock.
        """
        place = self._queue.peek()
        return self._cause(
            self.costs.typical if place is None else self.costs.of(place.request), now
        )

    def wakes(self, now: float) -> float:
        """Return when that will change by itself: infinite if it takes the end of a request.

        :param now: the time in seconds on the brain's clock.
        """
        if now < self.closed_until:
            return self.closed_until
        if self.in_flight + self.unkept >= self.slots.count(self.requests.rate):
            return math.inf
        place = self._queue.peek()
        tokens = self.costs.typical if place is None else self.costs.of(place.request)
        return now + max(self.requests.wait(1.0, now), self.tokens.wait(tokens, now))

    def _cause(self, tokens: float, now: float) -> Holds:
        if now < self.closed_until:
            return "closed"
        if self.in_flight + self.unkept >= self.slots.count(self.requests.rate):
            return "slot"
        if self.requests.wait(1.0, now) or self.tokens.wait(tokens, now):
            return "rate limit"
        return ""

    # --- what became of requests ------------------------------------------------------------------

    def left(
        self, item: P, now: float, usage: Usage | None = None, limits: Iterable[RateLimit] = ()
    ) -> None:
        """Record a request that was served, and settle what it cost.

        :param item: the item.
        :param now: the time in seconds on the brain's clock.
        :param usage: the tokens that the provider counted, or None.
        :param limits: what its headers say.
        """
        flight = self._flights.pop(id(item))
        if usage is not None and usage.total and flight.request is not None:
            self.tokens.give_back(flight.tokens - usage.total, flight.number)
            self.costs.learn(flight.request, usage)
        if self._unforeseen:
            self._foresee(_FORGET * self._unforeseen, now)
        self.slots.answered(flight.sent, now, None if usage is None else usage.output)
        self._told(flight, limits, now)

    def lost(self, item: P, now: float, limits: Iterable[RateLimit] = ()) -> None:
        """Record a request whose outcome says nothing about the limits, but may have cost something.

        :param item: the item.
        :param now: the time in seconds on the brain's clock.
        :param limits: what its headers say.
        """
        self._told(self._flights.pop(id(item)), limits, now)

    def unsent(self, item: P) -> None:
        """Record a request that was not sent after all.

        :param item: the item.
        """
        self._refund(self._flights.pop(id(item)))

    def shrunk(self, item: P, request: Request) -> None:
        """Record that a request, which has not been sent yet, became a smaller one.

        :param item: the item.
        :param request: its request now.
        """
        flight, tokens = self._flights[id(item)], self.costs.of(request)
        self.tokens.give_back(flight.tokens - tokens, flight.number)
        flight.request, flight.tokens = request, tokens

    def throttled(
        self, item: P, now: float, wait: float | None, limits: Iterable[RateLimit] = ()
    ) -> None:
        """Record a request that was refused for rate.

        :param item: the item.
        :param now: the time in seconds on the brain's clock.
        :param wait: the seconds that the provider asks everyone to wait, or None.
        :param limits: what its headers say.
        """
        flight = self._flights.pop(id(item))
        self._refund(flight)
        self.slots.refused(flight.sent, now)
        if wait is not None:
            self.closed_until = max(self.closed_until, now + wait)
        self._told(flight, limits, now)
        if self._teaches(flight, limits, now):
            self.pace.refused(flight.sent, flight.number, now)
            self._allow(now)
        self._empty(flight, now)

    def _empty(self, flight: _Flight, now: float) -> None:
        """Lower the buckets: the provider's had nothing left when it refused a request."""
        for bucket, since in (
            (self.requests, self.sent - flight.number),
            (self.tokens, self.tokens.taken - flight.taken),
        ):
            if bucket.rate < math.inf:
                came = bucket.rate * (now - flight.sent)
                bucket.lower(max(0.0, came - since), flight.number, now)

    def _foresee(self, refusals: float, now: float) -> None:
        """Send a little less after refusals at a rate that should be right."""
        before = math.ceil(self._unforeseen)
        self._unforeseen = refusals if refusals > _LITTLE else 0.0
        if math.ceil(self._unforeseen) != before:
            self._allow(now)

    def _teaches(self, flight: _Flight, limits: Iterable[RateLimit], now: float) -> bool:
        """Whether a refusal says that requests are sent too fast, beyond what is stated by now."""
        if flight.stated:
            self._foresee(self._unforeseen + 1.0, now)
            if self._unforeseen <= _FEW:
                return False
        elif self.stated:
            return False  # nothing was known when it was sent
        left = {limit.unit: limit.remaining for limit in limits if limit.remaining is not None}
        return left.get("tokens", math.inf) >= flight.tokens or left.get("requests", 0.0) < 1.0

    def _refund(self, flight: _Flight) -> None:
        self.requests.give_back(1.0, flight.number)
        self.tokens.give_back(flight.tokens, flight.number)

    def _told(self, flight: _Flight, limits: Iterable[RateLimit], now: float) -> None:
        """Use what headers say: the rates, and how much the provider had left then."""
        if not limits:
            return
        rates: dict[str, float] = {}
        for limit in limits:
            if limit.limit and max(limit.window or 0.0, limit.reset or 0.0) <= _LONGEST:
                rate = limit.limit / (limit.window or _MINUTE)
                rates[limit.unit] = min(rate, rates.get(limit.unit, rate))
        if rates and rates != self.stated:
            self.stated.update(rates)
            self._allow(now)
        for limit in limits:
            if limit.remaining is None or limit.unit not in rates:
                continue
            if limit.unit == "requests":
                bucket, since = self.requests, float(self.sent - flight.number)
            else:
                bucket, since = self.tokens, self.tokens.taken - flight.taken
            came = bucket.rate * (now - flight.sent)
            bucket.lower(limit.remaining + came - since, flight.number, now)
