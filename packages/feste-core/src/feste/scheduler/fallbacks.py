"""Pass a failed call on to the next backend: its node becomes the call of that one, and is ready again.

The node keeps its place, its inputs and its draw, so those that need it wait on; all that follows is
an ordinary call. With a store, what an earlier session bought at a later backend is looked for before
anything is bought at the first.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from feste.backend import Call, Request, Response
from feste.backend.fallback import for_next
from feste.errors import CallError, FesteError
from feste.node import Node
from feste.optimization import rules
from feste.optimization.optimizer import is_enabled
from feste.scheduler.batching.batcher import Gathering
from feste.scheduler.batching.flights import SHAREABLE
from feste.scheduler.executor import QUICK, PyTask
from feste.scheduler.halves import prepare_request
from feste.scheduler.run import Run
from feste.scheduler.states import NOT_STARTED, OPEN, PREPARING, READY
from feste.store.rows import Wanted

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Elsewhere", "Fallbacks"]


class Elsewhere(NamedTuple):
    """A paid response of a backend that is not the first: what a node keeps until it is parsed.

    :param turns: how many backends had been asked before.
    :param response: the response.
    """

    turns: int
    response: Response


class Fallbacks:
    """Ask the next backend for calls that failed.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: The calls that were passed on since the last :meth:`flush`.
        self._passed: list[tuple[Run, int]] = []

    # --- after a failure --------------------------------------------------------------------------

    def pass_on(self, run: Run, i: int, error: FesteError) -> bool:
        """Make a failed call at the next backend; return False if there is none for this error.

        :param run: the run.
        :param i: the node's position.
        :param error: why it failed.
        """
        call = run.program.nodes[i].call
        if call is None:
            return False
        may = bool(call.rest) and isinstance(error, call.rest[0][1]) and not run.has_shown([i])
        if not may or run.stopping or run.ended is not None:
            for earlier in run.passed_on.get(i, ()):
                error.add_note(f"asked before: {_told(earlier)}")
            return False
        if isinstance(error, CallError) and not error.backend:  # it failed before it was sent
            node = run.program.nodes[i]
            error.backend, error.model = call.client.plugin, call.model(node.args)
        run.passed_on.setdefault(i, []).append(error)
        self.turn(run, i, 1)
        run.state[i] = READY
        run.ready_at[i] = self.brain.now
        self._passed.append((run, i))
        self.brain.flights.ended(run, i, error)
        return True

    def turn(self, run: Run, i: int, turns: int) -> None:
        """Make a node the call of a later backend.

        :param run: the run.
        :param i: the node's position.
        :param turns: how many backends to go on.
        """
        for _ in range(turns):
            run.program.nodes[i] = _next(run.program.nodes[i])
        run.turns[i] = run.turns.get(i, 0) + turns
        self.brain.lists.drop(run, i)
        run.gatherings.pop(i, None)
        if run.feeders is not None:  # nor does the group of its first backend wait for it
            run.feeders.queue_of.pop(i, None)
            run.feeders.release(i)
        run.prefixes.pop(i, None)
        run.asked.pop(i, None)
        run.sources.pop(i, None)

    def flush(self) -> None:
        """Start the calls that were passed on; those to one operation share requests as in a plan."""
        passed, self._passed = self._passed, []
        lists: dict[tuple[int, int, Any], list[int]] = {}
        for run, i in passed:
            if run.state[i] != READY:
                continue
            node = run.program.nodes[i]
            call: Any = node.op
            if (
                is_enabled("batch", run.settings["optimize"])
                and rules.takes_lists(call)
                and not rules.is_visible(node)
                and rules.may_share(node)
            ):
                lists.setdefault((id(run), id(call.client), call.token), []).append(i)
            self.brain.dispatcher.push(run, QUICK, run.program.rank[i], i)
        runs = {id(run): run for run, _ in passed}
        for (name, *_), members in lists.items():
            if len(members) > 1:
                gathering = Gathering(members)
                runs[name].gatherings.update((i, gathering) for i in members)

    # --- before anything is bought ----------------------------------------------------------------

    def look_ahead(
        self, run: Run, i: int, request: Request, error: FesteError | None = None
    ) -> bool:
        """Look for what a later backend answered in an earlier session; else the call is bought.

        :param run: the run.
        :param i: the node's position.
        :param request: the request of its backend, for which no answer is known.
        :param error: why the answer that is known cannot be used: without another one the call fails.
        :returns: False if there is nothing to look for.
        """
        node = run.program.nodes[i]
        if node.call is None or not node.call.rest or run.store is None or i in run.passed_on:
            return False
        later = [node]
        while later[-1].call is not None and later[-1].call.rest:
            later.append(_next(later[-1]))
        run.state[i] = PREPARING
        values = [run.values[d] for d in run.program.deps[i]]
        args = (request, later[1:], values, error)
        name = f"{node.op.name}.prepare"
        task = PyTask(run, i, "look ahead", _requests, args, {}, [], name)
        self.brain.dispatcher.push(run, QUICK, run.program.rank[i], task)
        return True

    def on_prepared(self, run: Run, task: PyTask, ok: bool, value: Any, seconds: float) -> None:
        """Ask the store for the answers to the requests of later backends."""
        i, request, error = task.index, task.args[0], task.args[3]
        if not ok or not value:  # the error comes again if that backend is asked
            self._go_on(run, i, request, error)
            return
        assert run.store is not None
        wanted = [Wanted(r.key, r.draws[0], sample, True) for _, r, sample in value]
        then = partial(self._looked, run, i, request, error, value)
        self.brain.journaling.ask(partial(run.store.recall, wanted), then)

    def _looked(
        self,
        run: Run,
        i: int,
        request: Request,
        error: FesteError | None,
        later: list[Any],
        ok: bool,
        found: Any,
    ) -> None:
        if run.state[i] >= OPEN:
            return
        if ok:
            for (turns, own, _), one in zip(later, found, strict=True):
                if one.response is not None:
                    self.turn(run, i, turns)
                    run.asked[i] = own
                    self.brain.journaling.found(run, i, own, one)
                    return
        self._go_on(run, i, request, error)

    def _go_on(self, run: Run, i: int, request: Request, error: FesteError | None) -> None:
        if error is not None:
            self.brain.lifecycle.fail(run, i, error)
        elif run.stopping:
            self.brain.lifecycle.end(run, i, NOT_STARTED)
        else:
            self.brain.calls.buy(run, i, request)


def _told(error: FesteError) -> str:
    asked = f"{getattr(error, 'backend', '')} {getattr(error, 'model', '')}".strip()
    return f"{asked}: {type(error).__name__}: {error.message}".removeprefix(": ")


def _next(node: Node) -> Node:
    """Return a node as the call of the backend after its own."""
    call: Any = node.op
    op, args, kwargs = for_next(call, node.args, node.kwargs)
    return node.replace(op=op, args=args, kwargs=kwargs)


def _requests(
    request: Request, later: list[Node], values: list[Any], error: FesteError | None
) -> list[tuple[int, Request, bool]]:
    """Prepare the requests of later backends as far as that is possible; the executor runs this."""
    made = []
    for turns, node in enumerate(later, start=1):
        call: Call[Any] | None = node.call
        assert call is not None and node.draw is not None
        try:
            own = prepare_request(call, node.draw, node.args, values, keyed=True)
        except FesteError:  # it is raised again if that backend is asked
            continue
        sample = node.determinism not in SHAREABLE
        made.append((turns, own, sample))
    return made
