"""Reserve the most that a request may cost before it is sent, and settle what it did cost.

Where a cap does not allow a request now, it waits for what is under way, which mostly costs less
than was reserved for it. If nothing is under way any more, a request of several calls goes with as
many as there is room for. Where there is room for none, the cap is reached: the run stops.

The tokens of a prompt are taken to be at most the bytes of its own request: a token is a byte at
least, whatever the language, and the names and brackets of the JSON cover what a provider adds. That
holds in a list too, and :func:`feste.explain` counts the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from feste.backend import Price, Response
from feste.budget import Budget, shown_amount
from feste.errors import BudgetExceeded, CallError, ConfigError
from feste.scheduler.halves import priced_as, unknown_price
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Spending"]

Verdict = Literal["go", "wait", "shorten", "stop"]


class Spending:
    """Holds requests to the budgets of their runs.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain

    def reserve(self, parcel: Parcel) -> Verdict:
        """Reserve the most that a request may cost.

        :param parcel: the request.
        :returns: whether it may go, has to wait for requests under way, is too long, or its run stops.
        :raises ConfigError: if nobody knows what it may cost; the message names the fix.
        """
        run = parcel.run
        self.settle(parcel, None)  # what was set aside until it was shorter
        bounds = [(budget, _bound(parcel, budget)) for budget in run.caps]
        for budget, amount in bounds:
            if not budget.fits(amount):
                if budget.pending:
                    return "wait"
                if len(parcel.members) > 1:
                    return "shorten"
                self._stop(run, budget, amount)
                return "stop"
        _reserve(parcel, bounds)
        return "go"

    def set_aside(self, parcel: Parcel) -> int:
        """Reserve what is left until a request is shorter; return how many of its calls may go.

        :param parcel: the request, for which there is no room.
        """
        bounds = [(budget, _bound(parcel, budget)) for budget in parcel.run.caps]
        calls = min(_fitting(parcel, budget) for budget in parcel.run.caps)
        _reserve(parcel, [(budget, min(amount, budget.left)) for budget, amount in bounds])
        return max(1, calls)

    def has_room(self, parcel: Parcel) -> bool:
        """Return whether a request need not wait for those under way: it may go, or its run stops.

        :param parcel: the request, which has waited.
        """
        own = dict(parcel.reserved)
        budgets = ((b, _bound(parcel, b) - own.get(b, 0.0)) for b in parcel.run.caps)
        return all(budget.fits(amount) or not budget.pending for budget, amount in budgets)

    def settle(self, parcel: Parcel, outcome: Response | CallError | None) -> None:
        """Replace what was reserved for an attempt by what it has cost.

        :param parcel: the request.
        :param outcome: its response, or why it failed; None if it was not sent.
        """
        run = parcel.run
        reserved, parcel.reserved = parcel.reserved, []
        spent: dict[str, tuple[float, float]] = {}
        for budget, amount in reserved:
            used = _used(parcel, outcome, budget, amount)
            budget.settle(amount, used)
            if used is not None:
                spent[budget.unit] = used, amount
        for unit, (used, amount) in spent.items():
            run.spent[unit] += used
            run.reserved[unit] -= amount

    def _stop(self, run: Run, budget: Budget, amount: float) -> None:
        kept = f" or the store {run.settings['store']}" if run.store is not None else ""
        run.fault = BudgetExceeded(
            f"the budget of {budget.shown(budget.cap)} is reached: "
            f"{budget.shown(budget.spent)} spent, {budget.shown(budget.reserved)} reserved for "
            f"requests whose outcome is unknown, and the next one may cost {budget.shown(amount)}. "
            f"Run again with a larger budget=: the nodes{kept} have what was bought",
            cap=budget.cap,
            spent=budget.spent,
            reserved=budget.reserved,
            unit=budget.unit,
        )
        run.series.why = f"the budget of {budget.shown(budget.cap)} is reached"


def _reserve(parcel: Parcel, bounds: Sequence[tuple[Budget, float]]) -> None:
    for budget, amount in bounds:
        budget.reserve(amount)
    for unit, amount in {budget.unit: amount for budget, amount in bounds}.items():
        parcel.run.reserved[unit] += amount
    parcel.reserved = list(bounds)


def _fitting(parcel: Parcel, budget: Budget) -> int:
    """Return how many of a request's calls a budget has room for, of the first ones and not all."""
    calls = range(1, len(parcel.members))
    return bisect_left(calls, True, key=lambda n: not budget.fits(_bound(parcel, budget, n)))


def _bound(parcel: Parcel, budget: Budget, calls: int | None = None) -> float:
    """Return the most that a request may cost, or its first calls, in the units of a budget."""
    price = None if budget.unit == "tokens" else _price(parcel)
    requests = parcel.requests[:calls]
    size = sum(request.size for request in requests[:: parcel.request.samples])
    bounds = [request.max_output for request in requests]
    made = sum(bound or 0 for bound in bounds)
    if None in bounds and (price is None or price.output > 0):
        raise ConfigError(
            f"budget={shown_amount(budget.cap, budget.unit)} needs to know how many tokens a call of "
            f"{parcel.call.name} may generate at most: give it max_tokens=, or what the operation "
            "calls its limit"
        )
    if price is None:
        return size + made
    return price.at_most(size, made)


def _price(parcel: Parcel) -> Price:
    request = parcel.requests[0]  # alone, as its price was looked up when it was prepared
    price = priced_as(parcel.call, request, parcel.run.profiles)
    if price is None:
        raise unknown_price(parcel.call, request.model)
    return price


def _used(
    parcel: Parcel, outcome: Response | CallError | None, budget: Budget, amount: float
) -> float | None:
    """Return what an attempt has cost, in the units of a budget; None if that is unknown."""
    if outcome is None:
        return 0.0
    if isinstance(outcome, CallError):
        return {"no": 0.0, "yes": amount, "unknown": None}[outcome.billed]
    usage = outcome.usage
    if usage is None:  # a provider that does not say: at most this
        return amount
    if budget.unit == "tokens":
        return float(usage.total)
    cached = min(usage.input, usage.cached)
    written = min(usage.input - cached, usage.written)
    return _price(parcel).dollars(usage.input, usage.output, cached, written)
