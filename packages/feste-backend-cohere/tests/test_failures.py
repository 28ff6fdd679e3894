"""Every way a request can fail, over real sockets: which error it is, and that no key is in it."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import feste
from feste import errors
from feste.backend import Response
from feste.backend.clients import close_clients
from feste.backend.cohere import ChatParams, Cohere, EmbedParams, GenerateParams
from feste.backend.cohere.testing import answer
from feste.testing.sim_server import Fault, SimServer

WIRE = "feste.backend.cohere.testing:CohereWire"
KEY = "canary/0123456789"
NOW = {"retry-after": "0"}


@pytest.fixture(scope="module")
def running() -> Iterator[SimServer]:
    with SimServer(WIRE) as server:
        yield server


@pytest.fixture
def server(running: SimServer, monkeypatch: pytest.MonkeyPatch) -> SimServer:
    monkeypatch.setenv("CO_API_KEY", KEY)
    running.reset()
    return running


@pytest.fixture
def llm(server: SimServer) -> Cohere:
    return Cohere("m", base_url=server.url, timeout=20)


def send(
    llm: Cohere, prompt: str = "Hi", on_chunk: Callable[[str], None] | None = None
) -> Response:
    """Send one chat once, without the scheduler."""

    async def once() -> Response:
        try:
            request = llm.chat.prepare([prompt, ChatParams(logprobs=True), None])
            return await llm.chat.send(request, on_chunk)
        finally:
            await close_clients(asyncio.get_running_loop())

    return asyncio.run(once())


def failed(llm: Cohere, **given: Any) -> errors.CallError:
    with pytest.raises(errors.CallError) as caught:
        send(llm, **given)
    return caught.value


STATUSES = [
    (400, "invalid request: message must not be empty", errors.InvalidRequest),
    (400, "too many tokens: size limit exceeded by 11326 tokens", errors.ContextTooLong),
    (401, "invalid api token", errors.AuthFailed),
    (402, "Please add or update your payment method", errors.QuotaExhausted),
    (403, "forbidden", errors.AuthFailed),
    (404, "model 'm' not found", errors.ModelNotFound),
    (408, "timeout", errors.ServerError),
    (409, "conflict", errors.ServerError),
    (422, "unprocessable", errors.InvalidRequest),
    (429, "You are past the per minute request limit", errors.RateLimited),
    (429, "a Trial key, which is limited to 1000 API calls / month", errors.QuotaExhausted),
    (499, "request cancelled", errors.ServerError),
    (500, "internal server error", errors.ServerError),
    (502, "<html>bad gateway</html>", errors.ConnectionLost),
    (503, "overloaded", errors.RateLimited),
    (504, "gateway timeout", errors.ConnectionLost),
]


class TestStatus:
    @pytest.mark.parametrize(("status", "said", "kind"), STATUSES)
    def test_class(
        self, server: SimServer, llm: Cohere, status: int, said: str, kind: type[errors.CallError]
    ) -> None:
        """Each status is one class of error, told once: the SDK itself never tries again."""
        body = said if said.startswith("<") else {"id": "abc", "message": said}
        server.add(Fault(status=status, body=body, headers={"retry-after": "2.5"}, times=None))
        error = failed(llm)
        assert type(error) is kind and said in str(error)
        assert (error.status, error.retry_after, error.billed) == (status, 2.5, kind.billed)
        assert error.request_id == ("abc" if isinstance(body, dict) else None)
        assert len(server.requests()) == 1

    @pytest.mark.parametrize("status", [408, 429, 499, 500, 503])
    def test_the_brain_tries_again(self, server: SimServer, llm: Cohere, status: int) -> None:
        """What may work later is tried again by Feste, and the answer is there."""
        server.add(Fault(status=status, headers=NOW, times=2))
        assert llm.chat("Hi").compute() == answer("Hi")
        assert [r.status for r in server.requests()] == [status, status, 200]
        assert len(server.ledger()) == 1

    @pytest.mark.parametrize(
        ("status", "said"), [(401, "no"), (404, "no"), (429, "limited to 1000 API calls / month")]
    )
    def test_the_brain_gives_up(
        self, server: SimServer, llm: Cohere, status: int, said: str
    ) -> None:
        """What concerns all calls is asked once more, in case it was a slip, and never again."""
        server.add(Fault(status=status, body={"message": said}, headers=NOW, times=None))
        error = feste.compute(llm.chat("Hi"), on_error="return")[0]
        assert error.status == status and len(server.requests()) == 2

    def test_a_shared_request(self, server: SimServer, llm: Cohere) -> None:
        """A shared request that fails for a while goes again as it is."""
        server.add(Fault(status=503, headers=NOW))
        assert len(feste.compute(*[llm.embed(f"text {i}") for i in range(5)])) == 5
        assert [len(r.body["texts"]) for r in server.requests()] == [5, 5]


class TestConnection:
    def test_refused(self, llm: Cohere) -> None:
        """Where nobody listens nothing was sent, so nothing was billed."""
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            error = failed(Cohere("m", base_url=f"http://127.0.0.1:{bound.getsockname()[1]}"))
        assert type(error) is errors.Unreachable and error.billed == "no"

    @pytest.mark.parametrize("kind", ["reset_before", "reset_after", "truncated"])
    def test_broken(self, server: SimServer, llm: Cohere, kind: Any) -> None:
        """A connection that breaks after the request was sent may have cost money."""
        server.add(Fault(kind=kind))
        error = failed(llm)
        assert type(error) is errors.ConnectionLost and error.billed == "unknown"
        assert len(server.requests()) == 1

    def test_the_brain_tries_again(self, server: SimServer, llm: Cohere) -> None:
        """A request whose answer was lost is sent once more."""
        server.add(Fault(kind="reset_before"))
        assert llm.chat("Hi").compute() == answer("Hi")
        assert len(server.requests()) == 2

    @pytest.mark.parametrize("fault", [Fault(kind="hang"), Fault(kind="drip", pause=0.5)])
    def test_timeout(self, server: SimServer, fault: Fault) -> None:
        """The timeout is for the whole attempt, also where something comes all the time."""
        server.add(fault)
        error = failed(Cohere("m", base_url=server.url, timeout=0.7))
        assert type(error) is errors.CallTimeout and error.billed == "unknown"

    @pytest.mark.parametrize("body", ["<html>hello</html>", "", "[]", '"text"', "null"])
    def test_garbage(self, server: SimServer, llm: Cohere, body: str) -> None:
        """A success that is no JSON object was paid and cannot be used."""
        server.add(Fault(kind="garbage", body=body))
        error = failed(llm)
        assert type(error) is errors.MalformedResponse and error.billed == "yes"

    def test_another_shape(self, server: SimServer, llm: Cohere) -> None:
        """JSON of another shape is bought once more: then it fails the call that it is for."""
        server.add(Fault(kind="garbage", body={"answer": "Hello"}, times=None))
        error = feste.compute(llm.chat("Hi"), on_error="return")[0]
        assert type(error) is errors.MalformedResponse and len(server.requests()) == 2

    def test_too_few_generations(self, server: SimServer, llm: Cohere) -> None:
        """Fewer answers than were asked for are not taken for all of them, but bought once more."""
        server.add(Fault(kind="garbage", body={"generations": [{"text": "one"}]}, times=3))
        call, other = (llm.generate(text, GenerateParams(num_generations=2)) for text in "ab")
        assert isinstance(feste.compute(call, on_error="return")[0], errors.CountMismatch)
        assert len(server.requests()) == 2
        assert len(other.compute()) == 2

    def test_no_vector(self, server: SimServer, llm: Cohere) -> None:
        """A reply to one text without a vector is bought once more."""
        server.add(Fault(kind="wrong_count", times=3))
        error = feste.compute(llm.embed("a"), on_error="return")[0]
        assert type(error) is errors.CountMismatch and len(server.requests()) == 2
        assert len(llm.embed("b").compute()) == 16

    def test_no_json(self, server: SimServer, llm: Cohere) -> None:
        """What cannot be written as JSON is refused here, and nothing is sent."""
        params = ChatParams(temperature=float("nan"))
        error = feste.compute(llm.chat("Hi", params), on_error="return")[0]
        assert type(error) is errors.ConfigError and server.requests() == []

    def test_half_a_character_spoils_nothing(self, server: SimServer, llm: Cohere) -> None:
        """A lone surrogate travels as JSON can say it, and the texts beside it get their vectors."""
        texts = [f"text {i}" for i in range(49)] + ["half \ud83d"]
        assert len(feste.compute([llm.embed(text) for text in texts])[0]) == 50
        assert [r.body["texts"] for r in server.requests()] == [texts]

    def test_an_id_with_the_key_is_blanked(self, server: SimServer, llm: Cohere) -> None:
        """The name of a request goes into reports: it is cut and without the key, of an answer too."""
        server.add(
            Fault(kind="garbage", body={"id": f"{KEY}{'x' * 500}"}), Fault(status=400, body=ECHO)
        )
        name = send(llm).request_id
        assert name and KEY not in name and len(name) == 100
        assert failed(llm).request_id == "1"


class TestStream:
    def test_pieces(self, server: SimServer, llm: Cohere) -> None:
        """A stream hands over the text as it comes and returns what would have come at once."""
        pieces: list[str] = []
        streamed = send(llm, "REPLY: one two three", on_chunk=pieces.append)
        whole = send(llm, "REPLY: one two three")
        assert len(pieces) > 1 and "".join(pieces) == "one two three"
        for name in ("message", "finish_reason", "usage"):
            assert streamed.payload[name] == whole.payload[name]
        assert streamed.usage == whole.usage and streamed.request_id
        assert [r.body["stream"] for r in server.requests()] == [True, False]

    def test_tool_calls(self, llm: Cohere) -> None:
        """A streamed call of a tool is put together again."""
        schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
        tools = [{"type": "function", "function": {"name": "go", "parameters": schema}}]
        arguments = ['CALL: go {"x": 7}', ChatParams(tools=tools), None]

        async def once(on_chunk: Any) -> Any:
            response = await llm.chat.send(llm.chat.prepare(arguments), on_chunk)
            await close_clients(asyncio.get_running_loop())
            return llm.chat.parse(response, arguments)

        pieces: list[str] = []
        streamed, whole = asyncio.run(once(pieces.append)), asyncio.run(once(None))
        assert pieces == [] and streamed.finish_reason == "tool_calls"
        (one,), (two,) = streamed.tool_calls, whole.tool_calls
        assert one["function"] == two["function"] == {"name": "go", "arguments": '{"x": 7}'}

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            (Fault(status=429), errors.RateLimited),
            (Fault(kind="reset_before"), errors.ConnectionLost),
            (Fault(kind="truncated"), errors.ConnectionLost),
            (Fault(kind="garbage", body="data: {\n\n"), errors.MalformedResponse),
            (Fault(kind="garbage", body="data: [1]\n\n"), errors.MalformedResponse),
            (Fault(kind="garbage", body="hello"), errors.MalformedResponse),
        ],
    )
    def test_failures(
        self, server: SimServer, llm: Cohere, fault: Fault, kind: type[errors.CallError]
    ) -> None:
        """A stream that does not come to its end is an error, never half an answer."""
        server.add(fault)
        assert type(failed(llm, on_chunk=lambda piece: None)) is kind

    def test_timeout(self, server: SimServer) -> None:
        """The timeout is for the whole stream."""
        server.add(Fault(kind="drip", pause=0.5))
        llm = Cohere("m", base_url=server.url, timeout=0.7)
        assert type(failed(llm, on_chunk=lambda piece: None)) is errors.CallTimeout


ECHO = {"id": "1", "message": f"key {KEY} is not valid: Bearer {KEY}", "headers": KEY}
FAULTS = [
    Fault(status=401, body=ECHO, times=None),
    Fault(status=500, body=json.dumps(ECHO), times=None),
    Fault(status=404, body=f"<p>{KEY}</p>", times=None),
    Fault(kind="reset_before", times=None),
    Fault(kind="truncated", times=None),
    Fault(kind="hang", times=None),
    Fault(kind="garbage", body=f"Bearer {KEY}", times=None),
]


class TestCanary:
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.kind}{f.status}")
    @pytest.mark.parametrize("stream", [False, True])
    def test_no_key_in_an_error(self, server: SimServer, fault: Fault, stream: bool) -> None:
        """No error holds the key: in no text, attribute or cause, nor when it travels."""
        server.add(fault)
        llm = Cohere("m", base_url=server.url, timeout=0.5)
        error = failed(llm, on_chunk=(lambda piece: None) if stream else None)
        told = "".join(traceback.format_exception(error)) + f"{error!r} {vars(error)}"
        assert KEY not in told and KEY.encode() not in pickle.dumps(error)
        assert error.__cause__ is None and error.__context__ is None

    def test_unreachable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A connection that cannot be made leaves no request behind in its error."""
        monkeypatch.setenv("CO_API_KEY", KEY)
        error = failed(Cohere("m", base_url="http://127.0.0.1:9"))
        assert KEY not in f"{error!r} {vars(error)}" and error.__context__ is None

    def test_through_the_scheduler(self, server: SimServer, llm: Cohere) -> None:
        """Neither a run's error nor its report holds the key."""
        server.add(FAULTS[0])
        with pytest.raises(errors.RunFailed) as caught:
            feste.compute(llm.chat("Hi"), llm.embed("a", EmbedParams()), llm.embed("b"))
        error = caught.value
        told = "".join(traceback.format_exception(error)) + f"{error!r} {error.report!r}"
        assert KEY not in told and len(error.errors) == 3
        assert KEY.encode() not in pickle.dumps(error.errors)
