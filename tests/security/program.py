"""A user's program that calls two providers in every way, and keeps what it leaves, a folder for each kind.

    python program.py '{"url": ..., "left": ..., "part": "local"}'

The key is in the environment, and no variable of this program has it: what shows it is Feste's.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import json
import logging
import os
import signal
import sqlite3
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from left import Left
from pydantic import BaseModel, field_validator

import feste
from feste import cli, context
from feste.backend import Secret
from feste.backend.clients import close_clients
from feste.backend.cohere import Cohere
from feste.backend.openai import OpenAI
from feste.errors import FesteError
from feste.graph import FesteGraph
from feste.plugins import registry

LOGGERS = "feste openai cohere httpx httpcore httpx2 aiohttp asyncio distributed dask".split()


class Ear:
    """An observer that keeps all events."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    @feste.hookimpl
    def feste_run_started(self, event: Any) -> None:
        self.heard.append(event)

    @feste.hookimpl
    def feste_node_finished(self, event: Any) -> None:
        self.heard.append(event)

    @feste.hookimpl
    def feste_request_started(self, event: Any) -> None:
        self.heard.append(event)

    @feste.hookimpl
    def feste_request_finished(self, event: Any) -> None:
        self.heard.append(event)

    @feste.hookimpl
    def feste_gate_closed(self, event: Any) -> None:
        self.heard.append(event)

    @feste.hookimpl
    def feste_run_finished(self, event: Any) -> None:
        self.heard.append(event)


class Strict(BaseModel):
    """A user's model that refuses every answer."""

    text: str

    @field_validator("text")
    @classmethod
    def refuse(cls, value: str) -> str:
        raise ValueError("refused by the program")


@feste.task
def breaks(text: Any) -> str:
    raise LookupError("broken by the program")


@feste.task(executor="process")
def far(text: Any) -> str:
    return f"{os.getpid()} {text}"


def clients(url: str, **more: Any) -> list[Any]:
    """Four clients: two providers, the key by name and as a literal."""
    return [
        OpenAI("m", base_url=f"{url}/v1", **more),
        OpenAI("m", base_url=f"{url}/v1", api_key=os.environ["OPENAI_API_KEY"], **more),
        Cohere("m", base_url=url, api_key=Secret("CO_API_KEY"), **more),
        Cohere("m", base_url=url, api_key=os.environ["CO_API_KEY"], **more),
    ]


def refused_calls(left: Left, todo: dict[str, Any]) -> None:
    """Everything that a provider can do wrong, to requests of runs and to single ones."""
    for i, make in enumerate((OpenAI, Cohere)):
        base = f"{todo['url']}/v1" if make is OpenAI else todo["url"]
        made: dict[str, Any] = {}
        for number, name in enumerate(todo["faults"]):  # every other one has the key as a literal
            key = os.environ["CO_API_KEY"] if number % 2 else None
            made[name] = make(f"{name}-{i}", base_url=base, timeout=0.5, api_key=key)
        left.returned(asyncio.run(_alone(made)))
        llm = made.pop("unauthorized")
        with left.fails(), context.set(max_failures=1):
            feste.compute(*(llm.chat(f"fault unauthorized: {i} {k}") for k in range(3)))
        names = list(made)
        for start in range(0, len(names), 4):  # a success between them: it is no outage
            nodes = []
            for name in names[start : start + 4]:
                call = made[name].embed if name == "wrong_count" else made[name].chat
                nodes += [
                    call(f"fault {name}: {i} {k}") for k in range(1 + (name == "wrong_count"))
                ]
            left.returned(feste.compute(*nodes, on_error="return"))
            with left.fails():
                feste.compute(nodes[0], made[names[start]].chat(f"well {start}"))
        for name in ("redirect", "encoded"):
            with left.fails(), context.set(eager=True):
                made[name].chat(f"fault {name}: {i} eagerly")
            with left.fails():
                "".join(feste.stream(made[name].chat(f"fault {name}: {i} streamed")))
        with left.fails(), context.set(deadline=0.2):
            made["hang"].chat(f"fault hang: {i} too late").compute()


async def _alone(made: dict[str, Any]) -> list[Any]:
    """Send a request to each of some clients, as nobody does who retries."""
    try:
        return await asyncio.gather(
            *(
                llm.chat.send(llm.chat.prepare([f"fault {name}: x", _params(llm), None]), None)
                for name, llm in made.items()
            ),
            return_exceptions=True,
        )
    finally:
        await close_clients(asyncio.get_running_loop())


def failures(left: Left, todo: dict[str, Any]) -> None:
    """Everything that a user, a setting or the network can break."""
    one, *_ = clients(todo["url"])
    with left.fails():
        feste.compute(*(one.embed(f"too dear {i}") for i in range(9)), budget="4 tokens")
    with left.fails():
        feste.compute(breaks(one.chat("for a task")), far(breaks(1)))
    with left.fails():
        one.chat("for a model", output=Strict).compute()
    with left.fails():
        one.chat("nothing kept").compute(cache_mode="replay-only")
    with left.fails():
        one.chat("nothing kept").compute(cache=str(left.folder / "no.db"), cache_mode="replay-only")
    for closed in clients("http://127.0.0.1:9"):
        left.returned(asyncio.run(_alone({"closed": closed})))
    nodes = [closed.chat(f"closed {i}") for i in range(12)]
    left.returned(feste.compute(*nodes, outage_patience=0.1, on_error="return"))
    with left.fails():
        OpenAI("m", api_key=os.environ["OPENAI_API_KEY"], timeout=-1)
    with left.fails():
        Cohere("m", api_key=os.environ["CO_API_KEY"], timeout=-1)
    with left.fails():
        feste.backend.create("openai", api_key=os.environ["CO_API_KEY"], timeout=-1)
    with left.fails():
        OpenAI("m", api_key=os.environb[b"OPENAI_API_KEY"])  # type: ignore[arg-type]
    with left.fails():
        Secret(os.environ["OPENAI_API_KEY"])
    with left.fails():
        OpenAI("m", base_url="https://127.0.0.2.example", api_key=Secret("NOT_SET")).chat(
            "x"
        ).compute()
    with left.fails():
        OpenAI("m", api_key=os.environ["OPENAI_API_KEY"] + "\n", base_url=f"{todo['url']}/v1").key()


def ways(left: Left, todo: dict[str, Any], ear: Ear, store: str, cache: str) -> None:
    """Every way to run calls that succeed, and every object that takes part."""
    made = clients(todo["url"])
    with context.set(store=store, cache=cache):
        nodes = [llm.chat(f"hello {i}") for i, llm in enumerate(made)]
        nodes += [llm.embed(f"text {i}") for i, llm in enumerate(made)]
        whole = [far(node) for node in nodes[:2]]
        plan = feste.explain(nodes, whole)
        feste.compute(nodes, whole, progress=True)
        report = feste.last_report()
        assert report is not None
        list(feste.map(made[0].chat, ["one", "two"]))
        list(feste.as_completed([llm.chat("as it comes") for llm in made]))
        for llm in made:
            assert "".join(feste.stream(llm.chat("piece by piece")))
        with context.set(eager=True):
            assert made[1].chat("at once")
        for end in ("", "-wal", "-shm", ".lock", ".reserve"):
            left.add(f"store{end}", Path(store + end).read_bytes())
        left.add("cache", Path(cache).read_bytes(), Path(cache + "-wal").read_bytes())
    for i, llm in enumerate(made):
        left.object("client", llm, travels=i % 2 == 0)
        call = llm.chat
        request = call.prepare(["alone", _params(llm), None])
        left.object("request", request)
        left.object("response", asyncio.run(_sent(call, request)))
        left.object("operation", call, travels=i % 2 == 0)
    left.object("secret", Secret.of(os.environ["CO_API_KEY"], "X"), travels=False)
    left.object("node", nodes[0])
    left.object("literal node", nodes[1], travels=False)
    graph = FesteGraph.collect(nodes[0], nodes[2])[0]
    left.object("graph", graph)
    left.add("graph: picture", graph.visualize(), nodes[1].visualize())
    left.object("report", report)
    left.add("report: timeline", report.timeline())
    left.add(
        "explanation", str(plan), plan._repr_html_(), json.dumps(plan.to_json()), plan.to_mermaid()
    )
    saved = left.folder / "saved"
    saved.mkdir()
    for end in (".txt", ".json", ".html", ".mmd"):
        plan.save(saved / f"plan{end}")
    report.save(saved / "report.json")
    left.add("event: repr", repr(ear.heard))
    for event in {type(event): event for event in ear.heard}.values():
        left.object("event", event)
    assert {type(event).__name__ for event in ear.heard} >= {"RequestFinished", "NodeFinished"}


async def _sent(call: Any, request: Any) -> Any:
    try:
        return await call.send(request, None)
    finally:
        await close_clients(asyncio.get_running_loop())


def _params(llm: Any) -> Any:
    from feste.backend.cohere import ChatParams as OfCohere
    from feste.backend.openai import ChatParams

    return ChatParams() if isinstance(llm, OpenAI) else OfCohere()


def commands(left: Left, store: str) -> None:
    """What ``feste`` tells of a store, whole and damaged."""
    feste.store.close()
    with contextlib.closing(sqlite3.connect(store)) as file, file:
        file.execute("UPDATE answers SET kept = 0 WHERE id = 1")
    with context.set(store=store):
        feste.compute(OpenAI("m", base_url="http://127.0.0.1:9/v1").chat("x"), on_error="return",
                      outage_patience=0.1, deadline=0.3)  # fmt: skip
    feste.store.close()
    exported = left.folder / "export"
    exported.mkdir()
    for line in (
        f"store list {store}", f"store show {store} --json", f"store show {store}", "plugins --json",
        f"store export {store} --out -", f"store export {store} --out {exported}/a.jsonl",
        f"store export {store} --out {exported}/a.parquet", f"store verify {store} --json",
        f"store purge {store} --before 1d --dry-run", f"store salvage {store}",
    ):  # fmt: skip
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            with contextlib.suppress(SystemExit):
                cli.main(line.split())
            out.flush()
        left.add("commands", out.buffer.getvalue())  # type: ignore[attr-defined]
    import pyarrow.parquet

    left.add("parquet", repr(pyarrow.parquet.read_table(exported / "a.parquet").to_pylist()))


def local(left: Left, todo: dict[str, Any]) -> None:
    store, cache = str(left.folder / "runs" / "runs.db"), str(left.folder / "runs" / "cache.db")
    Path(store).parent.mkdir()
    ear = Ear()
    registry().manager.register(ear)
    with context.set(store=store, cache=cache):
        refused_calls(left, todo)
        failures(left, todo)
    ways(left, todo, ear, store, cache)
    commands(left, store)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            left.add("command lines", process.cmdline())
    print("classes", *sorted(left.classes))


def crash(left: Left, todo: dict[str, Any]) -> None:
    """Show an error that nobody catches, and end in the middle of requests, as by ``kill -9``."""
    context.set(store=str(left.folder / "crashed.db"))
    one, literal, *_ = clients(todo["url"])
    try:
        feste.compute(literal.chat("fault unauthorized:"), literal.chat("before"), one.chat("x"))
    except FesteError as error:
        sys.excepthook(type(error), error, error.__traceback__)

    @feste.task(executor="inline")
    def die(text: str) -> None:
        with (left.folder / "faulthandler").open("wb") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        os.kill(os.getpid(), signal.SIGKILL)

    feste.compute(one.chat("fault hang:"), literal.chat("fault hang:"), die(one.chat("and now")))


def on_dask(left: Left, todo: dict[str, Any]) -> None:
    """Requests from here and from workers, whose data is spilled, and whose tasks break."""
    import distributed

    @feste.task
    def long(text: str) -> str:
        return text * 50_000  # a worker spills from 2 MB on

    @feste.task(executor="inline")
    def look(*_: Any) -> None:
        for path in (left.folder / "dask").rglob("*"):
            left.add("names of files", path)
            if path.is_file():
                kind = "spilled" if "storage" in path.parts else "files of workers"
                left.add(kind, path.read_bytes())

    with distributed.LocalCluster(
        n_workers=todo["workers"], threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0",
        local_directory=str(left.folder / "dask"), memory_limit="1GB", silence_logs=False,
        scheduler_kwargs={"dashboard": False},
    ) as cluster, distributed.Client(cluster, set_as_default=False) as client:  # fmt: skip
        one, _, two, literal = clients(todo["url"])
        for place in ("client", "workers"):
            options: dict[str, Any] = {"scheduler": client, "requests_on": place}
            texts = [long(llm.chat(f"{place} {i}")) for i in range(6) for llm in (one, two)]
            feste.compute(look(*texts), **options)
            report = feste.last_report()
            assert report is not None
            assert all(bool(sent.worker) == (place == "workers") for sent in report.requests)
            left.add("report on Dask", repr(report), json.dumps(report.to_json()))
            for wrong in (
                one.chat("fault unauthorized:"),
                two.chat("fault garbage:"),
                breaks(one.chat("b")),
            ):
                with left.fails():
                    wrong.compute(**options)
        with left.fails():
            literal.chat("literal").compute(**options)
        left.add("worker logs", client.get_worker_logs(), client.get_worker_logs(nanny=True))
        left.add("scheduler logs", client.get_scheduler_logs(), client.get_events())
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                left.add("command lines of workers", process.cmdline())
    print("classes", *sorted(left.classes))


PARTS: dict[str, Callable[[Left, dict[str, Any]], None]] = {
    "local": local, "crash": crash, "dask": on_dask,
}  # fmt: skip


def main() -> None:
    todo = json.loads(sys.argv[1])
    left = Left(Path(todo["left"]))
    logs = left.folder / "logs"
    logs.mkdir(parents=True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(logging.FileHandler(logs / name))
    warnings.simplefilter("always")
    faulthandler.enable()
    PARTS[todo["part"]](left, todo)


if __name__ == "__main__":
    main()
