"""The rules for backends as pytest tests; the author of a backend derives from them."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from feste import context
from feste.backend import Backend, Call, Outcome, Request, Response
from feste.backend.clients import close_clients
from feste.delayed import FesteDelayed
from feste.draw import Determinism, Draw
from feste.errors import CallError
from feste.scheduler.batching.batcher import pack_requests, unpack_response

__all__ = ["BackendContract"]

Made = tuple[Call[Any], Sequence[Any], Request]


class BackendContract:
    """The rules that every backend must keep, as tests for pytest.

    Derive a class whose name starts with ``Test``, and define how to make a backend and some calls
    of it. The backend sends real requests: to a :class:`~feste.testing.SimServer`, not to a
    provider.

    >>> from feste.testing import FakeBackend
    >>> class TestFake(BackendContract):
    ...     def make(self):
    ...         return FakeBackend()
    ...     def calls(self, llm):
    ...         return [llm.chat("Hi"), llm.embed("a"), llm.embed("b")]
    >>> TestFake().test_parse_is_repeatable()
    """

    key_name: str = ""
    """The environment variable from which the backend reads its key, if it has one."""

    key: str = "canary-key-0123456789"
    """The value of that variable during each test, which must show nowhere."""

    def make(self) -> Backend:
        """Return a new backend, equal to earlier ones, that holds its key by name."""
        raise NotImplementedError(f"{type(self).__name__}.make() must return a client")

    def calls(self, llm: Backend) -> Sequence[FesteDelayed[Any]]:
        """Return a few calls of each operation; for a batched one, two that may share a request.

        :param llm: a backend.
        """
        raise NotImplementedError(f"{type(self).__name__}.calls() must return a few calls")

    def broken(self) -> Sequence[Backend]:
        """Return backends whose calls fail: no server, a wrong one, a wrong key. Default: none."""
        return ()

    # --- the rules --------------------------------------------------------------------------------

    def test_a_client_travels_as_configuration(self) -> None:
        """A pickled backend arrives equal, without the key."""
        llm = self.make()
        data = pickle.dumps(llm)
        again = pickle.loads(data)

        assert self.key.encode() not in data, "the key is in the pickled client"
        assert type(again) is type(llm), "another class arrives"
        for other in (again, self.make()):
            assert (other.identity, other.secrets) == (llm.identity, llm.secrets), f"{other!r}"
            keys = [[r.key for *_, r in self._made(client)] for client in (other, llm)]
            assert keys[0] == keys[1], f"{other!r} makes other requests"

    def test_the_key_shows_nowhere(self) -> None:
        """Printing and recording a backend or its requests never shows the key."""
        llm = self.make()
        llm.preflight()
        shown = [repr(llm), json.dumps(dict(llm.config())), llm.identity, llm.account, llm.endpoint]
        for call, _, request in self._made(llm):
            shown += [repr(call), repr(request), str(pickle.dumps(request)), request.account]

        for text in shown:
            assert self.key not in text, f"the key shows: {text}"

    def test_prepare_is_pure(self) -> None:
        """Equal calls make equal requests of plain JSON, with equal keys."""
        for (_, _, one), (_, _, two) in zip(self._made(self.make()), self._made(self.make())):
            one.check()
            assert (one, one.key) == (two, two.key), f"{one} is not {two}"
            stored = json.loads(json.dumps([dict(one.body), dict(one.client)]))
            assert stored == [one.body, one.client], f"{one} is not plain JSON"

    def test_a_shared_request_has_one_outcome_for_each_call(self) -> None:
        """Packed calls are unpacked in order; checked where answers are deterministic."""
        llm = self.make()
        batched: dict[str, list[Made]] = {}
        for made in self._made(llm):
            if made[0].rule is not None:
                batched.setdefault(made[0].name, []).append(made)
        for name, group in batched.items():
            call, requests = group[0][0], [request for *_, request in group]
            parts = pack_requests(call, range(len(group)), requests)
            shared = [part for part in parts if part[2].packed]
            assert shared, f"calls() must return two calls of {name} that may share a request"
            for members, _, request in shared:
                request.check()
                outcomes = unpack_response(call, request, sent(call, request))
                for i, outcome in zip(members, outcomes, strict=True):
                    value, alone = self._value(group[i], outcome), sent(*group[i][::2])
                    if call.determinism(group[i][1], {}) is not Determinism.SAMPLE:
                        assert value == self._value(group[i], alone), f"{value} for {group[i][2]}"

    def test_parse_is_repeatable(self) -> None:
        """Parsing a response again, even after storing it as JSON, gives the same value."""
        for made in self._made(self.make()):
            response = sent(*made[::2])
            stored = replace(response, payload=json.loads(json.dumps(response.payload)))

            first, second, third = (self._value(made, r) for r in (response, response, stored))
            assert first == second, f"first {first}, then {second}"
            assert first == third, f"stored as JSON, {first} becomes {third}"

    def test_send_raises_call_errors_only(self) -> None:
        """Only errors of calls, which pickle, are raised; never an SDK's own exceptions.

        Neither they nor the variables of their tracebacks show the key: tools for errors print both.
        """
        late = [(call, replace(r, timeout=1e-6)) for call, _, r in self._made(self.make())]
        wrong = [(call, r) for llm in self.broken() for call, _, r in self._made(llm)]
        for n, (call, request) in enumerate(wrong + late):
            try:
                sent(call, request)
                assert n >= len(wrong), f"{call!r} is of a client that broken() gave, but answered"
            except CallError as error:
                told = "".join(traceback.format_exception(error)) + repr(vars(error))
                assert self.key not in told, "an error shows the key"
                for place, shown in variables(error):
                    assert self.key not in shown, (
                        f"a traceback shows the key: {place}. Raise the error elsewhere"
                    )
                assert str(pickle.loads(pickle.dumps(error))) == str(error)

    # --- helpers ----------------------------------------------------------------------------------

    def setup_method(self) -> None:
        """Set the key's environment variable."""
        self._before = os.environ.get(self.key_name)
        if self.key_name:
            os.environ[self.key_name] = self.key

    def teardown_method(self) -> None:
        """Restore the environment variable."""
        if self.key_name:
            os.environ.pop(self.key_name)
            if self._before is not None:
                os.environ[self.key_name] = self._before

    def _made(self, llm: Backend) -> list[Made]:
        """Return the calls, their arguments and their requests, each with its own draw."""
        with context.set(eager=False):
            nodes = [handle._node for handle in self.calls(llm)]
        made: list[Made] = []
        for n, node in enumerate(nodes):
            assert isinstance(node.op, Call), f"{node.key} is no call of an operation"
            assert not node.deps, f"{node.key}: calls() must return calls without lazy arguments"
            draws = (Draw("contract", "0", n),)
            made.append((node.op, node.args, replace(node.op.prepare(node.args), draws=draws)))
        return made

    def _value(self, made: Made, outcome: Outcome) -> str:
        """Return the value of an outcome as text, because arrays cannot be compared with ``==``."""
        call, arguments, _ = made
        return repr(outcome if isinstance(outcome, CallError) else call.parse(outcome, arguments))


def variables(error: Exception) -> Iterator[tuple[str, str]]:
    """Yield what a traceback with variables shows: their names and places, and their texts.

    :param error: an error that was caught; the frame that caught it is left out.
    """
    trace = error.__traceback__ and error.__traceback__.tb_next
    told: traceback.TracebackException | None
    told = traceback.TracebackException(type(error), error, trace, capture_locals=True)
    while told is not None:
        for frame in told.stack:
            for name, shown in (frame.locals or {}).items():
                yield f"{name} in {frame.name} ({frame.filename}:{frame.lineno})", shown
        told = told.__cause__ or told.__context__


def sent(call: Call[Any], request: Request) -> Response:
    """Send a request outside of any run, and close the client's connections.

    :param call: the operation.
    :param request: the request.
    """

    async def once() -> Response:
        try:
            return await call.send(request)
        finally:
            await close_clients(asyncio.get_running_loop())

    return asyncio.run(once())
