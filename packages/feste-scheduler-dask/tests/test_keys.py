"""API keys stay where they are used: with requests on workers, on the workers alone."""

from __future__ import annotations

import ctypes
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import distributed
import pytest

import feste
from feste.backend import Backend, Secret, operation
from feste.errors import (
    AuthFailed,
    ConfigError,
    FesteWarning,
    InvalidRequest,
    MissingKey,
    Rejected,
    RunFailed,
)
from feste.testing import Fault, SimServer

pytest.importorskip("feste.backend.openai")
from feste.backend.openai import OpenAI

WIRE = "feste.backend.openai.testing:OpenAIWire"
#: No form by which it could be known for a key: only what nobody sends on is safe.
KEY = f"CANARY{uuid4().hex}"


class Cluster:
    """A scheduler here, and workers that are started by hand, each with an environment of its own."""

    def __init__(self, folder: Path, scheduler: Any) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._scheduler = self._stack.enter_context(scheduler)
        self.client = self._stack.enter_context(
            distributed.Client(self._scheduler, set_as_default=False)
        )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait(30)
        self._stack.close()

    @property
    def ports(self) -> list[int]:
        """Where the scheduler and the workers listen."""
        addresses = [self._scheduler.scheduler_address, *self.client.nthreads()]
        return [int(address.rpartition(":")[2]) for address in addresses]

    def add(self, *names: str, **environment: str) -> None:
        """Start workers, and wait until they are there."""
        for name in names:
            options = "--no-nanny --no-dashboard --nthreads 2 --memory-limit 1GB --host 127.0.0.1"
            program = [sys.executable, "-m", "distributed.cli.dask_worker"]
            with (self.folder / f"{name}.log").open("wb") as log:
                self.processes[name] = subprocess.Popen(
                    [*program, self._scheduler.scheduler_address, *options.split(), "--name", name]
                    + ["--local-directory", str(self.folder / name)],
                    stdout=log,
                    stderr=log,
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(sys.path),
                        "DASK_LOGGING__DISTRIBUTED": "debug",
                        "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "0.002",  # 2 MB
                        "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "False",
                        "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "False",
                        **environment,
                    },
                )
        self.client.wait_for_workers(len(self.processes), timeout=60)


@pytest.fixture
def cluster(tmp_path: Path, new_cluster: Callable[[int], Any]) -> Iterator[Cluster]:
    """A cluster without workers."""
    with Cluster(tmp_path, new_cluster(0)) as made:
        yield made


@pytest.fixture(scope="module")
def provider() -> Iterator[SimServer]:
    """A provider that takes no other key."""
    with SimServer(WIRE, wire_options={"require_key": KEY}) as server:
        yield server


@pytest.fixture
def server(provider: SimServer) -> SimServer:
    """The provider, as if it had just started."""
    provider.reset()
    return provider


def strict(server: SimServer, **options: Any) -> OpenAI:
    """A client that needs its key, as one of a provider elsewhere does; workers get its class."""

    class Strict(OpenAI):
        @property
        def secrets(self) -> tuple[Secret, ...]:
            return (self._secret,)

    return Strict("strict", base_url=f"{server.url}/v1", **options)


# --- what is on the wire ------------------------------------------------------------------------------


class Wire:
    """What goes over this machine's loopback, by connection; who has no right to listen is blind."""

    blind = ""

    def __enter__(self) -> Wire:
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
            self.watch()
            self._socket.bind(("lo", 0))
        except (AttributeError, OSError) as error:
            self.blind = f"the traffic on loopback cannot be seen: {error}"
            return self
        force = getattr(socket, "SO_RCVBUFFORCE", 33)
        self._socket.setsockopt(socket.SOL_SOCKET, force, 2**26)
        self._socket.settimeout(0.1)
        self._pieces: dict[tuple[int, int], dict[int, bytes]] = defaultdict(dict)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.blind:
            self._done.set()
            self._thread.join()
            self._socket.close()

    def watch(self, *ports: int) -> None:
        """Take what comes from or goes to these ports, by a filter of the kernel's."""
        if self.blind:
            return
        code = [(0xB1, 0, 0, 0)]  # the length of the IP header
        for place in (0, 2):
            code.append((0x48, 0, 0, place))  # source port, target port
            code += [(0x15, 0, 1, port, (0x06, 0, 0, 2**18)) for port in ports]
        steps = [step for each in code for step in (each[:4], *each[4:])] + [(0x06, 0, 0, 0)]
        program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *s) for s in steps))
        fields = struct.pack("HL", len(steps), ctypes.addressof(program))
        self._socket.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_ATTACH_FILTER", 26), fields)

    def _listen(self) -> None:
        while True:
            try:
                packet, address = self._socket.recvfrom(2**17)
            except TimeoutError:
                if self._done.is_set():
                    return
                continue
            if address[2] == socket.PACKET_HOST and packet[9] == socket.IPPROTO_TCP:
                data = packet[(packet[0] & 15) * 4 :]
                source, target, number = struct.unpack("!HHI", data[:8])
                if payload := data[(data[12] >> 4) * 4 :]:
                    self._pieces[source, target][number] = payload

    def streams(self) -> dict[tuple[int, int], bytes]:
        """What went from one port to another, in order."""
        return {
            ports: b"".join(data for _, data in sorted(pieces.items()))
            for ports, pieces in list(self._pieces.items())
        }


def test_the_key_stays_on_the_workers(
    cluster: Cluster, server: SimServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key in the environment of workers goes to the provider, and nowhere else, whatever fails."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    @feste.task
    def long(text: str) -> str:
        return text * 100_000

    @feste.task(executor="inline")
    def short(text: str) -> str:
        return text[:10]

    @feste.task(executor="inline")
    def files(*_: Any) -> list[bytes]:  # while the results are held
        return [path.read_bytes() for path in cluster.folder.rglob("storage/*")]

    class Locked(Exception):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.lock = threading.Lock()

    class Clumsy(Backend):
        secrets = (Secret("OPENAI_API_KEY"),)

        @operation
        async def break_down(self, text: str) -> str:
            raise Locked(f"{text} {os.environ['OPENAI_API_KEY']}")

        @operation
        async def refuse(self, text: str) -> str:
            error = InvalidRequest(f"{text} was refused")
            error.lock = threading.Lock()  # type: ignore[attr-defined]
            raise error

    def forget() -> None:
        del os.environ["OPENAI_API_KEY"]

    llm = OpenAI("m", base_url=f"{server.url}/v1")
    with Wire() as wire:
        wire.watch(server._port, *cluster.ports)
        cluster.add("one", "two", OPENAI_API_KEY=KEY)
        wire.watch(server._port, *cluster.ports)
        texts = [long(llm.chat(f"question {i}")) for i in range(20)]
        nodes = [llm.chat(short(text)) for text in texts]
        options: dict[str, Any] = {"scheduler": cluster.client, "requests_on": "workers"}
        spilled, *answers = feste.compute(files(*texts), *nodes, **options)
        report = feste.last_report()
        assert report is not None
        echo = {"error": {"message": f"wrong key {KEY}, Bearer {KEY}", "code": KEY}}
        server.add(
            Fault(status=401, body=echo, headers={"x-request-id": KEY}, times=2, match="echo")
        )
        failed = feste.compute(
            llm.chat("echo"),
            Clumsy().break_down("broken"),
            Clumsy().refuse("this"),
            on_error="return",
            **options,
        )
        monkeypatch.setenv("OPENAI_API_KEY", "another")  # so that its absence there is noticed
        cluster.client.run(forget)
        with pytest.raises(MissingKey) as missing:
            strict(server).chat("x").compute(**options)
        logs = [cluster.client.get_worker_logs(), cluster.client.get_scheduler_logs()]
        events = cluster.client.get_events()

    assert len(answers) == 20
    assert [type(error) for error in failed] == [AuthFailed, Rejected, InvalidRequest]
    told = [*failed, missing.value]
    shown = ["".join(traceback.format_exception(e)) + repr(vars(e)) for e in told]
    kept = [*spilled, *(p.read_bytes() for p in cluster.folder.rglob("*") if p.is_file())]
    assert spilled and any(b"distributed.worker - INFO" in data for data in kept)
    for data in (answers, report, report.requests, told, shown, logs, events):
        assert KEY.encode() not in pickle.dumps(data)
        assert KEY not in repr(data)
    assert not any(KEY.encode() in data for data in kept)
    if wire.blind:
        pytest.skip(f"all but this was seen: {wire.blind}")
    inside = {p: data for p, data in wire.streams().items() if server._port not in p}
    outside = [data for p, data in wire.streams().items() if server._port in p]
    assert any(KEY.encode() in data for data in outside)  # so it would be seen elsewhere, too
    assert any(b"question 7" in data for data in inside.values())
    assert not [p for p, data in inside.items() if KEY.encode() in data]


# --- what is checked before anything is sent ------------------------------------------------------------


def senders() -> set[str]:
    """The workers that sent the requests of the last run."""
    report = feste.last_report()
    assert report is not None
    return {request.worker for request in report.requests}


def test_workers_have_all_keys_before_anything_is_sent(
    cluster: Cluster,
    server: SimServer,
    monkeypatch: pytest.MonkeyPatch,
    until: Callable[..., bool],
) -> None:
    """One worker without the key stops the run, whatever the client has, until it is prepared."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    cluster.add("good", OPENAI_API_KEY=KEY)
    cluster.add("bad", OPENAI_API_KEY="")
    (cluster.folder / "key").write_text(KEY + "\n")
    place = str(cluster.folder / "key")
    options: dict[str, Any] = {"scheduler": cluster.client, "requests_on": "workers"}

    def read_key() -> None:
        os.environ["OPENAI_API_KEY"] = Path(place).read_text().strip()

    class Unsendable(Backend):
        def __init__(self, lock: Any) -> None:
            self.lock = lock

        @operation
        async def ask(self, text: str) -> str:
            return text

    with pytest.raises(MissingKey, match=r"worker bad: .* OPENAI_API_KEY is not set there"):
        feste.compute([strict(server).chat(f"{i}") for i in range(9)], **options)
    with pytest.raises(ConfigError, match=r"literal API key.*api_key=Secret\('MY_KEY'\)"):
        strict(server, api_key=KEY).chat("x").compute(**options)
    with pytest.raises(ConfigError, match=r"Unsendable to the workers.*cannot pickle"):
        Unsendable(threading.Lock()).ask("x").compute(**options)

    assert not server.requests()
    calls = [strict(server).chat(f"{i}") for i in range(9)]
    assert len(feste.compute(*calls, prepare_worker=read_key, **options)) == 9
    assert senders() == {"good", "bad"}

    def is_used() -> bool:
        calls = [strict(server).chat("once more") for _ in range(9)]
        return (
            bool(feste.compute(*calls, prepare_worker=read_key, **options)) and len(senders()) == 3
        )

    cluster.add("later", OPENAI_API_KEY="")
    assert until(is_used)  # it is prepared before it is asked for its keys


def test_the_first_worker_of_a_run_is_asked_for_its_keys_as_well(
    cluster: Cluster, server: SimServer
) -> None:
    """A run may begin before there is a worker: none sends a request that lacks the key."""

    @feste.task(executor="inline")
    def grow(text: str) -> str:
        cluster.add("first", OPENAI_API_KEY="")
        return text

    with (
        pytest.warns(FesteWarning, match=r"no workers yet|OPENAI_API_KEY is not set"),
        pytest.raises(RunFailed, match=r"worker first: .* OPENAI_API_KEY is not set"),
    ):
        feste.compute(
            strict(server).chat(grow("Hi")), scheduler=cluster.client, requests_on="workers"
        )
    assert not server.ledger()


def test_a_worker_that_comes_later_without_the_key_is_left_out(
    cluster: Cluster, server: SimServer, until: Callable[..., bool]
) -> None:
    """It gets no requests, and a warning tells it; alone it stops a run, until it has the key."""
    cluster.add("early", OPENAI_API_KEY=KEY)
    options: dict[str, Any] = {"scheduler": cluster.client, "requests_on": "workers"}
    llm = strict(server)

    def give() -> None:
        os.environ["OPENAI_API_KEY"] = key

    with pytest.warns(FesteWarning, match=r"worker late: .* OPENAI_API_KEY is not set") as told:

        @feste.task(executor="inline")
        def grow(text: str) -> str:
            cluster.add("late", OPENAI_API_KEY="")
            assert until(lambda: len(told))
            return text

        first = grow(llm.chat("first"))
        answers = feste.compute([llm.chat(first + str(i)) for i in range(20)], **options)
    assert len(answers[0]) == 20
    assert senders() == {"early"}
    assert feste.compute([llm.chat(f"again {i}") for i in range(20)], **options)
    assert senders() == {"early"}
    cluster.processes["early"].kill()
    with pytest.raises((MissingKey, RunFailed), match=r"worker late: .* OPENAI_API_KEY is not set"):
        llm.chat("and now?").compute(**options)
    key = KEY
    cluster.client.run(give)
    assert llm.chat("once more").compute(**options)
    assert senders() == {"late"}
