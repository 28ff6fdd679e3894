"""Every row that Feste writes is shown, exported and called good; a row of another form is none of it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import feste
from feste import store
from feste.backend import Backend, Operation, Request, Response, Usage
from feste.draw import Draw
from feste.errors import InvalidRequest, NotRepeated, RunFailed
from feste.store import schema
from feste.store.contents.reader import Reader
from feste.store.contents.summary import summarize
from feste.store.journal import Journal
from feste.store.journal import outcome_of as ask
from feste.store.repair.salvage import salvage
from feste.store.repair.verify import verify
from feste.store.rows import Wanted, draw_of
from feste.testing import FakeBackend

GOOD = Response({"text": "yes"}, Usage(1, 2), request_id="r-1")


class Odd(Backend):
    """A backend of a third party that passes on what it was given.

    :param body: what its requests hold besides the prompt.
    :param response: what comes back, or the error.
    :param names: other fields of its requests.
    """

    plugin = "odd"

    def __init__(self, body: Any, response: Any, names: Any) -> None:
        self.body, self.response, self.names = body, response, names
        self.sent = 0

    def _prepare(self, prompt: str) -> Request:
        names = {"plugin": "odd", "operation": "say", "endpoint": "plugin:odd", **self.names}
        return Request(body={"prompt": prompt, **self.body}, **names)

    async def _send(self, request: Request, on_chunk: Any = None) -> Response:
        self.sent += 1
        if isinstance(self.response, Exception):
            raise self.response
        assert isinstance(self.response, Response)
        return self.response

    def _parse(self, response: Response, arguments: Any) -> Any:
        return response.payload

    say = Operation(prepare=_prepare, send=_send, parse=_parse)


ANSWERS: dict[str, tuple[Any, Any, Any]] = {
    "no model": ({}, GOOD, {}),
    "a model that is none": ({"model": None}, GOOD, {}),
    "a model that is a number": ({"model": 5}, GOOD, {}),
    "a model that is a list": ({"model": ["a", {"b": 1}]}, GOOD, {}),
    "a model of half a character": ({"model": "\ud800\0"}, GOOD, {}),
    "an odd endpoint": ({"model": "m"}, GOOD, {"endpoint": "\x1b[2J\ud800 \0"}),
    "an empty endpoint": ({"model": "m"}, GOOD, {"endpoint": ""}),
    "an ID that is a number": ({}, Response("x", request_id=7), {}),  # type: ignore[arg-type]
    "an ID of bytes": ({}, Response("x", request_id=b"7"), {}),  # type: ignore[arg-type]
    "an odd ID": ({}, Response("x", request_id="\ud800\0"), {}),
    "counts that are fractions": ({}, Response("x", Usage(1.5, 2.5)), {}),  # type: ignore[arg-type]
    "counts that are huge": ({}, Response("x", Usage(1 << 70, -1)), {}),
    "counts without end": ({}, Response("x", Usage(float("inf"))), {}),  # type: ignore[arg-type]
    "counts that are none": ({}, Response("x", Usage(None)), {}),  # type: ignore[arg-type]
    "counts that are texts": ({}, Response("x", Usage("5")), {}),  # type: ignore[arg-type]
    "no payload": ({}, Response(None), {}),
    "an odd payload": ({}, Response({"\ud800": [float("nan"), "\0\udfff", 1 << 900]}), {}),
}
FAILURES: dict[str, Any] = {
    "a status that is a text": InvalidRequest("no", status="400"),  # type: ignore[arg-type]
    "a status that is a fraction": InvalidRequest("no", status=400.0),  # type: ignore[arg-type]
    "a status that is an object": InvalidRequest("no", status=object()),  # type: ignore[arg-type]
    "a status that is huge": InvalidRequest("no", status=10**40),
    "an ID that is a number": InvalidRequest("no", request_id=5),  # type: ignore[arg-type]
    "billed by a number": InvalidRequest("no", billed=3),  # type: ignore[arg-type]
    "a message of half a character": InvalidRequest("\ud800\0"),
    "a message that is a number": InvalidRequest(5),  # type: ignore[arg-type]
    "an error that is none of Feste's": ValueError("no"),
}


def look(path: Path) -> Any:
    """Return the figures of a store in which every row must be good."""
    with Reader(path) as reader:
        summary = summarize(reader)
        kept = list(reader.answers())
        reader.quarantine()

        assert reader.damaged == set()
    assert verify(path).problems == []
    return len(kept), summary


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_a_third_party_passes_on_is_bought_once_and_shown(
    kind: str, tmp_path: Path, restart: Callable[[], None]
) -> None:
    """A paid answer with odd things beside it is kept, found again, and no damaged row."""
    llm = Odd(*ANSWERS[kind])
    first = llm.say("Hi").compute(store=tmp_path / "s.db")
    restart()
    again = llm.say("Hi").compute(store=tmp_path / "s.db")
    store.close()
    kept, summary = look(tmp_path / "s.db")

    assert repr(again) == repr(first)
    assert (llm.sent, kept, len(summary.operations)) == (1, 1, 1)


@pytest.mark.parametrize("kind", FAILURES)
def test_what_a_third_party_raises_is_shown(kind: str, tmp_path: Path) -> None:
    """The row of a request that failed is good whatever its error holds."""
    llm = Odd({"model": "m"}, FAILURES[kind], {})
    with pytest.raises(RunFailed):
        llm.say("Hi").compute(store=tmp_path / "s.db")
    store.close()
    _, summary = look(tmp_path / "s.db")

    assert [(row.failed, row.unknown) for row in summary.operations.values()] in (
        [(1, 0)],
        [(0, 1)],
    )


@pytest.mark.parametrize("name", ["plugin", "operation", "endpoint", "parser"])
def test_a_request_with_a_name_that_is_no_text_is_not_sent(name: str) -> None:
    """Its key and its rows could not be told from those of a text."""
    llm = Odd({}, GOOD, {name: 5})
    with pytest.raises(RunFailed, match=f"{name} of a request is an int, not a str"):
        llm.say("Hi").compute()

    assert llm.sent == 0


def test_every_kind_of_row_is_good(tmp_path: Path, restart: Callable[[], None]) -> None:
    """Tasks that ran, raised and were left; answers bought, cached, failed, unknown and withdrawn."""
    path, cache = tmp_path / "s.db", tmp_path / "c.db"

    @feste.task(once=True)
    def sends(x: Any) -> Any:
        if x == "bad":
            raise ValueError("\x1b\ud800")
        return {"sent": x}

    llm = FakeBackend("m-1", fail={"bad": InvalidRequest("no", status=400)})
    for n in range(2):
        nodes = [llm.chat("a"), llm.embed("b"), llm.complete("c"), sends(1), sends(None)]
        feste.compute(
            nodes, llm.chat("bad"), sends("bad"), store=path, cache=cache, on_error="return"
        )
        restart()
        if n == 0:
            store.close()
    feste.compute(llm.chat("secret"), store=path, store_prompts=False)
    with pytest.raises(RunFailed) as caught:
        sends("bad").compute(store=path)
    assert isinstance(caught.value.errors[0].__cause__ or caught.value.errors[0], NotRepeated)
    store.close()
    with closing(Journal(path)) as journal:
        call = Odd({"model": "m"}, GOOD, {}).say.prepare(["x"])
        call = replace(call, draws=(Draw("main", "f" * 24, 0),))
        for outcome in ("withdrawn", "unknown", None):
            number = ask(journal.intend, call, [call], run="night")
            if outcome:
                ask(journal.finish, number, outcome, InvalidRequest("why"))
        spoiled = "UPDATE answers SET response = 'x' WHERE id = 1"
        journal.run(lambda conn: conn.execute(spoiled))
        first = "SELECT * FROM answers WHERE id = 1"
        row = journal.run(lambda conn: conn.execute(first).fetchone())
        wanted = Wanted(row[1], draw_of(row[2]), True)
        assert ask(journal.recall, [wanted])[0].damaged == 1
    _, summary = look(path)
    look(cache)
    with Reader(path) as reader:
        outcomes = {row["outcome"] for row in reader.good("requests", "SELECT * FROM requests")}

        assert len(reader.quarantine()) == 1
    assert outcomes == {"answered", "failed", "withdrawn", "unknown", "sent"}
    assert set(summary.tasks[next(iter(summary.tasks))]) == {"answered", "failed"}


def test_a_row_of_another_form_is_told_and_not_salvaged(tmp_path: Path) -> None:
    """Its seal is right, so whoever wrote it was not Feste: what shows a store leaves it out alike."""
    path = tmp_path / "s.db"
    llm = Odd({"model": "m"}, GOOD, {})
    llm.say("Hi").compute(store=path)
    store.close()
    with closing(sqlite3.connect(path)) as conn:
        session = schema.row_of("sessions", conn.execute("SELECT * FROM sessions").fetchone())
        schema.write(conn, "sessions", {**session, "id": 7, "pid": 1 << 40, "ended": None})
        conn.commit()
    with Reader(path) as reader:
        summary = summarize(reader)

        assert (set(summary.sessions), reader.damaged) == ({1}, {("sessions", 7)})
    assert verify(path).problems == ["row 7 of sessions has values that Feste does not write"]

    done = salvage(path)

    assert (done.kept["sessions"], done.lost["sessions"], done.kept["answers"]) == (1, 1, 1)
    assert verify(path).problems == []
