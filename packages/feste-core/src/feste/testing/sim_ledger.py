"""What happened at `SimServer`, as it happens: the log, the ledger, and their totals."""

from __future__ import annotations

import json
import os
import time
from collections import Counter

from feste.backend import Price
from feste.testing.sim_http import Request
from feste.testing.sim_types import Billed, LedgerEntry, Totals
from feste.testing.wire import Answer

__all__ = ["Ledger"]


class Ledger:
    """The books of a provider.

    :param path: the file for generated answers, which is appended to.
    :param price: what tokens cost, if that is known.
    """

    def __init__(self, path: str, price: Price | None) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.price = price
        self.in_flight = self.arrived = 0

    def forget(self) -> None:
        """Begin anew, with what is in flight; the file is kept."""
        self.log: list[Request] = []
        self.statuses: Counter[int] = Counter()
        self.struck: Counter[str] = Counter()
        self.peak = self.in_flight
        self.generated = self.delivered = self.left = 0
        self.billed = Billed()
        self.dollars = 0.0

    def totals(self) -> Totals:
        """Return the totals, without those of limits and prompt cache."""
        return Totals(
            requests=len(self.log),
            statuses=dict(self.statuses),
            faults=dict(+self.struck),
            generated=self.generated,
            delivered=self.delivered,
            left=self.left,
            in_flight=self.in_flight,
            peak=self.peak,
            billed=self.billed,
            dollars=None if self.price is None else self.dollars,
        )

    def arrive(self, request: Request) -> None:
        """Record the arrival of a request."""
        self.arrived += 1
        request.id = f"req_{self.arrived:08d}"
        request.started = time.monotonic()
        self.log.append(request)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)

    def strike(self, request: Request, fault: str) -> None:
        """Record that a fault or an outage hits a request."""
        request.fault = fault
        self.struck[fault] += 1

    def spare(self, request: Request) -> None:
        """Record that a request was refused before its fault could hit it."""
        if request.fault is not None:
            self.struck[request.fault] -= 1
            request.fault = None

    def leave(self, request: Request, *, early: bool = False) -> None:
        """Record that a request ended or its client left early; only the first call counts."""
        if request.finished is not None:
            return
        request.finished = time.monotonic()
        self.in_flight -= 1
        if early:
            request.left = request.finished
            self.left += 1
        if request.status is not None:
            self.statuses[request.status] += 1
        if request.delivered:
            self.delivered += request.items

    def bill(self, request: Request, answer: Answer) -> None:
        """Write down an answer as soon as it is generated, whether or not a client receives it."""
        billed = request.billed = answer.billed
        self.billed += billed
        request.items = len(answer.items)
        self.generated += request.items
        if self.price is not None:
            request.dollars = self.price.dollars(
                billed.input_tokens,
                billed.output_tokens,
                billed.cached_tokens,
                billed.written_tokens,
            )
            self.dollars += request.dollars
        lines = []
        for item in answer.items:
            entry = LedgerEntry(
                request=request.id,
                path=request.path,
                prompt=item.prompt,
                answer=item.answer,
                key=item.key,
                sample=item.sample,
            )
            lines.append(json.dumps(entry) + "\n")
        if lines:
            os.write(self.file, "".join(lines).encode())
