"""Have answers looked up before a call is sent, and intents and answers written on the way.

The order is what makes a run safe to kill: a request is noted before it is sent, and its answer is
written before anything depends on it. Files are written elsewhere: the brain asks, and goes on when
it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING, Any

from feste.backend import Call, Request, Response, Secret
from feste.errors import CacheMiss, FesteError
from feste.scheduler.batching.flights import SHAREABLE
from feste.scheduler.parcel import Parcel
from feste.scheduler.run import Run
from feste.scheduler.states import CACHED, DONE, KEPT, NOT_STARTED, OPEN, PARSING, REPLAYED, SHARED
from feste.store.answers import is_cacheable
from feste.store.rows import Answer, Found, Wanted

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Journaling", "replayed_in_vain"]


class Journaling:
    """Connects calls with their run's store and cache.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: Requests that are sent as soon as their intents are written.
        self.intending: dict[int, Parcel] = {}
        self._asked: dict[int, Callable[[bool, Any], None]] = {}
        self._wanted: dict[int, tuple[Run, list[tuple[int, Request]]]] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether a store was asked for something and has not answered yet."""
        return bool(self._asked)

    def ask(self, question: Callable[..., None], then: Callable[[bool, Any], None]) -> int:
        """Have a store do something; return the number of the question.

        :param question: takes what receives the outcome as ``then=``.
        :param then: receives whether it was done, and the result or the error.
        """
        ticket = self.brain.number()
        self._asked[ticket] = then
        self.brain.act("ask", ticket, question)
        return ticket

    def on_told(self, ticket: int, ok: bool, value: Any) -> None:
        """Go on with what waited for a store."""
        then = self._asked.pop(ticket, None)
        if then is not None:  # else asked by an earlier brain that broke
            then(ok, value)

    # --- before a call is sent --------------------------------------------------------------------

    def look_up(self, run: Run, i: int, request: Request) -> None:
        """Look for the answer to a call; without one it is sent.

        :param run: the run.
        :param i: the node's position.
        :param request: its request, as it would be sent alone.
        """
        run.asked[i] = request
        self._wanted.setdefault(id(run), (run, []))[1].append((i, request))

    def flush(self) -> None:
        """Look up what was asked for since the last time, together for each run."""
        if not self._wanted:
            return
        wanted, self._wanted = self._wanted, {}
        for run, calls in wanted.values():
            assert run.answers is not None
            nodes = run.program.nodes
            looked_up = [
                Wanted(request.key, request.draws[0], nodes[i].determinism not in SHAREABLE)
                for i, request in calls
            ]
            self.ask(partial(run.answers.recall, looked_up), partial(self._on_recalled, run, calls))

    def _on_recalled(
        self, run: Run, calls: Sequence[tuple[int, Request]], ok: bool, found: Any
    ) -> None:
        if not ok:
            self._stop(run, found)
        for position, (i, request) in enumerate(calls):
            if run.state[i] >= OPEN:
                continue
            if not ok:
                self.brain.lifecycle.fail(run, i, found.copy())
            else:
                self.found(run, i, request, found[position])

    def found(self, run: Run, i: int, request: Request, found: Found) -> None:
        """Go on with a call that was looked up.

        :param run: the run.
        :param i: the node's position.
        :param request: its request.
        :param found: what is known of it.
        """
        assert run.answers is not None
        run.damaged += found.damaged
        if found.earlier is not None:
            run.unknown.append((i, found.earlier))
        response = found.response
        if response is None:
            if run.answers.replay_only:
                self.brain.lifecycle.fail(run, i, _missed(run, request))
            elif run.stopping:
                self.brain.lifecycle.end(run, i, NOT_STARTED)
            else:
                run.resampled += found.equal
                if not self.brain.fallbacks.look_ahead(run, i, request):
                    self.brain.calls.buy(run, i, request)
            return
        run.sources[i] = REPLAYED if found.source == "replayed" else CACHED
        run.reused_input_tokens += found.tokens[0]
        run.reused_output_tokens += found.tokens[1]
        totals = self.brain.waits.totals(run, i, request)
        totals.reused += 1
        totals.reused_input += found.tokens[0]
        totals.reused_output += found.tokens[1]
        if run.sources[i] == CACHED and run.store is not None:
            self._keep_and_parse(run, i, Answer(request, response, "cache"))
        else:
            self.brain.calls.parse_again(run, i, response)

    def keep_shared(
        self, run: Run, i: int, request: Request, response: Response, *, of: Run
    ) -> None:
        """Give a call the answer to an equal one, which its own store keeps too.

        :param run: the run.
        :param i: the node's position.
        :param request: its request.
        :param response: the answer.
        :param of: the run that bought it.
        """
        run.sources[i] = SHARED
        run.state[i] = PARSING
        if run.store is None or run.store is of.store:
            self.brain.calls.parse_again(run, i, response)
            return
        call = run.program.nodes[i].call
        answer = Answer(request, response, secrets=_secrets(call) if call else ())
        self._keep_and_parse(run, i, answer)

    def _keep_and_parse(self, run: Run, i: int, answer: Answer) -> None:
        """Write an answer that was bought elsewhere, then parse it."""
        assert run.store is not None and run.answers is not None

        def parse() -> None:
            if run.state[i] < OPEN:
                self.brain.calls.parse_again(run, i, answer.response)

        question = partial(run.store.record, [answer], prompts=run.answers.prompts)
        self.ask(question, partial(self._on_kept, run, parse))

    def intend(self, parcel: Parcel) -> None:
        """Write that a request will be sent, then send it.

        :param parcel: the request, counted as in flight by its gate.
        """
        run = parcel.run
        assert run.answers is not None and run.store is not None
        question = partial(
            run.store.intend,
            parcel.request,
            parcel.requests,
            run=run.name,
            attempt=parcel.attempt,
            prompts=run.answers.prompts,
            secrets=_secrets(parcel.call),
        )
        ticket = self.ask(question, lambda ok, value: self._on_intended(ticket, ok, value))
        self.intending[ticket] = parcel

    def _on_intended(self, ticket: int, ok: bool, value: Any) -> None:
        parcel = self.intending.pop(ticket)
        run = parcel.run
        if not ok:
            self.brain.gates.unsent(parcel)
            self.brain.attempts.fail_members(parcel, value)
            self._stop(run, value)
            return
        parcel.number = value
        if parcel.is_over:  # the run was stopped meanwhile
            self.brain.gates.unsent(parcel)
            self._finish(parcel, "withdrawn")
        else:
            self.brain.attempts.launch(parcel)

    # --- after it was sent ------------------------------------------------------------------------

    def keep(
        self,
        parcel: Parcel,
        answers: Sequence[tuple[Request, Response]],
        response: Response,
        then: Callable[[], None],
    ) -> None:
        """Write the answers of a request, then go on.

        :param parcel: the request.
        :param answers: the request of each call that was answered, and its own response.
        :param response: the response to the whole request.
        :param then: what depends on the answers.
        """
        run = parcel.run
        if run.store is None:
            then()
            return

        def kept(ok: bool, value: Any) -> None:
            if not ok:
                self._remain(parcel, answers)
            self._on_kept(run, then, ok, value)

        self.ask(self._record(parcel, answers, response), kept)

    def _remain(self, parcel: Parcel, answers: Sequence[tuple[Request, Response]]) -> None:
        """Let nodes hold the answers that could not be written, for a later run that can."""
        position = {
            id(request): i for request, i in zip(parcel.requests, parcel.members, strict=True)
        }
        for request, response in answers:
            for node in parcel.run.program.keepers[position[id(request)]]:
                node.unstored = Answer(request, response, secrets=_secrets(parcel.call))

    def store_kept(self, run: Run, i: int, value: Any) -> None:
        """Give a node the value that it kept; its answer is written first, if no store has it yet.

        :param run: the run.
        :param i: the node's position.
        :param value: the value.
        """
        node = run.program.keepers[i][0]
        if node.unstored is None or run.store is None or run.answers is None:
            self.brain.lifecycle.done(run, i, value, KEPT)
            return

        def kept(ok: bool, told: Any) -> None:
            if ok:
                node.unstored = None
            done = partial(self.brain.lifecycle.done, run, i, value, KEPT)
            self._on_kept(run, done, ok, told)

        self.ask(partial(run.store.record, [node.unstored], prompts=run.answers.prompts), kept)

    def keep_late(self, parcel: Parcel, response: Response) -> None:
        """Write the answer of a request that was given up before.

        :param parcel: the request.
        :param response: its response.
        """
        if parcel.run.store is None:
            return
        if len(parcel.members) == 1:
            answers = [(parcel.requests[0], response)]
            self.ask(self._record(parcel, answers, response), lambda ok, value: None)
        else:
            self._finish(parcel, "unknown", None, response)

    def _record(
        self, parcel: Parcel, answers: Sequence[tuple[Request, Response]], response: Response
    ) -> Callable[..., None]:
        store = parcel.run.store
        assert store is not None
        secrets = _secrets(parcel.call)
        kept = [Answer(request, own, secrets=secrets) for request, own in answers]
        return partial(
            store.record,
            kept,
            number=parcel.number,
            response=response,
            replace=parcel.unreadable > 0,  # in the place of the answer that could not be read
        )

    def _on_kept(self, run: Run, then: Callable[[], None], ok: bool, value: Any) -> None:
        if ok:
            run.unfit += len(value)
        else:  # what was paid for is delivered all the same
            self._stop(run, value)
        then()

    def ended(self, parcel: Parcel, error: FesteError, response: Response | None = None) -> None:
        """Write that a request brought nothing to keep.

        :param parcel: the request.
        :param error: why.
        :param response: the response that could not be used, if one came.
        """
        if parcel.run.store is not None:
            unknown = getattr(error, "billed", "no") == "unknown"
            self._finish(parcel, "unknown" if unknown else "failed", error, response)

    def _finish(self, parcel: Parcel, *outcome: Any) -> None:
        store = parcel.run.store
        assert store is not None
        self.ask(partial(store.finish, parcel.number, *outcome), lambda ok, value: None)

    def remember(self, run: Run, i: int, response: Response, value: Any) -> None:
        """Put an answer into the run's cache, if it has one and the answer may go there.

        :param run: the run.
        :param i: the node's position.
        :param response: the answer.
        :param value: what was made of it.
        """
        state = run.sources.get(i, DONE)
        request = run.asked.pop(i, None)

        def done() -> None:
            self.brain.lifecycle.done(run, i, value, state)

        answers = run.answers
        if (
            answers is None
            or request is None
            or not answers.fills_cache
            or state == CACHED
            or not is_cacheable(response.payload, value)
        ):
            done()
        else:
            call = run.program.nodes[i].call
            answer = Answer(request, response, secrets=_secrets(call) if call else ())
            self.ask(partial(answers.remember, answer), partial(self._on_kept, run, done))

    def _stop(self, run: Run, error: FesteError) -> None:
        """Stop spending, because the store cannot be written or read."""
        if run.unwritten is None:
            run.unwritten = error
            self.brain.halt(run)


def replayed_in_vain(run: Run, i: int, error: FesteError) -> FesteError:
    """Return an error that also tells how to buy an answer anew that a store had.

    :param run: the run.
    :param i: the position of the call's node.
    :param error: why the answer could not be used.
    """
    request = run.asked.get(i)
    source = run.sources.get(i)
    if source not in (REPLAYED, CACHED) or request is None or run.answers is None:
        return error
    journal = run.answers.cache if source == CACHED else run.answers.store
    assert journal is not None
    told = error.copy()
    told.args = (
        f"{error.message}. It was not bought now but kept before; to buy it anew: feste store purge "
        f"{quote(str(journal.path))} --key {request.key}",
    )
    return told


def _secrets(call: Call[Any]) -> tuple[Secret, ...]:
    return tuple(call.client.secrets)


def _missed(run: Run, request: Request) -> CacheMiss:
    assert run.answers is not None and run.answers.cache is not None
    return CacheMiss(
        f'{run.answers.cache.path} has no answer for this call, and cache_mode="replay-only" buys none: '
        'run the program once with cache_mode="replay"'
    )
