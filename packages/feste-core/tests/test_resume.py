"""A program that runs again replays what was stored, and buys only the rest."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import context, draw, errors, store
from feste.backend import Operation, Request, Response, Usage
from feste.graph import FesteGraph
from feste.prompt import Prompt
from feste.report import RunReport
from feste.store.opened import opened
from feste.testing import FakeBackend, FakeParams, VirtualClock

Restart = Callable[[], None]
ask = Prompt("Ask {{ x }}")


def _numbered(text: Any) -> Any:
    Counter.bought += 1
    return f"#{Counter.bought} {text}" if isinstance(text, str) else text


class Counter(FakeBackend):
    """Answers every request with a new number, so that replayed and bought answers differ."""

    bought = 0

    def answer(self, request: Request) -> Response:
        response = super().answer(request)
        answers = []
        for given in response.payload["answers"]:
            several = request.samples > 1  # answers to one prompt for several calls
            answers.append([_numbered(g) for g in given] if several else _numbered(given))
        return Response({"answers": answers}, response.usage)


@pytest.fixture
def path(tmp_path: Path, restart: Restart) -> Path:
    return tmp_path / "runs.db"


def report() -> Any:
    found = feste.last_report()
    assert found is not None
    return found


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as conn:
        return conn.execute(query).fetchall()


# --- replaying ------------------------------------------------------------------------------------


def test_a_rerun_replays_everything(path: Path, restart: Restart) -> None:
    """All kinds of calls, lists among them; nothing is sent, and the tokens are shown apart."""

    def program() -> Any:
        llm = Counter()
        first = [llm.chat(f"item {i}") for i in range(5)]
        second = [llm.complete(ask(x=reply)) for reply in first]
        return feste.compute(second, [llm.embed(f"text {i}") for i in range(100)], store=path)

    bought = program()
    spent = report().requests
    restart()
    assert program() == bought
    assert report().states["replayed"] == 110
    assert not report().requests and not report().operations
    used = sum(r.input_tokens for r in spent), sum(r.output_tokens for r in spent)
    assert (report().reused_input_tokens, report().reused_output_tokens) == used
    assert "110 answers not bought again" in str(report())


def test_only_the_rest_is_bought(path: Path, restart: Restart) -> None:
    """A longer list takes the known answers and buys the new ones."""

    def program(count: int) -> Any:
        llm = Counter()
        return feste.compute([llm.chat(f"item {i}") for i in range(count)], store=path)[0]

    bought = program(10)
    restart()
    again = program(15)
    assert again[:10] == bought
    assert report().states == {"done": 5, "replayed": 10}


@pytest.mark.parametrize("eager", [False, True])
def test_five_equal_calls_are_five_draws(path: Path, restart: Restart, eager: bool) -> None:
    """They are replayed as the same five: in one list, and one at a time."""

    def at_once() -> Any:
        with context.set(eager=eager):
            calls = [Counter().chat("Name a fruit.") for _ in range(5)]
        return feste.compute(calls, store=path)[0]

    def one_by_one() -> Any:
        llm = Counter()
        with context.set(eager=eager):
            return [feste.compute(llm.chat("Name a fruit."))[0] for _ in range(5)]

    with context.set(store=path):
        first = at_once()
        more = one_by_one()  # the same program goes on: further draws
        assert len({*first, *more}) == 10
        restart()
        assert at_once() == first
        assert one_by_one() == more


@pytest.mark.parametrize("eager", [False, True])
def test_lazy_and_eager_replay_each_other(path: Path, restart: Restart, eager: bool) -> None:
    """The draws differ in their fingerprints, not in their order: each finds its own answer."""

    def program(eager: bool) -> Any:
        llm = Counter()
        with context.set(eager=eager, store=path):
            samples = [llm.chat(ask(x="a fruit")) for _ in range(5)]
            greedy = llm.chat("Sure?", FakeParams(temperature=0))
            return feste.compute(samples, greedy, llm.embed("text"))

    first = program(eager)
    restart()
    count = Counter.bought
    assert program(not eager) == first
    assert Counter.bought == count


def test_acompute_replays(path: Path, restart: Restart) -> None:
    async def program() -> Any:
        return await feste.acompute([Counter().chat("x") for _ in range(3)], store=path)

    first = asyncio.run(program())
    count = Counter.bought
    restart()
    assert asyncio.run(program()) == first
    assert Counter.bought == count


def test_a_plain_get_function_replays(path: Path, restart: Restart) -> None:
    """The keyword of `compute` reaches calls that Dask runs in its own threads."""
    from dask.threaded import get

    def program() -> Any:
        llm = Counter()
        first = [llm.chat(f"item {i}") for i in range(3)]
        return feste.compute([llm.chat(ask(x=one)) for one in first], store=path, scheduler=get)

    bought = program()
    restart()
    count = Counter.bought
    assert program() == bought
    assert Counter.bought == count


def test_a_change_buys_only_what_it_touches(path: Path, restart: Restart) -> None:
    def program(template: str, limit: int) -> Any:
        llm = Counter()
        first = [llm.chat(f"item {i}") for i in range(3)]
        second = llm.chat(Prompt(template)(all=first))
        third = llm.chat("apart", FakeParams(max_tokens=limit))
        return feste.compute(first, second, third, store=path)

    bought = program("Merge {{ all }}", 9)
    restart()
    changed = program("Join {{ all }}", 9)
    assert changed[0] == bought[0] and changed[2] == bought[2]
    assert report().states["replayed"] == 4 and report().states["done"] == 2  # a prompt, a call
    restart()
    program("Merge {{ all }}", 10)
    assert report().states["replayed"] == 4 and len(report().requests) == 1


def test_a_sample_takes_no_answer_of_another_draw(path: Path, restart: Restart) -> None:
    """A call added in front of equal ones gets the first answer; the last one is bought."""

    def program(count: int) -> Any:
        llm = Counter()
        return feste.compute([llm.chat("x") for _ in range(count)], store=path)[0]

    three = program(3)
    restart()
    four = program(4)
    assert four[:3] == three and len(set(four)) == 4
    restart()
    llm = Counter()
    once = feste.compute(llm.chat(ask(x="x")), store=path)  # another request: not taken
    assert once[0] not in four


def test_greedy_and_pure_calls_take_any_answer(path: Path, restart: Restart) -> None:
    greedy = FakeParams(temperature=0)
    with context.set(store=path, optimize=False):
        first = feste.compute([Counter().chat("x", greedy) for _ in range(2)])[0]
        restart()
        again = feste.compute([Counter().chat("x", greedy) for _ in range(5)])[0]
        assert set(again) <= set(first) and not report().requests
        vector = Counter().embed("x").compute()
        assert [Counter().embed("x").compute() for _ in range(3)] == [vector] * 3
        assert report().states == {"replayed": 1}


def test_failed_calls_are_tried_again(path: Path, restart: Restart) -> None:
    def program(fail: dict[str, Exception]) -> Any:
        llm = FakeBackend(fail=fail)
        calls = [llm.chat(text) for text in ("good", "bad")]
        return feste.compute(calls, store=path, on_error="return")[0]

    first = program({"bad": errors.ContentFiltered("no")})
    assert isinstance(first[1], errors.ContentFiltered)
    restart()
    second = program({})
    assert second[0] == first[0] and isinstance(second[1], str)
    assert report().states == {"done": 1, "replayed": 1}
    outcomes = rows(path, "SELECT outcome, billed, error FROM requests ORDER BY id")
    assert [o[:2] for o in outcomes] == [("answered", "yes"), ("failed", "no"), ("answered", "yes")]
    assert outcomes[1][2].startswith("ContentFiltered")


def test_an_answer_that_was_not_parsed_is_parsed_again(path: Path, restart: Restart) -> None:
    broken = [True]

    class Odd(Counter):
        def _read(self, response: Response, arguments: Any) -> Any:
            if broken[0]:
                raise errors.MalformedResponse("cannot be read")
            return FakeBackend._parse_text(self, response, arguments)

        chat = Operation(prepare=FakeBackend._prepare_chat, send=FakeBackend._send, parse=_read)

    for reused in (0, 1):
        with pytest.raises(errors.RunFailed):
            Odd().chat("x").compute(store=path)
        assert (report().states, report().reused) == ({"failed": 1}, reused)
        restart()
    broken[0] = False
    bought = Counter.bought
    assert Odd().chat("x").compute(store=path).startswith(f"fake-1:#{bought} ")
    assert Counter.bought == bought


def test_emitted_calls_and_calls_inside_tasks_replay(path: Path, restart: Restart) -> None:
    """Lazily and eagerly: the calls of a task have the task's scope, returned or computed there."""

    @feste.task(emits=True)
    def emitting(llm: Any, topic: str) -> Any:
        return [llm.chat(f"{topic}?") for _ in range(3)]

    @feste.task
    def computing(llm: Any, topic: str) -> Any:
        first = feste.compute([llm.chat("same") for _ in range(2)])[0]
        return [*first, llm.chat("same")]

    def program(eager: bool) -> Any:
        llm = Counter()
        with context.set(eager=eager, store=path):
            topics = [emitting(llm, t) for t in "ab"] + [computing(llm, t) for t in "cd"]
            return feste.compute(topics)[0]

    first = program(False)
    assert len({text for texts in first for text in texts}) == 12
    count = Counter.bought
    for eager in (False, True, False):
        restart()
        assert program(eager) == first
    assert Counter.bought == count


def test_the_same_node_keeps_its_answer_without_a_store(tmp_path: Path) -> None:
    llm = Counter(fail={"bad": errors.ContentFiltered("no")})
    nodes = [llm.chat("good"), llm.chat("bad")]
    with pytest.raises(errors.RunFailed) as failed:
        feste.compute(nodes)
    count = Counter.bought
    assert feste.compute(nodes, on_error="return")[0][0] == failed.value.partial[0][0]
    assert Counter.bought == count and report().states["kept"] == 1


def test_a_node_that_is_not_kept_keeps_its_draw(path: Path) -> None:
    node = Counter().chat("x")
    assert node.compute(store=path, keep="none") == node.compute(store=path, keep="none")
    assert report().states == {"replayed": 1}


# --- the key --------------------------------------------------------------------------------------

BASE = Request(
    "fake",
    "chat",
    "http://a:1/v1",
    {"model": "m", "messages": [{"role": "user", "content": "x"}], "n": 1, "stop": None},
)


@pytest.mark.parametrize(
    "change",
    [
        {"plugin": "other"},
        {"operation": "complete"},
        {"endpoint": "http://a:2/v1"},
        {"endpoint": "https://a:1/v1"},
        {"parser": "other"},
        *(
            {"body": {**BASE.body, **part}}
            for part in (
                {"model": "m2"},
                {"n": 2},
                {"n": 1.0},
                {"n": True},
                {"stop": ""},
                {"stop": []},
                {"seed": 1},
                {"messages": [{"role": "user", "content": "x "}]},
                {"messages": [{"role": "system", "content": "x"}]},
                {"messages": [{"role": "user", "content": "x"}] * 2},
                {"messages": [{"role": "user", "content": ["x"]}]},
            )
        ),
        {"body": {k: v for k, v in BASE.body.items() if k != "stop"}},
    ],
)
def test_each_field_of_a_request_counts(path: Path, change: dict[str, Any]) -> None:
    """A request that differs in one field is another request: its answer is never taken."""
    from feste.store.rows import Answer, Wanted

    mine = draw.Draw("main", "f", 0)
    base = dataclasses.replace(BASE, draws=(mine,))
    journal = opened(path)
    told: list[Any] = []
    journal.record([Answer(base, Response("kept"))], lambda ok, value: told.append(ok))
    other = dataclasses.replace(base, **change)
    assert other.key != base.key
    for sample in (True, False):
        journal.recall([Wanted(other.key, mine, sample)], lambda ok, value: told.append(value))
    journal.recall([Wanted(base.key, mine, True)], lambda ok, value: told.append(value))
    store.close()
    assert told[0] is True
    assert [found[0].response for found in told[1:]] == [None, None, Response("kept")]


@pytest.mark.parametrize(
    "change",
    [
        {"client": {"key": "B_KEY"}},
        {"account": "org-2"},
        {"timeout": 1.0},
        {"max_output": 7},
        {"packed": True},
    ],
)
def test_what_does_not_change_an_answer_does_not_count(change: dict[str, Any]) -> None:
    assert dataclasses.replace(BASE, **change).key == BASE.key


def test_other_settings_still_hit(path: Path, restart: Restart) -> None:
    """Scheduler, batching, limits and the place in the program change no key."""
    from dask.threaded import get

    def program(**settings: Any) -> Any:
        llm = Counter()
        [llm.chat("not computed") for _ in range(len(settings))]
        calls = [llm.complete(f"word {i}") for i in range(40)]
        return feste.compute(calls, store=path, **settings)[0]

    first = program()
    count = Counter.bought
    for settings in ({}, {"optimize": False}, {"optimize": {"batch": False}}, {"scheduler": get}):
        restart()
        assert program(**settings) == first, settings
    assert Counter.bought == count


# --- what is written ------------------------------------------------------------------------------


def test_prompts_can_be_left_out(path: Path, restart: Restart) -> None:
    """With `store_prompts=False` no file holds what was asked, and a rerun still replays."""

    def program() -> Any:
        return FakeBackend().chat("a SECRET question").compute(store=path, store_prompts=False)

    first = program()
    store.close()
    for file in path.parent.iterdir():
        assert b"SECRET" not in file.read_bytes()
    assert not rows(path, "SELECT * FROM prompts")
    restart()
    assert program() == first and report().states == {"replayed": 1}


def test_prompts_are_stored_by_default(path: Path) -> None:
    FakeBackend().chat("a question").compute(store=path)
    store.close()
    ((key, text),) = rows(path, "SELECT key, request FROM prompts")
    assert "a question" in text
    assert rows(path, "SELECT key FROM answers") == [(key,)]
    assert json.loads(text)[:2] == ["fake", "chat"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_files_are_for_their_owner_alone(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        FakeBackend().chat("x").compute(store=path.parent / "new" / "runs.db")
    finally:
        os.umask(before)
    folder = path.parent / "new"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


def test_an_answer_that_is_no_json_is_delivered_with_a_warning(path: Path) -> None:
    class Odd(FakeBackend):
        def answer(self, request: Request) -> Response:
            return Response({"answers": ["text"], "extra": object()}, Usage(1, 1))

    with pytest.warns(errors.FesteWarning, match="1 answer cannot be kept"):
        assert Odd().chat("x").compute(store=path) == "fake-1:text"


@pytest.mark.parametrize("text", ["\ud800", "\x00", "é\u202e", "nan", ""])
def test_odd_texts_round_trip(path: Path, restart: Restart, text: str) -> None:
    class Odd(FakeBackend):
        def answer(self, request: Request) -> Response:
            return Response({"answers": [text]})

    assert Odd().chat("x").compute(store=path) == f"fake-1:{text}"
    restart()
    assert Odd().chat("x").compute(store=path) == f"fake-1:{text}"
    assert report().states == {"replayed": 1}


# --- settings -------------------------------------------------------------------------------------


def test_a_with_block_holds_for_all_threads(path: Path) -> None:
    import threading

    llm, values = Counter(), []
    with context.set(store=path):
        thread = threading.Thread(target=lambda: values.append(llm.chat("x").compute()))
        thread.start()
        thread.join()
    assert context.get("store") is None
    store.close()
    assert len(rows(path, "SELECT * FROM answers")) == 1


def test_two_stores_at_once_are_an_error(path: Path) -> None:
    import threading

    failed: list[BaseException] = []

    def other() -> None:
        try:
            with context.set(store=path.with_name("other.db")):
                pass
        except errors.ConfigError as error:
            failed.append(error)

    with context.set(store=path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with context.set(store=None):  # inside its own block a program may change it
            assert context.get("store") is None
        assert context.get("store") == str(path)
    assert len(failed) == 1 and "whole process" in str(failed[0])


@pytest.mark.parametrize("wrong", [3, True, b"", ["x"]])
def test_a_wrong_store_is_refused(wrong: Any) -> None:
    with pytest.raises(errors.ConfigError, match="path of a file"):
        context.set(store=wrong)


def test_a_removed_store_is_begun_anew(path: Path) -> None:
    llm = Counter()
    llm.chat("x").compute(store=path)
    for file in path.parent.iterdir():
        file.unlink()
    llm.chat("y").compute(store=path)
    store.close()
    assert len(rows(path, "SELECT * FROM answers")) == 1


def test_a_symbolic_link_is_refused(path: Path) -> None:
    victim = path.with_name("victim")
    victim.write_text("")
    path.symlink_to(victim)
    with pytest.raises(errors.JournalError, match="symbolic link"):
        Counter().chat("x").compute(store=path)
    assert victim.read_bytes() == b""


def test_nothing_is_written_without_the_setting(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Counter().chat("x").compute()
    assert not list(tmp_path.iterdir())


def test_graphs_have_the_scope_of_their_task() -> None:
    """`explain` and `compute` inside a task count draws there, not in the main program."""
    scopes: list[str] = []

    @feste.task
    def inner(x: int) -> int:
        node = Counter().chat("inner")
        feste.compute(node)
        assert node._node.draw is not None
        scopes.append(node._node.draw.scope)
        return x

    outer = inner(1)
    feste.compute(outer)
    assert outer._node.draw is not None
    assert scopes == [outer._node.draw.inner]
    graph, _, _ = FesteGraph.collect(Counter().chat("outer"))
    assert next(iter(graph.nodes.values())).draw.scope == "main"  # type: ignore[union-attr]


def test_a_store_that_is_closed_under_a_run_ends_it(path: Path) -> None:
    """Nothing waits for a journal that is gone."""

    @feste.task
    def close() -> str:
        store.close()
        return "go on"

    llm = Counter()
    with pytest.raises(errors.RunFailed, match="was closed while a run used it"):
        feste.compute(llm.chat(ask(x=close())), store=path)


def test_explain_says_that_it_counts_all_calls(path: Path) -> None:
    llm = Counter()
    feste.compute(llm.chat("x"), store=path)
    told = str(feste.explain(Counter().chat("x"), store=path))
    assert "runs.db are not bought again" in " ".join(told.split())
    assert "not bought again" not in str(feste.explain(Counter().chat("x")))


def test_the_unknown_window_is_named(path: Path, restart: Restart) -> None:
    """A request that was under way when the process died is in the report of the next run."""
    journal = opened(path)
    lost = Counter().chat("x")
    FesteGraph.collect(lost)
    node = lost._node
    assert node.draw is not None and node.call is not None
    request = dataclasses.replace(node.call.prepare(["x", FakeParams()]), draws=(node.draw,))
    noted: list[Any] = []
    journal.intend(request, [request], lambda ok, value: noted.append((ok, value)))
    restart()
    assert noted == [(True, 1)]
    for _ in range(2):  # bought again, then replayed: it may have been paid twice all the same
        values = feste.compute([Counter().chat("x"), Counter().chat("y")], store=path)
        (unknown,) = report().unknown
        assert (unknown.operation, unknown.model) == ("counter.chat", "fake-1")
        assert "test_resume.py" in unknown.origin and unknown.sent > 1e9
        text = " ".join(str(report()).split())
        if unknown.bought_again:
            assert "1 call bought again, because an earlier request has no known answer" in text
            assert "counter.chat fake-1, sent 20" in text
        else:
            assert "1 request of earlier runs for these calls may have been billed besides" in text
        assert unknown.bought_again == ("done" in report().states and len(report().requests) == 2)
        assert report().to_json()["unknown"][0]["origin"] == unknown.origin
        assert values
        restart()
    feste.compute(Counter().chat("y"), store=path)
    assert not report().unknown


@pytest.mark.parametrize("eager", [False, True])
def test_an_answer_that_cannot_be_written_is_delivered(
    path: Path, restart: Restart, eager: bool
) -> None:
    """The run says that it could not keep it, and sends nothing more."""

    class Filling(Counter):
        def answer(self, request: Request) -> Response:
            pages = "PRAGMA max_page_count = 1"  # no page can be added from here on
            opened(path).run(lambda conn: conn.execute(pages).fetchall())
            return Response({"answers": ["text"], "much": "x" * 100_000})

    llm = Filling()
    with context.set(store=path, eager=eager):
        if eager:
            with pytest.warns(errors.FesteWarning, match="could not be written"):
                assert llm.chat("x") == "fake-1:text"
            return
        first = llm.chat("x")
        with pytest.raises(errors.RunFailed, match="the store could not keep them") as failed:
            feste.compute(first)
        assert failed.value.partial == ("fake-1:text",)
        assert isinstance(failed.value.__cause__, errors.JournalFailed)
        assert first.compute() == "fake-1:text"  # the node has it
    with pytest.warns(errors.FesteWarning, match="could not be written"):
        restart()
        assert Filling().chat("z").compute(store=path, on_error="return") == "fake-1:text"


def test_a_request_that_may_have_been_billed_is_noted_as_unknown(
    path: Path, restart: Restart
) -> None:
    def gone(request: Request) -> Response:
        raise errors.ConnectionLost("gone")

    VirtualClock(gone).compute(FakeBackend().chat("x"), store=path)
    outcomes = rows(path, "SELECT outcome, billed, error FROM requests")
    assert outcomes == [("unknown", "unknown", "ConnectionLost: gone")] * 2
    restart()
    FakeBackend().chat("x").compute(store=path)
    assert len(report().unknown) == 1


@pytest.mark.parametrize("calls", [1, 5])
def test_an_answer_that_comes_after_its_run_was_stopped_is_kept(
    path: Path, restart: Restart, calls: int
) -> None:
    """A single one is replayed; of a list the whole response is kept, for it was not taken apart."""

    def start() -> tuple[VirtualClock, Any]:
        llm = Counter()
        clock = VirtualClock(llm.answer, request_seconds=lambda request: 5.0)
        run = clock.run([llm.complete(f"word {i}") for i in range(calls)], store=path)
        clock.tell(0.0, ("submit", run))
        return clock, run

    clock, run = start()
    clock.tell(1.0, ("stop", run, 0.0))
    clock.drive()
    assert run.count_states() == {"interrupted": calls} and clock.now == 5.0
    ((outcome, raw),) = rows(path, "SELECT outcome, raw FROM requests")
    restart()
    clock, run = start()
    clock.drive()
    if calls == 1:
        assert (outcome, raw) == ("answered", None)
        assert run.count_states() == {"replayed": 1} and not run.unknown
    else:
        assert outcome == "unknown" and raw.count("#") == calls
        assert run.count_states() == {"done": calls} and len(run.unknown) == calls


def test_an_unknown_list_is_one_request(path: Path, restart: Restart) -> None:
    """The report has it for each of its calls, and counts it once."""
    llm = Counter()

    def session(*stops: float) -> str:
        clock = VirtualClock(llm.answer, request_seconds=lambda request: 5.0)
        run = clock.run([llm.complete(f"word {i}") for i in range(10)], store=path)
        clock.tell(0.0, ("submit", run))
        for seconds in stops:
            clock.tell(seconds, ("stop", run, 0.0))
        clock.drive()
        made = RunReport.of(run)
        assert len(made.unknown) == (0 if stops else 10)
        assert len({unknown.request for unknown in made.unknown}) == (0 if stops else 1)
        assert RunReport.from_json(made.to_json()).unknown == made.unknown
        restart()
        return " ".join(str(made).split())

    session(1.0)
    again, settled = session(), session()
    assert "10 calls bought again, because an earlier request has no known answer; that" in again
    assert again.count("counter.complete fake-1, sent ") == 1 and " for 10 calls (at " in again
    assert "1 request of earlier runs for these calls may have been billed besides" in settled


def test_nothing_is_sent_after_a_stop_that_comes_while_answers_are_looked_up(path: Path) -> None:
    llm = Counter()
    for seconds in (0.5, 1.5):  # during the look-up, and while the intent is written
        clock = VirtualClock(llm.answer, store_seconds=1.0)
        run = clock.run([llm.chat("x"), llm.complete("y"), llm.complete("z")], store=path)
        clock.tell(0.0, ("submit", run))
        clock.tell(seconds, ("stop", run, 10.0))
        clock.drive()
        assert run.count_states() == {"not_started": 3} and not clock.sent
        assert all(not gate.in_flight for gate in clock.brain.gates.by_scope.values())
    assert rows(path, "SELECT DISTINCT outcome FROM requests") == [("withdrawn",)]
    run = clock.run(llm.chat("x"), store=path)
    clock.tell(0.0, ("submit", run))
    clock.drive()
    assert not run.unknown  # it was never sent


def test_what_was_taken_stays_taken_when_the_store_is_opened_again(
    path: Path, restart: Restart
) -> None:
    lazy = Counter().chat(ask(x="y")).compute(store=path)
    restart()
    with context.set(eager=True, store=path):
        llm = Counter()
        assert llm.chat(ask(x="y")) == lazy
        store.close()
        assert llm.chat(ask(x="y")) != lazy


def test_an_answer_that_another_draw_took_is_bought_anew(path: Path, restart: Restart) -> None:
    """Also by the draw that it was bought for."""

    def lazy() -> str:
        return Counter().chat(ask(x="y")).compute(store=path)

    first = lazy()
    restart()
    with context.set(eager=True, store=path):
        assert Counter().chat(ask(x="y")) == first
    assert lazy() != first


def test_the_answers_of_a_task_serve_no_other_call(path: Path, restart: Restart) -> None:
    """Its scope is forgotten when its run has ended, but not that its answers are taken."""

    @feste.task(emits=True)
    def emitting(llm: Any) -> Any:
        return llm.chat("same")

    emitted = emitting(Counter()).compute(store=path)
    restart()
    assert emitting(Counter()).compute(store=path) == emitted
    assert Counter().chat("same").compute(store=path) != emitted


def test_a_draw_that_took_an_answer_keeps_it(path: Path, restart: Restart) -> None:
    first = Counter().chat("x y").compute(store=path)
    restart()
    node = Counter().chat(Prompt("x {{ z }}")(z="y"))
    assert node.compute(store=path, keep="none") == first
    assert node.compute(store=path, keep="none") == first


def test_equal_ordinals_find_each_other() -> None:
    """Draws of an edited program ask in any order, and get the answers in theirs."""
    from feste.store.claims import Claims

    claims = Claims()
    claims.learn("key", [(10 + n, f"main/old.{n}") for n in reversed(range(5))])
    order = [3, 0, 4, 1, 2, 5]
    taken = [claims.take("key", draw.Draw("main", "new", n)) for n in order]
    assert taken == [13, 10, 14, 11, 12, None]


def test_the_report_tells_of_new_samples_of_the_same(path: Path) -> None:
    """As when the cell of a notebook that makes the nodes is run again."""
    prompts = ["a", "b", "c"]
    for _ in range(2):
        llm = Counter()
        nodes = [llm.chat(p) for p in prompts]
        feste.compute(nodes, store=path)
    assert report().resampled == 3
    told = " ".join(str(report()).split())
    assert "3 calls bought though equal ones had been answered: nodes written anew" in told
    feste.compute(nodes, store=path)
    assert report().resampled == 0 and "anew" not in str(report())
    feste.compute([Counter().embed("x") for _ in range(3)], store=path)
    assert report().resampled == 0


def test_draws_that_come_later_keep_their_answers(path: Path, restart: Restart) -> None:
    """The third of five equal calls failed; it does not take the fourth's answer in the rerun."""
    failing = [True]

    class Shaky(Counter):
        plugin = "shaky"
        asked = 0

        def answer(self, request: Request) -> Response:
            Shaky.asked += 1
            if Shaky.asked == 3 and failing[0]:
                raise errors.InvalidRequest("no")
            return super().answer(request)

        async def _send(self, request: Request, on_chunk: Any = None) -> Response:
            return self.answer(request)

        chat = Operation(
            prepare=FakeBackend._prepare_chat, send=_send, parse=FakeBackend._parse_text
        )

    def program() -> list[Any]:
        llm = Shaky()
        calls = [llm.chat("same").compute(store=path, on_error="return") for _ in range(5)]
        return [None if isinstance(value, errors.FesteError) else value for value in calls]

    first = program()
    assert first[2] is None and None not in first[:2] + first[3:]
    failing[0] = False
    restart()
    second = program()
    assert second[:2] == first[:2] and second[3:] == first[3:]
    assert second[2] not in first


def test_tasks_keep_the_answers_of_their_own_calls(path: Path, restart: Restart) -> None:
    """Two tasks ask the same; in the rerun the other one asks first, and takes nothing of the first."""
    import threading

    asked = threading.Event()

    class Telling(Counter):
        plugin = "telling"

        def answer(self, request: Request) -> Response:
            asked.set()
            return super().answer(request)

    @feste.task(emits=True)
    def agent(name: str) -> Any:
        return Telling().chat("same")

    @feste.task
    def late(name: str) -> str:
        asked.wait(5)
        return name

    asked.set()
    bob = agent(late("bob")).compute(store=path)
    restart()
    asked.clear()
    both = feste.compute([agent("ann"), agent(late("bob"))], store=path)[0]
    assert both[1] == bob != both[0]


def test_an_equal_call_is_found_where_ordinals_have_shifted(path: Path, restart: Restart) -> None:
    """One was tried without a store first; the next run of the program leaves that out."""
    Counter().chat("x").compute()
    stored = Counter().chat("x").compute(store=path)
    restart()
    assert Counter().chat("x").compute(store=path) == stored


def test_a_second_answer_to_a_call_does_not_replace_the_first(path: Path) -> None:
    """It was paid for, so it is kept with its request."""
    from feste.store.journal import outcome_of
    from feste.store.rows import Answer

    request = dataclasses.replace(BASE, draws=(draw.Draw("main", "f", 0),))
    journal = opened(path)
    for text in ("first", "second"):
        number = outcome_of(journal.intend, request, [request])
        answer = Response(text)
        outcome_of(journal.record, [Answer(request, answer)], number=number, response=answer)
    store.close()
    ((kept,),) = rows(path, "SELECT response FROM answers")
    assert "first" in kept
    (none, spare) = rows(path, "SELECT raw FROM requests ORDER BY id")
    assert none == (None,) and "second" in spare[0]


def test_a_store_given_to_compute_holds_inside_tasks_of_a_plain_get_function(path: Path) -> None:
    from dask.threaded import get

    @feste.task
    def inner(text: str) -> Any:
        return Counter().chat(text).compute()

    feste.compute(inner("x"), store=path, scheduler=get)
    store.close()
    assert len(rows(path, "SELECT * FROM answers")) == 1
