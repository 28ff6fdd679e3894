"""`SimServer` without a provider: its process, its HTTP, its faults, the answers of its model."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import pytest

from feste.backend import Price, PromptCache, statuses
from feste.testing import sim_answers as oracle
from feste.testing.sim_cache import Lookup, PrefixCache, PromptPart, prompt_parts
from feste.testing.sim_http import Request, take_request
from feste.testing.sim_limits import Limiter, ServerLimits, Wait, retry_after
from feste.testing.sim_provider import Provider
from feste.testing.sim_server import Billed, Fault, Outage, SimServer

WIRE = '''
from dataclasses import replace

from feste.testing.wire import (
    Answer, Call, Item, Plan, PromptPart, Refusal, answer, digest, pieces, sse, words
)


class EchoWire:
    """One endpoint: a text, or several; a stream of the first one's words.

    Through the prompt cache, the texts are one prompt, with a breakpoint after each.
    """

    def __init__(self, path="/echo", require_key=None):
        self.paths, self.require_key = (path,), require_key

    def plan(self, call: Call) -> Plan:
        call.require_key(self.require_key)
        texts = call.body.get("texts") or [call.body.get("text")]
        if not all(isinstance(text, str) for text in texts):
            raise Refusal(400, "'text' must be a string", param="text")
        parts = [PromptPart(text, breakpoint=True) for text in texts]
        read = call.read("echo", parts, explicit=call.body.get("explicit") is True)

        def generate() -> Answer:
            assert "break" not in texts, "the wire broke"
            items = []
            for text in texts:
                (sample,) = call.samples(text, 1)
                made = answer(text, sample, seed=call.seed)
                items.append(Item(text, made, digest(text), sample))
            if call.body.get("stream"):
                events = [sse({"piece": piece}) for piece in pieces(items[0].answer)]
                return Answer(items=items, events=events)
            billed = replace(read, output_tokens=sum(words(item.answer) for item in items))
            return Answer({"texts": [item.answer for item in items]}, items, billed=billed)

        most = call.body.get("max_tokens", 0) * len(texts)
        return Plan(len(texts), generate, read.input_tokens + most)

    def error(self, refusal: Refusal) -> object:
        return {"message": refusal.message, "param": refusal.param}

    def limit_headers(self, status, requests, tokens):
        found = {"requests": requests, "tokens": tokens}
        return {
            f"x-left-{name}": f"{one.left:.0f} of {one.limit:.0f}"
            for name, one in found.items() if one is not None
        }
'''


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A wire in a module that only these tests' `sys.path` has."""
    folder = tmp_path_factory.mktemp("wire")
    (folder / "echo_wire.py").write_text(WIRE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "echo_wire:EchoWire"


@pytest.fixture(scope="module")
def shared(echo: str) -> Iterator[SimServer]:
    with SimServer(echo) as running:
        yield running


@pytest.fixture
def server(shared: SimServer) -> SimServer:
    shared.reset()
    return shared


@pytest.fixture
def slow(echo: str) -> Iterator[SimServer]:
    """A server that answers nothing while a test lasts."""
    with SimServer(echo, base=600, limits=ServerLimits(concurrency=3)) as running:
        yield running


def address(server: SimServer) -> tuple[str, int]:
    return "127.0.0.1", int(server.url.rsplit(":", 1)[1])


def post(
    server: SimServer, body: object, path: str = "/echo", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with closing(http.client.HTTPConnection(*address(server), timeout=60)) as link:
        link.request("POST", path, data, headers)
        reply = link.getresponse()
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()


def sent(server: SimServer, body: object) -> socket.socket:
    """Send a request and wait for nothing."""
    data = json.dumps(body).encode()
    link = socket.create_connection(address(server), timeout=60)
    link.sendall(b"POST /echo HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    return link


def many(server: SimServer, bodies: list[object]) -> list[int]:
    """Send requests one after the other over one connection, and return their statuses."""
    found = []
    with closing(http.client.HTTPConnection(*address(server), timeout=60)) as link:
        for body in bodies:
            link.request("POST", "/echo", json.dumps(body))
            reply = link.getresponse()
            reply.read()
            found.append(reply.status)
    return found


def reachable(server: SimServer) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address(server)) == 0


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens soon; the deadline only ends a test that is broken."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")  # an orphan may stay a zombie where nobody reaps
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


class TestRequests:
    def test_a_request_is_answered_logged_and_billed(self, server: SimServer) -> None:
        status, headers, body = post(server, {"text": "hi"}, Authorization="Bearer secret")

        assert (status, json.loads(body)) == (200, {"texts": [oracle.answer("hi", 0)]})
        (logged,) = server.requests()
        assert logged.id == headers["x-request-id"]
        assert (logged.method, logged.path, logged.body) == ("POST", "/echo", {"text": "hi"})
        assert (logged.status, logged.items, logged.fault) == (200, 1, None)
        assert logged.headers["authorization"] == "Bearer ***"
        assert logged.finished is not None and logged.finished >= logged.started
        assert server.ledger() == [
            {
                "request": logged.id,
                "path": "/echo",
                "prompt": "hi",
                "answer": oracle.answer("hi", 0),
                "key": oracle.digest("hi"),
                "sample": 0,
            }
        ]
        assert (server.totals().peak, server.totals().in_flight) == (1, 0)

    def test_sampled_answers_differ_and_greedy_ones_do_not(self, server: SimServer) -> None:
        def texts(**body: object) -> list[str]:
            found: list[str] = json.loads(post(server, {"text": "hi", **body})[2])["texts"]
            return found

        assert [texts()[0] for _ in range(3)] == [oracle.answer("hi", i) for i in range(3)]
        assert texts(temperature=0) == texts(temperature=0.0) == [oracle.answer("hi", 0)]
        assert texts(seed=7) == texts(seed=7) == [oracle.answer("hi", 0, seed=7)]
        assert texts(temperature=1) == [oracle.answer("hi", 3)]
        assert texts(text="other") == [oracle.answer("other", 0)]  # each prompt counts for itself

    def test_reset_forgets_everything(self, server: SimServer) -> None:
        post(server, {"text": "hi"})
        server.add(Fault(times=None))
        server.reset()

        assert (server.requests(), server.ledger(), server.totals().peak) == ([], [], 0)
        assert json.loads(post(server, {"text": "hi"})[2]) == {"texts": [oracle.answer("hi", 0)]}
        assert len(server.ledger()) == 1

    def test_latency_is_base_and_slope(
        self, echo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept: list[float] = []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)

        monkeypatch.setattr(asyncio, "sleep", sleep)
        server = SimServer(echo, base=2, slope=0.5, log_bodies=False)
        provider = Provider({**server._config, "ledger": str(tmp_path / "ledger")}, print)

        def ask(**body: object) -> Any:
            request = Request("POST", "/echo", {}, json.dumps(body).encode())
            provider.arrive(request)
            reply = asyncio.run(provider.answer(request))
            assert reply is not None and request.body == b""
            return reply

        ask(text="a")
        ask(texts=["a", "b", "c", "d"])
        assert slept == [2.5, 4.0]
        stream = ask(text="a", stream=True)
        assert slept[2:] == [2]  # the rest of it lies between the events
        assert stream.pause * len(stream.pieces) == pytest.approx(0.5)
        os.close(provider.ledger.file)

    def test_peak_and_in_flight(self, slow: SimServer) -> None:
        links = [sent(slow, {"text": str(i)}) for i in range(3)]
        until(lambda: slow.totals().in_flight == 3)
        assert [entry.finished for entry in slow.requests()] == [None] * 3
        for link in links:
            link.close()
        until(lambda: slow.totals().in_flight == 0)

        assert slow.totals().peak == 3
        assert {entry.status for entry in slow.requests()} == {None}

    def test_a_limit_of_concurrency(self, slow: SimServer) -> None:
        links = [sent(slow, {"text": str(i)}) for i in range(3)]
        until(lambda: slow.totals().in_flight == 3)

        assert post(slow, {"text": "one too many"})[0] == 429
        assert slow.requests()[3].items == 0
        for link in links:
            link.close()

    def test_what_a_client_left_is_billed(self, echo: str) -> None:
        with SimServer(echo, base=0.2) as server:
            sent(server, {"text": "hi"}).close()
            until(lambda: len(server.ledger()) == 1)
            until(lambda: server.requests()[0].items == 1)

            assert server.requests()[0].status is None

    def test_constant_headers(self, echo: str) -> None:
        with SimServer(echo, headers={"x-ratelimit-limit-requests": "60"}) as server:
            _, headers, _ = post(server, {"text": "hi"})
            _, of_error, _ = post(server, {})

        assert headers["x-ratelimit-limit-requests"] == "60"
        assert of_error["x-ratelimit-limit-requests"] == "60"
        assert of_error["x-request-id"] == "req_00000002"

    def test_errors_come_from_the_wire(self, server: SimServer) -> None:
        wrong = [(400, {}, "/echo"), (400, b"{not JSON", "/echo"), (400, [1], "/echo")]
        for status, body, path in [*wrong, (404, {}, "/other"), (404, {}, "/echoes")]:
            got, headers, text = post(server, body, path)
            assert (got, headers["content-type"]) == (status, "application/json")
            assert json.loads(text).keys() == {"message", "param"}
        assert [entry.items for entry in server.requests()] == [0] * 5
        assert server.requests()[1].body == "{not JSON"
        assert server.ledger() == []

    def test_a_broken_wire_is_an_error_500(self, server: SimServer) -> None:
        status, _, body = post(server, {"text": "break"})

        assert status == 500 and b"the wire broke" in body
        assert post(server, {"text": "hi"})[0] == 200

    def test_several_wires_on_one_port(self, echo: str) -> None:
        options = [{}, {"path": "/second", "require_key": "k"}]
        with SimServer([echo, echo], wire_options=options) as server:
            assert post(server, {"text": "hi"})[0] == 200
            assert post(server, {"text": "hi"}, "/second")[0] == 401
            assert post(server, {"text": "hi"}, "/second/x", authorization="Bearer k")[0] == 200


class TestFaults:
    def test_status(self, server: SimServer) -> None:
        server.add(
            Fault(status=429, headers={"Retry-After": "1"}, times=2),
            Fault(status=503, body="<html>busy</html>", headers={"content-type": "text/html"}),
            Fault(status=200, body={"choices": None}),
        )
        replies = [post(server, {"text": "hi"}) for _ in range(5)]

        assert [status for status, _, _ in replies] == [429, 429, 503, 200, 200]
        assert replies[0][1]["retry-after"] == "1"
        assert json.loads(replies[0][2]).keys() == {"message", "param"}
        assert replies[2][1]["content-type"] == "text/html"
        assert replies[2][2] == b"<html>busy</html>"
        assert json.loads(replies[3][2]) == {"choices": None}
        assert [entry.fault for entry in server.requests()] == ["status"] * 4 + [None]
        assert len(server.ledger()) == 1

    @pytest.mark.parametrize(("kind", "billed"), [("reset_before", 0), ("reset_after", 1)])
    def test_reset(self, server: SimServer, kind: Any, billed: int) -> None:
        server.add(Fault(kind=kind))
        with pytest.raises(ConnectionResetError):
            post(server, {"text": "hi"})

        (logged,) = server.requests()
        assert (logged.status, logged.items, logged.fault) == (None, billed, kind)
        assert len(server.ledger()) == billed
        assert post(server, {"text": "hi"})[0] == 200

    def test_garbage(self, server: SimServer) -> None:
        server.add(Fault(kind="garbage"), Fault(kind="garbage", body=""))
        status, headers, body = post(server, {"text": "hi"})

        assert (status, headers["content-type"]) == (200, "application/json")
        with pytest.raises(ValueError, match="Expecting value"):
            json.loads(body)
        assert post(server, {"text": "hi", "stream": True})[2] == b""
        assert len(server.ledger()) == 2

    def test_truncated(self, server: SimServer) -> None:
        server.add(Fault(kind="truncated", times=2))
        with pytest.raises(http.client.IncompleteRead) as cut:
            post(server, {"text": "hi"})
        assert cut.value.partial.startswith(b'{"texts":["echo:')
        with pytest.raises(http.client.IncompleteRead) as cut:
            post(server, {"text": "hi", "stream": True})

        assert cut.value.partial.count(b"data: ") == 4
        assert [entry["sample"] for entry in server.ledger()] == [0, 1]

    def test_hang_lasts_until_the_client_goes(self, server: SimServer) -> None:
        server.add(Fault(kind="hang"))
        link = sent(server, {"text": "hi"})
        until(lambda: server.totals().in_flight == 1)
        assert post(server, {"text": "hi"})[0] == 200
        link.close()
        until(lambda: server.totals().in_flight == 0)

        logged = server.requests()[0]
        assert (logged.status, logged.items, logged.fault) == (None, 0, "hang")
        assert len(server.ledger()) == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_drip_sends_all_in_pieces(self, server: SimServer, stream: bool) -> None:
        body = {"text": "hi", "temperature": 0, "stream": stream}
        whole = post(server, body)[2]
        server.add(Fault(kind="drip", pause=0.001))

        assert post(server, body)[2] == whole
        assert server.requests()[1].fault == "drip"

    def test_an_endless_drip_ends_with_its_client(self, server: SimServer) -> None:
        server.add(Fault(kind="drip", pause=600))
        with sent(server, {"text": "hi"}) as link:
            assert link.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")  # the head is there at once
        until(lambda: server.totals().in_flight == 0)

        assert server.requests()[0].status == 200

    def test_which_requests_are_hit(self, server: SimServer) -> None:
        server.add(
            Fault(status=418, match='say "ä"', times=None),
            Fault(status=410, path="/echo/old", times=None),
        )

        assert post(server, {"text": 'they say "ä"'})[0] == 418
        assert post(server, json.dumps({"text": 'say "ä"'}, ensure_ascii=False).encode())[0] == 418
        assert post(server, {"text": "hi"}, "/echo/old")[0] == 410
        assert post(server, {"text": "hi"})[0] == 200

    def test_chance_comes_from_the_seed(self, echo: str) -> None:
        def hits(seed: int) -> list[int]:
            with SimServer(echo, seed=seed) as server:
                server.add(Fault(times=None, probability=0.5))
                first = [post(server, {"text": "hi"})[0] for _ in range(40)]
                server.reset()
                server.add(Fault(times=None, probability=0.5))
                assert [post(server, {"text": "hi"})[0] for _ in range(40)] == first
                return first

        assert hits(1) == hits(1)
        assert hits(1) != hits(2)
        assert {200, 500} == set(hits(1))

    @pytest.mark.parametrize(
        ("kind", "status", "generated"),
        [
            ("rate_limit", 429, 0),
            ("quota", 429, 0),
            ("overloaded", 529, 0),
            ("unavailable", 503, 0),
            ("html", 503, 0),
            ("bad_gateway", 502, 0),
            ("gateway_timeout", 504, 1),
            ("garbage", 200, 1),
            ("empty", 200, 1),
            ("wrong_shape", 200, 1),
            ("wrong_count", 200, 1),
        ],
    )
    def test_what_comes_instead_of_an_answer(
        self, server: SimServer, kind: Any, status: int, generated: int
    ) -> None:
        server.add(Fault(kind=kind, pause=7))
        got, headers, body = post(server, {"text": "hi"})

        assert got == status
        page = kind in ("html", "bad_gateway", "gateway_timeout")
        assert (headers["content-type"] == "text/html") == page == (b"<html>" in body)
        waits = kind in ("rate_limit", "overloaded", "unavailable")
        assert headers.get("retry-after") == ("7" if waits else None)
        assert oracle.answer("hi").encode() not in body
        found = server.totals()
        assert (found.generated, found.delivered) == (generated, 0)
        assert (found.statuses, found.faults) == ({status: 1}, {kind: 1})
        assert server.requests()[0].delivered is False

    def test_there_is_no_answer_to_spoil_where_one_is_refused(self, server: SimServer) -> None:
        server.add(Fault(kind="garbage", times=None), Fault(kind="hang", times=None))

        assert post(server, {})[0] == 400
        assert (server.totals().faults, server.requests()[0].fault) == ({}, None)

    def test_slow(self, server: SimServer) -> None:
        server.add(Fault(kind="slow", pause=600))
        link = sent(server, {"text": "hi"})
        until(lambda: server.totals().in_flight == 1)
        link.close()
        server.add(Fault(kind="slow", pause=0.01))

        assert post(server, {"text": "ho"})[0] == 200
        assert server.totals().delivered == 1

    def test_rates_do_not_depend_on_the_order_of_arrival(self, echo: str) -> None:
        rates: dict[Any, float] = {"status": 0.2, "html": 0.1, "garbage": 0.1}
        bodies: list[object] = [{"text": str(i)} for i in range(400)]

        def struck(seed: int, bodies: list[object]) -> dict[str, str | None]:
            with SimServer(echo, faults=rates, seed=seed) as server:
                many(server, bodies)
                server.reset()  # which leaves these faults
                many(server, bodies)
                assert sum(server.totals().faults.values()) == len(
                    [entry for entry in server.requests() if entry.fault]
                )
                return {entry.body["text"]: entry.fault for entry in server.requests()}

        first = struck(1, bodies)
        assert struck(1, bodies[::-1]) == first
        assert struck(2, bodies) != first
        found = Counter(first.values())
        assert 60 <= found["status"] <= 100 and 25 <= found["html"] <= 55  # 80 and 40 expected

    def test_a_request_that_comes_again_has_another_chance(self, echo: str) -> None:
        with SimServer(echo, faults={"status": 0.5}) as server:
            statuses = many(server, [{"text": "hi"}] * 40)

        assert set(statuses) == {200, 500}

    def test_an_outage_of_some_requests(self, server: SimServer) -> None:
        server.add(Outage(after_requests=2, requests=3))

        assert many(server, [{"text": "hi"}] * 8) == [200, 200, 503, 503, 503, 200, 200, 200]
        assert server.totals().faults == {"outage": 3}

    def test_an_outage_that_refuses_connections(self, server: SimServer) -> None:
        server.add(Outage(after_requests=1, seconds=1, refuse=True))
        with closing(http.client.HTTPConnection(*address(server), timeout=60)) as kept:
            kept.request("POST", "/echo", b'{"text": "a"}')
            assert kept.getresponse().read()
            with pytest.raises(ConnectionResetError):
                post(server, {"text": "b"})
            with pytest.raises(ConnectionRefusedError):
                post(server, {"text": "c"})
            with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
                kept.request("POST", "/echo", b'{"text": "d"}')
                kept.getresponse()
        assert server.totals().faults == {"outage": 1}  # the door of the totals stays open

        until(lambda: reachable(server))
        assert post(server, {"text": "e"})[0] == 200

    def test_an_outage_bills_what_it_interrupts(self, echo: str) -> None:
        outage = Outage(after_requests=1, seconds=60, refuse=True)
        with SimServer(echo, base=0.2, faults=[outage]) as server:
            with sent(server, {"text": "a"}) as link:
                until(lambda: server.totals().in_flight == 1)
                with pytest.raises(ConnectionResetError):
                    post(server, {"text": "b"})
                with pytest.raises(ConnectionResetError):
                    link.recv(1)
            until(lambda: server.totals().generated == 1)

            assert (server.totals().delivered, server.totals().left) == (0, 0)

    def test_an_outage_has_one_end(self) -> None:
        for wrong in ({}, {"seconds": 1, "requests": 1}):
            with pytest.raises(ValueError, match="one of them"):
                Outage(**wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="give seconds="):
            Outage(requests=3, refuse=True)

    def test_a_wrong_fault_is_refused_where_it_is_made(self) -> None:
        with pytest.raises(ValueError, match="no fault of kind 'explode'; there are: status"):
            Fault(kind="explode")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="from 0 to 1"):
            Fault(probability=2)


class TestLimiter:
    """The limits on a clock of the test."""

    def test_what_it_says_to_wait_is_enough_and_not_too_much(self) -> None:
        limits = ServerLimits(requests_per_minute=700, tokens_per_minute=9_000, bucket=0.7)
        limiter, chance, now = Limiter(limits), random.Random(1), 0.0
        for _ in range(2_000):
            tokens = chance.randrange(1, 90)
            wait = limiter.allow(now, tokens)
            if wait:
                assert limiter.allow(now + 0.999 * wait, tokens) > 0
                now += wait
                assert limiter.allow(now, tokens) == 0
            limiter.settle(now, tokens, chance.randrange(tokens + 1))
            now += chance.choice([0, 0, 0.001, 0.2])

    def test_no_window_gets_more_than_its_quota(self) -> None:
        limiter = Limiter(ServerLimits(requests_per_minute=600, bucket=1))
        times = [i / 100 for i in range(1_000) if limiter.allow(i / 100) == 0]

        assert len(times) == 109  # those saved up, and one each tenth of a second
        for i, start in enumerate(times):
            for count, end in enumerate(times[i:], 1):
                assert count <= 10 * (end - start) + 10 + 1e-6

    def test_what_was_not_generated_flows_back(self) -> None:
        limiter = Limiter(ServerLimits(tokens_per_minute=60, bucket=10))
        assert limiter.allow(0, 10) == 0
        assert limiter.allow(0, 4) == 4
        limiter.settle(0, reserved=10, used=3)

        assert limiter.allow(0, 7) == 0
        assert limiter.allow(0, 1) == 1

    def test_more_than_fits_takes_a_full_bucket_and_leaves_a_debt(self) -> None:
        limiter = Limiter(ServerLimits(tokens_per_minute=60, bucket=10))
        assert limiter.allow(0, 25) == 0
        assert limiter.allow(0, 1) == 16
        assert limiter.allow(24, 25) == 1
        assert limiter.allow(25, 25) == 0

    def test_places_in_flight_come_back(self) -> None:
        limiter = Limiter(ServerLimits(concurrency=2))
        assert [limiter.allow(0), limiter.allow(0), limiter.allow(9)] == [0, 0, math.inf]
        limiter.settle(9)

        assert limiter.allow(9) == 0

    def test_what_is_left(self) -> None:
        limiter = Limiter(ServerLimits(requests_per_minute=120, tokens_per_minute=600))
        for _ in range(20):
            limiter.allow(5, 10)
        requests, tokens = limiter.requests(8), limiter.tokens(8)

        assert requests is not None and (requests.limit, requests.left) == (120, 106)
        assert requests.reset == 7
        assert tokens is not None and (tokens.left, tokens.reset) == (430, 17)
        assert Limiter(ServerLimits()).requests(0) is None

    def test_used_is_a_share_of_the_time_or_of_a_bucket(self) -> None:
        limiter = Limiter(ServerLimits(requests_per_minute=60, bucket=5), now=3)
        assert limiter.used() == (0, 5, 0, 0)
        for second in range(100, 111):
            limiter.allow(second)

        assert limiter.used() == (11, 10, 0, 0)

    @pytest.mark.parametrize("spelling", get_args(Wait))
    def test_clients_can_read_each_spelling(self, spelling: Wait) -> None:
        headers = retry_after(spelling, 1.2345, time.time())
        read = statuses.retry_after(headers)

        if spelling == "none":
            assert headers == {} and read is None
        else:
            assert read is not None
            # dates have whole seconds, and are rounded so that nobody comes too early
            low, high = {"long": (121, 123), "date": (1.2, 3.3)}.get(spelling, (1.2, 2.3))
            assert low < read < high
        assert ("date" in headers) == (spelling == "date")
        assert retry_after(spelling, math.inf, 0) == {}

    def test_numbers_are_above_0(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrency", "bucket"):
            with pytest.raises(ValueError, match=f"{name}=0"):
                ServerLimits(**{name: 0})


class TestLimits:
    """The limits over a socket."""

    def test_each_account_and_model_has_its_own(self, echo: str) -> None:
        with SimServer(echo, limits=ServerLimits(requests_per_minute=2)) as server:
            assert many(server, [{"text": "hi"}] * 3) == [200, 200, 429]
            assert post(server, {"text": "hi", "model": "other"})[0] == 200
            assert post(server, {"text": "hi"}, authorization="Bearer other")[0] == 200
            status, headers, body = post(server, {"text": "hi"})
            found = server.totals()

        assert status == 429 and json.loads(body)["message"] == "Rate limit reached."
        assert 20 <= int(headers["retry-after"]) <= 30
        assert found.statuses == {200: 4, 429: 2} and found.share(429) == pytest.approx(1 / 3)
        assert found.requests_used == pytest.approx(4 / 6)
        assert found.tokens_used is None

    def test_tokens(self, echo: str) -> None:
        with SimServer(echo, limits=ServerLimits(tokens_per_minute=100)) as server:
            body = {"text": "three little words", "max_tokens": 90}
            assert many(server, [body, body]) == [200, 429]  # 8 tokens were generated
            assert post(server, {**body, "max_tokens": 80})[0] == 200
            found = server.totals()

        assert found.tokens_used == pytest.approx(22 / 100)

    @pytest.mark.parametrize("told", [True, False])
    def test_headers_are_the_wires_and_can_be_left_out(self, echo: str, told: bool) -> None:
        limits = ServerLimits(requests_per_minute=2, tokens_per_minute=500, headers=told)
        with SimServer(echo, limits=limits) as server:
            headers = [post(server, body)[1] for body in ({"text": "hi"}, {}, {"text": "hi"})]
            refused = post(server, {"text": "hi"})[1]

        shown = [(h.get("x-left-requests"), h.get("x-left-tokens")) for h in [*headers, refused]]
        left = ["1 of 2", "1 of 2", "0 of 2", "0 of 2"]
        tokens = ["491 of 500", "491 of 500", "482 of 500", "482 of 500"]
        assert shown == (list(zip(left, tokens, strict=True)) if told else [(None, None)] * 4)
        assert "retry-after" in refused

    def test_waiting_is_spelled_in_all_ways_by_the_seed(self, echo: str) -> None:
        def spelled(seed: int) -> list[str]:
            limits = ServerLimits(requests_per_minute=1, bucket=1)
            with SimServer(echo, limits=limits, waits=get_args(Wait), seed=seed) as server:
                found = [post(server, {"text": str(i)})[1] for i in range(60)]
            return [kind_of(headers) for headers in found[1:]]

        first = spelled(1)
        assert set(first) == set(get_args(Wait))
        assert spelled(1) == first != spelled(2)

    def test_spellings_are_checked(self) -> None:
        for wrong in ((), ("soon",)):
            with pytest.raises(ValueError, match="waits are one or more of seconds"):
                SimServer("a:B", waits=wrong)  # type: ignore[arg-type]


def kind_of(headers: dict[str, str]) -> str:
    """Tell how headers spell a wait of up to a minute."""
    if "retry-after-ms" in headers:
        return "milliseconds"
    text = headers.get("retry-after", "")
    if "GMT" in text:
        return "date"
    if "." in text:
        return "fraction"
    return "none" if not text else "long" if int(text) > 120 else "seconds"


class TestLedger:
    def test_what_arrived_and_what_it_cost(self, echo: str) -> None:
        price = Price(input=2.0, output=8.0)
        with SimServer(echo, price=price, base=0.05) as server:
            post(server, {"texts": ["two words", "three more words"]})
            server.add(Fault(kind="reset_after"))
            with pytest.raises(ConnectionResetError):
                post(server, {"text": "hi"})
            sent(server, {"text": "gone"}).close()
            until(lambda: server.totals().generated == 4)
            until(lambda: server.totals().in_flight == 0)
            whole, reset, gone = server.requests()
            found = server.totals()

        assert whole.billed == Billed.uncached(5, 16)
        assert whole.dollars == pytest.approx((5 * 2 + 16 * 8) / 1e6)
        assert (whole.delivered, reset.delivered, gone.delivered) == (True, False, False)
        assert (whole.left, reset.left) == (None, None)
        assert gone.left is not None and gone.started <= gone.left == gone.finished
        assert (found.requests, found.generated, found.delivered, found.left) == (3, 4, 2, 1)
        assert found.billed == Billed.uncached(7, 32)
        assert found.dollars == pytest.approx((7 * 2 + 32 * 8) / 1e6)
        assert found.statuses == {200: 1}


class CacheOnPaper:
    """A prompt cache whose clock the test sets, and which generates at once."""

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.cache = PrefixCache(PromptCache(**options), clock=lambda: self.now)

    def read(self, *parts: str | PromptPart, scope: str = "m", explicit: bool = False) -> Lookup:
        whole = [part if isinstance(part, PromptPart) else PromptPart(part) for part in parts]
        return self.cache.read(scope, whole, explicit=explicit)

    def ask(
        self, *parts: str | PromptPart, scope: str = "m", explicit: bool = False
    ) -> tuple[int, int]:
        """Read a prompt, write it, and return its cached and its written tokens."""
        lookup = self.read(*parts, scope=scope, explicit=explicit)
        self.cache.write(lookup)
        return lookup.billed.cached_tokens, lookup.billed.written_tokens


def end(text: str) -> PromptPart:
    return PromptPart(text, breakpoint=True)


class TestPromptCache:
    def test_a_prompt_is_found_from_its_commit_on(self) -> None:
        paper = CacheOnPaper(minimum=2, lag=3)
        assert paper.ask("a b c") == (0, 3)
        paper.now = 2.9
        assert paper.cache.committed() == 0
        assert paper.ask("a b c") == (0, 3)  # it comes too early, writes, and pays again
        paper.now = 3.0
        assert paper.cache.committed() == 2  # the first write kept its time
        assert paper.ask("a b c") == (3, 0)

    def test_a_lookup_is_made_on_arrival(self) -> None:
        paper = CacheOnPaper(minimum=1, lag=0)
        first, second = paper.read("a b"), paper.read("a b")
        paper.cache.write(first)
        paper.cache.write(second)

        assert [one.billed.written_tokens for one in (first, second)] == [2, 2]
        assert paper.ask("a b") == (2, 0)

    def test_what_nobody_reads_expires(self) -> None:
        paper = CacheOnPaper(minimum=1, lag=0, ttl=10)
        assert paper.ask("a b c d") == (0, 4)
        paper.now = 10.0
        assert paper.ask("a b x") == (2, 1)
        paper.now = 20.0
        assert paper.ask("a b c d") == (2, 2)  # only what was read at 10 is still there
        paper.now = 30.1
        assert paper.cache.committed() == 0
        assert paper.ask("a b c d") == (0, 4)

    def test_what_expired_is_written_like_new(self) -> None:
        paper = CacheOnPaper(minimum=1, lag=3, ttl=10)
        paper.ask("a b")
        found = []
        for now in (13.0, 23.1, 25.0, 26.1):
            paper.now = now
            found.append(paper.ask("a b"))

        assert found == [(2, 0), (0, 2), (0, 2), (2, 0)]

    def test_the_minimum_and_the_step(self) -> None:
        paper = CacheOnPaper(minimum=4, step=3, lag=0)
        assert [paper.ask("a b c") for _ in range(2)] == [(0, 0)] * 2
        assert [paper.ask("a b c d e f g") for _ in range(2)] == [(0, 6), (6, 0)]
        assert paper.ask("a b c d e") == (0, 0)
        assert paper.ask("a b c d", end(" e"), "f") == (0, 6)  # a breakpoint is not rounded
        assert paper.ask("a b c d", end(" e")) == (5, 0)
        assert paper.ask("a b c d e") == (0, 0)

    def test_the_price_of_the_input(self) -> None:
        paper = CacheOnPaper(minimum=1, lag=0, write=2.0, read=0.5)
        paper.ask(end("a b"), explicit=True)
        lookup = paper.read(end("a b"), end(" c d e"), " f", explicit=True)

        assert lookup.billed == Billed(6, 2, 3, 0, 0.5 * 2 + 2.0 * 3 + 1)

    def test_explicit_breakpoints(self) -> None:
        paper = CacheOnPaper(minimum=2, lag=0)
        assert [paper.ask("a b c", explicit=True) for _ in range(2)] == [(0, 0)] * 2
        assert paper.ask(end("a"), "b", explicit=True) == (0, 0)  # below the minimum
        assert paper.ask(end("a b"), "c", explicit=True) == (0, 2)
        assert paper.ask(end("a b"), end(" d"), " e", explicit=True) == (2, 1)
        assert paper.ask("a b d e", explicit=True) == (0, 0)
        assert paper.ask("a b d e") == (3, 1)  # the implicit mode finds all that was written
        assert paper.ask(end("a b d e"), explicit=True) == (4, 0)

    def test_a_breakpoint_inside_what_is_cached_is_written(self) -> None:
        paper = CacheOnPaper(minimum=1, lag=0)
        paper.ask(end("a b c"), explicit=True)
        assert paper.ask(end("a"), end(" b c"), explicit=True) == (3, 0)
        assert paper.ask(end("a"), "x", explicit=True) == (1, 0)

    def test_a_request_writes_the_last_four_breakpoints(self) -> None:
        paper = CacheOnPaper(minimum=1, lag=0)
        assert paper.ask(*map(end, "abcde"), explicit=True) == (0, 5)
        assert paper.cache.committed() == 4
        assert paper.ask(end("a"), explicit=True) == (0, 1)
        assert paper.ask(*map(end, "ab"), explicit=True) == (2, 0)

    def test_what_makes_prefixes_differ(self) -> None:
        paper = CacheOnPaper(minimum=1, lag=0)
        paper.ask("a b c")
        assert paper.ask("a", " b", " c") == (3, 0)
        assert paper.ask("a  b c") == (1, 2)
        assert paper.ask("a", PromptPart(" b", label="user"), " c") == (1, 2)
        assert paper.ask("a b c", scope="other") == (0, 3)

    def test_the_parts_of_a_conversation(self) -> None:
        def conversation(role: str = "user", tool: str = "t", mark: str = "stop") -> Any:
            block = {"type": "text", "text": "b c", mark: {"mode": "explicit"}}
            talk: list[dict[str, Any]] = [
                {"role": "system", "content": "a"},
                {"role": role, "content": [block]},
            ]
            return prompt_parts(talk, [{"name": tool}], "stop")

        paper = CacheOnPaper(minimum=1, lag=0)
        assert paper.ask(*conversation()) == (0, 5)  # two words of JSON for the tool
        assert paper.ask(*conversation()) == (5, 0)
        assert paper.ask(*conversation(role="tool")) == (3, 2)
        assert paper.ask(*conversation(tool="u")) == (1, 4)
        assert paper.ask(*conversation(), explicit=True) == (5, 0)
        assert paper.ask(*conversation(mark="other"), explicit=True) == (0, 0)
        image: dict[str, Any] = {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "x"}}],
        }
        (part, shown) = prompt_parts([image])
        assert (part.text, shown.text) == ("", "") and "image_url" in shown.label
        assert prompt_parts([{"role": "assistant", "content": None}])[1].text == ""

    def test_a_server_adds_the_bill_up(self, echo: str) -> None:
        with SimServer(echo, prompt_cache=PromptCache(minimum=3, write=1.25, lag=600)) as server:
            server.add(Fault(kind="reset_after", match="lost"), Fault(match="refused"))
            with pytest.raises(ConnectionResetError):
                post(server, {"text": "a lost answer"})
            assert post(server, {"text": "a refused request"})[0] == 500
            assert post(server, {})[0] == 400
            for _ in range(2):
                post(server, {"texts": ["a b c", " d"], "explicit": True})
            post(server, {"text": "a b"})

            assert server.totals().committed == 0
            assert server.totals().billed == Billed(13, 0, 11, 8 + 2 * 16 + 8, 1.25 * 11 + 2)
            server.reset()
            assert server.totals().billed == Billed()

    def test_a_server_commits_and_forgets(self, echo: str) -> None:
        with SimServer(echo, prompt_cache=PromptCache(minimum=3, write=1.25, lag=0.05)) as server:
            for _ in range(2):
                post(server, {"text": "a b c d"})
                until(lambda: server.totals().committed == 2)
            assert server.totals().billed == Billed(8, 4, 4, 16, 1.25 * 4 + 0.1 * 4)
            server.reset()
            assert server.totals().committed == 0
            post(server, {"text": "a b c d"})
            assert server.totals().billed.cached_tokens == 0

    def test_a_server_lets_prefixes_expire(self, echo: str) -> None:
        with SimServer(echo, prompt_cache=PromptCache(minimum=1, lag=0, ttl=0.05)) as server:
            for _ in range(2):
                post(server, {"text": "a b"})
                until(lambda: server.totals().committed == 0)
            assert server.totals().billed.written_tokens == 4

    def test_a_server_without_a_cache_bills_all(self, server: SimServer) -> None:
        for _ in range(2):
            post(server, {"text": "word " * 5000})

        assert server.totals().billed == Billed(10_000, output_tokens=16, input_units=10_000)

    def test_numbers_are_checked(self) -> None:
        for wrong in ({"minimum": 0}, {"step": 0}):
            with pytest.raises(ValueError, match="at least 1 token"):
                PromptCache(**wrong)
        for name in ("write", "read", "lag", "ttl"):
            with pytest.raises(ValueError, match=f"{name}=-1.*from 0"):
                PromptCache(**{name: -1})


class TestProcess:
    def test_close_leaves_nothing(self, echo: str) -> None:
        descriptors = Path("/proc/self/fd")
        before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
        threads = threading.active_count()
        server = SimServer(echo).start()
        assert server.start() is server
        pid, place, ledger = server.pid, address(server), server.ledger_path
        assert ledger.exists()
        server.close()
        server.close()

        with pytest.raises(ChildProcessError):
            os.waitpid(pid, 0)  # there is no child: not even a zombie
        assert not ledger.exists()
        assert threading.active_count() == threads
        assert repr(server) == "<SimServer not running>"
        with socket.socket() as probe:
            assert probe.connect_ex(place) != 0
        if descriptors.exists():
            assert len(list(descriptors.iterdir())) == before

    def test_it_starts_again_on_the_same_port(self, echo: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        server = SimServer(echo, port=port)
        for _ in range(2):
            with server:
                assert post(server, {"text": "hi"})[0] == 200
                assert address(server)[1] == port

    def test_it_closes_under_requests_in_flight(self, slow: SimServer) -> None:
        with sent(slow, {"text": "hi"}) as link:
            until(lambda: slow.totals().in_flight == 1)
            slow.close()
            assert link.recv(1) == b""

    def test_methods_need_a_running_server(self, echo: str) -> None:
        server = SimServer(echo)
        with pytest.raises(RuntimeError, match="no ledger"):
            _ = server.ledger_path
        with server:
            pass
        for method in (server.requests, server.ledger, server.totals, server.reset):
            with pytest.raises(RuntimeError, match="inside its 'with' block"):
                method()

    @pytest.mark.parametrize(
        ("wire", "options", "reason"),
        [
            ("no_such_module:Wire", {}, "No module named 'no_such_module'"),
            ("echo_wire:Nothing", {}, "has no attribute 'Nothing'"),
            ("echo_wire:EchoWire", {"colour": "red"}, "unexpected keyword argument 'colour'"),
        ],
    )
    def test_a_failed_start_says_why(
        self, echo: str, wire: str, options: dict[str, str], reason: str
    ) -> None:
        server = SimServer(wire, wire_options=options)
        with pytest.raises(RuntimeError, match=r"did not start \(exit code 1\)") as error:
            server.start()

        assert reason in str(error.value)
        assert not server.ledger_path.exists()

    def test_arguments_are_checked(self) -> None:
        for wire, options in [("no_colon", {}), ([], {}), (["a:B", "c:D"], {"x": 1})]:
            with pytest.raises(ValueError, match="wire"):
                SimServer(wire, wire_options=options)
        with pytest.raises(ValueError, match="cannot be negative"):
            SimServer("a:B", base=-1)

    def test_the_ledger_survives_a_kill(self, echo: str, tmp_path: Path) -> None:
        path = tmp_path / "bill.jsonl"
        server = SimServer(echo, ledger_path=path)
        with server:
            post(server, {"texts": ["a", "b"]})
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(RuntimeError, match="SimServer is gone"):
                until(lambda: server.totals().peak < 0)
        with server:
            post(server, {"text": "c"})
        with path.open("a") as file:
            file.write('{"request": "cut he')

        assert [entry["prompt"] for entry in server.ledger()] == ["a", "b", "c"]

    def test_it_works_inside_a_running_loop(self, server: SimServer) -> None:
        async def main() -> int:
            server.add(Fault(status=418))
            reader, writer = await asyncio.open_connection(*address(server))
            writer.write(b"POST /echo HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}")
            first = await reader.readline()
            writer.close()
            await writer.wait_closed()
            assert first == b"HTTP/1.1 418 I'm a Teapot\r\n"
            return len(server.requests())

        assert asyncio.run(main()) == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    @pytest.mark.parametrize(
        "end", ["sys.exit(0)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"]
    )
    @pytest.mark.parametrize("fork", ["ends", "outlives it"])
    def test_it_ends_with_its_parent(self, echo: str, fork: str, end: str) -> None:
        program = f"""
import os, signal, sys, time
from feste.testing.sim_server import SimServer
server = SimServer({echo!r}).start()
fork = os.fork()
if fork == 0 and {fork!r} == "ends":
    sys.exit(0)  # the end of a fork is not the server's
elif fork == 0:  # a fork that lives on holds the server's stdin open
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    time.sleep(100)
elif {fork!r} == "ends":
    os.wait()
server.totals().peak
print(server.pid, fork, server.ledger_path, flush=True)
{end}
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            timeout=100,
        )
        assert done.stdout, done.stderr.decode()
        pid, child, ledger = done.stdout.decode().strip().split(" ", 2)
        try:
            until(lambda: gone(int(pid)))
        finally:
            if fork != "ends":
                os.kill(int(child), signal.SIGKILL)
        assert Path(ledger).exists() == (end != "sys.exit(0)")
        Path(ledger).unlink(missing_ok=True)


class TestHttp:
    def test_one_connection_serves_many_requests(self, server: SimServer) -> None:
        with closing(http.client.HTTPConnection(*address(server), timeout=60)) as link:
            for text in ("a", "b"):
                link.request("POST", "/ech%6F?x=1", json.dumps({"text": text}))
                assert json.load(link.getresponse()) == {"texts": [oracle.answer(text)]}
        assert [entry.path for entry in server.requests()] == ["/echo", "/echo"]

    def test_requests_sent_ahead_are_answered_in_order(self, echo: str) -> None:
        bodies = [b'{"texts": ["a", "a", "a"]}', b'{"text": "b"}']
        links = [b"", b"connection: close\r\n"]
        with (
            SimServer(echo, slope=0.1) as server,  # the second would be ready first
            socket.create_connection(address(server), timeout=60) as link,
        ):
            for body, more in zip(bodies, links, strict=True):
                head = b"POST /echo HTTP/1.1\r\ncontent-length: %d\r\n" % len(body)
                link.sendall(head + more + b"\r\n" + body)
                until(lambda: len(server.requests()) > 0)
            data = b"".join(iter(lambda: link.recv(65536), b""))

        answers = [data.index(oracle.answer(text).encode()) for text in "ab"]
        assert answers == sorted(answers)

    def test_what_is_not_http_is_refused(self, server: SimServer) -> None:
        for nonsense in (b"hello\r\n\r\n", b"x" * 100_000):
            with socket.create_connection(address(server), timeout=60) as link:
                link.sendall(nonsense)
                assert link.recv(12) == b"HTTP/1.1 400"
        assert server.requests() == []

    def test_a_request_in_small_pieces(self) -> None:
        plain = b"POST /p HTTP/1.1\r\nContent-Length: 5\r\nX-A: b: c\r\n\r\nhello"
        chunked = b"POST /p HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked += b"3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n"
        for message in (plain, chunked):
            data = bytearray()
            for byte in message[:-1]:
                data.append(byte)
                assert take_request(data) is None
            data += message[-1:] + b"GET"
            request = take_request(data)
            assert request is not None
            assert (request.method, request.path, request.body) == ("POST", "/p", b"hello")
            assert data == b"GET"
        assert request is not None and request.headers == {"transfer-encoding": "chunked"}


class TestAnswers:
    def test_an_answer_depends_on_each_argument(self) -> None:
        talk = [{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}]
        answers = [
            oracle.answer("hi"),
            oracle.answer("hi", 1),
            oracle.answer("hi", seed=0),
            oracle.answer("hi", seed=1),
            oracle.answer("ho"),
            oracle.answer(talk),
        ]
        assert len(set(answers)) == len(answers)
        assert oracle.answer([{"role": "user", "content": "hi"}]) == oracle.answer("hi", 0)
        assert all(len(text.split()) == 8 and text.startswith("echo:") for text in answers)

    def test_a_reply_is_scripted_by_the_last_user_message(self) -> None:
        said = {"role": "user", "content": "Question\nREPLY: forty two \nmore"}
        parts = {"role": "user", "content": [{"type": "text", "text": "REPLY: parts"}]}

        assert oracle.answer(said["content"], 3) == "forty two "
        assert oracle.answer([said, {"role": "assistant", "content": "?"}]) == "forty two "
        assert oracle.answer([said, parts]) == "parts"
        assert oracle.answer("no REPLY: here").startswith("echo:")
        assert oracle.json_answer("REPLY: [1]", {"type": "integer"}) == "[1]"

    def test_cut_and_pieces(self) -> None:
        assert oracle.cut("a  b c", 2) == ("a  b", True)
        assert oracle.cut("a  b c", 3) == oracle.cut("a  b c", None) == ("a  b c", False)
        for text in ("a  b c ", " a\n", "", "  "):
            assert "".join(oracle.pieces(text)) == text
        assert oracle.pieces("a  b") == ["a  ", "b"]

    def test_words(self) -> None:
        parts = [{"type": "text", "text": "two words"}, {"type": "image_url", "image_url": {}}]
        messages: list[Any] = [
            {"role": "system", "content": "one"},
            {"role": "user", "content": parts},
        ]
        assert oracle.words(messages) == 3
        assert oracle.words("a b") == 2

    def test_a_vector_has_length_one_in_32_bits(self) -> None:
        vector = oracle.embedding("text", 100)
        assert len(vector) == 100
        assert math.hypot(*vector) == pytest.approx(1)
        assert array("f", vector).tolist() == vector
        assert oracle.embedding("text", 100) == vector != oracle.embedding("other", 100)
        assert len(oracle.embedding("\ud800")) == 16

    @pytest.mark.parametrize(
        ("schema", "expected"),
        [
            ({"type": "string"}, "text"),
            ({"type": "string", "maxLength": 2}, "te"),
            ({"type": "string", "minLength": 6}, "textxx"),
            ({"type": "string", "format": "date"}, "2000-01-01"),
            ({"enum": ["red", "blue"]}, "red"),
            ({"const": 5}, 5),
            ({"type": "integer"}, 0),
            ({"type": "integer", "minimum": 3}, 3),
            ({"type": "integer", "exclusiveMinimum": 3}, 4),
            ({"type": "integer", "maximum": -2}, -2),
            ({"type": "integer", "minimum": 3, "multipleOf": 5}, 5),
            ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, 0.5),
            ({"type": "boolean"}, False),
            ({"type": ["null", "string"]}, None),
            ({"type": "array", "items": {"type": "string"}}, []),
            ({"type": "array", "items": {"type": "null"}, "minItems": 2}, [None, None]),
            ({"type": "array", "prefixItems": [{"const": 1}]}, [1]),
            ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
            ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, 0),
            ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"const": 1}}}, 1),
            ({"properties": {"a": {}, "b": {}}, "required": ["b"]}, {"b": "text"}),
        ],
    )
    def test_minimal_instances(self, schema: object, expected: object) -> None:
        found = oracle.minimal(schema, "text")
        assert (found, type(found)) == (expected, type(expected))

    def test_a_schema_that_holds_itself(self) -> None:
        node = {
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
            "required": ["next"],
        }
        schema = {"$defs": {"Node": node}, "$ref": "#/$defs/Node"}
        assert oracle.minimal(schema) == {"next": None}

    def test_tool_calls(self) -> None:
        tools: list[Any] = [
            {"function": {"name": name, "parameters": {}}} for name in ("one", "two")
        ]
        asked = {"role": "user", "content": 'CALL: two {"x": 1}'}
        result = {"role": "tool", "content": "2"}

        assert oracle.tool_answer("hi", tools, forced=False) is None
        assert oracle.tool_answer("hi", [], forced=True) is None
        assert oracle.tool_answer([asked], tools, forced=False) == ("two", '{"x": 1}')
        assert oracle.tool_answer([asked, result], tools, forced=False) is None
        assert oracle.tool_answer([asked, result], tools, forced=True) == ("two", '{"x": 1}')
        assert oracle.tool_answer("hi", tools, forced=True, name="two") == ("two", "{}")
