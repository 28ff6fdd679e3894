"""Hand results out one by one, as their nodes end, and take in more nodes while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from feste.errors import FesteError, NotStarted
from feste.node import PENDING, Node
from feste.scheduler.program import Program
from feste.scheduler.run import Run
from feste.scheduler.states import NOT_STARTED, OPEN, VALUED

if TYPE_CHECKING:
    from feste.scheduler.brain import Brain

__all__ = ["Handing", "Outlet", "Pieces"]

#: Gets the tokens of a result, whether it is a value, and the value or the error.
Take = Callable[[tuple[Sequence[Any], bool, Any]], None]


class Outlet:
    """Takes the results of a run one by one. A result that was taken is released.

    :param take: ``take((tokens, ok, value))`` gets each result with the tokens of its outputs; a
        quick function, called on the brain's thread.
    :param program: the program of the run.
    :param tokens: a token for each of its outputs.
    :param is_open: whether the run goes on when all its nodes have ended, as more will be added.
    :param since: nodes made before this number in the sequence of all nodes are the user's own, and
        may be needed again by nodes that are added: their values stay.
    :param kept: holds these values by key; runs that follow each other share it.
    """

    __slots__ = ("due", "is_open", "kept", "since", "take")

    def __init__(
        self,
        take: Take,
        program: Program,
        tokens: Sequence[Any],
        *,
        is_open: bool = False,
        since: int = 0,
        kept: dict[str, Any] | None = None,
    ) -> None:
        self.take = take
        self.is_open = is_open
        self.since = since
        self.kept = {} if kept is None else kept
        #: The tokens of outputs that were not handed out yet, by position.
        self.due: dict[int, list[Any]] = {}
        for i, token in zip(program.outputs, tokens, strict=True):
            self.due.setdefault(i, []).append(token)

    def is_own(self, keepers: Sequence[Node]) -> bool:
        """Return whether a value may be needed again.

        :param keepers: the user's nodes that have it.
        """
        return any(node.seq < self.since for node in keepers)

    def keep(self, keepers: Sequence[Node], value: Any) -> None:
        """Keep a value if it may be needed again.

        :param keepers: the user's nodes that have it.
        :param value: the value.
        """
        self.kept.update((node.key, value) for node in keepers if node.seq < self.since)


class Pieces:
    """Takes the text of a call piece by piece, and remembers that it has begun.

    :param put: receives the pieces; called on the thread of the request.
    """

    __slots__ = ("begun", "put")

    def __init__(self, put: Callable[[str], None]) -> None:
        self.put = put
        self.begun = False

    def __call__(self, text: str) -> None:
        if text:
            self.begun = True
            self.put(text)


class Handing:
    """Pass results to the outlets of their runs.

    :param brain: the brain that this belongs to.
    """

    def __init__(self, brain: Brain) -> None:
        self.brain = brain
        #: Remote results that are on their way here, by the number of the fetch.
        self.fetching: dict[int, tuple[Run, int, list[Any]]] = {}

    def ended(self, run: Run, i: int) -> None:
        """Hand out the result of a node if it is due; one that was not started waits for its error.

        :param run: the run.
        :param i: the position of the node, which has ended.
        """
        assert run.outlet is not None
        if i not in run.outlet.due or (run.state[i] == NOT_STARTED and i not in run.errors):
            return
        tokens = run.outlet.due.pop(i)
        if run.executor.remote and run.state[i] in VALUED:
            handle = self.brain.number()
            self.fetching[handle] = run, i, tokens
            self.brain.act("fetch", run.executor, handle, [run.values[i]])
        else:
            self._hand(run, i, tokens, run.errors.get(i, run.values[i]))

    def _hand(self, run: Run, i: int, tokens: list[Any], value: Any) -> None:
        self.brain.act("hand", run, tokens, i not in run.errors, value)
        self.brain.lifecycle.let_go(run, [i] * len(tokens))

    def on_fetched(self, handle: int, values: Sequence[Any]) -> bool:
        """Hand out a remote result that has come; return False if the fetch was not for one.

        :param handle: the number of the fetch.
        :param values: the value, or the error that replaces it.
        """
        fetched = self.fetching.get(handle)
        if fetched is None:
            return False
        run, i, tokens = fetched
        (value,) = values
        del self.fetching[handle]
        if isinstance(value, FesteError):
            self.brain.lifecycle.lose(run, i, value)
        self._hand(run, i, tokens, value)
        return True

    def on_added(self, run: Run, program: Program, tokens: Sequence[Any]) -> None:
        """Merge nodes into a run that is open for more."""
        if run.stopping or run.ended is not None:
            error = NotStarted("not begun: the run was stopped")
            self.brain.act("hand", run, tokens, False, error)
            return
        assert run.outlet is not None
        growth = self.brain.growth
        position, fresh = growth.merge(run, program, growth.needed(run, program), 0)
        for j, token in zip(program.outputs, tokens, strict=True):
            i = position[j]
            run.uses[i] += 1
            run.outlet.due.setdefault(i, []).append(token)
            if run.state[i] >= OPEN:
                self.ended(run, i)
        run.program.rewrites += program.rewrites
        growth.start(run, fresh)

    def on_sealed(self, run: Run) -> None:
        """Let a run end when its last node has ended."""
        assert run.outlet is not None
        run.outlet.is_open = False
        self.brain.end_if_done(run)

    def known(self, run: Run, i: int) -> Any:
        """Return the value of a node that ran for earlier results, or PENDING.

        :param run: the run.
        :param i: the node's position.
        """
        kept = run.outlet.kept if run.outlet is not None else None
        return kept.get(run.program.keepers[i][0].key, PENDING) if kept else PENDING
