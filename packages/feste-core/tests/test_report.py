"""The report of a run: counts that add up, every request once, and four ways to show it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Backend, Limits, Price, Profile, Response, Usage, operation
from feste.errors import (
    CallTimeout,
    ConfigError,
    ContextTooLong,
    InvalidRequest,
    MalformedResponse,
    PluginWarning,
    RateLimited,
    RunFailed,
    ServerError,
)
from feste.report import OperationRow, RunReport
from feste.testing import FakeBackend, FakeParams
from feste.wording import wrapped


@feste.task
def increment(x: int) -> int:
    return x + 1


def report_of(*args: Any, **settings: Any) -> RunReport:
    """Compute, and return the report."""
    feste.compute(*args, **settings)
    report = feste.last_report()
    assert report is not None
    return report


def failing_run() -> RunReport:
    """A run with nodes in every way to end but by a stop."""
    llm = FakeBackend(model="report-states", fail={"bad": InvalidRequest("it is bad")})
    paid = llm.chat("paid")
    paid.compute()
    emit = feste.task(emits=True)(lambda: [llm.chat("x"), llm.chat("y")])
    bad = llm.chat("bad")
    with pytest.raises(RunFailed) as caught:
        feste.compute(paid, emit(), bad, increment(bad), increment(increment(bad)), increment(1))
    return caught.value.report  # type: ignore[no-any-return]


# --- counts --------------------------------------------------------------------------------------


def test_the_states_add_up_to_the_nodes() -> None:
    """Every node of the run, emitted ones too, ended in exactly one state."""
    report = failing_run()

    assert report.states == {"kept": 1, "done": 4, "failed": 1, "skipped": 3}
    assert sum(report.states.values()) == report.nodes == 9


def test_nodes_that_were_merged_are_one() -> None:
    """The report counts what ran, after optimizing."""
    llm = FakeBackend(model="report-merged")
    report = report_of([llm.embed("same") for _ in range(10)])

    assert report.nodes == 1 and report.operations[0].calls == 1


def test_requests_are_counted_and_named() -> None:
    """One entry for each request that was sent, with its operation, model and number of calls."""
    llm = FakeBackend(model="report-requests")
    report = report_of(
        [llm.complete(f"text {i}") for i in range(40)], llm.chat("one"), llm.embed("two")
    )

    assert len(report.requests) == len(llm.requests) == 5
    assert {(r.operation, r.items) for r in report.requests} == {
        ("complete", 16),
        ("complete", 12),
        ("chat", 1),
        ("embed", 1),
    }
    assert {(r.backend, r.model, r.attempt, r.error) for r in report.requests} == {
        ("fake", "report-requests", 1, "")
    }
    rows = {row.operation: (row.calls, row.requests, row.failed) for row in report.operations}
    assert rows == {"fake.complete": (40, 3, 0), "fake.chat": (1, 1, 0), "fake.embed": (1, 1, 0)}


def test_usage_of_a_shared_request_is_counted_once() -> None:
    """The tokens of a request are those that the provider counted for it, not per call in it."""
    llm = FakeBackend(model="report-usage")
    report = report_of([llm.complete(f"text {i}") for i in range(16)])

    (request,) = llm.requests
    (row,) = report.operations
    assert request.items == row.calls == 16
    assert (row.input_tokens, row.output_tokens) == (request.tokens, 4 * 16)


class Quiet(Backend):
    """A provider that tells no usage, and refuses as often as it is told to."""

    def __init__(self, refusals: int = 0, error: type[Any] = ServerError) -> None:
        self.left = refusals
        self.error = error
        self.limits = Limits(concurrency=4)

    @operation
    async def say(self, prompt: str) -> str:
        if self.left:
            self.left -= 1
            raise self.error("try again", status=503, retry_after=0.0, request_id="req-1")
        return prompt


def test_what_a_provider_does_not_tell_is_unknown_and_not_zero() -> None:
    """No usage is no number: None in the data, "unknown" beside others in the text, else no column."""
    llm = FakeBackend(model="report-known")
    report = report_of(Quiet().say("hello"), llm.chat("hello"))
    silent = report_of(Quiet().say("hello"))
    (heading, *rows) = report.table()
    unknown = next(row for row in rows if "unknown" in row)

    assert (silent.operations[0].input_tokens, silent.requests[0].output_tokens) == (None, None)
    assert unknown[heading.index("tokens in") :][:2] == ["unknown"] * 2
    assert silent.table()[0] == ["operation", "calls", "requests", "mean s", "max s"]
    assert "cost" not in heading and "failed" not in heading


def test_every_attempt_is_a_request() -> None:
    """A call that was refused twice and then answered is three requests, two of them refused."""
    report = report_of(Quiet(refusals=2).say("hello"))

    assert [(r.attempt, r.error, r.status) for r in report.requests] == [
        (1, "ServerError", 503),
        (2, "ServerError", 503),
        (3, "", None),
    ]
    assert report.requests[0].request_id == "req-1"
    (row,) = report.operations
    assert (row.calls, row.requests, row.failed) == (1, 3, 2)
    assert report.states == {"done": 1}


def test_a_refusal_for_rate_is_in_the_report() -> None:
    """Being throttled is told too, and costs no node."""
    report = report_of([Quiet(refusals=1, error=RateLimited).say(f"{i}") for i in range(3)])

    assert [r.error for r in report.requests].count("RateLimited") == 3
    assert report.states == {"done": 3}


def test_times_lie_within_the_run() -> None:
    """Ready before sent, sent before ended, all of it between the run's begin and end."""
    llm = FakeBackend(model="report-times", latency=0.002, limits=Limits(concurrency=2))
    report = report_of([llm.chat(f"{i}") for i in range(10)])

    for request in report.requests:
        assert 0 <= request.ready <= request.sent <= request.at <= report.seconds
    ended = [r.at for r in report.requests]
    assert ended == sorted(ended)
    (row,) = report.operations
    assert row.longest <= row.seconds


def test_tasks_are_timed_by_name() -> None:
    """Seconds of Python by the name of the task, halves of operations too, the dearest first."""
    llm = FakeBackend(model="report-tasks")
    report = report_of([increment(i) for i in range(5)], llm.chat("hello"))

    assert set(report.tasks) == {"increment", "chat.prepare", "chat.parse"}
    assert list(report.tasks.values()) == sorted(report.tasks.values(), reverse=True)
    assert all(seconds >= 0 for seconds in report.tasks.values())


# --- whose report it is --------------------------------------------------------------------------


def test_a_failed_run_has_a_report() -> None:
    """It comes with the error, and it is the last one."""
    report = failing_run()

    assert report is feste.last_report()
    assert not report.cancelled
    assert len(report.errors) == 1
    assert report.errors[0].startswith("InvalidRequest: it is bad (at ")


def test_the_last_report_belongs_to_the_context() -> None:
    """A thread that has computed nothing has none; its own does not become ours."""
    mine = report_of(increment(1))
    seen: list[Any] = []

    def other() -> None:
        seen.append(feste.last_report())
        seen.append(report_of(increment(2)))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()

    assert seen[0] is None and seen[1] is not mine
    assert feste.last_report() is mine


def test_every_run_has_a_name_of_its_own() -> None:
    """Names tell runs apart, also eager ones."""
    names = [report_of(increment(i)).run for i in range(3)]
    with context.set(eager=True):
        FakeBackend(model="report-eager").chat("hello")
    eager = feste.last_report()

    assert eager is not None and eager.run.startswith("eager-")
    assert len({*names, eager.run}) == 4


# --- JSON, text, HTML, timeline ------------------------------------------------------------------


def test_json_is_versioned_and_complete() -> None:
    """Everything but the drawing, as plain JSON with the number of its schema."""
    report = failing_run()
    data = report.to_json()
    names = {field.name for field in dataclasses.fields(RunReport)} - {"spans", "asked"}

    assert json.loads(json.dumps(data)) == data
    assert data["schema"] == 1
    assert set(data) == {"schema", "perhaps_billed", *names}
    assert data["states"] == report.states and data["nodes"] == report.nodes
    assert [r["event"] for r in data["requests"]] == ["request_finished"] * 3
    assert {r["schema"] for r in data["requests"]} == {1}
    assert data["operations"][0]["operation"] == "fake.chat"


def test_the_text_says_what_happened_in_a_few_lines() -> None:
    """A headline, the states, a row for each operation, the first errors."""
    report = failing_run()
    lines = str(report).splitlines()

    assert lines[0].startswith(f"{report.run}: 9 nodes, 2 calls answered by 3 requests in ")
    assert lines[1].strip() == "4 done, 1 kept, 1 failed, 3 skipped"
    assert str(RunReport("run-0", 0.0, 1, {"not_started": 1})).splitlines() == [
        "run-0: 1 node, 0 calls answered by 0 requests in 0.00 s",
        "  1 not started",
    ]
    assert any(line.split()[:2] == ["fake.chat", "report-states"] for line in lines)
    assert "it is bad" in " ".join(lines[lines.index("errors:") :])


def test_no_line_is_wider_than_a_terminal() -> None:
    """Eighty columns hold the text, with long names and large numbers too; the columns stay aligned."""
    rows = [
        OperationRow("custom.operation", f"an-organisation/a-model-of-many-parts-{i}" * (i % 3),
                     10**i, 10**i, 7 * i, 10 ** (i + 5), 10 ** (i + 4), 10.0**i, 10.0**i)
        for i in range(7)
    ]  # fmt: skip
    states = {"done": 10**9, "not_started": 10**9, "a_state_that_comes_later": 10**9}
    errors = ["ServerError: " + "it was busy, " * 40]
    report = RunReport("run-1000", 1e6, 10**9, states, rows, errors=errors, cancelled=True)
    lines = str(report).splitlines()
    blocks = "\n".join(lines).split("\n\n")[1:-1]

    assert max(map(len, lines)) <= 80
    assert "a state that comes later" in " ".join(str(report).split())
    assert len(blocks) > 1
    for block in blocks:
        heading, *others = block.splitlines()
        assert len(others) == len(rows)
        assert {len(line) for line in others} == {len(heading)}
    assert f"{10**11:,}" in str(report)


def test_its_repr_is_one_line() -> None:
    """A prompt shows a line, not every request; a run of Python only counts nodes."""
    llm = FakeBackend(model="report-repr")
    many = repr(report_of([llm.chat(f"{i}") for i in range(2000)]))
    none = repr(report_of(increment(1)))

    assert re.fullmatch(r"<RunReport run-\d+: 2,000 calls in \d+\.\d\d s>", many)
    assert re.fullmatch(r"<RunReport run-\d+: 1 node in \d+\.\d\d s>", none)


def test_html_is_for_notebooks_and_escapes_what_others_wrote() -> None:
    """Names of models and errors are text, never markup."""
    llm = FakeBackend(model="<script>alert(1)</script>&")
    page = report_of(llm.chat("hello"))._repr_html_()

    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<table" in page and "<svg" in page


def test_the_timeline_is_a_picture_of_every_request() -> None:
    """SVG that parses, with a bar for each request; a run without any has a picture too."""
    llm = FakeBackend(model="<model> & more")
    report = report_of([llm.chat(f"{i}") for i in range(5)])
    picture = ET.fromstring(report.timeline())

    assert picture.tag.endswith("svg")
    assert len(report.spans) >= 5
    assert ET.fromstring(report_of(increment(1)).timeline()).tag.endswith("svg")


@pytest.mark.parametrize("ending", [".json", ".svg", ".txt", ".html", ".SVG"])
def test_it_is_saved_by_its_ending(tmp_path: Path, ending: str) -> None:
    """JSON, the timeline, the text, or a page with all that a notebook shows."""
    report = failing_run()
    path = tmp_path / f"report{ending}"
    report.save(path)
    text = path.read_text(encoding="utf-8")

    if ending == ".json":
        assert json.loads(text) == report.to_json()
    elif ending.lower() == ".svg":
        assert ET.fromstring(text).tag.endswith("svg")
    elif ending == ".html":
        assert text.startswith("<!doctype html>") and report._repr_html_() in text
    else:
        assert text == str(report)


@pytest.mark.parametrize("name", ["x.png", "x.csv", "x", "x.svg.gz"])
def test_an_unknown_ending_is_refused(tmp_path: Path, name: str) -> None:
    """What cannot be written is not written as something else: the error names what can be."""
    report = failing_run()
    path = tmp_path / name
    with pytest.raises(ConfigError, match=r"use \.json, \.txt, \.html or \.svg"):
        report.save(path)
    with pytest.raises(ConfigError, match=r"use \.svg or \.html"):
        report.timeline(path)

    assert not path.exists()


def test_the_timeline_is_written_as_a_picture_or_a_page(tmp_path: Path) -> None:
    """Either by its ending."""
    report = failing_run()
    svg = report.timeline(tmp_path / "a.svg")
    report.timeline(tmp_path / "a.html")

    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == svg
    assert svg in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("ending", [".json", ".svg", ".txt", ".html"])
def test_errors_may_quote_anything(tmp_path: Path, ending: str) -> None:
    """Lone surrogates, control characters and markup of a model's answer do not break the report."""

    @feste.task
    def breaks() -> None:
        raise ValueError("\ud800 \x00 \x1b[31m </svg> <b>")

    report = report_of(breaks(), on_error="return")
    report.save(tmp_path / f"report{ending}")

    assert (tmp_path / f"report{ending}").read_bytes()
    assert "</svg> <b>" not in report._repr_html_()


def test_an_empty_report_can_be_shown() -> None:
    """Nothing sent, nothing failed: still a text, a page, a picture."""
    report = RunReport("run-0", 0.0, 0, {})

    assert str(report).startswith("run-0: 0 nodes, 0 calls")
    assert report._repr_html_() and report.timeline() and report.to_json()
    assert copy.deepcopy(report) == report


def test_usage_is_added_up_by_operation_and_model() -> None:
    """Two models of one operation are two rows."""
    one, two = FakeBackend(model="report-a"), FakeBackend(model="report-b")
    override = FakeParams(model="report-c")
    report = report_of(
        [one.chat(f"{i}") for i in range(3)], two.chat("hello"), one.chat("hello", override)
    )

    assert {row.model: row.calls for row in report.operations} == {
        "report-a": 3,
        "report-b": 1,
        "report-c": 1,
    }
    assert Usage(1, 2) + Usage(3, 4) == Usage(4, 6) and Response({}).usage is None


def test_requests_that_may_have_been_billed_are_named() -> None:
    """A request that left and was not answered is counted apart, in text, HTML and JSON."""
    llm = FakeBackend(fail={"late": CallTimeout("late"), "bad": InvalidRequest("no")})
    feste.compute(llm.chat("late"), llm.chat("bad"), llm.chat("fine"), on_error="return")
    report = feste.last_report()
    assert report is not None

    assert report.perhaps_billed == report.to_json()["perhaps_billed"] == 2  # it was tried twice
    told = "2 requests ended without an answer and may have been billed"
    assert told in str(report) and told in report._repr_html_()
    feste.compute(llm.chat("also fine"))
    assert "billed" not in str(feste.last_report())


@pytest.mark.parametrize(("columns", "longest"), [("40", 80), ("100", 100), ("200", 120)])
def test_text_uses_a_wider_terminal(
    columns: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines have 80 columns, up to 120 where the terminal has them."""
    monkeypatch.setenv("COLUMNS", columns)

    assert max(map(len, wrapped("word " * 100))) in range(longest - 5, longest + 1)


class Billed(FakeBackend):
    """A backend that reports what its prompt cache served."""

    async def _send(self, request: Any, on_chunk: Any = None) -> Response:
        return Response({"answers": ["a"]}, Usage(100, 10, cached=60, written=30))

    chat = copy.copy(FakeBackend.chat)
    chat._send = _send


PRICE = Price(input=1e6, output=10e6, cached=0.1e6, written=2e6)


def test_a_run_has_its_price() -> None:
    """By what the provider counted: plain, cached and written tokens, and those of the answer."""
    llm = Billed(profile=Profile(price=PRICE))
    report = report_of(llm.chat("a"), llm.chat("b"))
    (row,) = report.operations

    assert (report.requests[0].cached_tokens, report.requests[0].written_tokens) == (60, 30)
    assert (row.cached_tokens, row.written_tokens) == (120, 60)
    assert report.dollars == row.dollars == pytest.approx(2 * (10 + 6 + 60 + 100))
    assert report.unpriced == 0
    assert str(report).splitlines()[0].endswith(", $352.00")
    assert "dollars" in report.table()[0] and "cached" in report.table()[0]
    assert report.to_json()["dollars"] == report.dollars


def test_an_unknown_price_is_not_zero() -> None:
    """Without a price nothing is said; beside known ones, how many requests have none."""
    known, unknown = Billed(profile=Profile(price=PRICE)), FakeBackend()
    silent = report_of(unknown.chat("a"))
    mixed = report_of(known.chat("a"), unknown.chat("b"))

    assert (silent.dollars, silent.unpriced) == (None, 1)
    assert "$" not in str(silent)
    assert (mixed.dollars, mixed.unpriced) == (pytest.approx(176), 1)
    assert "at least $176.00 (1 request of unknown price)" in " ".join(str(mixed).split())


def test_what_was_not_charged_costs_nothing_and_what_may_have_been_is_unknown() -> None:
    """A refusal is free; a request without an answer may have been billed."""
    price = Profile(price=PRICE)
    refused = FakeBackend(fail={"a": InvalidRequest("no")}, profile=price)
    lost = FakeBackend(fail={"a": CallTimeout("gone")}, profile=price)

    assert report_of(refused.chat("a"), on_error="return").dollars == 0.0
    report = report_of(lost.chat("a"), on_error="return")
    assert (report.dollars, report.unpriced) == (None, len(report.requests))


def test_a_profile_that_raises_costs_no_result() -> None:
    """The plugin is named, and its requests have no price."""

    class Broken(FakeBackend):
        def profile(self, model: str) -> Profile:
            if self.requests:
                raise ValueError("no list of prices")
            return Profile()

    with pytest.warns(PluginWarning, match=r"Broken\.profile\(\) raised ValueError: no list"):
        report = report_of([Broken().chat("a")])

    assert (report.dollars, report.unpriced, report.states) == (None, 1, {"done": 1})


# --- what went wrong, what it may cost, what came back -------------------------------------------------


@functools.cache  # its retries take a moment
def mixed_run() -> RunReport:
    """A run with lists, refusals, failures, a lost request, a task that takes a while."""
    llm = FakeBackend(
        "report-mixed",
        fail={"late": CallTimeout("late"), "bad": InvalidRequest("no")},
        profile=Profile(price=Price(input=1e6, output=2e6)),
    )

    @feste.task
    def slow() -> None:
        threading.Event().wait(0.002)

    return report_of(
        [llm.complete(f"{i}") for i in range(20)],
        llm.chat("late", FakeParams(max_tokens=7)),
        llm.chat("bad"),
        increment(llm.chat("bad too")),
        Quiet(refusals=2).say("hello"),
        slow(),
        on_error="return",
    )


def test_json_gives_the_report_back() -> None:
    """Through text: equal in every field, with the same words and the same picture."""
    report = mixed_run()
    again = RunReport.from_json(json.loads(json.dumps(report.to_json())))

    assert again == report
    assert again.to_json() == report.to_json()
    assert str(again) == str(report) and again.timeline() == report.timeline()
    assert [r.waits for r in again.requests] == [r.waits for r in report.requests]
    assert report.task_spans and report.sizes == {10: 2, 1: 7}


def test_equal_errors_are_told_once() -> None:
    """The counts are told anyway; a screen of equal lines would hide what else went wrong."""
    llm = FakeBackend(fail={"bad": InvalidRequest("no"), "long": ContextTooLong("too long")})
    nodes = [llm.chat(f"{'long' if i == 7 else 'bad'} {i}") for i in range(30)]
    feste.compute(nodes, on_error="return")
    report = feste.last_report()

    assert report is not None and len(report.errors) == 2
    assert str(report).count("InvalidRequest: no") == 1


def test_errors_of_each_kind_are_told_first() -> None:
    """A rare one is not hidden behind many of another kind, each of which has a text of its own."""

    @feste.task
    def check(i: int) -> int:
        raise (RuntimeError if i % 2 else KeyError)("my bug")

    llm = FakeBackend(fail={f"bad {i}.": InvalidRequest(f"no {i}") for i in range(30)})
    nodes = [llm.chat(f"bad {i}.") for i in range(30)]
    with pytest.raises(RunFailed) as caught:
        feste.compute(nodes, [check(i) for i in range(6)])
    report = feste.last_report()

    assert report is not None
    kinds = {
        " ".join(error.split()[: 2 if "NodeError" in error else 1]) for error in report.errors[:3]
    }
    assert kinds == {"InvalidRequest:", "NodeError: RuntimeError:", "NodeError: KeyError:"}
    for text in (str(report), report._repr_html_()):
        told = " ".join(text.split())
        assert "30 x InvalidRequest in all" in told and "6 x NodeError in all" in told
    for name in ("InvalidRequest: no", "NodeError: RuntimeError: my bug", "NodeError: KeyError:"):
        assert name in str(caught.value) and name in str(report)


@pytest.mark.parametrize("first", [True, False])
def test_a_sum_with_reports_that_bought_nothing_has_no_price_of_its_own(first: bool) -> None:
    """Where all that was bought has no price, the whole has none, and not one of at least $0."""
    llm = FakeBackend()
    kept = [llm.chat(f"{i}") for i in range(300)]
    feste.compute(kept)
    rest = [llm.chat(f"new {i}") for i in range(300)]
    items = [*kept, *rest] if first else [*rest, *kept]
    list(feste.map(lambda node: node, items, window=50))
    report = feste.last_report()

    assert report is not None and report.unpriced == len(report.requests) > 0
    assert report.dollars is None and "$" not in str(report)


def test_json_of_a_later_version() -> None:
    """New fields are left out; another schema is refused, with what to do."""
    data = failing_run().to_json()
    data["later"] = data["operations"][0]["later"] = data["requests"][0]["later"] = 1

    assert RunReport.from_json(data).nodes == 9
    with pytest.raises(ConfigError, match="schema 2, this Feste reads up to 1: update it"):
        RunReport.from_json({**data, "schema": 2})
    with pytest.raises(ConfigError, match="no report"):
        RunReport.from_json({"nodes": 3})


def test_failures_and_retries_are_counted_by_class() -> None:
    """Failed nodes by their own error, further attempts by the error before; skipped ones are apart."""
    report = mixed_run()

    assert report.failures == {"InvalidRequest": 2, "CallTimeout": 1}
    assert sum(report.failures.values()) == report.states["failed"]
    assert report.retries == {"ServerError": 2, "CallTimeout": 1}
    assert sum(report.retries.values()) == sum(r.attempt > 1 for r in report.requests)
    text = " ".join(str(report).split())
    assert "failures: 2 InvalidRequest, 1 CallTimeout" in text
    assert "2 of 10 calls, 7 of 1; at most" in text
    assert "3 sent again: 2 after ServerError, 1 after CallTimeout" in text


def test_what_a_run_costs_at_most() -> None:
    """Certain: what was counted. At most: with each request that may have been billed, in full."""
    price = Profile(price=Price(input=1e6, output=2e6))
    lost = FakeBackend(fail={"late": CallTimeout("gone")}, profile=price)
    bounded = report_of(lost.chat("late", FakeParams(max_tokens=7)), on_error="return")
    broken = FakeBackend(fail={"late": MalformedResponse("garbage")}, profile=price)
    garbled = report_of(broken.chat("late", FakeParams(max_tokens=7)), on_error="return")
    unbounded = report_of(lost.chat("late"), on_error="return")
    known = report_of(lost.chat("fine"))
    unknown = report_of(FakeBackend().chat("fine"))
    (row,) = bounded.operations

    assert bounded.dollars is None and bounded.perhaps_billed == 2
    assert row.dollars_possible == bounded.dollars_possible
    body = '{"model":"fake-1","messages":[{"role":"user","content":"late"}],"max_tokens":7}'
    assert bounded.dollars_possible == pytest.approx(2 * (len(body) + 2 * 7), rel=0.3)
    assert bounded.dollars_possible >= 2 * (len("late") + 2 * 7)
    assert garbled.dollars is None and garbled.perhaps_billed == 0
    assert garbled.dollars_possible == bounded.dollars_possible
    assert unbounded.dollars_possible is None
    assert known.dollars_possible == known.dollars
    assert unknown.dollars_possible is None
    assert "may have been billed; with all of them the run costs $" in " ".join(
        str(bounded).split()
    )


def test_what_a_store_saved(tmp_path: Path, restart: Any) -> None:
    """The price of what was not bought again, by the tokens that it cost then."""
    price = Profile(price=Price(input=1e6, output=2e6))
    saved = []
    for profile in (price, price, Profile()):
        restart()
        llm = FakeBackend("report-saved", profile=profile)
        saved.append(report_of([llm.chat("a"), llm.chat("b")], store=str(tmp_path / "runs.db")))
    first, second, third = saved

    assert first.dollars_saved == 0.0 and first.dollars
    assert (second.dollars, second.dollars_saved) == (0.0, first.dollars)
    assert second.states == {"replayed": 2} and second.begun == 2 and not second.operations
    assert third.dollars_saved is None
    assert "2 answers not bought again" in str(second) and "out, $" in str(second)


def test_waits_are_told_in_words() -> None:
    """The mean of a call by cause, the largest first; what is too short to matter is not told."""
    row = OperationRow("fake.chat", "m", calls=10, requests=10, begun=10, in_flight=20.0)
    waits = {"dependency": 500.0, "slot": 30.0, "rate_limit": 60.0, "prefix": 9.5, "worker": 0.5}
    report = RunReport("run-0", 9.0, 10, {"done": 10}, [row], begun=10, waits=waits)
    quiet = RunReport("run-0", 9.0, 10, {"done": 10}, [row], begun=10, waits={"slot": 0.1})

    told = "waits: 10.00 s a call: rate limit 6.00 s, slot 3.00 s, prompt cache 0.95 s; then 2.00 s in flight"
    assert told in " ".join(str(report).split()) and told in report._repr_html_()
    assert "waits" not in str(quiet)


def test_the_report_of_the_accounts() -> None:
    """The waits of operations are those of the run; the plugins' versions are known; a peak is seen."""
    report = mixed_run()
    rows: dict[str, float] = {}
    for row in report.operations:
        assert row.begun and row.requests
        assert row.in_flight > 0 and row.python > 0
        for cause, seconds in row.waits.items():
            rows[cause] = rows.get(cause, 0.0) + seconds

    assert rows == pytest.approx(report.waits)
    assert report.waits["retry"] > 0
    assert report.versions["feste-core"] == feste.__version__
    assert 1 <= report.peak <= 10
    assert sum(size * count for size, count in report.sizes.items()) == sum(
        request.items for request in report.requests
    )


def test_a_summary_stays_on_one_screen() -> None:
    """Whatever happened: what it cost, what it waited for, what went wrong, in 30 lines."""
    assert len(str(mixed_run()).splitlines()) <= 30  # long paths wrap


def test_runs_that_tasks_begin_are_counted_too() -> None:
    """What a run costs is all that it has caused, however its tasks ask; its nodes are its own."""
    price = Price(input=0.0, output=1e6 / 4)  # a dollar for each answer
    llm = FakeBackend("inner", profile=Profile(price=price))

    @feste.task
    async def awaits(text: str) -> str:
        return str(await llm.chat(text))

    @feste.task
    def computes(text: str) -> str:
        return str(feste.compute(awaits(text), llm.chat(text))[1])

    @feste.task
    def at_once(text: str) -> str:
        with feste.context.set(eager=True):
            return str(llm.chat(text))

    feste.compute([awaits("a"), computes("b"), at_once("c"), llm.chat("d")])
    report = feste.last_report()

    assert report is not None
    assert (report.nodes, report.inner_runs) == (4, 4)
    assert [(row.calls, row.requests) for row in report.operations] == [(5, 5)]
    assert (report.dollars, report.dollars_possible, report.begun) == (5.0, 5.0, 5)
    assert "with 4 runs that its tasks began" in str(report)
    assert RunReport.from_json(report.to_json()) == report

    list(feste.map(awaits, "efg", window=1))
    several = feste.last_report()
    assert several is not None and (several.inner_runs, several.dollars) == (3, 3.0)
