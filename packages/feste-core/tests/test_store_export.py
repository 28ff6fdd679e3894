"""Export: the answers of a store for other programs."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feste.backend import Request, Usage
from feste.draw import Draw
from feste.errors import ConfigError, JournalError
from feste.store.contents.export import export
from feste.store.contents.reader import Reader

Run = Callable[..., subprocess.CompletedProcess[str]]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


def test_a_line_has_all_that_is_known_of_an_answer(
    store: Path, filler: Any, call: Any, tmp_path: Path
) -> None:
    """Request, response, text, usage, and where it came from."""
    with filler(store) as session:
        session.buy(call("Hi.", n=3))
        session.cached(call("Ho."), "cached reply")

    done = export(store, tmp_path / "out.jsonl")
    bought, cached = lines(tmp_path / "out.jsonl")
    moment = datetime.fromisoformat(bought.pop("kept"))

    assert (done.answers, done.damaged) == (2, ())
    assert bought == {
        "key": call("Hi.").key,
        "draw": str(call("Hi.", n=3).draws[0]),
        "plugin": "echo",
        "operation": "chat",
        "endpoint": "https://api.test/v1",
        "model": "m-1",
        "request": call("Hi.").body,
        "response": {"choices": [{"message": {"role": "assistant", "content": "reply"}}]},
        "text": "reply",
        "usage": {"input": 10, "output": 5, "cached": 0},
        "request_id": "r-1",
        "session": 1,
        "run": "run-1",
        "source": "bought",
    }
    assert moment.tzinfo is not None
    assert (cached["source"], cached["session"], cached["usage"]) == ("cache", None, None)
    assert (cached["plugin"], cached["model"], cached["text"]) == ("echo", "m-1", "cached reply")


def test_a_store_without_prompts(store: Path, filler: Any, call: Any, tmp_path: Path) -> None:
    """The request is null; what the request's row has is there."""
    with filler(store, prompts=False) as session:
        session.buy(call("secret"))
        session.cached(call("other"), "reply")

    export(store, tmp_path / "out.jsonl")
    bought, cached = lines(tmp_path / "out.jsonl")

    assert (bought["request"], bought["plugin"], bought["model"]) == (None, "echo", "m-1")
    assert (cached["request"], cached["plugin"], cached["model"]) == (None, None, None)
    assert b"secret" not in store.read_bytes()


def test_only_one_session(store: Path, filler: Any, call: Any, tmp_path: Path) -> None:
    """``session`` leaves out what others bought; one that does not exist is an error."""
    for text in ("one", "two"):
        with filler(store) as session:
            session.buy(call(text))

    export(store, tmp_path / "out.jsonl", session=2)

    assert [line["key"] for line in lines(tmp_path / "out.jsonl")] == [call("two").key]
    with pytest.raises(JournalError, match="no session 3"):
        export(store, tmp_path / "none.jsonl", session=3)
    assert {path.name for path in tmp_path.glob("*none*")} == set()


def test_damaged_rows_are_left_out_and_named(
    store: Path, filler: Any, call: Any, feste_command: Run, damage: Any
) -> None:
    """The good ones are written; the exit code is 1."""
    with filler(store) as session:
        for text in ("one", "two", "three"):
            session.buy(call(text))
    three = call("three").key
    damage(store, "UPDATE answers SET draw = 'x' WHERE id = 1")
    damage(store, f"UPDATE prompts SET request = '[]' WHERE key = '{three}'")
    damage(store, "UPDATE requests SET run = 'x' WHERE id = 3")

    done = feste_command("store", "export", store, "--out", "-")
    two, last = [json.loads(line) for line in done.stdout.splitlines()]

    assert done.returncode == 1
    assert f"3 damaged rows left out: answers 1, prompts {three}, requests 3" in done.stderr
    assert two["text"] == "reply"
    assert (last["key"], last["request"], last["run"]) == (three, None, None)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_file_is_private_and_appears_whole(
    store: Path, filler: Any, call: Any, tmp_path: Path, format: Any
) -> None:
    """Mode 0600; an existing file is replaced only on request; a failure leaves nothing."""
    if format == "parquet":
        pytest.importorskip("pyarrow")
    with filler(store) as session:
        session.buy(call("one"))
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "answers"
    out.write_text("mine")
    out.chmod(0o644)

    with pytest.raises(ConfigError, match="exists"):
        export(store, out, format)
    assert out.read_text() == "mine"
    export(store, out, format, force=True)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == ["answers"]
    with pytest.raises(JournalError, match="cannot be written"):
        export(store, tmp_path / "no" / "such", format)
    for own in ("runs.db", "runs.db-wal", "runs.db.lock"):
        with pytest.raises(ConfigError, match="part of the store"):
            export(store, tmp_path / own, format, force=True)


def test_parquet_needs_a_file_and_pyarrow(
    store: Path, filler: Any, call: Any, feste_command: Run, tmp_path: Path
) -> None:
    """Without pyarrow the error names the extra."""
    with filler(store) as session:
        session.buy(call("one"))
    (tmp_path / "pyarrow.py").write_text("raise ImportError('not here')")
    more = ("--format", "parquet")

    piped = feste_command("store", "export", store, "--out", "-", *more)
    absent = feste_command(
        "store", "export", store, "--out", tmp_path / "x", *more, cwd=tmp_path
    )  # `python -m` looks into this folder first

    assert piped.returncode == absent.returncode == 1
    assert "Parquet needs a file" in piped.stderr
    assert "pip install 'feste-core[parquet]'" in absent.stderr
    assert not (tmp_path / "x").exists()


def test_the_name_tells_the_format(
    store: Path, filler: Any, call: Any, feste_command: Run, tmp_path: Path
) -> None:
    """Unless an option says otherwise, a file that ends in .parquet is one."""
    pytest.importorskip("pyarrow")
    with filler(store) as session:
        session.buy(call("one"))

    for name, option, begins in (
        ("a.parquet", (), b"PAR1"),
        ("b.parquet", ("--format", "jsonl"), b"{"),
        ("c.json", (), b"{"),
    ):
        done = feste_command("store", "export", store, "--out", tmp_path / name, *option)

        assert done.returncode == 0 and (tmp_path / name).read_bytes().startswith(begins)


def test_parquet_has_the_same_rows(store: Path, filler: Any, call: Any, tmp_path: Path) -> None:
    """Bodies are JSON, tokens are columns, the moment has its type, half a character is U+FFFD."""
    parquet = pytest.importorskip("pyarrow.parquet")
    with filler(store) as session:
        session.buy(call("one \ud800"), payload={"text": "half \ud83d"})
        session.buy(call("two"), usage=None)
    export(store, tmp_path / "out.jsonl")
    export(store, tmp_path / "out.parquet", "parquet")

    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()

    assert [row["text"] for row in rows] == ["half \ufffd", "reply"]
    assert [row["input_tokens"] for row in rows] == [10, None]
    for row, line in zip(rows, lines(tmp_path / "out.jsonl"), strict=True):
        assert json.loads(row["request"]) == line["request"]
        assert json.loads(row["response"]) == line["response"]
        assert row["kept"] == datetime.fromisoformat(line["kept"])
        for name in ("key", "draw", "model", "request_id", "session", "run", "source"):
            assert row[name] == line[name]


def test_numbers_that_json_does_not_have(
    store: Path, filler: Any, call: Any, tmp_path: Path
) -> None:
    """NaN and infinities become null, so that each line is JSON for every reader."""
    with filler(store) as session:
        session.buy(call("one"), payload={"logprobs": [float("-inf"), float("nan"), 0.5]})

    export(store, tmp_path / "out.jsonl")
    text = (tmp_path / "out.jsonl").read_text()

    assert '"logprobs":[null,null,0.5]' in text


def test_an_export_beside_a_writer(store: Path, filler: Any, call: Any, tmp_path: Path) -> None:
    """What was kept when it began is written, and the writer goes on."""
    with filler(store) as session:
        for number in range(250):
            session.buy(call(f"text {number}"))
        done = export(store, tmp_path / "out.jsonl")
        session.buy(call("later"))

    assert done.answers == 250
    assert len({line["key"] for line in lines(tmp_path / "out.jsonl")}) == 250


def test_a_writer_that_comes_while_it_is_read(store: Path, filler: Any, call: Any) -> None:
    """The reader sees its rows, and takes none for damaged."""
    with filler(store) as session:
        session.buy(*[call(f"text {number}" * 100) for number in range(300)])

    with Reader(store) as reader:
        answers = reader.answers()
        keys = [next(answers).answer["key"]]
        with filler(store) as session:
            session.buy(*[call(f"more {number}" * 1000) for number in range(300)])
        keys += [kept.answer["key"] for kept in answers]
        total = reader.count("answers")

    assert (len(keys), total, reader.damaged) == (300, 600, set())


#: Any text at all, with what terminals, CSV and JSON stumble over more often.
texts = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.sampled_from(["\x1b[2J", "=cmd()", '"', "\\", "\0", "\x7f", "\ud800", "\u2028", "\r\n", ""]),
)
bound = st.text()  # without lone surrogates


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_text_comes_out_as_it_went_in(tmp_path: Path, filler: Any, data: st.DataObject) -> None:
    """In every field; the file is ASCII without control characters."""
    store, out = tmp_path / "any.db", tmp_path / "any.jsonl"
    for path in tmp_path.glob("any*"):
        path.unlink()
    plugin, operation, endpoint = (data.draw(bound) for _ in range(3))
    body = {data.draw(texts): data.draw(texts), "model": data.draw(bound)}
    text, other, request_id = data.draw(texts), data.draw(texts), data.draw(bound)
    drawn = Draw(data.draw(bound), "f", 0)
    call = Request(plugin, operation, endpoint, body, draws=(drawn,))
    payload = {"choices": [{"text": text}], f"other {other}": [other]}
    with filler(store) as session:
        session.prompts = data.draw(st.booleans())
        session.buy(call, payload=payload, usage=Usage(1, 2, 3), request_id=request_id)
        session.buy(replace(call, draws=(Draw("main", "g", 0),)), payload=text, usage=None)

    export(store, out)
    raw = out.read_bytes()
    first, second = map(json.loads, raw.splitlines())

    assert not any((byte < 32 and byte != 10) or byte > 126 for byte in raw)
    assert (first["plugin"], first["operation"], first["endpoint"]) == (
        plugin,
        operation,
        endpoint,
    )
    assert first["request"] == (body if session.prompts else None)
    assert first["model"] == (str(body.get("model") or ""))
    assert (first["response"], first["text"], first["draw"]) == (payload, text, str(drawn))
    assert first["request_id"] == request_id
    assert (second["text"], second["response"]) == (text, text)
