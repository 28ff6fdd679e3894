"""Requests that leave from workers: the same answers and errors as from here, within a window for each."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import distributed
import pytest

import feste
from feste import context
from feste.backend import Backend, Limits, Operation, Request, Response, Secret, operation
from feste.errors import (
    CallTimeout,
    ConfigError,
    MissingKey,
    Rejected,
    RunFailed,
    ServerError,
)
from feste.scheduler.dask.pickling import dumps
from feste.scheduler.dask.requests.pump import Pump, Shipment
from feste.testing import Fault, ServerLimits, SimServer

openai = pytest.importorskip("feste.backend.openai")

WIRE = "feste.backend.openai.testing:OpenAIWire"
Until = Callable[[Callable[[], Any]], bool]


@pytest.fixture(scope="module")
def shared() -> Iterator[SimServer]:
    with SimServer(WIRE) as server:
        yield server


@pytest.fixture
def server(shared: SimServer) -> SimServer:
    """A provider, as if it had just started."""
    shared.reset()
    return shared


@pytest.fixture
def llm(server: SimServer) -> Any:
    return openai.OpenAI("m", base_url=f"{server.url}/v1", limits=Limits(concurrency=16))


@pytest.fixture
def there(client: Any) -> Iterator[Any]:
    """Settings by which all requests leave from the workers."""
    with context.set(scheduler=client, requests_on="workers", worker_window=4):
        yield client


def chats(llm: Any, count: int) -> list[Any]:
    return [llm.chat(f"REPLY: {i}") for i in range(count)]


def texts(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def _pumps() -> Any:
    def pumps(dask_worker: Any) -> int:
        """Count the pumps of a worker."""
        return sum(name.startswith("feste-") for name in dask_worker.handlers)

    return pumps


pumps = _pumps()


def report() -> Any:
    made = feste.last_report()
    assert made is not None
    return made


def begin(pool: ThreadPoolExecutor, client: Any, *nodes: Any, **settings: Any) -> Any:
    """Run nodes in a thread; the future has their values and the report."""

    def run() -> Any:
        given = {"worker_window": 4, **settings}
        values = feste.compute(*nodes, scheduler=client, requests_on="workers", **given)
        return values[0] if len(nodes) == 1 else values, report()

    return pool.submit(run)


# --- the window -----------------------------------------------------------------------------------


def counting(where: Path) -> Any:
    """A backend that notes in a file of each process how many of its requests were under way at most."""
    counts = {"now": 0, "peak": 0}

    class Counting(Backend):
        plugin = "counting"

        def __init__(self, seconds: float = 0.02) -> None:
            self.seconds = seconds

        async def _wait(self) -> None:
            counts["now"] += 1
            if counts["now"] > counts["peak"]:
                counts["peak"] = counts["now"]
                (where / str(os.getpid())).write_text(str(counts["peak"]))
            await asyncio.sleep(self.seconds)
            counts["now"] -= 1

        @operation
        async def ask(self, text: str) -> str:
            await self._wait()
            return f"{text} by {os.getpid()}"

        @operation
        async def complete(self, text: str) -> str:
            await self._wait()
            return text.upper()

        @complete.batch(max_items=8)
        async def complete_many(self, text: list[str]) -> list[str]:
            await self._wait()
            return [each.upper() for each in text]

    return Counting()


def test_no_worker_has_more_than_its_window(there: Any, tmp_path: Path) -> None:
    """It is used up; several runs share it, with lists too, and calls wait for a worker by name."""
    llm = counting(tmp_path)
    with ThreadPoolExecutor() as pool:
        runs = [
            begin(
                pool,
                there,
                [llm.ask(f"{n} {i}") for i in range(100)],
                [llm.complete(llm.ask(f"{n} and {i}")) for i in range(20)],
            )
            for n in range(3)
        ]
        for n, run in enumerate(runs):
            (asked, completed), told = run.result()
            assert told.waits["worker"] > 0
            assert {r.worker for r in told.requests} == {"0", "1"}
            assert [text.split(" by ")[0] for text in asked] == [f"{n} {i}" for i in range(100)]
            assert all(text.startswith(f"{n} AND {i} BY") for i, text in enumerate(completed))

    peaks = {int(path.name): path.read_text() for path in tmp_path.iterdir()}
    assert peaks == dict.fromkeys(there.run(os.getpid).values(), "4")


def test_others_are_not_held_by_the_window_of_a_cluster(
    there: Any, server: SimServer, llm: Any, until: Until
) -> None:
    """While workers are full, a local run with the same account is served."""
    server.add(Fault(kind="slow", pause=4.0, match="slow", times=None))
    with ThreadPoolExecutor() as pool:
        running = begin(pool, there, [llm.chat(f"REPLY: slow {i}") for i in range(9)])
        assert until(lambda: server.totals().in_flight == 8)

        assert feste.compute(chats(llm, 5), scheduler="local", requests_on="client")[0] == texts(5)
        assert server.totals().delivered == 5  # so the workers had no room until then
        server.reset()
        assert running.result()[0] == [f"slow {i}" for i in range(9)]


def test_a_rate_limit_holds_for_all_workers_together(new_cluster: Callable[[int], Any]) -> None:
    """With 4, 2 and 1 workers: at most 1 % refused, at least 95 % of the quota used, nothing lost."""
    settings = {"requests_on": "workers", "worker_window": 16}
    with new_cluster(4) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        for workers, in_headers in (4, False), (2, True), (1, False):
            cluster.scale(workers)
            limits = ServerLimits(requests_per_minute=2400, bucket=2.0, headers=in_headers)
            wanted = Limits(concurrency=8) if in_headers else Limits(requests_per_minute=2400)
            with SimServer(WIRE, base=0.05, limits=limits) as limited:
                llm = openai.OpenAI("m", base_url=f"{limited.url}/v1", limits=wanted)
                values = feste.compute(chats(llm, 90), scheduler=client, **settings)
                totals = limited.totals()

            assert values[0] == texts(90)
            assert totals.share(429) <= 0.01
            assert totals.requests_used is not None
            assert totals.requests_used >= 0.95


# --- workers that come and go ---------------------------------------------------------------------


def test_workers_join_pause_and_retire(
    new_cluster: Callable[[int], Any], server: SimServer, llm: Any, until: Until
) -> None:
    """Who joins is used; who stands still or retires ends what it has: nothing is bought twice."""
    server.add(Fault(kind="slow", pause=1.5, times=48))  # 18 seconds of work for the first alone
    with (
        new_cluster(1) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        ThreadPoolExecutor() as pool,
    ):

        def run(count: int) -> Any:
            return begin(pool, client, chats(llm, count))

        def served(count: int) -> bool:
            return until(lambda: server.totals().delivered >= count)

        running = run(60)
        assert served(1)
        cluster.scale(2)  # joins
        assert until(lambda: server.totals().in_flight == 8)
        values, told = running.result()
        assert values == texts(60)
        assert {r.worker for r in told.requests} == {"0", "1"}
        assert server.totals().generated == 60

        server.reset()
        server.add(Fault(kind="slow", pause=0.3, times=None))
        running = run(80)
        assert served(8)
        still = cluster.workers[0].process.pid
        os.kill(still, signal.SIGSTOP)
        try:
            served_then = server.totals().delivered
            assert served(served_then + 8)  # by the other one
        finally:
            os.kill(still, signal.SIGCONT)
        values, told = running.result()
        assert values == texts(80)
        assert server.totals().generated == 80
        assert told.perhaps_billed == 0

        server.reset()
        server.add(Fault(kind="slow", pause=0.5, times=None))
        running = run(32)
        assert until(lambda: server.totals().in_flight == 8)
        client.retire_workers([cluster.workers[0].worker_address])
        values, told = running.result()
        assert values == texts(32)
        assert server.totals().generated == 32
        assert told.perhaps_billed == 0


def test_who_does_not_answer_gets_nothing_more(
    cluster: Any,
    there: Any,
    server: SimServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A suspended worker has nothing under way once all of it is late: then it must not attract the rest."""
    rooms = "feste.scheduler.dask.requests"
    monkeypatch.setattr(f"{rooms}.line._POLL", 0.1)
    for name in "line._SILENCE", "line._CHECK", "line._GRACE", "pumps._MEET":
        monkeypatch.setattr(f"{rooms}.{name}", 0.5)
    hasty = openai.OpenAI("hasty", base_url=f"{server.url}/v1", timeout=0.5)
    assert feste.compute(chats(hasty, 8)) == (texts(8),)
    server.add(Fault(kind="slow", pause=0.1, times=None))
    still = cluster.workers[0].process.pid
    os.kill(still, signal.SIGSTOP)
    try:
        assert feste.compute(chats(hasty, 160)) == (texts(160),)
        assert sum(bool(request.error) for request in report().requests) <= 8  # two windows
        new = openai.OpenAI("new", base_url=f"{server.url}/v1")
        assert feste.compute(chats(new, 8), worker_window=5) == (texts(8),)  # with new pumps
    finally:
        os.kill(still, signal.SIGCONT)
    while len({request.worker for request in report().requests}) < 2:  # it is used again
        assert feste.compute(chats(hasty, 16)) == (texts(16),)


def test_an_adaptive_cluster_and_one_without_workers(
    new_cluster: Callable[[int], Any], server: SimServer, llm: Any
) -> None:
    """Calls wait until there is a worker; what is adaptive may shrink and grow under a run."""
    with new_cluster(0) as cluster, distributed.Client(cluster, set_as_default=False) as client:
        with (
            ThreadPoolExecutor() as pool,
            pytest.warns(feste.errors.FesteWarning, match="has no workers yet"),
        ):
            running = begin(pool, client, chats(llm, 50))
            threading.Timer(0.5, cluster.adapt, kwargs={"minimum": 1, "maximum": 2}).start()
            values, told = running.result()
            assert values == texts(50)
        assert server.totals().generated == 50
        assert told.waits["worker"] > 0


def test_a_pump_that_vanished_is_made_anew(
    there: Any, server: SimServer, llm: Any, until: Until
) -> None:
    """A worker that was started again under its address, or gave its client up, had lost what it had."""

    def remove_pumps(dask_worker: Any) -> None:
        for name in list(dask_worker.plugins):
            if name.startswith("feste-"):
                dask_worker.loop.add_callback(dask_worker.plugin_remove, name)

    server.add(Fault(kind="slow", pause=0.3, times=None))
    with ThreadPoolExecutor() as pool:
        running = begin(pool, there, chats(llm, 40))
        assert until(lambda: server.totals().delivered >= 4)
        there.run(remove_pumps)

        values, told = running.result()
        assert values == texts(40)
    assert server.totals().left <= told.perhaps_billed <= 8


# --- what goes over the wire ------------------------------------------------------------------------


def test_a_message_that_comes_twice_is_taken_once(there: Any, server: SimServer, llm: Any) -> None:
    """Where the answer to it got lost, the client repeats it: also after the request has ended."""
    name, address = "pump-of-a-test", next(iter(there.nthreads()))

    def ask(**message: Any) -> Any:
        told = there.sync(there.scheduler.proxy, worker=address, msg=message)
        return pickle.loads(told) if isinstance(told, bytes) else told

    def say(do: str, *asked: Any, life: str = "") -> Any:
        return ask(op=name, do=do, life=life, data=dumps(asked))

    ask(op="plugin-add", name=name, plugin=dumps(Pump(name)))
    try:
        life, (_, problem) = say("hello", {"b": dumps(llm)})
        assert problem is None
        request = llm.chat.prepare(["REPLY: once", openai.ChatParams(), None])
        first = (1, {}, [Shipment(7, "b", "chat", request, False)], [])
        assert say("send", *first, life=life) == (life, True)
        (told,) = say("collect", 0, 10.0, life=life)[1]
        assert told.request == 7
        assert not say("collect", told.ordinal, 0.0, life=life)[1]

        assert say("send", *first, life=life) == (life, True)
        assert say("send", *first, life="another") == (life, None)
        assert not say("collect", told.ordinal, 0.2, life=life)[1]
        assert len(server.ledger()) == 1
    finally:
        ask(op="plugin-remove", name=name)


def test_a_pump_gives_up_a_client_that_is_gone(
    there: Any, server: SimServer, llm: Any, until: Until
) -> None:
    """Its requests are cancelled, and the pump goes; while the client asks, it stays."""
    there.run(llm.warm_up)  # importing the SDK takes longer than the pump's patience
    server.add(Fault(kind="hang", times=None))
    name, address = "pump-of-a-test", next(iter(there.nthreads()))
    message = {"op": "plugin-add", "name": name, "plugin": dumps(Pump(name, silence=0.8))}
    there.sync(there.scheduler.proxy, worker=address, msg=message)

    def say(do: str, *asked: Any, life: str = "") -> Any:
        message = {"op": name, "do": do, "life": life, "data": dumps(asked)}
        told = there.sync(there.scheduler.proxy, worker=address, msg=message)
        return pickle.loads(told) if told else None

    def has_pump(dask_worker: Any) -> bool:
        return name in dask_worker.handlers or name in dask_worker.plugins

    life, _ = say("hello", {"b": dumps(llm)})
    request = llm.chat.prepare(["REPLY: never", openai.ChatParams(), None])
    say("send", 1, {}, [Shipment(7, "b", "chat", request, False)], [], life=life)
    for _ in range(5):
        assert say("collect", 0, 0.3, life=life) == (life, [])
    assert server.totals().in_flight == 1

    assert until(lambda: server.totals().left == 1)
    assert until(lambda: not there.run(has_pump, workers=[address])[address])
    assert say("collect", 0, 0.0, life=life) is None


def test_a_cluster_that_ends_after_a_run_has_nothing_to_complain_of(
    llm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"processes": False, "dashboard_address": "127.0.0.1:0", "set_as_default": False}
    with distributed.Client(**own) as client:
        settings = {"scheduler": client, "requests_on": "workers"}
        for _ in range(2):  # a worker that had nothing to do gets requests again
            assert feste.compute(chats(llm, 5), **settings)[0] == texts(5)
    assert [record.getMessage() for record in caplog.records if record.levelno > 20] == []


def test_a_client_that_dies_leaves_nothing(
    cluster: Any,
    there: Any,
    server: SimServer,
    llm: Any,
    until: Until,
    script: Callable[[str], list[str]],
) -> None:
    """A program that is killed: the server sees its requests close, and the workers forget it."""

    def names(dask_worker: Any) -> set[str]:
        return {name for name in dask_worker.handlers if name.startswith("feste-")}

    def all_names() -> set[str]:
        return set().union(*there.run(names).values())

    feste.compute(chats(llm, 4))  # so that this process has a pump, and its name is known
    server.reset()
    server.add(Fault(kind="hang", times=None))
    processes = {name.rpartition("-")[0] for name in all_names()}  # others of theirs may come
    assert processes
    program = subprocess.Popen(
        script(
            "import feste\n"
            "from feste.backend.openai import OpenAI\n"
            "from feste.scheduler.dask.requests import pump\n"
            "pump.Pump.__init__.__defaults__ = (None, 2.0)\n"
            f"llm = OpenAI('m', base_url='{server.url}/v1')\n"
            "feste.compute([llm.chat(f'{i}') for i in range(20)],\n"
            f"    scheduler='{cluster.scheduler_address}', requests_on='workers', worker_window=3)\n"
        ),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert until(lambda: server.totals().in_flight == 6)
        own = {name for name in all_names() if name.rpartition("-")[0] not in processes}
    finally:
        program.kill()
        program.wait()
    assert own
    assert until(lambda: server.totals().left == 6)
    assert until(lambda: not own & all_names())
    assert server.totals().requests == 6


# --- what runs may do -------------------------------------------------------------------------------


def test_a_stream_comes_in_pieces(there: Any, llm: Any, server: SimServer) -> None:
    """The pieces are those of the server, and together the value, which is kept."""
    node = llm.chat("REPLY: one two three four")

    pieces = list(feste.stream(node))

    assert len(pieces) > 2
    assert "".join(pieces) == node.compute() == "one two three four"
    assert server.requests()[0].body["stream"] is True
    assert len(server.ledger()) == 1


def test_who_leaves_a_stream_leaves_no_request_behind(
    there: Any, llm: Any, server: SimServer, until: Until
) -> None:
    """Pieces come while the answer is under way; then the server sees the connection close."""
    server.add(Fault(kind="drip", pause=0.1, times=None))

    for _ in feste.stream(llm.chat("REPLY: " + "word " * 400)):
        break

    assert until(lambda: server.totals().left == 1)


def test_a_run_that_is_cancelled_cancels_its_requests(
    there: Any, llm: Any, server: SimServer, until: Until
) -> None:
    """The server sees them close, wherever they were sent from; what waits is not sent."""
    server.add(Fault(kind="hang", times=None))

    async def cancelled() -> None:
        running = asyncio.ensure_future(feste.acompute(chats(llm, 30)))
        await asyncio.to_thread(until, lambda: server.totals().in_flight == 8)
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(cancelled())

    assert until(lambda: server.totals().left == 8)
    assert server.totals().requests == 8
    server.reset()
    assert feste.compute(chats(llm, 30))[0] == texts(30)


def test_a_deadline_ends_calls_on_workers(
    there: Any, llm: Any, server: SimServer, until: Until
) -> None:
    """What is under way is cancelled at the server; the others are kept."""
    server.add(Fault(kind="hang", match="long", times=None))
    nodes = [llm.chat("REPLY: short"), *(llm.chat(f"long {i}") for i in range(3))]

    short, *others = feste.compute(nodes, deadline=0.5, on_error="return")[0]

    assert short == "short"
    assert all(isinstance(error, CallTimeout) for error in others)
    assert until(lambda: server.totals().left == 3)
    assert server.totals().requests == 4


def test_errors_come_back_as_they_are(there: Any, llm: Any, server: SimServer) -> None:
    """A refusal fails its call alone; a fault that passes is tried again, as from here."""
    server.add(
        Fault(status=400, body={"error": {"message": "no such thing"}}, match="bad", times=None),
        Fault(status=503, times=2),
    )
    good, bad = feste.compute(llm.chat("REPLY: good"), llm.chat("bad"), on_error="return")

    assert good == "good"
    assert isinstance(bad, Rejected)
    assert bad.status == 400
    assert "test_requests_on_workers.py" in bad.origin
    with pytest.raises(RunFailed, match="no such thing"):
        feste.compute(llm.chat("bad"))


def test_a_backend_that_fails_passes_its_call_on(there: Any, llm: Any, server: SimServer) -> None:
    """The next backend of a chain is asked from a worker as well."""
    other = openai.OpenAI("other", base_url=f"{server.url}/v1")
    server.add(Fault(status=404, match='"m"', times=None))

    assert feste.compute(chats(llm.or_else(other), 5))[0] == texts(5)
    assert {r.model for r in report().requests if not r.error} == {"other"}


def test_tasks_on_workers_make_backends(there: Any, server: SimServer) -> None:
    """What a task returns may ask a backend that nobody knew; a literal key goes nowhere."""

    @feste.task(emits=True)
    def ask(url: str, key: Any) -> Any:
        from feste.backend.openai import OpenAI

        return [
            OpenAI(f"of a task {i}", base_url=url, api_key=key).chat(f"REPLY: {i}") for i in (1, 2)
        ]

    url = f"{server.url}/v1"
    assert feste.compute(ask(url, None)) == (["1", "2"],)
    assert {r.model for r in report().requests} == {"of a task 1", "of a task 2"}
    with pytest.raises(RunFailed, match="literal API key never leaves this process"):
        feste.compute(ask(url, "sk-canary"))
    assert len(server.ledger()) == 2


def test_keys_are_looked_up_where_they_are_used(
    there: Any, server: SimServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that workers lack, or that would have to be sent to them, is told before the first request."""

    class Keyed(Backend):
        plugin = "keyed"

        def __init__(self, key: Secret) -> None:
            self.key = key

        @property
        def secrets(self) -> tuple[Secret, ...]:
            return (self.key,)

        @operation
        async def ask(self) -> str:
            return self.key.reveal()

    def give_key(dask_worker: Any) -> None:
        import os

        os.environ["KEY_OF_THE_CLIENT"] = "sk-of-the-worker"

    monkeypatch.setenv("KEY_OF_THE_CLIENT", "sk-canary")
    named = Keyed(Secret("KEY_OF_THE_CLIENT"))
    with pytest.raises(MissingKey, match=r"on the Dask worker [01]: .*KEY_OF_THE_CLIENT"):
        feste.compute(named.ask())
    with pytest.raises(ConfigError, match="literal"):
        feste.compute(
            chats(openai.OpenAI("m", base_url=f"{server.url}/v1", api_key="sk-canary"), 3)
        )
    assert not server.totals().requests

    there.run(give_key)
    assert feste.compute(named.ask()) == ("sk-of-the-worker",)


def test_eager_calls_stay_here(there: Any, tmp_path: Path) -> None:
    """A call that is waited for at once gains nothing from a worker."""
    with context.set(eager=True):
        assert counting(tmp_path).ask("who") == f"who by {os.getpid()}"


def test_large_answers(there: Any) -> None:
    """Answers of some MB come whole, many at a time."""

    class Long(Backend):
        plugin = "long"

        @operation
        async def tell(self, letter: str) -> str:
            return letter * 3_000_000

    llm = Long()
    values = feste.compute([llm.tell(letter) for letter in "abcdefgh"])[0]
    assert values == [letter * 3_000_000 for letter in "abcdefgh"]


def test_what_cannot_be_pickled_is_told(there: Any) -> None:
    """An error that cannot travel keeps its kind, so that it is tried again; an answer is named."""
    tried: list[str] = []

    class Locked(ServerError):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} and {two}", status=503)
            self.lock = threading.Lock()

    class TwoArguments(ServerError):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} and {two}", status=503)

    class Odd(Backend):
        plugin = "odd-one"

        @operation
        async def fail(self, how: str) -> str:
            tried.append(how)
            if tried.count(how) < 2:
                raise (Locked if how == "locked" else TwoArguments)("one", "two")
            return f"{how} at last"

        def _prepare(self, what: str) -> Request:
            return Request(self.plugin, "ask", self.endpoint, {"what": what})

        async def _send(self, request: Request, on_chunk: Any = None) -> Response:
            what = request.body["what"]
            return Response({"said": threading.Lock() if what == "lock" else what})

        def _parse(self, response: Response, arguments: Any) -> Any:
            return response.payload["said"]

        ask = Operation(prepare=_prepare, send=_send, parse=_parse)

    llm = Odd()
    locked, two, answer, lock = feste.compute(
        llm.fail("locked"), llm.fail("two"), llm.ask("plain"), llm.ask("lock"), on_error="return"
    )
    assert (answer, type(lock)) == ("plain", Rejected)
    assert "the answer cannot be sent to the client" in str(lock)
    assert lock.billed == "yes"
    assert (locked, two) == ("locked at last", "two at last")
    assert {r.error for r in report().requests} >= {"ServerError"}


def test_a_backend_of_the_main_program(cluster: Any, script: Callable[[str], list[str]]) -> None:
    """A class that workers cannot import goes by value."""
    program = script(
        "import feste, os\n"
        "from feste.backend import Backend, operation\n"
        "class Mine(Backend):\n"
        "    plugin = 'mine'\n"
        "    def __init__(self, tail='!'):\n"
        "        self.tail = tail\n"
        "    @operation\n"
        "    async def ask(self, text: str) -> str:\n"
        "        return text + self.tail + str(os.getpid())\n"
        f"feste.context.set(scheduler='{cluster.scheduler_address}', requests_on='workers').__enter__()\n"
        "(text,) = feste.compute(Mine('?').ask('who'))\n"
        "assert text.startswith('who?') and text != f'who?{os.getpid()}', text\n"
        "print('well')\n"
    )
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_a_closed_executor_cancels_and_removes_its_pumps(
    there: Any, llm: Any, disconnect: Callable[[], None]
) -> None:
    """Nothing of a client stays on workers after it."""
    assert feste.compute(chats(llm, 3))[0] == texts(3)
    assert all(count >= 1 for count in there.run(pumps).values())

    disconnect()

    assert set(there.run(pumps).values()) == {0}
