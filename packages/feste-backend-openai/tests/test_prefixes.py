"""What the prompt cache compares, and the marks that tell it where a prefix ends."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feste.backend import Request
from feste.backend.openai import ChatParams, OpenAI
from feste.backend.openai.prefixes import mark, parts
from feste.backend.openai.testing import answer
from feste.errors import InvalidRequest
from feste.testing import SimServer
from feste.testing.backend_contract import sent

WIRE = "feste.backend.openai.testing:OpenAIWire"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
BREAK = {"prompt_cache_breakpoint": {"mode": "explicit"}}


def text(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": content, **more}


def asked(*messages: Any, **body: Any) -> Request:
    return Request("openai", "chat", "http://x/v1", {"model": "m", "messages": [*messages], **body})


SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}

_BLOCKS = st.lists(
    st.builds(text, st.text(max_size=3))
    | st.just({"type": "image_url", "image_url": {"url": "http://x"}}),
    max_size=3,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool", "function"]),
            "content": st.text(max_size=3) | _BLOCKS | st.none(),
        },
        optional={"name": st.just("n")},
    ),
    min_size=1,
    max_size=4,
)
_HEADS = st.fixed_dictionaries({}, optional={"tools": st.just(TOOLS), "verbosity": st.just("low")})


class TestParts:
    def test_tools_and_formats_come_first_then_each_message(self) -> None:
        """The first part is whatever is written before the first message, if anything is."""
        head, first, second = parts(asked(SYSTEM, USER, tools=TOOLS, temperature=0.5))

        assert [first, second] == parts(asked(SYSTEM, USER, max_tokens=3))
        assert "look" in head and "0.5" not in head
        assert "system" in first and "Be brief." in first and "Hi" in second

    def test_what_changes_the_beginning_changes_the_first_part(self) -> None:
        """A schema or an effort is part of the prompt that the model reads."""
        heads = [
            parts(asked(USER, **body))[0]
            for body in (
                {"tools": TOOLS},
                {"tools": TOOLS, "reasoning_effort": "low"},
                {"tools": [*TOOLS, *TOOLS]},
                {"response_format": {"type": "json_object"}},
                {},
            )
        ]
        assert len(set(heads)) == 5

    def test_the_order_of_keys_is_not_seen_that_of_tools_is(self) -> None:
        """Bodies that are equal as JSON have equal parts."""
        a = {"type": "function", "function": {"name": "a"}}
        turned = {"function": {"name": "a"}, "type": "function"}

        assert parts(asked(USER, tools=[a])) == parts(asked(USER, tools=[turned]))
        assert parts(asked(USER, tools=[a, *TOOLS])) != parts(asked(USER, tools=[*TOOLS, a]))

    def test_texts_that_begin_alike_are_parts_that_begin_alike(self) -> None:
        """So that a prefix may end inside a message."""
        (one,) = parts(asked({"role": "user", "content": "Long text. One"}))
        (two,) = parts(asked({"role": "user", "content": "Long text. Two"}))

        assert one[:-3] == two[:-3] != one[:-2]

    @pytest.mark.parametrize(
        "other",
        [
            {"role": "system", "content": "Hi"},
            {"role": "user", "content": "Ho"},
            {"role": "user", "content": "Hi", "name": "Ada"},
            {"role": "user", "content": [text("Hi")]},
            {"role": "user", "content": None, "tool_calls": []},
        ],
    )
    def test_other_messages_are_other_parts(self, other: Any) -> None:
        """Every field of a message counts."""
        assert parts(asked(other)) != parts(asked(USER))


class TestMark:
    def test_a_text_becomes_a_block_with_the_mark(self) -> None:
        """The last message of the prefix carries the mark, and only there a prefix is written."""
        marked = mark(asked(SYSTEM, USER, tools=TOOLS), "k", [2])

        assert marked.body["messages"] == [
            {"role": "system", "content": [text("Be brief.", **BREAK)]},
            USER,
        ]
        assert marked.body["prompt_cache_key"] == "k"
        assert marked.body["prompt_cache_options"] == {"mode": "explicit"}

    def test_of_blocks_the_last_carries_it(self) -> None:
        """The other blocks, and the other fields of the message, stay."""
        message = {"role": "user", "content": [text("a"), text("b")], "name": "Ada"}
        marked = mark(asked(message, USER), None, [1])

        assert marked.body["messages"][0] == {**message, "content": [text("a"), text("b", **BREAK)]}
        assert "prompt_cache_key" not in marked.body

    @pytest.mark.parametrize(
        ("messages", "whole"),
        [
            ([SYSTEM, USER], 0),
            ([SYSTEM, USER], 1),  # the tools, which cannot carry it
            ([SYSTEM, USER], 4),
            ([SYSTEM, USER], -1),
            ([{"role": "user", "content": ""}], 2),
            ([{"role": "user", "content": []}], 2),
            ([{"role": "assistant", "content": None, "tool_calls": []}], 2),
            ([{"role": "function", "name": "f", "content": "x"}], 2),
            ([{"role": "user", "content": [text("a"), {"type": "image_url"}]}], 2),
            ([{"role": "user", "content": [{"type": "other", "text": "a"}]}], 2),
        ],
    )
    def test_where_no_mark_can_be_there_is_the_key_alone(self, messages: Any, whole: int) -> None:
        """Without a mark, asking for explicit ones would turn the cache off."""
        request = asked(*messages, tools=TOOLS)

        assert mark(request, "k", [whole]).body == {**request.body, "prompt_cache_key": "k"}
        assert mark(request, None, [whole]) is request

    def test_the_users_key_stays(self) -> None:
        """The mark is set all the same."""
        marked = mark(asked(SYSTEM, USER, prompt_cache_key="mine"), "k", [1])

        assert marked.body["prompt_cache_key"] == "mine"
        assert marked.body["messages"][0]["content"] == [text("Be brief.", **BREAK)]

    @pytest.mark.parametrize(
        "request_",
        [
            asked(SYSTEM, USER, prompt_cache_options={"mode": "implicit"}),
            asked(SYSTEM, USER, prompt_cache_options={}),
            asked(SYSTEM, {"role": "user", "content": [text("a", **BREAK), text("b")]}),
        ],
    )
    def test_a_body_with_marks_of_the_user_is_his(self, request_: Request) -> None:
        """He plans the cache himself; a key would move his prefixes to another machine."""
        assert mark(request_, "k", [1]) is request_

    @given(_MESSAGES, _HEADS, st.none() | st.just("k"), st.integers(0, 6))
    def test_a_mark_changes_nothing_else(
        self, messages: Any, head: Any, key: str | None, whole: int
    ) -> None:
        """The request that keys the answer stays; without marks and blocks the other is equal."""
        request = asked(*messages, **head)
        before, name = copy.deepcopy(dict(request.body)), request.key

        marked = mark(request, key, [whole])

        assert (dict(request.body), request.key) == (before, name)
        assert len(parts(request)) == bool(head) + len(messages)
        ends = [
            i
            for i, message in enumerate(marked.body["messages"])
            for block in message["content"] or ()
            if "prompt_cache_breakpoint" in block
        ]
        assert ends in ([], [whole - bool(head) - 1])
        assert ("prompt_cache_options" in marked.body) is bool(ends)
        assert marked.body.get("prompt_cache_key") == key
        plain = [
            {**message, "content": _plain(message["content"], messages[i]["content"])}
            for i, message in enumerate(marked.body["messages"])
        ]
        ours = ("messages", "prompt_cache_key", "prompt_cache_options")
        rest = {k: v for k, v in marked.body.items() if k not in ours}
        assert {**rest, "messages": plain} == before


def _plain(content: Any, was: Any) -> Any:
    """A content without marks, and as a string if it was one."""
    if not isinstance(content, list):
        return content
    blocks = [{k: v for k, v in block.items() if k not in BREAK} for block in content]
    return blocks[0]["text"] if isinstance(was, str) and len(blocks) == 1 else blocks


# --- over a socket ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[SimServer]:
    with SimServer(WIRE) as server:
        yield server


@pytest.mark.parametrize("content", ["Be brief.", [text("Be brief.")], [text("Be"), text("kind")]])
@pytest.mark.parametrize("whole", [1, 2])
def test_the_answer_is_the_same(server: SimServer, content: Any, whole: int) -> None:
    """The SDK sends the marks as they are, a server accepts them, and answers the same."""
    server.reset()
    call: Any = OpenAI("m", base_url=f"{server.url}/v1").chat
    talk = [{"role": "system", "content": content}, USER]
    request = call.prepare([talk, ChatParams(temperature=0), None])
    marked = call.operation.prefix.mark(request, "k", [whole])

    plain, other = (sent(call, r).payload for r in (request, marked))

    assert plain["choices"] == other["choices"] and plain["usage"] == other["usage"]
    if content == "Be brief.":
        assert plain["choices"][0]["message"]["content"] == answer(talk)
    bodies = [entry.body for entry in server.requests()]
    assert bodies == [request.body, marked.body]
    assert len({entry["key"] for entry in server.ledger()}) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"role": "user", "content": [text("a", prompt_cache_breakpoint=True)]}]},
        {"prompt_cache_options": {"mode": "always"}},
        {"prompt_cache_key": 5},
    ],
)
def test_the_server_refuses_marks_of_another_form(server: SimServer, wrong: Any) -> None:
    """So the test above can fail."""
    call: Any = OpenAI("m", base_url=f"{server.url}/v1").chat
    request = call.prepare(["Hi", ChatParams(), None])
    with pytest.raises(InvalidRequest):
        sent(call, Request("openai", "chat", request.endpoint, {**request.body, **wrong}))
