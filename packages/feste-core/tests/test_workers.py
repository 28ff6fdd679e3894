"""Workers: events, reports, timelines and the progress line say who did what, if an executor names it."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import logging
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import feste
from feste.backend import Backend, Call, OnChunk, Request, operation
from feste.errors import CallError, InvalidRequest, RateLimited, RunFailed
from feste.events import NodeFinished, RequestFinished
from feste.plugins import registry
from feste.report import RunReport, Span, WorkerRow, draw_timeline
from feste.report.headway import Course, Headway
from feste.scheduler import LocalExecutor, PyTask, Reporter, describe, result_of
from feste.scheduler.request_log import RequestLog
from feste.scheduler.work import run_task
from feste.testing import FakeBackend, VirtualClock

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<b>&\x1b[2J\u202e"
NAMES = ("worker-10", "worker-9", HOSTILE)


class Crew(LocalExecutor):
    """Runs tasks and sends requests on workers, one after the other: threads with names."""

    chunking = False
    over = False
    is_closed = False

    def start(self, report: Reporter) -> None:
        super().start(report)
        self.told = report
        self.pools = {name: ThreadPoolExecutor(1) for name in NAMES}
        self.turns = itertools.cycle(NAMES)
        #: The worker of each task by key, and of each request by number.
        self.ran: dict[str, str] = {}
        self.sends: dict[int, str] = {}

    @property
    def stale(self) -> bool:
        return self.over

    def place(self, task: Any) -> str:
        return "worker" if task.kind == "task" else super().place(task)

    def capacity(self, where: str) -> int:
        return len(NAMES) if where == "worker" else super().capacity(where)

    def call(self, where: str, chunk: list[PyTask]) -> None:
        if where != "worker":
            super().call(where, chunk)
            return
        worker = next(self.turns)
        self.pools[worker].submit(self._run, worker, chunk)

    def _run(self, worker: str, chunk: list[PyTask]) -> None:
        (task,) = chunk
        self.ran[task.key] = worker
        begun, ok = perf_counter(), True
        try:
            value = result_of(run_task(task))
        except BaseException as error:
            ok, value = False, describe(error)
        self.told.done(task, ok, value, perf_counter() - begun, worker)
        self.told.free("worker", chunk)

    def send(
        self, handle: int, call: Call[Any], request: Request, on_chunk: OnChunk | None = None
    ) -> None:
        worker = self.sends[handle] = next(self.turns)
        self.pools[worker].submit(self._answer, worker, handle, call, request)

    def _answer(self, worker: str, handle: int, call: Call[Any], request: Request) -> None:
        begun, ok = perf_counter(), True
        value: Any = None
        try:
            value = asyncio.run(call.send(request, None))
        except CallError as error:
            ok, value = False, error
        self.told.sent(handle, ok, value, perf_counter() - begun, worker)

    def close(self) -> None:
        for pool in self.pools.values():
            pool.shutdown()
        super().close()
        self.is_closed = True


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew()
    yield made
    made.over = True  # the next run closes it


def test_stale_hands_are_closed_when_no_run_needs_them(crew: Crew) -> None:
    """What became stale during a run ends it, and is closed when the next one begins."""
    begun, go_on = threading.Event(), threading.Event()

    @feste.task
    def wait() -> bool:
        begun.set()
        return go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(wait().compute, scheduler=crew)
        assert begun.wait(60)
        crew.over = True
        feste.compute(feste.task(abs)(-1))
        assert not crew.is_closed
        go_on.set()
        assert running.result(60)
    feste.compute(feste.task(abs)(-1))
    assert crew.is_closed


class Ear:
    """Hears of nodes and requests."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeFinished] = {}
        self.requests: list[RequestFinished] = []

    @feste.hookimpl
    def feste_node_finished(self, event: Any) -> None:
        self.nodes[event.key] = event

    @feste.hookimpl
    def feste_request_finished(self, event: Any) -> None:
        self.requests.append(event)


@pytest.fixture
def ear() -> Iterator[Ear]:
    made = Ear()
    registry().manager.register(made, name="an ear")
    yield made
    registry().manager.unregister(made)


@feste.task
def increment(x: int) -> int:
    return x + 1


@feste.task
def work(x: int) -> int:
    """Takes long enough to be drawn."""
    until = perf_counter() + 0.003
    while perf_counter() < until:
        pass
    return x


def report_of(*args: Any, **given: Any) -> RunReport:
    feste.compute(*args, **given)
    report = feste.last_report()
    assert report is not None
    return report


# --- events --------------------------------------------------------------------------------------


def test_a_node_and_a_request_name_their_worker(crew: Crew, ear: Ear) -> None:
    """A task the one that ran it, a call the one that sent its request, a prompt none."""
    llm = FakeBackend("workers-named")
    calls = [llm.chat(feste.prompt.Prompt("Say {{ n }}.")(n=increment(n))) for n in range(6)]
    report = report_of(calls, scheduler=crew)

    kinds = {key: event.kind for key, event in ear.nodes.items()}
    assert Counter(kinds.values()) == {"task": 6, "prompt": 6, "call": 6}
    for key, event in ear.nodes.items():
        if event.kind != "call":
            assert event.worker == crew.ran.get(key, "")
    assert {event.number: event.worker for event in ear.requests} == crew.sends
    assert Counter(ear.nodes[call.key].worker for call in calls) == Counter(crew.sends.values())
    assert ear.requests == report.requests
    assert ear.requests[0].to_json()["worker"] in NAMES


class Moody(Backend):
    """Ends each request as it was told."""

    plugin = "moody"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    @operation
    async def say(self, prompt: str) -> str:
        answer = self.answers.pop(0)
        if isinstance(answer, CallError):
            raise answer
        return str(answer)


def test_the_last_worker_of_a_call_that_was_sent_again(crew: Crew, ear: Ear) -> None:
    """Each request has its own; the node the one of its last."""
    call = Moody(RateLimited("later", retry_after=0.001), InvalidRequest("no")).say("hello")
    feste.compute(call, scheduler=crew, on_error="return")

    first, last = ear.requests
    assert (first.error, last.error) == ("RateLimited", "InvalidRequest")
    assert [first.worker, last.worker] == list(crew.sends.values()) == [*NAMES[:2]]
    assert ear.nodes[call.key].worker == last.worker


def test_what_was_there_already_was_no_workers_work(crew: Crew, ear: Ear) -> None:
    """A kept value and a skipped node name no worker, and nor does anything that ran here."""
    kept, fails = FakeBackend("workers-kept").chat("x"), increment("one")  # type: ignore[arg-type]
    skipped = increment(fails)
    feste.compute(kept, scheduler=crew)
    assert ear.nodes[kept.key].worker in NAMES
    feste.compute(kept, skipped, scheduler=crew, on_error="return", optimize={"fuse": False})

    told = {key: (event.state, event.worker) for key, event in ear.nodes.items()}
    assert told[kept.key] == ("kept", "") and told[skipped.key] == ("skipped", "")
    assert told[fails.key] == ("failed", crew.ran[fails.key])
    here = report_of([increment(n) for n in range(9)], FakeBackend("here").chat("x"))
    assert here.workers == [] and here.to_json()["workers"] == []
    assert "worker" not in str(here)
    assert not any(event.worker for event in [ear.requests[-1], here.requests[0]])


def test_the_steps_of_a_chain_that_fails_were_on_its_worker(crew: Crew, ear: Ear) -> None:
    """Fused tasks are one piece of work; what was done of it, and what failed, name its worker."""
    done = increment("".__len__())
    fails = feste.task(str.upper)(done)  # type: ignore[arg-type]
    never = increment(fails)  # type: ignore[arg-type]
    with pytest.raises(RunFailed) as caught:
        feste.compute(never, scheduler=crew)

    told = [
        (ear.nodes[node.key].state, ear.nodes[node.key].worker) for node in (done, fails, never)
    ]
    assert told == [("done", NAMES[0]), ("failed", NAMES[0]), ("skipped", "")]
    assert [(row.worker, row.tasks) for row in caught.value.report.workers] == [(NAMES[0], 1)]


def test_a_log_keeps_the_workers_of_requests() -> None:
    """Packed or not, a request has its worker; so has its line in a log, with nothing to obey."""
    log = RequestLog("run-1")
    made = [
        RequestFinished("run-1", 2.0, "fake", "chat", "m", 1, 1, 0.5, 1.0, worker=worker)
        for worker in ("", *NAMES, "")
    ]
    for request in made:
        log.append(request)

    assert list(log) == list(log.copy()) == made
    assert log[-2].worker == HOSTILE


def test_lines_of_requests_name_workers(crew: Crew) -> None:
    """The name stands behind the model, printable; of this process there is nothing to say."""
    logger, text = logging.getLogger("feste"), io.StringIO()
    handler = logging.StreamHandler(text)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        feste.compute([FakeBackend("m").chat(f"{n}") for n in range(3)], scheduler=crew)
        feste.compute(FakeBackend("n").chat("here"))
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)

    lines = [line for line in text.getvalue().splitlines() if " request " in line]
    shown = {"fake.chat m on worker-10:", "fake.chat m on worker-9:", "fake.chat n:"}
    shown.add("fake.chat m on <b>&\\x1b[2J\\u202e:")
    assert {line.partition(" of ")[2].partition(" 1 call")[0] for line in lines} == shown


# --- reports -------------------------------------------------------------------------------------


def test_rows_of_workers_add_up(crew: Crew) -> None:
    """Each task and request stands in one row; their times are those of the run; all goes into JSON."""
    llm = FakeBackend("workers-rows")
    report = report_of(
        [llm.chat(f"{n}") for n in range(7)], [work(n) for n in range(5)], scheduler=crew
    )

    rows = {row.worker: row for row in report.workers}
    assert Counter({name: row.tasks for name, row in rows.items()}) == Counter(crew.ran.values())
    assert Counter({name: row.requests for name, row in rows.items()}) == Counter(
        crew.sends.values()
    )
    assert sum(row.in_flight for row in rows.values()) == pytest.approx(
        report.operations[0].seconds
    )
    assert sum(row.busy for row in rows.values()) == pytest.approx(report.tasks["work"])
    load = [row.busy + row.in_flight for row in report.workers]
    assert load == sorted(load, reverse=True)
    told = json.loads(json.dumps(report.to_json()))
    assert RunReport.from_json(told) == report
    assert {request["worker"] for request in told["requests"]} <= set(NAMES)
    del told["workers"]
    assert RunReport.from_json(told).workers == []  # as it was written before there were workers


def test_a_report_shows_what_each_worker_did(crew: Crew) -> None:
    """A table in text and HTML, whose columns say something, with names that are text and no more."""
    report = report_of([work(n) for n in range(12)], scheduler=crew)
    text, page = str(report), report._repr_html_()

    (heading,) = (line for line in text.splitlines() if line.split()[:1] == ["worker"])
    assert heading.split() == ["worker", "tasks", "busy", "s"]  # no requests, nothing in flight
    assert re.search(r"^  worker-10 +4 +0\.\d\d$", text, re.MULTILINE)
    assert re.search(r"^  <b>&\\x1b\[2J\\u202e +4 +0\.\d\d$", text, re.MULTILINE)
    assert "<th>worker</th><th>tasks</th><th>busy s</th></tr>" in page
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page
    assert not any(mark in text + page.partition("<svg")[0] for mark in "\x1b\u202e")
    ElementTree.fromstring(report.timeline())


def test_of_many_workers_the_busiest_are_named() -> None:
    """The others are one row, so that nothing is lost and the text stays on a screen."""
    rows = [WorkerRow(f"w{n}", n, float(n), 2 * n, 3.0 * n) for n in range(99, -1, -1)]
    lines = str(RunReport("run-0", 9.0, 10, {"done": 10}, workers=rows)).splitlines()
    cells = [line.split() for line in lines[lines.index("") + 2 :]]

    assert [row[0] for row in cells[:10]] == [f"w{n}" for n in range(99, 89, -1)]
    others = sum(range(90))
    expected = [f"{others:,}", f"{others:,}.00", f"{2 * others:,}", f"{3 * others:,}.00"]
    assert cells[10:] == [["90", "others", *expected]]
    eleven = str(RunReport("run-0", 9.0, 10, {"done": 10}, workers=rows[:11]))
    assert "w89" in eleven and "other" not in eleven


def test_a_long_map_adds_workers_up(crew: Crew) -> None:
    """Its runs follow each other; its report has one row a worker, over all of them."""
    results = feste.map(increment, range(600), window=4, scheduler=crew)
    assert list(results) == list(range(1, 601))
    report = feste.last_report()

    assert report is not None and sum(row.tasks for row in report.workers) == 600
    assert {row.worker for row in report.workers} == set(NAMES)


# --- pictures ------------------------------------------------------------------------------------


def lanes(svg: str) -> list[tuple[list[str], ElementTree.Element]]:
    """The words and the group of each lane, from top to bottom."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    found = [g for g in groups if "lane" in g.get("class", "") and g.find(f"{SVG}text") is not None]
    found = [g for g in found if g.find(f"{SVG}title") is not None]
    return [([text.text or "" for text in g.findall(f"{SVG}text")], g) for g in found]


def test_each_worker_has_a_lane(crew: Crew) -> None:
    """What ran there, whatever it was; and a lane as ever for what ran in the process of the run."""
    there = report_of([work(n) for n in range(6)], FakeBackend("there").chat("x"), scheduler=crew)
    both = there.spans + report_of(FakeBackend("here").chat("x")).spans
    drawn = {words[0]: words[1] for words, _ in lanes(draw_timeline(both))}

    assert [*drawn][:1] == ["chat here"] and [*drawn][2:] == ["worker-9", "worker-10"]
    assert {span.worker for span in there.spans} == set(NAMES)
    assert re.fullmatch(r"worker: [\d.]+ ms in [23] spans", drawn["worker-9"])
    assert re.fullmatch(r"1 span, mean .*", drawn["chat here"])


def test_a_workers_strip_tells_tasks_and_calls_apart() -> None:
    """Few tasks among very many calls are seen, above them and in their own colour."""
    run = [Span("chat m", "chat", 0.0, 4.0, worker="w") for _ in range(20)]
    run.append(Span("task clean", "clean", 1.0, 2.0, worker="w"))
    ((_, lane),) = lanes(draw_timeline(run, max_spans=10))
    strips = [(g.get("class"), g.findall(f"{SVG}rect")) for g in lane.findall(f"{SVG}g")]

    assert [(kind, len(rects)) for kind, rects in strips] == [("task", 1), ("call", 1)]
    (_, (task,)), (_, (calls,)) = strips
    end = float(task.get("y", "nan")) + float(task.get("height", "nan"))
    assert end <= float(calls.get("y", "nan"))
    assert float(task.get("width", "nan")) < float(calls.get("width", "nan")) / 3


def test_a_workers_lane_tells_tasks_and_calls_apart() -> None:
    """Each has its colour and rows of its own, tasks first; a bar tells what ran where, and when."""
    run = [
        Span("chat m", "chat", 0.0, 2.0, worker="w"),
        Span("task clean", "clean-1", 1.0, 3.0, worker="w"),
        Span("task score", "score-1", 3.0, 4.0, False, worker="w"),
    ]
    ((words, lane),) = lanes(draw_timeline(run))
    bars = [g for g in lane.findall(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    tops = {}
    for bar in bars:
        (title, rect) = bar.find(f"{SVG}title"), bar.find(f"{SVG}rect")
        assert title is not None and rect is not None
        tops[title.text] = (bar.get("class"), float(rect.get("y", "nan")))

    assert words == ["w", "worker: 5 s in 3 spans"]
    assert lane.get("class") == "lane worker"  # a kind would colour all of its bars
    clean, score, chat = (
        "clean-1\ntask clean on w, 1 s to 3 s (2 s)",
        "score-1\ntask score on w, 3 s to 4 s (1 s), failed",
        "chat\nchat m on w, 0 s to 2 s (2 s)",
    )
    assert {name: kind for name, (kind, _) in tops.items()} == {
        clean: "task", score: "task", chat: "call"
    }  # fmt: skip
    assert tops[clean][1] == tops[score][1] < tops[chat][1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(), max_size=5))
def test_any_names_of_workers_make_a_sound_picture(names: list[str]) -> None:
    """They come from a cluster: each is text in one lane of its own, or of the operation if empty."""
    run = [Span("chat m", "chat", 0.0, 1.0, worker=name) for name in [*names, HOSTILE, "9" * 9999]]
    root = ElementTree.fromstring(draw_timeline(run))

    assert len([r for r in root.iter() if r.get("class") == "bar fill"]) == len(run)
    assert len([r for r in root.iter() if r.get("class") == "band"]) == len({s.worker for s in run})


def test_too_many_workers_for_lanes_are_one_lane() -> None:
    """The idlest are drawn together, as with operations, and are no worker."""
    run = [Span("task t", "x", 0, 1 + n, worker=f"w{n}") for n in range(1000)]
    words = [words for words, _ in lanes(draw_timeline(run))]

    assert words[0] == ["w961", "worker: 16:02 min in 1 span"]
    assert words[-1][0] == "961 other lanes" and words[-1][1].startswith("961 spans, mean")


# --- progress ------------------------------------------------------------------------------------


def test_the_line_says_how_many_workers_are_at_work() -> None:
    """As many as have done something so far; nothing where this process does all."""
    clock = VirtualClock(FakeBackend().answer)
    run = clock.run([FakeBackend().chat(f"{n}") for n in range(9)])
    look = Headway(Course([run])).look
    assert look().words == "0/9 calls, 0 in flight"
    run.workers.sent([0], 1.0, "one")
    assert look().words == "0/9 calls, 1 worker, 0 in flight"
    for number in range(1200):
        run.workers.sent([0], 1.0, f"{number}")
    assert look().words == "0/9 calls, 1,201 workers, 0 in flight"
    assert look().fit(25) == "0/9 calls, 0 in flight"
