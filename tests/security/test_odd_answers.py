"""Odd answers cost their own calls, typed as what they are, and no other; what is legal is exact.

Some 300 answers are sent over real sockets, those of one operation in one run, among good ones.
"""

from __future__ import annotations

import array
import base64
import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import feste
from feste.backend import Limits
from feste.backend.cohere import ChatParams as CohereChat
from feste.backend.cohere import Cohere, GenerateParams
from feste.backend.cohere import EmbedParams as CohereEmbed
from feste.backend.openai import ChatParams, CompleteParams, EmbedParams, OpenAI
from feste.errors import CallError, CountMismatch, MalformedResponse

sys.path.insert(0, str(Path(__file__).parent))
from odd_answers import GOOD, Odd, as_json, good, odd_server, unreadable, value_of

#: Texts that are odd, but texts.
TEXTS = {
    "empty": "",
    "NUL": "a\0b",
    "lone surrogate": "a\ud800b\udfff",
    "control": "\x1b[31mred\x1b]0;title\x07\x9b\x7f\b",
    "right to left": "\u202eabc\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "lines": "\n" * 10_000 + "\r\n\u2028\u0085\v\f",
    "5 MB": "0123456789abcde\n" * 327_680,
    "JSON": '{"error": {"message": "no"}}',
    "template": "{{ 7*7 }}{% for %}",
    "emoji": "\U0001f469\u200d\U0001f52c\ufeff\ufffe",
    "SQL": "'; DROP TABLE answers; --",
}
#: What is no text, list or object where there should be one.
VALUES = [None, True, -1, 1.5, "x", [], {}, [[]], [None], {"index": 0}]

#: Some of them.
MILD = [None, -1, "x", [None], {"index": 0}]


def put(reply: Any, path: str, value: Any) -> bytes:
    """The JSON of a reply with one part replaced; without it, if there is no value."""
    made = copy.deepcopy(reply)
    *steps, last = [int(s) if s.isdigit() else s for s in path.split(".")]
    parent = made
    for step in steps:
        parent = parent[step]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return as_json(made)


def wrong(
    reply: Any, path: str, right: tuple[type, ...] = (), wants: Any = MalformedResponse
) -> Iterator[Odd]:
    """A part that is missing, or of every type but these."""
    for value in VALUES + [...] * (type(None) not in right and not path.endswith(".0")):
        if value is ... or type(value) not in right:
            yield Odd(f"{path}: {value!r}", put(reply, path, value), wants)


def harmless(reply: Any, path: str, values: list[Any], wants: list[Any]) -> Iterator[Odd]:
    for value in values:
        yield Odd(f"harmless {path}: {str(value)[:20]!r}", put(reply, path, value), wants)


def chats() -> Iterator[Odd]:
    reply, none = good("chat", "zero"), (type(None),)
    yield from wrong(reply, "choices")
    yield from wrong(reply, "choices.0")
    yield from wrong(reply, "choices.0.message", (dict,))
    yield from wrong(reply, "choices.0.message.content", (str, *none))
    yield from wrong(reply, "choices.0.message.tool_calls", (list, *none))
    yield Odd("two choices", as_json({**reply, "choices": reply["choices"] * 2}))
    for name, text in TEXTS.items():
        yield Odd(name, as_json(good("chat", text)), [text])
    counts: list[Any] = [
        {"prompt_tokens": -5},
        {"prompt_tokens": 2**70},
        {"prompt_tokens": "9"},
        {},
    ]
    yield from harmless(reply, "usage", [*MILD, *counts, ...], ["zero"])
    yield from harmless(reply, "choices.0.index", [None, True, 7, -1, "0", ...], ["zero"])
    yield from harmless(reply, "choices.0.finish_reason", [*MILD, "\x1b[31m", ...], ["zero"])
    yield from harmless(reply, "model", MILD, ["zero"])
    yield from harmless(reply, "error", [None, "x", [], {"message": "but there is one"}], ["zero"])
    body = as_json(reply)
    yield Odd("BOM", b"\xef\xbb\xbf" + body, ["zero"])
    yield Odd("spaces around", b"\n " + body + b" \r\n", ["zero"])
    yield Odd("twice a key", b'{"choices": [], ' + body[1:], ["zero"])
    yield Odd("as a web page", body, ["zero"], kind="text/html")
    yield Odd("without a type", body, ["zero"], kind="")
    yield Odd("1e400", b'{"more": 1e400, ' + body[1:], ["zero"])
    yield Odd("99 levels", b'{"more": ' + b"[" * 99 + b"]" * 99 + b", " + body[1:], ["zero"])
    calls: list[Any] = [{"function": {"name": "f", "arguments": "{"}}, {"id": None}, {}, 7, None]
    for call in calls:
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        made = put(reply, "choices.0.message", message)
        yield Odd(f"tool call {call}", made, [""] if isinstance(call, dict) else MalformedResponse)


def streams() -> Iterator[tuple[str, Odd]]:
    """Answers to a chat whose text is to come in events."""
    events = "text/event-stream"
    end = b"data: [DONE]\n\n"
    for operation in ("chat", "cohere.chat"):
        whole = as_json(good(operation, "zero"))
        for name, body in {
            "nothing": b"",
            "JSON": whole,
            "HTML": b"<!doctype html><title>Sign in</title>",
            "the end alone": end,
            "no event of JSON": b"data: {\n\n" + end,
            "events of other things": b'data: [1]\n\ndata: "x"\n\ndata: null\n\n' + end,
            "not UTF-8": b'data: {"choices": "\xff"}\n\n' + end,
        }.items():
            yield operation, Odd(name, body, kind=events)
        yield operation, Odd("JSON that says so", whole)
    for value in [
        True,
        7,
        "x",
        {"index": 0},
        [None],
        ["x"],
        [[]],
        [{"index": {"a": 1}}],
        [{"delta": "x"}],
    ]:
        body = b"data: " + as_json({"choices": value}) + b"\n\n" + end
        yield "chat", Odd(f"choices {value}", body, kind=events)
    for value in [True, 7, "x", [None], {"message": 7}, {"message": {"content": {"text": 7}}}]:
        body = b"data: " + as_json({"type": "content-delta", "delta": value}) + b"\n\n" + end
        yield "cohere.chat", Odd(f"delta {value}", body, kind=events)


def lists() -> Iterator[Odd]:
    """Completions of a list of prompts."""
    reply, right = good("complete", *GOOD["complete"]), GOOD["complete"]
    yield from alone("choices", reply, right)
    first, second, third = reply["choices"]
    yield from wrong(reply, "choices.1.text", (str,), right)
    for name, text in TEXTS.items():
        yield Odd(name, put(reply, "choices.1.text", text), [right[0], text, right[2]])
    yield Odd("shuffled", as_json({"choices": [third, first, second]}), right)
    yield from harmless(reply, "usage", MILD, right)
    yield from harmless(reply, "choices.1.finish_reason", MILD, right)


def alone(field: str, reply: Any, right: list[Any]) -> Iterator[Odd]:
    """Answers to a list in which it cannot be known whose they are: the calls are sent alone."""
    items = reply[field]
    for value in VALUES:
        yield Odd(f"{field}: {value!r}", put(reply, field, value), right)
        if value != {"index": 0}:
            yield Odd(f"{field}.1: {value!r}", put(reply, f"{field}.1", value), right)
    for index in [None, True, "1", 1.5, -1, 0, 2, 3, 2**70, ...]:
        yield Odd(f"{field}.1.index: {index}", put(reply, f"{field}.1.index", index), right)
    for name, some in {
        "none": [],
        "one less": items[:-1],
        "one more": [*items, {**items[0], "index": len(items)}],
        "one twice": [*items, items[0]],
        "from 1": [{**one, "index": i} for i, one in enumerate(items, 1)],
    }.items():
        yield Odd(f"{field}, {name}", as_json({**reply, field: some}), right)


def vectors() -> Iterator[Odd]:
    """Vectors of a list of texts."""
    reply, right = good("embed", *GOOD["embed"]), [[len(w), 0.5] for w in GOOD["embed"]]
    yield from alone("data", reply, right)
    for value in [*VALUES, "AAA", "AAAAAAA=", "AAAA", "!!!!", [1e39], ["1"], [[1.0]], ...]:
        yield Odd(f"vector {value}", put(reply, "data.1.embedding", value), right)
    numbers = put(reply, "data.1.embedding", [2.5, -0.0])
    yield Odd("numbers", numbers, [right[0], [2.5, -0.0], right[2]])
    yield Odd("infinite", numbers.replace(b"2.5", b"1e400"), right)
    yield Odd("shuffled", as_json({"data": reply["data"][::-1]}), right)
    yield from harmless(reply, "usage", MILD, right)


def cohere_chats() -> Iterator[Odd]:
    reply, none = good("cohere.chat", "zero"), (type(None),)
    yield from wrong(reply, "message", (dict,))
    yield from wrong(reply, "message.content", (str, list, *none))
    yield from wrong(reply, "message.content.0.text", (str,))
    yield from wrong(reply, "finish_reason", (str,))
    yield from wrong(reply, "message.tool_calls", (list, dict, *none))
    for call in (7, None, "x", []):
        yield Odd(f"tool call {call}", put(reply, "message.tool_calls", [call]))
    for call in ({}, {"id": None}, {"function": {"name": "f", "arguments": "{"}}):
        yield Odd(f"tool call {call}", put(reply, "message.tool_calls", [call]), ["zero"])
    for name, text in TEXTS.items():
        yield Odd(name, as_json(good("cohere.chat", text)), [text])
    counts: list[Any] = [{"input_tokens": -5}, {"output_tokens": 2**70}, {"input_tokens": 1e308}]
    yield from harmless(reply, "usage", MILD, ["zero"])
    yield from harmless(reply, "usage.billed_units", [*MILD, *counts], ["zero"])
    yield from harmless(reply, "logprobs", MILD, ["zero"])
    yield from harmless(reply, "id", MILD, ["zero"])


def cohere_vectors() -> Iterator[Odd]:
    reply, right = good("cohere.embed", *GOOD["embed"]), [[len(w), 0.5] for w in GOOD["embed"]]
    yield from wrong(reply, "embeddings")
    yield from wrong(reply, "embeddings.float", (list,))
    for value in [*VALUES, "AAAA", [1e39], ["1"], [[1.0]]]:
        yield Odd(f"vector {value}", put(reply, "embeddings.float.1", value), right)
    rows = reply["embeddings"]["float"]
    for name, some in {"none": [], "one less": rows[1:], "one more": rows * 2}.items():
        yield Odd(name, as_json({"embeddings": {"float": some}}), right)
    yield from harmless(reply, "meta", MILD, right)


def generations() -> Iterator[Odd]:
    reply = good("cohere.generate", "zero")
    yield from wrong(reply, "generations", (list,))
    for some in ([], reply["generations"] * 2):
        yield Odd(f"{len(some)} generations", as_json({"generations": some}), CountMismatch)
    yield from wrong(reply, "generations.0")
    yield from wrong(reply, "generations.0.text", (str,))
    for name, text in TEXTS.items():
        yield Odd(name, as_json(good("cohere.generate", text)), [text])
    yield from harmless(reply, "generations.0.finish_reason", MILD, ["zero"])
    yield from harmless(reply, "meta", MILD, ["zero"])


CASES: dict[str, Callable[[], Iterator[Odd]]] = {
    "chat": chats,
    "complete": lists,
    "embed": vectors,
    "cohere.chat": cohere_chats,
    "cohere.embed": cohere_vectors,
    "cohere.generate": generations,
}


def calls_of(operation: str, url: str, model: str, words: list[str]) -> list[Any]:
    limits = Limits(concurrency=32)
    if operation.startswith("cohere"):
        co = Cohere("m", base_url=url, api_key="sk-canary-0123456789", limits=limits)
        params: Any = {"chat": CohereChat, "embed": CohereEmbed, "generate": GenerateParams}
        name = operation.partition(".")[2]
        return [getattr(co, name)(word, params[name](model=model)) for word in words]
    llm = OpenAI("m", base_url=f"{url}/v1", api_key="sk-canary-0123456789", limits=limits)
    params = {"chat": ChatParams, "complete": CompleteParams, "embed": EmbedParams}
    return [getattr(llm, operation)(word, params[operation](model=model)) for word in words]


def plain(value: Any) -> Any:
    """A value without its kind, so that equal ones are the same numbers or characters."""
    return str(value) if isinstance(value, str) else list(value)


def outcome(values: list[Any]) -> Any:
    """The values of a case's calls, or the error that all of them have."""
    kinds = {type(v) for v in values if isinstance(v, CallError) and v.billed == "yes"}
    if len(kinds) == 1 and all(isinstance(v, CallError) for v in values):
        return kinds.pop()
    return [v if isinstance(v, CallError) else plain(v) for v in values]


def cases_of(operation: str) -> list[Odd]:
    """The odd answers of an operation; of a list, some of those that are no answer at all."""
    most = 1 if operation.endswith("chat") else 3
    return [*[*unreadable(operation)][::most], *CASES[operation]()]


def test_there_are_many() -> None:
    """More than 300 different bodies, and of each operation some that are right and some that are not."""
    every = {operation: cases_of(operation) for operation in CASES}

    assert len({odd.body for odds in every.values() for odd in odds}) > 300
    for odds in every.values():
        assert any(isinstance(odd.wants, list) for odd in odds)
        assert any(isinstance(odd.wants, type) for odd in odds)
        assert len(odds) > 30


@pytest.mark.parametrize("operation", list(CASES))
def test_an_odd_answer_is_what_it_says_or_an_error(operation: str, tmp_path: Path) -> None:
    """Values are exact and kept; the others are bought twice and fail; good calls are not touched."""
    odd = {f"odd-{i}": one for i, one in enumerate(cases_of(operation))}
    settings: Any = {"store": tmp_path / "store", "progress": False}
    with odd_server(odd) as (url, served):
        if len(GOOD[operation]) == 1:
            asked = {name: calls_of(operation, url, "m", [name]) for name in odd}
        else:  # a list for each
            asked = {name: calls_of(operation, url, name, GOOD[operation]) for name in odd}
        fine = calls_of(operation, url, "fine", [f"word {i}" for i in range(20)])
        got, well = feste.compute(asked, fine, on_error="return", **settings)

        for name, values in got.items():
            assert outcome(values) == odd[name].wants, odd[name].name
        assert all(served[name] for name in odd)  # each answer came
        assert [plain(v) for v in well] == [value_of(operation, f"word {i}") for i in range(20)]

        kept = {name: calls for name, calls in asked.items() if type(odd[name].wants) is list}
        sent = served.total()
        again = feste.compute(kept, **settings)[0]
        assert served.total() == sent
    for name, values in again.items():
        assert [plain(v) for v in values] == odd[name].wants
        assert all(
            pickle.dumps(a) == pickle.dumps(b) for a, b in zip(values, got[name], strict=True)
        )


def test_an_odd_stream_is_an_error() -> None:
    """Typed, with what may have been paid; a text is never made of it."""
    every = [*streams()]
    odd = {f"odd-{i}": one for i, (_, one) in enumerate(every)}
    with odd_server(odd) as (url, served):
        for name, (operation, one) in zip(odd, every, strict=True):
            (call,) = calls_of(operation, url, "m", [name])
            with pytest.raises(feste.errors.RunFailed) as failed:
                list(feste.stream(call))
            assert outcome(failed.value.errors) is MalformedResponse, (operation, one.name)
            assert served[name] == 2  # bought once more


def test_the_largest_list_of_vectors_is_read() -> None:
    """2,048 vectors of 3,072 numbers, 34 MB as base64, in one answer."""
    words = [str(i) for i in range(2_048)]
    rows = [
        base64.b64encode(array.array("f", [i] * 3_072).tobytes()).decode() for i in range(2_048)
    ]
    body = as_json({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]})
    assert len(body) > 33_000_000
    with odd_server({"large": Odd("large", body)}) as (url, served):
        got = feste.compute(calls_of("embed", url, "large", words), progress=False)[0]
    assert served == {"large": 1}
    assert all(v == array.array("f", [i] * 3_072) for i, v in enumerate(got))
