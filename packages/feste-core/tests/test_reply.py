"""What an LLM call returns is text, and remembers how it came about."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

import feste
from feste import context
from feste.backend import Reply, Usage
from feste.prompt import Prompt

CALLS = [{"id": "1", "function": {"name": "search"}}]
FULL = Reply(
    "Once",
    message={"role": "assistant", "content": "Once", "tool_calls": CALLS},
    finish_reason="length",
    usage=Usage(3, 1),
    logprobs=[-0.5],
    model="m-1",
)


def test_a_reply_is_text() -> None:
    """It can be used wherever text can; what is made of it is plain text."""
    assert FULL == "Once"
    assert {FULL: 1}["Once"] == 1
    assert (FULL + "!", FULL.upper(), f"{FULL}", FULL[1:]) == ("Once!", "ONCE", "Once", "nce")
    assert {type(x) for x in (FULL + "!", FULL.upper(), f"{FULL}", str(FULL))} == {str}
    assert json.dumps({"text": FULL}) == '{"text": "Once"}'


def test_a_reply_knows_more() -> None:
    """Message, tools, reason, usage, log-probabilities, model."""
    assert FULL.tool_calls == CALLS
    assert (FULL.finish_reason, FULL.usage, FULL.logprobs, FULL.model) == (
        "length",
        Usage(3, 1),
        [-0.5],
        "m-1",
    )


def test_a_bare_reply() -> None:
    """What the provider did not say is None or empty; the message can go back into a conversation."""
    reply = Reply("Hi")

    assert reply.message == {"role": "assistant", "content": "Hi"}
    assert type(reply.message["content"]) is str
    assert (reply.tool_calls, reply.usage, reply.logprobs, reply.finish_reason, reply.model) == (
        (),
        None,
        None,
        None,
        "",
    )
    assert Reply() == ""


@pytest.mark.parametrize(
    ("reason", "cut"),
    [
        *(
            (r, True)
            for r in ("length", "max_tokens", "MAX_TOKENS", "timeout", "error", "error_toxic")
        ),
        *((r, False) for r in ("stop", "tool_calls", None)),
    ],
)
def test_a_cut_off_answer_is_flagged(reason: str | None, cut: bool) -> None:
    """Whatever the provider calls it."""
    assert Reply("x", finish_reason=reason).truncated is cut


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_replies_pickle_whole(protocol: int) -> None:
    """Text and all that is known of it."""
    back = pickle.loads(pickle.dumps(FULL, protocol))

    assert (type(back), back, vars(back)) == (Reply, "Once", vars(FULL))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy])
def test_replies_copy_whole(again: Any) -> None:
    """A copy is a reply, too."""
    assert (type(again(FULL)), vars(again(FULL))) == (Reply, vars(FULL))


@pytest.mark.parametrize("eager", [False, True])
def test_into_a_template_goes_the_text(eager: bool) -> None:
    """A reply as a variable is exactly its text."""

    @feste.task
    def answer() -> Reply:
        return FULL

    with context.set(eager=eager):
        (text,) = feste.compute(Prompt("{{ x }}{{ x|length }}")(x=answer()))

    assert (text, type(text)) == ("Once4", str)
