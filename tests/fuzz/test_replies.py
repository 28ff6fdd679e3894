"""Replies with parts replaced, left out and repeated: an error of Feste, or the right answer.

``CHAOS=full`` looks at 2,000 of each.
"""

from __future__ import annotations

import array
import base64
import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from feste.backend import Response
from feste.backend.cohere import Cohere
from feste.backend.openai import OpenAI
from feste.errors import CallError
from tests.fuzz.sizes import cases

ODD = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        1,
        2**70,
        1e308,
        float("inf"),
        "",
        "x",
        "\ud800\0\x1b[31m",
        [],
        {},
        [[]],
        [None],
    ]
    + [{"index": True}, {"index": 0}, "AAAA", [1e39], [[1.0]], {"content": {}}]
)
K = 3
WORDS = ["zero", "one", "two"]


def packed(i: int) -> str:
    return base64.b64encode(array.array("f", [i, 0.5]).tobytes()).decode()


GOOD: dict[str, dict[str, Any]] = {
    "complete": {
        "model": "m",
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
        "choices": [{"index": i, "text": w, "finish_reason": "stop"} for i, w in enumerate(WORDS)],
    },
    "embed": {"data": [{"index": i, "embedding": packed(i)} for i in range(K)]},
    "chat": {
        "model": "m",
        "usage": {"prompt_tokens": 3, "completion_tokens": 3},
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "zero"},
                "finish_reason": "stop",
            }
        ],
    },
    "cohere.chat": {
        "message": {"role": "assistant", "content": [{"type": "text", "text": "zero"}]},
        "finish_reason": "COMPLETE",
        "usage": {"billed_units": {"input_tokens": 3, "output_tokens": 3}},
    },
    "cohere.embed": {"embeddings": {"float": [[float(i), 0.5] for i in range(K)]}},
    "cohere.generate": {"generations": [{"text": "zero", "finish_reason": "COMPLETE"}]},
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for name, one in items:
        yield (*path, name)
        yield from places(one, (*path, name))


@st.composite
def mutated(draw: st.DrawFn, name: str) -> Any:
    reply = copy.deepcopy(GOOD[name])
    for _ in range(draw(st.integers(0, 3))):
        found = list(places(reply))
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        parent = reply
        for step in path:
            parent = parent[step]
        how = draw(st.sampled_from(["replace", "delete", "repeat", "swap"]))
        if how == "replace":
            parent[last] = copy.deepcopy(draw(ODD))
        elif how == "delete":
            del parent[last]
        elif isinstance(parent, list):
            other = draw(st.integers(0, len(parent) - 1))
            if how == "repeat":
                parent.insert(other, copy.deepcopy(parent[last]))
            else:
                parent[last], parent[other] = parent[other], parent[last]
    return reply


def values(call: Any, arguments: list[Any], reply: Any) -> list[Any]:
    """Take a reply apart and parse it as a run does; an error of Feste in each failed place."""
    bound = [call.operation.bind(list(given), {}) for given in arguments]
    requests = [call.prepare(one) for one in bound]
    rule = call.rule
    try:
        if rule is None or len(requests) == 1:
            parts: Any = [Response(reply)]
        else:
            parts = rule.unpack(call.client, rule.pack(call.client, requests), Response(reply))
    except CallError as error:
        return [error] * len(requests)
    assert len(parts) == len(requests)
    found: list[Any] = []
    for part, one in zip(parts, bound, strict=True):
        try:
            found.append(call.parse(part, one))
        except CallError as error:
            found.append(error)
    return found


LLM: Any = OpenAI("m", base_url="http://127.0.0.1:9/v1")
CO: Any = Cohere("m", base_url="http://127.0.0.1:9")


def numbered(reply: Any, field: str, i: int) -> Any:
    """What a strict reader takes as the answer with a number."""
    (one,) = [
        x
        for x in reply[field]
        if type(x) is dict and type(x.get("index")) is int and x["index"] == i
    ]
    return one


@cases(50)
@given(mutated("complete"))
def test_completions_of_a_list(reply: Any) -> None:
    for i, got in enumerate(values(LLM.complete, [(w,) for w in WORDS], reply)):
        assert isinstance(got, CallError) or got == numbered(reply, "choices", i)["text"]


@cases(50)
@given(mutated("embed"))
def test_vectors_of_a_list(reply: Any) -> None:
    for i, got in enumerate(values(LLM.embed, [(w,) for w in WORDS], reply)):
        if isinstance(got, CallError):
            continue
        sent = numbered(reply, "data", i)["embedding"]
        wanted = (
            base64.b64decode(sent) if isinstance(sent, str) else array.array("f", sent).tobytes()
        )
        assert got.tobytes() == wanted


@cases(50)
@given(mutated("chat"))
def test_a_chat(reply: Any) -> None:
    (got,) = values(LLM.chat, [("x",)], reply)
    assert isinstance(got, CallError) or got == (
        next(x for x in reply["choices"] if isinstance(x, dict))["message"].get("content") or ""
    )


@cases(50)
@given(mutated("cohere.embed"))
def test_coheres_vectors(reply: Any) -> None:
    for i, got in enumerate(values(CO.embed, [(w,) for w in WORDS], reply)):
        assert isinstance(got, CallError) or got == array.array(
            "f", reply["embeddings"]["float"][i]
        )


@cases(50)
@given(mutated("cohere.chat"))
def test_coheres_chat(reply: Any) -> None:
    (got,) = values(CO.chat, [("x",)], reply)
    if not isinstance(got, CallError):
        said = reply["message"].get("content") or ""
        texts = (
            said if isinstance(said, str) else [p["text"] for p in said if p.get("type") == "text"]
        )
        assert got == "".join(texts)


@cases(50)
@given(mutated("cohere.generate"))
def test_coheres_generations(reply: Any) -> None:
    (got,) = values(CO.generate, [("x",)], reply)
    assert isinstance(got, CallError) or got == reply["generations"][0]["text"]
