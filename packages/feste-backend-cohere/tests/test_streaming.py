"""The pieces of a streamed answer go together, and in time that is proportional to their number."""

from __future__ import annotations

import time
from typing import Any

import pytest

from feste.backend.cohere.streaming import Assembly


def assembled(*events: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    reply = Assembly()
    return [reply.take(event) for event in events], reply.payload["message"]


def delta(kind: str, index: int = 0, **message: Any) -> dict[str, Any]:
    return {"type": kind, "index": index, "delta": {"message": message}}


def test_pieces_go_together_by_number() -> None:
    """Texts, thoughts, plans and the arguments of tools come in turns."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": ""}}
    pieces, message = assembled(
        delta("content-start", 0, content={"type": "thinking", "thinking": "h"}),
        delta("content-start", 1, content={"type": "text", "text": ""}),
        delta("content-delta", 1, content={"text": "Hel"}),
        delta("content-delta", 0, content={"thinking": "m"}),
        delta("content-delta", 1, content={"text": "lo"}),
        delta("tool-plan-delta", tool_plan="I "),
        delta("tool-plan-delta", tool_plan="add"),
        delta("tool-call-start", 0, tool_calls=call),
        delta("tool-call-start", 1, tool_calls={**call, "id": "d"}),
        delta("tool-call-delta", 0, tool_calls={"function": {"arguments": "{"}}),
        delta("tool-call-delta", 1, tool_calls={"function": {"arguments": "[]"}}),
        delta("tool-call-delta", 0, tool_calls={"function": {"arguments": "}"}}),
    )

    assert "".join(pieces) == "Hello"
    assert message == {
        "role": "assistant",
        "tool_plan": "I add",
        "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hello"}],
        "tool_calls": [
            {**call, "function": {"name": "add", "arguments": "{}"}},
            {**call, "id": "d", "function": {"name": "add", "arguments": "[]"}},
        ],
    }


def test_many_pieces_take_no_long_time() -> None:
    """The text that has come is not copied for each piece that comes."""
    piece, begun = "x" * 40, time.process_time()
    for event in (
        delta("content-delta", content={"text": piece}),
        delta("content-delta", content={"thinking": piece}),
        delta("tool-plan-delta", tool_plan=piece),
        delta("tool-call-delta", tool_calls={"function": {"arguments": piece}}),
    ):
        assert str(assembled(*[event] * 80_000)[1]).count(piece) == 80_000

    assert time.process_time() - begun < 10  # it takes 0.5 s


@pytest.mark.parametrize("value", [1, ["x"], {"x": 1}])
def test_a_piece_that_is_no_text(value: Any) -> None:
    """It is told where it comes; null and nothing are no piece."""
    for event in (
        delta("content-delta", content={"text": value}),
        delta("content-start", content={"type": value}),
        delta("tool-plan-delta", tool_plan=value),
        delta("tool-call-start", tool_calls={"function": {"arguments": value}}),
    ):
        with pytest.raises(TypeError):
            Assembly().take(event)
    assert assembled(delta("content-delta", content={"text": None}))[0] == [""]
