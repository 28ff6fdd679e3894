"""Any text in every field that reaches a store comes back as it went in, and never acts as SQL."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from feste.backend import Request, Response, Usage
from feste.draw import Draw
from feste.errors import InvalidRequest
from feste.store import opening, schema
from feste.store.contents.purge import purge
from feste.store.contents.reader import Reader
from feste.store.contents.summary import summarize
from feste.store.journal import Journal
from feste.store.journal import outcome_of as ask
from feste.store.repair.verify import verify
from feste.store.rows import Answer, Wanted
from tests.fuzz.sizes import cases

TEXTS = st.one_of(
    st.text(),
    st.sampled_from(
        [
            "'; DROP TABLE answers; --",
            "' OR 1=1 --",
            '"; DELETE FROM requests; --',
            "x') UNION SELECT sql FROM sqlite_master --",
            "$.model', 1) OR 1 --",
            "%_[]*?",
            "?1 :id @x $y",
            "\0'; VACUUM INTO '/tmp/x'; --",
            "\udfff\ud800",
            "answers",
            "0x27",
            "\x1a\x08\\",
        ]
    ),
)
#: Names that Feste makes; they are hashes and numbers, so halves of surrogate pairs are not in them.
OWN = TEXTS.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
#: Each makes a store.
CASES = cases(8)


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "BALLAST", 1 << 12)


def request(texts: dict[str, Any], model: str) -> Request:
    body = {"model": model, "prompt": texts["prompt"], texts["field"]: [texts["prompt"]]}
    draws = (Draw(texts["scope"], texts["draw"], 0),)
    return Request(texts["plugin"], texts["operation"], texts["endpoint"], body, draws=draws)


FIELDS = "prompt field scope draw plugin operation endpoint run answer id error".split()


@CASES
@example(dict.fromkeys(FIELDS[1:], "") | {"prompt": "\udfff\ud800"}, ["\ud800", "0"])
@given(
    st.fixed_dictionaries(
        {name: OWN if name in ("scope", "draw") else TEXTS for name in FIELDS},
    ),
    st.lists(TEXTS, min_size=2, max_size=2, unique=True),
)
def test_any_text_comes_back_and_is_no_sql(texts: dict[str, Any], models: list[str]) -> None:
    """Two calls that differ in their model alone: each finds its answer, is listed, and is purged alone."""
    one, other = (request(texts, model) for model in models)
    if "model" in (texts["field"],):
        return  # it is the model then, and both are one
    said = Response({"text": texts["answer"]}, Usage(1, 2), request_id=texts["id"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.db"
        with closing(Journal(path)) as journal:
            for asked in (one, other):
                number = ask(journal.intend, asked, [asked], run=texts["run"])
                ask(journal.record, [Answer(asked, said)], number=number, response=said)
            number = ask(journal.intend, one, [one], run=texts["run"])
            ask(journal.finish, number, "failed", InvalidRequest(texts["error"]))
        with closing(Journal(path)) as journal:
            wanted = [Wanted(asked.key, asked.draws[0], True) for asked in (one, other)]
            found = ask(journal.recall, wanted)
        with Reader(path) as reader:
            summary = summarize(reader)
            kept = list(reader.answers())
        verdict = verify(path)

        assert [each.response for each in found] == [said, said]
        assert verdict.problems == []
        assert (len(kept), sum(row.calls for row in summary.operations.values())) == (2, 2)

        gone = purge(path, model=models[0])
        with closing(Journal(path)) as journal:
            left = ask(journal.recall, wanted)
            tables = journal.run(schema.tables)

        assert gone.answers == 1
        assert [each.response for each in left] == [None, said]
        assert tables == set(schema.STATEMENTS)
        assert purge(path, key=texts["prompt"]).answers == 0
        assert verify(path).problems == []
