"""``feste.stream``: the text of one call, piece by piece, while the model writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from feste import context, draw
from feste._compute.iterating import Results
from feste._compute.results import errors_of, forget_report
from feste._compute.steps import make_plan, make_run, program_of, run_elsewhere
from feste.backend import Params
from feste.context import Settings
from feste.delayed import FesteDelayed
from feste.errors import ParameterError, RunFailed
from feste.graph import FesteGraph
from feste.node import Node
from feste.packing import holds_nodes
from feste.scheduler.choice import choose
from feste.scheduler.executor import Executor
from feste.scheduler.handing import Pieces
from feste.scheduler.run import Run
from feste.wording import a_kind

__all__ = ["stream"]


def stream(value: FesteDelayed[str] | str, **settings: Any) -> Results[str]:
    """Iterate over the text of one call, piece by piece, with ``for`` or ``async for``.

    The graph that the call needs is run first. The pieces make up the value: kept and replayed
    answers, plain texts and texts that tasks return come as one piece. An answer that breaks off
    after its first piece is not sent again: the error says so. Leaving the loop, or ``close()``,
    cancels the request.

    :param value: a lazy value that is a text, or a text, as in eager mode.
    :param settings: settings for this run, as for :func:`compute`; there is no place for an error, so
        ``on_error="return"`` counts as ``"raise"``.
    :returns: an iterator over the pieces, sync and async; the run begins with its first step.
    :raises ParameterError: if the value is no text.
    :raises RunFailed: from the iterator, if the call or one that it needs failed.

    >>> from feste.testing import FakeBackend
    >>> reply = FakeBackend().chat("Hi")
    >>> pieces = list(stream(reply))
    >>> len(pieces) > 1, "".join(pieces) == reply.compute()
    (True, True)
    """
    chosen = context.settings(**settings)
    if chosen["on_error"] == "return":
        chosen = chosen.replace(on_error="raise")
    return _Stream(value, chosen)


class _Stream(Results[str]):
    def __init__(self, value: Any, settings: Settings) -> None:
        super().__init__(settings)
        self._told: list[str] = []
        self._begun = not isinstance(value, FesteDelayed)
        if isinstance(value, FesteDelayed):
            self._node: Node = value._node
            _check(self._node)
            self._graph, _, _ = FesteGraph.collect(value, scope=draw.scope())
        elif isinstance(value, str):
            self._complete(value)
        elif holds_nodes(value):
            raise ParameterError(
                f"feste.stream takes one call, not {a_kind(value)} that holds some: "
                "feste.as_completed gives the values of several as they come"
            )
        else:
            raise ParameterError(f"feste.stream takes a text, not {a_kind(value)}")

    def _work(self) -> Callable[[], None] | None:
        if self._begun:
            return None
        self._begun = True
        forget_report()
        return self._start

    def _start(self) -> None:
        hands = choose(self._settings)
        plan = make_plan(self._graph, self._settings, hands)
        if not isinstance(hands, Executor):
            (value,) = run_elsewhere(hands, plan, tuple, self._settings)
            self._complete(value)
            return
        run = make_run(program_of(plan), self._settings, hands)
        run.pieces = Pieces(self._mail.put)
        self._begin(run)

    def _take(self, mail: Any) -> None:
        self._told.append(mail)
        self._ready.append(mail)

    def _ended(self, run: Run) -> None:
        results = run.results()
        errors = errors_of(run) or [run.errors[i] for i in run.outputs if i in run.errors]
        if not errors:
            self._complete(results[0])
            return
        told = "the stream failed"
        if self._told:
            told += (
                f" after {sum(map(len, self._told)):,} characters were handed out, so nothing was "
                "sent again: another feste.stream, or compute(), asks anew"
            )
        report = self._course.before
        failed = RunFailed(told, partial=tuple(results), report=report, errors=errors)
        raise failed from errors[0]

    def _complete(self, value: Any) -> None:
        """Hand out what is left of the whole text."""
        if not isinstance(value, str):
            raise ParameterError(
                f"feste.stream takes a call that gives a text, but {self._node.key} gave "
                f"{a_kind(value)}: use compute(), which costs nothing more",
                origin=self._node.where,
            )
        told = "".join(self._told)
        if not value.startswith(told):
            raise ParameterError(
                f"{self._node.key} makes something else of its text than was streamed: use compute(), "
                "which costs nothing more",
                origin=self._node.where,
            )
        if value != told:
            self._ready.append(value[len(told) :] if told else value)


def _check(node: Node) -> None:
    """Refuse a call that is known to give no text, before it costs anything."""
    call = node.call
    if call is None:
        return
    for name, argument in zip(call.operation.names, node.args, strict=False):
        several = isinstance(argument, Params) and (getattr(argument, "n", None) or 1) > 1
        if several or (name == "output" and argument is not None):
            what = "several answers" if several else f"a {getattr(argument, '__name__', 'value')}"
            raise ParameterError(
                f"feste.stream gives one text, but this {call.name} asks for {what}: leave it out, or "
                "use compute()",
                origin=node.where,
            )
