"""Purge: what is deleted is gone from the files, and the rest is as it was."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feste.backend import Request, Response
from feste.errors import (
    ConfigError,
    CountMismatch,
    InvalidRequest,
    JournalDamaged,
    JournalError,
    JournalFailed,
    JournalLocked,
)
from feste.store import opened
from feste.store.contents.purge import Purged, purge
from feste.store.contents.reader import Reader
from feste.store.journal import Journal
from feste.store.lock import Lock
from feste.store.rows import Wanted


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


def rows(store: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as conn:
        return conn.execute(query).fetchall()


def reply(text: str) -> dict[str, str]:
    return {"text": f"reply to {text}"}


def counts(done: Purged) -> tuple[int, int, int]:
    return done.answers, done.prompts, done.requests


def answers_found(store: Path, *calls: Request) -> list[str | None]:
    """The stored answers to some calls, as the next program finds them."""
    found: list[Any] = []
    journal = Journal(store)
    wanted = [Wanted(call.key, call.draws[0], True) for call in calls]
    journal.recall(wanted, lambda ok, value: found.extend(value))
    journal.close()
    return [f.response and f.response.payload["text"] for f in found]


@pytest.mark.parametrize("choice", ["before", "session", "model", "key"])
def test_what_is_purged_is_gone_from_the_files(
    store: Path, filler: Any, call: Any, choice: str
) -> None:
    """Question and answer, also of failed and lost requests; the rest is found again."""
    mine = call("apricot", model="m-old")
    with filler(store) as session:
        session.buy(mine, payload=reply("apricot"))
        bad = Response({"text": "apricot jam"})
        session.fail(mine, error=CountMismatch("for apricot"), response=bad)
        session.lose(mine)
    now = time.time()
    with filler(store) as session:
        session.buy(call("banana"), payload=reply("banana"))
    chosen = {"before": now, "session": 1, "model": "m-old", "key": mine.key}[choice]
    assert b"apricot" in all_bytes(store.parent)

    planned = purge(store, **{choice: chosen}, dry_run=True)
    assert b"apricot" in all_bytes(store.parent)
    done = purge(store, **{choice: chosen})

    assert planned == done and counts(done) == (1, 1, 3)
    assert b"apricot" not in all_bytes(store.parent)
    assert mine.key.encode() not in all_bytes(store.parent)
    assert rows(store, "SELECT count(*) FROM sessions") == [(2,)]
    assert answers_found(store, mine, call("banana")) == [None, "reply to banana"]


def test_choices_narrow_each_other(store: Path, filler: Any, call: Any) -> None:
    """Only what fits all of them goes."""
    for model in ("m-1", "m-2"):
        with filler(store) as session:
            session.buy(call("one", model="m-1"), payload=reply("one"))
            session.buy(call("two", model=model), payload=reply("two"))

    done = purge(store, session=2, model="m-2")

    assert counts(done) == (1, 1, 1)
    assert rows(store, "SELECT model FROM requests ORDER BY id") == [("m-1",)] * 3


def test_a_prompt_stays_while_something_needs_it(store: Path, filler: Any, call: Any) -> None:
    """Another answer to it, or a request whose end is unknown; its key deletes it all the same."""
    with filler(store) as session:
        session.buy(call("apricot"), call("banana"))
    with filler(store) as session:
        session.buy(call("apricot", n=1))
        session.lose(call("banana"), call("cherry"))

    first = purge(store, session=1)
    assert counts(first) == (2, 0, 1)
    second = purge(store, key=call("banana").key)

    assert counts(second) == (0, 1, 0)
    files = all_bytes(store.parent)
    assert b"apricot" in files and b"cherry" in files and b"banana" not in files


def test_a_request_that_answers_other_calls_too_stays(store: Path, filler: Any, call: Any) -> None:
    """But not what its response said, if that could not be used."""
    apricot, banana = call("apricot"), call("banana")
    with filler(store) as session:
        raw = Response([reply("apricot"), reply("banana")])
        session.fail(apricot, banana, error=CountMismatch("odd apricot"), response=raw)
        session.buy(apricot, banana, payload={"text": "reply"})

    done = purge(store, key=apricot.key)

    assert counts(done) == (1, 1, 0)
    assert b"apricot" not in all_bytes(store.parent)
    assert answers_found(store, apricot, banana) == [None, "reply"]


def test_answers_of_a_cache_have_no_request(store: Path, filler: Any, call: Any) -> None:
    """Their model is known from their prompt."""
    with filler(store) as session:
        session.cached(call("one", model="m-1"), "a")
        session.cached(call("two", model="m-2"), "b")

    assert counts(purge(store, model="m-2")) == (1, 1, 0)
    assert counts(purge(store, session=1)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("which", "left"),
    [
        ("failed", {"mail", "ship"}),
        ("unknown", {"mail", "pay"}),
        ("all", set()),
    ],
)
def test_tasks_go_only_by_name(store: Path, filler: Any, call: Any, which: Any, left: Any) -> None:
    """Other choices leave ``once=True`` tasks, so that none runs twice by mistake."""
    with filler(store) as session:
        session.task("mail")
        session.task("pay", "failed")
        session.task("ship", "unknown")
        session.buy(call("one"), payload=reply("one"))

    spared = purge(store, before=time.time(), dry_run=True)
    done = purge(store, tasks=which)

    assert (counts(spared), spared.tasks_left) == ((1, 1, 1), 3)
    assert done.requests == 3 - len(left)
    found = {name for (name,) in rows(store, "SELECT operation FROM requests")}
    assert found == {*left, "chat"}
    assert answers_found(store, call("one")) == ["reply to one"]
    assert b"result of mail" in all_bytes(store.parent) or "mail" not in left


def test_a_task_by_its_key(store: Path, filler: Any) -> None:
    """A key names it."""
    with filler(store) as session:
        session.task("mail")
        key = session.task("pay", "unknown")

    assert counts(purge(store, key=key)) == (0, 1, 1)


def test_prompts_only(store: Path, filler: Any, call: Any) -> None:
    """The texts go, the answers stay and are found."""
    with filler(store) as session:
        session.buy(call("apricot"), payload={"text": "reply"})
        session.task("banana")

    done = purge(store, prompts_only=True)

    assert counts(done) == (0, 2, 0)
    assert b"apricot" not in all_bytes(store.parent)
    assert answers_found(store, call("apricot")) == ["reply"]


def test_prompts_of_one_session(store: Path, filler: Any, call: Any) -> None:
    """A prompt that another session's answer has too stays."""
    with filler(store) as session:
        session.buy(call("apricot"), call("banana"))
    with filler(store) as session:
        session.buy(call("banana", n=1))

    assert counts(purge(store, prompts_only=True, session=1)) == (0, 1, 0)
    assert b"banana" in all_bytes(store.parent)


def test_everything(store: Path, filler: Any, call: Any) -> None:
    """The store is as new, and can be used at once."""
    with filler(store) as session:
        session.buy(call("apricot" * 100_000))
        session.lose(call("banana"))
        session.task("cherry", "failed")

    done = purge(store, everything=True)
    assert store.stat().st_size < 50_000

    assert counts(done) == (1, 3, 3)
    for table in ("sessions", "prompts", "requests", "answers", "quarantine"):
        assert rows(store, f"SELECT count(*) FROM {table}") == [(0,)]
    files = all_bytes(store.parent)
    assert not any(text in files for text in (b"apricot", b"banana", b"cherry"))
    with filler(store) as session:
        session.buy(call("apricot"), payload=reply("apricot"))
    assert answers_found(store, call("apricot")) == ["reply to apricot"]


def test_quarantined_rows_go(store: Path, filler: Any, call: Any, damage: Any) -> None:
    """They hold text, and cannot tell what they belonged to."""
    with filler(store) as session:
        session.buy(call("apricot"), payload=reply("apricot"))
        session.buy(call("banana"), payload=reply("banana"))
    damage(store, "UPDATE answers SET kept = 0 WHERE id = 1")
    assert answers_found(store, call("apricot")) == [None]
    assert b"reply to apricot" in all_bytes(store.parent)

    assert purge(store, tasks="all").quarantine == 0
    done = purge(store, key=call("apricot").key)

    assert done.quarantine == 1
    assert b"apricot" not in all_bytes(store.parent)


def test_fewer_rows_are_not_taken_for_lost_ones(store: Path, filler: Any, call: Any) -> None:
    """After a purge of the newest rows the store opens; rows lost later are noticed."""
    with filler(store) as session:
        session.buy(call("one"), payload=reply("one"))
    with filler(store) as session:
        session.buy(call("two"))
        session.buy(call("three"))

    purge(store, session=2)
    assert answers_found(store, call("one")) == ["reply to one"]
    with filler(store) as session:
        session.buy(call("four"))
    with closing(sqlite3.connect(store)) as conn, conn:
        conn.execute("DELETE FROM answers WHERE id = (SELECT max(id) FROM answers)")

    with pytest.raises(JournalDamaged, match="lacks 1 rows at its end"):
        Journal(store)


def test_a_purge_notes_how_far_the_store_has_got(store: Path, filler: Any, call: Any) -> None:
    """Rows that are lost right after it are noticed too."""
    with filler(store) as session:
        session.buy(call("one"))
        session.buy(call("two", model="m-2"))
    purge(store, model="m-2")

    lock = Lock(store)
    try:
        assert lock.acknowledged == (1, 1)
    finally:
        lock.close()


def test_a_program_does_not_take_another_answer_for_its_own(
    store: Path, filler: Any, call: Any
) -> None:
    """Numbers of answers are used again after a purge, and what draws took is forgotten."""
    one, later = call("one"), call("one", n=5)
    with filler(store) as session:
        session.buy(one, payload=reply("one"))
    found: list[Any] = []
    wanted = [Wanted(later.key, later.draws[0], True)]
    for text in ("", "two"):
        journal = opened.opened(store)
        journal.recall(wanted, lambda ok, value: found.extend(value))
        journal.run(lambda conn: None)
        opened.close(store)
        purge(store, everything=True)
        if not text:
            with filler(store) as session:
                session.buy(call("two"), payload=reply("two"))

    assert found[0].response.payload == reply("one")
    assert found[1].response is None


def test_a_store_in_use_is_left_alone(store: Path, filler: Any, call: Any, left_open: Any) -> None:
    """A writer keeps it; counting works beside it."""
    process = left_open(store, "hello")

    with pytest.raises(JournalLocked) as caught:
        purge(store, everything=True)

    assert caught.value.pid == process.pid
    assert counts(purge(store, everything=True, dry_run=True)) == (0, 1, 1)
    assert rows(store, "SELECT outcome FROM requests") == [("sent",)]


def test_programs_that_read_meanwhile(store: Path, filler: Any, call: Any) -> None:
    """One that only has the store open does not matter; one in the middle of reading is told of."""
    for text in ("apricot", "banana", "cherry"):
        with filler(store) as session:
            session.buy(call(text))

    with Reader(store) as reader:
        purge(store, session=3)
        assert b"cherry" not in all_bytes(store.parent)
    with Reader(store) as reader:
        reader.conn.execute("BEGIN")
        assert reader.count("answers") == 2
        with pytest.raises(JournalFailed, match=r"another program is reading it.*purge again"):
            purge(store, session=2)
    assert counts(purge(store, session=2)) == (0, 0, 0)

    assert b"banana" not in all_bytes(store.parent)
    assert rows(store, "SELECT count(*) FROM answers") == [(1,)]


def test_a_choice_must_be_clear(store: Path, filler: Any, call: Any, tmp_path: Path) -> None:
    """Nothing chosen, or what excludes each other, is refused; a missing file stays missing."""
    with filler(store) as session:
        session.buy(call("one"))

    for wrong in ({}, {"everything": True, "session": 1}, {"tasks": "all", "prompts_only": True}):
        with pytest.raises(ConfigError):
            purge(store, **wrong)  # type: ignore[arg-type]
    with pytest.raises(JournalError, match="does not exist"):
        purge(tmp_path / "no.db", everything=True)
    assert not (tmp_path / "no.db").exists()


def test_copies_beside_the_store_are_named(store: Path, filler: Any, call: Any) -> None:
    """They may hold the same texts, and are not touched."""
    with filler(store) as session:
        session.buy(call("one"))
    copy = store.with_name("runs.db.tables-0")
    copy.write_bytes(store.read_bytes())

    assert purge(store, everything=True).copies == (copy,)


MODELS, TEXTS = ("m-1", "m-2"), ("apricot", "banana", "cherry")
steps = st.tuples(
    st.integers(0, 1),
    st.sampled_from(["buy", "lose", "fail"]),
    st.lists(st.sampled_from(TEXTS), min_size=1, max_size=2, unique=True),
    st.sampled_from(MODELS),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(steps, max_size=8),
    st.fixed_dictionaries(
        {},
        optional={
            "session": st.integers(1, 2),
            "model": st.sampled_from(MODELS),
            "text": st.sampled_from(TEXTS),
        },
    ).filter(bool),
)
def test_any_purge_of_any_store(
    tmp_path: Path, filler: Any, call: Any, steps: list[Any], choice: dict[str, Any]
) -> None:
    """What fits is gone, all else is there, and nothing refers to what is gone."""
    folder = tmp_path / "any"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    store, numbers = folder / "runs.db", count()
    kept: list[tuple[Request, bool]] = []
    chosen = dict(choice)
    for number in (0, 1):
        with filler(store) as session:
            for owner, what, names, model in steps:
                if owner != number:
                    continue
                calls = [call(name, model=model, n=next(numbers)) for name in names]
                if what == "buy":
                    session.buy(*calls, payload={"text": "reply"})
                    kept += [(c, _fits(c, number, choice)) for c in calls]
                elif what == "lose":
                    session.lose(*calls)
                else:
                    session.fail(*calls, error=InvalidRequest("no"))
    if "text" in choice:
        del chosen["text"]
        chosen["key"] = call(choice["text"], model=choice.get("model", "m-1")).key
    done = purge(store, **chosen)
    files = all_bytes(folder)

    if "text" in choice and "model" not in choice:  # a key is of one model
        kept = [(c, fits and c.model == "m-1") for c, fits in kept]
    left = [c for c, fits in kept if not fits]
    assert done.answers == len(kept) - len(left)
    found = rows(store, "SELECT key, draw FROM answers ORDER BY id")
    assert found == [(c.key, str(c.draws[0])) for c in left]
    assert {key for key, _ in found} <= {key for (key,) in rows(store, "SELECT key FROM prompts")}
    missing = "SELECT 1 FROM answers WHERE request NOT IN (SELECT id FROM requests)"
    assert rows(store, missing) == []
    for calls_, number, model in rows(store, "SELECT calls, session, model FROM requests"):
        keys = {key for key, _ in json.loads(calls_)}
        alone = all(
            value == {"session": number, "model": model}.get(name, chosen.get("key"))
            for name, value in chosen.items()
        ) and ("key" not in chosen or keys == {chosen["key"]})
        assert not alone or keys & {c.key for c in left}
    for text in TEXTS:
        needed = {key for (key,) in rows(store, "SELECT key FROM prompts")}
        assert (text.encode() in files) == any(
            call(text, model=model).key in needed for model in MODELS
        )


def _fits(call: Request, number: int, choice: dict[str, Any]) -> bool:
    text = call.body["messages"][0]["content"]
    mine = {"session": number + 1, "model": call.model, "text": text}
    return all(mine[name] == value for name, value in choice.items())
