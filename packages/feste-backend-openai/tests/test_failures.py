"""What can go wrong between here and a server: which error it is, and that no key is in it."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import socket
import ssl
import threading
import traceback
from dataclasses import replace
from typing import Any

import aiohttp
import httpx2
import openai
import pytest
from pydantic import BaseModel

import feste
from feste import context
from feste.backend import Request, Secret
from feste.backend.clients import close_clients
from feste.backend.openai import ChatParams, OpenAI
from feste.backend.openai.errors import failure
from feste.errors import (
    AuthFailed,
    CallError,
    CallTimeout,
    ConfigError,
    ConnectionLost,
    ContextTooLong,
    InvalidRequest,
    MalformedResponse,
    MissingKey,
    ModelNotFound,
    OutputMismatch,
    QuotaExhausted,
    RateLimited,
    Rejected,
    RunFailed,
    ServerError,
    Unreachable,
)
from feste.testing.sim_server import Fault, SimServer

WIRE = "feste.backend.openai.testing:OpenAIWire"
CANARY = "Canary0123456789NeverToBeSeen"  # of no known form: only knowing it blanks it
KEY = Secret("FESTE_TEST_KEY")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FESTE_TEST_KEY", CANARY)


_models = itertools.count()


def client(server: SimServer, **given: Any) -> OpenAI:
    return OpenAI(f"m{next(_models)}", base_url=f"{server.url}/v1", api_key=KEY, **given)


def once(llm: OpenAI, prompt: str = "hello", **given: Any) -> Any:
    """Send one request by the send half alone: no gate, no retry."""
    call: Any = llm.chat
    return sent(llm, call.prepare([prompt, ChatParams(), None]), **given)


def sent(llm: OpenAI, request: Request, on_chunk: Any = None) -> Any:
    call: Any = llm.chat

    async def go() -> Any:
        try:
            return await call.send(request, on_chunk)
        finally:
            await close_clients(asyncio.get_running_loop())

    return asyncio.run(go())


def failed(llm: OpenAI, **given: Any) -> CallError:
    with pytest.raises(CallError) as caught:
        once(llm, **given)
    check_clean(caught.value)
    return caught.value


def check_clean(error: BaseException) -> None:
    """The key is nowhere in an error, nor in anything that it drags along."""
    assert error.__cause__ is None and error.__context__ is None
    loaded = pickle.loads(pickle.dumps(error))
    assert type(loaded) is type(error) and str(loaded) == str(error)
    for text in (
        repr(error), str(error), repr(error.args), repr(vars(error)),
        repr(pickle.dumps(error)), "".join(traceback.format_exception(error)),
    ):  # fmt: skip
        assert CANARY not in text


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, {"error": {"message": "bad"}}, InvalidRequest),
        (400, {"error": {"message": "x", "code": "context_length_exceeded"}}, ContextTooLong),
        (401, None, AuthFailed),
        (403, None, AuthFailed),
        (404, None, ModelNotFound),
        (408, None, ServerError),
        (409, None, ServerError),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "too big"}]}, InvalidRequest),
        (429, {"error": {"message": "slow", "code": "rate_limit_exceeded"}}, RateLimited),
        (429, {"error": {"message": "pay", "type": "insufficient_quota"}}, QuotaExhausted),
        (500, "plain words", ServerError),
        (502, "<html>bad gateway</html>", ConnectionLost),
        (503, {"object": "error", "message": "loading", "code": 503}, ServerError),
        (307, "", InvalidRequest),
    ],
)
def test_every_status_has_its_class(
    server: SimServer, status: int, body: Any, kind: type[CallError]
) -> None:
    """A status becomes the error of the tree, with the provider's words and numbers."""
    headers = {"x-request-id": "req-7", "location": f"{server.url}/v1/models"}
    server.add(Fault(status=status, body=body, headers=headers))
    error = failed(client(server))
    assert type(error) is kind
    assert (error.status, error.request_id, error.billed) == (status, "req-7", kind.billed)
    assert str(status) in str(error)
    assert ("redirect" in str(error)) == (status == 307)
    if isinstance(body, dict) and "error" in body:
        assert body["error"]["message"] in str(error)
        assert error.code == (body["error"].get("code") or body["error"].get("type"))
    assert len(server.requests()) == 1  # no retry, and no redirect followed


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "later"}, None),
    ],
)
def test_the_wait_that_is_asked_for(
    server: SimServer, headers: dict[str, str], wait: float | None
) -> None:
    """Retry-After, in each of its forms, comes with the error."""
    server.add(Fault(status=429, headers=headers))
    assert failed(client(server)).retry_after == wait


@pytest.mark.parametrize(
    ("fault", "kind", "billed"),
    [
        (Fault(kind="reset_before"), ConnectionLost, "unknown"),
        (Fault(kind="reset_after"), ConnectionLost, "unknown"),
        (Fault(kind="truncated"), ConnectionLost, "unknown"),
        (Fault(kind="garbage"), MalformedResponse, "yes"),
        (Fault(kind="garbage", body="<html>hello</html>"), MalformedResponse, "yes"),
        (Fault(kind="garbage", body=[1, 2]), MalformedResponse, "yes"),
        (Fault(kind="garbage", body={"error": {"code": 429, "message": "x"}}), RateLimited, "no"),
        (Fault(kind="garbage", body={"error": {"message": "behind"}}), ServerError, "no"),
    ],
)
def test_broken_connections_and_answers(
    server: SimServer, fault: Fault, kind: type[CallError], billed: str
) -> None:
    """What broke after the request had left may have been billed; a 200 with rubbish was."""
    server.add(fault)
    error = failed(client(server))
    assert (type(error), error.billed) == (kind, billed), error


@pytest.mark.parametrize("kind", ["hang", "drip"])
@pytest.mark.parametrize("stream", [False, True])
def test_one_attempt_has_one_limit(server: SimServer, kind: Any, stream: bool) -> None:
    """Silence and a body that drips for ever both end at the client's timeout."""
    server.add(Fault(kind=kind, pause=0.2))
    error = failed(client(server, timeout=0.4), on_chunk=str if stream else None)
    assert type(error) is CallTimeout and "0.4 seconds" in str(error)


def test_where_nothing_listens(server: SimServer) -> None:
    """Without a connection nothing was sent: the call may be tried again for free."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # taken, but nobody listens
        url = f"http://127.0.0.1:{holder.getsockname()[1]}/v1"
        error = failed(OpenAI("m", base_url=url, api_key=KEY))
    assert type(error) is Unreachable and error.billed == "no" and url in str(error)
    nowhere = OpenAI("m", base_url="https://no-such-host.localhost:9/v1", api_key=KEY)
    assert type(failed(nowhere)) is Unreachable


@pytest.mark.parametrize(("scheme", "kind"), [("http", ConnectionLost), ("https", Unreachable)])
def test_a_server_that_speaks_something_else(scheme: str, kind: type[CallError]) -> None:
    """Bytes that are no HTTP are an error of the tree too; a handshake that fails sent nothing."""

    def serve(listener: socket.socket) -> None:
        link, _ = listener.accept()
        with link:
            link.recv(65536)
            link.sendall(b"220 mail.example ESMTP\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/v1"
        error = failed(OpenAI("m", base_url=url, api_key=KEY))
        thread.join()
    assert type(error) is kind


def cause_of(cause: Exception) -> CallError:
    """The error for what the SDK raises from a cause, through the transport's wrong class for it."""
    between = httpx2.ConnectTimeout("no")
    between.__cause__ = cause
    error = openai.APITimeoutError(request=httpx2.Request("POST", "https://x"))
    error.__cause__ = between
    return failure(error, url="https://x", timeout=1.0, secret=KEY)


def test_the_first_cause_decides() -> None:
    """The transport calls most failures a timeout while connecting; its own exception is believed."""
    untrusted = cause_of(ssl.SSLCertVerificationError("self-signed certificate"))
    assert type(untrusted) is Rejected and untrusted.billed == "no"  # trying again would not help
    assert "self-signed" in str(untrusted)
    closed = aiohttp.ClientConnectionResetError("Cannot write to closing transport")
    assert type(cause_of(closed)) is Unreachable  # a kept connection was closed; nothing was sent
    assert type(cause_of(aiohttp.ClientConnectionResetError("Connection lost"))) is ConnectionLost
    assert type(cause_of(aiohttp.ServerDisconnectedError())) is ConnectionLost
    assert type(cause_of(aiohttp.ConnectionTimeoutError())) is Unreachable
    assert type(cause_of(aiohttp.SocketTimeoutError())) is CallTimeout
    unknown = failure(KeyError(CANARY), url="https://x", timeout=None, secret=KEY)
    assert type(unknown) is Rejected and unknown.billed == "unknown" and CANARY not in str(unknown)


class Number(BaseModel):
    number: int


class TestCanary:
    def test_an_echoed_key_is_blanked(self, server: SimServer) -> None:
        """A provider that repeats the key, in message, code, id or page, does not get it printed."""
        message = {"error": {"message": f"bad key {CANARY}", "code": f"no-{CANARY}"}}
        for fault in (
            Fault(status=401, body=message, headers={"x-request-id": CANARY}),
            Fault(status=400, body=f"{'x' * 1990}{CANARY}"),
            Fault(kind="garbage", body=f"<p>{CANARY}</p>", headers={"content-type": CANARY}),
            Fault(kind="garbage", body={"choices": [{"message": {"content": [CANARY]}}]}),
            Fault(kind="garbage", body={"error": {"code": 401, "message": CANARY}}),
        ):
            server.add(replace(fault, times=1 if fault.status == 400 else 2))
            llm = client(server)
            with context.set(eager=True), pytest.raises(CallError) as caught:
                llm.chat("hello")
            text = "".join(traceback.format_exception(caught.value)) + repr(vars(caught.value))
            assert CANARY not in text
            assert CANARY.encode() not in pickle.dumps(caught.value)

    def test_the_name_of_an_answer(self, server: SimServer) -> None:
        """The name of a request goes into reports: it is cut and without the key, of an answer too."""
        body = {"choices": [{"index": 0, "message": {"content": "hello"}}]}
        server.add(Fault(kind="garbage", body=body, headers={"x-request-id": CANARY + "x" * 500}))
        name = once(client(server)).request_id
        assert CANARY not in name and len(name) == 100

    def test_an_answer_that_holds_the_key(self, server: SimServer) -> None:
        """A model that repeats the key is quoted in an error without it."""
        node = client(server).chat(f"REPLY: no JSON, but {CANARY}", output=Number)
        (error,) = feste.compute(node, on_error="return")
        assert type(error) is OutputMismatch
        assert "no JSON, but ***" in str(error)
        assert CANARY not in str(error) + repr(vars(error))

    def test_no_error_of_a_run_drags_the_key_along(self, server: SimServer) -> None:
        """Neither the errors of a run nor its report hold the key or the SDK's objects."""
        server.add(Fault(status=400, times=1), Fault(kind="garbage", times=1))
        llm = client(server)
        with pytest.raises(RunFailed) as caught:
            feste.compute(llm.chat("a"), llm.chat("b"))
        for error in caught.value.errors:
            assert error.__cause__ is None and error.__context__ is None
        shown = pickle.dumps([caught.value.errors, caught.value.report.requests])
        assert CANARY.encode() not in shown and b"httpx" not in shown and b"aiohttp" not in shown

    def test_the_server_got_the_key(self) -> None:
        """The key is read where the request is sent, for each one: keys are rotated."""
        with SimServer(WIRE, wire_options={"require_key": CANARY}) as server:
            llm = client(server)
            assert llm.chat("hello").compute()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("FESTE_TEST_KEY", "another")
                (refused,) = feste.compute(llm.chat("again"), on_error="return")
                assert type(refused) is AuthFailed
            assert llm.chat("hello once more").compute()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("FESTE_TEST_KEY", "another")
                literal = OpenAI("m", base_url=f"{server.url}/v1", api_key=CANARY)
                assert literal.chat("hello").compute()


class TestTheBrain:
    """The backend only says what happened; Feste decides what follows."""

    def test_429_is_waited_for_and_sent_again(self, server: SimServer) -> None:
        """A throttled call is sent again after the time that the provider asked for."""
        server.add(Fault(status=429, headers={"retry-after": "0.05"}, times=3))
        llm = client(server)
        replies = feste.compute([llm.chat(f"q{i}") for i in range(3)])[0]
        assert len(replies) == 3
        assert [r.status for r in server.requests()].count(429) == 3
        assert len(server.ledger()) == 3

    def test_500_is_sent_again(self, server: SimServer) -> None:
        """A server's own failure is transient."""
        server.add(Fault(status=500, times=1))
        assert client(server).chat("hello").compute()
        assert len(server.requests()) == 2

    def test_404_is_confirmed_once(self, server: SimServer) -> None:
        """What concerns all calls of a model is asked once more, and names the model."""
        with SimServer(WIRE, wire_options={"models": ["good"]}) as other:
            llm = OpenAI("bad", base_url=f"{other.url}/v1")
            with pytest.raises(RunFailed) as caught:
                llm.chat("hello").compute()
            (error,) = caught.value.errors
            assert type(error) is ModelNotFound and "`bad`" in str(error)
            assert error.model == "bad" and error.backend == "openai"
            assert len(other.requests()) == 2

    def test_a_404_without_a_model_asks_for_the_path(self, server: SimServer) -> None:
        """A base_url without /v1 is the usual reason."""
        with pytest.raises(
            RunFailed, match=r"404: .*does base_url end as the server wants, in /v1"
        ):
            OpenAI("m", base_url=server.url).chat("hello").compute()

    def test_an_answer_that_is_no_json_is_told_without_links(self, server: SimServer) -> None:
        """Of pydantic's text only what is wrong is told."""

        class City(BaseModel):
            name: str

        message = {"role": "assistant", "content": "no JSON at all"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        server.add(Fault(kind="garbage", body={"choices": [choice]}))
        with pytest.raises(RunFailed) as caught:
            client(server).chat("hello", output=City).compute()
        assert "the answer is no City (Invalid JSON" in str(caught.value)
        assert "http" not in str(caught.value.errors[0].args[0])

    def test_a_bad_prompt_costs_only_itself(self, server: SimServer) -> None:
        """A list that is refused for one prompt is sent one by one, and the others are answered."""
        server.add(Fault(status=400, match="poison", times=None))
        llm = client(server)
        values = feste.compute(*[llm.complete(t) for t in ("a", "poison", "c")], on_error="return")
        assert [type(v) for v in values] == [
            feste.backend.Reply,
            InvalidRequest,
            feste.backend.Reply,
        ]


class TestBeforeAnythingIsSent:
    def test_a_missing_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Away from this machine a key is needed, and that is said before any request is made."""
        monkeypatch.delenv("FESTE_TEST_KEY")
        llm = OpenAI("m", base_url="https://127.0.0.2.example/v1", api_key=KEY)
        with pytest.raises(MissingKey, match="FESTE_TEST_KEY"):
            llm.chat("hello").compute()
        with context.set(eager=True), pytest.raises(MissingKey):
            llm.chat("hello")

    def test_a_local_server_needs_none(self, server: SimServer) -> None:
        """A server on this machine is called without a key; the SDK gets a word in its place."""
        llm = OpenAI("m", base_url=f"{server.url}/v1")
        assert llm.secrets == ()
        assert llm.chat("hello").compute()

    def test_no_proxy_for_this_machine(
        self, server: SimServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What goes to a server on this machine goes through no proxy of the environment."""
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        assert once(client(server)).payload["choices"]

    @pytest.mark.parametrize("bad", ["sk-1\n", "two words", "schlüssel", "tab\t"])
    def test_a_key_that_no_header_holds(
        self, server: SimServer, bad: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A key with a line end is refused by name; a transport's error would print it."""
        monkeypatch.setenv("FESTE_TEST_KEY", bad)
        with pytest.raises(ConfigError, match="FESTE_TEST_KEY") as caught:
            client(server).chat("hello").compute()
        assert bad not in str(caught.value)
        assert server.requests() == []

    def test_no_model(self, server: SimServer) -> None:
        """A call without a model is refused, and says where to give one."""
        llm = OpenAI(base_url=f"{server.url}/v1")
        for make in (llm.chat, llm.complete, llm.embed):
            with context.set(eager=True), pytest.raises(ConfigError, match=r"OpenAI\(model="):
                make("hello")
        assert server.requests() == []

    def test_the_key_goes_to_no_other_server(self, server: SimServer) -> None:
        """A request made for another endpoint is not sent with this client's key."""
        other: Any = OpenAI("m", base_url="http://127.0.0.1:9/v1").chat
        request = other.prepare(["hello", ChatParams(), None])
        with pytest.raises(ConfigError, match=r"not for http://127\.0\.0\.1:9"):
            sent(client(server), request)
        assert server.requests() == []
