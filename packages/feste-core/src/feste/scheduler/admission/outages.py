"""Stop sending to a backend that is down or that refuses all calls; ask now and then if it is back.

When the last requests sent have failed a breaker opens: calls wait in their gates, which is no attempt, and one
of them at a time is sent as a probe. If a run has waited for as long as it wants, its calls fail.

A refusal that concerns all calls, such as a wrong key, opens the breaker at once. The next refusal
confirms it, and the runs that are there send nothing more to that account, or model.

A model whose every request is refused for rate is as good as down: runs lose patience with it too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request
from feste.errors import (
    Ambiguous,
    AuthFailed,
    BackendUnavailable,
    CallError,
    Interrupted,
    NotStarted,
    RateLimited,
    Transient,
    WorkerLost,
)
from feste.scheduler.admission.breaker import Breaker
from feste.scheduler.admission.retry import REFUSED_ALL, RetryBudget, is_ambiguous
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run, Scope

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Outages"]

#: What the rounding of a clock may add, in seconds.
_ROUNDING = 1e-6


class _Throttled:
    """A model that has refused every request for rate, since when, and the timer of the next run to give up."""

    __slots__ = ("opened", "watch")

    def __init__(self, now: float) -> None:
        self.opened: float = now
        self.watch: Any = None


class Outages:
    """The breakers of all backends, and the budgets for retries to them; shared by all runs.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        self._breakers: dict[Scope, Breaker] = {}
        self._budgets: dict[Scope, RetryBudget] = {}
        #: Models that refuse every request for rate.
        self._throttled: dict[Scope, _Throttled] = {}

    # --- on the way out ---------------------------------------------------------------------------

    def admits(self, scope: Scope) -> bool:
        """Return whether a request may leave a gate now.

        :param scope: the gate's endpoint, account and model.
        """
        return all(breaker.admits(self.brain.now) for breaker in self._of(scope))

    def resumes_at(self, scope: Scope) -> float:
        """Return when the next probe may leave a gate; the past if it need not wait for that.

        :param scope: the gate's endpoint, account and model.
        """
        open_ones = (b for b in self._of(scope) if b.opened is not None and b.probe is None)
        return max((breaker.next for breaker in open_ones), default=0.0)

    def left(self, parcel: Parcel) -> None:
        """Note a request that leaves its gate: it is the probe where a breaker is open.

        :param parcel: the request.
        """
        breakers = self._of(parcel.request.scope)
        if parcel.attempt and breakers:  # waiting for a backend that is down takes none of its time
            parcel.since += max(b.shut(parcel.ready, self.brain.now) for b in breakers)
        for breaker in breakers:
            if breaker.opened is not None:
                breaker.probe = parcel

    def unsent(self, parcel: Parcel) -> bool:
        """Note that a request is under way no more; return whether it was a probe.

        :param parcel: the request.
        """
        probed = [b for b in self._of(parcel.request.scope) if b.probe is parcel]
        for breaker in probed:
            breaker.probe = None
        return bool(probed)

    def _of(self, scope: Scope) -> list[Breaker]:
        found = (self._breakers.get(scope[:2]), self._breakers.get(scope))
        return [breaker for breaker in found if breaker is not None]

    # --- on the way back --------------------------------------------------------------------------

    def landed(self, parcel: Parcel, error: CallError | None) -> None:
        """Record how a request ended.

        :param parcel: the request.
        :param error: why it failed, or None.
        """
        now, scope = self.brain.now, parcel.request.scope
        probe = self.unsent(parcel)
        if isinstance(error, (Interrupted, WorkerLost, *REFUSED_ALL)):
            return
        if not isinstance(error, (Transient, Ambiguous)) or isinstance(error, RateLimited):
            for breaker in self._of(scope):
                breaker.worked(parcel.sent, now)
                self._unwatch(breaker)
            self._throttle(scope, isinstance(error, RateLimited))
            if error is None and scope[:2] in self._budgets:
                self._budgets[scope[:2]].refund()
            return
        breaker = self._breakers.setdefault(scope[:2], Breaker())
        if probe:  # it asked for all that wait, so it uses up no attempt of its own
            parcel.throttled += 1
            self._breakers.pop(scope, None)  # nor is the model alone refused
        rng, under_way = self.brain.attempts.rng, partial(self._under_way, scope[:2])
        if breaker.failed(parcel.sent, now, rng, under_way, probe=probe) or probe:
            self.brain.accounts.closed(parcel, "breaker", breaker.next, again=probe)
        if breaker.opened is not None:
            parcel.run.down_until = max(parcel.run.down_until, breaker.next)

    def _under_way(self, scope: Scope, since: float) -> int:
        """Return how many requests to a backend are under way that were sent since a time."""
        parcels = self.brain.attempts.parcels.values()
        return sum(p.sent >= since and _within(p.request, scope) for p in parcels)

    def _throttle(self, scope: Scope, refuses: bool) -> None:
        """Note that a model refused a request for rate, or did not."""
        throttled = self._throttled.get(scope)
        if throttled is not None and not refuses:
            self._unwatch(self._throttled.pop(scope))
        elif throttled is None and refuses:
            throttled = self._throttled[scope] = _Throttled(self.brain.now)
            patience = [run.patience for run in self.brain.runs if run.patience is not None]
            if (
                patience
            ):  # who waits is looked up then: some refusals are usual, and queues are long
                throttled.watch = self._later(min(patience), scope, throttled)

    def wait(self, parcel: Parcel, error: CallError, wait: float) -> float:
        """Return the seconds that a retry waits, paid for by the budget of its backend.

        :param parcel: the request.
        :param error: why its last attempt failed.
        :param wait: the seconds that it would wait anyway.
        """
        if isinstance(error, (RateLimited, *REFUSED_ALL)):  # the gate, or a breaker, slows these
            return wait
        budget = self._budgets.setdefault(parcel.request.scope[:2], RetryBudget())
        cost = budget.AMBIGUOUS if is_ambiguous(error) else 1.0
        more = max(0.0, budget.take(cost, self.brain.now) - wait)
        parcel.since += more  # no call fails because the budget is empty
        return wait + more

    # --- runs that lose patience ------------------------------------------------------------------

    def watch(self, scope: Scope) -> None:
        """Fail the calls of runs that have waited long enough; look again when the next one has.

        :param scope: the endpoint and account of the backend.
        """
        breaker = self._breakers.get(scope)
        if breaker is None or breaker.opened is None or breaker.doubt is not None:
            return
        self._wait(scope, breaker)

    def _wait(self, scope: Scope, outage: Breaker | _Throttled) -> None:
        begun, now = outage.opened or 0.0, self.brain.now
        ends: list[float] = []

        def is_late(parcel: Parcel) -> bool:
            if not _within(parcel.request, scope):
                return False
            if isinstance(outage, Breaker) and _has_fallback(parcel.call):
                return True
            if parcel.run.patience is None:
                return False
            end = max(begun, parcel.run.started) + parcel.run.patience
            if end > now + _ROUNDING:
                ends.append(end)
            return end <= now + _ROUNDING

        while gone := self.brain.gates.take_back(is_late):  # giving some up may set others free
            for parcel in gone:
                self.give_up(parcel, throttled=isinstance(outage, _Throttled))
            ends.clear()
        self._unwatch(outage)
        if ends:
            outage.watch = self._later(min(ends) - now, scope, outage)

    def entered(self, parcel: Parcel) -> None:
        """Note a request that comes to its gate: where its backend is down, its run may lose patience.

        :param parcel: the request, which is in the queue.
        """
        if parcel.run.patience is None:
            return
        scope = parcel.request.scope
        breaker, throttled = self._breakers.get(scope[:2]), self._throttled.get(scope)
        if breaker is not None and breaker.opened is not None and breaker.watch is None:
            self.watch(scope[:2])
        if throttled is not None and throttled.watch is None:
            self._wait(scope, throttled)

    def is_passed_by(self, call: Call[Any], request: Request) -> bool:
        """Return whether a request does not wait for a backend that is down: another one is asked.

        :param call: its operation.
        :param request: the request, on its way to its gate.
        """
        waits = not self.admits(request.scope) and _has_fallback(call)
        return waits and all(b.doubt is None for b in self._of(request.scope))

    def give_up(self, parcel: Parcel, *, throttled: bool = False) -> None:
        """Fail the calls of a request whose backend is down.

        :param parcel: the request, which is not under way.
        :param throttled: whether it is there, and refuses every request for rate.
        """
        self.brain.attempts.fail_members(parcel, _unavailable(parcel, throttled))

    def _later(self, seconds: float, scope: Scope, outage: Breaker | _Throttled) -> int:
        def look(now: float) -> None:
            outage.watch = None
            if isinstance(outage, Breaker):
                self.watch(scope)
            else:
                self._wait(scope, outage)

        return self.brain.later(seconds, look)

    def _unwatch(self, outage: Breaker | _Throttled) -> None:
        if outage.watch is not None:
            self.brain.drop_timer(outage.watch)
            outage.watch = None

    # --- refusals of all calls --------------------------------------------------------------------

    def refused(self, parcel: Parcel, error: CallError) -> bool:
        """Record a refusal that concerns all calls; return whether to give this one up.

        The first one is doubted: its call is sent once more. The next one is believed, of any call that
        was sent since then; what was in flight with the first one waits for that.

        :param parcel: the refused request.
        :param error: the refusal.
        """
        run, scope = parcel.run, _refused_scope(parcel.request, error)
        if scope in run.closed:
            return True
        breaker = self._breakers.setdefault(scope, Breaker())
        if breaker.doubt is not None and breaker.opened is not None:
            confirmed = parcel.sent >= breaker.opened
            if confirmed:
                self._close(scope, error)
            return confirmed
        if run.stopping or isinstance(parcel.error, REFUSED_ALL):  # it is only this call
            return True
        breaker.doubt = error
        breaker.open(self.brain.now)
        return False

    def _close(self, scope: Scope, error: CallError) -> None:
        """Let the runs that are there send nothing more to an account or model."""
        self._unwatch(self._breakers.pop(scope))
        for run in self.brain.runs:
            run.closed[scope] = error
        for parcel in self.brain.gates.take_back(lambda p: _within(p.request, scope)):
            self.shut(parcel, error)

    def refusal(self, parcel: Parcel) -> CallError | None:
        """Return why a run may not send a request, or None.

        :param parcel: the request.
        """
        closed = parcel.run.closed
        if not closed:
            return None
        scope = parcel.request.scope
        return closed.get(scope[:2]) or closed.get(scope)

    def shut(self, parcel: Parcel, error: CallError) -> None:
        """End the calls of a request that will not be sent.

        :param parcel: the request.
        :param error: the refusal of other calls that is the cause.
        """
        if parcel.error is not None:  # it was sent before
            self.brain.attempts.fail_members(parcel, error.copy())
            return
        what = "account" if _concerns_account(error) else "model"
        told = NotStarted(
            f"not sent: the backend {parcel.request.plugin} refuses all calls of this {what} "
            f"({type(error).__name__}: {error.message})"
        )
        self.brain.attempts.leave_members(parcel, told, error)


def _within(request: Request, scope: Scope) -> bool:
    return request.scope[: len(scope)] == scope


def _refused_scope(request: Request, error: CallError) -> Scope:
    """Return what a refusal concerns: an account, or one model of it."""
    return request.scope[:2] if _concerns_account(error) else request.scope


def _concerns_account(error: CallError) -> bool:
    """Whether all models are refused: a wrong key is; money and permissions may be those of one model."""
    return isinstance(error, AuthFailed) and error.status != 403


def _has_fallback(call: Call[Any]) -> bool:
    return bool(call.rest) and issubclass(BackendUnavailable, call.rest[0][1])


def _unavailable(parcel: Parcel, throttled: bool) -> BackendUnavailable:
    run: Run = parcel.run
    last = parcel.error
    told = (
        f"; its own last attempt: {type(last).__name__}: {last.message}".rstrip(".") if last else ""
    )
    if run.patience is None or _has_fallback(parcel.call):
        waited = "is down"
    else:
        was = "refused every request for rate" if throttled else "was down"
        waited = f"{was} for longer than outage_patience={run.patience:g} seconds"
    return BackendUnavailable(
        f"the backend {parcel.request.plugin} {waited}{told}. "
        "Run again when it is up: what was bought is kept",
        billed="unknown" if parcel.ambiguous else "no",
        status=last.status if last else None,
    )
