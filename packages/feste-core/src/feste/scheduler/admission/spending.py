"""Reserve the most that a request may cost before it is sent, and settle what it did cost.

Where a cap does not allow a request now, it waits for what is under way, which mostly costs less
than was reserved for it. If nothing is under way any more, the cap is reached: the run stops.

The tokens of a prompt are taken to be at most the bytes of the request: a token is a byte at least,
whatever the language, and the names and brackets of the JSON cover what a provider adds.
"""

from __future__ import annotations

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

Verdict = Literal["go", "wait", "stop"]


class Spending:
    """Holds requests to the budgets of their runs.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain

    def reserve(self, parcel: Parcel) -> Verdict:
        """Reserve the most that a request may cost.

        :param parcel: the request.
        :returns: whether it may go, has to wait for requests under way, or its run stops.
        :raises ConfigError: if nobody knows what it may cost; the message names the fix.
        """
        run = parcel.run
        bounds = [(budget, _bound(parcel, budget)) for budget in run.caps]
        for budget, amount in bounds:
            if not budget.fits(amount):
                if budget.pending:
                    return "wait"
                self._stop(run, budget, amount)
                return "stop"
        for budget, amount in bounds:
            budget.reserve(amount)
        for unit, amount in {budget.unit: amount for budget, amount in bounds}.items():
            run.reserved[unit] += amount
        parcel.reserved = bounds
        return "go"

    def has_room(self, parcel: Parcel) -> bool:
        """Return whether a request need not wait for those under way: it may go, or its run stops.

        :param parcel: the request, which has waited.
        """
        budgets = ((budget, _bound(parcel, budget)) for budget in parcel.run.caps)
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


def _bound(parcel: Parcel, budget: Budget) -> float:
    """Return the most that a request may cost, in the units of a budget."""
    request = parcel.request
    price = None if budget.unit == "tokens" else _price(parcel)
    made = request.max_output
    if made is None and (price is None or price.output > 0):
        raise ConfigError(
            f"budget={shown_amount(budget.cap, budget.unit)} needs to know how many tokens a call of "
            f"{parcel.call.name} may generate at most: give it max_tokens=, or what the operation "
            "calls its limit"
        )
    if price is None:
        return request.size + (made or 0)
    read = max(price.input, price.cached or 0.0, price.written or 0.0)
    return (request.size * read + (made or 0) * price.output) / 1_000_000


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
